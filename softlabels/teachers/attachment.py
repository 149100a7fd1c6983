"""The bond between a loss, a model and a teacher."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from softlabels.teachers.clock import StepClock
from softlabels.teachers.ema import EMATeacher
from softlabels.teachers.models import Output, check_output, find_logits, unwrap
from softlabels.teachers.tap import InputTap


class Attachment:
    """Knows which inputs the model saw last and what the teacher says of them.

    Args:
        model: The model in training, not kept alive.
        teacher: An EMATeacher, whose clock is started here if it follows ``model``; or any other module, which is put
        in
            eval mode and never updated.
        optimizer: The optimizer whose steps count for the EMA; None: all that own parameters of ``model``.
        output: Where the logits are in what model and teacher return, see [`find_logits`][].
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, optimizer: Optimizer | None, output: Output) -> None:
        check_output(output)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a torch.nn.Module, got {type(teacher).__name__}")
        if unwrap(teacher) is unwrap(model):
            raise ValueError("teacher is the model itself; pass a copy, or leave teacher out for an EMA of the model")
        self.teacher = teacher
        self._output = output
        self._tap = InputTap()
        self._clock: StepClock | None = None
        if isinstance(teacher, EMATeacher):
            if teacher.source is unwrap(model):
                self._clock = StepClock(unwrap(model), teacher.update, optimizer)
        else:
            teacher.eval()
        self._hook = model.register_forward_pre_hook(self._tap, with_kwargs=True)
        weakref.finalize(self, self._hook.remove)

    def teacher_logits(self, input: Tensor) -> Tensor | None:
        """What the teacher says of the inputs of the model's latest training pass, which are then forgotten.

        None if there was no such pass since the last call.
        """
        captured = self._tap.take()
        if captured is None:
            return None
        self.flush()
        args, kwargs = captured.args, captured.kwargs
        if not isinstance(self.teacher, EMATeacher):
            self.teacher.eval()
            args, kwargs = _like_parameters((args, kwargs), self.teacher)
        with torch.no_grad(), captured.autocast_state():
            logits = find_logits(self.teacher(*args, **kwargs), self._output)
        if logits.shape != input.shape:
            raise RuntimeError(
                f"the teacher's logits for the model's latest training pass have shape {tuple(logits.shape)} but the "
                f"loss was given input of shape {tuple(input.shape)}: call the loss once per training pass of the "
                "attached model, on that pass's logits"
            )
        return logits.to(input.device)

    def forget(self) -> None:
        """Release the inputs of the latest pass."""
        self._tap.take()

    def flush(self) -> None:
        """Bring an EMA teacher up to date with optimizer steps already made."""
        if self._clock is not None:
            self._clock.flush()

    def end(self) -> None:
        """Remove every hook and release everything."""
        self._hook.remove()
        self.forget()
        if self._clock is not None:
            self._clock.stop()


def _like_parameters(value: Any, module: nn.Module) -> Any:
    """Move tensors in nested tuples, lists and dicts to the device of a module, floating ones to its dtype."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return value

    def moved(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item.to(parameter.device, parameter.dtype if item.is_floating_point() else None)
        if isinstance(item, dict):
            return {key: moved(entry) for key, entry in item.items()}
        if type(item) in (tuple, list):
            return type(item)(moved(entry) for entry in item)
        return item

    return moved(value)
