"""Where a loss is switched off it is nn.CrossEntropyLoss: in value, gradient, and in what it rejects."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from versions import OLDEST_TORCH, TORCH

SHAPES = [
    (5,),  # a single row
    (7, 5),  # a batch; 7 is no multiple of a vector width
    (3, 5, 4),  # a sequence
    (2, 5, 3, 2),  # an image
]
IGNORE = [-100, 1, 7777]  # the default, a class that occurs, a number that never occurs


def make_call(shape, target_kind, with_weight, ignore_index, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    num_classes = shape[0 if len(shape) == 1 else 1]
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    if target_kind == "index":
        target = torch.randint(num_classes, rows, generator=generator)
        if ignore_index == -100 and target.numel() > 1:
            target.view(-1)[1] = -100
    else:
        target = torch.rand(shape, generator=generator, dtype=torch.float64).softmax(min(len(shape) - 1, 1)).to(dtype)
    weight = torch.rand(num_classes, generator=generator, dtype=torch.float64).to(dtype) if with_weight else None
    return logits, target, {"weight": weight, "ignore_index": ignore_index}


def value_and_grad(loss, logits, *args, **kwargs):
    logits = logits.clone().requires_grad_()
    value = loss(logits, *args, **kwargs)
    cotangent = torch.arange(1, value.numel() + 1, dtype=torch.float64).view(value.shape)  # "none": rows differ
    (grad,) = torch.autograd.grad(value, logits, cotangent.to(value.dtype))
    return value.detach(), grad


GRID = list(itertools.product(SHAPES, ["index", "probabilities"], [False, True], IGNORE))


@pytest.mark.parametrize("form", ["functional", "module"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_switched_off_equals_cross_entropy(case, reduction, form):
    ours = case.call if form == "functional" else case.call_module
    for shape, kind, with_weight, ignore_index in GRID:
        logits, target, options = make_call(shape, kind, with_weight, ignore_index)
        options["reduction"] = reduction
        if kind == "probabilities" and ignore_index >= 0:
            for loss, extra in ((F.cross_entropy, {}), (ours, {"off": True})):
                with pytest.raises(RuntimeError, match="ignore_index"):
                    loss(logits, target, **options, **extra)
            continue
        if target.numel() == 1 and target.dtype == torch.int64 and target.item() == ignore_index:
            continue  # everything ignored: torch gives nan, ours gives 0 (tested elsewhere)
        wanted, wanted_grad = value_and_grad(F.cross_entropy, logits, target, **options)
        got, got_grad = value_and_grad(ours, logits, target, off=True, **options)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got_grad, wanted_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_no_further_from_the_truth_than_torch(case, dtype):
    """Truth in float64 of the same rounded numbers; torch in the dtype; ours in the dtype, plus half a rounding."""
    half_rounding = torch.finfo(dtype).eps / 2
    for (shape, kind, with_weight, ignore_index), reduction in itertools.product(GRID, ["mean", "sum", "none"]):
        if kind == "probabilities" and ignore_index >= 0:
            continue
        logits, target, options = make_call(shape, kind, with_weight, ignore_index, dtype, seed=1)
        options["reduction"] = reduction
        exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        exact_target = target.double() if kind == "probabilities" else target
        if (kind == "index") and bool((target == ignore_index).all()):
            continue
        truth, truth_grad = value_and_grad(F.cross_entropy, logits.double(), exact_target, **exact)
        torchs, torchs_grad = value_and_grad(F.cross_entropy, logits, target, **options)
        ours, ours_grad = value_and_grad(case.call, logits, target, off=True, **options)
        assert ours.dtype == torch.float32
        assert ours_grad.dtype == dtype
        fp32 = 8 * torch.finfo(torch.float32).eps  # a handful of float32 operations
        for got, peer, true, rounding in (
            (ours, torchs, truth, fp32),
            (ours_grad, torchs_grad, truth_grad, half_rounding + fp32),
        ):
            error = (got.double() - true).abs().max()
            assert error <= (peer.double() - true).abs().max() + rounding * true.abs().max()


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_weight_of_another_dtype_is_accepted(case):
    logits, target, options = make_call((7, 5), "index", True, -100, torch.float32)
    wanted = case.call(logits, target, **options)
    got = case.call(logits, target, **{**options, "weight": options["weight"].double()})
    torch.testing.assert_close(got, wanted)
    half = case.call(logits.half(), target, weight=torch.ones(5))
    assert half.dtype == torch.float32


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3])
MALFORMED = {
    "int32 target": (X, Y.int(), {}),
    "int16 target": (X, Y.short(), {}),
    "bool target": (X, Y.bool(), {}),
    "float target": (X, Y.float(), {}),
    "label too large": (X, torch.tensor([0, 1, 2, 5]), {}),
    "label negative": (X, torch.tensor([0, 1, 2, -1]), {}),
    "label too large, dense": (torch.randn(2, 3, 2), torch.tensor([[0, 3], [1, 1]]), {}),
    "label too large, single": (X[0], torch.tensor(7), {}),
    "label too large, weight": (X, torch.tensor([0, 1, 2, 5]), {"weight": torch.ones(5)}),
    "batch too small": (X, Y[:3], {}),
    "batch too large": (X[:3], Y, {}),
    "scalar target": (X, Y[0], {}),
    "column target": (X, Y.view(4, 1), {}),
    "square target": (X, Y.view(2, 2), {}),
    "dense, other size": (torch.randn(4, 5, 3), torch.zeros(4, 2, dtype=torch.long), {}),
    "dense, no spatial": (torch.randn(4, 5, 3), Y, {}),
    "dense, other batch": (torch.randn(4, 5, 3), torch.zeros(3, 3, dtype=torch.long), {}),
    "single, two labels": (X[0], Y[:2], {}),
    "single, column": (X[0], Y[:1].view(1, 1), {}),
    "scalar input": (torch.tensor(1.0), torch.tensor(0), {}),
    "probabilities, other shape": (X, torch.rand(4, 6), {}),
    "probabilities, transposed": (X, torch.rand(5, 4), {}),
    "probabilities, complex": (X, X.softmax(1) + 0j, {}),
    "probabilities with ignore_index": (X, X.softmax(1), {"ignore_index": 2}),
    "weight too short": (X, Y, {"weight": torch.ones(4)}),
    "weight too long": (X, Y, {"weight": torch.ones(6)}),
    "weight too short, probabilities": (X, X.softmax(1), {"weight": torch.ones(4)}),
    "weight 2-D": (X, Y, {"weight": torch.ones(5, 1)}),
    "weight scalar": (X, Y, {"weight": torch.tensor(1.0)}),
    "weight whole numbers": (X, Y, {"weight": torch.ones(5, dtype=torch.long)}),
    "weight list": (X, Y, {"weight": [1.0] * 5}),
    "bad reduction": (X, Y, {"reduction": "batchmean"}),
    "no reduction": (X, Y, {"reduction": None}),
    "ignore_index float": (X, Y, {"ignore_index": 1.5}),
    "ignore_index None": (X, Y, {"ignore_index": None}),
    "whole-number logits": (torch.ones(4, 5, dtype=torch.long), Y, {}),
    "complex logits": (X + 0j, Y, {}),
    "target list": (X, [0, 1, 2, 3], {}),
    "input list": ([[0.0, 1.0]], Y[:1], {}),
    "no classes": (torch.randn(4, 0), Y, {}),
    "target on another device": (X, Y.to("meta"), {}),
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("case", [c for c in CASES if "-" not in c.name or c.name == "dirichlet_map-none"], ids=repr)
def test_raises_what_torch_raises(case, name):
    if name == "single, two labels" and TORCH < OLDEST_TORCH:
        pytest.skip("an older torch raises RuntimeError here")
    logits, target, options = MALFORMED[name]
    with pytest.raises(Exception) as torchs:  # noqa: PT011 - whatever torch raises is what we want
        F.cross_entropy(logits, target, **options)
    extras = {}
    if not isinstance(logits, torch.Tensor):
        extras = {case.argument: torch.zeros(1, 2)} if case.argument else {}
        form = case.functional
        call = lambda: form(logits, target, **{**case.on, **extras, **options})  # noqa: E731
    else:
        call = lambda: case.call(logits, target, **options)  # noqa: E731
    with pytest.raises(torchs.type) as ours:
        call()
    names = ("input", "target", "weight", "reduction", "ignore_index", "class probabilities", "teacher_logits")
    assert any(word in str(ours.value) for word in names), str(ours.value)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_whole_numbers_in_the_shape_of_the_logits(case):
    counts = torch.ones(4, 5, dtype=torch.long)
    if case.counts:
        torch.testing.assert_close(case.call(X, counts), case.call(X, counts.float()))
    else:
        with pytest.raises(RuntimeError, match="floating dtype"):
            case.call(X, counts)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_constructor_rejects_what_it_can_know(case):
    with pytest.raises(ValueError, match=r"reduction must be .* got 'batchmean'"):
        case.make(reduction="batchmean")
    with pytest.raises(TypeError, match=r"ignore_index must be an int, got 0\.5"):
        case.make(ignore_index=0.5)
    with pytest.raises(RuntimeError, match=r"weight .* shape \(2, 2\)"):
        case.make(weight=torch.ones(2, 2))
    with pytest.raises(TypeError, match="weight must be a Tensor"):
        case.make(weight=[1.0])
    for name in case.on:
        wrong = "nonsense" if name != "scale_student" else None
        if wrong is not None:
            with pytest.raises((TypeError, ValueError), match=name):
                case.make(**{name: wrong})


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_positional_weight_as_in_torch(case):
    weight = torch.rand(5)
    options = {**case.on, **case.random()}
    assert case.module(weight, **options).weight is weight
