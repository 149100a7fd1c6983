"""What made a number: versions and hardware."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import softlabels


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    return {"softlabels": softlabels.__version__, "torch": torch.__version__, "python": platform.python_version()}


def hardware(device: str) -> str:
    """Name of the accelerator or processor that did the work."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip()
            for line in cpuinfo.read_text("utf-8", "replace").splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    return f"{os.cpu_count()} cores of {model}"
