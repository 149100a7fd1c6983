"""What the graphs of an accelerator compute, run here in plain PyTorch on a CPU: blocks, draws, thresholds."""

from __future__ import annotations

import pytest
import reference
import torch

from softlabels.kernels import Label, Prediction, SoftLabel, blocks, compiled, formula
from softlabels.kernels.ordering import counted_amounts, kth_largest, last_kept, prune
from softlabels.kernels.statistics import statistics

WIDTHS = [7, 1024, 2048, 2051]  # one block; as much as one holds; two; a prime number, so that a shorter one is left
LAYOUTS = ["rows", "dense", "channels last"]


def laid_out(rows, layout):
    """Rows (4, K) as (2, K, 2), contiguous or with neighbouring classes."""
    if layout == "rows":
        return rows
    dense = rows.view(2, 2, -1).transpose(1, 2)
    return dense.contiguous() if layout == "dense" else dense


def logits(classes):
    x = 3 * torch.randn(4, classes, dtype=torch.float64)
    x[0, : classes // 2] = -torch.inf  # whole blocks of impossible classes
    x[1, 3] = 300.0
    x[2] -= 1000.0
    return x


@pytest.mark.parametrize("classes", WIDTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_blocks_are_those_of_rows(classes, layout):
    x = logits(classes)
    largest, others, count, below = (known.flatten() for known in blocks.statistics(laid_out(x, layout)))
    expected = statistics(x)
    torch.testing.assert_close(largest, expected.largest)
    torch.testing.assert_close(others, expected.others)
    possible = x != -torch.inf
    assert count.tolist() == possible.sum(1).tolist()
    torch.testing.assert_close(below, torch.where(possible, largest.unsqueeze(1) - x, 0.0).sum(1))


@pytest.mark.parametrize("classes", WIDTHS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [0.0, -1e-4, 0.1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_by_blocks_are_those_of_the_formula(classes, weighted, shift, layout):
    x, f = logits(classes), logits(classes).flip(0)
    f[3, : classes // 2] = -torch.inf
    x, f = laid_out(x, layout), laid_out(f, layout)
    amount, index = torch.tensor([0.3, 0.5, 0.0, 1.0], dtype=torch.float64), torch.tensor([classes - 1, 3, 1, 0])
    row_shape = x.shape[:1] + x.shape[2:]
    weights = torch.rand(classes, dtype=torch.float64) if weighted else None
    teacher = Prediction(amount.view(row_shape), f, 4.0, shift=shift, class_weight=weights)
    label = SoftLabel([teacher, Label(0.25, index.view(row_shape))], torch.ones(row_shape, dtype=torch.float64))
    expected = formula.cross_entropy(label, x, reduce=False)
    assert torch.isinf(expected.flatten()[0])  # the teacher deems possible what the student does not
    rows, *known = compiled._values_in_blocks(label, x)
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(compiled._values(label, x)[0], expected)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(formula.cross_entropy(label, x, reduce=True), x)
    torch.testing.assert_close(compiled._gradient(label, x.detach(), torch.ones(()), *known), gradient)


@pytest.mark.parametrize("kept", [None, [True, False, True, True, True, False]])
def test_amounts_without_a_sort(kept):
    """Up to which exponential goes to which row, those of the reference."""
    score = torch.tensor([0.5, 0.1, 0.5, -torch.inf, torch.inf, torch.nan])
    mask = torch.tensor([True] * 6 if kept is None else kept)
    exponentials = -torch.log1p(-torch.rand(7, dtype=torch.float64))
    amounts = counted_amounts(0.6, 0.5, score, None if kept is None else mask, exponentials, torch.float64)
    rows = sorted(mask.nonzero().flatten().tolist(), key=lambda row: -torch.inf if row == 5 else score[row].item())
    if mask[5]:  # a nan is as unsure as -inf, and ties go by position
        rows = [3, 5, *[row for row in rows if row not in (3, 5)]]
    in_order = torch.stack([*exponentials[rows], exponentials[-1]])
    uniforms = reference.order_statistics((-torch.expm1(-in_order)).tolist(), len(rows))
    for row, uniform in zip(rows, uniforms, strict=True):
        assert amounts[row].item() == pytest.approx(0.6 * (1 - uniform**0.5), rel=1e-9)
    assert counted_amounts(0.6, 0.5, torch.full((3,), torch.nan), None, exponentials[:4], torch.float32).isnan().all()


def test_a_threshold_keeps_what_prune_keeps():
    x = torch.randint(4, (64, 9)).float()  # ties, many of them at the threshold
    x[0, 2] = torch.nan
    x[1, :8] = -torch.inf
    for keep in (1, 4, 8):
        threshold = kth_largest(x, keep)
        term = Prediction(1.0, x, threshold=threshold, last=last_kept(x, threshold, keep))
        torch.testing.assert_close(term.scaled_logits(x.dtype), prune(x, keep), equal_nan=True)
