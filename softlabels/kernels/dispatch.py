"""Which implementation of the row kernels runs. Nothing outside of this folder asks; the first line that fits decides.

| condition | implementation | why |
|---|---|---|
| logits are LinearLogits | linear: blocks of rows, each eager or compiled | all of them would not fit |
| somebody traces, transforms (torch.func), or differentiates forwards | formula | it can be traced and transformed |
| logits or targets are of a tensor subclass, or on the meta device | formula | only torch's own operations know them |
| weights or targets want a gradient too | formula | the closed forms have one for the logits alone |
| a CPU and at most `FEW` logits | formula | torch's own graph starts sooner than a closed form ends |
| backend "compile", or "auto" on a device where Inductor writes Triton | compiled | fewest readings of memory |
| any other | eager | closed form, few readings of memory |

The formula takes care of -inf logits and of rows that do not count where it cannot look; few logits are done without,
and once more with care if the result is not finite. Double backward through a closed form is the formula's. Of
LinearLogits the first three lines below compute all logits at once; torch.compile leaves its graph for them.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from softlabels._reading import break_graph, is_observed, is_ordinary
from softlabels.kernels import compiled, eager, formula, linear, ordering
from softlabels.kernels.autograd import ClosedForm, is_ready_in_forward
from softlabels.kernels.backend import get_backend
from softlabels.kernels.linear_logits import LinearLogits
from softlabels.kernels.soft_label import Amount, Prediction, SoftLabel, Term
from softlabels.kernels.statistics import Statistics, statistics_with_log_p

Result = TypeVar("Result")

FEW = 2**16
COMPILED_DEVICES = ("cuda", "xpu")  # where "auto" compiles

_failed: set[str] = set()


def statistics(logits: Tensor, *, reduce: bool = False) -> Statistics:
    """What can be known of rows before their soft label, for `cross_entropy` with the same ``reduce``."""
    if is_observed() or not is_ordinary(logits) or _are_few(logits):
        return statistics_with_log_p(logits)
    keeps_softmax = logits.requires_grad and torch.is_grad_enabled() and reduce and is_ready_in_forward(logits)
    return _compiled_or(
        logits, lambda: compiled.statistics(logits), lambda: eager.statistics(logits.detach(), keeps_softmax)
    )


def cross_entropy(
    label: SoftLabel, logits: Tensor | LinearLogits, *, reduce: bool, known: Statistics | None = None
) -> Tensor:
    """The weighted cross-entropy of each row, or with ``reduce`` the sum over the rows.

    Float64 for float64 logits, float32 for all others.
    """
    if isinstance(logits, LinearLogits):
        return _of_linear(label, logits, reduce)
    tensors = label.tensors()
    log_p = known.log_p if known is not None else None
    if is_observed() or not is_ordinary(logits, *tensors):
        return formula.cross_entropy(label, logits, reduce, log_p)
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return formula.cross_entropy(label, logits, reduce, log_p)
            if tensor.is_inference() and not torch.is_inference_mode_enabled():  # of which none can be saved
                tensors = [tensor.clone() if tensor.is_inference() else tensor for tensor in tensors]
                return cross_entropy(label.with_tensors(tensors), logits, reduce=reduce, known=known)
    if _are_few(logits):
        loss = formula.cross_entropy(label, logits, reduce, log_p, careful=False)
        total = loss.item() if reduce else loss.sum().item()
        return loss if math.isfinite(total) else formula.cross_entropy(label, logits, reduce, log_p)
    return _compiled_or(
        logits,
        lambda: _closed_form(_for_a_graph(label, logits), logits, True, reduce, known),
        lambda: _closed_form(label, logits, False, reduce, known),
    )


def confidence_penalty(label: Term, weight: Amount, beta: float, logits: Tensor | LinearLogits, reduce: bool) -> Tensor:
    """`formula.confidence_penalty`, of LinearLogits block by block."""
    if isinstance(logits, LinearLogits):
        return _of_linear(linear.PenalizedLabel([label], weight, beta=beta), logits, reduce)
    return formula.confidence_penalty(label, weight, beta, logits, reduce)


def _of_linear(label: SoftLabel, logits: LinearLogits, reduce: bool) -> Tensor:
    if torch.compiler.is_compiling():
        break_graph(
            "softlabels: LinearLogits are worked on in blocks, outside of the graph; compile the model instead of the "
            "whole step, or leave out fullgraph=True"
        )
        return torch._dynamo.disable(_of_linear)(label, logits, reduce)  # type: ignore[no-untyped-call, no-any-return]
    tensors = label.tensors()
    layer = [tensor for tensor in (logits.hidden, logits.weight, logits.bias) if tensor is not None]
    learn = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if is_observed() or learn or not is_ordinary(*layer, *tensors):
        return linear.whole(label, logits, reduce)
    return _compiled_or(
        logits.hidden,
        lambda: linear.cross_entropy(label, logits, reduce, True),
        lambda: linear.cross_entropy(label, logits, reduce, False),
    )


def fused(function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments) for arithmetic on row-shaped tensors, as one graph `where kernels fuse <fuses>`.

    Other arguments are numbers, or constants that a graph is made for.
    """
    given = [argument for argument in arguments if isinstance(argument, Tensor)]
    if not fuses(*given):
        return function(*arguments)
    result: Result = _compiled_or(
        given[0], lambda: compiled.fused(function, arguments, given[0].device), lambda: function(*arguments)
    )
    return result


def fuses(*tensors: Tensor) -> bool:
    """Whether arithmetic on these becomes one graph: on devices where kernels are compiled, without a graph."""
    return (
        tensors[0].device.type in COMPILED_DEVICES
        and not is_observed()
        and is_ordinary(*tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and _compiles(tensors[0])
    )


ranked_amounts = functools.partial(ordering.ranked_amounts, fuses, fused)


def _closed_form(label: SoftLabel, logits: Tensor, compile: bool, reduce: bool, known: Statistics | None) -> Tensor:
    if logits.requires_grad and torch.is_grad_enabled():
        result: Tensor = ClosedForm.apply(logits, label, compile, reduce, known, *label.tensors())  # type: ignore[no-untyped-call]
        return result
    rows = compiled.values(label, logits, known)[0] if compile else eager.values(label, logits)
    return rows.sum() if reduce else rows


def _for_a_graph(label: SoftLabel, logits: Tensor) -> SoftLabel:
    """The same, of tensors of rows alone: a teacher's layer is computed now; thresholds prune where kernels fuse."""
    label = label.rows(slice(None))
    if not fuses(logits.detach()):
        return label
    terms = [term.thresholded(fused) if isinstance(term, Prediction) else term for term in label.terms]
    return replace(label, terms=terms)


def _are_few(logits: Tensor) -> bool:
    return logits.is_cpu and logits.numel() <= FEW


def _compiles(logits: Tensor) -> bool:
    device = logits.device.type
    wanted = get_backend() == "compile" or (
        get_backend() == "auto" and device in COMPILED_DEVICES and device not in _failed
    )
    return wanted and compiled.can_compile(logits)


def _compiled_or(logits: Tensor, compiled_way: Callable[[], Result], otherwise: Callable[[], Result]) -> Result:
    """What the compiled way gives, where it is wanted and works. If not, warn once; but raise if the user asked."""
    if _compiles(logits):
        try:
            return compiled_way()
        except compiled.CompilationFailed as error:
            if get_backend() == "compile":
                raise
            _failed.add(logits.device.type)
            warnings.warn(f"{error.args[0]}; from now on they run uncompiled", stacklevel=2)
    return otherwise()
