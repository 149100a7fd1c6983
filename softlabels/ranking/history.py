"""Each training sample's own past confidence: a ranking without a second forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class PredictionHistory(nn.Module):
    r"""Moving average, per training sample, of the doubt 1 - c that the model had about it.

    One float32 per sample, nan until the sample is first seen. A sample is met about once per epoch, every n =
    num_samples / (rows of the batch) optimizer steps, so a visit decays the past by ``decay ** n``: the same memory,
    counted in steps, as an EMA of the weights at ``decay``. Doubt rather than confidence is stored because float32
    resolves numbers near 0, not near 1.

    Args:
        num_samples: Size of the training set; sample ids are in [0, num_samples).
        decay: Decay per optimizer step, in [0, 1).
    """

    doubt: Tensor

    def __init__(self, num_samples: int, decay: float) -> None:
        super().__init__()
        self.num_samples = num_samples
        self.decay = decay
        self.register_buffer("doubt", torch.full((num_samples,), torch.nan, dtype=torch.float32))

    @torch.no_grad()
    def rank_and_update(self, index: Tensor, log_odds: Tensor, kept: Tensor) -> Tensor:
        """Confidence to rank by, from before this batch, then average this batch in.

        Args:
            index: Sample ids, row-shaped int64.
            log_odds: Current log-odds of the confidence, row-shaped.
            kept: Row-shaped bool; other rows leave the history alone.

        Returns:
            Log-odds of the averaged confidence; for samples not seen before, ``log_odds``.
        """
        past = self.doubt[index]
        current = torch.sigmoid(-log_odds.float())
        seen = ~past.isnan()
        decay = self.decay ** (self.num_samples / max(index.numel(), 1))
        averaged = torch.where(seen, decay * past + (1.0 - decay) * current, current)
        self.doubt[index] = torch.where(kept & ~current.isnan(), averaged, past)
        return torch.where(seen, -torch.logit(past), log_odds.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves between devices but stay float32."""
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)  # type: ignore[no-untyped-call, no-any-return]

    def extra_repr(self) -> str:
        """Show the options."""
        return f"num_samples={self.num_samples}, decay={self.decay}"
