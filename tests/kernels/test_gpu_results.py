"""The code that Inductor writes for a GPU gives the right numbers: run by Triton's interpreter, without a GPU."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from implementations import implementation

import softlabels
from benchmarks.speed.gpu_code.build import missing
from softlabels import functional

REASON = missing() or ("" if os.environ.get("TRITON_INTERPRET") == "1" else "TRITON_INTERPRET=1 is not set")
pytestmark = [
    pytest.mark.gpu_code,
    pytest.mark.skipif(bool(REASON), reason=REASON),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, of infinite losses
]

LOSSES = {
    "label smoothing": lambda x, y, f, **o: functional.label_smoothing_map_loss(x, y, beta=0.2, **o),
    "self-distillation": lambda x, y, f, **o: functional.self_distillation_loss(x, y, f, **o),
    "self-distillation, student over T": lambda x, y, f, **o: functional.self_distillation_loss(
        x, y, f, scale_student=True, **o
    ),
    "pruned": lambda x, y, f, **o: functional.pruned_distillation_loss(x, y, f.round(), prune=0.4, **o),
    "Dirichlet MAP": lambda x, y, f, **o: functional.dirichlet_map_loss(x, y, f, gamma=0.9, **o),
    "Dirichlet MAP, exact": lambda x, y, f, **o: functional.dirichlet_map_loss(x, y, f, sample_weighting="exact", **o),
}
SHAPES = {"one block": (5, 61), "several": (5, 1031), "dense": (2, 7, 3), "dense, several blocks": (2, 131, 3)}


def data(shape):
    """Impossible classes, a row without any other than its label, ignored rows that hold junk."""
    torch.manual_seed(0)
    x, f = 3 * torch.randn(shape), 3 * torch.randn(shape)
    y = torch.randint(shape[1], (shape[0], *shape[2:]))
    y.view(-1)[1] = -100
    x.movedim(1, -1)[y == -100] = torch.nan
    x[0, 2:5], f[0, 2:6] = -torch.inf, -torch.inf
    return x, y, f


def value_and_gradient(loss, logits):
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits)
    value.sum().backward()
    return value.detach(), logits.grad


def check(loss, logits):
    """Within 1e-5 of float64, or no further from it than torch's own operations in the same dtype."""
    from benchmarks.speed.gpu_code.interpreter import as_on_a_gpu

    with implementation("formula"):
        truth, plain = value_and_gradient(loss, logits.double()), value_and_gradient(loss, logits)
    with as_on_a_gpu():
        got = value_and_gradient(loss, logits)
    for own, true, rough in zip(got, truth, plain, strict=True):
        same = own.double() == true  # infinities among them
        error, allowed = (own.double() - true).abs(), (rough.double() - true).abs()
        allowed = torch.maximum(allowed, 1e-5 * torch.where(true.isfinite(), true, 0.0).abs().amax())
        if own.dtype == torch.bfloat16:  # which the interpreter cuts off where a GPU rounds
            allowed = allowed + torch.finfo(own.dtype).eps * true.abs()
        assert (same | (error <= allowed)).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, shape):
    x, y, f = data(shape)
    check(lambda logits: LOSSES[name](logits, y, f.to(logits.dtype)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["label smoothing", "self-distillation"])
def test_dtypes_and_weights(name, dtype):
    x, y, f = data((5, 1031))
    weight, sample_weight = torch.rand(1031), torch.rand(5)
    options = {"weight": weight, "sample_weight": sample_weight, "reduction": "none"}
    f = f.to(dtype)
    check(lambda logits: LOSSES[name](logits, y, f, **options), x.to(dtype))


@pytest.mark.parametrize("name", ["label smoothing", "self-distillation"])
def test_probabilities(name):
    x, _, f = data((5, 61))
    x[1], x[0, 2:5] = 0.0, 1.0
    target = torch.rand(5, 61).softmax(1)
    check(lambda logits: LOSSES[name](logits, target, f), x)


@pytest.mark.parametrize("spread", ["classes", "neighbours", ("classes", "neighbours")], ids=str)
def test_learned_spreads(spread):
    x, y, _ = data((5, 61))
    torch.manual_seed(2)
    criterion = softlabels.BetaSmoothingLoss(ranking="none", spread=spread)
    criterion(torch.randn(40, 61), torch.randint(61, (40,)))  # what is known of the classes
    y[2] = y[3]
    check(lambda logits: copy.deepcopy(criterion)(logits, y), x)


def test_ranked_by_the_batch():
    """The surest row gets the least; and the loss is that of the amounts that the same exponentials give."""
    from benchmarks.speed.gpu_code.interpreter import as_on_a_gpu

    x, y, _ = data((6, 1031))
    criterion = softlabels.BetaSmoothingLoss(ranking="batch", reduction="none")
    torch.manual_seed(1)
    with as_on_a_gpu():
        rows, gradient = value_and_gradient(lambda logits: criterion(logits, y), x)
    torch.manual_seed(1)
    exponentials = torch.empty(7, dtype=torch.float64).exponential_()
    kept = y != -100
    clean = torch.where(kept.unsqueeze(1), x, 0.0).double()
    order = clean.softmax(1).amax(1).masked_fill(~kept, torch.inf).argsort()[: int(kept.sum())]
    counted = torch.cat([exponentials[:-1][order], exponentials[-1:]])
    uniforms = torch.zeros(6, dtype=torch.float64)
    uniforms[order] = (counted.cumsum(0) / exponentials.where(torch.cat([kept, kept.new_ones(1)]), 0.0).sum())[:-1]
    draws = uniforms ** (1.0 / criterion.concentration_for(1031))
    clean.requires_grad_()
    log_p = clean.log_softmax(1)
    possible = (clean != -torch.inf).scatter(1, (y * kept).unsqueeze(1), True)
    even = (1.0 - criterion.alpha) * (1.0 - draws) * 1031 / 1030
    mean = torch.where(possible, log_p, 0.0).sum(1) / possible.sum(1)
    losses = -(1.0 - even) * log_p.gather(1, (y * kept).unsqueeze(1)).squeeze(1) - even * mean
    losses = torch.where(kept, losses, 0.0)
    losses.sum().backward()
    torch.testing.assert_close(rows.double(), losses.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), clean.grad * kept.unsqueeze(1), rtol=1e-5, atol=1e-6)
