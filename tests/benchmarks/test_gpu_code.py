"""Counts of GPU code: how they are read, and that they stay within the limits that the documentation gives."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.speed import __main__ as command
from benchmarks.speed.gpu_code import program
from benchmarks.speed.gpu_code.build import missing

RESULTS = Path(__file__).parents[2] / "benchmarks/results/speed/gpu-code/records.json"
TWO_LEVELS = [
    "label smoothing",
    "label smoothing, class weights",
    "label smoothing, sample weights",
    "label smoothing, (N, K, d1)",
    "Beta smoothing, confidence given",
    "Beta smoothing, batch",
    "Beta smoothing, history",
    "Beta smoothing, random",
    "Beta smoothing, none",
]
TEACHER = [
    "self-distillation",
    "self-distillation, class weights",
    "self-distillation, (N, K, d1)",
    "Dirichlet MAP, none",
]
MOVED = {**dict.fromkeys(TWO_LEVELS, 3.0), **dict.fromkeys(TEACHER, 5.0)}  # N K numbers, forward and backward
KERNELS = {"label smoothing": 5, "Beta smoothing, batch": 12, "Beta smoothing, history": 48, "self-distillation": 6}
ALLOCATES = ["spread by", "nn.CrossEntropyLoss", "F.kl_div"]  # something of the logits' size beside the gradient

PROGRAM = """
async_compile.triton('two_loops', '''
    triton_meta={'signature': {'in_ptr0': '*bf16', 'out_ptr0': '*fp32', 'xnumel': 'i32', 'XBLOCK': 'constexpr'}}
@triton.jit
def two_loops(in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    xnumel = 8
    r0_numel = 1000
    x0 = xindex
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        r0_1 = r0_index
        tmp0 = tl.load(in_ptr0 + (r0_1 + 1000*x0), r0_mask)
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        r0_1 = r0_index
        tmp1 = tl.load(in_ptr0 + (r0_1 + 1000*x0), r0_mask)
    tl.store(out_ptr0 + (x0), tmp2, None)
''', device_str='cuda')
async_compile.wait(globals())
    buf0 = empty_strided_cuda((8, ), (1, ), torch.float32)
    buf1 = empty_strided_cuda((8, 1000), (1000, 1), torch.float32)
    two_loops.run(arg0_1, buf0, 8, 1000, stream=raw_stream0)
    buf2 = torch.ops.aten.sort.stable(buf0)
"""


def test_what_a_program_says_of_itself():
    read = program.read(PROGRAM, rows=8, classes=1000)
    [kernel] = read.kernels
    assert (kernel.loops, len(kernel.loads), len(kernel.stores), kernel.launches) == (2, 2, 0, 1)
    assert kernel.bytes_per_element() == 2  # the second loop finds 2 KB of a row in the cache
    kernel.row_bytes = program.CACHE
    assert kernel.bytes_per_element() == 4
    assert dict(read.allocated) == {"float32": 1}
    assert read.others == ["aten.sort.stable"]


@pytest.mark.skipif(missing() is None, reason="this is the build that counts")
def test_another_build_of_torch_is_told_what_to_install():
    with pytest.raises(SystemExit, match=r"pip install torch==2\.14\.1"):
        command.main(["gpu-code"])


def check(heading, name, count):
    assert count["moved"] <= MOVED[name] + 1e-9, (heading, name)
    assert count["forward"] + count["backward"] <= KERNELS.get(name, 13), (heading, name)
    assert count["waits"] == count["spilled"] == 0, (heading, name)
    assert not count["allocated"], (heading, name)


def test_committed_counts_are_within_the_limits():
    results = json.loads(RESULTS.read_text())["results"]
    for classes in (32000, 128256):
        heading = f"K = {classes}, bfloat16"
        for name in MOVED:
            check(heading, name, results[heading][name])
        for name, count in results[heading].items():
            assert not (count["allocated"] and not any(part in name for part in ALLOCATES)), (heading, name)
            assert count["waits"] == count["spilled"] == 0, (heading, name)


@pytest.mark.gpu_code
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="kernels that are interpreted are not assembled")
@pytest.mark.parametrize("name", [*KERNELS, "self-distillation, (N, K, d1)"])
@pytest.mark.parametrize("classes", [32000, 128256])
def test_counts_are_within_the_limits(name, classes):
    from dataclasses import asdict

    from benchmarks.speed.gpu_code.build import describe_a_gpu
    from benchmarks.speed.gpu_code.calls import record
    from benchmarks.speed.gpu_code.count import count

    describe_a_gpu()
    call = record(name, classes, torch.bfloat16)
    check(str(classes), name, asdict(count(call, classes, torch.bfloat16)))
