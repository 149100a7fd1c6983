"""TopKLogits stand for a teacher's logits of which the largest are known."""

from __future__ import annotations

import pytest
import reference
import torch
from implementations import IMPLEMENTATIONS, implementation

import softlabels
from softlabels import LinearLogits, TopKLogits, functional

ROWS, CLASSES = 7, 11
OPTIONS = {"alpha": 0.3, "temperature": 2.0}


def data(dtype=torch.float64, shape=(ROWS,)):
    generator = torch.Generator().manual_seed(0)
    student = 2 * torch.randn(*shape, CLASSES, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(*shape, CLASSES, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, shape, generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), target


def expected(student, target, top, class_weight=None):
    """The loss of each row by loops."""
    weights = [1.0] * CLASSES if class_weight is None else class_weight.tolist()
    normalizers = top.log_normalizer
    normalizers = normalizers if isinstance(normalizers, torch.Tensor) else [normalizers] * len(target)
    losses = []
    for x, y, v, c, z in zip(student, target, top.values, top.indices, normalizers, strict=True):
        keep = [i for i in range(len(v)) if v[i] > -torch.inf]
        v, c = [v[i].item() for i in keep], [c[i].item() for i in keep]
        z = None if z is None else float(z)
        q, rest = reference.top_k_share(v, c, CLASSES, z, OPTIONS["temperature"])
        losses.append(
            reference.top_k_distillation(x.tolist(), y.item(), weights, q, c, rest, top.tail, OPTIONS["alpha"])
        )
    return torch.tensor(losses, dtype=torch.float64)


def tops():
    _, teacher, _ = data()
    some = TopKLogits.of(teacher, 3, temperature=2.0)
    filled = some.values.clone()
    filled[::2, 1:] = -torch.inf
    twice = some.indices.clone()
    twice[:, 2] = twice[:, 0]
    return {
        "uniform": some,
        "bucket": TopKLogits.of(teacher, 3, temperature=2.0, tail="bucket"),
        "renormalised": TopKLogits.of(teacher, 3),
        "one": TopKLogits.of(teacher, 1, temperature=2.0),
        "one in a bucket": TopKLogits.of(teacher, 1, temperature=2.0, tail="bucket"),
        "all": TopKLogits.of(teacher, CLASSES, temperature=2.0),
        "all but one, in a bucket": TopKLogits.of(teacher, CLASSES - 1, temperature=2.0, tail="bucket"),
        "filled up": TopKLogits(filled, some.indices * 0 + some.indices[:, :1], CLASSES, some.log_normalizer, 2.0),
        "filled up, in a bucket": TopKLogits(filled, some.indices, CLASSES, some.log_normalizer, 2.0, "bucket"),
        "named twice": TopKLogits(some.values - 2.0, twice, CLASSES, some.log_normalizer, 2.0),
        "named twice, in a bucket": TopKLogits(some.values - 2.0, twice, CLASSES, some.log_normalizer, 2.0, "bucket"),
        "sampled": TopKLogits(torch.zeros(ROWS, 9), torch.randint(CLASSES, (ROWS, 9)), CLASSES),
    }


TOPS = tops()
TOPS["filled up"].indices = torch.where(
    TOPS["filled up"].values > -torch.inf, TOPS["uniform"].indices, TOPS["uniform"].indices[:, :1]
)


@pytest.mark.parametrize("name", TOPS)
@pytest.mark.parametrize("form", [*IMPLEMENTATIONS, "linear"])
def test_values_and_gradients(name, form):
    student, _, target = data()
    top = TOPS[name]
    with implementation("closed" if form == "linear" else form):
        input = LinearLogits(student, torch.eye(CLASSES, dtype=torch.float64), block=3) if form == "linear" else student
        rows = functional.self_distillation_loss(input, target, top, reduction="none", **OPTIONS)
        torch.testing.assert_close(rows.detach(), expected(student, target, top))
        mean = functional.self_distillation_loss(input, target, top, **OPTIONS)
        torch.testing.assert_close(mean, rows.mean())
        plain = softlabels.functional.self_distillation_loss(student, target, top, reduction="none", **OPTIONS)
        (by_rows,) = torch.autograd.grad(rows.mean(), student)
        torch.testing.assert_close(torch.autograd.grad(mean, student)[0], by_rows)
    step = 1e-6
    for row, c in ((0, 0), (3, 5), (6, top.indices[6, 0].item())):
        moved = [student.detach().clone(), student.detach().clone()]
        moved[0][row, c] += step
        moved[1][row, c] -= step
        up, down = (expected(x, target, top).mean() for x in moved)
        assert by_rows[row, c].item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-5, abs=1e-8)
    assert plain.shape == (ROWS,)


@pytest.mark.parametrize("name", ["uniform", "renormalised", "filled up", "named twice"])
@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_class_weights_and_impossible_classes(name, form):
    student, _, target = data()
    weight = torch.rand(CLASSES, dtype=torch.float64)
    top = TOPS[name]
    masked = student.detach().clone()
    for row in range(ROWS):  # a class that neither label nor top names
        named = {target[row].item(), *top.indices[row].tolist()}
        masked[row, next(c for c in range(CLASSES) if c not in named)] = -torch.inf
    masked.requires_grad_()
    with implementation(form):
        for class_weight in (None, weight):
            rows = functional.self_distillation_loss(
                masked, target, top, reduction="none", weight=class_weight, **OPTIONS
            )
            torch.testing.assert_close(rows.detach(), expected(masked, target, top, class_weight))
            total = functional.self_distillation_loss(
                masked, target, top, reduction="sum", weight=class_weight, **OPTIONS
            )
            gradient = torch.autograd.grad(total, masked)[0]
            assert gradient.isfinite().all()
            torch.testing.assert_close(gradient, torch.autograd.grad(rows.sum(), masked)[0])


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_a_bucket_of_impossible_classes_costs_nothing_where_it_is_empty(form):
    student, teacher, target = data()
    student = student.detach().masked_fill(torch.arange(CLASSES) >= 6, -torch.inf).requires_grad_()
    target = target % 6
    teacher[:, 6:] = -torch.inf
    top = TopKLogits.of(teacher, 3, temperature=2.0, tail="bucket")
    with implementation(form):
        loss = functional.self_distillation_loss(student, target, top, reduction="none", **OPTIONS)
    torch.testing.assert_close(loss.detach(), expected(student, target, top))
    assert torch.autograd.grad(loss.sum(), student)[0].isfinite().all()


def test_all_of_a_teacher_is_that_teacher():
    student, teacher, target = data()
    every = TopKLogits.of(teacher, CLASSES, temperature=2.0)
    for tail in ("uniform", "bucket"):
        every.tail = tail
        torch.testing.assert_close(
            functional.self_distillation_loss(student, target, every, **OPTIONS),
            functional.self_distillation_loss(student, target, teacher, **OPTIONS),
        )


def test_a_bucket_asks_for_nothing_within():
    """The gradient of a row with all of its mass in the bucket leaves the others as they are among each other."""
    student, teacher, target = data()
    top = TopKLogits.of(teacher, 3, temperature=2.0, tail="bucket")
    loss = functional.self_distillation_loss(student, target, top, alpha=0.0, temperature=2.0, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, student)
    p = student.detach().softmax(1)
    ratio = (gradient / p).scatter(1, top.indices.long(), torch.nan)
    for row in ratio:
        others = row[~row.isnan()]
        torch.testing.assert_close(others, others[:1].expand_as(others))


def test_a_tail_that_rounds_to_nothing_is_no_nan():
    student = torch.tensor([[200.0, 0.0, 0.0, 0.0]], requires_grad=True)
    top = TopKLogits(torch.tensor([[-0.5]]), torch.tensor([[0]]), 4, log_normalizer=0.0, tail="bucket")
    for form in IMPLEMENTATIONS:
        with implementation(form):
            loss = functional.self_distillation_loss(student, torch.tensor([0]), top, alpha=0.0, temperature=1.0)
            assert loss.item() == pytest.approx((1 - 0.60653) * (200.0 - 1.0986), rel=1e-4)
            assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_dense_predictions_have_classes_in_the_middle():
    student, teacher, target = data(shape=(2, 3))
    top = TopKLogits.of(teacher, 3, temperature=2.0)
    assert top.shape == (2, 3, CLASSES)
    dense = functional.self_distillation_loss(student.movedim(-1, 1), target, top, reduction="none", **OPTIONS)
    flat = TopKLogits(
        top.values.flatten(0, 1), top.indices.flatten(0, 1), CLASSES, top.log_normalizer.flatten(), temperature=2.0
    )
    torch.testing.assert_close(dense.detach().flatten(), expected(student.flatten(0, 1), target.flatten(), flat))
    one = TopKLogits(top.values[0, 0], top.indices[0, 0], CLASSES, top.log_normalizer[0, 0], temperature=2.0)
    single = functional.self_distillation_loss(student[0, 0], target[0, 0], one, **OPTIONS)
    torch.testing.assert_close(single, dense[0, 0])


def test_log_probabilities_of_a_server():
    student, teacher, target = data()
    found = teacher.log_softmax(1).topk(4, 1)
    served = TopKLogits(found.values, found.indices, CLASSES, log_normalizer=0.0)
    recorded = TopKLogits.of(teacher, 4, temperature=1.0)
    calls = [
        functional.self_distillation_loss(student, target, top, alpha=0.2, temperature=1.0)
        for top in (served, recorded)
    ]
    torch.testing.assert_close(*calls)
    with pytest.raises(ValueError, match=r"temperature=4 is not that of teacher_logits, .* temperature=1"):
        softlabels.SelfDistillationLoss()(student, target, teacher_logits=served)


def test_of_linear_logits_in_blocks():
    hidden, weight = torch.randn(9, 4), torch.randn(CLASSES, 4)
    blocks = TopKLogits.of(LinearLogits(hidden, weight, block=4), 3, temperature=2.0)
    whole = TopKLogits.of(hidden @ weight.T, 3, temperature=2.0)
    assert blocks.indices.dtype == torch.int32
    torch.testing.assert_close(blocks.indices, whole.indices)
    torch.testing.assert_close(blocks.values, whole.values)
    torch.testing.assert_close(blocks.log_normalizer, whole.log_normalizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_in_half_precision(dtype):
    student, teacher, target = data()
    top = TopKLogits.of((30 + teacher).to(dtype), CLASSES - 1, temperature=2.0)
    assert top.values.dtype == dtype
    rounded = functional.self_distillation_loss(student, target, (30 + teacher).to(dtype).double(), **OPTIONS)
    found = functional.self_distillation_loss(student, target, top, **OPTIONS)
    torch.testing.assert_close(found, rounded, rtol=1e-2, atol=1e-2)
    functional.self_distillation_loss(student.to(dtype), target, top, **OPTIONS).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("form", ["dense", "linear"])
def test_pruning_keeps_the_surest_of_the_top(form):
    student, teacher, target = data()
    options = {"prune": 0.8, "alpha": 0.3, "temperature": 2.0}  # of 11 classes 3 are kept
    logits = LinearLogits(student, torch.eye(CLASSES, dtype=torch.float64), block=3) if form == "linear" else student
    whole = functional.pruned_distillation_loss(student, target, teacher, **options)
    for top in (TopKLogits.of(teacher, 5, temperature=2.0), TopKLogits.of(teacher, 3)):
        torch.testing.assert_close(functional.pruned_distillation_loss(logits, target, top, **options), whole)
    with pytest.raises(ValueError, match=r"TopKLogits of 2 classes, and 3 of 11 are to be kept: raise prune"):
        functional.pruned_distillation_loss(logits, target, TopKLogits.of(teacher, 2), **options)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 1.3])
@pytest.mark.parametrize("sample_weighting", ["none", "exact", "normalized"])
@pytest.mark.parametrize("form", ["formula", "closed", "linear"])
def test_dirichlet_map_of_a_top(gamma, sample_weighting, form):
    """Its prior is that of the dense prediction which the top with its tail describes."""
    student, teacher, target = data()
    top = TopKLogits.of(teacher, 3, temperature=2.0)
    options = {"beta": 0.7, "temperature": 2.0, "gamma": gamma, "sample_weighting": sample_weighting}
    logits = LinearLogits(student, torch.eye(CLASSES, dtype=torch.float64), block=3) if form == "linear" else student
    with implementation("closed" if form == "linear" else form):
        found = functional.dirichlet_map_loss(logits, target, top, reduction="none", **options)
    log_sums = [float(z) for z in top.log_normalizer]
    centres = [sum(row) / 3 / 2.0 for row in top.values.tolist()]
    s = {
        "none": [1.0] * ROWS,
        "exact": [torch.tensor(z).exp().item() for z in log_sums],
        "normalized": [torch.tensor(z - m).exp().item() for z, m in zip(log_sums, centres, strict=True)],
    }[sample_weighting]
    if sample_weighting == "normalized":
        s = [ROWS * x / sum(s) for x in s]
    for i in range(ROWS):
        named = top.indices[i].tolist()
        q, rest = reference.top_k_share(top.values[i].tolist(), named, CLASSES, log_sums[i], 2.0)
        whole = [max(q[c], 0.0) if c in named else rest / (CLASSES - 3) for c in range(CLASSES)]
        row = reference.dirichlet_map(
            student[i].tolist(), target[i].item(), [1.0] * CLASSES, [2.0 * torch.tensor(x).log().item() for x in whole],
            s[i], 0.7, 2.0, gamma,
        )  # fmt: skip
        assert found[i].item() == pytest.approx(row, rel=1e-5)


def test_a_bucket_has_no_class_weights_and_no_gamma():
    student, _, target = data()
    with pytest.raises(ValueError, match="class weights and tail='bucket' do not go together"):
        functional.self_distillation_loss(student, target, TOPS["bucket"], weight=torch.ones(CLASSES), **OPTIONS)
    with pytest.raises(ValueError, match="gamma other than 1 and tail='bucket'"):
        functional.dirichlet_map_loss(student, target, TOPS["bucket"], gamma=1.1, temperature=2.0)
    functional.dirichlet_map_loss(student, target, TOPS["bucket"], temperature=2.0)


V, I = torch.tensor([[1.0, 0.0]]), torch.tensor([[2, 1]])  # noqa: E741


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "values must be a Tensor, got list", ([1.0], I, 3)),
        (TypeError, "values must be of a floating dtype, got torch.int64", (I, I, 3)),
        (TypeError, "indices must hold classes as torch.int64 or int32, got torch.float32", (V, V, 3)),
        (ValueError, r"the same shape \(..., k\), got \(1, 2\) and \(2,\)", (V, I[0], 3)),
        (ValueError, "num_classes must be an int of at least k=2, and k at least 1, got 1", (V, I, 1)),
        (IndexError, r"indices must hold classes in \[0, 2\), got 1 to 2", (V, I, 2)),
        (IndexError, r"indices must hold classes in \[0, 3\), got -2 to -1", (V, -I, 3)),
        (ValueError, r"log_normalizer must have one value per row, shape \(1,\), got \(3,\)", (V, I, 3, torch.ones(3))),
        (ValueError, r"of a row sum to 3.718, more than 1; log_normalizer must be", (V, I, 3, 0.0)),
        (ValueError, r"temperature must be in \(0, inf\), or None, got 0.0", (V, I, 3, 2.0, 0.0)),
        (ValueError, "tail must be one of 'uniform', 'bucket', got 'even'", (V, I, 3, 2.0, 1.0, "even")),
        (ValueError, "each row of values must have one that is not -inf", (V * -torch.inf, I, 3)),
    ],
)
def test_what_is_no_top_raises(error, message, arguments):
    if arguments[0] is not V and isinstance(arguments[0], torch.Tensor) and arguments[0].is_floating_point():
        arguments = (torch.full_like(V, -torch.inf), *arguments[1:])
    with pytest.raises(error, match=message):
        TopKLogits(*arguments)


def test_calls_that_do_not_fit_raise():
    student, teacher, target = data()
    with pytest.raises(ValueError, match="k must be an int between 1 and the number of classes, 11, got 12"):
        TopKLogits.of(teacher, 12)
    with pytest.raises(ValueError, match=r"stand for logits of shape \(6, 11\), but input of shape \(7, 11\) needs"):
        functional.self_distillation_loss(student, target, TopKLogits.of(teacher[1:], 2))
    with pytest.raises(TypeError, match="soft labels are shown of logits of all classes, got TopKLogits"):
        functional.distillation_targets(target, TOPS["uniform"])
    with pytest.raises(TypeError, match="input must be a Tensor, got TopKLogits"):
        functional.label_smoothing_map_loss(TOPS["uniform"], target, beta=0.1)


def test_repr_shows_what_is_known():
    assert repr(TOPS["bucket"]) == "TopKLogits(values=(7, 3), num_classes=11, temperature=2.0, tail='bucket')"
    assert repr(TOPS["renormalised"]) == "TopKLogits(values=(7, 3), num_classes=11)"
    assert repr(TopKLogits(V, I, 3, 5.0)) == (
        "TopKLogits(values=(1, 2), num_classes=3, log_normalizer=5.0, temperature=1.0, tail='uniform')"
    )
