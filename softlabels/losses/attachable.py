"""Losses that look at the batch through a teacher: ``attach`` before the training loop, nothing inside it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from softlabels._reading import break_graph
from softlabels.losses.base import SoftLabelLoss
from softlabels.teachers import EMATeacher
from softlabels.teachers.passes import Pass, Passes, laid_out
from softlabels.teachers.structures import LOGITS, Logits, Output, check_model, like_parameters, outputs, unwrap

if TYPE_CHECKING:
    from typing_extensions import Self


class AttachableLoss(SoftLabelLoss):
    """A loss that can be attached to a model and then asks a teacher about each batch by itself."""

    if TYPE_CHECKING:
        teacher: EMATeacher | Any
        """The attached teacher: an [`EMATeacher`][softlabels.EMATeacher], or the module given to ``attach``."""

    def __init__(self, weight: Tensor | None = None, *, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction)
        self._passes: Passes | None = None
        self._is_copy = False  # of an attached loss

    def attach(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | Literal[False] | None = None,
        teacher: nn.Module | None = None,
        output: Output = None,
        teacher_inputs: Callable[..., Any] | None = None,
    ) -> Self:
        """Let the loss see what ``model`` sees; call it once, before the training loop.

        From then on each training pass of ``model`` (training mode, grad enabled) leaves a mark on the graph of what
        it returns, which holds the inputs. Given logits, the loss finds the pass that they came from, and the teacher
        runs once on the inputs of that pass, without grad, in its autocast state. Logits on which several losses are
        computed, and several outputs of a pass, share the teacher's run. An EMA teacher moves once per real optimizer
        step: not per micro-batch, and not on a step that a GradScaler skips.

        Args:
            model: The model in training.
            optimizer: The optimizer whose steps move the EMA. None: every optimizer that owns parameters of
                ``model``, also one made later; several that step between two passes count as one step. Where none
                is known, a change of the weights between two passes is the step. False: nobody's steps count; call
                ``criterion.teacher.update()`` after each.
            teacher: A trained module, which is put in eval mode and never changes; or an
                [`EMATeacher`][softlabels.EMATeacher]. None: a new EMATeacher of ``model``.
            output: How to make of what the model returns the logits that the loss is given: a key or attribute name, an
                index, or a function. Tensors, tuples (first tensor), ``"logits"``, ``"out"`` and ``.logits`` need
                none, and neither do views and casts of them: ``logits.float().flatten(0, 1)``,
                ``logits.transpose(1, 2)``, ``logits[:, :-1]``. What picks rows or computes other shapes, such as
                ``logits[mask]`` or an interpolation, needs a function that does the same; a copy of the same shape is
                taken to have its rows in the same order.
            teacher_inputs: For a teacher that takes other inputs than the model: a function of the model's arguments
                that returns the teacher's, as a tuple of positional or a dict of keyword arguments, or as one value.

        Returns:
            The loss itself.

        Raises:
            RuntimeError: the loss is attached already, to another model or in another way.
            TypeError: an argument is of the wrong type.
            ValueError: ``teacher`` is the model itself or shares parts with it, or the loss is a part of the model.

        Example:
            >>> import torch, softlabels
            >>> model = torch.nn.Linear(4, 3)
            >>> criterion = softlabels.SelfDistillationLoss().attach(model)
            >>> loss = criterion(model(torch.randn(8, 4)), torch.randint(3, (8,)))
            >>> loss.backward()
        """
        steps = hasattr(optimizer, "step")
        options = (weakref.ref(optimizer) if steps else optimizer, teacher, output, teacher_inputs)
        if self._passes is not None and (attached := self._passes.model()) is not None:
            if attached is model and all(
                new in (None, old) for new, old in zip(options, self._passes.options, strict=True)
            ):
                return self
            raise RuntimeError("this loss is attached already; call detach() first")
        self.detach()
        check_model(model)
        if any(module is self for module in model.modules()):
            raise ValueError(
                f"{type(self).__name__} is itself a part of the model; attach it to the submodule that makes the logits"
            )
        if not (steps or optimizer is None or optimizer is False):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; or False, if you call "
                "criterion.teacher.update() yourself"
            )
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a torch.nn.Module, got {type(teacher).__name__}")
        if output is not None and not isinstance(output, (str, int)) and not callable(output):
            raise TypeError(f"output must be a key, an index, a callable or None, got {output!r}")
        if teacher_inputs is not None and not callable(teacher_inputs):
            raise TypeError(f"teacher_inputs must be callable, got {type(teacher_inputs).__name__}")
        followed: list[Any] = []
        if teacher is not None or self.needs_teacher:
            followed = self._add_teacher(model, teacher, optimizer)
        else:
            warnings.warn(f"{self!r} needs no teacher, so attach keeps no average", stacklevel=2)
        self._passes, self._is_copy = Passes(model, options, followed, getattr(self, "teacher", None)), False
        return self

    def detach(self) -> Self:
        """Undo [`attach`][softlabels.BetaSmoothingLoss.attach]: remove the hooks and let the teacher go.

        Returns:
            The loss itself.
        """
        if self._passes is not None:
            self._passes.end()
            self._passes = None
            self._modules.pop("teacher", None)
            self.__dict__.pop("teacher", None)
        return self

    @property
    def attached(self) -> bool:
        """Whether the loss is attached to a model; copies and pickles of it are not."""
        return self._passes is not None

    @property
    def is_first_answer(self) -> bool:
        """Whether the attached teacher has been asked once, and so is looked at more closely."""
        return self._passes is not None and self._passes.answers == 1

    @property
    def needs_teacher(self) -> bool:
        """Whether this loss asks an attached teacher in training, as its options stand."""
        return True

    def make_teacher(self, model: nn.Module | None) -> EMATeacher:
        """Teacher for a model, which may come later, when none is given."""
        return EMATeacher(model)

    def ask_teacher(self, input: Logits, given: str) -> Logits:
        """The attached teacher's logits for this batch.

        Args:
            input: The student's logits.
            given: The call argument that would do instead, for the error message.

        Raises:
            RuntimeError: nothing is attached, the logits come from no training pass of the attached model, or the
                teacher's rows cannot be theirs.
        """
        if self._passes is None:
            missing = "call attach(model) of the copy, which" if self._is_copy else "add criterion.attach(model) once"
            raise RuntimeError(
                f"{type(self).__name__} needs a teacher in training: {missing} before the training loop, or "
                f"pass {given}= to the call. For evaluation, use criterion.eval() or torch.no_grad()"
            )
        if torch.compiler.is_compiling():
            break_graph(
                "softlabels: the teacher's pass cannot be part of the compiled graph. Compile the model instead of the "
                "whole step, or leave out fullgraph=True"
            )
            return torch._dynamo.disable(self._ask)(self._passes, input, given)  # type: ignore[no-any-return,no-untyped-call]
        return self._ask(self._passes, input, given)

    def _add_teacher(self, model: nn.Module, teacher: nn.Module | None, optimizer: object) -> list[Any]:
        """Ask a teacher from now on; the EMA teachers in it of the model or a part of it, and the steps they follow."""
        waiting = self._modules.get("teacher")  # in a copy, or after load_state_dict
        if teacher is None:
            teacher = self.make_teacher(model) if waiting is None else waiting
        elif isinstance(unwrap(teacher), EMATeacher):
            teacher = unwrap(teacher)  # a compiler cannot look into it
        _check_apart(model, teacher)
        followed = []
        for ema in [module for module in teacher.modules() if isinstance(module, EMATeacher)]:
            if ema.source is None:
                ema.follow(model)
            source, attached = ema._present(), unwrap(model)
            if source in attached.modules() or attached in source.modules():
                followed.append((ema, ema.follow_steps(optimizer)))
        self._modules.pop("teacher", None)
        if isinstance(teacher, EMATeacher):
            if waiting not in (None, teacher):
                teacher.load_state_dict(waiting.state_dict())
            self.add_module("teacher", teacher)
        else:
            self.__dict__["teacher"] = teacher.eval()  # not a submodule: neither saved nor moved with the loss
        return followed

    def _ask(self, passes: Passes, input: Logits, given: str) -> Logits:
        """What the teacher says of the pass that these logits came from."""
        model = passes.model()
        if passes.teacher is None and model is not None:  # a loss that had needed none
            optimizer = passes.options[0]
            passes.followed = self._add_teacher(model, None, optimizer and optimizer())
            passes.teacher = self.teacher
        found = passes.find(input)
        if found is None:
            raise RuntimeError(
                f"{type(self).__name__} was given logits that come from no training forward pass of the attached "
                "model. Call the model itself, model(x) and not model.forward(x), in training mode with grad enabled, "
                "and give the loss what it returns (if the model was compiled and run before attach, attach the "
                "compiled wrapper; if DataParallel copies it to several devices, attach that); for a model in eval "
                f"mode, pass {given}= to the call. For evaluation, use criterion.eval() or torch.no_grad()"
            )
        seen, position, way, shape = found
        if not seen.answers:
            seen.answers = self._answers(seen, passes)
            passes.answers += 1
            seen.args, seen.kwargs, seen.versions = (), {}, []
        answer = seen.answers.get(LOGITS if passes.computes else position)
        if answer is None:
            raise RuntimeError(
                "the loss was given an output of the model that the teacher does not return; pass the teacher's logits "
                "to the call, or let attach(..., output=...) find them"
            )
        logits = answer if passes.computes else laid_out(answer, input, way, shape)
        if logits is None or logits.shape != input.shape:
            raise RuntimeError(
                f"the teacher's logits have shape {tuple(answer.shape)} but the loss was given input of shape "
                f"{tuple(input.shape)}; {_difference(answer, input)}"
            )
        return logits.to(input.device)

    def _answers(self, seen: Pass, passes: Passes) -> dict[int, Logits]:
        """Run the teacher on the inputs of a pass: its logits, and where the model marks others, those outputs."""
        _, _, output, teacher_inputs = passes.options
        teacher, model = passes.teacher, passes.model()
        if seen.training is None:
            seen.training = passes.begin()  # which a compiled hook does not
        args, kwargs = seen.arguments(caches=teacher_inputs is not None)
        if teacher_inputs is not None:
            given = teacher_inputs(*args, **kwargs)
            args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
            args = args if isinstance(args, tuple) else (args,)
        if not isinstance(teacher, EMATeacher):
            args, kwargs = like_parameters((args, kwargs), teacher.eval())
        elif isinstance(model, nn.DataParallel):  # which moves what it is given
            args, kwargs = like_parameters((args, kwargs), model)
        with torch.no_grad(), ExitStack() as stack:
            for context in seen.autocast_state():
                stack.enter_context(context)
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

    def _warn_missing(self, what: str, consequence: str) -> None:
        warnings.warn(f"the checkpoint has no {what} for {type(self).__name__}; {consequence}", stacklevel=2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        teacher = prefix + "teacher."
        keys = [key for key in state_dict if key.startswith(teacher)]
        if keys and not hasattr(self, "teacher"):
            self.add_module("teacher", self.make_teacher(None))  # which waits for the model
        elif "teacher" not in self._modules:
            for key in keys:  # of an EMA, and now there is a frozen one
                del state_dict[key]
        elif not keys:
            waiting: Any = self.teacher
            if self.attached:
                self._warn_missing("EMA teacher", "its average restarts from the model's present weights")
                waiting.restart()
            state_dict.update(waiting.state_dict(prefix=teacher))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not attached; a copied EMA teacher waits in it for the copy's own attach."""
        state = {**self.__dict__, "_passes": None, "_is_copy": self._is_copy or self.attached}
        state.pop("teacher", None)
        return state


def _check_apart(model: nn.Module, teacher: nn.Module) -> None:
    """Raise if a frozen teacher has a part in common with the model, which would be frozen or trained with it."""
    own = {*model.modules(), *(parameter for parameter in model.parameters() if parameter.requires_grad)}
    for name, module in teacher.named_modules():
        matters = [*module.parameters(), *module.buffers()] or isinstance(module, nn.modules.dropout._DropoutNd)
        if (matters and module in own) or not own.isdisjoint(module._parameters.values()):
            raise ValueError(
                f"teacher shares {type(module).__name__} {name!r} with the model, which would train it, and run it in "
                "the teacher's mode; pass a copy, teacher=copy.deepcopy(teacher), or none for an EMA of the model"
            )


def _difference(logits: Logits, input: Logits) -> str:
    classes = min(1, input.dim() - 1)
    ours, theirs = input.shape[classes : classes + 1], logits.shape[classes : classes + 1]
    if ours != theirs and logits.dim() == input.dim() and logits.numel() * ours[0] == input.numel() * theirs[0]:
        return f"it knows {theirs[0]} classes, and the model {ours[0]}"
    return (
        "if they are reshaped or copied on the way from the model to the loss, let attach(..., output=...) do the same "
        "to what the teacher returns"
    )
