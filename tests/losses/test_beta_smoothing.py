"""Beta smoothing: its draws, its order, its average, and its options."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import reference
import torch
from implementations import IMPLEMENTATIONS, implementation
from scipy import stats
from torch import nn
from versions import whole_graph

import softlabels
from softlabels.functional import beta_smoothing_loss, beta_smoothing_targets
from softlabels.kernels import ordering


def draws(target, num_classes, confidence, *, alpha=0.0, concentration=3.0, seed=0):
    """The b of each row, read off the soft labels at alpha = 0."""
    generator = torch.Generator().manual_seed(seed)
    soft = beta_smoothing_targets(
        target, num_classes, confidence, alpha=alpha, concentration=concentration, generator=generator
    )
    return soft.gather(1, target.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("concentration", [0.5, 1.0, 3.0, 20.0])
def test_draws_follow_the_beta_distribution(ranked, concentration):
    target = torch.zeros(20_000, dtype=torch.long)
    confidence = torch.rand(20_000) if ranked else None
    b = draws(target, 10, confidence, concentration=concentration)
    assert stats.kstest(b.double().numpy(), stats.beta(concentration, 1).cdf).pvalue > 1e-3


def test_every_order_statistic_follows_its_own_beta_distribution():
    """The j-th smallest of m uniforms is Beta(j, m - j + 1): the joint distribution, not just the pooled one."""
    m, batches = 5, 4000
    target, confidence = torch.zeros(m, dtype=torch.long), torch.arange(m).float()
    sample = torch.stack([draws(target, 3, confidence, concentration=1.0, seed=s) for s in range(batches)]).double()
    for j in range(m):
        assert stats.kstest(sample[:, j].numpy(), stats.beta(j + 1, m - j).cdf).pvalue > 1e-3


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_uniforms_in_order(count):
    """By a sort, and as the accelerators do it; the rows that are not counted may hold anything there."""
    source = torch.rand(9, dtype=torch.float64)
    wanted = torch.tensor(sorted(source[:count].tolist()), dtype=torch.float64)
    got = ordering.sorted_uniforms(source[:8], torch.tensor(count))
    torch.testing.assert_close(got, torch.cat([wanted, wanted.new_zeros(8 - count)]))
    wanted = torch.tensor(reference.order_statistics(source.tolist(), count), dtype=torch.float64)
    torch.testing.assert_close(ordering.summed_uniforms(source, torch.tensor(count))[:count], wanted)


def test_summed_uniforms_are_order_statistics():
    m, count = 5, torch.tensor(3)
    sample = torch.stack([ordering.summed_uniforms(torch.rand(m + 1).double(), count) for _ in range(4000)])
    for j in range(3):
        assert stats.kstest(sample[:, j].numpy(), stats.beta(j + 1, 3 - j).cdf).pvalue > 1e-3


@pytest.mark.parametrize("shape", [(7, 4), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("ignoring", [False, True])
def test_draws_do_not_depend_on_who_hands_them_out(shape, ignoring):
    """Torch where somebody traces, or numpy; with every row's weight, or without."""
    logits = torch.randn(shape, requires_grad=True)
    rows = shape[:1] + shape[2:]
    target, confidence = torch.randint(4, rows), torch.rand(rows).round(decimals=1)
    confidence.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    if ignoring:
        target.view(-1)[1::3] = -100

    def loss(**options):
        generator = torch.Generator().manual_seed(0)
        return beta_smoothing_loss(logits, target, confidence, generator=generator, **options)

    with patch.object(ordering, "can_read", return_value=False):
        wanted = loss()
    for how in IMPLEMENTATIONS:
        with implementation(how):
            torch.testing.assert_close(loss(), wanted)
            torch.testing.assert_close(loss(weight=torch.ones(4), sample_weight=torch.ones(rows)), wanted)


IMPOSSIBLE = torch.tensor([[-torch.inf, 0.1, 2.0], [9.0, 1.0, -torch.inf], [0.0, 0.1, 0.2], [-3.0, 0.0, 1.0]])
UNUSUAL = {
    "as is": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "float64": {"input": torch.randn(4, 3, dtype=torch.float64)},
    "float16": {"input": torch.randn(4, 3, dtype=torch.float16)},
    "bfloat16": {"input": torch.randn(4, 3, dtype=torch.bfloat16)},
    "transposed": {"input": torch.randn(3, 4).T},
    "float16 confidence": {"confidence": torch.rand(4).half()},
    "strided": {"target": torch.tensor([0, 9, 2, 9, 1, 9, 0])[::2], "confidence": torch.rand(7)[::2]},
    "alpha 0": {"alpha": 0.0},
    "alpha 1": {"alpha": 1.0},
    "-inf": {"input": IMPOSSIBLE},
    "-inf, alpha 0": {"input": IMPOSSIBLE, "alpha": 0.0},
    "-inf, alpha 1": {"input": IMPOSSIBLE, "alpha": 1.0},
    "-inf, draws of 0": {"input": IMPOSSIBLE, "alpha": 0.0, "concentration": 1e-3},
    "-inf, hardly any alpha": {"input": IMPOSSIBLE, "alpha": 1e-12, "concentration": 1e-3},
    "-inf, draws of 1": {"input": IMPOSSIBLE, "concentration": 1e30},
    "-inf, infinite": {"input": IMPOSSIBLE, "concentration": math.inf},
    "uint8": {"target": torch.tensor([0, 0, 2, 1], dtype=torch.uint8)},
    "may be ignored": {"ignore_index": 1},
    "confidence in whole numbers": {"confidence": torch.tensor([3, 1, 2, 4])},
    "confidence in bfloat16": {"confidence": torch.rand(4).bfloat16()},
    "confidence with a graph": {"confidence": torch.rand(4, requires_grad=True)},
}


@pytest.mark.parametrize("changed", UNUSUAL.values(), ids=UNUSUAL)
def test_every_implementation_gives_the_same(changed):
    """Value, gradient and the generator's next numbers."""
    logits = torch.tensor([[0.3, 1.0, 2.0], [9.0, 1.0, -7.0], [0.0, 0.1, 0.2], [-3.0, -80.0, 90.0]])
    arguments = {
        "input": logits,
        "target": torch.tensor([0, 0, 2, 1]),
        "confidence": torch.tensor([0.2, 0.9, 0.2, 0.1]),
    }
    arguments |= changed
    arguments["input"] = arguments["input"].clone().requires_grad_()
    results = []
    for how in IMPLEMENTATIONS:
        generator = torch.Generator().manual_seed(0)
        with implementation(how):
            loss = beta_smoothing_loss(generator=generator, **arguments)
            (gradient,) = torch.autograd.grad(loss.sum(), arguments["input"])
        results.append((loss.detach(), gradient, generator.get_state()))
    for loss, gradient, state in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])
        assert torch.equal(state, results[0][2])


def test_logits_in_float8():
    logits = torch.randn(4, 3).to(torch.float8_e4m3fn)
    target, confidence = torch.tensor([0, 0, 2, 1]), torch.rand(4)
    torch.manual_seed(0)
    got = beta_smoothing_loss(logits, target, confidence)
    torch.manual_seed(0)
    torch.testing.assert_close(got, beta_smoothing_loss(logits.float(), target, confidence))


def test_draws_are_comonotone_with_confidence():
    confidence = torch.rand(500)
    confidence[::7] = 0.5  # ties
    b = draws(torch.zeros(500, dtype=torch.long), 4, confidence)
    assert (b[confidence.argsort(stable=True)].diff() >= 0).all()


def test_confidence_of_any_kind_orders():
    target = torch.zeros(6, dtype=torch.long)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for confidence in (order, order.double() / 10, -torch.exp(-order.float()), order.half()):
        assert torch.equal(draws(target, 3, confidence).argsort(), order.argsort())
    extreme = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 1.0, -1.0])
    b = draws(target, 3, extreme)
    assert b.argmax() == 1
    assert set(b.argsort()[:2].tolist()) == {2, 3}  # -inf and nan are both least sure


def test_ignored_rows_do_not_take_part():
    """Even an ignored row that is surest of all leaves the draws of the others as they are."""
    logits = torch.zeros(6, 4)
    target = torch.tensor([0, -100, 1, -100, 2, 3])
    confidence = torch.tensor([0.3, 9.0, 0.1, torch.inf, 0.8, torch.inf])
    kept = target >= 0

    def losses(logits, target, confidence):
        generator = torch.Generator().manual_seed(0)
        return beta_smoothing_loss(logits, target, confidence, generator=generator, reduction="none")

    logits[:, 0] = 2.0
    torch.testing.assert_close(
        losses(logits, target, confidence)[kept], losses(logits[kept], target[kept], confidence[kept])
    )


@pytest.mark.parametrize("ranking", ["batch", "random"])
@pytest.mark.parametrize(("label_smoothing", "num_classes"), [(0.15, 10), (0.3, 3), (0.05, 100)])
def test_soft_labels_average_to_label_smoothing(ranking, label_smoothing, num_classes):
    """Against logits that are 0 but for the label, the loss reads the true-class mass off exactly."""
    batches, m, alpha = 400, 32, 0.4
    logits = torch.zeros(m, num_classes, dtype=torch.float64)
    target = torch.randint(num_classes, (m,))
    criterion = softlabels.BetaSmoothingLoss(label_smoothing=label_smoothing, alpha=alpha, ranking=ranking)
    log_p_gap = 1.0  # log p_y - log p_other
    logits[torch.arange(m), target] = log_p_gap
    log_p = logits.log_softmax(1)
    other = log_p[0].min()
    # loss = -(log p_other + mass * gap), the mean of mass over the batch
    mass = torch.stack([-criterion(logits, target) - other for _ in range(batches)]) / log_p_gap
    wanted = 1 - label_smoothing + label_smoothing / num_classes
    a = softlabels.tuning.beta_concentration(wanted, alpha)
    error = (1 - alpha) * stats.beta(a, 1).std() / math.sqrt(batches * m)
    assert abs(mass.mean() - wanted) < 4 * error


@pytest.mark.parametrize("form", ["eval", "no_grad", "inference_mode"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_evaluation_is_label_smoothing(form, label_smoothing):
    logits, target = torch.randn(8, 5, dtype=torch.float64), torch.randint(5, (8,))
    weight = torch.rand(5, dtype=torch.float64)
    criterion = softlabels.BetaSmoothingLoss(weight, label_smoothing=label_smoothing)
    if form == "eval":
        got = criterion.eval()(logits, target)
    else:
        with getattr(torch, form)():
            got = criterion(logits, target)
    wanted = nn.CrossEntropyLoss(weight, label_smoothing=label_smoothing)(logits, target)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_evaluation_with_a_concentration_uses_the_mean_draw():
    logits, target = torch.randn(8, 5, dtype=torch.float64), torch.randint(5, (8,))
    criterion = softlabels.BetaSmoothingLoss(alpha=0.4, concentration=3.0).eval()
    wanted = nn.CrossEntropyLoss(label_smoothing=softlabels.tuning.label_smoothing_for(0.85, 5))(logits, target)
    torch.testing.assert_close(criterion(logits, target), wanted)


def test_paper_settings():
    criterion = softlabels.BetaSmoothingLoss(label_smoothing=softlabels.tuning.label_smoothing_for(0.85, 100))
    assert criterion.concentration_for(100) == pytest.approx(3.0)
    assert softlabels.BetaSmoothingLoss(alpha=1.0).concentration_for(10) == math.inf
    assert softlabels.BetaSmoothingLoss(concentration=2.5).concentration_for(10) == 2.5


def test_ranking_batch_orders_by_the_given_logits():
    """The surest row gets the largest share of hard label: its soft label is nearest to one-hot."""
    logits = torch.tensor([[1.0, 0.0, 0.0], [6.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    target = torch.tensor([0, 0, 0])
    for rank_by, order in (("max", [0, 2, 1]), ("true_class", [2, 0, 1])):
        criterion = softlabels.BetaSmoothingLoss(ranking="batch", rank_by=rank_by, reduction="none")
        confidence = torch.tensor([float(order.index(i)) for i in range(3)])
        torch.manual_seed(0)
        got = criterion(logits, target)
        torch.manual_seed(0)
        a = criterion.concentration_for(3)
        wanted = beta_smoothing_loss(logits, target, confidence, concentration=a, reduction="none")
        torch.testing.assert_close(got, wanted)


def test_generator_is_the_only_source_of_randomness():
    logits, target, confidence = torch.randn(6, 3), torch.randint(3, (6,)), torch.rand(6)
    state = torch.get_rng_state()
    for given in (confidence, None):
        one, two = (
            beta_smoothing_loss(logits, target, given, generator=torch.Generator().manual_seed(s)) for s in (1, 1)
        )
        other = beta_smoothing_loss(logits, target, given, generator=torch.Generator().manual_seed(2))
        assert one == two != other
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    first = beta_smoothing_loss(logits, target, confidence)
    assert beta_smoothing_loss(logits, target, confidence) != first
    torch.manual_seed(1)
    assert beta_smoothing_loss(logits, target, confidence) == first


def test_targets_are_those_of_the_loss():
    for shape, rows in (((6, 4), (6,)), ((2, 4, 3), (2, 3)), ((4,), ())):
        logits = torch.randn(shape, dtype=torch.float64)
        target, confidence = torch.randint(4, rows), torch.rand(rows)
        for given in (confidence, None):
            soft = beta_smoothing_targets(target, 4, given, generator=torch.Generator().manual_seed(0))
            assert soft.shape == logits.shape
            torch.testing.assert_close(soft.sum(0 if len(shape) == 1 else 1), torch.ones(rows))
            loss = beta_smoothing_loss(logits, target, given, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, soft.double()), rtol=1e-6, atol=1e-6)


def test_history_ranks_by_the_past_and_needs_no_second_pass():
    criterion = softlabels.BetaSmoothingLoss(ranking="history", num_samples=10, ema_decay=0.9)
    sure, unsure = [8.0, 0.0, 0.0], [0.1, 0.0, 0.0]
    target, index = torch.zeros(2, dtype=torch.long), torch.tensor([3, 7])
    criterion(torch.tensor([sure, unsure]), target, index=index)
    seen = criterion.history.doubt.isfinite()
    assert seen.nonzero().flatten().tolist() == [3, 7]
    now = torch.tensor([unsure, sure])  # the model has changed its mind, the history not yet
    generator = criterion.generator = torch.Generator().manual_seed(0)
    past = criterion(now, target, index=index)
    generator.manual_seed(0)
    a = criterion.concentration_for(3)
    wanted = beta_smoothing_loss(now, target, torch.tensor([1.0, 0.0]), concentration=a, generator=generator)
    torch.testing.assert_close(past, wanted)
    with pytest.raises(RuntimeError, match="pass index="):
        criterion(now, target)
    with pytest.raises(ValueError, match="index must have one value per row"):
        criterion(now, target, index=torch.tensor([1]))
    with pytest.raises(IndexError):
        criterion(now, target, index=torch.tensor([1, 10]))


def test_options_that_contradict_each_other():
    with pytest.raises(ValueError, match=r"label_smoothing=0\.9 .* alpha=0\.6"):
        softlabels.BetaSmoothingLoss(label_smoothing=0.9, alpha=0.6)
    criterion = softlabels.BetaSmoothingLoss(label_smoothing=0.7, alpha=0.4, ranking="random")
    criterion(torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))  # 1 - 0.7 + 0.35 = 0.65 for two classes
    with pytest.raises(ValueError, match=r"label_smoothing=0\.7 with 100 classes .* 0\.307 .* alpha=0\.4"):
        criterion(torch.randn(4, 100), torch.tensor([0, 1, 1, 0]))
    with pytest.raises(ValueError, match=r"num_samples must be the size of the training set, .* got None"):
        softlabels.BetaSmoothingLoss(ranking="history")
    with pytest.raises(
        ValueError, match="ranking must be one of 'ema', 'history', 'batch', 'random', 'none', got 'emma'"
    ):
        softlabels.BetaSmoothingLoss(ranking="emma")


def test_unattached_ema_ranking_says_which_line_is_missing():
    criterion = softlabels.BetaSmoothingLoss()
    with pytest.raises(RuntimeError, match=r"criterion\.attach\(model\) once before the training loop.*confidence="):
        criterion(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    criterion(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), confidence=torch.rand(4))
    softlabels.BetaSmoothingLoss(label_smoothing=0.0)(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))


def test_single_class():
    logits = torch.randn(4, 1, requires_grad=True)
    loss = softlabels.BetaSmoothingLoss(ranking="batch")(logits, torch.zeros(4, dtype=torch.long))
    assert loss == 0
    loss.backward()
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize(
    "confidence",
    [
        torch.tensor([1 - 1e-10, 1 - 1e-9], dtype=torch.float64),  # one number in float32
        torch.tensor([2**24 + 1, 2**24]),
        torch.tensor([-3, -4], dtype=torch.int8),
    ],
    ids=str,
)
def test_confidences_are_compared_in_their_own_precision(confidence):
    for seed in range(20):
        b = draws(torch.zeros(2, dtype=torch.long), 3, confidence, seed=seed)
        assert b[0] >= b[1]


def test_impossible_label_with_a_small_draw():
    """on < off for small draws: inf - inf must not be nan."""
    criterion = softlabels.BetaSmoothingLoss(ranking="random", label_smoothing=0.5, alpha=0.1, reduction="none")
    logits = torch.zeros(1000, 3)
    logits[:, 0] = -torch.inf
    assert criterion(logits, torch.zeros(1000, dtype=torch.long)).eq(torch.inf).all()


def test_history_checks_before_it_writes():
    criterion = softlabels.BetaSmoothingLoss(ranking="history", num_samples=4)
    logits, target = torch.randn(2, 3), torch.tensor([0, 1])
    for index, error, message in (
        (torch.tensor([0, -1]), IndexError, r"index must hold sample ids in \[0, 4\), got -1 to 0"),
        (torch.tensor([0, 4]), IndexError, "got 0 to 4"),
        (torch.tensor([0, 1], dtype=torch.uint8), TypeError, r"torch\.int64, got torch\.uint8"),
    ):
        with pytest.raises(error, match=message):
            criterion(logits, target, index=index)
    with pytest.raises(IndexError, match="target must hold class indices"):
        criterion(logits, torch.tensor([0, 3]), index=torch.tensor([0, 1]))
    assert criterion.history.doubt.isnan().all()
    criterion(logits, torch.tensor([0, -100]), index=torch.tensor([2, 3]))
    assert criterion.history.doubt.isnan().tolist() == [True, True, False, True]


@whole_graph
def test_a_generator_breaks_the_graph_and_says_so():
    criterion = softlabels.BetaSmoothingLoss(ranking="random", generator=torch.Generator().manual_seed(0))
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(Exception, match="a generator cannot be traced"):
        torch.compile(criterion, backend="aot_eager", fullgraph=True)(logits, target)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"generator": 3}, TypeError),
        ({"global_ranking": "yes"}, TypeError),
        ({"num_samples": True}, ValueError),
        ({"num_samples": "x"}, ValueError),
        ({"ema_decay": 1.0}, ValueError),
        ({"rank_by": "mean"}, ValueError),
    ],
    ids=str,
)
def test_options_of_the_wrong_kind(options, error):
    with pytest.raises(error, match=next(iter(options))):
        softlabels.BetaSmoothingLoss(**options)
