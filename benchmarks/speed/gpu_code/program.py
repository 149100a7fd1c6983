"""What a program of Inductor says about itself: its kernels, their loops, and what they load and store."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.speed.gpu_code.build import CACHE, PROCESSORS

LARGE = 8  # what has at least an eighth of the logits' elements counts as of their size
IN_FLIGHT = 2 * PROCESSORS  # rows that are worked on at a time: two programs per processor
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "i1": 1, "u8": 1, "i32": 4, "i64": 8}


@dataclass
class Access:
    """A load or store of something as large as the logits, so many bytes an element."""

    argument: str
    bytes: int
    loop: int  # 0 outside of a loop


@dataclass
class Kernel:
    """One Triton kernel.

    Args:
        name: Of the kernel.
        source: Its text, from its name on.
        signature: Triton's type of each argument.
        loops: Over a row.
        loads: Of something of the logits' size.
        stores: Of something of the logits' size.
        row_bytes: What the loads of one row need to stay in the cache from loop to loop.
        launches: How often the program starts it.
    """

    name: str
    source: str
    signature: dict[str, str]
    loops: int
    loads: list[Access]
    stores: list[Access]
    row_bytes: int = 0
    launches: int = 0

    def bytes_per_element(self) -> int:
        """Bytes moved to and from memory, per logit.

        A second loop over a row finds it in the cache if the cache holds the rows of all programs in flight.
        """
        kept = self.row_bytes * IN_FLIGHT <= CACHE
        written = {store.argument for store in self.stores}
        read = {load.argument: load.bytes for load in self.loads if load.argument not in written}
        loaded = sum(read.values()) if kept else sum(load.bytes for load in self.loads)
        return loaded + sum(store.bytes for store in self.stores)


@dataclass
class Program:
    """All that one graph does on the GPU."""

    kernels: list[Kernel]
    others: list[str]  # operations of torch that the program calls
    allocated: Counter[str] = field(default_factory=Counter)  # tensors of the logits' size, its results among them

    @property
    def launches(self) -> int:
        """Kernels of Triton that are started."""
        return sum(kernel.launches for kernel in self.kernels)


def read(source: str, rows: int, classes: int) -> Program:
    """Read a program for logits of so many rows and classes."""
    wrapper = source[source.index("async_compile.wait") :] if "async_compile.wait" in source else source
    kernels = []
    for name, text in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", source, re.DOTALL):
        own = kernel(name, text, rows * classes, classes)
        own.launches = len(re.findall(rf"\b{name}\.run\(", wrapper))
        kernels.append(own)
    others = re.findall(r"(?:torch\.ops\.(aten\.[\w.]+)|extern_kernels\.(\w+))\(", wrapper)
    allocated: Counter[str] = Counter()
    for sizes, dtype in re.findall(r"empty_strided_cuda\(\(([\d, ]*)\), \([\d, ]*\), torch\.(\w+)\)", wrapper):
        if math.prod(int(size) for size in sizes.split(",") if size.strip()) * LARGE >= rows * classes:
            allocated[dtype] += 1
    return Program(kernels, [a or b for a, b in others], allocated)


def kernel(name: str, text: str, logits: int = 1, classes: int = 1) -> Kernel:
    """Read one kernel."""
    signature = dict(re.findall(r"'(\w+)': '([^']+)'", re.findall(r"'signature': \{(.*?)\}", text)[0]))
    *helpers, body = text.split("@triton.jit")[1:]
    ranges = _ranges(body)
    loads, stores, loop, starts = [], [], 0, 0
    for line in body.splitlines():
        indent = len(line) - len(line.lstrip())
        if "tl.range(" in line:
            starts += 1
            loop = starts
        elif indent <= 4 and line.strip():
            loop = 0
        for kind, argument, where in re.findall(r"tl\.(load|store)\((\w+) \+ \((.*?)\), ", line):
            reached = math.prod(ranges.get(variable, 1) for variable in set(re.findall(r"[a-z]\w*", where)))
            if reached * LARGE < logits:
                continue
            access = Access(argument, BYTES[signature[argument].lstrip("*")], loop)
            (loads if kind == "load" else stores).append(access)
    touched = Counter(access.argument for access in loads + stores)
    again = {load.argument: load.bytes for load in loads if touched[load.argument] > 1}
    head = "".join(f"{helper.split('@triton_heuristics')[0]}@triton.jit" for helper in helpers)
    return Kernel(name, head + body, signature, starts, loads, stores, classes * sum(again.values()))


def _ranges(body: str) -> dict[str, int]:
    """How many values each index variable takes."""
    sizes = {f"{axis}index": int(size) for axis, size in re.findall(r"^    (\w+?)numel = (\d+)$", body, re.MULTILINE)}
    found = {}
    for variable, base, rest in re.findall(r"^ *(\w+) = \(?(\w+index)\b(.*)$", body, re.MULTILINE):
        size = sizes.get(base, 1)
        for operator, number in re.findall(r"(//|%) *\(?(\d+)", rest):
            size = math.ceil(size / int(number)) if operator == "//" else min(size, int(number))
        found[variable] = size
    return found
