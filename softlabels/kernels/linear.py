"""Cross-entropy of logits that a linear layer would give, without ever holding all of them.

Rows are worked on in blocks: the logits of a block, their value and gradient by the closed form that dense logits have
too, and two products that carry the gradient on to the layer's input and weights. What a block leaves is the size of
those alone. Rows that do not count are in no block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from softlabels._reading import is_batched
from softlabels.kernels import compiled, eager, formula
from softlabels.kernels.linear_logits import LinearLogits, rebuilt
from softlabels.kernels.soft_label import Amount, Prediction, SoftLabel, Term, is_zero, working_dtype

BLOCK = 2**22  # logits that are worked on together on a CPU: 16 MiB in float32, and as much for their gradient
ACCELERATOR_BLOCK = 2**26
FEWEST_ROWS = 256  # of a block, each of which goes through all weights and their gradient

Rows = slice | Tensor
_NOTHING = torch.empty(0)


@dataclass(eq=False)
class LinearPrediction(Term):
    """`Prediction` of a teacher whose logits are a linear layer's: of the rows that are asked for, when they are."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    temperature: float
    keep: int | None = None
    shift: float = 0.0

    @property
    def is_absent(self) -> bool:
        """An amount of 0, and no positive shift."""
        return is_zero(self.amount) and self.shift <= 0.0

    def rows(self, chosen: Rows) -> Prediction:  # type: ignore[override]
        """The teacher's prediction for some rows, computed now."""
        amount = self.amount[chosen] if isinstance(self.amount, Tensor) and self.amount.dim() else self.amount
        with torch.autocast(self.hidden.device.type, enabled=False):
            logits = linear(self.hidden[chosen], self.weight, self.bias)
        return Prediction(amount, logits, self.temperature, self.keep, self.shift, class_weight=self.class_weight)

    def shares(self, like: Tensor, possible: Tensor | None) -> Tensor:
        """Those of all rows."""
        return self.rows(slice(None)).shares(like, possible)


@dataclass(eq=False)
class PenalizedLabel(SoftLabel):
    """One label, and a penalty on the confidence of the prediction: `formula.confidence_penalty`."""

    beta: float = 0.0


@dataclass(eq=False)
class TwoScales(SoftLabel):
    """Two terms, and the cross-entropies with the logits and with the logits over a number, added up."""

    divisor: float = 1.0

    def parts(self, x: Tensor) -> list[tuple[SoftLabel, Tensor]]:
        """For each term a soft label and its logits in the working dtype."""
        x = x.to(working_dtype(x))
        first, second = (SoftLabel([term], self.weight) for term in self.terms)
        return [(first, x), (second, x / self.divisor)]


def by_blocks(function: Callable[..., Tensor], logits: LinearLogits, *others: Tensor, counted: Tensor | None) -> Tensor:
    """A function of rows that gives one number for each, block by block; 0 for rows that do not count.

    Args:
        function: Takes logits (M, K) and the same rows of ``others``.
        logits: Of shape (N, K).
        others: Tensors of N rows.
        counted: False for rows to leave out, (N,); None counts all.
    """
    result = torch.zeros(logits.shape[0], dtype=working_dtype(logits.hidden), device=logits.device)
    for rows, x in blocks(logits, counted):
        result[rows] = function(x, *(other[rows] for other in others))
    return result


@torch.no_grad()
def blocks(logits: LinearLogits, counted: Tensor | None = None) -> Iterator[tuple[Rows, Tensor]]:
    """Some rows at a time, and their logits without a graph."""
    for rows in _blocks(1.0 if counted is None else counted, logits):
        with torch.autocast(logits.device.type, enabled=False):
            x = linear(logits.hidden[rows], logits.weight, logits.bias)
        yield rows, x


def cross_entropy(label: SoftLabel, logits: LinearLogits, reduce: bool, compile: bool) -> Tensor:
    """The weighted cross-entropy of each row, or with ``reduce`` the sum over the rows; logits of shape (N, K)."""
    wanted = (logits.hidden, logits.weight, logits.bias)
    tensors = [tensor.clone() if tensor.is_inference() else tensor for tensor in label.tensors()]  # which none can save
    label = label.with_tensors(tensors)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in wanted):
        result: Tensor = LinearCrossEntropy.apply(*wanted, label, logits.block, reduce, compile, *tensors)  # type: ignore[no-untyped-call]
        return result
    with torch.autocast(logits.device.type, enabled=False):
        rows = _values(label, logits, compile)
    return rows.sum() if reduce else rows


def whole(label: SoftLabel, logits: LinearLogits, reduce: bool) -> Tensor:
    """The same by the plain formula of all logits at once, for who traces, transforms or differentiates twice."""
    hidden = logits.hidden
    if isinstance(label.weight, Tensor) and not label.weight.requires_grad:
        hidden = hidden.masked_fill((label.weight == 0).unsqueeze(1), 0.0)
    x = linear(hidden, logits.weight, logits.bias)
    if isinstance(label, PenalizedLabel):
        return formula.confidence_penalty(label.terms[0], label.weight, label.beta, x, reduce)
    if isinstance(label, TwoScales):
        first, second = (formula.cross_entropy(part, scaled, reduce) for part, scaled in label.parts(x))
        return first + second
    return formula.cross_entropy(label, x, reduce)


class LinearCrossEntropy(torch.autograd.Function):
    """One node of the graph.

    The forward pass of a total leaves the gradients, up to a factor, and the backward pass multiplies. It computes the
    blocks again where rows have incoming gradients of their own, and where it is called again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        label: SoftLabel,
        block: int | None,
        reduce: bool,
        compile: bool,
        *tensors: Tensor,
    ) -> Tensor:
        """The loss; see the class."""
        logits = rebuilt((hidden, weight, bias), block)
        ctx.block, ctx.reduce, ctx.compile, ctx.inputs, ctx.gradients = block, reduce, compile, len(tensors), None
        with torch.autocast(hidden.device.type, enabled=False):
            if reduce:
                loss, ctx.gradients = _value_and_gradients(label, logits, compile, ctx.needs_input_grad[:3])
            else:
                loss = _values(label, logits, compile)
        settled = label.settled()
        saved = settled.tensors()
        ctx.label, ctx.count = settled.with_tensors([_NOTHING] * len(saved)), len(saved)
        ctx.save_for_backward(hidden, weight, bias, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients to the layer's input, weight and bias."""
        if is_batched(incoming):
            raise RuntimeError(
                "LinearLogits cannot take many incoming gradients at once (is_grads_batched=True); ask for one at a "
                "time, or give the loss LinearLogits.dense()"
            )
        none = [None] * (4 + ctx.inputs)
        if torch.is_grad_enabled():  # create_graph=True
            return *_differentiable_gradients(ctx, incoming), *none
        ready, ctx.gradients = ctx.gradients, None  # returned once: from then on they are the user's
        if ready is None:
            hidden, weight, bias, *saved = ctx.saved_tensors
            label = ctx.label.with_tensors(saved).scaled(incoming)
            with torch.autocast(hidden.device.type, enabled=False):
                _, ready = _value_and_gradients(
                    label, rebuilt((hidden, weight, bias), ctx.block), ctx.compile, ctx.needs_input_grad[:3]
                )
            incoming = torch.ones((), device=incoming.device)
        return *ready.times(incoming), *none


@dataclass
class Gradients:
    """Those to input, weight and bias, or None where they are not wanted; ``unit`` is a factor that they lack.

    With it, numbers in half precision are of the size that torch's own path has without a reduction, whatever the
    number of rows, and an incoming gradient that a GradScaler has made large comes before they are rounded.
    """

    tensors: list[Tensor | None]
    dtypes: tuple[torch.dtype, ...]
    unit: Tensor | float

    def times(self, incoming: Tensor) -> list[Tensor | None]:
        """All of them multiplied, in place."""
        factor = incoming * self.unit
        return [
            None if tensor is None else tensor.mul_(factor).to(dtype)
            for tensor, dtype in zip(self.tensors, self.dtypes, strict=True)
        ]


def _value_and_gradients(
    label: SoftLabel, logits: LinearLogits, compile: bool, wanted: tuple[bool, ...]
) -> tuple[Tensor, Gradients]:
    """The sum over the rows, and what it leaves of gradients."""
    hidden, weight, bias = logits.hidden, logits.weight, logits.bias
    dtype = working_dtype(hidden)
    to_hidden = torch.zeros_like(hidden) if wanted[0] else None
    to_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
    to_bias = None if bias is None or not wanted[2] else torch.zeros_like(bias, dtype=dtype)
    unit = _unit(label.weight)
    label = replace(label, weight=label.weight / unit)
    total = torch.zeros((), dtype=dtype, device=hidden.device)
    for rows in _blocks(label.weight, logits):
        h = hidden[rows]
        value, gradient = _of_block(label.rows(rows), linear(h, weight, bias), compile)
        total += value
        if to_hidden is not None:
            to_hidden[rows] = gradient @ weight
        if to_weight is not None:
            _add_product(to_weight, gradient, h)
        if to_bias is not None:
            to_bias += gradient.sum(0, dtype=dtype)
    dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    return total * unit, Gradients([to_hidden, to_weight, to_bias], dtypes, unit)


def _values(label: SoftLabel, logits: LinearLogits, compile: bool) -> Tensor:
    """The loss of each row."""
    result = torch.zeros(logits.shape[0], dtype=working_dtype(logits.hidden), device=logits.device)
    for rows in _blocks(label.weight, logits):
        result[rows] = _values_of_block(
            label.rows(rows), linear(logits.hidden[rows], logits.weight, logits.bias), compile
        )
    return result


def _values_of_block(label: SoftLabel, x: Tensor, compile: bool) -> Tensor:
    if isinstance(label, PenalizedLabel):
        return formula.confidence_penalty(label.terms[0], label.weight, label.beta, x, reduce=False)
    if isinstance(label, TwoScales):
        first, second = (_values_of_block(part, scaled, compile) for part, scaled in label.parts(x))
        return first + second
    return compiled.values(label, x)[0] if compile else eager.values(label, x)


def _of_block(label: SoftLabel, x: Tensor, compile: bool) -> tuple[Tensor, Tensor]:
    """The sum over the rows of a block, and its gradient in the dtype of the logits."""
    if isinstance(label, PenalizedLabel):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            loss = formula.confidence_penalty(label.terms[0], label.weight, label.beta, leaf, reduce=True)
            return loss.detach(), torch.autograd.grad(loss, leaf)[0]
    if isinstance(label, TwoScales):
        (first, gradient), (second, other) = (_of_block(part, scaled, compile) for part, scaled in label.parts(x))
        return first + second, gradient.add_(other, alpha=1.0 / label.divisor).to(x.dtype)
    if not compile:
        return eager.value_and_gradient(label, x)
    if x.is_cpu and x.dtype == working_dtype(x):
        return compiled.value_and_gradient(label, x)
    rows, known = compiled.values(label, x)
    return rows.sum(), compiled.gradient(label, x, torch.ones((), device=x.device), known)


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Add gradient^T hidden; of half precision, in float32."""
    if hidden.dtype == total.dtype:
        total.addmm_(gradient.T, hidden)
    elif hidden.is_cpu:
        total.addmm_(gradient.T.to(total.dtype), hidden.to(total.dtype))
    else:
        total += gradient.T @ hidden


def _blocks(weight: Amount, logits: LinearLogits) -> Iterator[Rows]:
    """The rows of weight other than 0, some at a time: slices where all count, else indices."""
    count, classes = logits.shape
    elements = BLOCK if logits.device.type == "cpu" else ACCELERATOR_BLOCK
    size = logits.block or max(elements // max(classes, 1), FEWEST_ROWS)
    chosen: Tensor | None = None
    if isinstance(weight, Tensor) and weight.dim():
        chosen = weight.nonzero().squeeze(1)
        if len(chosen) == count:
            chosen = None
        else:
            count = len(chosen)
    for start in range(0, count, size):
        block = slice(start, start + size)
        yield block if chosen is None else chosen[block]


def _unit(weight: Amount) -> Tensor | float:
    """The power of two below the largest weight of a row, by which nothing is rounded; 1 where that is 0."""
    if not isinstance(weight, Tensor):
        return 2.0 ** (math.frexp(weight)[1] - 1) if weight else 1.0
    largest = weight.abs().amax() if weight.numel() else weight.new_zeros(())
    return torch.where(largest == 0, 1.0, largest.log2().floor().exp2())


def _differentiable_gradients(ctx: Any, incoming: Tensor) -> list[Tensor | None]:
    hidden, weight, bias, *saved = ctx.saved_tensors
    aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in (hidden, weight, bias)]
    wanted = [a for a, needed in zip(aliases, ctx.needs_input_grad[:3], strict=True) if a is not None and needed]
    loss = whole(ctx.label.with_tensors(saved), rebuilt(aliases, ctx.block), ctx.reduce)
    found = iter(torch.autograd.grad(loss, wanted, incoming, create_graph=True))
    return [next(found) if any(a is w for w in wanted) else None for a in aliases]
