"""Learned spreads: the loss, what is remembered, and what a user relies on, against the reference."""

from __future__ import annotations

import copy
import io
import math

import pytest
import reference
import torch
from implementations import IMPLEMENTATIONS, implementation
from processes import spawn
from torch import nn
from versions import compile_backend

from softlabels import BetaSmoothingLoss, backend
from softlabels.functional import beta_smoothing_loss, beta_smoothing_targets
from softlabels.priors import SPREADS
from softlabels.priors.evidence import Evidence

ALL = ("classes", "neighbours", "samples")
N, K, SAMPLES = 12, 5, 40


def a_batch(seed=0, dtype=torch.float64, n=N):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, K, generator=generator, dtype=torch.float64)
    target = torch.randint(K, (n,), generator=generator)
    return logits.to(dtype), target, torch.randperm(SAMPLES, generator=generator)[:n]


def expected_loss(logits, target, draws, sources, alpha, weights, kept):
    """The weighted mean of the reference's rows."""
    rows = [
        reference.beta_smoothing_spread(x, y, [1.0] * K, b, alpha, [source[i] for source in sources])
        for i, (x, y, b) in enumerate(zip(logits.tolist(), target.tolist(), draws, strict=True))
    ]
    total = [w * k for w, k in zip(weights, kept, strict=True)]
    return sum(w * r for w, r, k in zip(total, rows, kept, strict=True) if k) / sum(total)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_function_equals_the_reference(name, soft, reduction):
    """A given spread: impossible classes, rows of zeros, ignored rows, class weights and class probabilities."""
    logits, target, _ = a_batch()
    logits[1, 3] = logits[2, :4] = -torch.inf
    target[1], target[2] = 0, 4  # of row 2 the label is the only possible class
    spread = torch.rand(N, K, dtype=torch.float64).square()
    spread[3], spread[1] = 0.0, torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])
    class_weight = torch.linspace(0.5, 2.0, K, dtype=torch.float64)
    labels = target
    if soft:
        labels = torch.rand(N, K, dtype=torch.float64)
        labels[logits == -torch.inf] = 0.0
        labels /= labels.sum(1, keepdim=True)
    else:
        labels[5] = -100
    kept = [soft or y != -100 for y in target.tolist()]
    confidence = torch.rand(N)
    uniforms = torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64).tolist()
    draws = reference.beta_draws(uniforms, confidence.tolist(), kept, 2.0)
    rows = [
        reference.beta_smoothing_spread(x, y, class_weight.tolist(), b, 0.3, [s]) if k else 0.0
        for x, y, b, s, k in zip(logits.tolist(), labels.tolist(), draws, spread.tolist(), kept, strict=True)
    ]
    divisor = sum(
        reference.mean_weight(y, class_weight.tolist()) for y, k in zip(labels.tolist(), kept, strict=True) if k
    )

    def loss_of(logits):
        return beta_smoothing_loss(
            logits,
            labels,
            confidence,
            alpha=0.3,
            concentration=2.0,
            spread=spread,
            generator=torch.Generator().manual_seed(3),
            weight=class_weight,
            reduction=reduction,
        )

    with implementation(name):
        x = logits.requires_grad_()
        loss = loss_of(x)
        expected = {"none": rows, "sum": sum(rows), "mean": sum(rows) / divisor}[reduction]
        torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)
        loss.sum().backward()
    assert x.grad.isfinite().all()
    with implementation("formula"):
        y = logits.detach().requires_grad_()
        loss_of(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("shape", [(K,), (4, K, 3), (4, K, 2, 3)])
def test_shapes_and_the_builder(shape):
    """The soft label that the builder shows is the one of the loss, for one row and for dense predictions."""
    logits, spread = torch.randn(shape), torch.rand(shape)
    target = torch.randint(K, shape[:1] + shape[2:] if len(shape) > 1 else ())
    confidence = torch.rand(target.shape)
    options = {"spread": spread, "alpha": 0.2, "concentration": 1.5}
    soft = beta_smoothing_targets(target, K, confidence, generator=torch.Generator().manual_seed(1), **options)
    loss = beta_smoothing_loss(logits, target, confidence, generator=torch.Generator().manual_seed(1), **options)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, soft))
    dim = min(len(shape) - 1, 1)
    torch.testing.assert_close(soft.sum(dim), torch.ones(target.shape))
    others = spread.scatter(dim, target.unsqueeze(dim), 0.0)
    amount = 1.0 - soft.gather(dim, target.unsqueeze(dim))
    expected = amount * others / others.sum(dim, keepdim=True)
    torch.testing.assert_close(soft.scatter(dim, target.unsqueeze(dim), 0.0), expected)


def test_bad_spreads_are_named():
    logits, target, _ = a_batch()
    with pytest.raises(ValueError, match=r"spread must have the shape of input, \(12, 5\), got \(5, 5\)"):
        beta_smoothing_loss(logits, target, spread=torch.rand(K, K))
    with pytest.raises(ValueError, match="spread must hold numbers of at least 0, got -1"):
        beta_smoothing_loss(logits, target, spread=-torch.ones(N, K))
    with pytest.raises(TypeError, match=r"spread must be of a floating dtype, got torch\.int64"):
        beta_smoothing_loss(logits, target, spread=torch.ones(N, K).long())


@pytest.mark.parametrize("value", ["teacher", (), ("classes", "classes"), ("uniform", "classes"), ["classes"], 3])
def test_bad_options_are_named(value):
    with pytest.raises(
        ValueError, match="spread must be 'uniform', or one or a tuple of 'classes', 'neighbours', 'sam"
    ):
        BetaSmoothingLoss(spread=value)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("ranking", ["none", "batch"])
def test_three_batches_equal_the_reference(name, ranking):
    """All three spreads, read before each batch is recorded; an ignored row, one of weight 0 and repeated samples."""
    criterion = BetaSmoothingLoss(
        ranking=ranking,
        spread=ALL,
        num_samples=SAMPLES,
        alpha=0.2,
        concentration=2.0,
        generator=torch.Generator().manual_seed(5),
    )
    draws_of = torch.Generator().manual_seed(5)
    profiles, past = reference.ClassProfiles(K), {}
    with implementation(name):
        for step in range(3):
            logits, target, index = a_batch(step)
            index[7] = index[6]
            target[2] = -100
            weights = torch.ones(N, dtype=torch.float64)
            weights[4] = 0.0
            kept = [y != -100 for y in target.tolist()]
            counted = [k and w > 0 for k, w in zip(kept, weights.tolist(), strict=True)]
            labels = [max(y, 0) for y in target.tolist()]
            p = [reference.softmax(x) for x in logits.tolist()]
            sources = [
                [profiles.rows[y] for y in labels],
                reference.neighbour_spread(logits.tolist(), labels, counted),
                [
                    [sum(v) / len(v) for v in zip(*past[i], strict=True)] if i in past else profiles.rows[y]
                    for i, y in zip(index.tolist(), labels, strict=True)
                ],
            ]
            if ranking == "none":
                draws = [2.0 / 3.0] * N
            else:
                confidence = [math.log(max(row) / (1 - max(row))) for row in p]
                uniforms = torch.rand(N, generator=draws_of, dtype=torch.float64).tolist()
                draws = reference.beta_draws(uniforms, confidence, counted, 2.0)
            expected = expected_loss(logits, torch.tensor(labels), draws, sources, 0.2, weights.tolist(), kept)
            x = logits.clone().requires_grad_()
            loss = criterion(x, target, sample_weight=weights, index=index)
            loss.backward()
            assert loss.item() == pytest.approx(expected, rel=2e-3 if step else 1e-6)  # the past is half precision
            profiles.record(p, labels, counted)
            for i, row, c in zip(index.tolist(), p, counted, strict=True):
                if c:
                    past.setdefault(i, []).append(row)
    learned = criterion.learned_spread
    assert criterion.class_profiles is learned.class_profiles
    torch.testing.assert_close(learned.class_profiles, torch.tensor(profiles.rows))
    assert [learned.past.visits[i].item() for i in past] == [len(v) for v in past.values()]
    for i, visits in past.items():
        mean = torch.tensor([sum(v) / len(v) for v in zip(*visits, strict=True)])
        torch.testing.assert_close(learned.past.mean[i].float(), mean, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("spread", SPREADS)
def test_probability_targets_feed_profiles_by_their_mass(spread):
    """One-hot probabilities leave the same profiles as indices."""
    logits, target, index = a_batch()
    made = []
    for labels in (target, nn.functional.one_hot(target, K).double()):
        criterion = BetaSmoothingLoss(ranking="none", spread=spread, num_samples=SAMPLES)
        for _ in range(2):
            criterion(logits.clone().requires_grad_(), labels, index=index)
        made.append(criterion.learned_spread.state_dict())
    for name, table in made[0].items():
        torch.testing.assert_close(made[1][name], table)


def test_the_newest_rows_of_a_class_always_weigh_something():
    criterion = BetaSmoothingLoss(ranking="none", spread="classes")
    target, logits = torch.zeros(10, dtype=torch.long), torch.zeros(10, 2)
    for _ in range(100):
        criterion(logits.requires_grad_(), target)
    criterion(torch.tensor([[50.0, 0.0]]).expand(10, 2).requires_grad_(), target)
    step = 1.0 - 0.98**10
    expected = torch.tensor([[0.5 + 0.5 * step, 0.5 - 0.5 * step], [0.5, 0.5]])
    torch.testing.assert_close(criterion.learned_spread.class_profiles, expected)


@pytest.mark.parametrize("ranking", ["batch", "history", "random", "none"])
def test_resume_is_bit_for_bit(ranking):
    """Also into a loss that has not seen a batch, and as half precision modules are moved."""

    def make():
        return BetaSmoothingLoss(
            ranking=ranking, spread=ALL, num_samples=SAMPLES, generator=torch.Generator().manual_seed(1)
        )

    first = make()
    for step in range(3):
        logits, target, index = a_batch(step, torch.float32)
        first(logits.requires_grad_(), target, index=index)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make().half()
    second.load_state_dict(torch.load(file))
    logits, target, index = a_batch(3, torch.float32)
    losses = [c(logits.requires_grad_(), target, index=index) for c in (first, second, copy.deepcopy(second))]
    assert losses[0] == losses[1]
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], rtol=0, atol=0, equal_nan=True)
    fresh = make()
    fresh.load_state_dict(make().state_dict())  # from before the first batch, into one that has seen some
    first.load_state_dict(fresh.state_dict())
    assert first.learned_spread.past.visits.sum() == 0
    plain = BetaSmoothingLoss(ranking="random", generator=torch.Generator()).state_dict()
    if ranking == "history":
        plain.update({k: v for k, v in first.state_dict().items() if k.startswith("history")})
    with pytest.warns(UserWarning, match="learned spread"):
        second.load_state_dict(plain)
    assert second.learned_spread.past.visits.sum() == 0


def test_evaluation_is_even_and_remembers_nothing():
    logits, target, index = a_batch(dtype=torch.float32)
    criterion = BetaSmoothingLoss(ranking="batch", spread=ALL, num_samples=SAMPLES)
    criterion(logits.requires_grad_(), target, index=index)
    before = copy.deepcopy(criterion.state_dict())
    criterion.eval()
    loss = criterion(logits, target)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, target, label_smoothing=0.15))
    for name, value in before.items():
        assert torch.equal(value, criterion.state_dict()[name])


@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
def test_rows_that_do_not_count_and_nan_leave_no_trace(junk):
    logits, target, index = a_batch(dtype=torch.float32)
    expected = BetaSmoothingLoss(ranking="none", spread=ALL, num_samples=SAMPLES)
    kept = torch.arange(N) > 0
    loss = expected(logits[kept].requires_grad_(), target[kept], index=index[kept])
    logits[0] = junk
    ignored, weight = target.clone(), torch.ones(N)
    ignored[0], weight[0] = -100, 0.0
    for labels, weights in ((ignored, None), (target, weight)):
        criterion = BetaSmoothingLoss(ranking="none", spread=ALL, num_samples=SAMPLES)
        x = logits.clone().requires_grad_()
        same = criterion(x, labels, sample_weight=weights, index=index)
        same.backward()
        torch.testing.assert_close(same, loss)
        assert x.grad.isfinite().all()
        assert not x.grad[0].any()
        for name, table in expected.state_dict().items():
            torch.testing.assert_close(criterion.state_dict()[name], table)


def test_masked_classes_get_nothing_and_count_for_nothing():
    """-inf and the smallest number are the same mask."""
    losses = []
    for mask in (-torch.inf, torch.finfo(torch.float32).min):
        criterion = BetaSmoothingLoss(ranking="none", spread=ALL, num_samples=SAMPLES)
        for step in range(2):
            logits, target, index = a_batch(step, torch.float32)
            logits[:, 4] = mask
            loss = criterion(logits.requires_grad_(), target.clamp(max=3), index=index)
        losses.append(loss.item())
    assert math.isfinite(losses[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("spread", SPREADS)
def test_what_is_missing_or_too_much_is_said(spread):
    logits, target, index = a_batch(dtype=torch.float32)
    if spread == "samples":
        with pytest.raises(ValueError, match="num_samples must be the size of the training set"):
            BetaSmoothingLoss(spread=spread)
        criterion = BetaSmoothingLoss(ranking="none", spread=spread, num_samples=SAMPLES)
        with pytest.raises(RuntimeError, match="needs the ids of the samples"):
            criterion(logits.requires_grad_(), target)
        with pytest.raises(IndexError, match=r"sample ids in \[0, 40\), got 0 to 40"):
            criterion(logits[:2].requires_grad_(), target[:2], index=torch.tensor([0, SAMPLES]))
    criterion = BetaSmoothingLoss(ranking="none", spread=spread, num_samples=SAMPLES)
    criterion(logits.requires_grad_(), target, index=index)
    if spread != "neighbours":
        with pytest.raises(ValueError, match="input must have 5 classes, as before, got 4"):
            criterion(logits[:, :4], target.clamp(max=3), index=index)
        many = torch.zeros(1, 50_000, requires_grad=True)
        with pytest.raises(ValueError, match=r"class profiles of 50,000 x 50,000 numbers would take 9.31 GiB"):
            BetaSmoothingLoss(ranking="none", spread="classes")(many, torch.zeros(1, dtype=torch.long))
    else:
        with pytest.raises(ValueError, match="compares all rows with each other, at most 32,768, got 40,000"):
            BetaSmoothingLoss(ranking="none", spread=spread)(
                torch.zeros(2, 2, 20_000, requires_grad=True), torch.zeros(2, 20_000, dtype=torch.long)
            )


@pytest.mark.parametrize("spread", SPREADS)
def test_dense_predictions_are_rows(spread):
    """(N, K, d1) is N d1 rows."""
    logits, target, index = a_batch(dtype=torch.float32)
    flat, dense = (
        BetaSmoothingLoss(ranking="none", spread=spread, num_samples=SAMPLES, reduction="sum") for _ in range(2)
    )
    for _ in range(2):
        a = flat(logits.requires_grad_(), target, index=index)
        b = dense(logits.view(4, 3, K).movedim(2, 1), target.view(4, 3), index=index.view(4, 3))
    torch.testing.assert_close(a, b)
    for name, table in flat.state_dict().items():
        torch.testing.assert_close(dense.state_dict()[name], table)


@compile_backend
@pytest.mark.parametrize("spread", SPREADS)
def test_compiled_as_eager(spread):
    """Within a graph of the user's, and by the compile backend."""
    shape = (64, 1100)
    losses = []
    for how in ("eager", "graph", "backend"):
        torch.manual_seed(0)
        criterion = BetaSmoothingLoss(ranking="none", spread=spread, num_samples=SAMPLES)
        call = torch.compile(criterion) if how == "graph" else criterion
        with backend("compile" if how == "backend" else "eager"):
            for _ in range(2):
                x = torch.randn(shape, requires_grad=True)
                loss = call(x, torch.randint(shape[1], shape[:1]), index=torch.randint(SAMPLES, shape[:1]))
                loss.backward()
        losses.append((loss.detach(), x.grad))
    for loss, gradient in losses[1:]:
        torch.testing.assert_close(loss, losses[0][0])
        torch.testing.assert_close(gradient, losses[0][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", SPREADS)
def test_half_precision_is_worked_on_in_float32(dtype, spread):
    logits, target, index = a_batch(dtype=dtype)
    results = []
    for x in (logits.clone(), logits.float()):
        criterion = BetaSmoothingLoss(ranking="batch", spread=spread, num_samples=SAMPLES, generator=torch.Generator())
        for _ in range(2):
            x = x.detach().requires_grad_()
            loss = criterion(x, target, index=index)
        loss.backward()
        results.append((loss, x.grad.float(), criterion.learned_spread.state_dict()))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=2e-3, rtol=2e-2)
    for name, table in results[1][2].items():
        torch.testing.assert_close(results[0][2][name], table)


CELLS = [("history", True, ALL), ("history", False, ALL)]


def make(ranking, joint, spread):
    generator = torch.Generator().manual_seed(3)
    return BetaSmoothingLoss(
        ranking=ranking,
        spread=spread,
        num_samples=SAMPLES,
        global_ranking=joint,
        generator=generator,
        reduction="none",
    )


def worker(rank):
    logits, target, index = a_batch(dtype=torch.float32)
    values = {}
    for ranking, joint, spread in CELLS:
        criterion = make(ranking, joint, spread)
        for visit in range(2):  # the second time, the other process has seen the sample
            rows = slice(0, 5) if rank == visit else slice(5, N)
            criterion.generator.manual_seed(visit)  # uneven batches draw for rows that fill up
            loss = criterion(logits[rows].clone().requires_grad_(), target[rows], index=index[rows])
        values[ranking, joint] = loss.tolist(), {name: t.tolist() for name, t in criterion.state_dict().items()}
    return values


def test_two_processes_are_one_where_asked():
    """With global_ranking=True neighbours, profiles and past are those of all processes; without, each has its own."""
    ranks = spawn(worker)
    logits, target, index = a_batch(dtype=torch.float32)
    criterion = make("history", False, ALL)
    criterion.generator.manual_seed(0)
    criterion(logits.requires_grad_(), target, index=index)
    criterion.generator.manual_seed(1)
    order = torch.tensor([*range(5, N), *range(5)])  # process 0 has the second part then
    loss = criterion(logits[order], target[order], index=index[order])
    joint = torch.tensor(ranks[0]["history", True][0] + ranks[1]["history", True][0])
    torch.testing.assert_close(joint, loss.detach(), atol=1e-4, rtol=1e-3)  # half precision in another order
    for rank in (0, 1):
        state = ranks[rank]["history", True][1]
        for name, table in criterion.state_dict().items():
            if name != "generator_state":
                told = torch.tensor(state[name], dtype=table.dtype)
                torch.testing.assert_close(told, table, atol=1e-4, rtol=2e-3, equal_nan=True)
        for name in ("learned_spread.past.visits", "history.visits"):
            assert sum(state[name]) == 2 * N
            assert sum(ranks[rank]["history", False][1][name]) == N


def test_of_many_classes_the_largest_are_remembered(monkeypatch):
    """Means of the kept classes, and the rest by class. One sample twice in a batch is two visits."""
    monkeypatch.setattr("softlabels.priors.past_predictions.MOST_DENSE", SAMPLES * K - 1)
    monkeypatch.setattr("softlabels.priors.past_predictions.KEPT", 2)
    criterion = BetaSmoothingLoss(ranking="none", spread="samples", num_samples=SAMPLES)
    remembered, visits = {}, {}
    for seed in range(3):
        logits, target, index = a_batch(seed, torch.float32)
        index = index % 7  # again and again, some twice in a batch
        criterion(logits.requires_grad_(), target, index=index)
        found = {}
        for sample, p in zip(index.tolist(), logits.detach().softmax(1).tolist(), strict=True):
            found.setdefault(sample, []).append(p)
        for sample, rows in found.items():
            before = visits.get(sample, 0)
            visits[sample] = before + len(rows)
            earlier = remembered.get(sample, [0.0] * K)
            mean = [(before * e + sum(p[c] for p in rows)) / visits[sample] for c, e in enumerate(earlier)]
            kept = sorted(range(K), key=lambda c: -mean[c])[:2]
            remembered[sample] = [mean[c] if c in kept else 0.0 for c in range(K)]
    past = criterion.learned_spread.past
    assert past.mean.shape == past.classes.shape == (SAMPLES, 2)
    assert past.visits[:7].tolist() == [visits.get(sample, 0) for sample in range(7)]
    samples = torch.tensor(sorted(remembered))
    expected = torch.tensor([remembered[sample] for sample in samples.tolist()])
    torch.testing.assert_close(past.of(samples, K).float(), expected, atol=2e-3, rtol=0)
    assert past.likeliest(samples).tolist() == expected.argmax(1).tolist()
    source, where = criterion.learned_spread.sources(*told(criterion, logits, target, index))[0]
    of_class = criterion.class_profiles[target]
    rows = torch.tensor([remembered[sample] for sample in index.tolist()])
    assert where is None
    torch.testing.assert_close(source, rows + (1 - rows.sum(1, keepdim=True)) * of_class, atol=3e-3, rtol=0)
    again = BetaSmoothingLoss(ranking="none", spread="samples", num_samples=SAMPLES)
    again.load_state_dict(criterion.state_dict())
    assert torch.equal(again.learned_spread.past.of(samples, K), past.of(samples, K))


def told(criterion, logits, target, index):
    rows = criterion.rows(logits.detach(), target, None)
    batch = Evidence.of(rows, logits.detach(), index)
    return rows, batch, batch, slice(0, len(index)), index
