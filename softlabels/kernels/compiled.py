"""The row kernels in closed form as graphs compiled by torch.compile.

In each graph logits are read, row-shaped numbers or the gradient are written, and nothing else of the logits' size
exists. There are four: statistics; value and gradient in one (on a CPU, where the incoming gradient is known to be
one); values, with what is known of the rows then; and the gradient from that (on an accelerator: 3 N K numbers move).

Each graph is compiled for one number of classes and any number of rows. A compiled function keeps a few versions of
itself and then runs uncompiled without a word, so every number of classes, dtype and set of options gets a function of
its own. Numbers among the options are inputs of the graph, all but 0 and 1, which leave parts of it out.
"""

from __future__ import annotations

import functools
import math
import numbers
import types
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from softlabels import _reading
from softlabels.kernels import eager
from softlabels.kernels.soft_label import Prediction, SoftLabel, product, working_dtype
from softlabels.kernels.statistics import Statistics
from softlabels.kernels.statistics import statistics as traceable_statistics

Graph = Callable[..., Any]

LOG2_E = 1.0 / math.log(2.0)
OLDEST_TORCH = (2, 11)  # the first whose torch.compile was tested with these graphs

_graphs: dict[tuple[object, ...], Graph] = {}


class CompilationFailed(RuntimeError):
    """torch.compile does not work here."""


def can_compile(logits: Tensor) -> bool:
    """Few rows are another version, and what watches operations (a FlopCounterMode) cannot see into a graph."""
    return logits.shape[0] > 1 and torch._C._len_torch_dispatch_stack() == 0


def statistics(logits: Tensor) -> Statistics:
    """Statistics of all rows."""
    return Statistics(*_run(_statistics, None, logits))


def values(label: SoftLabel, logits: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of each row, and row-shaped tensors that help to find the gradient."""
    rows, *known = _run(_values, label, logits)
    return rows, tuple(known)


def value_and_gradient(label: SoftLabel, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the losses of all rows, and its gradient in the dtype of the logits; for a CPU."""
    total, gradient = _run(_value_and_gradient, label, logits)
    return (total, gradient) if math.isfinite(total.item()) else eager.value_and_gradient(label, logits)


def gradient(label: SoftLabel, logits: Tensor, known: tuple[Tensor, ...]) -> Tensor:
    """The gradient alone, given what ``values`` knew."""
    result: Tensor = _run(_gradient, label, logits, *known)
    return result


def _statistics(_: SoftLabel | None, logits: Tensor) -> tuple[Tensor, Tensor]:
    known = traceable_statistics(logits)
    return known.largest, known.others


def _values(label: SoftLabel, logits: Tensor) -> tuple[Tensor, ...]:
    label = _normalized(label, working_dtype(logits))
    x = logits.to(working_dtype(logits))
    largest = x.amax(1)
    x, possible = x - largest.unsqueeze(1), label.possible(x)
    log_sum = x.exp().sum(1).log()
    mass = label.mass(x, possible) + torch.zeros_like(log_sum)
    rows = product(label.weight, product(mass, log_sum) - label.inner(x, possible))
    normalizers = [t for term in label.terms if isinstance(term, Prediction) for t in term.normalizers()]
    return rows, largest, log_sum, mass, *normalizers


def _value_and_gradient(label: SoftLabel, logits: Tensor) -> tuple[Tensor, Tensor]:
    x = logits - logits.amax(1).unsqueeze(1)
    exponentials = (x * LOG2_E).exp2()  # with Sleef in 0.6 of the time of exp
    exponentials = exponentials.as_strided(exponentials.shape, exponentials.stride())  # or Inductor takes it twice
    total, mass = exponentials.sum(1), label.mass(x)
    loss = (label.weight * (mass * total.log() - label.inner(x))).sum()
    return loss, _written_like(logits, label.add_to(exponentials, -label.weight, mass * label.weight / total))


def _gradient(
    label: SoftLabel, logits: Tensor, largest: Tensor, log_sum: Tensor, mass: Tensor, *normalizers: Tensor
) -> Tensor:
    given = iter(normalizers)
    terms = [
        replace(term, largest=next(given), log_sum=next(given)) if isinstance(term, Prediction) else term
        for term in label.terms
    ]
    x = logits.to(working_dtype(logits))
    p = (x - largest.unsqueeze(1) - log_sum.unsqueeze(1)).exp()
    label = replace(label, terms=terms)
    result = label.add_to(p, -label.weight, mass * label.weight, label.possible(x))
    if isinstance(label.weight, Tensor) and label.weight.dim():
        result = torch.where((label.weight == 0).unsqueeze(1), 0.0, result)
    return _written_like(logits, result)


def _normalized(label: SoftLabel, dtype: torch.dtype) -> SoftLabel:
    terms = [term.normalized(dtype) if isinstance(term, Prediction) else term for term in label.terms]
    return replace(label, terms=terms)


def _written_like(logits: Tensor, gradient: Tensor) -> Tensor:
    """In the dtype and memory format of the logits."""
    return torch.empty_like(logits).copy_(gradient)


def _run(body: Graph, label: SoftLabel | None, logits: Tensor, *more: Tensor) -> Any:
    """Run the graph of a body for a soft label like this one, compiled if it is the first."""
    names: list[tuple[int, str]] = []
    inputs = [logits.detach()]  # not detached, a leaf and another tensor make two versions
    kinds: list[tuple[Any, dict[str, Any]]] = []
    for place, term in enumerate(_parts(label)):
        constants: dict[str, Any] = {}
        for name, value in _options(term):
            if isinstance(value, numbers.Real) and value not in (0.0, 1.0):
                value = _constant(float(value), working_dtype(logits), logits.device)
            if isinstance(value, Tensor):
                names.append((place, name))
                inputs.append(value)
            else:
                constants[name] = float(value) if isinstance(value, numbers.Real) else value
        kinds.append((type(term), constants))
    inputs += more
    described = [item for kind, constants in kinds for item in (kind, *constants.items())]
    key = (body, logits.device, *described, *names, *[_layout(t) for t in inputs])
    graph = _graphs.get(key)
    if graph is None:
        graph = _graphs[key] = _compile(body, kinds, tuple(names))
    device = logits.device.type
    try:
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(device):
            return graph(*inputs)
        with torch.no_grad(), torch.autocast(device, enabled=False):  # or these, too, would make versions
            return graph(*inputs)
    except Exception as error:
        del _graphs[key]  # a function that failed once may refuse to be compiled again
        if "RecompileLimit" in type(error).__name__:  # versions for what the key does not tell, such as thread counts
            return _run(body, label, logits, *more)
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        needed = "a C++ compiler" if device == "cpu" else "Triton"
        raise CompilationFailed(
            f"softlabels could not compile its kernels for {logits.device}: torch.compile needs {needed} there, or "
            "failed for the reason above; softlabels.set_backend('eager') does without"
        ) from error


def _parts(label: SoftLabel | None) -> list[Any]:
    """The terms, pruned outside of the graph, and the soft label itself for its weight."""
    if label is None:
        return []
    return [*(term.pruned() if isinstance(term, Prediction) else term for term in label.terms), label]


def _options(part: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(part, field.name)) for field in fields(part) if field.init and field.name != "terms"]


def _compile(body: Graph, kinds: Sequence[tuple[Any, dict[str, Any]]], names: tuple[tuple[int, str], ...]) -> Graph:
    """A compiled function of its own, with its own code object: torch.compile counts versions by code object."""
    if _reading.TORCH < OLDEST_TORCH:
        raise CompilationFailed(
            f"the compiled kernels of softlabels need torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer, and this is "
            f"{torch.__version__}; softlabels.set_backend('eager') does without"
        )

    def graph(logits: Tensor, *inputs: Tensor) -> Any:
        arguments = [dict(constants) for _, constants in kinds]
        for (place, name), value in zip(names, inputs):  # noqa: B905
            arguments[place][name] = value
        label = None
        if kinds:
            terms = [kind(**own) for (kind, _), own in zip(kinds[:-1], arguments)]  # noqa: B905
            label = SoftLabel(terms, **arguments[-1])
        return body(label, logits, *inputs[len(names) :])

    own = types.FunctionType(graph.__code__.replace(), graph.__globals__, body.__name__, None, graph.__closure__)
    return torch.compile(own, fullgraph=True, options={"guard_filter_fn": _may_fail})


def _may_fail(guards: Sequence[Any]) -> list[bool]:
    """Which guards are checked at each call: not those on functions of modules (G) and on what a graph closes over."""
    return [not guard.name.startswith(("G[", "body", "kinds", "names")) for guard in guards]


def _layout(tensor: Tensor) -> tuple[object, ...]:
    """What would make another version: dtype, classes, and beside (N, K) the order of strides, sizes of 0 and 1."""
    if tensor.dim() < 2:
        return tensor.dtype, tensor.is_contiguous()
    if tensor.dim() == 2 and tensor.is_contiguous():
        return tensor.dtype, tensor.shape[1]
    order = sorted(range(tensor.dim()), key=tensor.stride)
    few = [number if number < 2 else 2 for number in (*tensor.shape, *tensor.stride())]
    return tensor.dtype, tensor.shape[1], *order, *few


def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":  # which may be recording a graph, and keeps its own memory for it
        return torch.full((), value, dtype=dtype, device=device)
    return _constant_on_cpu(value, dtype)


@functools.lru_cache(maxsize=256)
def _constant_on_cpu(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # whoever asks first
        return torch.full((), value, dtype=dtype, device="cpu")
