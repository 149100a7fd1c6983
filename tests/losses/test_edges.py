"""The edges of every loss: rows that do not count, nan, masked classes, traced programs, checkpoints."""

from __future__ import annotations

import warnings
from fractions import Fraction

import pytest
import torch
from cases import CASES
from implementations import IMPLEMENTATIONS, implementation
from torch.utils.checkpoint import checkpoint
from versions import whole_graph

import softlabels
from softlabels import functional
from softlabels.ranking import log_odds

each_loss = pytest.mark.parametrize("case", CASES, ids=repr)
each_implementation = pytest.mark.parametrize("how", IMPLEMENTATIONS)
by_teacher = pytest.mark.parametrize("case", [c for c in CASES if c.argument == "teacher_logits"], ids=repr)


@each_loss
@each_implementation
@pytest.mark.parametrize("junk", [0.0, 50.0, torch.nan, torch.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_row_of_weight_0_counts_as_little_as_an_ignored_one(case, how, junk, reduction):
    """In ranks, draws, means and normalisations: the others' losses and gradients are those without it."""
    logits, target = torch.randn(7, 5), torch.randint(5, (7,))
    kept = torch.tensor([0, 1, 3, 4, 6])
    weight = torch.zeros(7).index_fill(0, kept, 1.0)
    extras = case.extras(logits)
    for value in (logits, *extras.values()):
        value[[2, 5]] = junk
    logits.requires_grad_()
    wanted = case.call(logits[kept], target[kept], reduction=reduction, **{k: v[kept] for k, v in extras.items()})
    (wanted_grad,) = torch.autograd.grad(wanted.sum(), logits)
    for target_of in (target, torch.nn.functional.one_hot(target, 5).float()):
        with implementation(how):
            loss = case.call(logits, target_of, sample_weight=weight, reduction=reduction, **extras)
            (grad,) = torch.autograd.grad(loss.sum(), logits)
        torch.testing.assert_close(loss if reduction == "mean" else loss[kept], wanted)
        torch.testing.assert_close(grad[kept], wanted_grad[kept])
        assert grad[[2, 5]].eq(0).all()
        assert reduction == "mean" or loss[[2, 5]].eq(0).all()


def test_counts_of_rows_of_weight_0():
    logits, teacher_logits = torch.randn(4, 3), torch.randn(4, 3)
    counts = torch.tensor([[3, 1, 0], [0, 0, 2], [0, 0, 0], [0, 0, 0]])
    teacher_logits[2:] = torch.nan
    got = functional.dirichlet_map_loss(
        logits, counts, teacher_logits, sample_weight=torch.tensor([1.0, 1.0, 0.0, 0.0])
    )
    torch.testing.assert_close(got, functional.dirichlet_map_loss(logits[:2], counts[:2], teacher_logits[:2]))


def test_history_does_not_hear_of_rows_of_weight_0():
    criterion = softlabels.BetaSmoothingLoss(ranking="history", num_samples=3)
    soft = torch.rand(3, 4).softmax(1)
    criterion(torch.randn(3, 4), soft, sample_weight=torch.tensor([1.0, 0.0, 2.0]), index=torch.arange(3))
    assert criterion.history.doubt.isnan().tolist() == [False, True, False]


@by_teacher
@each_implementation
def test_a_teacher_of_nan_is_heard(case, how):
    """One nan makes its row nan, and what is normalised over rows; so does a teacher that overflowed."""
    logits, target = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    normalised = case.on.get("sample_weighting") == "normalized"
    for dead in (torch.nan, torch.inf):
        teacher_logits = torch.randn(4, 6)
        teacher_logits[1, 5] = dead
        if dead == torch.inf and (case.on.get("sample_weighting") == "exact" or "scale_student" in case.on):
            continue
        with implementation(how):
            loss = case.call(logits, target, teacher_logits=teacher_logits, reduction="none")
        assert loss.isnan().tolist() == [normalised, True, normalised, normalised]


@pytest.mark.parametrize("prune", [0.2, 0.5, 0.8])
def test_pruning_keeps_a_nan(prune):
    teacher_logits = torch.randn(3, 6)
    teacher_logits[1, 2] = torch.nan
    soft = functional.distillation_targets(torch.tensor([0, 1, 2]), teacher_logits, prune=prune)
    assert soft.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("read", [True, False])
def test_confidences_of_which_none_is_a_number(read):
    """There is nothing to rank by, so there is no loss; one number among them is enough."""
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, -100])
    confidence = torch.tensor([torch.nan, torch.nan, 1.0])  # the number is of an ignored row
    with pytest.MonkeyPatch.context() as patch:
        if not read:
            patch.setattr("softlabels.kernels.ordering.can_read", lambda *_: False)
        assert functional.beta_smoothing_loss(logits, target, confidence).isnan()
        confidence[0] = 0.0
        assert functional.beta_smoothing_loss(logits, target, confidence).isfinite()


@pytest.mark.parametrize("fill", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_teachers_masked_with_large_negative_numbers_are_masked(fill, dtype):
    logits, teacher_logits = torch.randn(6, 50, dtype=dtype), torch.randn(6, 50, dtype=dtype)
    target, masked = torch.randint(50, (6,)), torch.rand(6, 50) < 0.6
    for temperature in (1.0, 4.0):
        got, wanted = (
            functional.dirichlet_map_loss(
                logits, target, teacher_logits.masked_fill(masked, f), temperature=temperature
            )
            for f in (fill, -torch.inf)
        )
        torch.testing.assert_close(got, wanted)
    _, mass = functional.dirichlet_map_targets(target, teacher_logits.masked_fill(masked, fill), beta=1.0)
    torch.testing.assert_close((mass - 1.0).mean(), torch.tensor(1.0, dtype=dtype))


def test_labels_of_uint8_are_labels():
    logits, target = torch.randn(64, 256), torch.randint(256, (64,))
    narrow = target.to(torch.uint8)
    torch.testing.assert_close(log_odds(logits, narrow, "true_class"), log_odds(logits, target, "true_class"))
    for case in CASES:
        torch.testing.assert_close(case.call(logits, narrow), case.call(logits, target))  # and 156 is not -100
    criterion = softlabels.BetaSmoothingLoss(ranking="history", num_samples=2, rank_by="true_class")
    criterion(torch.randn(2, 200), torch.tensor([156, 3], dtype=torch.uint8), index=torch.arange(2))
    assert criterion.history.doubt.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_negative_label_counts(dtype):
    counts = torch.tensor([[2, 1, 0], [-100, -100, -100]]).to(dtype)
    logits, teacher_logits = torch.zeros(2, 3), torch.zeros(2, 3)
    for call in (
        lambda: softlabels.InstanceDirichletMAPLoss()(logits, counts, teacher_logits=teacher_logits),
        lambda: softlabels.InstanceDirichletMAPLoss().eval()(logits, counts),
        lambda: functional.dirichlet_map_targets(counts, teacher_logits),
    ):
        with pytest.raises(ValueError, match=r"label counts of at least 0 \(sample_weight=0 .*, got -100"):
            call()


@pytest.mark.parametrize(
    ("case", "off"),
    [
        *((case, False) for case in CASES),
        *((case, True) for case in {case.functional: case for case in CASES}.values()),
    ],
    ids=repr,
)
def test_labels_that_no_class_has_in_a_compiled_program(case, off):
    """Switched off, the options of a function make no difference."""
    torch.compiler.reset()
    logits, options = torch.randn(4, 3), {**(case.off if off else case.on), **case.extras(torch.randn(4, 3))}
    if "alpha" in options and not off:
        options["alpha"] = 0.0  # the label itself counts for nothing
    compiled = torch.compile(case.functional, backend="aot_eager")  # which drops what has no result
    compiled(logits, torch.tensor([0, 2, 1, -100]), **options)
    for label in (99, -7):
        with pytest.raises(Exception, match=r"class indices in \[0, 3\)|out of bounds"):
            compiled(logits, torch.tensor([0, label, 1, 1]), **options)


@each_loss
def test_options_are_checked_whenever_they_are_set(case):
    criterion = case.make()
    for name, value in case.on.items():
        if isinstance(value, str):
            with pytest.raises(ValueError, match=rf"{name} must be one of .*, got 'exakt'"):
                setattr(criterion, name, "exakt")
        elif not isinstance(value, bool):
            with pytest.raises(ValueError, match=rf"{name} must be in .*, got -1"):
                setattr(criterion, name, -1)
            with pytest.raises(TypeError, match=f"{name} must be a number, got 'much'"):
                setattr(criterion, name, "much")
        assert getattr(criterion, name) == value
    for name, value in (("reduction", "avg"), ("ignore_index", 0.5)):
        with pytest.raises((TypeError, ValueError), match=f"{name} must be .* got {value!r}"):
            setattr(criterion, name, value)


def test_options_of_beta_smoothing_set_later():
    criterion = softlabels.BetaSmoothingLoss(ranking="batch")
    for name, value in (("rank_by", "tru_class"), ("ranking", "emma"), ("ema_decay", 1.0), ("num_samples", 0)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            setattr(criterion, name, value)
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator"):
        criterion.generator = 3
    criterion.ranking = "history"
    with pytest.raises(
        RuntimeError, match=r"ranking='history' must be chosen, with num_samples, when the loss is made"
    ):
        criterion(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), index=torch.arange(4))


def test_fractions_are_numbers():
    logits, target, teacher_logits = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.randn(4, 3)
    got = functional.self_distillation_loss(
        logits, target, teacher_logits, alpha=Fraction(1, 4), temperature=Fraction(2)
    )
    wanted = functional.self_distillation_loss(logits, target, teacher_logits, alpha=0.25, temperature=2.0)
    torch.testing.assert_close(got, wanted)
    criterion = softlabels.SelfDistillationLoss(alpha=Fraction(1, 4), temperature=Fraction(2))
    torch.testing.assert_close(criterion(logits, target, teacher_logits=teacher_logits), wanted)
    assert repr(criterion) == "SelfDistillationLoss(alpha=0.25, temperature=2.0)"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning")
@whole_graph
def test_export_with_any_number_of_rows():
    logits, target, rows = torch.randn(6, 4), torch.randint(4, (6,)), torch.export.Dim("rows")
    criterion = softlabels.LabelSmoothingMAPLoss(beta=0.2)
    shapes = {"input": {0: rows}, "target": {0: rows}}
    program = torch.export.export(criterion, (logits, target), dynamic_shapes=shapes).module()
    logits, target = torch.randn(9, 4), torch.randint(4, (9,))
    torch.testing.assert_close(program(logits, target), criterion(logits, target))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("ranked", [True, False])
def test_beta_smoothing_is_traced(ranked):
    logits, target, confidence = torch.randn(6, 4), torch.randint(4, (6,)), torch.rand(6) if ranked else None

    def loss(logits, target):
        return functional.beta_smoothing_loss(logits, target, confidence)

    traced = torch.jit.trace(loss, (logits, target), check_trace=False)
    torch.manual_seed(0)
    got = traced(logits, target)
    torch.manual_seed(0)
    torch.testing.assert_close(got, loss(logits, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(dtype):
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        criterion = softlabels.BetaSmoothingLoss(ranking="history", num_samples=4)
        soft = functional.beta_smoothing_targets(torch.tensor([0, 1]), 3)
    finally:
        torch.set_default_dtype(default)
    assert criterion.history.doubt.dtype == soft.dtype == torch.float32
    criterion(torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0]), index=torch.arange(4)).backward()


REENTRANT = [
    softlabels.BetaSmoothingLoss(ranking="random"),
    softlabels.SelfDistillationLoss(),
    softlabels.InstanceDirichletMAPLoss(),
]


@pytest.mark.parametrize("criterion", REENTRANT, ids=lambda c: type(c).__name__)
def test_a_reentrant_checkpoint_is_refused(criterion):
    """Its forward pass has no grad, so the loss would be that of evaluation, and train something else."""
    logits, target = torch.randn(8, 5, requires_grad=True), torch.randint(5, (8,))
    with pytest.raises(RuntimeError, match=r"inside torch\.utils\.checkpoint with use_reentrant=True"):
        checkpoint(lambda x: criterion(x, target), logits, use_reentrant=True)
    with torch.no_grad():
        criterion(logits, target)  # plain evaluation


def test_checkpoints_that_are_not_reentrant():
    """The recomputation draws the same; what cannot is refused before anything moves."""
    logits, target, index = torch.randn(8, 5, requires_grad=True), torch.randint(5, (8,)), torch.arange(8)
    criterion = softlabels.BetaSmoothingLoss(ranking="batch")
    torch.manual_seed(0)
    (wanted,) = torch.autograd.grad(criterion(logits, target), logits)
    torch.manual_seed(0)
    loss = checkpoint(lambda x: criterion(x, target), logits, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], wanted)
    drawn = softlabels.BetaSmoothingLoss(ranking="batch", generator=torch.Generator().manual_seed(0))
    history = softlabels.BetaSmoothingLoss(ranking="history", num_samples=8)
    before = drawn.generator.get_state()
    for refused, arguments in ((drawn, {}), (history, {"index": index})):
        with pytest.raises(RuntimeError, match=r"inside torch\.utils\.checkpoint, which calls it again"):
            checkpoint(lambda x, c=refused, a=arguments: c(x, target, **a), logits, use_reentrant=False)
    assert torch.equal(drawn.generator.get_state(), before)
    assert history.history.doubt.isnan().all()


class Sharded(torch.Tensor):
    """Looks like a DTensor."""

    def full_tensor(self):
        return torch.Tensor(self)


@each_loss
def test_distributed_tensors_are_refused_in_one_sentence(case):
    logits, target, weight = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.ones(4)
    for name in ("input", "target", "sample_weight", "weight", case.argument):
        given = {"input": logits, "target": target, "sample_weight": weight, "weight": torch.ones(3)}
        if case.argument is not None:
            given |= case.extras(logits)
        if name is not None:
            given[name] = given[name].as_subclass(Sharded)
            with pytest.raises(TypeError, match=rf"{name} is a DTensor, .* pass {name}\.full_tensor\(\)"):
                case.functional(given.pop("input"), given.pop("target"), **given, **case.on)


@by_teacher
def test_probabilities_in_the_place_of_teacher_logits(case):
    """A warning; and their logarithm is exact at temperature 1, as it says."""
    logits, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    p = torch.rand(4, 5).softmax(1)
    with pytest.warns(UserWarning, match=r"look like probabilities.* teacher_logits=probabilities\.log\(\)"):
        case.call(logits, target, teacher_logits=p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for harmless in (torch.rand(4, 5), p - 0.1, p.log(), torch.ones(4, 5)):
            case.call(logits, target, teacher_logits=harmless)
    soft = functional.distillation_targets(target, p.log(), alpha=0.0, temperature=1.0)
    torch.testing.assert_close(soft, p)
