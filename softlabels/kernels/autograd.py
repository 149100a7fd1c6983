"""The closed forms as one operation of the autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softlabels._reading import has_tangents, is_batched
from softlabels.kernels import compiled, eager, formula
from softlabels.kernels.soft_label import SoftLabel, column, working_dtype
from softlabels.kernels.statistics import Statistics

_NOTHING = torch.empty(0)


class ClosedForm(torch.autograd.Function):
    """One node of the graph, by one of two plans.

    On a CPU the forward pass leaves the gradient of the total, and the backward pass returns it as it is if the
    incoming gradient is one; asking is free there. Elsewhere the question would stall the device, and a gradient in
    half precision must not be rounded before it is scaled: so the backward pass computes the softmax again. That reads
    the logits once more, and any incoming gradient costs nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        label: SoftLabel,
        compile: bool,
        reduce: bool,
        statistics: Statistics | None,
        *tensors: Tensor,
    ) -> Tensor:
        """The loss; see the class."""
        ctx.inputs, ctx.compile, ctx.reduce, ctx.gradient = len(tensors), compile, reduce, None
        known: tuple[Tensor, ...] = ()
        if reduce and is_ready_in_forward(logits):
            if compile:
                loss, ctx.gradient = compiled.value_and_gradient(label, logits)
            else:
                loss, ctx.gradient = eager.value_and_gradient(label, logits, statistics)
        else:
            rows, known = compiled.values(label, logits, statistics) if compile else (eager.values(label, logits), ())
            loss = rows.sum() if reduce else rows
            label = label.settled()
        saved = label.tensors()
        ctx.label, ctx.count = label.with_tensors([_NOTHING] * len(saved)), len(saved)  # or it would outlive the saved
        ctx.save_for_backward(logits, *saved, *known)
        return loss

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient to the logits alone."""
        batched = is_batched(incoming)  # is_grads_batched=True: many incoming gradients at once
        gradient: Tensor | None = None
        if not batched and not torch.is_grad_enabled() and not has_tangents():
            gradient, ctx.gradient = ctx.gradient, None  # returned once: from then on it is the user's
        if gradient is None:
            gradient = _gradient(ctx, incoming, batched)
        elif incoming.item() != 1.0:
            gradient.mul_(incoming)
        return gradient, *[None] * (4 + ctx.inputs)


def is_ready_in_forward(logits: Tensor) -> bool:
    """Whether the gradient of a total is made in the forward pass."""
    return logits.is_cpu and logits.dtype == working_dtype(logits)


def _gradient(ctx: Any, incoming: Tensor, batched: bool) -> Tensor:
    logits, *saved = ctx.saved_tensors
    label = ctx.label.with_tensors(saved[: ctx.count])
    if torch.is_grad_enabled() or has_tangents():  # create_graph=True: the gradient is to be differentiated
        return _differentiable_gradient(label, logits, incoming, ctx.reduce)
    if batched:
        exact = logits.detach().to(working_dtype(logits))
        return (eager.gradient(label, exact) * column(incoming)).to(logits.dtype)
    if ctx.compile and len(saved) > ctx.count:
        return compiled.gradient(label, logits, incoming, tuple(saved[ctx.count :]))
    return eager.gradient(label.scaled(incoming), logits)


def _differentiable_gradient(label: SoftLabel, logits: Tensor, incoming: Tensor, reduce: bool) -> Tensor:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        alias = logits.view_as(logits)  # or the hooks of the user's own tensor would run here too
        loss = formula.cross_entropy(label, alias, reduce)
        (gradient,) = torch.autograd.grad(loss, alias, incoming, create_graph=create_graph)
    return gradient
