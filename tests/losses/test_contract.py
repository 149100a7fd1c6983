"""What every loss owes its user, switched on: the reference, gradients, masks, dtypes, transforms, copies."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from cases import CASES, calls, expected
from hypothesis import given
from implementations import IMPLEMENTATIONS, implementation
from torch import nn
from versions import whole_graph

each_loss = pytest.mark.parametrize("case", CASES, ids=repr)


@each_loss
@given(call=calls())
def test_equals_the_reference(case, call):
    logits, target, options = call
    got = case.call(logits, target, **options)
    wanted = expected(case, logits, target, **options)
    assert got.shape == wanted.shape
    assert got.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    tolerance = 1e-10 if logits.dtype == torch.float64 and "weight" not in options else 2e-5
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@each_loss
@given(call=calls())
def test_module_equals_functional(case, call):
    logits, target, options = call
    got = case.call_module(logits.requires_grad_(), target, **options)
    torch.testing.assert_close(got, case.call(logits, target, **options), rtol=0, atol=0)


@each_loss
def test_targets_of_one_hot_probabilities_equal_indices(case):
    logits = torch.randn(7, 5, dtype=torch.float64)
    target = torch.randint(5, (7,))
    one_hot = nn.functional.one_hot(target, 5).double()
    weight = torch.rand(5, dtype=torch.float64)  # pytorch #107680: the same rows, though the means divide differently
    for reduction in ("sum", "none"):
        a = case.call(logits, target, weight=weight, reduction=reduction)
        b = case.call(logits, one_hot, weight=weight, reduction=reduction)
        torch.testing.assert_close(a, b)
    mean = case.call(logits, target, weight=weight) * weight[target].sum()
    torch.testing.assert_close(mean, case.call(logits, one_hot, weight=weight) * 7)


@each_loss
def test_masked_equals_subset(case):
    """Ignored rows are in no mean, rank, draw or normalisation (pytorch #73205)."""
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, -100, 2, 3, -100, 4, 1, 0, -100])
    kept = target != -100
    extras = case.extras(logits)
    sample_weight = torch.rand(9)
    for common in ({}, {"sample_weight": sample_weight}):
        subset = {k: v[kept] for k, v in {**extras, **common}.items()}
        whole = case.call(logits, target, **extras, **common)
        part = case.call(logits[kept], target[kept], **subset)
        torch.testing.assert_close(whole, part)
        (grad,) = torch.autograd.grad(whole, logits)
        assert grad[~kept].eq(0).all()
        (part_grad,) = torch.autograd.grad(part, logits)
        torch.testing.assert_close(grad, part_grad)


@each_loss
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_learn_from_is_zero_with_a_live_graph(case, rows, reduction):
    """pytorch #70348 gives nan, torchtune #2341 a constant."""
    logits = torch.randn(rows, 5, requires_grad=True)
    target = torch.full((rows,), -100)
    for options in ({}, {"weight": torch.rand(5)}, {"sample_weight": torch.rand(rows)}):
        loss = case.call(logits, target, reduction=reduction, **options)
        assert loss.eq(0).all()
        assert loss.requires_grad
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert grad.eq(0).all()
    probabilities = torch.zeros(0, 5)
    loss = case.call(torch.randn(0, 5, requires_grad=True), probabilities, reduction=reduction)
    assert loss.eq(0).all()
    assert loss.requires_grad
    zero_weights = case.call(logits, torch.zeros(rows, dtype=torch.long), sample_weight=torch.zeros(rows))
    assert zero_weights == 0


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_permuting_rows_permutes_results(case, reduction):
    logits, target = torch.randn(6, 5), torch.randint(5, (6,))
    extras = case.extras(logits)
    order = torch.randperm(6)
    before = case.call(logits, target, reduction=reduction, **extras)
    after = case.call(logits[order], target[order], reduction=reduction, **{k: v[order] for k, v in extras.items()})
    torch.testing.assert_close(after, before[order] if reduction == "none" else before)


@each_loss
def test_dense_equals_its_rows(case):
    logits, target = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    target[0, 0, 0] = -100
    rows = logits.movedim(1, -1).reshape(-1, 5)
    extras = case.extras(logits)
    flat = {k: v.movedim(1, -1).reshape(-1, 5) if v.shape == logits.shape else v.flatten() for k, v in extras.items()}
    dense = case.call(logits, target, reduction="none", **extras)
    torch.testing.assert_close(dense.flatten(), case.call(rows, target.flatten(), reduction="none", **flat))
    channels_last = logits.to(memory_format=torch.channels_last)
    torch.testing.assert_close(case.call(channels_last, target, reduction="none", **extras), dense)


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_gradcheck(case, reduction, kind):
    """First and second derivatives, with any incoming gradient (Liger #968)."""
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    if kind == "index":
        target = torch.tensor([0, 2, -100, 1])
    else:
        target = torch.rand(4, 3, dtype=torch.float64).softmax(1).requires_grad_()
    weight = torch.rand(3, dtype=torch.float64)

    def loss(logits, target):
        return case.call(logits, target, reduction=reduction, weight=weight)

    assert torch.autograd.gradcheck(loss, (logits, target))
    assert torch.autograd.gradgradcheck(loss, (logits, target))


@each_loss
def test_retain_graph_and_two_backwards(case):
    logits, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 1, 1])
    loss = case.call(logits, target)
    loss.backward(retain_graph=True)
    first = logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * first, rtol=0, atol=0)


@each_loss
def test_func_grad_and_vmap(case):
    """Per-sample gradients and ensembles: the loss of every slice at once equals the loss of each slice."""
    logits, target = torch.randn(6, 4, 3), torch.randint(3, (6, 4))
    extras = case.extras(logits[0])
    names = list(extras)

    def loss(logits, target, *values):
        options = dict(zip(names, values, strict=True))
        return case.functional(logits, target, **case.on, **options)

    gradient = torch.func.grad(loss)
    stacked = [value.expand(6, *value.shape) for value in extras.values()]
    randomness = "same" if case.argument == "confidence" else "error"
    torch.manual_seed(3)
    batched = torch.func.vmap(gradient, randomness=randomness)(logits, target, *stacked)
    for i in range(6):
        torch.manual_seed(3)
        torch.testing.assert_close(batched[i], gradient(logits[i], target[i], *extras.values()))
    rows = torch.func.vmap(loss, randomness="same")(logits[:, 0], target[:, 0], *[v[:, 0] for v in stacked])
    assert rows.shape == (6,)
    assert rows.isfinite().all()


@each_loss
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_arguments_are_left_alone(case, kind):
    """By value and by version counter (transformers #13464 wrote into the labels)."""
    logits = torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([0, -100, 1, 2]) if kind == "index" else torch.rand(4, 3).softmax(1)
    passed = {"weight": torch.rand(3), "sample_weight": torch.rand(4), **case.extras(logits)}
    passed = {name: value.to(torch.float32) for name, value in passed.items()}
    tensors = {"input": logits, "target": target, **passed}
    before = {name: (value.detach().clone(), value._version) for name, value in tensors.items()}
    case.call(logits, target, **passed).backward()
    for name, (value, version) in before.items():
        assert torch.equal(tensors[name].detach(), value), name
        assert tensors[name]._version == version, name


@each_loss
def test_no_gradient_reaches_the_teacher(case):
    if case.argument != "teacher_logits":
        pytest.skip("no teacher")
    teacher_logits = torch.randn(4, 3, requires_grad=True)
    loss = case.call(torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 1, 1]), teacher_logits=teacher_logits)
    loss.backward()
    assert teacher_logits.grad is None


@each_loss
@pytest.mark.parametrize(("rows", "num_classes"), [(2000, 1000), (3, 70_000)])  # more than 65504 in a sum; in a count
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(case, rows, num_classes, dtype):
    """transformers #10674: the smoothing sum over classes overflows fp16."""
    logits = (4 * torch.randn(rows, num_classes)).to(dtype).requires_grad_()
    target = torch.randint(num_classes, (rows,))
    loss = case.call(logits, target)
    wanted = case.call(logits.detach().double(), target, **case.extras(logits.detach()))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert logits.grad.dtype == dtype
    assert logits.grad.isfinite().all()


@each_loss
@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_impossible_classes_take_no_part(case, how, kind):
    """optax #896: a logit of -inf costs nothing where no label or teacher has mass on the class. Even shares go to the
    possible classes of each row (torch's label smoothing is infinite)."""
    impossible = torch.tensor([[3, 5], [3, 4], [0, 3], [0, 5], [1, 2]])
    logits = torch.randn(5, 6, dtype=torch.float64).scatter(1, impossible, -torch.inf).requires_grad_()
    target = torch.tensor([0, 1, 2, 1, -100])
    if kind == "probabilities":
        target = torch.rand(5, 6, dtype=torch.float64).scatter(1, impossible, 0.0)
        target /= target.sum(1, keepdim=True)
    extras = case.extras(logits.detach())
    if case.argument == "teacher_logits":
        extras["teacher_logits"].scatter_(1, impossible, -torch.inf)
        extras["teacher_logits"][:, 4] = extras["teacher_logits"].amax()  # pruning keeps possible classes
        extras["teacher_logits"].scatter_(1, impossible, -torch.inf)
    weight, sample_weight = torch.rand(6, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    for common in ({}, {"weight": weight}, {"reduction": "none", "sample_weight": sample_weight}):
        with implementation(how):
            loss = case.call(logits, target, **extras, **common)
            (grad,) = torch.autograd.grad(loss.sum(), logits)
            without_grad = case.call(logits.detach(), target, **extras, **common)
        torch.testing.assert_close(loss, expected(case, logits, target, **extras, **common))
        torch.testing.assert_close(without_grad, loss.detach())
        assert grad.isfinite().all()
        assert grad.gather(1, impossible).eq(0).all()


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "beta_smoothing" and "prune" not in case.on])
@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_a_masked_loss_is_that_of_the_possible_classes(case, how):
    """Value and gradient, as if the other classes were not there."""
    possible = torch.tensor([0, 1, 2, 4])
    logits, target = torch.randn(4, 6), torch.tensor([0, 1, 2, 1])
    logits[:, [3, 5]] = -torch.inf
    extras = case.extras(logits)
    if case.argument == "teacher_logits":
        extras["teacher_logits"][:, [3, 5]] = -torch.inf
    wanted_extras = {name: value[:, possible] for name, value in extras.items()}
    logits.requires_grad_()
    with implementation(how):
        (grad,) = torch.autograd.grad(case.call(logits, target, **extras), logits)
    wanted = case.call(logits[:, possible], target, **wanted_extras)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, logits)[0])


@each_loss
def test_extreme_logits(case):
    for scale in (1e4, 3e4):
        logits = (scale * torch.randn(4, 5).sign()).requires_grad_()
        loss = case.call(logits, torch.tensor([0, 1, 2, 3]))
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(case, dtype):
    logits, target = torch.randn(8, 5), torch.randint(5, (8,))
    wanted = case.call(logits, target)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(case.call(logits, target), wanted, rtol=0, atol=0)
        low = case.call(logits.to(dtype), target, **case.extras(logits))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, case.call(logits.to(dtype), target, **case.extras(logits)), rtol=0, atol=0)


@whole_graph
@each_loss
def test_compile_traces_without_a_break(case):
    check_compiled(case, "probabilities", [8], dynamic=None)


VARIANTS = ("dirichlet_map-none", "dirichlet_map-pruned", "dirichlet_map-uniform")  # of functions that are there


@whole_graph
@pytest.mark.parametrize(
    ("case", "dynamic"),
    [*((case, True) for case in CASES if case.name not in VARIANTS), *((case, None) for case in CASES[:2])],
    ids=repr,
)
def test_compile_takes_another_batch_size(case, dynamic):
    """The last batch of an epoch is smaller: traced for any number of rows at once, or when there is a second."""
    check_compiled(case, "index", [8, 6, 3], dynamic)


def check_compiled(case, kind, sizes, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(case.functional, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in sizes:
        logits = torch.randn(rows, 5, requires_grad=True)
        target = torch.randint(5, (rows,)) if kind == "index" else torch.rand(rows, 5).softmax(1)
        options = {**case.on, **case.extras(logits), "weight": torch.rand(5), "sample_weight": torch.rand(rows)}
        torch.manual_seed(5)
        wanted = case.functional(logits, target, **options)
        torch.manual_seed(5)
        got = compiled(logits, target, **options)
        torch.testing.assert_close(got, wanted)
        (wanted_grad,) = torch.autograd.grad(wanted, logits)
        (got_grad,) = torch.autograd.grad(got, logits)
        torch.testing.assert_close(got_grad, wanted_grad)


@each_loss
@pytest.mark.filterwarnings("ignore:.*weights_only=False:FutureWarning")
def test_copies_pickles_and_state_dicts(case):
    criterion = case.make(weight=torch.rand(5), ignore_index=2, reduction="sum")
    logits, target = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 0])
    extras = case.extras(logits)
    buffer = io.BytesIO()
    torch.save(criterion, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(criterion),
        pickle.loads(pickle.dumps(criterion)),
        torch.load(buffer, weights_only=False),
    ]
    state = io.BytesIO()
    torch.save(nn.ModuleDict({"loss": criterion}).state_dict(), state)
    state.seek(0)
    fresh = case.make(weight=torch.zeros(5), ignore_index=2, reduction="sum")
    nn.ModuleDict({"loss": fresh}).load_state_dict(torch.load(state, weights_only=True))
    wanted = criterion(logits, target, **extras)
    for twin in (*twins, fresh):
        if case.argument != "confidence":  # a generator's repr is its address
            assert repr(twin) == repr(criterion)
        assert torch.equal(twin(logits, target, **extras), wanted)


@each_loss
def test_to_moves_the_class_weights(case):
    criterion = case.make(weight=torch.rand(5))
    assert criterion.to(torch.float64).weight.dtype == torch.float64
    assert criterion.to("meta").weight.device.type == "meta"
    assert not list(criterion.parameters())


@each_loss
def test_repr_shows_what_was_set(case):
    criterion = case.make(weight=torch.rand(5), ignore_index=255, reduction="none")
    text = repr(criterion)
    assert text.startswith(case.module.__name__ + "(")
    for name, value in case.on.items():
        assert f"{name}={value!r}" in text
    assert "weight=<5 classes" in text
    assert "ignore_index=255" in text
    assert "reduction='none'" in text


@each_loss
def test_wrong_extra_arguments_are_named(case):
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"sample_weight .* shape \(4,\) for input of shape \(4, 3\), got .*\(3,\)"):
        case.call(logits, target, sample_weight=torch.ones(3))
    with pytest.raises(TypeError, match="sample_weight must be a Tensor"):
        case.call(logits, target, sample_weight=[1.0] * 4)
    if case.argument is None:
        return
    with pytest.raises(ValueError, match=rf"{case.argument} .*\(4, .*got .*\(5, 7\)"):
        case.call(logits, target, **{case.argument: torch.randn(5, 7)})
    with pytest.raises(TypeError, match=f"{case.argument} must be a Tensor, got list"):
        case.call(logits, target, **{case.argument: [1.0]})
    with pytest.raises(RuntimeError, match=f"{case.argument} is on meta but input is on cpu"):
        case.call(logits, target, **{case.argument: torch.randn(4, 3, device="meta")})


@each_loss
def test_uint8_labels(case):
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(case.call(logits, target.to(torch.uint8)), case.call(logits, target), rtol=0, atol=0)


@each_loss
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
def test_junk_in_an_ignored_row_of_the_teacher(case, junk):
    """Padding tokens of a masked model: neither loss nor gradient hears of them."""
    if case.argument is None:
        pytest.skip("takes no argument per row")
    logits = torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([0, -100, 2, 1])
    extras = case.extras(logits)
    wanted = case.call(logits, target, **extras)
    (wanted_grad,) = torch.autograd.grad(wanted, logits)
    for value in extras.values():
        value[1] = junk
    loss = case.call(logits, target, **extras)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grad, wanted_grad)


@each_loss
def test_weights_of_zero(case):
    """Class weights that sum to 0 over the batch, and a row of infinite loss that is asked not to count."""
    logits = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    target = torch.zeros(3, dtype=torch.long)
    loss = case.call(logits, target, weight=torch.tensor([0.0, 1.0]))
    assert loss == 0 == expected(case, logits, target, weight=torch.tensor([0.0, 1.0]))
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.eq(0).all()
    masked = logits.detach().clone()
    masked[1, 0] = -torch.inf
    for reduction in ("mean", "sum", "none"):
        losses = case.call(masked, target, sample_weight=torch.tensor([1.0, 0.0, 1.0]), reduction=reduction)
        assert losses.isfinite().all()


@each_loss
def test_the_label_is_impossible(case):
    """Infinite, never nan, also where the soft label has less of the true class than of the others."""
    logits = torch.zeros(200, 3)
    logits[:, 0] = -torch.inf
    losses = case.call(logits, torch.zeros(200, dtype=torch.long), reduction="none")
    assert losses.eq(torch.inf).all()


@each_loss
def test_numpy_numbers_are_numbers(case):
    on = {k: np.float64(v) if isinstance(v, float) else v for k, v in case.on.items()}
    criterion = case.module(**on, **case.random(), ignore_index=np.int64(1))
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    got = criterion(logits, target, **case.extras(logits))
    torch.testing.assert_close(got, case.call(logits, target, ignore_index=1))
