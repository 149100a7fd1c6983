"""The row kernels' values and gradients as graphs compiled by torch.compile.

In each graph logits are read, row-shaped numbers or the gradient are written, and nothing else of the logits' size
exists. There are three: values and gradient in one (a CPU, where the incoming gradient is known to be one); values,
with each row's largest logit and log-sum; and the gradient from these (an accelerator: 3 N K numbers move in all).

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
from typing import Any

import torch
from torch import Tensor

from softlabels.kernels import eager, formula
from softlabels.kernels.soft_label import (
    Coefficient,
    SoftLabel,
    Teacher,
    column,
    is_number,
    product,
    prune,
    working_dtype,
)

Graph = Callable[..., Any]

LOG2_E = 1.0 / math.log(2.0)

_graphs: dict[tuple[object, ...], Graph] = {}


class CompilationFailed(RuntimeError):
    """torch.compile does not work here."""


def values(label: SoftLabel, logits: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """sum_c t_c log p_c per row; and what is known of the rows: largest logit, log-sum, mass, and the teacher's."""
    if not _can_compile(logits):
        return eager.values(label, logits)
    value, *known = _run(_values, label, logits)
    return value, tuple(known)


def total_and_gradient(label: SoftLabel, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the values of all rows and its gradient, in the dtype of the logits."""
    if not _can_compile(logits):
        return eager.total_and_gradient(label, logits)
    total, gradient = _run(_total_and_gradient, label, logits)
    return total, gradient


def gradient(label: SoftLabel, logits: Tensor, incoming: Tensor, known: tuple[Tensor, ...]) -> Tensor:
    """The gradient of the sum of the values, each times ``incoming``, in the dtype of the logits."""
    if not known or not _can_compile(logits):
        return eager.gradient(label, logits, incoming, known)
    result: Tensor = _run(_gradient, label, logits, incoming, *known)
    return result


def _can_compile(logits: Tensor) -> bool:
    """Few rows are another version, and what watches operations (a FlopCounterMode) cannot see into a graph."""
    return logits.shape[0] > 1 and torch._C._len_torch_dispatch_stack() == 0


def _values(label: SoftLabel, logits: Tensor) -> tuple[Tensor, ...]:
    label, of_teacher = label.normalized()
    logits = logits.to(working_dtype(logits))
    largest = logits.amax(1)
    shifted = logits - largest.unsqueeze(1)
    log_sum = shifted.exp().sum(1).log()
    value, mass, _, _ = formula.parts(label, shifted)
    return value - product(mass, log_sum, careful=True), largest, log_sum, mass, *of_teacher


def _total_and_gradient(label: SoftLabel, logits: Tensor) -> tuple[Tensor, Tensor]:
    shifted = logits - logits.amax(1).unsqueeze(1)
    exponentials = (shifted * LOG2_E).exp2()  # with Sleef in 0.6 of the time of exp
    exponentials = exponentials.as_strided(exponentials.shape, exponentials.stride())  # or Inductor takes it twice
    total = exponentials.sum(1)
    value, mass, rest, of_index = formula.parts(label, shifted)
    p_mass = exponentials * (mass / total).unsqueeze(1)
    value = value - product(mass, total.log(), careful=True)
    return value.sum(), _written_like(logits, _soft_minus(p_mass, label, rest, of_index))


def _gradient(
    label: SoftLabel,
    logits: Tensor,
    incoming: Tensor,
    largest: Tensor,
    log_sum: Tensor,
    mass: Tensor,
    *of_teacher: Tensor,
) -> Tensor:
    label = label.with_normalizer(of_teacher).scaled(incoming)
    shifted = logits.to(working_dtype(logits)) - largest.unsqueeze(1)
    p_mass = (shifted - log_sum.unsqueeze(1)).exp() * (mass * incoming).unsqueeze(1)
    return _written_like(logits, _soft_minus(p_mass, label, label.rest(careful=True), label.of_index))


def _soft_minus(p_mass: Tensor, label: SoftLabel, rest: Coefficient, of_index: Coefficient) -> Tensor:
    """t - p sum t, by comparison with the label rather than by writing at it, which would not fuse."""
    result = rest - p_mass
    if is_number(of_index, 0.0):
        return result
    classes = torch.arange(p_mass.shape[1], dtype=torch.int32, device=p_mass.device)  # as many bits as a float32
    classes = classes.view(1, -1, *[1] * (p_mass.dim() - 2))
    return torch.where(classes == label.target.to(torch.int32).unsqueeze(1), result + column(of_index), result)


def _written_like(logits: Tensor, gradient: Tensor) -> Tensor:
    """In the dtype and memory format of the logits."""
    return torch.empty_like(logits).copy_(gradient)


def _run(body: Graph, label: SoftLabel, logits: Tensor, *more: Tensor) -> Any:
    if isinstance(label, Teacher) and label.keep is not None and label.keep < logits.shape[1]:
        label = label.replace({"teacher_logits": prune(label.teacher_logits, label.keep)})
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for name, value in vars(label).items():
        if name == "total":  # nothing that a graph would gain by
            continue
        if isinstance(value, Tensor):
            tensors[name] = value
        elif name == "keep" or not isinstance(value, numbers.Real):
            constants[name] = None if name == "keep" else value
        elif value in (0.0, 1.0):
            constants[name] = float(value)
        else:
            tensors[name] = _constant(float(value), working_dtype(logits), logits.device)
    inputs = (logits.detach(), *tensors.values(), *more)  # not detached, a leaf and another tensor make two versions
    key = (body, logits.device, type(label), *constants.items(), *tensors, *[_layout(t) for t in inputs])
    graph = _graphs.get(key)
    if graph is None:
        graph = _graphs[key] = _compile(body, type(label), constants, tuple(tensors))
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


def _compile(body: Graph, kind: type[SoftLabel], constants: dict[str, Any], names: tuple[str, ...]) -> Graph:
    """A compiled function of its own, with its own code object: torch.compile counts versions by code object."""

    def graph(logits: Tensor, *inputs: Tensor) -> Any:
        tensors = dict(zip(names, inputs))  # noqa: B905
        label = kind(**constants, **tensors)
        return body(label, logits, *inputs[len(names) :])

    own = types.FunctionType(graph.__code__.replace(), graph.__globals__, body.__name__, None, graph.__closure__)
    return torch.compile(own, fullgraph=True, options={"guard_filter_fn": _may_fail})


def _may_fail(guards: Sequence[Any]) -> list[bool]:
    """Which guards are checked at each call: not those on functions of modules (G) and on what a graph closes over."""
    return [not guard.name.startswith(("G[", "body", "kind", "names", "constants")) for guard in guards]
