"""The choice of backend, and what the kernels allocate."""

from __future__ import annotations

import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from cases import CASES, calls
from hypothesis import given
from implementations import implementation
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import softlabels
from softlabels import functional
from softlabels.kernels import Even, Given, Label, Prediction, SoftLabel, eager, ordering

each_loss = pytest.mark.parametrize("case", CASES, ids=repr)


@pytest.fixture(autouse=True, params=["closed", "few"], ids=["closed form", "few logits"])
def chosen(request):
    """Everything here holds on both sides of the number of logits from which on the closed forms are worth it."""
    with implementation(request.param):
        yield request.param


once = pytest.mark.parametrize("chosen", ["closed"], indirect=True)  # what chooses for itself, or does not ask


class LargeTensors(TorchDispatchMode):
    """Names of the operations that make a tensor with the given number of elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(result, torch.Tensor) and result.numel() == self.numel and name != "detach":
            self.names.append(name)
        return result


@pytest.mark.parametrize(("dtype", "in_forward"), [(torch.float32, ["empty_like"]), (torch.bfloat16, [])])
def test_nothing_of_the_size_of_the_logits_but_their_gradient(dtype, in_forward, monkeypatch):
    """In full precision the forward pass leaves the gradient; in half precision the backward pass makes it."""
    monkeypatch.setattr(eager, "IN_PLACE_BLOCK", eager.BLOCK)
    rows, num_classes = 64, 2**15  # two blocks of rows
    logits = torch.randn(rows, num_classes, dtype=dtype).requires_grad_()
    target, teacher_logits = torch.randint(num_classes, (rows,)), torch.randn(rows, num_classes).to(dtype)
    for loss in (
        lambda: functional.beta_smoothing_loss(logits, target, torch.rand(rows)),
        lambda: functional.self_distillation_loss(logits, target, teacher_logits),
    ):
        with LargeTensors(logits.numel()) as large:
            result = loss()
        assert large.names == in_forward
        with LargeTensors(logits.numel()) as large:
            torch.autograd.grad(result, logits)
        assert large.names == ([] if in_forward else ["empty_like"])
        with LargeTensors(logits.numel()) as large, torch.no_grad():
            loss()
        assert large.names == []


@once
@each_loss
@pytest.mark.parametrize("how", ["closed", "blocks", "far"])
@given(call=calls())
def test_closed_forms_equal_the_formula(case, how, call):
    """At once, in blocks of rows, and where logits are far from 0."""
    logits, target, options = call
    logits.requires_grad_()

    def value_and_gradient():
        loss = case.call(logits, target, **options)
        incoming = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        return loss.detach(), torch.autograd.grad(loss, logits, incoming)[0]

    with implementation(how):
        value, gradient = value_and_gradient()
    with implementation("formula"):
        wanted, wanted_gradient = value_and_gradient()
    assert value.shape == wanted.shape
    torch.testing.assert_close(value, wanted)
    exact = {"rtol": 1e-5, "atol": 2e-6} if logits.dtype == torch.float32 else {}
    torch.testing.assert_close(gradient, wanted_gradient, **exact)


@pytest.mark.parametrize("shift", [0.0, 16.0, 1e4, -1e5])
def test_a_constant_added_to_the_logits_costs_no_precision(shift):
    logits = 4 * torch.randn(9, 33, dtype=torch.float64)
    logits = (logits * 64).round() / 64  # so that float32 holds logits + shift exactly
    target = torch.randint(33, (9,))
    wanted = functional.label_smoothing_map_loss(logits, target, beta=0.2)
    got = functional.label_smoothing_map_loss((logits + shift).float().requires_grad_(), target, beta=0.2)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0)


TERMS = {
    "label": lambda x, rows, weight: Label(rows, torch.tensor([0, 1, 2, 0])),
    "even": lambda x, rows, weight: Even(rows),
    "even, number": lambda x, rows, weight: Even(0.3),
    "even, class weights": lambda x, rows, weight: Even(rows, class_weight=weight),
    "given": lambda x, rows, weight: Given(0.6, (2 * x).softmax(1)),
    "given, class weights": lambda x, rows, weight: Given(rows, x.softmax(1), class_weight=weight),
    "prediction": lambda x, rows, weight: Prediction(0.6, 3 * x, 2.0),
    "prediction, per row": lambda x, rows, weight: Prediction(rows, 3 * x),
    "prediction, kept": lambda x, rows, weight: Prediction(0.6, 3 * x, keep=2),
    "prediction, below": lambda x, rows, weight: Prediction(rows, 3 * x, 2.0, shift=-0.1),
    "prediction, above": lambda x, rows, weight: Prediction(rows, 3 * x, 2.0, shift=0.1),
    "prediction, class weights": lambda x, rows, weight: Prediction(rows, 3 * x, class_weight=weight),
}


@once
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("make", TERMS.values(), ids=TERMS)
def test_the_three_answers_of_a_term_agree(make, dense):
    """Its mass and its inner product are those of what it adds, with care and without, in place and not."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((4, 5, 2) if dense else (4, 5), generator=generator, dtype=torch.float64)
    rows = torch.rand(x.select(1, 0).shape, generator=generator, dtype=torch.float64)
    weight = torch.rand(5, generator=generator, dtype=torch.float64)
    term = make(x, rows, weight)
    if dense and isinstance(term, Label):
        term.index = torch.stack([term.index] * 2, 1)
    soft = SoftLabel([term], 1.0).dense(x)
    for possible in (None, torch.ones_like(x, dtype=torch.bool)):
        mass = torch.as_tensor(term.mass(x, possible), dtype=x.dtype).expand(rows.shape)
        torch.testing.assert_close(mass, soft.sum(1))
        torch.testing.assert_close(term.inner(x, possible), (soft * x).sum(1))
    for factor in (-0.5, -2 * rows):
        for scale in (1.0, 3.0, rows):
            column = [v.unsqueeze(1) if isinstance(v, torch.Tensor) else v for v in (scale, factor)]
            wanted = column[0] * x + column[1] * soft
            torch.testing.assert_close(term.add_to(x, factor, scale), wanted)
            mine = x.clone()
            assert term.add_to(mine, factor, scale, in_place=True) is mine
            torch.testing.assert_close(mine, wanted)
    torch.testing.assert_close(SoftLabel([term.rows(slice(1, 3))], 1.0).dense(x[1:3]), soft[1:3])


def test_the_gradient_is_handed_over():
    """What was handed to the user is the user's: writing into it changes no later gradient."""
    logits, target = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 0, 1])
    loss = functional.label_smoothing_map_loss(logits, target, beta=0.2)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()
    for factor in (1.0, 3.0):
        (again,) = torch.autograd.grad(loss, logits, torch.tensor(factor), retain_graph=True)
        torch.testing.assert_close(again, factor * kept)
    (half,) = torch.autograd.grad(0.5 * functional.label_smoothing_map_loss(logits, target, beta=0.2), logits)
    torch.testing.assert_close(half, 0.5 * kept)


def test_a_target_changed_before_a_second_backward_pass_is_noticed(chosen):
    logits, target = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 0, 1])
    loss = functional.label_smoothing_map_loss(logits, target, beta=0.2)
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    target[0] = 2
    if chosen == "few":  # the soft labels were built in the forward pass
        loss.backward()
        torch.testing.assert_close(logits.grad, 2 * once)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_half_precision_gradients_are_rounded_after_they_are_scaled(scale):
    """1 / N of a small probability is below float16's least number until a GradScaler has multiplied it."""
    logits = torch.full((4096, 2), 0.0).half()
    logits[:, 0] = 12.0
    target = torch.zeros(4096, dtype=torch.long)

    def gradient(logits):
        logits.requires_grad_()
        (grad,) = torch.autograd.grad(scale * functional.label_smoothing_map_loss(logits, target, beta=0.0), logits)
        return grad

    torch.testing.assert_close(gradient(logits), gradient(logits.detach().float()).half(), rtol=2e-3, atol=6e-8)


def test_weights_that_learn_get_their_gradient():
    """Learning to reweight (Ren et al., 2018) starts from weights of 0."""
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    weights = torch.zeros(5, requires_grad=True)
    for reduction in ("sum", "none"):
        loss = functional.label_smoothing_map_loss(
            logits, target, beta=0.2, sample_weight=weights, reduction=reduction
        ).sum()
        (grad,) = torch.autograd.grad(loss, weights)
        wanted = functional.label_smoothing_map_loss(logits, target, beta=0.2, reduction="none")
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_incoming_gradients_at_once(dtype):
    logits, target = torch.randn(5, 3).to(dtype).requires_grad_(), torch.tensor([0, 1, 2, 0, 1])

    def losses(logits):
        return functional.label_smoothing_map_loss(logits, target, beta=0.2, reduction="none")

    wanted = torch.autograd.functional.jacobian(losses, logits)
    torch.testing.assert_close(torch.autograd.functional.jacobian(losses, logits, vectorize=True), wanted)
    factors = torch.tensor([1.0, -2.0])
    (many,) = torch.autograd.grad(losses(logits).sum(), logits, factors, is_grads_batched=True)
    torch.testing.assert_close(many, factors.view(2, 1, 1).to(dtype) * wanted.sum(0))


def test_forward_mode_differentiation():
    logits, target, tangent = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]), torch.randn(5, 3)

    def loss(logits):
        return functional.label_smoothing_map_loss(logits, target, beta=0.2)

    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(loss(forward_ad.make_dual(logits, tangent))).tangent
    torch.testing.assert_close(got, (torch.func.grad(loss)(logits) * tangent).sum())


@once
def test_backend_can_be_chosen_three_ways():
    assert softlabels.get_backend() == "auto"
    with softlabels.backend("eager"):
        assert softlabels.get_backend() == "eager"
        with pytest.raises(ZeroDivisionError), softlabels.backend("auto"):
            1 / 0  # noqa: B018
        assert softlabels.get_backend() == "eager"
    assert softlabels.get_backend() == "auto"
    with pytest.raises(ValueError, match="name must be one of 'auto', 'eager', 'compile', got 'cuda'"):
        softlabels.set_backend("cuda")
    code = "import softlabels; print(softlabels.get_backend())"
    for value, wanted in (
        ("eager", "eager"),
        ("fast", "SOFTLABELS_BACKEND must be one of 'auto', 'eager', 'compile', got 'fast'"),
    ):
        run = subprocess.run(
            [sys.executable, "-c", code], env={"SOFTLABELS_BACKEND": value}, capture_output=True, text=True
        )
        assert wanted in run.stdout + run.stderr


@once
def test_pruning_keeps_the_lower_index_among_equals():
    teacher_logits = torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    wanted = [[True, True, False, False], [True, True, False, False]]
    assert (ordering.prune(teacher_logits, 2) > -torch.inf).tolist() == wanted
    with patch.object(ordering, "can_read", return_value=False):
        assert (ordering.prune(teacher_logits, 2) > -torch.inf).tolist() == wanted


def smoothed(logits, target=None, **options):
    target = torch.tensor([0, 1, 2, 0]) if target is None else target
    return functional.label_smoothing_map_loss(logits, target, beta=0.2, **options)


@pytest.mark.filterwarnings("ignore:.*create_graph=True will create a reference cycle")
@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks_on_the_logits_run_once(create_graph):
    x = torch.randn(4, 3, requires_grad=True)
    logits = x * 1
    logits.register_hook(lambda gradient: 2 * gradient)
    logits.retain_grad()
    smoothed(logits).backward(create_graph=create_graph, inputs=[x, logits])
    (wanted,) = torch.autograd.grad(smoothed(x), x)
    torch.testing.assert_close(x.grad, 2 * wanted)
    torch.testing.assert_close(logits.grad, 2 * wanted)


def test_teachers_and_labels_of_inference_mode():
    logits = torch.randn(4, 3, requires_grad=True)
    with torch.inference_mode():
        teacher_logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    for options in ({"temperature": 1.0}, {"reduction": "sum"}):
        functional.self_distillation_loss(logits, target, teacher_logits, **options).backward()
    with torch.inference_mode():
        assert smoothed(logits).isfinite()


def test_ignored_rows_and_classes_of_infinite_weight():
    """Inverse frequencies, where class 0 occurs nowhere."""
    weight, target = torch.tensor([torch.inf, 1.0, 1.0]), torch.tensor([1, 2, -100, 1])
    logits = torch.randn(4, 3, requires_grad=True)
    wanted = torch.nn.functional.cross_entropy(logits, target, weight)
    for loss in (functional.label_smoothing_map_loss, functional.confidence_penalty_loss):
        torch.testing.assert_close(loss(logits, target, beta=0.0, weight=weight), wanted)


def test_rows_of_no_weight_may_be_junk():
    sample_weight = torch.tensor([1.0, 0.0, 1.0, 1.0])
    target = torch.rand(4, 3).softmax(1)
    target[1] = torch.nan
    logits = torch.randn(4, 3, requires_grad=True)
    assert smoothed(logits, target, sample_weight=sample_weight).isfinite()
    loss = functional.dirichlet_map_loss(
        logits, torch.tensor([0, 1, 2, 0]), target, sample_weighting="exact", sample_weight=sample_weight
    )
    assert loss.isfinite()


def test_weights_count_by_their_ratio_however_small():
    logits = torch.randn(4, 3)
    torch.testing.assert_close(smoothed(logits, sample_weight=torch.full((4,), 1e-38)), smoothed(logits))


def test_a_loss_scale_with_many_incoming_gradients_in_half_precision():
    logits = torch.randn(4, 3).half().requires_grad_()
    loss, scales = smoothed(logits), torch.tensor([65536.0])
    (many,) = torch.autograd.grad(loss, logits, scales, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(loss, logits, scales[0])
    torch.testing.assert_close(many[0], one)


def test_forward_mode_through_a_backward_pass():
    logits = torch.randn(4, 3, requires_grad=True)
    loss = smoothed(logits)
    (wanted,) = torch.autograd.grad(loss, logits, retain_graph=True)
    with forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(loss, logits, forward_ad.make_dual(torch.tensor(1.0), torch.tensor(1.0)))
        torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracers_see_the_formula():
    """Also that rows may be ignored, though none is while they trace."""
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, -100, 0])
    seen = logits, target.clamp(min=0)

    def loss(logits, target):
        return smoothed(logits, target)

    for traced in (make_fx(loss)(*seen), torch.jit.trace(loss, seen)):
        torch.testing.assert_close(traced(logits, target), smoothed(logits, target))


def test_confidences_and_teachers_that_numpy_does_not_know():
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    negative = torch.randn(4, 3, dtype=torch.cfloat).conj().imag  # a view with a negative bit
    assert functional.beta_smoothing_loss(logits, target, negative[:, 0]).isfinite()
    for teacher_logits in (negative, negative.bfloat16(), negative.half()):
        pruned = functional.pruned_distillation_loss(logits, target, teacher_logits)
        torch.testing.assert_close(
            pruned, functional.pruned_distillation_loss(logits, target, teacher_logits.float().clone())
        )
