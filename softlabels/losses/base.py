"""What all losses share: the options of nn.CrossEntropyLoss, checked once, and a repr that shows them."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from softlabels.functional import _checks


class SoftLabelLoss(nn.Module):
    """Base of the losses: ``weight``, ``ignore_index`` and ``reduction`` as in nn.CrossEntropyLoss."""

    weight: Tensor | None
    options: ClassVar[tuple[str, ...]] = ()  # names of the loss's own options, in the order of the signature

    def __init__(self, weight: Tensor | None = None, *, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        _checks.check_class_weight(weight)
        _checks.check_ignore_index(ignore_index)
        _checks.check_reduction(reduction)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction

    def common(self, sample_weight: Tensor | None) -> dict[str, Any]:
        """Keyword arguments that every functional loss takes."""
        return {
            "weight": self.weight,
            "sample_weight": sample_weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
        }

    def extra_repr(self) -> str:
        """Show the options that are set."""
        shown = {name: getattr(self, name) for name in self.options}
        parts = [f"{name}={value!r}" for name, value in shown.items() if value is not None and value is not False]
        if self.weight is not None:
            parts.insert(0, f"weight=<{self.weight.numel()} classes, {self.weight.dtype}>")
        if self.ignore_index != -100:
            parts.append(f"ignore_index={self.ignore_index}")
        if self.reduction != "mean":
            parts.append(f"reduction={self.reduction!r}")
        return ", ".join(parts)
