"""The bond between a loss, a model and a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from softlabels.kernels import LinearLogits
from softlabels.teachers.ema import EMATeacher
from softlabels.teachers.hooks import Hook, Scriptable
from softlabels.teachers.passes import Pass, Passes, Way, same_rows
from softlabels.teachers.steps import Steps
from softlabels.teachers.structures import LOGITS, Logits, Output, check_model, like_parameters, outputs, unwrap


class Attachment:
    """Knows which pass of the model logits come from, and what the teacher says of it.

    Args:
        model: The model in training, not kept alive.
        optimizer: The optimizer whose steps count for the EMA; None: all that own parameters of ``model``; False: none.
        output: Where the logits are in what model and teacher return, see [`find_logits`][].
        teacher_inputs: Function of the model's inputs that returns the teacher's: a tuple of positional or a dict of
            keyword arguments, or one argument. None: the same inputs.
    """

    def __init__(
        self, model: nn.Module, optimizer: object, output: Output, teacher_inputs: Callable[..., Any] | None
    ) -> None:
        if output is not None and not isinstance(output, (str, int)) and not callable(output):
            raise TypeError(f"output must be a key, an index, a callable or None, got {output!r}")
        if teacher_inputs is not None and not callable(teacher_inputs):
            raise TypeError(f"teacher_inputs must be callable, got {type(teacher_inputs).__name__}")
        check_model(model)
        self.options = (optimizer, output, teacher_inputs)
        self.teacher: nn.Module | None = None
        self._followed: list[tuple[EMATeacher, Steps]] = []
        self._passes = Passes(model, output, self._begin)

    @property
    def model(self) -> nn.Module | None:
        """The attached model, or None if it is gone."""
        return self._passes.model()

    def ask(self, model: nn.Module, teacher: nn.Module) -> nn.Module:
        """Ask this teacher from now on: an EMATeacher of the model or a part of it, or a frozen module."""
        if isinstance(unwrap(teacher), EMATeacher):
            teacher = unwrap(teacher)  # a compiler cannot look into it
        _check_apart(model, teacher)
        for ema in [module for module in teacher.modules() if isinstance(module, EMATeacher)]:
            if ema.source is None:
                ema.follow(model)
            source, followed = ema._present(), unwrap(model)
            if source in followed.modules() or followed in source.modules():
                self._followed.append((ema, ema.follow_steps(self.options[0])))
        if not isinstance(teacher, EMATeacher):
            teacher.eval()
        self.teacher = teacher
        return teacher

    def teacher_logits(self, input: Logits) -> Logits | None:
        """What the teacher says of the pass that these logits came from; None if there is no such pass.

        Raises:
            RuntimeError: the teacher's rows cannot be those of the input, or the pass's inputs were written to.
        """
        found = self._passes.find(input)
        if found is None:
            return None
        seen, position, way, shape = found
        if not seen.answers:
            seen.answers = self._answers(seen)
            seen.args, seen.kwargs, seen.versions = (), {}, []
        computed = callable(self.options[1])
        answer = seen.answers.get(LOGITS if computed else position)
        if answer is None:
            raise RuntimeError(
                "the loss was given an output of the model that the teacher does not return; pass the teacher's logits "
                "to the call, or let attach(..., output=...) find them"
            )
        logits = answer if computed else _same_rows(answer, input, way, shape)
        if logits is None or logits.shape != input.shape:
            raise RuntimeError(
                f"the teacher's logits have shape {tuple(answer.shape)} but the loss was given input of shape "
                f"{tuple(input.shape)}; {_difference(answer, input)}"
            )
        return logits.to(input.device)

    def end(self) -> None:
        """Remove every hook and release everything."""
        for teacher, _ in self._followed:
            teacher.take_in()
        self._followed = []
        for remove in self._passes.hooks:
            remove()
        if self.model is not None and not any(isinstance(hook, Hook) for hook in self.model._forward_hooks.values()):
            self.model.__dict__.pop(Scriptable.NAME, None)

    def _begin(self) -> frozenset[int] | None:
        """Bring EMA teachers up to date before a pass of the model."""
        training = {teacher: teacher.begin_pass() for teacher, _ in self._followed}
        return training.get(self.teacher)  # type: ignore[call-overload,no-any-return]

    def _answers(self, seen: Pass) -> dict[int, Logits]:
        """Run the teacher on the inputs of a pass: its logits, and where the model marks others, those outputs."""
        teacher, (_, output, teacher_inputs) = self.teacher, self.options
        assert teacher is not None
        if seen.training is None:
            seen.training = self._begin()  # which a compiled hook does not
        args, kwargs = seen.arguments(caches=teacher_inputs is not None)
        if teacher_inputs is not None:
            given = teacher_inputs(*args, **kwargs)
            args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
            args = args if isinstance(args, tuple) else (args,)
        if not isinstance(teacher, EMATeacher):
            args, kwargs = like_parameters(args, teacher.eval()), like_parameters(kwargs, teacher)
        elif isinstance(self.model, nn.DataParallel):  # which moves what it is given
            args, kwargs = like_parameters(args, self.model), like_parameters(kwargs, self.model)
        with torch.no_grad(), seen.autocast_state():
            if isinstance(teacher, EMATeacher):
                result = teacher.run(args, kwargs, seen.training)
            else:
                result = teacher(*args, **kwargs)
            answers: dict[int, Logits] = {LOGITS: output(result)} if callable(output) else outputs(result, output)
        if not isinstance(answers.get(LOGITS), Logits):
            raise TypeError(
                f"no logits found in the teacher's output of type {type(result).__name__} with output={output!r}; say "
                "where they are with attach(..., output=...): a key, an index, or a function of the output"
            )
        return answers


def _check_apart(model: nn.Module, teacher: nn.Module) -> None:
    """Raise if a frozen teacher has a part in common with the model, which would be frozen or trained with it."""
    if unwrap(teacher) is unwrap(model):
        raise ValueError("teacher is the model itself; pass a copy, or leave teacher out for an EMA of the model")
    own = {*model.modules(), *(parameter for parameter in model.parameters() if parameter.requires_grad)}
    for name, module in teacher.named_modules():
        matters = [*module.parameters(), *module.buffers()] or isinstance(module, nn.modules.dropout._DropoutNd)
        if (matters and module in own) or not own.isdisjoint(module._parameters.values()):
            raise ValueError(
                f"teacher shares {type(module).__name__} {name!r} with the model, which would train it, and run it in "
                "the teacher's mode; pass a copy: teacher=copy.deepcopy(teacher)"
            )


def _same_rows(answer: Logits, input: Logits, way: Way, shape: torch.Size) -> Logits | None:
    """The teacher's logits, laid out as the model's were; None if it is not clear how.

    Args:
        answer: What the teacher returned.
        input: What the loss was given.
        way: How the model's logits, or the input of its last layer, came to the loss.
        shape: Of these when they left the model.
    """
    if not isinstance(input, LinearLogits):
        if isinstance(answer, LinearLogits):
            return None
        return same_rows(answer, way) if answer.shape == shape else answer
    if not way:
        return answer
    if answer.shape[:-1] != shape[:-1]:
        return None
    places = torch.arange(shape[:-1].numel(), dtype=torch.int32, device=answer.device).view(*shape[:-1], 1)
    moved = same_rows(places.expand(shape), way)  # whatever the width of the teacher's layer
    if moved is None:
        return None
    index = moved[..., 0]
    if isinstance(answer, LinearLogits):
        return replace(answer, hidden=answer.hidden.flatten(0, -2)[index])
    return answer.flatten(0, -2)[index]


def _difference(logits: Logits, input: Logits) -> str:
    classes = min(1, input.dim() - 1)
    ours, theirs = input.shape[classes : classes + 1], logits.shape[classes : classes + 1]
    if ours != theirs and logits.dim() == input.dim() and logits.numel() * ours[0] == input.numel() * theirs[0]:
        return f"it knows {theirs[0]} classes, and the model {ours[0]}"
    return (
        "if they are reshaped or copied on the way from the model to the loss, let attach(..., output=...) do the same "
        "to what the teacher returns"
    )
