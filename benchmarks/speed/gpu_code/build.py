"""The one build of torch whose Inductor is asked for GPU code, and a GPU that is only described, never used."""

from __future__ import annotations

import functools
import importlib.util
import types
from typing import Any
from unittest import mock

import torch

TORCH = "2.14.1"
INSTALL = (
    f"counting GPU code needs a CUDA build of torch {TORCH} (no GPU, no driver): make an environment of its own and "
    f"`pip install torch=={TORCH}` in it, 5.6 GB"
)
PROCESSORS, CACHE = 132, 50 * 2**20  # of an H200: streaming multiprocessors, bytes of the second-level cache
BYTES_PER_SECOND = 4.3e12  # that an H200's memory moves in a copy
H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    total_memory=141 * 2**30,
    multi_processor_count=PROCESSORS,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=CACHE,
    gcnArchName="",
    is_integrated=0,
    is_multi_gpu_board=0,
    uuid="0",
)


def missing() -> str | None:
    """Why GPU code cannot be written here; None where it can."""
    found = torch.__version__.split("+")[0]
    if found != TORCH:
        return f"this is torch {torch.__version__}; {INSTALL}"
    if not torch.version.cuda or importlib.util.find_spec("triton") is None:
        return f"this build of torch has no CUDA; {INSTALL}"
    return None


@functools.cache
def describe_a_gpu() -> None:
    """Answer what Inductor and Triton ask of the driver while they write code, for the rest of the process."""
    import torch._dynamo.device_interface as device_interface
    import triton

    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_initialized": True,
        "synchronize": None,
        "_lazy_init": None,
        "get_device_properties": H200,
        "get_device_capability": (9, 0),
        "get_device_name": H200.name,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "is_current_stream_capturing": False,
        "current_stream": None,
        "current_blas_handle": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        mock.patch(f"torch.cuda.{name}", _always(answer), create=True).start()
    mock.patch("torch._C._cuda_getDevice", create=True, return_value=0).start()
    cuda: Any = device_interface.get_interface_for_device("cuda")
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H200,
        "get_compute_capability": 90,
        "synchronize": None,
        "maybe_exchange_device": 0,
        "exchange_device": 0,
    }
    for name, answer in answers.items():
        setattr(cuda, name, staticmethod(_always(answer)))
    cuda.Worker.get_device_properties = staticmethod(_always(H200))
    cuda.Worker.current_device = staticmethod(_always(0))
    cuda.Worker.set_device = staticmethod(_always(None))
    triton.runtime.driver.set_active(_Driver())


def target() -> Any:
    """What Triton compiles for: compute capability 9.0."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", 90, 32)


class _Driver:
    @staticmethod
    def get_current_target() -> Any:
        return target()

    @staticmethod
    def get_active_torch_device() -> torch.device:
        return torch.device("cuda", 0)

    @staticmethod
    def is_active() -> bool:
        return True

    @staticmethod
    def get_current_device() -> int:
        return 0


def _always(answer: Any) -> Any:
    return lambda *args, **kwargs: answer
