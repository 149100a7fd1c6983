"""Run a loss on fake tensors of a GPU and note every kernel that it would start."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.gpu_code import inductor, program
from softlabels.kernels import compiled, dispatch, linear
from softlabels.kernels.autograd import ClosedForm

# Kernels that operations of torch start, at least; all others start one.
SEVERAL = {"sort": 3, "topk": 2, "cumsum": 2, "masked_fill": 2, "scatter": 2, "scatter_add": 2, "logsumexp": 4}
NOTHING = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "device",
    "_unsafe_view",
)
LOOKS_UP = ("gather", "nll_loss_forward", "nll_loss_backward")  # reads few numbers of what it is given
SYNCHRONISES = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique")


@dataclass
class Event:
    """An operation of torch, or a graph that Inductor made a program of."""

    name: str
    kernels: int
    bytes: float  # moved, per logit
    waits: bool = False  # for the device
    allocated: Counter[str] = field(default_factory=Counter)  # tensors of the logits' size, by dtype
    program: program.Program | None = None
    source: str = ""


@dataclass
class Call:
    """One call of a loss: what its forward pass does, then what its backward pass does."""

    forward: list[Event] = field(default_factory=list)
    backward: list[Event] = field(default_factory=list)

    @property
    def events(self) -> list[Event]:
        """Both."""
        return self.forward + self.backward


class Recorder(TorchDispatchMode):
    """Notes what runs under it, for logits of a shape."""

    def __init__(self, rows: int, classes: int) -> None:
        super().__init__()
        self.rows, self.classes = rows, classes
        self.events: list[Event] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an operation of torch."""
        name = func._schema.name.split("::")[1]
        if name in SYNCHRONISES:
            self.events.append(Event(name, 1, 0.0, waits=True))
        result = func(*args, **(kwargs or {}))
        tensors = _tensors((args, kwargs, result))
        moved = self._bytes(_tensors(result) if name in LOOKS_UP else tensors)
        own = _tensors(result) if not name.endswith("_") else []
        large = [t for t in own if t.numel() * program.LARGE >= self.rows * self.classes]
        made = Counter(str(t.dtype).split(".")[1] for t in large)
        event = Event(name, SEVERAL.get(name, 1), moved, allocated=made)
        aliases = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        devices = {t.device.type for t in tensors}
        if "_copy" in name and len(devices) > 1:
            event.waits = True
        if not is_view and name not in NOTHING and (event.waits or devices != {"cpu"} or self.counts_cpu):
            self.events.append(event)
        return result

    counts_cpu = False  # where tensors of a CPU stand for those of a GPU

    def note(self, name: str, source: str) -> None:
        """Note a graph."""
        own = program.read(source, self.rows, self.classes)
        moved = float(sum(kernel.launches * kernel.bytes_per_element() for kernel in own.kernels))
        kernels = own.launches + sum(SEVERAL.get(other.split(".")[1], 1) for other in own.others)
        self.events.append(Event(name, kernels, moved, False, own.allocated, own, source))

    def taken(self) -> list[Event]:
        """What was noted, and forget it."""
        events, self.events = self.events, []
        return events

    def _bytes(self, tensors: Sequence[Tensor]) -> float:
        logits = self.rows * self.classes
        large = {id(t): t for t in tensors if t.numel() * program.LARGE >= logits}
        return sum(t.numel() * t.element_size() for t in large.values()) / logits


def ours(loss: Callable[[], Tensor], recorder: Recorder) -> Call:
    """Record a loss of softlabels on fake tensors of a GPU, as its backend "auto" runs it there."""
    call = Call()
    with _by_hand(recorder) as nodes, recorder:
        loss()
        call.forward = recorder.taken()
        incoming = torch.empty((), device="cuda")
        with torch.no_grad():
            for node, context in nodes:
                node.backward(context, incoming)
        call.backward = recorder.taken()
    return call


def eager(loss: Callable[[Tensor], Tensor], logits: Tensor, recorder: Recorder) -> Call:
    """Record operations of torch on fake tensors of a CPU, which are those of a GPU too."""
    recorder.counts_cpu = True
    call, logits = Call(), logits.requires_grad_()
    with recorder:
        result = loss(logits)
        call.forward = recorder.taken()
        torch.autograd.grad(result, logits, torch.empty_like(result))
        call.backward = recorder.taken()
    return call


def compiled_by_torch(loss: Callable[..., Tensor], inputs: Sequence[Tensor], recorder: Recorder) -> Call:
    """Record what torch.compile makes of a loss of torch: inputs are fake tensors of a CPU, the logits first."""
    from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    call, gpu = Call(), FakeTensorMode(allow_non_fake_inputs=True)

    def compiler(events: list[Event]) -> Callable[..., Any]:
        def compile(graph: Any, examples: Sequence[Any]) -> Any:
            run = make_boxed_func(graph.forward)
            on_gpu = torch.fx.GraphModule(graph, graph.graph.__class__())
            on_gpu.graph.output(on_gpu.graph.graph_copy(graph.graph, {}))
            inductor.move_to_gpu(on_gpu)
            with torch.utils._python_dispatch._disable_current_modes(), gpu:
                moved = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in examples]
            recorder.note("torch.compile", inductor.write_graph(on_gpu, moved))
            events.extend(recorder.taken())
            return run

        return compile

    function = aot_function(
        loss,
        fw_compiler=compiler(call.forward),
        bw_compiler=compiler(call.backward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    logits = inputs[0].requires_grad_()
    result = function(logits, *inputs[1:])
    torch.autograd.grad(result, logits, torch.empty_like(result))
    return call


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def _by_hand(recorder: Recorder) -> Iterator[list[tuple[Any, Any]]]:
    """Let softlabels run on fake tensors: its graphs are noted, and autograd, which asks the driver, is not asked.

    Returns:
        Nodes of the graph that would be there, with their contexts.
    """
    nodes: list[tuple[Any, Any]] = []

    def apply(node: Any, *arguments: Any) -> Tensor:
        context = _Context(needs_input_grad=[True] * len(arguments))
        nodes.append((node, context))
        with torch.no_grad():
            return node.forward(context, *arguments)  # type: ignore[no-any-return]

    def closed_form(label: Any, logits: Tensor, compile: bool, reduce: bool, known: Any) -> Tensor:
        return apply(ClosedForm, logits, label, compile, reduce, known, *label.tensors())

    def of_layer(label: Any, logits: Any, reduce: bool, compile: bool) -> Tensor:
        layer = (logits.hidden, logits.weight, logits.bias)
        return apply(linear.LinearCrossEntropy, *layer, label, logits.block, reduce, compile, *label.tensors())

    def blocks(weight: Any, logits: Any) -> list[slice]:
        if isinstance(weight, Tensor) and weight.dim():
            recorder.events.append(Event("nonzero", 1, 0.0, waits=True))  # which rows count
        return [slice(start, start + logits.block) for start in range(0, logits.shape[0], logits.block)]

    def compile(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def graph(*inputs: Tensor) -> Any:
            source, results = inductor.write(function, inputs)
            recorder.note(function.__name__, source)
            return results

        return graph

    with (
        mock.patch.object(dispatch, "_closed_form", closed_form),
        mock.patch.object(linear, "cross_entropy", of_layer),
        mock.patch.object(linear, "_blocks", blocks),
        mock.patch.object(dispatch, "is_ordinary", return_value=True),
        mock.patch.object(compiled, "can_compile", return_value=True),
        mock.patch.object(compiled, "_graphs", {}),
        mock.patch.object(compiled, "_constant", compiled._constant.__wrapped__),  # keeps no fake tensors
        mock.patch.object(torch, "compile", compile),
        mock.patch.object(
            Tensor, "__invert__", lambda tensor: torch.bitwise_not(tensor)
        ),  # the binding asks the driver
        mock.patch.object(Tensor, "__getitem__", _item),  # and so do these two
        mock.patch.object(Tensor, "__setitem__", _set_item),
    ):
        yield nodes


def _item(tensor: Tensor, key: Any, original: Any = Tensor.__getitem__) -> Tensor:
    if tensor.is_cpu:
        return original(tensor, key)
    keys = key if isinstance(key, tuple) else (key,)
    if all(isinstance(one, slice | int) for one in keys):
        dim = 0
        for one in keys:
            if isinstance(one, slice):
                tensor, dim = torch.ops.aten.slice.Tensor(tensor, dim, one.start, one.stop), dim + 1
            else:
                tensor = torch.ops.aten.select.int(tensor, dim, one)
        return tensor
    return torch.ops.aten.index.Tensor(tensor, [key])


def _set_item(tensor: Tensor, key: Any, value: Any, original: Any = Tensor.__setitem__) -> None:
    if tensor.is_cpu:
        original(tensor, key, value)
    else:
        torch.ops.aten.copy_(_item(tensor, key), value)


class _Context(types.SimpleNamespace):
    """In the place of autograd's."""

    saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep tensors."""
        self.saved_tensors = tensors
