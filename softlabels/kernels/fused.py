"""The closed forms as one operation of the autograd graph."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from softlabels.kernels import eager, formula
from softlabels.kernels.plain import has_tangents, is_batched
from softlabels.kernels.soft_label import SoftLabel, column, working_dtype


class ClosedForm(Protocol):
    """What a backend computes, without a graph, of soft labels and logits."""

    def values(self, label: SoftLabel, logits: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """sum_c t_c log p_c per row, and row-shaped tensors that help to find the gradient."""

    def total_and_gradient(self, label: SoftLabel, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the values of all rows and its gradient."""

    def gradient(self, label: SoftLabel, logits: Tensor, incoming: Tensor, known: tuple[Tensor, ...]) -> Tensor:
        """The gradient of the sum of the values, each times ``incoming``; ``known`` is what ``values`` gave."""


def log_likelihood(label: SoftLabel, logits: Tensor, backend: ClosedForm, reduce: bool) -> Tensor | None:
    """sum_c t_c log p_c per row, or the sum of that over all rows, of plain tensors.

    None where more than the logits wants a gradient.
    """
    tensors = label.tensors()
    if torch.is_grad_enabled():
        for tensor in tensors.values():
            if tensor.requires_grad:
                return None
            if tensor.is_inference():
                return log_likelihood(savable(label), logits, backend, reduce)
        if logits.requires_grad:
            result: Tensor = _LogLikelihood.apply(logits, label, tensors, backend, reduce)  # type: ignore[no-untyped-call]
            return result
    rows, _ = backend.values(label, logits)
    return rows.sum() if reduce else rows


def savable(label: SoftLabel) -> SoftLabel:
    """The same without tensors of inference mode, which autograd cannot save: teachers often run in it."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return label
    copies = {name: t.clone() for name, t in label.tensors().items() if t.is_inference()}
    return label.replace(copies) if copies else label


def _differentiable_gradient(label: SoftLabel, logits: Tensor, incoming: Tensor, reduce: bool) -> Tensor:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        alias = logits.view_as(logits)  # or the hooks of the user's own tensor would run here too
        rows = formula.log_likelihood(label, alias)
        (gradient,) = torch.autograd.grad(rows.sum() if reduce else rows, alias, incoming, create_graph=create_graph)
    return gradient


class _LogLikelihood(torch.autograd.Function):
    """One node of the graph, by one of two plans.

    On a CPU the forward pass leaves the gradient of the total, and the backward pass hands it on as it is if the
    incoming gradient is one, which costs nothing to ask. Elsewhere the question would stall the device, and a gradient
    in half precision must not be rounded before it is scaled: so the backward pass takes the softmax again, which costs
    one more reading of the logits and takes any incoming gradient for nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, label: SoftLabel, tensors: dict[str, Tensor], backend: ClosedForm, reduce: bool
    ) -> Tensor:
        ctx.kind, ctx.names = type(label), tensors.keys()
        ctx.options = {name: value for name, value in vars(label).items() if name not in tensors}
        ctx.backend, ctx.reduce = backend, reduce
        ctx.gradient = None
        known: tuple[Tensor, ...] = ()
        if reduce and logits.device.type == "cpu" and logits.dtype == working_dtype(logits):
            result, ctx.gradient = backend.total_and_gradient(label, logits)
        else:
            result, known = backend.values(label, logits)
            result = result.sum() if reduce else result
        ctx.save_for_backward(logits, *tensors.values(), *known)
        return result

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        batched = is_batched(incoming)  # is_grads_batched=True: many incoming gradients at once
        gradient: Tensor | None = None
        if not batched and not torch.is_grad_enabled() and not has_tangents():
            gradient, ctx.gradient = ctx.gradient, None  # handed on once: from then on it is the user's
        if gradient is not None:
            return gradient if incoming.item() == 1.0 else gradient.mul_(incoming), None, None, None, None
        logits, *saved = ctx.saved_tensors
        count = len(ctx.names)
        label = ctx.kind(**ctx.options, **dict(zip(ctx.names, saved[:count], strict=True)))
        if torch.is_grad_enabled() or has_tangents():  # create_graph=True: the gradient is to be differentiated
            gradient = _differentiable_gradient(label, logits, incoming, ctx.reduce)
        elif batched:
            rows = () if ctx.reduce else logits.shape[:1] + logits.shape[2:]
            one = logits.new_ones(rows, dtype=working_dtype(logits))
            exact = logits.detach().to(working_dtype(logits))
            gradient = (eager.gradient(label, exact, one, ()) * column(incoming)).to(logits.dtype)
        else:
            gradient = ctx.backend.gradient(label, logits, incoming, tuple(saved[count:]))
        return gradient, None, None, None, None
