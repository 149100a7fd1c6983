"""Numbers of one recorded call."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from benchmarks.speed.gpu_code.build import BYTES_PER_SECOND
from benchmarks.speed.gpu_code.calls import ROWS
from benchmarks.speed.gpu_code.recorder import Call, Event
from benchmarks.speed.gpu_code.resources import resources


@dataclass(frozen=True)
class KernelCount:
    """What one Triton kernel does with tensors of the logits' size.

    Args:
        graph: The function of softlabels that it is a part of.
        loops: Over a row; 0 where the row, or a part of it, is held in registers.
        loads: In the text, those of each loop.
        stores: In the text.
        moved: Bytes per logit, those of the cache left out.
        registers: Of one thread.
        spilled: Bytes of one thread.
    """

    graph: str
    loops: int
    loads: int
    stores: int
    moved: int
    registers: int
    spilled: int


@dataclass(frozen=True)
class Count:
    """What one call does on a GPU.

    Args:
        forward: Kernels started, at least.
        backward: The same.
        waits: How often the processor waits for the device.
        moved: To and from memory, in N K numbers of the logits' dtype.
        milliseconds: In which an H200 moves that.
        allocated: Tensors of the logits' size besides the gradient, by dtype.
        operations: Of torch, and how often; the others are Triton kernels.
        kernels: Those of Triton that touch something of the logits' size.
        spilled: Bytes, the most of any kernel.
    """

    forward: int
    backward: int
    waits: int
    moved: float
    milliseconds: float
    allocated: dict[str, int]
    operations: dict[str, int]
    kernels: list[KernelCount] = field(default_factory=list)
    spilled: int = 0


def count(call: Call, classes: int, dtype: torch.dtype, *, assemble: bool = True) -> Count:
    """Add up a recorded call; with ``assemble`` each kernel is compiled, for its registers."""
    events = call.events
    moved = sum(event.bytes for event in events)
    allocated: Counter[str] = Counter()
    for event in events:
        allocated += event.allocated
    gradient = str(dtype).split(".")[1]
    allocated[gradient] -= 1
    kernels = [kernel for event in events for kernel in _kernels(event, assemble)]
    return Count(
        sum(event.kernels for event in call.forward),
        sum(event.kernels for event in call.backward),
        sum(event.waits for event in events),
        moved / dtype.itemsize,
        1e3 * moved * ROWS * classes / BYTES_PER_SECOND,
        {name: number for name, number in allocated.items() if number},
        dict(Counter(event.name for event in events if event.program is None)),
        [kernel for kernel in kernels if kernel.loads or kernel.stores],
        max((kernel.spilled for kernel in kernels), default=0),
    )


def _kernels(event: Event, assemble: bool) -> list[KernelCount]:
    if event.program is None:
        return []
    found = []
    for kernel in event.program.kernels:
        used = resources(kernel) if assemble else None
        found.append(
            KernelCount(
                event.name.strip("_"),
                kernel.loops,
                len(kernel.loads),
                len(kernel.stores),
                kernel.bytes_per_element(),
                used.registers if used else 0,
                used.spilled if used else 0,
            )
        )
    return found
