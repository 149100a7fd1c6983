"""What all losses share: the options of nn.CrossEntropyLoss, checked whenever they are set, and a repr of them."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from softlabels import _checks
from softlabels.functional._rows import Rows, prepare
from softlabels.kernels import LinearLogits

CHECKPOINT = inspect.unwrap(checkpoint)  # without what keeps compilers out
Forward = TypeVar("Forward", bound=Callable[..., Tensor])


def called_as(forward: Forward) -> Forward:
    """A ``__call__`` that does what nn.Module's does, and shows the arguments of ``forward`` to editors and help()."""

    @functools.wraps(forward)
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, *args, **kwargs)

    return cast(Forward, __call__)


class SoftLabelLoss(nn.Module):
    """Base of the losses: ``weight``, ``ignore_index`` and ``reduction`` as in nn.CrossEntropyLoss."""

    if TYPE_CHECKING:  # annotations of a class are strings, which programs that wrap losses evaluate elsewhere
        weight: Tensor | None
        options: ClassVar[dict[str, Callable[[str, Any], Any]]]
    else:
        options = {}  # each of the loss's own options, and its check

    def __init__(self, weight: Tensor | None = None, *, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        _checks.check_class_weight(weight)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction

    def __setattr__(self, name: str, value: Any) -> None:
        """Check an option, in the constructor as later."""
        check = self.options.get(name) or _COMMON.get(name)
        super().__setattr__(name, value if check is None else check(name, value))

    def rows(
        self, input: Tensor | LinearLogits, target: Tensor, sample_weight: Tensor | None, *, counts: bool = False
    ) -> Rows:
        """Check the arguments of a call."""
        return prepare(input, target, self.weight, sample_weight, self.ignore_index, self.reduction, counts=counts)

    @property
    def in_training(self) -> bool:
        """Whether the loss acts on the batch: in training mode with grad enabled.

        Raises:
            RuntimeError: grad is disabled because a reentrant activation checkpoint runs the forward pass: the value
                would be that of evaluation, and the recomputation would train something else.
        """
        if self.training and not torch.is_grad_enabled() and _is_called_by(CheckpointFunction.forward):
            raise RuntimeError(
                f"{type(self).__name__} is called inside torch.utils.checkpoint with use_reentrant=True, where it "
                "cannot tell training from evaluation; call the loss outside of the checkpointed function, or use "
                "use_reentrant=False"
            )
        return self.training and torch.is_grad_enabled()

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


_COMMON: dict[str, Callable[[str, Any], Any]] = {
    "ignore_index": lambda _, value: _checks.check_ignore_index(value),
    "reduction": lambda _, value: _checks.check_reduction(value),
}


def runs_twice() -> bool:
    """Whether an activation checkpoint runs this, to run it again in the backward pass."""
    return _is_called_by(CHECKPOINT)


def _is_called_by(function: Callable[..., Any]) -> bool:
    frame = None if torch.compiler.is_compiling() else sys._getframe(1)
    while frame is not None:
        if frame.f_code is function.__code__:
            return True
        frame = frame.f_back
    return False
