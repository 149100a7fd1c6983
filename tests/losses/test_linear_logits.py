"""LinearLogits stand for logits: values and gradients are those of the dense computation, which is never made."""

from __future__ import annotations

import copy
import warnings

import cases
import processes
import pytest
import torch
import torch.distributed as dist
from cases import CASES
from implementations import IMPLEMENTATIONS, implementation
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from versions import compile_backend, fsdp2, whole_graph

import softlabels
from softlabels import LinearLogits, functional
from softlabels.kernels import linear

ROWS, WIDTH, CLASSES = 13, 5, 17
BY_NAME = {case.name: case for case in CASES}


def layer(rows=ROWS, dtype=torch.float64, shape=None, seed=0):
    """Input, weight and bias; logits of a wide range."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 2 * torch.randn(*(shape or (rows,)), WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(CLASSES, generator=generator, dtype=torch.float64)
    return [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]


def common(rows, **which):
    """Options of all losses, as a test asks for them."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(CLASSES, (rows,), generator=generator)
    options = {}
    if "ignored" in which:
        target[torch.rand(rows, generator=generator) < which["ignored"]] = -100
    if "weight" in which:
        options["weight"] = torch.rand(CLASSES, generator=generator, dtype=torch.float64)
    if "sample_weight" in which:
        options["sample_weight"] = torch.rand(rows, generator=generator, dtype=torch.float64)
    return target, options


def gradients(loss, tensors, incoming=None):
    return torch.autograd.grad(loss, tensors, incoming)


def check(case, rows, block, reduction, **which):
    target, options = common(rows, **which)
    tensors = layer(rows)
    logits = LinearLogits(*tensors, block=block)
    dense = logits.dense()
    extras = case.extras(dense)
    expected = case.call(dense, target, reduction=reduction, **options, **extras)
    actual = case.call(logits, target, reduction=reduction, **options, **extras)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        actual.detach(), cases.expected(case, dense, target, reduction=reduction, **options), rtol=1e-9, atol=1e-10
    )
    incoming = torch.randn_like(expected)
    torch.testing.assert_close(
        gradients(actual, tensors, incoming), gradients(expected, tensors, incoming), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_as_dense(case, reduction):
    check(case, ROWS, 4, reduction)
    check(case, ROWS, 4, reduction, ignored=0.4, weight=True, sample_weight=True)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize(("rows", "block", "ignored"), [(12, 4, 0.0), (1, None, 0.0), (0, None, 0.0), (9, 3, 1.0)])
def test_any_number_of_rows(case, rows, block, ignored):
    check(case, rows, block, "sum", ignored=ignored)


def test_rows_that_do_not_count_are_not_computed():
    """Neither ignored rows nor those of weight 0, whatever they hold; also where all logits are computed at once."""
    case = BY_NAME["label_smoothing_map"]
    target, _ = common(ROWS)
    target[::3] = -100
    sample_weight = torch.ones(ROWS, dtype=torch.float64)
    sample_weight[1::3] = 0.0
    hidden, weight, bias = layer()
    clean = gradients(
        case.call(LinearLogits(hidden[2::3], weight, bias), target[2::3], reduction="sum"), [hidden, weight, bias]
    )
    with torch.no_grad():
        hidden[::3] = torch.nan
        hidden[1::3] = torch.inf
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
                seen.append(max(a.shape[0] for a in args))
            return func(*args, **(kwargs or {}))

    for create_graph in (False, True):
        with Watch():
            loss = case.call(LinearLogits(hidden, weight, bias), target, reduction="sum", sample_weight=sample_weight)
            found = torch.autograd.grad(loss, [hidden, weight, bias], create_graph=create_graph)
        torch.testing.assert_close(found, clean)
    assert seen


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_the_truth_than_a_plain_layer(case, dtype):
    rows = 96
    target, _ = common(rows)
    tensors = layer(rows, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    extras = case.extras(torch.empty(rows, CLASSES, dtype=torch.float64))
    truth = gradients(case.call(LinearLogits(*exact).dense(), target, **extras), exact)
    extras = {name: tensor.to(dtype) for name, tensor in extras.items()}
    plain = gradients(case.call(LinearLogits(*tensors).dense(), target, **extras), tensors)
    loss = case.call(LinearLogits(*tensors, block=32), target, **extras)
    assert loss.dtype == torch.float32
    for ours, theirs, true in zip(gradients(loss, tensors), plain, truth, strict=True):
        assert ours.dtype == dtype
        rounding = (true.to(dtype) - true).norm()  # of 17 numbers, the last rounding is a matter of luck
        assert (ours - true).norm() <= 1.02 * (theirs - true).norm() + 0.2 * rounding


def test_a_scaled_loss_keeps_small_gradients_in_half_precision():
    """As GradScaler asks for: of 2^20 rows, a gradient divided by their number would be 0 in float16."""
    case = BY_NAME["label_smoothing_map"]
    target, _ = common(ROWS)
    tensors = layer(dtype=torch.float16)
    loss = case.call(LinearLogits(*tensors), target, reduction="sum") / 2**20
    scaled = gradients(loss * 2**20, tensors)
    plain = gradients(case.call(LinearLogits(*tensors), target, reduction="sum"), tensors)
    mean = case.call(LinearLogits(*tensors), target, reduction="mean", sample_weight=torch.full((ROWS,), 2.0**-20))
    torch.testing.assert_close(scaled, plain)
    torch.testing.assert_close(gradients(ROWS * mean, tensors), plain, rtol=1e-2, atol=1e-2)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_never_more_than_a_block_of_logits(case, reduction):
    rows = 64
    target, _ = common(rows)
    tensors = layer(rows)
    extras = case.extras(LinearLogits(*tensors))
    if "teacher_logits" in extras:
        extras = {"teacher_logits": LinearLogits(*layer(rows, seed=3), block=8)}
    with Largest() as largest:
        loss = case.functional(
            LinearLogits(*tensors, block=8), target, reduction=reduction, **extras, **case.on, **case.random()
        )
        loss.sum().backward()
    assert largest.numel <= max(tensor.numel() for tensor in tensors) < rows * CLASSES
    with Largest() as largest:  # the probe can fail
        case.call(LinearLogits(*tensors).dense(), target, **case.extras(LinearLogits(*tensors)))
    assert largest.numel == rows * CLASSES


@pytest.mark.parametrize("name", [case.name for case in CASES if case.argument == "teacher_logits"])
@pytest.mark.parametrize("student", ["linear", "dense"])
def test_a_teacher_in_blocks_says_what_all_its_logits_say(name, student):
    case = BY_NAME[name]
    target, _ = common(ROWS, ignored=0.3)
    tensors, teacher = layer(), LinearLogits(*layer(seed=3), block=5)
    for reduction in ("mean", "none"):
        logits = LinearLogits(*tensors, block=4) if student == "linear" else LinearLogits(*tensors).dense()
        actual = case.call(logits, target, teacher_logits=teacher, reduction=reduction)
        expected = case.call(
            LinearLogits(*tensors).dense(), target, teacher_logits=teacher.dense(), reduction=reduction
        )
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        incoming = torch.randn_like(expected)
        torch.testing.assert_close(gradients(actual, tensors, incoming), gradients(expected, tensors, incoming))


@pytest.mark.parametrize("way", [*IMPLEMENTATIONS, pytest.param("compiled", marks=compile_backend)])
@pytest.mark.parametrize("name", ["self_distillation", "pruned_distillation", "dirichlet_map-normalized"])
def test_every_implementation_takes_a_dense_student_and_a_layer_of_the_teacher(name, way):
    case = BY_NAME[name]
    target, _ = common(ROWS, ignored=0.3)
    teacher = LinearLogits(*layer(seed=3), block=5)
    student = LinearLogits(*layer()).dense().detach().requires_grad_()
    expected = case.call(student, target, teacher_logits=teacher.dense())
    context = implementation("closed" if way == "compiled" else way)
    with context, softlabels.backend("compile" if way == "compiled" else "eager"):
        actual = case.call(student, target, teacher_logits=teacher)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients(actual, student), gradients(expected, student), rtol=1e-10, atol=1e-10)


def test_a_dense_student_has_its_teacher_in_blocks():
    rows = 16
    target, _ = common(rows)
    student, teacher = torch.randn(rows, CLASSES, requires_grad=True), LinearLogits(*layer(rows, torch.float32, seed=3))
    computed = []
    product = linear.linear
    with pytest.MonkeyPatch.context() as patched, implementation("blocks"):
        patched.setattr(linear, "linear", lambda h, *layer: computed.append(len(h)) or product(h, *layer))
        functional.self_distillation_loss(student, target, teacher).backward()
    assert sum(computed) == rows
    assert max(computed) < rows


@compile_backend
@pytest.mark.parametrize("name", ["label_smoothing_map", "self_distillation", "dirichlet_map-normalized"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_blocks_are_compiled_too(name, reduction):
    with softlabels.backend("compile"):
        check(BY_NAME[name], ROWS, 5, reduction, ignored=0.2)


@pytest.mark.parametrize("ranking", ["batch", "history", "random", "none"])
@pytest.mark.parametrize("rank_by", ["max", "true_class"])
def test_beta_smoothing_ranks_block_by_block(ranking, rank_by):
    target, _ = common(ROWS, ignored=0.3)
    tensors = layer()
    results = []
    for logits in (LinearLogits(*tensors, block=4), LinearLogits(*tensors).dense()):
        criterion = softlabels.BetaSmoothingLoss(
            ranking=ranking,
            rank_by=rank_by,
            num_samples=ROWS,
            reduction="none",
            generator=torch.Generator().manual_seed(5),
        )
        results.append(criterion(logits, target, index=torch.arange(ROWS)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_rows_have_the_shape_of_the_leading_dimensions():
    hidden, weight, bias = layer(shape=(3, 4))
    target, confidence = torch.randint(CLASSES, (3, 4)), torch.rand(3, 4)
    logits = LinearLogits(hidden, weight, bias)
    assert logits.shape == (3, 4, CLASSES)
    loss = functional.beta_smoothing_loss(logits, target, confidence, reduction="none", sample_weight=torch.ones(3, 4))
    assert loss.shape == (3, 4)
    one = functional.label_smoothing_map_loss(
        LinearLogits(hidden[0, 0], weight), target[0, 0], beta=0.2, reduction="none"
    )
    dense = functional.label_smoothing_map_loss(hidden[0, 0] @ weight.T, target[0, 0], beta=0.2)
    assert one.shape == ()
    torch.testing.assert_close(one, dense)


def test_backward_again_and_again():
    case = BY_NAME["self_distillation"]
    target, _ = common(ROWS)
    tensors = layer()
    dense = gradients(case.call(LinearLogits(*tensors).dense(), target), tensors)
    loss = case.call(LinearLogits(*tensors, block=4), target)
    for factor in (1.0, 3.0, -2.0):  # the first time from the forward pass, then from the blocks again
        found = torch.autograd.grad(factor * loss, tensors, retain_graph=True)
        torch.testing.assert_close(found, tuple(factor * g for g in dense), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["self_distillation", "confidence_penalty"])
def test_differentiable_twice(name, reduction):
    case, target = BY_NAME[name], torch.tensor([1, -100, 3])
    tensors = layer(3)
    assert torch.autograd.gradgradcheck(
        lambda *t: case.call(LinearLogits(*t, block=2), target, reduction=reduction), tensors
    )


def test_transforms_and_forward_mode_compute_all_logits():
    case = BY_NAME["label_smoothing_map"]
    target, _ = common(ROWS)
    tensors = layer()
    found = torch.func.grad(lambda *t: case.call(LinearLogits(*t), target), (0, 1, 2))(*tensors)
    torch.testing.assert_close(found, gradients(case.call(LinearLogits(*tensors), target), tensors))
    _, tangent = torch.func.jvp(
        lambda h: case.call(LinearLogits(h, *tensors[1:]), target), (tensors[0],), (tensors[0],)
    )
    torch.testing.assert_close(tangent, (found[0] * tensors[0]).sum())


def test_many_incoming_gradients_raise():
    target, _ = common(ROWS)
    tensors = layer()
    loss = functional.label_smoothing_map_loss(LinearLogits(*tensors), target, beta=0.1)
    with pytest.raises(RuntimeError, match="is_grads_batched"):
        torch.autograd.grad(loss, tensors, torch.ones(2, dtype=loss.dtype), is_grads_batched=True)


def test_sample_weights_may_learn():
    target, _ = common(ROWS)
    tensors = [*layer(), torch.rand(ROWS, dtype=torch.float64, requires_grad=True)]

    def loss(logits):
        return functional.label_smoothing_map_loss(logits, target, beta=0.1, sample_weight=tensors[3])

    torch.testing.assert_close(
        gradients(loss(LinearLogits(*tensors[:3])), tensors),
        gradients(loss(LinearLogits(*tensors[:3]).dense()), tensors),
    )


def test_nothing_is_kept_without_grad():
    target, _ = common(ROWS)
    with torch.no_grad():
        loss = functional.label_smoothing_map_loss(LinearLogits(*layer()), target, beta=0.1)
    assert loss.grad_fn is None
    frozen = [tensor.detach() for tensor in layer()]
    assert not functional.label_smoothing_map_loss(LinearLogits(*frozen), target, beta=0.1).requires_grad


def test_only_what_wants_a_gradient_gets_one():
    target, _ = common(ROWS)
    hidden, weight, bias = layer()
    functional.label_smoothing_map_loss(
        LinearLogits(hidden.detach(), weight, bias.detach()), target, beta=0.1
    ).backward()
    assert hidden.grad is None
    assert bias.grad is None
    expected = layer()[1]
    functional.label_smoothing_map_loss(LinearLogits(hidden, expected, bias).dense(), target, beta=0.1).backward()
    torch.testing.assert_close(weight.grad, expected.grad)


def test_made_under_autocast_its_tensors_are_cast():
    target, _ = common(ROWS)
    tensors = layer(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = LinearLogits(*tensors)
        dense = nn.functional.linear(*tensors)
        inside = functional.label_smoothing_map_loss(logits, target, beta=0.1)
    assert logits.dtype == torch.bfloat16
    outside = functional.label_smoothing_map_loss(logits, target, beta=0.1)
    assert inside == outside
    expected = functional.label_smoothing_map_loss(dense, target, beta=0.1)
    torch.testing.assert_close(outside, expected, rtol=1e-3, atol=1e-3)
    found = gradients(outside, tensors)
    assert {gradient.dtype for gradient in found} == {torch.float32}
    torch.testing.assert_close(found, gradients(expected, tensors), rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's, as it leaves a graph
@whole_graph
def test_compiled_programs_leave_the_graph():
    target, _ = common(ROWS)
    tensors = layer()

    def step(hidden, weight, bias):
        return functional.label_smoothing_map_loss(LinearLogits(2 * hidden, weight, bias), target, beta=0.1)

    loss = torch.compile(step, backend="eager")(*tensors)
    torch.testing.assert_close(loss, step(*tensors))
    torch.testing.assert_close(gradients(loss, tensors), gradients(step(*tensors), tensors))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="LinearLogits are worked on in blocks"):
        torch.compile(step, backend="eager", fullgraph=True)(*tensors)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "hidden must be a Tensor, got list", lambda h, w, b: LinearLogits([1.0], w)),
        (TypeError, "weight must be of a floating dtype", lambda h, w, b: LinearLogits(h, w.long())),
        (
            TypeError,
            r"weight must have the dtype of hidden, torch.float64, got",
            lambda h, w, b: LinearLogits(h, w.float()),
        ),
        (
            ValueError,
            r"hidden must have shape \(..., D\) .* got \(13, 5\) and \(5, 17\)",
            lambda h, w, b: LinearLogits(h, w.T),
        ),
        (ValueError, r"bias must have shape \(17,\), got \(5,\)", lambda h, w, b: LinearLogits(h, w, w[0])),
        (ValueError, "block must be an int of at least 1, or None, got 0", lambda h, w, b: LinearLogits(h, w, block=0)),
    ],
)
def test_what_is_no_layer_raises(error, message, make):
    with pytest.raises(error, match=message):
        make(*layer())


def test_a_sharded_layer_raises_by_name():
    class DTensor(torch.Tensor):
        def full_tensor(self):
            return self

    hidden, weight, _ = layer()
    with pytest.raises(TypeError, match=r"weight is a DTensor.* pass weight.full_tensor\(\)"):
        LinearLogits(hidden, weight.detach().as_subclass(DTensor))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return LinearLogits(self.body(x), self.head.weight, self.head.bias)


def sharded_and_plain_gradients():
    """Those of a model under FSDP2, and those of the dense losses of both processes, averaged."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    plain = Tagger().double()
    model, x, y = copy.deepcopy(plain), torch.randn(8, WIDTH).double(), torch.randint(CLASSES, (8,))
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh)
    own, teacher = slice(dist.get_rank(), None, 2), torch.randn(8, CLASSES).double()
    functional.self_distillation_loss(model(x[own]), y[own], teacher[own]).backward()
    sharded = [parameter.grad.full_tensor().tolist() for parameter in model.parameters()]
    halves = [
        functional.self_distillation_loss(plain(x[h]).dense(), y[h], teacher[h])
        for h in (slice(0, None, 2), slice(1, None, 2))
    ]
    dist.destroy_process_group()
    return sharded, [gradient.tolist() for gradient in torch.autograd.grad(sum(halves) / 2, list(plain.parameters()))]


@fsdp2
def test_gradients_of_a_sharded_model_are_the_mean_of_those_of_its_processes():
    for sharded, plain in processes.both(sharded_and_plain_gradients):
        for own, expected in zip(sharded, plain, strict=True):
            torch.testing.assert_close(torch.tensor(own), torch.tensor(expected))


def test_targets_are_labels_of_the_rows():
    target, _ = common(ROWS)
    logits = LinearLogits(*layer())
    call = functional.label_smoothing_map_loss
    with pytest.raises(RuntimeError, match="target must hold class indices for LinearLogits: probabilities or counts"):
        call(logits, torch.rand(ROWS, CLASSES, dtype=torch.float64), beta=0.1)
    with pytest.raises(RuntimeError, match="probabilities or counts"):
        functional.dirichlet_map_loss(logits, torch.ones(ROWS, CLASSES, dtype=torch.int64), torch.randn(ROWS, CLASSES))
    with pytest.raises(ValueError, match=r"target must be class indices of shape \(13,\), .* got shape \(12,\)"):
        call(logits, target[1:], beta=0.1)
    with pytest.raises(RuntimeError, match="target must hold class indices as"):
        call(logits, target.int(), beta=0.1)
    with pytest.raises(IndexError, match=r"in \[0, 17\) or ignore_index, got 17"):
        call(logits, torch.full_like(target, 17), beta=0.1)
    with pytest.raises(ValueError, match=r"sample_weight must have one value per row, shape \(13,\)"):
        call(logits, target, beta=0.1, sample_weight=torch.ones(12))
    with pytest.raises(ValueError, match=r"teacher_logits must have the shape of input, \(13, 17\), got \(13, 5\)"):
        functional.self_distillation_loss(logits, target, torch.randn(ROWS, 5))
    with pytest.raises(ValueError, match=r"stand for logits of shape \(2, 17\), but input of shape \(13, 17\) needs"):
        functional.self_distillation_loss(logits, target, LinearLogits(*layer(2)))
    with pytest.raises(TypeError, match="teacher_logits must be a Tensor, LinearLogits or TopKLogits, got list"):
        functional.self_distillation_loss(logits, target, [1.0])


def test_soft_labels_of_it_are_not_shown():
    logits = LinearLogits(*layer())
    for targets in (functional.distillation_targets, functional.dirichlet_map_targets):
        with pytest.raises(TypeError, match="which LinearLogits are there to avoid"):
            targets(torch.zeros(ROWS, dtype=torch.int64), logits)


@pytest.mark.parametrize("spread", ["classes", "neighbours"])
def test_learned_spreads_raise(spread):
    criterion = softlabels.BetaSmoothingLoss(ranking="batch", spread=spread)
    with pytest.raises(ValueError, match=f"spread='{spread}' keeps or compares predictions of all classes"):
        criterion(LinearLogits(*layer()), torch.zeros(ROWS, dtype=torch.int64))


def test_repr_shows_shapes():
    assert repr(LinearLogits(*layer(), block=4)) == (
        "LinearLogits(hidden=(13, 5), weight=(17, 5), bias=(17,), block=4, dtype=torch.float64)"
    )
