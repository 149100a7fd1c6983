"""From a Python function to the program that Inductor writes for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

_written: dict[str, str] = {}  # by the graph and its inputs


class _Stop(Exception):
    """The program is written; it is not to be loaded."""


def write(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[str, Any]:
    """The program for function(*inputs), and what it returns, where inputs are fake tensors.

    The function is traced on CPU tensors of the same shapes and moved to the GPU as a graph, since Python bindings of
    some operations ask for a driver even of fake tensors.
    """
    graph, structure = trace(function, inputs)
    return write_graph(graph, inputs), pytree.tree_unflatten(outputs(graph, inputs), structure)


def trace(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[GraphModule, Any]:
    """The graph of a function as Inductor gets it, and the structure of its results."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import _disable_current_modes

    structures = []

    def flat(*args: Tensor) -> list[Any]:
        leaves, structure = pytree.tree_flatten(function(*args))
        structures.append(structure)
        return leaves

    with _disable_current_modes():
        on_cpu = FakeTensorMode(allow_non_fake_inputs=True)
        with on_cpu, torch.no_grad(), as_if_compiling():
            copies = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in inputs]
            functional = torch.func.functionalize(flat, remove="mutations")
            graph = make_fx(functional, select_decomp_table(), tracing_mode="real")(*copies)
    move_to_gpu(graph)
    return graph, structures[-1]


def move_to_gpu(graph: GraphModule) -> None:
    """Let what a graph makes be made on the GPU."""
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()


def outputs(graph: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Fake results of a graph."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return list(FakeTensorProp(graph, inputs[0].fake_mode).propagate_dont_convert_inputs(*inputs))


def write_graph(graph: GraphModule, inputs: Sequence[Any]) -> str:
    """The program for a graph whose nodes are on the GPU."""
    import torch._inductor.config as config
    import torch._inductor.fx_passes.joint_graph as joint_graph
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.utils._python_dispatch import _disable_current_modes

    key = graph.code + "".join(f"{t.shape}{t.stride()}{t.dtype}{t.device}" for t in inputs)
    if key in _written:
        return _written[key]
    programs: list[str] = []

    def stop(lowering: Any) -> None:
        code = lowering.codegen()
        code = code[0] if isinstance(code, tuple) else code
        programs.append(code if isinstance(code, str) else code.value)
        raise _Stop

    settings = config.patch(compile_threads=1, fx_graph_cache=False, joint_graph_constant_folding=False)
    with (
        _disable_current_modes(),
        torch.no_grad(),
        settings,
        V.set_fake_mode(inputs[0].fake_mode),
        mock.patch.object(joint_graph, "lazy_init"),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
    ):
        outputs(graph, inputs)
        try:
            joint_graph.joint_graph_passes(graph)
            compile_fx_inner(graph, list(inputs))
        except Exception:
            if not programs:
                raise
    _written[key] = programs[-1]
    return programs[-1]


@contextmanager
def as_if_compiling() -> Iterator[None]:
    """What torch.compiler.is_compiling() says while Dynamo traces."""
    with mock.patch.object(torch.compiler, "_is_compiling_flag", True):
        yield
