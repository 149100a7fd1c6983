"""Losses that look at the batch through a teacher: ``attach`` before the training loop, nothing inside it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from softlabels._reading import break_graph
from softlabels.kernels import LinearLogits
from softlabels.losses.base import SoftLabelLoss
from softlabels.teachers import Attachment, EMATeacher
from softlabels.teachers.structures import Output

if TYPE_CHECKING:
    from typing_extensions import Self


class AttachableLoss(SoftLabelLoss):
    """A loss that can be attached to a model and then asks a teacher about each batch by itself."""

    if TYPE_CHECKING:
        teacher: EMATeacher | Any
        """The attached teacher: an [`EMATeacher`][softlabels.EMATeacher], or the module given to ``attach``."""

    def __init__(self, weight: Tensor | None = None, *, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction)
        self._attachment: Attachment | None = None
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
        if self._attachment is not None and self._attachment.model is not None:
            options = (optimizer, output, teacher_inputs, teacher)
            given = zip(options, (*self._attachment.options, self.teacher), strict=True)
            if self._attachment.model is model and all(new is None or new is old for new, old in given):
                return self
            raise RuntimeError("this loss is attached already; call detach() first")
        self.detach()
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

    def make_teacher(self, model: nn.Module | None) -> EMATeacher:
        """Teacher for a model, which may come later, when none is given."""
        return EMATeacher(model)

    def ask_teacher(self, input: Tensor | LinearLogits, given: str) -> Tensor | LinearLogits:
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
            break_graph(
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
                "loss what it returns (if the model was compiled and run before attach, attach the compiled wrapper; "
                f"if DataParallel copies it to several devices, attach that); for a model in eval mode, pass {given}= "
                "to the call. For evaluation, use criterion.eval() or torch.no_grad()"
            )
        return logits  # type: ignore[no-any-return]

    def _add_teacher(self, attachment: Attachment, model: nn.Module, teacher: nn.Module | None) -> None:
        waiting = self._modules.get("teacher")  # in a copy, or after load_state_dict
        if teacher is None:
            teacher = EMATeacher(model, waiting.decay) if isinstance(waiting, EMATeacher) else self.make_teacher(model)
        teacher = attachment.ask(model, teacher)
        if waiting is not None and isinstance(teacher, EMATeacher):
            teacher.load_state_dict(waiting.state_dict())
        self._modules.pop("teacher", None)
        if isinstance(teacher, EMATeacher):
            self.add_module("teacher", teacher)
        else:
            self.__dict__["teacher"] = teacher  # not a submodule: neither saved nor moved with the loss

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
        state = {**self.__dict__, "_attachment": None, "_is_copy": self._is_copy or self.attached}
        state.pop("teacher", None)
        return state
