"""The bond between a loss, a model and a teacher."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from softlabels.teachers.clock import StepClock
from softlabels.teachers.ema import EMATeacher
from softlabels.teachers.models import (
    Output,
    as_given,
    check_output,
    check_supported,
    find_logits,
    is_picked,
    is_unrelated,
    select_logits,
    unwrap,
)
from softlabels.teachers.tap import AfterPass, InputTap


class Attachment:
    """Knows which inputs the model saw last and what the teacher says of them.

    Args:
        model: The model in training, not kept alive.
        teacher: An EMATeacher, whose clock is started here if it follows ``model``; or any other module, which is put
            in eval mode and never updated.
        optimizer: The optimizer whose steps count for the EMA; None: all that own parameters of ``model``.
        output: Where the logits are in what model and teacher return, see [`find_logits`][].
        teacher_inputs: Function of the model's inputs that returns the teacher's: a tuple of positional or a dict of
            keyword arguments, or one argument. None: the same inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        optimizer: Optimizer | None,
        output: Output,
        teacher_inputs: Callable[..., Any] | None = None,
    ) -> None:
        check_output(output)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a torch.nn.Module, got {type(teacher).__name__}")
        if unwrap(teacher) is unwrap(model):
            raise ValueError("teacher is the model itself; pass a copy, or leave teacher out for an EMA of the model")
        check_supported(model)
        if teacher_inputs is not None and not callable(teacher_inputs):
            raise TypeError(f"teacher_inputs must be callable, got {type(teacher_inputs).__name__}")
        self.teacher = teacher
        self._output = output
        self._teacher_inputs = teacher_inputs
        self._tap = InputTap(select_logits(output))
        self._clock: StepClock | None = None
        if isinstance(teacher, EMATeacher):
            if teacher.source is None:
                teacher.follow(model)
            if teacher.source is unwrap(model):
                self._clock = teacher.follow_steps(optimizer)
        else:
            teacher.eval()
        self._hooks = [
            model.register_forward_pre_hook(self._tap, with_kwargs=True),
            model.register_forward_hook(AfterPass(self._tap)),
        ]
        for hook in self._hooks:
            weakref.finalize(self, hook.remove)
        self._release = weakref.finalize(model, _forget, weakref.ref(self._tap))

    def teacher_logits(self, input: Tensor) -> Tensor | None:
        """What the teacher says of the inputs of the model's latest training pass, which are then forgotten.

        None if there was no such pass since the last call.
        """
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                "softlabels: the teacher's pass cannot be part of the compiled graph. Compile the model instead of the "
                "whole step, or leave out fullgraph=True"
            )
        captured = self._tap.take()
        if captured is None:
            return None
        if captured.changed():
            raise RuntimeError(
                "the inputs of the model's latest training pass have been written to since it began, so the teacher "
                "would see something else; do not change them in place before the loss is computed"
            )
        if captured.passes > 1 and is_unrelated(captured.logits, input):
            raise RuntimeError(
                f"the attached model made {captured.passes} training passes since the loss was last called, and the "
                "loss was not given the logits of the last one; call the loss after each pass"
            )
        if not callable(self._output) and is_picked(captured.logits, input):
            raise RuntimeError(
                "the loss was given rows picked from the model's logits, perhaps in another order, which the teacher's "
                "do not follow; let attach(..., output=...) do the same to what the teacher returns, or reorder the "
                "targets instead"
            )
        self.flush()
        args, kwargs = captured.args, captured.kwargs
        if self._teacher_inputs is not None:
            args, kwargs = _as_arguments(self._teacher_inputs(*args, **kwargs))
        if isinstance(self.teacher, EMATeacher):
            self.teacher.follow_dtype_and_device()
        else:
            self.teacher.eval()
            args, kwargs = _like_parameters((args, kwargs), self.teacher)
        with torch.no_grad(), captured.autocast_state():
            logits = find_logits(self.teacher(*args, **kwargs), self._output)
        matched = as_given(logits, captured.logits, input)
        if matched is None:
            raise RuntimeError(
                f"the teacher's logits for the model's latest training pass have shape {tuple(logits.shape)} but the "
                f"loss was given input of shape {tuple(input.shape)}. Call the loss once per training pass of the "
                "attached model, on that pass's logits; if they are reshaped on the way, let attach(..., output=...) "
                "do the same to what the teacher returns"
            )
        return matched.to(input.device)

    def forget(self) -> None:
        """Release the inputs of the latest pass."""
        self._tap.take()

    def forget_steps(self) -> None:
        """Drop optimizer steps that an EMA teacher has not followed yet: its state is about to be replaced."""
        if self._clock is not None:
            self._clock.clear()

    def flush(self) -> None:
        """Bring an EMA teacher up to date with optimizer steps already made."""
        if self._clock is not None:
            self._clock.flush()

    def end(self) -> None:
        """Remove every hook and release everything."""
        for hook in self._hooks:
            hook.remove()
        self._release.detach()
        self.forget()
        if isinstance(self.teacher, EMATeacher) and self.teacher.source is not None:
            self.flush()
        self._clock = None


def _forget(tap: weakref.ref[InputTap]) -> None:
    """Release what a tap holds when its model is gone."""
    alive = tap()
    if alive is not None:
        alive.take()


def _as_arguments(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(value, dict):
        return (), value
    return (value if isinstance(value, tuple) else (value,)), {}


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
