"""Each training sample's own past confidence: a ranking without a second forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softlabels._processes import of_all_processes
from softlabels._tables import Tables


class PredictionHistory(Tables):
    r"""Mean, over the visits of each training sample, of the doubt 1 - c that the model had about it.

    One float32 and one int32 per sample. Doubt rather than confidence is stored because float32 resolves numbers near
    0, not near 1.

    Args:
        num_samples: Size of the training set; sample ids are in [0, num_samples).

    Attributes:
        doubt: (num_samples,) float32, nan until the sample is first seen.
        visits: (num_samples,) int32.
    """

    doubt: Tensor
    visits: Tensor

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        self.num_samples = num_samples
        self.register_buffer("doubt", torch.full((num_samples,), torch.nan, dtype=torch.float32))
        self.register_buffer("visits", torch.zeros(num_samples, dtype=torch.int32))

    @torch.no_grad()
    def rank_and_update(self, index: Tensor, log_odds: Tensor, kept: Tensor, *, joint: bool = False) -> Tensor:
        """Confidence to rank by, from before this batch, then average this batch in.

        Args:
            index: Sample ids, row-shaped int64. Rows of one id are visits of one sample.
            log_odds: Current log-odds of the confidence, row-shaped.
            kept: Row-shaped bool; other rows leave the history alone.
            joint: Average in the rows of all processes of the default group, so that each has seen every visit.

        Returns:
            Log-odds of the mean confidence; for samples not seen before, ``log_odds``.
        """
        past = -torch.logit(self.doubt[index])
        ranked = torch.where(self.visits[index] > 0, past, log_odds.float())
        rows = [index.flatten().long(), log_odds.flatten(), kept.flatten()]
        self._record(*(of_all_processes(*rows)[0] if joint else rows))
        return ranked

    def _record(self, index: Tensor, log_odds: Tensor, kept: Tensor) -> None:
        past, before = self.doubt[index], self.visits[index]
        current = torch.sigmoid(-log_odds.float())
        new = kept & ~current.isnan()
        self.visits.index_add_(0, index, new.int())
        after = self.visits[index]
        mean = torch.where(before > 0, past, 0.0) * before / after.clamp(min=1)
        self.doubt[index] = torch.where(after > 0, mean, torch.nan)
        self.doubt.index_add_(0, index, torch.where(new, current / after.clamp(min=1), 0.0))

    def is_in(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether a checkpoint has a history; old ones did not count visits."""
        doubt = state_dict.get(prefix + "doubt")
        if doubt is not None:
            state_dict.setdefault(prefix + "visits", (~doubt.isnan()).int())
        return super().is_in(state_dict, prefix)

    def emptied(self) -> PredictionHistory:
        """The same, as it was made."""
        return PredictionHistory(self.num_samples)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"num_samples={self.num_samples}"
