"""What only an accelerator can show: no synchronisation, compiled kernels as accurate as torch's, memory."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from torch import nn

import softlabels
from softlabels import functional

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of torch.cuda")


@pytest.fixture(autouse=True)
def _device():
    with torch.device("cuda"):
        yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_training_step_never_waits(backend):
    """After a first round, in which kernels compile and the optimizer makes its state."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    criteria = [
        softlabels.BetaSmoothingLoss().attach(model),
        softlabels.SelfDistillationLoss().attach(model),
        softlabels.LabelSmoothingMAPLoss(beta=0.1),
    ]
    batches = [(torch.randn(64, 16), torch.randint(10, (64,))) for _ in range(4)]
    with softlabels.backend(backend):
        for index, (x, y) in enumerate(batches):
            torch.cuda.set_sync_debug_mode("error" if index > 1 else "default")
            logits = model(x)
            loss = sum(criterion(logits, y) for criterion in criteria)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "confidence_penalty"], ids=repr)
@pytest.mark.parametrize("backend", ["eager", "compile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_equals_the_cpu_in_float64(case, backend, dtype, reduction):
    with torch.device("cpu"):
        logits = (3 * torch.randn(40, 507)).to(dtype)
        target = torch.randint(507, (40,))
        target[::7] = -100
        options = {"weight": torch.rand(507), "sample_weight": torch.rand(40), "reduction": reduction}
        extras = case.extras(logits)
        truth_logits = logits.double().requires_grad_()
        truth = case.call(truth_logits, target, **extras, **options)
        truth.sum().backward()
    if case.argument == "confidence":
        pytest.skip("another device draws other random numbers")
    own = logits.cuda().requires_grad_()
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in {**extras, **options}.items()}
    with softlabels.backend(backend):
        got = case.functional(own, target.cuda(), **case.on, **moved)
        got.sum().backward()
    torch.testing.assert_close(got.cpu().double(), truth, rtol=1e-5, atol=1e-5)
    rounding = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close(own.grad.cpu().double(), truth_logits.grad, **rounding)


def test_peak_memory_is_little_more_than_the_gradient():
    logits = torch.randn(2048, 32000, dtype=torch.bfloat16).requires_grad_()
    target, teacher_logits = torch.randint(32000, (2048,)), torch.randn(2048, 32000, dtype=torch.bfloat16)
    for loss in (
        lambda: functional.beta_smoothing_loss(logits, target, torch.rand(2048)),
        lambda: functional.self_distillation_loss(logits, target, teacher_logits),
    ):
        for _ in range(2):
            logits.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss().backward()
        assert torch.cuda.max_memory_allocated() - before <= 1.1 * logits.nbytes
