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
from softlabels.kernels import blocks, eager
from softlabels.kernels.soft_label import Even, Label, Prediction, SoftLabel, largest_and_total, product, working_dtype
from softlabels.kernels.statistics import Statistics
from softlabels.kernels.statistics import statistics as traceable_statistics

Graph = Callable[..., Any]

LOG2_E = 1.0 / math.log(2.0)
OLDEST_TORCH = (2, 11)  # the first whose torch.compile was tested with these graphs

_INPUT = object()  # in the place of a tensor among arguments

_graphs: dict[tuple[object, ...], Graph] = {}


class CompilationFailed(RuntimeError):
    """torch.compile does not work here."""


def can_compile(logits: Tensor) -> bool:
    """Few rows are another version, and what watches operations (a FlopCounterMode) cannot see into a graph."""
    return logits.shape[0] > 1 and torch._C._len_torch_dispatch_stack() == 0


def statistics(logits: Tensor) -> Statistics:
    """Statistics of all rows."""
    if not blocks.pay(logits):
        return Statistics(*_run(_statistics, None, logits))
    largest, others, count, below = _run(_statistics_and_sums, None, logits)
    return Statistics(largest, others, count=count, below=below)


def values(label: SoftLabel, logits: Tensor, known: Statistics | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of each row, and row-shaped tensors that help to find the gradient."""
    if known is not None and known.count is not None and known.below is not None and _is_two_level(label):
        sums = known.largest, known.others, known.count, known.below
        rows, *found = _run(_values_of_statistics, label, logits, *sums)
    else:
        rows, *found = _run(_values_in_blocks if blocks.are_better(label, logits) else _values, label, logits)
    return rows, tuple(found)


def value_and_gradient(label: SoftLabel, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the losses of all rows, and its gradient in the dtype of the logits; for a CPU."""
    total, gradient = _run(_value_and_gradient, label, logits)
    return (total, gradient) if math.isfinite(total.item()) else eager.value_and_gradient(label, logits)


def gradient(label: SoftLabel, logits: Tensor, incoming: Tensor, known: tuple[Tensor, ...]) -> Tensor:
    """The incoming gradient times the loss's own, given what ``values`` knew."""
    result: Tensor = _run(_gradient, label, logits, incoming, *known)
    return result


def _statistics(_: SoftLabel | None, logits: Tensor) -> tuple[Tensor, Tensor]:
    known = traceable_statistics(logits)
    return known.largest, known.others


def _statistics_and_sums(_: SoftLabel | None, logits: Tensor) -> tuple[Tensor, ...]:
    return blocks.statistics(logits.to(working_dtype(logits)))


def _is_two_level(label: SoftLabel) -> bool:
    """Whether it is an even amount and the label's, without class weights."""
    return [type(term) for term in label.terms] == [Even, Label] and label.terms[0].class_weight is None


def _values_of_statistics(
    label: SoftLabel, logits: Tensor, largest: Tensor, others: Tensor, count: Tensor, below: Tensor
) -> tuple[Tensor, ...]:
    """The losses without another look at the logits but the labels' own."""
    even, of_label = label.terms
    assert isinstance(of_label, Label)
    x = logits.to(working_dtype(logits))
    claimed = x.gather(1, of_label.index.unsqueeze(1)).squeeze(1) == -torch.inf
    count = count + claimed
    inner = product(even.amount / count, torch.where(claimed, -torch.inf, -below))
    summed = replace(label, terms=[blocks.Summed(even.amount, inner), of_label])
    return _losses(label.with_facts([count]), summed, x, label.possible(x), largest, others.log1p())


def _values(label: SoftLabel, logits: Tensor) -> tuple[Tensor, ...]:
    x = logits.to(working_dtype(logits))
    possible = label.possible(x)
    largest, total = largest_and_total(x)
    label = label.surveyed(x, possible)
    return _losses(label, label, x, possible, largest, total.log())


def _values_in_blocks(label: SoftLabel, logits: Tensor) -> tuple[Tensor, ...]:
    x = logits.to(working_dtype(logits))
    possible = label.possible(x)
    label, summed, largest, total = blocks.survey(label.surveyed(x, possible), x)
    return _losses(label, summed, x, possible, largest, total.log())


def _losses(
    label: SoftLabel, summed: SoftLabel, x: Tensor, possible: Tensor, largest: Tensor, log_sum: Tensor
) -> tuple[Tensor, ...]:
    """The loss of each row and what its gradient needs to know; ``summed`` is the label to be summed."""
    anchor = _anchor(summed, x, largest)
    above, x = largest - anchor, x - anchor.unsqueeze(1)
    mass = summed.mass(x, possible)
    rows = product(label.weight, product(mass, log_sum + above) - summed.inner(x, possible))
    masses = () if label.total is not None else (mass + torch.zeros_like(log_sum),)
    return rows, largest, log_sum, *masses, *label.facts()


def _anchor(label: SoftLabel, x: Tensor, largest: Tensor) -> Tensor:
    """What to subtract from a row before it is summed.

    The largest logit is known after a loop over the row. Where a label is all but an even share, its
    own logit keeps the digits too, and one loop is enough.
    """
    if not label.terms or not all(isinstance(term, Even) for term in label.terms[:-1]):
        return largest
    last = label.terms[-1]
    if not isinstance(last, Label):
        return largest
    at_label = x.gather(1, last.index.unsqueeze(1)).squeeze(1)
    return torch.where(at_label.isfinite(), at_label, 0.0)


def _value_and_gradient(label: SoftLabel, logits: Tensor) -> tuple[Tensor, Tensor]:
    x = logits - logits.amax(1).unsqueeze(1)
    exponentials = (x * LOG2_E).exp2()  # with Sleef in 0.6 of the time of exp
    exponentials = exponentials.as_strided(exponentials.shape, exponentials.stride())  # or Inductor takes it twice
    total, mass = exponentials.sum(1), label.mass(x)
    loss = (label.weight * (mass * total.log() - label.inner(x))).sum()
    return loss, _written_like(logits, label.add_to(exponentials, -label.weight, mass * label.weight / total))


def _gradient(
    label: SoftLabel, logits: Tensor, incoming: Tensor, largest: Tensor, log_sum: Tensor, *known: Tensor
) -> Tensor:
    mass, facts = (label.total, known) if label.total is not None else (known[0], known[1:])
    weight = label.weight * incoming
    label = label.with_facts(facts)
    x = logits.to(working_dtype(logits))
    p = (x - largest.unsqueeze(1) - log_sum.unsqueeze(1)).exp()
    result = label.add_to(p, -weight, mass * weight, label.possible(x))
    if weight.dim():
        result = torch.where((weight == 0).unsqueeze(1), 0.0, result)
    return _written_like(logits, result)


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
                value = _constant(float(value), working_dtype(logits))
            if isinstance(value, Tensor):
                names.append((place, name))
                inputs.append(value)
            else:
                constants[name] = float(value) if isinstance(value, numbers.Real) else value
        kinds.append((type(term), constants))
    inputs += more
    described = [item for kind, constants in kinds for item in (kind, *constants.items())]
    key = (body, logits.device, *described, *names, *[_layout(t) for t in inputs])
    return _call(key, logits.device.type, inputs, lambda: _graph_of(body, kinds, tuple(names)))


def fused(function: Graph, arguments: Sequence[Any], device: torch.device) -> Any:
    """function(*arguments) as one graph; all tensors but 0-dimensional ones are on the device, none has a graph."""
    inputs: list[Tensor] = []
    constants: list[Any] = []
    for value in arguments:
        if isinstance(value, float) and value not in (0.0, 1.0):
            value = _constant(value, torch.float64)
        is_input = isinstance(value, Tensor)
        constants.append(_INPUT if is_input else value)
        if is_input:
            inputs.append(value.detach())

    def graph(*inputs: Tensor) -> Any:
        given = iter(inputs)
        return function(*[next(given) if constant is _INPUT else constant for constant in constants])

    graph.__name__ = function.__name__
    key = (function, device, *constants, *[_layout(t) for t in inputs])
    return _call(key, device.type, inputs, lambda: graph)


def _call(key: tuple[object, ...], device: str, inputs: Sequence[Tensor], make: Callable[[], Graph]) -> Any:
    """Call the graph that has this key, compiled if it is the first time."""
    graph = _graphs.get(key)
    if graph is None:
        graph = _graphs[key] = _compile(make())
    try:
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(device):
            return graph(*inputs)
        with torch.no_grad(), torch.autocast(device, enabled=False):  # or these, too, would make versions
            return graph(*inputs)
    except Exception as error:
        del _graphs[key]  # a function that failed once may refuse to be compiled again
        if "RecompileLimit" in type(error).__name__:  # versions for what the key does not tell, such as thread counts
            return _call(key, device, inputs, make)
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        needed = "a C++ compiler" if device == "cpu" else "Triton"
        raise CompilationFailed(
            f"softlabels could not compile its kernels for {device}: torch.compile needs {needed} there, or "
            "failed for the reason above; softlabels.set_backend('eager') does without"
        ) from error


def _parts(label: SoftLabel | None) -> list[Any]:
    """The terms, pruned outside of the graph, and the soft label itself for its weight."""
    if label is None:
        return []
    return [*(term.pruned() if isinstance(term, Prediction) else term for term in label.terms), label]


def _options(part: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(part, field.name)) for field in fields(part) if field.init and field.name != "terms"]


def _compile(graph: Graph) -> Graph:
    """A compiled function of its own, with its own code object: torch.compile counts versions by code object."""
    if _reading.TORCH < OLDEST_TORCH:
        raise CompilationFailed(
            f"the compiled kernels of softlabels need torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer, and this is "
            f"{torch.__version__}; softlabels.set_backend('eager') does without"
        )

    own = types.FunctionType(graph.__code__.replace(), graph.__globals__, graph.__name__, None, graph.__closure__)
    return torch.compile(own, fullgraph=True, options={"guard_filter_fn": _may_fail})


def _graph_of(body: Graph, kinds: Sequence[tuple[Any, dict[str, Any]]], names: tuple[tuple[int, str], ...]) -> Graph:
    """A body as a function of tensors alone."""

    def graph(logits: Tensor, *inputs: Tensor) -> Any:
        arguments = [dict(constants) for _, constants in kinds]
        for (place, name), value in zip(names, inputs):  # noqa: B905
            arguments[place][name] = value
        label = None
        if kinds:
            terms = [kind(**own) for (kind, _), own in zip(kinds[:-1], arguments)]  # noqa: B905
            label = SoftLabel(terms, **arguments[-1])
        return body(label, logits, *inputs[len(names) :])

    graph.__name__ = body.__name__
    return graph


def _may_fail(guards: Sequence[Any]) -> list[bool]:
    """Which guards are checked at each call: not those on functions of modules (G) and on what a graph closes over."""
    return [not guard.name.startswith(("G[", "body", "kinds", "names", "function", "constants")) for guard in guards]


def _layout(tensor: Tensor) -> tuple[object, ...]:
    """What would make another version: dtype, classes, and beside (N, K) the order of strides, sizes of 0 and 1."""
    if tensor.dim() < 2:
        return tensor.dtype, tensor.is_contiguous()
    if tensor.dim() == 2 and tensor.is_contiguous():
        return tensor.dtype, tensor.shape[1]
    order = sorted(range(tensor.dim()), key=tensor.stride)
    few = [number if number < 2 else 2 for number in (*tensor.shape, *tensor.stride())]
    return tensor.dtype, tensor.shape[1], *order, *few


@functools.lru_cache(maxsize=256)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """On the CPU, whatever the device: a kernel is given its number."""
    with torch.inference_mode(False):  # whoever asks first
        return torch.full((), value, dtype=dtype, device="cpu")
