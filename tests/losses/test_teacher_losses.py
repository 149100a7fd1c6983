"""What the equations of the teacher losses, Eq. 7 and App. 9.1 promise beyond the common contract."""

from __future__ import annotations

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import lambertw

import softlabels
from softlabels.functional import (
    confidence_penalty_loss,
    dirichlet_map_loss,
    dirichlet_map_targets,
    distillation_targets,
    label_smoothing_map_loss,
    pruned_distillation_loss,
    self_distillation_loss,
)


def batch(rows=6, num_classes=5, dtype=torch.float64):
    return (
        torch.randn(rows, num_classes, dtype=dtype, requires_grad=True),
        torch.randint(num_classes, (rows,)),
        2 * torch.randn(rows, num_classes, dtype=dtype),
    )


@pytest.mark.parametrize("beta", [0.05, 2 / 3, 4.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_unweighted_map_is_eq_3(beta, temperature):
    logits, target, teacher_logits = batch()
    ours = dirichlet_map_loss(
        logits, target, teacher_logits, beta=beta, temperature=temperature, sample_weighting="none"
    )
    eq3 = self_distillation_loss(logits, target, teacher_logits, alpha=1 / (1 + beta), temperature=temperature)
    torch.testing.assert_close(ours, (1 + beta) * eq3, rtol=1e-12, atol=1e-12)


def test_default_beta_is_the_default_alpha():
    logits, target, teacher_logits = batch()
    ours = dirichlet_map_loss(logits, target, teacher_logits, sample_weighting="none")
    torch.testing.assert_close(ours, 5 / 3 * self_distillation_loss(logits, target, teacher_logits))


@pytest.mark.parametrize(
    ("sample_weighting", "factor"), [("none", 1), ("normalized", 1), ("exact", 5)]
)  # 5 = K: S -> K
def test_infinite_temperature_is_eq_7(sample_weighting, factor):
    logits, target, teacher_logits = batch()
    ours = dirichlet_map_loss(
        logits, target, teacher_logits, beta=0.3, temperature=1e12, sample_weighting=sample_weighting
    )
    torch.testing.assert_close(ours, label_smoothing_map_loss(logits, target, beta=0.3 * factor))


@pytest.mark.parametrize("shift", [-50.0, 3.0])
def test_which_invariance_each_weighting_has(shift):
    """none, normalized: the teacher's predictions alone count. exact: a constant scales that row's prior."""
    logits, target, teacher_logits = batch()
    shifted = teacher_logits.clone()
    shifted[2] += shift
    for sample_weighting in ("none", "normalized"):
        before, after = (
            dirichlet_map_loss(logits, target, f, sample_weighting=sample_weighting, reduction="none")
            for f in (teacher_logits, shifted)
        )
        torch.testing.assert_close(after, before)
    before, after = (
        dirichlet_map_targets(target, f, sample_weighting="exact", beta=0.5)[1] - 1 for f in (teacher_logits, shifted)
    )
    torch.testing.assert_close(after[2] / before[2], torch.tensor(shift / 4.0, dtype=torch.float64).exp())
    torch.testing.assert_close(after[:2], before[:2])


def test_normalized_weights_have_mean_one_over_the_kept_rows():
    logits, target, teacher_logits = batch(rows=8)
    zeros = torch.zeros_like(logits)
    target[3] = -100
    # against uniform predictions every row costs log K * (1 + beta s_i)
    losses = dirichlet_map_loss(zeros, target, teacher_logits, beta=1.0, temperature=1.0, reduction="none")
    weights = losses[target >= 0] / math.log(5) - 1
    assert weights.std() > 0.1
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0, dtype=torch.float64))


def test_normalized_is_exact_over_its_mean_for_centred_logits():
    _, target, teacher_logits = batch()
    teacher_logits = teacher_logits - teacher_logits.mean(1, keepdim=True)
    exact, normalized = (
        dirichlet_map_targets(target, teacher_logits, beta=1.0, sample_weighting=w)[1] - 1
        for w in ("exact", "normalized")
    )
    torch.testing.assert_close(normalized, exact / exact.mean())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.95])
def test_small_gamma_prunes_and_is_bounded_below(gamma):
    logits, target, teacher_logits = batch()
    for value in (1.0, 1e3, 1e6):  # drive a pruned class towards probability 0: Eq. 8 unclamped goes to -inf
        pushed = logits.detach().clone()
        pushed[:, 4] -= value
        for weighting in ("none", "normalized", "exact"):
            loss = dirichlet_map_loss(pushed, target, teacher_logits, gamma=gamma, sample_weighting=weighting)
            assert loss >= 0
    soft, _ = dirichlet_map_targets(target, teacher_logits, gamma=gamma, sample_weighting="none")
    prior = 2 / 3 * (teacher_logits / 4).softmax(1) + gamma - 1
    one_hot = F.one_hot(target, 5).bool()
    assert torch.equal(soft == 0, (prior <= 0) & ~one_hot)


def test_large_gamma_adds_uniform_mass():
    logits, target, teacher_logits = batch()
    for weighting in ("none", "normalized", "exact"):
        base, more = (
            dirichlet_map_loss(logits, target, teacher_logits, gamma=g, sample_weighting=weighting) for g in (1.0, 1.5)
        )
        uniform = label_smoothing_map_loss(logits, target, beta=0.5 * 5) - label_smoothing_map_loss(
            logits, target, beta=0.0
        )
        torch.testing.assert_close(more, base + uniform)


@pytest.mark.parametrize(("scale", "dtype"), [(1e4, torch.float32), (60.0, torch.float16)])
def test_extreme_teacher_logits(scale, dtype):
    logits = torch.randn(6, 5).to(dtype).requires_grad_()
    target = torch.randint(5, (6,))
    teacher_logits = (scale * torch.randn(6, 5).sign()).to(dtype)
    for weighting in ("none", "normalized"):
        loss = dirichlet_map_loss(logits, target, teacher_logits, sample_weighting=weighting)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert grad.isfinite().all()
    if scale == 60.0:
        loss = dirichlet_map_loss(logits, target, teacher_logits, sample_weighting="exact")
        assert loss.isfinite()
    else:
        with pytest.raises(ValueError, match=r"exp\(250[01].* sample_weighting='normalized', a higher temperature"):
            dirichlet_map_loss(logits, target, teacher_logits, sample_weighting="exact")
        target[:] = -100  # rows that do not count cannot overflow
        assert dirichlet_map_loss(logits, target, teacher_logits, sample_weighting="exact") == 0


def test_exact_is_finite_where_nothing_can_be_looked_at():
    """Under vmap, as on an accelerator, the strength is cut off instead."""
    logits, target = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    teacher_logits = torch.full((2, 3, 5), 1e4)
    losses = torch.func.vmap(lambda *a: dirichlet_map_loss(*a, sample_weighting="exact"))(
        logits, target, teacher_logits
    )
    assert losses.isfinite().all()


def test_counts():
    """Several labels per sample, and none at all."""
    logits, _, teacher_logits = batch(rows=3)
    counts = torch.tensor([[2, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    got = dirichlet_map_loss(
        logits, counts, teacher_logits, beta=0.5, temperature=2.0, sample_weighting="exact", reduction="none"
    )
    wanted = [
        reference.dirichlet_map(x, c, [1.0] * 5, f, sum(math.exp(v / 2) for v in f), 0.5, 2.0, 1.0)
        for x, c, f in zip(logits.tolist(), counts.tolist(), teacher_logits.tolist(), strict=True)
    ]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))
    criterion = softlabels.InstanceDirichletMAPLoss().eval()
    for c in (counts, counts.double()):
        evaluated = criterion(logits, c)
        torch.testing.assert_close(evaluated, F.cross_entropy(logits, counts.double()))


def test_map_targets_are_the_minimiser():
    """The closed form of sec. 5: weight times cross-entropy against z-hat is the loss, and z-hat minimises it."""
    logits, target, teacher_logits = batch()
    for gamma in (0.9, 1.0, 1.3):
        soft, weight = dirichlet_map_targets(target, teacher_logits, gamma=gamma)
        torch.testing.assert_close(soft.sum(1), torch.ones(6, dtype=torch.float64))
        losses = dirichlet_map_loss(logits, target, teacher_logits, gamma=gamma, reduction="none")
        torch.testing.assert_close(weight * F.cross_entropy(logits, soft, reduction="none"), losses)
        best = soft.log().clamp(min=-700).requires_grad_()
        (grad,) = torch.autograd.grad(dirichlet_map_loss(best, target, teacher_logits, gamma=gamma), best)
        assert grad.abs().max() < 1e-12
    single, weight = dirichlet_map_targets(target[0], teacher_logits[0], sample_weighting="none")
    assert single.shape == (5,)
    assert weight.shape == ()
    empty, weight = dirichlet_map_targets(torch.zeros(1, 5), teacher_logits[:1], beta=0.0)
    assert empty.eq(0).all()
    assert weight.eq(0).all()


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_label_smoothing_map_is_scaled_label_smoothing(beta):
    for shape, rows in (((6, 5), (6,)), ((5,), ()), ((2, 5, 3), (2, 3))):
        logits, target = torch.randn(shape, dtype=torch.float64), torch.randint(5, rows)
        for options in ({}, {"weight": torch.rand(5, dtype=torch.float64)}, {"ignore_index": 1}):
            if rows == () and options:
                continue
            torchs = F.cross_entropy(logits, target, label_smoothing=beta / (1 + beta), **options)
            ours = label_smoothing_map_loss(logits, target, beta=beta, **options)
            torch.testing.assert_close(ours, (1 + beta) * torchs)


def test_true_class_mass_is_not_the_papers_epsilon():
    """icefall #107: e/K on every class (torch, here) against e/(K-1) on the others (the paper's text)."""
    e, k = 0.2, 5
    on = softlabels.tuning.true_class_for(e, k)
    assert on == pytest.approx(1 - e + e / k)
    assert softlabels.tuning.label_smoothing_for(1 - e, k) == pytest.approx(e * k / (k - 1))


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 3.0])
def test_confidence_penalty_reaches_its_lambert_optimum(num_classes, beta):
    logits = torch.zeros(1, num_classes, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1 % num_classes])
    optimizer = torch.optim.LBFGS(
        [logits], lr=0.5, max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = confidence_penalty_loss(logits, target, beta=beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    w = lambertw((num_classes - 1) * math.exp(-1 / beta) / beta).real
    wanted = 1 / (beta * w + 1)
    assert logits.softmax(1)[0, target[0]].item() == pytest.approx(wanted, abs=1e-5)


def test_scaled_student_has_the_gradient_of_the_usual_recipe():
    """alpha CE + (1 - alpha) T^2 KL with batchmean; not the mean over N * K elements (DeiT #61)."""
    logits, target, teacher_logits = batch()
    t, alpha = 4.0, 0.3
    kl = F.kl_div((logits / t).log_softmax(1), (teacher_logits / t).softmax(1), reduction="batchmean")
    usual = alpha * F.cross_entropy(logits, target) + (1 - alpha) * t**2 * kl
    ours = self_distillation_loss(logits, target, teacher_logits, alpha=alpha, temperature=t, scale_student=True)
    (wanted,) = torch.autograd.grad(usual, logits)
    (got,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(got, wanted)


@given(
    num_classes=st.integers(1, 12),
    prune=st.floats(0, 0.999),
    values=st.lists(st.integers(-3, 3), min_size=36, max_size=36),
)
def test_pruning_keeps_exactly_the_surest(num_classes, prune, values):
    """K - floor(prune K) classes, renormalised; of equal logits the lower index stays."""
    teacher_logits = torch.tensor(values, dtype=torch.float64).view(3, 12)[:, :num_classes]
    target = torch.zeros(3, dtype=torch.long)
    soft = distillation_targets(target, teacher_logits, alpha=0.0, temperature=2.0, prune=prune)
    keep = num_classes - math.floor(prune * num_classes)
    assert (soft > 0).sum(1).eq(keep).all()
    wanted = [reference.pruned_softmax(row, 2.0, prune) for row in teacher_logits.tolist()]
    torch.testing.assert_close(soft, torch.tensor(wanted, dtype=torch.float64))


def test_pruning_counts_in_decimal():
    """0.29 * 100 is 28.999999999999996 in binary, and 29 to a reader."""
    soft = distillation_targets(torch.tensor([0]), torch.randn(1, 100), alpha=0.0, prune=0.29)
    assert (soft > 0).sum() == 71
    with pytest.raises(ValueError, match=r"prune must be in \[0, 1\), got 1"):
        softlabels.PrunedDistillationLoss(prune=1.0)


def test_the_label_may_be_pruned():
    teacher_logits = torch.tensor([[3.0, 2.0, -9.0, -9.0]])
    loss = pruned_distillation_loss(torch.zeros(1, 4), torch.tensor([3]), teacher_logits, alpha=0.5)
    assert loss.item() == pytest.approx(math.log(4))
    soft = distillation_targets(torch.tensor([3]), teacher_logits, alpha=0.5, prune=0.5)
    assert soft[0, 3] == 0.5


def test_distillation_targets_are_those_of_the_loss():
    for shape, rows in (((6, 4), (6,)), ((2, 4, 3), (2, 3)), ((4,), ())):
        logits, teacher_logits = torch.randn(shape), torch.randn(shape)
        target = torch.randint(4, rows)
        soft = distillation_targets(target, teacher_logits, alpha=0.3, temperature=2.0)
        loss = self_distillation_loss(logits, target, teacher_logits, alpha=0.3, temperature=2.0)
        torch.testing.assert_close(loss, F.cross_entropy(logits, soft))
    with pytest.raises(IndexError, match="got 4"):
        distillation_targets(torch.tensor([4]), torch.randn(1, 4))
    with pytest.raises(ValueError, match="target must have batch size"):
        distillation_targets(torch.tensor([1, 2]), torch.randn(1, 4))


@pytest.mark.parametrize("cls", ["SelfDistillationLoss", "PrunedDistillationLoss", "InstanceDirichletMAPLoss"])
def test_evaluation_without_a_teacher_is_cross_entropy(cls):
    criterion = getattr(softlabels, cls)()
    logits, target, teacher_logits = batch()
    wanted = F.cross_entropy(logits, target)
    with torch.no_grad():
        torch.testing.assert_close(criterion(logits, target), wanted)
    torch.testing.assert_close(criterion.eval()(logits, target), wanted)
    options = {"prune": 0.25} if cls == "PrunedDistillationLoss" else {}
    asked = getattr(softlabels, cls)(**options).eval()(logits, target, teacher_logits=teacher_logits)
    functional = {
        "SelfDistillationLoss": self_distillation_loss,
        "PrunedDistillationLoss": pruned_distillation_loss,
        "InstanceDirichletMAPLoss": dirichlet_map_loss,
    }[cls]
    torch.testing.assert_close(asked, functional(logits, target, teacher_logits, **options))
    with pytest.raises(RuntimeError, match=rf"{cls} needs a teacher in training: add criterion\.attach\(model\)"):
        criterion.train()(logits, target)


def test_an_excluded_class_is_left_out_of_the_centre():
    """normalized: -inf in the teacher is no part of the row's mean, also for the targets and the reference."""
    logits, target, teacher_logits = batch()
    teacher_logits[1, 3] = teacher_logits[2, 0] = -torch.inf
    s = reference.strengths(teacher_logits.tolist(), [True] * 6, 4.0, "normalized")
    wanted = [
        reference.dirichlet_map(x, y, [1.0] * 5, f, s_i, 0.5, 4.0, 1.0)
        for x, y, f, s_i in zip(logits.tolist(), target.tolist(), teacher_logits.tolist(), s, strict=True)
    ]
    got = dirichlet_map_loss(logits, target, teacher_logits, beta=0.5, reduction="none")
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))


def test_exact_reaches_further_in_float64():
    logits, target, teacher_logits = batch()
    large = teacher_logits + 400.0
    loss = dirichlet_map_loss(logits, target, large, sample_weighting="exact", temperature=1.0)
    assert loss.isfinite()
    with pytest.raises(ValueError, match="float32"):
        dirichlet_map_loss(logits.float(), target, large.float(), sample_weighting="exact", temperature=1.0)


@pytest.mark.parametrize("sample_weighting", ["none", "normalized", "exact"])
def test_no_prior_is_cross_entropy_whatever_the_teacher(sample_weighting):
    logits, target, teacher_logits = batch()
    teacher_logits[0] = -torch.inf
    teacher_logits[1] = torch.nan
    teacher_logits[2] = 1e9
    loss = dirichlet_map_loss(logits, target, teacher_logits, beta=0.0, sample_weighting=sample_weighting)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))


def test_gamma_alone_needs_a_teacher():
    with pytest.raises(RuntimeError, match="needs a teacher"):
        softlabels.InstanceDirichletMAPLoss(beta=0.0, gamma=1.5)(torch.randn(2, 3), torch.tensor([0, 1]))
    logits, target = torch.randn(2, 3), torch.tensor([0, 1])
    loss = softlabels.InstanceDirichletMAPLoss(beta=0.0)(logits, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
