"""The labels of rows like this one: a spread from nothing but the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels.priors.evidence import Evidence

TEMPERATURE = 0.1  # divides the cosines
BLOCK = 2**22  # similarities that are worked on together: 16 MiB in float32
MOST_ROWS = 2**15  # a quarter of a minute of products at 1,000 classes on two cores


def neighbour_spread(batch: Evidence, among: Evidence, first: int = 0) -> Tensor:
    r"""How the labels of alike rows are spread, (M, K).

    With $z$ the logits less their mean over the classes that have a probability,

    $$o_i = \sum_{j \ne i} w_{ij}\, \mathrm{onehot}(y_j), \qquad
      w_{i\cdot} = \mathrm{softmax}_{j \ne i}\big(\cos(z_i, z_j) / 0.1\big).$$

    Args:
        batch: The rows that are asked for.
        among: The rows that answer, ``batch`` among them. Those that do not count are left out.
        first: Where ``batch`` begins among them.

    Returns:
        Numbers that sum to 1 in each row, or 0 where no other row counts.

    Raises:
        ValueError: there are more than 32,768 rows, as of dense predictions.
    """
    rows, others = len(batch.counted), len(among.counted)
    if others > MOST_ROWS:
        raise ValueError(
            f"spread='neighbours' compares all rows with each other, at most {MOST_ROWS:,}, got {others:,}; use "
            "spread='classes' for pixels or tokens, or call the loss on a part of them"
        )
    own = _directions(batch)
    theirs = own if among is batch else _directions(among)
    spread, places = torch.empty_like(batch.logits), torch.arange(others, device=own.device)
    height = max(BLOCK // max(others, 1), 1)
    with torch.autocast(own.device.type, enabled=False):
        for start in range(0, rows, height):
            alike = own[start : start + height] @ theirs.T / TEMPERATURE
            itself = places == places[first + start :][: len(alike)].unsqueeze(1)
            alike.masked_fill_(itself | ~among.counted, -torch.inf)
            weights = alike.softmax(1).nan_to_num_(0.0)  # nan where no other row counts
            part = spread[start : start + height]
            if among.target.is_floating_point():
                part.copy_(weights @ among.target.to(weights.dtype))
            else:
                part.zero_().index_add_(1, among.target, weights)
    return spread


def _directions(rows: Evidence) -> Tensor:
    """Unit vectors of the centred logits; classes without a probability take no part."""
    impossible = rows.predictions < torch.finfo(torch.float32).tiny
    logits = rows.logits.masked_fill(impossible, 0.0)
    mean = logits.sum(1, keepdim=True) / (~impossible).sum(1, keepdim=True).clamp(min=1)
    return torch.nn.functional.normalize(logits.sub_(mean).masked_fill_(impossible, 0.0), dim=1)
