"""The compile backend: as close to the truth as plain PyTorch, compiled seldom, and honest where it cannot compile."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from unittest.mock import patch

import numpy as np
import pytest
import torch
from cases import CASES
from implementations import implementation
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import softlabels
from softlabels import _reading, functional, kernels
from softlabels.kernels import Even, Label, SoftLabel, compiled, dispatch

pytestmark = pytest.mark.skipif(_reading.TORCH < compiled.OLDEST_TORCH, reason="these graphs need a newer torch")

FUSED = [case for case in CASES if case.name != "confidence_penalty"]  # that one is a plain formula on every backend
DENSE = (3, 5, 2, 4)


@pytest.fixture(autouse=True)
def _compile():
    with softlabels.backend("compile"), implementation("closed"):
        yield


def value_and_gradient(loss, logits, dtype=None):
    logits = logits.detach().to(dtype or logits.dtype).requires_grad_()
    value = loss(logits)
    incoming = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)
    return value.detach(), torch.autograd.grad(value, logits, incoming)[0]


def check_against_the_truth(loss, logits):
    """The error is at most torch's own (that of the plain formula) plus a few units in the last place."""
    with implementation("formula"):
        truth = value_and_gradient(loss, logits, torch.float64)
        plain = value_and_gradient(loss, logits)
    for got, formula, true in zip(value_and_gradient(loss, logits), plain, truth, strict=True):
        assert got.dtype == formula.dtype
        unit = torch.finfo(got.dtype).eps * true.abs().amax().clamp(min=1e-3)
        error, allowed = (got.double() - true).abs(), (formula.double() - true).abs()
        assert (error <= allowed + 8 * unit).all()


@pytest.mark.parametrize("case", FUSED, ids=repr)
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_no_further_from_the_truth_than_torch(case, kind):
    """With everything on: masks, class weights, sample weights."""
    logits = 3 * torch.randn(7, 5)
    target = torch.tensor([0, 4, -100, 2, 2, -100, 1]) if kind == "index" else torch.rand(7, 5).softmax(1)
    options = {**case.extras(logits), "weight": torch.rand(5), "sample_weight": torch.rand(7)}
    check_against_the_truth(lambda x: case.call(x, target, **options), logits)


@pytest.mark.parametrize("name", ["beta_smoothing", "self_distillation"])
@pytest.mark.parametrize(
    ("dtype", "reduction"),
    [
        (torch.float32, "mean"),
        (torch.float32, "none"),
        (torch.float64, "mean"),
        (torch.bfloat16, "none"),
        (torch.float16, "mean"),
    ],
    ids=str,
)
def test_dtypes_and_dense_logits(name, dtype, reduction):
    (case,) = [case for case in CASES if case.name == name]
    logits = (3 * torch.randn(DENSE)).to(dtype)
    target = torch.randint(5, (3, 2, 4))
    target[1, 0, :2] = -100
    extras = case.extras(logits)
    check_against_the_truth(lambda x: case.call(x, target, reduction=reduction, **extras), logits)


def test_masked_classes_and_ignored_junk():
    logits, teacher_logits = torch.randn(4, 5), torch.randn(4, 5)
    logits[:, 3] = teacher_logits[:, 3] = -torch.inf
    teacher_logits[1] = torch.nan
    target = torch.tensor([0, -100, 2, 1])
    check_against_the_truth(lambda x: functional.self_distillation_loss(x, target, teacher_logits), logits)
    smoothed = functional.label_smoothing_map_loss(logits.requires_grad_(), target, beta=0.2, reduction="none")
    possible = torch.tensor([0, 1, 2, 4])
    relabelled = torch.tensor([0, -100, 2, 1])
    wanted = functional.label_smoothing_map_loss(logits[:, possible], relabelled, beta=0.2, reduction="none")
    torch.testing.assert_close(smoothed, wanted)
    impossible = functional.label_smoothing_map_loss(logits, torch.full((4,), 3), beta=0.0, reduction="none")
    assert impossible.eq(torch.inf).all()


def smoothed_rows(logits, target, label, even, reduce=False):
    return kernels.cross_entropy(SoftLabel([Even(even), Label(label, target)], 1.0), logits, reduce=reduce)


def compilations(call):
    """Graphs that the call compiles."""
    counters.clear()
    call()
    return counters["stats"]["unique_graphs"]


def smoothed(rows, num_classes, **options):
    logits = torch.randn(rows, num_classes, requires_grad=True)
    options = {"beta": 0.2, **options}
    loss = functional.label_smoothing_map_loss(logits, torch.randint(num_classes, (rows,)), **options)
    return torch.autograd.grad(loss.sum(), logits)


def test_compilations_are_few():
    """One per kernel, number of classes, dtype and options; one more for the second number of rows; none after."""
    assert compilations(lambda: smoothed(8, 11)) == 1
    assert compilations(lambda: smoothed(8, 11)) == 0
    assert compilations(lambda: smoothed(6, 11)) <= 1
    assert compilations(lambda: [smoothed(rows, 11) for rows in (7, 3, 100, 2, 1, 0, 8)]) == 0
    assert compilations(lambda: [smoothed(8, 11, beta=b) for b in (0.1, 0.3)]) == 0  # a schedule
    with torch.autocast("cpu"):
        assert compilations(lambda: smoothed(8, 11)) == 0
    of_a_layer = torch.nn.Linear(11, 11)(torch.randn(8, 11))  # not a leaf of the graph
    assert compilations(lambda: functional.label_smoothing_map_loss(of_a_layer, torch.arange(8), beta=0.2)) == 0
    assert compilations(lambda: smoothed(8, 11, reduction="none")) <= 2  # values, and the gradient of any of them
    assert compilations(lambda: [smoothed(rows, 11, reduction="none") for rows in (5, 4)]) <= 2


def test_many_numbers_of_classes_stay_compiled():
    """torch.compile gives a function up, silently, after eight versions."""
    for num_classes in range(41, 51):  # that no other test has
        assert compilations(lambda k=num_classes: smoothed(4, k)) == 1
    assert compilations(lambda: [smoothed(4, k) for k in range(41, 51)]) == 0


def test_labels_that_no_class_has():
    logits = torch.randn(4, 5, requires_grad=True)
    for label in (5, -1):
        with pytest.raises(IndexError, match=rf"class indices in \[0, 5\) or ignore_index, got {label}"):
            functional.label_smoothing_map_loss(logits, torch.tensor([0, 1, 2, label]), beta=0.2)


def test_where_the_plain_formula_runs_instead():
    logits, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])

    def loss(logits, target=target):
        return functional.label_smoothing_map_loss(logits, target, beta=0.2)

    with softlabels.backend("eager"):
        wanted = torch.autograd.functional.hessian(loss, logits)
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, logits), wanted)
    counters.clear()
    torch.testing.assert_close(torch.func.hessian(loss)(logits.detach()), wanted)
    assert torch.func.vmap(loss)(logits.unsqueeze(1), target.unsqueeze(1)).shape == (4,)
    loss(logits, torch.rand(4, 5).softmax(1).requires_grad_()).backward()
    assert counters["stats"]["unique_graphs"] == 0


def test_inside_a_compiled_region_no_second_compilation_starts():
    logits, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    region = torch.compile(
        lambda x: functional.label_smoothing_map_loss(x, target, beta=0.2), fullgraph=True, backend="aot_eager"
    )
    with patch.object(compiled, "_run", side_effect=AssertionError):
        region(logits).backward()


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.11
def test_memory_is_that_of_the_gradient():
    """Allocations of the size of the logits, counted where the allocator reports them: compiled code has no hooks."""
    rows, num_classes = 64, 4096
    logits = torch.randn(rows, num_classes, requires_grad=True)
    target, teacher_logits = torch.randint(num_classes, (rows,)), torch.randn(rows, num_classes)
    for loss in (
        lambda: functional.beta_smoothing_loss(logits, target, torch.rand(rows)),
        lambda: functional.self_distillation_loss(logits, target, teacher_logits),
    ):
        torch.autograd.grad(loss(), logits)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            (gradient,) = torch.autograd.grad(loss(), logits)
        sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        assert sum(size >= gradient.nbytes // 2 for size in sizes) == 1


def test_nothing_compiles_unasked_on_a_cpu():
    code = (
        "import sys, torch, softlabels\n"
        "x = torch.randn(256, 257, requires_grad=True)\n"
        "softlabels.LabelSmoothingMAPLoss(beta=0.1)(x, torch.arange(256)).backward()\n"
        "print('torch._inductor.compile_fx' in sys.modules, 'torch._dynamo.convert_frame' in sys.modules)\n"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]


def test_without_a_compiler():
    code = (
        "import torch, softlabels\n"
        "softlabels.set_backend('compile')\n"
        "x = torch.randn(256, 257, requires_grad=True)\n"  # fewer logits would not be compiled
        "softlabels.LabelSmoothingMAPLoss(beta=0.1)(x, torch.arange(256)).backward()\n"
    )
    environment = {"CXX": "/no/such/compiler", "PATH": "/nowhere", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 1
    assert "softlabels could not compile its kernels for cpu: torch.compile needs a C++ compiler there" in run.stderr


def test_auto_falls_back_with_one_warning(monkeypatch):
    logits, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    monkeypatch.setattr(dispatch, "COMPILED_DEVICES", ("cpu",))
    monkeypatch.setattr(dispatch, "_failed", set())
    monkeypatch.setattr(compiled, "_run", lambda *_: (_ for _ in ()).throw(compiled.CompilationFailed("no compiler")))
    with softlabels.backend("auto"):
        with pytest.warns(UserWarning, match="no compiler; from now on they run uncompiled"):
            first = smoothed_rows(logits, target, 0.9, 0.02, reduce=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rows = smoothed_rows(logits, target, 0.9, 0.02)
            rows.sum().backward()
    torch.testing.assert_close(first, rows.sum())
    with softlabels.backend("compile"), pytest.raises(RuntimeError, match="no compiler"):
        smoothed_rows(logits, target, 0.9, 0.02)


def test_auto_compiles_where_it_is_told_to(monkeypatch):
    """As on an accelerator, but for the device."""
    logits, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    monkeypatch.setattr(dispatch, "COMPILED_DEVICES", ("cpu",))
    with softlabels.backend("auto"), patch.object(compiled, "_run", wraps=compiled._run) as run:
        functional.label_smoothing_map_loss(logits, target, beta=0.2, reduction="none").sum().backward()
    assert run.call_count == 2


def test_what_watches_operations_sees_them():
    smoothed(8, 11)
    with FlopCounterMode(display=False):
        smoothed(8, 11)
    smoothed(8, 11)


def test_layouts_and_shapes_do_not_use_versions_up(monkeypatch):
    traced = functools.partial(torch.compile, backend="eager")  # as many versions, in a tenth of the time
    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(compiled, "_graphs", {})
    target = torch.randint(13, (3, 4, 5))

    def every():
        for shape in ((3, 4, 5), (3, 1, 5), (3, 4, 1), (3, 1, 1), (2, 3, 4)):
            for layout in ("contiguous", "classes last", "expanded"):
                logits = torch.randn(shape[0], 13, *shape[1:])
                if layout == "classes last":
                    logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
                elif layout == "expanded":
                    logits = logits[:, :1].expand(logits.shape)
                rows = target[: shape[0], : shape[1], : shape[2]]
                loss = functional.label_smoothing_map_loss(logits.requires_grad_(), rows, beta=0.2)
                with softlabels.backend("eager"):
                    wanted = functional.label_smoothing_map_loss(logits, rows, beta=0.2)
                torch.testing.assert_close(loss, wanted)

    assert compilations(every) == len(compiled._graphs)  # one version of each function
    assert compilations(every) == 0


CLASSES_LAST = torch.randn(3, 2, 4, 5).movedim(-1, 1)


@pytest.mark.parametrize(
    "logits", [torch.randn(5, 6).T, CLASSES_LAST, CLASSES_LAST.bfloat16()], ids=["transposed", "dense", "bfloat16"]
)
def test_gradient_is_of_the_memory_format_of_the_logits(logits):
    """Or the layer before, of channels_last say, would have to turn it round."""
    target = torch.randint(5, logits.select(1, 0).shape)

    def loss(x):
        return functional.label_smoothing_map_loss(x, target, beta=0.2)

    _, gradient = value_and_gradient(loss, logits)
    assert gradient.stride() == logits.stride() != gradient.contiguous().stride()
    check_against_the_truth(loss, logits)


@pytest.mark.parametrize("first", [0, 1])
def test_equal_numbers_and_shared_tensors_may_part(first):
    """A graph that was compiled for two names of one tensor is not used for two tensors, nor the other way round."""
    num_classes = 21 + first  # that no other test has
    logits, target = torch.randn(4, num_classes), torch.tensor([0, 1, 2, 0])
    rows, others = torch.rand(4), torch.rand(4)
    calls = [[(0.3, 0.3), (0.3, 0.2)], [(rows, rows), (rows, others)]]
    for pair in calls:
        for hard, uniform in (pair[first], pair[1 - first]):
            got = smoothed_rows(logits, target, hard, uniform)
            with softlabels.backend("eager"):
                torch.testing.assert_close(got, smoothed_rows(logits, target, hard, uniform))


def test_numbers_of_any_kind_are_inputs():
    logits, target, teacher_logits = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.randn(4, 3)

    def loss(**options):
        return functional.self_distillation_loss(logits, target, teacher_logits, **options)

    assert compilations(lambda: loss(alpha=0.3, temperature=2.5)) <= 1
    assert compilations(lambda: [loss(alpha=np.float32(0.3), temperature=t) for t in (2, np.int64(3), 4.5)]) == 0


def test_an_older_torch_is_named(monkeypatch):
    logits, labels = torch.randn(4, 13), torch.tensor([0, 1, 2, 0])  # 13 classes, as no other test
    monkeypatch.setattr(_reading, "TORCH", (2, 10))
    monkeypatch.setattr(dispatch, "_failed", set())
    monkeypatch.setattr(dispatch, "COMPILED_DEVICES", ("cpu",))
    with pytest.raises(RuntimeError, match=r"kernels of softlabels need torch 2\.11 or newer, and this is 2"):
        functional.label_smoothing_map_loss(logits, labels, beta=0.5)
    softlabels.set_backend("auto")
    with pytest.warns(UserWarning, match="need torch 2.11.*from now on they run uncompiled"):
        loss = functional.label_smoothing_map_loss(logits, labels, beta=0.5)
    assert loss.isfinite()
