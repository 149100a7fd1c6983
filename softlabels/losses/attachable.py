"""Losses that look at the batch through a teacher: ``attach`` before the training loop, nothing inside it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from softlabels import kernels
from softlabels.losses.base import SoftLabelLoss
from softlabels.teachers import Attachment, EMATeacher
from softlabels.teachers.structures import Output

if TYPE_CHECKING:
    from typing_extensions import Self

TEACHER = "teacher."


class AttachableLoss(SoftLabelLoss):
    """A loss that can be attached to a model and then asks a teacher about each batch by itself."""

    if TYPE_CHECKING:
        teacher: EMATeacher | Any
        """The attached teacher: an [`EMATeacher`][softlabels.EMATeacher], or the module given to ``attach``."""

    def __init__(self, weight: Tensor | None = None, *, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction)
        self._attachment: Attachment | None = None
        self._awaited: dict[str, Any] = {}  # state of an EMA teacher that was loaded before attach
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
        if self._attachment is not None and self._attachment.model is None:
            self.detach()
        if self._attachment is not None:
            given = zip(
                (optimizer, output, teacher_inputs, teacher), (*self._attachment.options, self.teacher), strict=True
            )
            if self._attachment.model is model and all(new is None or new is old for new, old in given):
                return self
            raise RuntimeError("this loss is attached already; call detach() first")
        if isinstance(model, nn.Module) and any(module is self for module in model.modules()):
            raise ValueError(
                f"{type(self).__name__} is itself a part of the model; attach it to the submodule that makes the logits"
            )
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a torch.nn.Module, got {type(teacher).__name__}")
        attachment = Attachment(model, optimizer, output, teacher_inputs)
        if teacher is not None or self.needs_teacher:
            try:
                self._add_teacher(attachment, model, teacher)
            except BaseException:
                attachment.end()
                raise
        else:
            warnings.warn(f"{self!r} needs no teacher, so attach keeps no average", stacklevel=2)
        self._attachment = attachment
        self._is_copy = False
        return self

    def detach(self) -> Self:
        """Undo [`attach`][softlabels.BetaSmoothingLoss.attach]: remove the hooks and let the teacher go.

        Returns:
            The loss itself.
        """
        if self._attachment is not None:
            self._attachment.end()
            self._attachment = None
            self._modules.pop("teacher", None)
            self.__dict__.pop("teacher", None)
        return self

    @property
    def attached(self) -> bool:
        """Whether the loss is attached to a model; copies and pickles of it are not."""
        return self._attachment is not None

    @property
    def needs_teacher(self) -> bool:
        """Whether this loss asks an attached teacher in training, as its options stand."""
        return True

    def make_teacher(self, model: nn.Module) -> nn.Module:
        """Teacher for a model when none is given."""
        return EMATeacher(model)

    def ask_teacher(self, input: Tensor, given: str) -> Tensor:
        """The attached teacher's logits for this batch.

        Args:
            input: The student's logits.
            given: The call argument that would do instead, for the error message.

        Raises:
            RuntimeError: nothing is attached, or the logits come from no training pass of the attached model.
        """
        name = type(self).__name__
        attachment = self._attachment
        if attachment is None:
            missing = "call attach(model) of the copy, which" if self._is_copy else "add criterion.attach(model) once"
            raise RuntimeError(
                f"{name} needs a teacher in training: {missing} before the training loop, or "
                f"pass {given}= to the call. For evaluation, use criterion.eval() or torch.no_grad()"
            )
        if attachment.teacher is None and attachment.model is not None:  # a loss that had needed none
            self._add_teacher(attachment, attachment.model, None)
        if torch.compiler.is_compiling():
            kernels.break_graph(
                "softlabels: the teacher's pass cannot be part of the compiled graph. Compile the model instead of the "
                "whole step, or leave out fullgraph=True"
            )
            logits = torch._dynamo.disable(attachment.teacher_logits)(input)  # type: ignore[no-untyped-call]
        else:
            logits = attachment.teacher_logits(input)
        if logits is None:
            raise RuntimeError(
                f"{name} was given logits that come from no training forward pass of the attached model. Call the "
                "model itself, model(x) and not model.forward(x), in training mode with grad enabled, and give the "
                "loss what it returns (if the model was compiled and run before attach, attach the compiled wrapper); "
                f"for a model in eval mode, pass {given}= to the call. For evaluation, use criterion.eval() or "
                "torch.no_grad()"
            )
        return logits  # type: ignore[no-any-return]

    def _add_teacher(self, attachment: Attachment, model: nn.Module, teacher: nn.Module | None) -> None:
        teacher = attachment.ask(model, self.make_teacher(model) if teacher is None else teacher)
        if isinstance(teacher, EMATeacher):
            if self._awaited:
                teacher.load_state_dict(self._awaited)
            self.add_module("teacher", teacher)
        else:
            self.__dict__["teacher"] = teacher  # not a submodule: neither saved nor moved with the loss
        self._awaited = {}

    def _warn_missing(self, what: str, consequence: str) -> None:
        warnings.warn(f"the checkpoint has no {what} for {type(self).__name__}; {consequence}", stacklevel=2)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in self._awaited.items():
            destination[prefix + TEACHER + key] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        teacher = prefix + TEACHER
        own = {key: value for key, value in state_dict.items() if key.startswith(teacher)}
        if "teacher" not in self._modules:
            for key, value in own.items():
                self._awaited[key[len(teacher) :]] = value.clone() if isinstance(value, Tensor) else value
                del state_dict[key]
        elif not own and isinstance(self.teacher, EMATeacher):
            self._warn_missing("EMA teacher", "its average restarts from the model's present weights")
            self.teacher.restart()
            state_dict.update({teacher + key: value for key, value in self.teacher.state_dict().items()})
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not attached; an EMA teacher's state waits in it for the copy's own attach."""
        state = self.__dict__.copy()
        state.pop("teacher", None)
        state["_attachment"] = None
        state["_is_copy"] = self._is_copy or self.attached
        teacher = self._modules.get("teacher")
        if teacher is not None:
            state["_modules"] = {k: v for k, v in self._modules.items() if k != "teacher"}
            state["_awaited"] = teacher.state_dict()
        return state
