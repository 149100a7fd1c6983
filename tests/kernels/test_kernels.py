"""The choice of backend, and what the kernels allocate."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import softlabels
from softlabels import functional, kernels


class LargeTensors(TorchDispatchMode):
    """Names of the operations whose result has the given number of elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.numel and result.dtype != torch.bool:
            self.names.append(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("on", [1.0, 0.9])
def test_two_level_never_builds_the_soft_label(on):
    logits = torch.randn(31, 17)
    target = torch.randint(17, (31,))
    levels = torch.rand(31)
    with LargeTensors(31 * 17) as large:
        kernels.two_level(logits, target, on * levels, (1 - on) * levels)
        functional.beta_smoothing_loss(logits, target, torch.rand(31))
    assert large.names == ["_log_softmax", "_log_softmax"]


def test_backend_can_be_chosen_three_ways():
    assert softlabels.get_backend() == "auto"
    with softlabels.backend("eager"):
        assert softlabels.get_backend() == "eager"
        with pytest.raises(ZeroDivisionError), softlabels.backend("auto"):
            1 / 0  # noqa: B018
        assert softlabels.get_backend() == "eager"
    assert softlabels.get_backend() == "auto"
    with pytest.raises(ValueError, match="name must be one of 'auto', 'eager', got 'cuda'"):
        softlabels.set_backend("cuda")
    code = "import softlabels; print(softlabels.get_backend())"
    for value, wanted in (
        ("eager", "eager"),
        ("fast", "SOFTLABELS_BACKEND must be one of 'auto', 'eager', got 'fast'"),
    ):
        run = subprocess.run(
            [sys.executable, "-c", code], env={"SOFTLABELS_BACKEND": value}, capture_output=True, text=True
        )
        assert wanted in run.stdout + run.stderr


def test_pruning_keeps_the_lower_index_among_equals():
    teacher_logits = torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    q = kernels.teacher_probabilities(teacher_logits, 1.0, 2)
    assert (q > 0).tolist() == [[True, True, False, False], [True, True, False, False]]
