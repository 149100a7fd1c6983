"""Registers and spills of a kernel, by Triton's compiler and Nvidia's assembler."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.gpu_code.build import target
from benchmarks.speed.gpu_code.program import Kernel

WARPS, ROW_BLOCK, POINT_BLOCK = 8, 2048, 1024  # one of the configurations that Inductor tries
HEADER = """import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
@triton.jit"""
_folder = tempfile.TemporaryDirectory(prefix="gpu-code-")
_known: dict[str, Resources] = {}


@dataclass(frozen=True)
class Resources:
    """What one thread of a kernel takes: registers, and bytes spilled to memory."""

    registers: int
    spilled: int


def blocks(kernel: Kernel, x: int = 1, row: int = ROW_BLOCK, point: int = POINT_BLOCK) -> dict[str, int]:
    """A size for each block of a kernel that its caller chooses."""
    reduces = "R0_BLOCK" in kernel.signature or "R0_BLOCK: tl.constexpr" in kernel.source
    sizes = {"XBLOCK": x if reduces else point, "R0_BLOCK": row, "YBLOCK": 16}
    if "YBLOCK" in kernel.signature:
        sizes["XBLOCK"] = 32
    return {name: sizes.get(name, 1) for name, kind in kernel.signature.items() if kind == "constexpr"}


def resources(kernel: Kernel) -> Resources:
    """Compile a kernel for compute capability 9.0."""
    import triton
    from triton.compiler import ASTSource

    text = kernel.source.replace(kernel.name, "kernel")
    key = hashlib.sha256(f"{text}{kernel.signature}".encode()).hexdigest()
    if key not in _known:
        chosen: Any = blocks(kernel)
        types = {name: "constexpr" if name in chosen else kind for name, kind in kernel.signature.items()}
        pointers = [place for place, kind in enumerate(types.values()) if kind.startswith("*")]
        aligned: Any = {(place,): [["tt.divisibility", 16]] for place in pointers}
        source = ASTSource(load(text, "kernel"), types, chosen, attrs=aligned)
        binary = triton.compile(source, target=target(), options={"num_warps": WARPS})
        path = Path(_folder.name) / f"{key}.cubin"
        path.write_bytes(binary.asm["cubin"])
        tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
        said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        registers, stack, local = map(int, re.findall(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", said)[0])
        _known[key] = Resources(registers, stack + local)
    return _known[key]


def load(body: str, name: str) -> Any:
    """A kernel as a function: Triton reads its source from a file."""
    path = Path(_folder.name) / f"{hashlib.sha256(body.encode()).hexdigest()[:16]}.py"
    path.write_text(HEADER + body)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
