"""Run what Inductor writes for a GPU on tensors of a CPU, by Triton's interpreter.

The environment variable TRITON_INTERPRET=1 must be set before triton is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.speed.gpu_code import inductor
from benchmarks.speed.gpu_code.build import describe_a_gpu
from benchmarks.speed.gpu_code.program import Kernel
from benchmarks.speed.gpu_code.program import kernel as read_kernel
from benchmarks.speed.gpu_code.resources import blocks, load
from softlabels import kernels
from softlabels.functional import _rows
from softlabels.kernels import autograd, compiled, dispatch
from softlabels.kernels import blocks as row_blocks

BLOCKS = {"x": 2, "row": 64, "point": 64}  # small, so that small rows take several
SHARED = 256  # the least numbers that each program takes of a row which several share


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let softlabels treat tensors of the CPU as it treats those of a GPU, with interpreted kernels."""
    from torch._inductor.runtime import triton_helpers

    describe_a_gpu()
    replaced = [
        (triton_helpers, "libdevice", _functions()),
        (triton_helpers, "math", _functions()),
        (dispatch, "COMPILED_DEVICES", ("cpu",)),
        (dispatch, "_are_few", lambda logits: False),
        (dispatch, "is_ready_in_forward", lambda logits: False),
        (autograd, "is_ready_in_forward", lambda logits: False),
        (row_blocks, "pay", lambda logits: True),
        (_rows, "least_and_greatest", lambda values: None),
        (compiled, "_graphs", {}),
        (torch, "compile", lambda function, **options: compile(function)),
    ]
    with ExitStack() as stack, kernels.backend("compile"):
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of torch.compile."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils import _pytree as pytree

    programs: dict[Any, tuple[Callable[..., Any], Any]] = {}

    def graph(*inputs: Tensor) -> Any:
        key = tuple((t.shape, t.stride(), t.dtype) for t in inputs)
        if key not in programs:
            with FakeTensorMode(allow_non_fake_inputs=True):
                fakes = [
                    torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda" if t.dim() else "cpu")
                    for t in inputs
                ]
            traced, structure = inductor.trace(function, fakes)
            programs[key] = run(inductor.write_graph(traced, fakes)), structure
        call, structure = programs[key]
        return pytree.tree_unflatten(list(call([t.detach() for t in inputs])), structure)

    return graph


def run(source: str) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """A program of Inductor as a function of tensors of the CPU."""
    names: dict[str, Any] = {}
    head, _, tail = source.partition("async_compile = AsyncCompile()")
    text = head + re.sub(r"async_compile\.wait\(globals\(\)\)\s+del async_compile", "", tail)
    text = text.replace("empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda", "")
    text = re.sub(r"device='cuda(:0)?'|device=device\(type='cuda', index=0\)", "device='cpu'", text)
    names["async_compile"] = SimpleNamespace(triton=lambda name, body, **_: _Interpreted(read_kernel(name, body)))
    names["empty_strided_cuda"] = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
    exec(compile_text(text), names)
    call, names["get_raw_stream"] = names["call"], lambda device: 0
    names["copy_if_misaligned"] = lambda tensor: tensor

    def on_cpu(inputs: list[Tensor]) -> Sequence[Tensor]:
        with (
            mock.patch.object(torch.cuda, "_DeviceGuard", return_value=nullcontext()),
            mock.patch.object(torch.cuda, "set_device"),
        ):
            return call(inputs)  # type: ignore[no-any-return]

    return on_cpu


def compile_text(text: str) -> Any:
    """The module that a program is, with its name for the messages of errors."""
    import builtins

    return builtins.compile(text, "<program of Inductor>", "exec")


def _functions() -> Any:
    """Nvidia's functions, of which the interpreter has none, by Triton's."""
    import triton.language as tl

    def log1p(x: Any) -> Any:
        return tl.where(tl.abs(x) < 1e-4, x - 0.5 * x * x, tl.log(1.0 + x))

    return SimpleNamespace(
        exp=lambda x: tl.exp(x),  # looked up when called: the interpreter exchanges it
        exp2=lambda x: tl.exp2(x),
        log=lambda x: tl.log(x),
        log2=lambda x: tl.log2(x),
        abs=lambda x: tl.abs(x),
        log1p=log1p,
        pow=lambda x, y: tl.where(x == 0.0, 0.0, tl.exp(y * tl.log(x))),
        isnan=lambda x: x != x,
        isinf=lambda x: tl.abs(x) == float("inf"),
    )


class _Interpreted:
    """What a program has in the place of a compiled kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.function = load(kernel.source, kernel.name)
        self.function.fn.__globals__.update(libdevice=_functions(), tl_math=_functions())
        self.kernel = kernel
        self.shares = "ws_ptr" in kernel.signature  # a scan of which each program does a part
        self.blocks = blocks(kernel, **{**BLOCKS, "row": SHARED} if self.shares else BLOCKS)

    def run(self, *arguments: Any, stream: int) -> None:
        """Start it on enough blocks."""
        sizes = re.findall(r"^    (x|y|r0_)numel = (\d+)$", self.kernel.source, re.MULTILINE)
        grid = {axis: -(-int(size) // self.blocks.get(f"{axis.upper()}BLOCK", 1)) for axis, size in sizes}
        if self.shares:
            grid = {"x": grid["r0_"], "y": grid["x"]}
        given = iter(arguments)
        values = {name: next(given) for name, kind in self.kernel.signature.items() if kind != "constexpr"}
        self.function[(grid.get("x", 1), grid.get("y", 1))](**values, **self.blocks)
