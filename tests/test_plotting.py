"""Pictures: what they draw is what they were given, where they were told to, and nowhere else."""

from __future__ import annotations

import subprocess
import sys

import matplotlib.style
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import softlabels
from softlabels import plotting
from softlabels.functional import beta_smoothing_targets, distillation_targets
from softlabels.metrics import reliability_curve

PROBABILITIES = torch.tensor([[0.55, 0.45], [0.95, 0.05], [0.95, 0.05], [1.0, 0.0]])
CURVE = reliability_curve(PROBABILITIES, torch.tensor([0, 0, 1, 1]), n_bins=5, from_logits=False)


def test_reliability_diagram_draws_the_curve():
    own = Figure().subplots()
    ax = plotting.reliability_diagram(CURVE, ax=own, title="digits")
    assert ax is own
    accuracy, gap = ax.containers
    assert [bar.get_x() for bar in accuracy] == pytest.approx([0.4, 0.8])
    assert [bar.get_height() for bar in accuracy] == pytest.approx([1.0, 1 / 3])
    assert [b.get_y() + b.get_height() for b in gap] == pytest.approx([0.55, 2.9 / 3])
    (dots,) = ax.collections
    assert dots.get_offsets().data.ravel().tolist() == pytest.approx([0.55, 1.0, 2.9 / 3, 1 / 3])
    assert dots.get_sizes()[1] == 3 * dots.get_sizes()[0]
    assert ax.get_title() in ("digits, ECE 58.7 %", "digits, ECE 58.8 %")  # (0.45 + 3 * 0.6333) / 4 = 0.5875


def test_two_curves_in_one_diagram():
    other = reliability_curve(PROBABILITIES.flip(1), torch.tensor([0, 0, 1, 1]), n_bins=5, from_logits=False)
    ax = plotting.reliability_diagram(CURVE, label="first", title="digits")
    assert plotting.reliability_diagram(other, label="second", ax=ax) is ax
    assert ax.get_title() == "digits"
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[0] == plotting.CALIBRATED
    assert [text.split(", ECE ")[0] for text in texts[1:]] == ["first", "second"]
    diagonal, first, second = ax.lines
    assert list(diagonal.get_xdata()) == [0, 1]
    assert first.get_ydata().tolist() == pytest.approx([1.0, 1 / 3])
    assert (first.get_color(), first.get_marker()) != (second.get_color(), second.get_marker())
    assert not ax.patches
    ax.figure.canvas.draw()
    plotting.reliability_diagram(CURVE, ax=ax)
    plotting.reliability_diagram(CURVE, ax=ax)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(texts) == len(set(texts)) == 5


def test_dots_are_as_large_as_the_weight():
    weights = torch.tensor([3.0, 1.0, 1.0, 1.0])
    options = {"n_bins": 5, "from_logits": False, "sample_weight": weights}
    (dots,) = plotting.reliability_diagram(
        reliability_curve(PROBABILITIES, torch.tensor([0, 0, 1, 1]), **options)
    ).collections
    assert dots.get_sizes()[0] == dots.get_sizes()[1]


@pytest.mark.parametrize("binning", ["equal-width", "equal-mass"])
def test_reliability_diagram_of_nothing_and_of_many_bins(binning):
    for rows in (0, 1, 500):
        logits, target = torch.randn(rows, 4), torch.randint(4, (rows,))
        for n_bins in (1, 40):
            plotting.reliability_diagram(
                reliability_curve(logits, target, n_bins=n_bins, binning=binning)
            ).figure.canvas.draw()


def columns(ax):
    """Heights of the three parts of each column."""
    return [torch.tensor(patch.get_data().values - patch.get_data().baseline) for patch in ax.patches]


def test_soft_labels_are_drawn_surest_first():
    target = torch.tensor([2, 0, 1, 1])
    teacher = torch.randn(4, 3)
    soft = distillation_targets(target, teacher, alpha=0.3, temperature=1.0)
    ax = plotting.soft_labels(soft, target, title="a teacher")
    own, top, rest = columns(ax)
    true_class = soft[range(4), target].double()
    torch.testing.assert_close(own, true_class.sort(descending=True).values)
    torch.testing.assert_close(own + top + rest, torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert (top >= rest).all()  # of three classes, the rest is one class
    (mean,) = ax.lines
    assert mean.get_ydata()[0] == pytest.approx(true_class.mean().item())
    assert f"{true_class.mean():.2f}" in mean.get_label()
    assert ax.get_title() == "a teacher"


def test_no_global_state():
    before = dict(matplotlib.rcParams)
    target = torch.randint(5, (300,))
    plotting.soft_labels(beta_smoothing_targets(target, 5, torch.rand(300)), target).figure.canvas.draw()
    plotting.reliability_diagram(CURVE).figure.canvas.draw()
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys, torch\nfrom softlabels import metrics, plotting\n"
        "plotting.reliability_diagram(metrics.reliability_curve(torch.randn(9, 3), torch.zeros(9).long()))\n"
        "assert 'matplotlib.figure' in sys.modules\nassert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def luminance(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", ["white", "#1e2129", "black"])
def test_colours_stand_out_on_light_and_dark_pages(page):
    """WCAG asks for a contrast of 3 for graphics; hatching tells orange from grey in print."""
    for color in (plotting.BLUE, plotting.ORANGE, plotting.GREY):
        low, high = sorted([luminance(color), luminance(page)])
        assert (high + 0.05) / (low + 0.05) >= 2.9, color


def test_text_follows_the_style():
    with matplotlib.style.context("dark_background"):
        ax = plotting.reliability_diagram(CURVE)
    assert to_rgb(ax.lines[0].get_color()) == (1.0, 1.0, 1.0)
    assert to_rgb(plotting.reliability_diagram(CURVE).lines[0].get_color()) == (0.0, 0.0, 0.0)


def test_bad_input():
    with pytest.raises(TypeError, match=r"curve must be a ReliabilityCurve.*got Tensor"):
        plotting.reliability_diagram(torch.zeros(3))
    for other in (Figure(), Figure().subplots(1, 2)):
        with pytest.raises(
            TypeError, match=rf"ax must be Axes, such as figure.subplots\(\) .*got {type(other).__name__}"
        ):
            plotting.reliability_diagram(CURVE, ax=other)
        with pytest.raises(TypeError, match="ax must be Axes"):
            plotting.soft_labels(PROBABILITIES, torch.tensor([0, 1, 0, 0]), ax=other)
    classwise = reliability_curve(PROBABILITIES, torch.tensor([0, 0, 1, 1]), from_logits=False, classwise=True)
    with pytest.raises(ValueError, match=r"class-wise curves of shape \(2, 15\)"):
        plotting.reliability_diagram(classwise)
    with pytest.raises(
        ValueError, match=r"class indices of shape \(4,\) for targets of shape \(4, 2\), got shape \(3,\)"
    ):
        plotting.soft_labels(PROBABILITIES, torch.tensor([0, 1, 0]))
    with pytest.raises(
        ValueError, match=r"soft labels \(N, K\) of a floating dtype, got torch.float32 of shape \(0, 2\)"
    ):
        plotting.soft_labels(PROBABILITIES[:0], torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match=r"probabilities that sum to 1, got a row \[3.0, -1.0\]... with sum 2"):
        plotting.soft_labels(torch.tensor([[3.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(TypeError, match="target must hold class indices"):
        plotting.soft_labels(PROBABILITIES, torch.tensor([0.0, 1.7, 0.0, 0.0]))
    with pytest.raises(IndexError, match="ignored label -100"):
        plotting.soft_labels(PROBABILITIES, torch.tensor([0, 1, 0, -100]))
    with pytest.raises(IndexError, match=r"class indices in \[0, 2\)"):
        plotting.soft_labels(PROBABILITIES, torch.tensor([0, 1, 0, 2]))


def test_without_matplotlib_the_error_names_the_extra():
    code = (
        "import sys\nsys.modules['matplotlib'] = None\nimport torch\nfrom softlabels import plotting\n"
        "try:\n    plotting.soft_labels(torch.ones(2, 1), torch.zeros(2).long())\n"
        "except ImportError as error:\n    print(error)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "softlabels.plotting needs matplotlib: pip install 'softlabels[plot]'\n"


def trained(**options):
    """A loss that has seen classes 0 and 3, 1 and 2, 4 and 5 taken for each other."""
    like = torch.tensor([3, 2, 1, 0, 5, 4])
    criterion = softlabels.BetaSmoothingLoss(spread=("classes", "samples"), num_samples=12, **options)
    target = torch.arange(12) % 6
    logits = 4.0 * torch.nn.functional.one_hot(target, 6) + 3.0 * torch.nn.functional.one_hot(like[target], 6)
    criterion(logits.requires_grad_(), target, index=torch.arange(12))
    return criterion


def test_class_profiles_put_alike_classes_side_by_side():
    ax = plotting.class_profiles(trained(ranking="none"), title="profiles")
    order = [int(label.get_text()) for label in ax.get_yticklabels()]
    assert {frozenset(order[i : i + 2]) for i in (0, 2, 4)} == {frozenset(p) for p in ((0, 3), (1, 2), (4, 5))}
    shares = ax.images[0].get_array()
    assert np.allclose(shares.sum(1), 1.0)
    assert np.allclose(np.diag(shares), 0.0)
    for i, c in enumerate(order):
        assert order[int(shares[i].argmax())] == [3, 2, 1, 0, 5, 4][c]
    assert ax.get_title() == "profiles"
    with pytest.raises(ValueError, match="names must be one per class, 6, got 1"):
        plotting.class_profiles(trained(ranking="none"), names=["a"])
    with pytest.raises(ValueError, match="spread='classes' or 'samples' after a training batch"):
        plotting.class_profiles(softlabels.BetaSmoothingLoss())


def test_hardest_are_those_whose_label_was_doubted():
    criterion = trained(ranking="history")
    wrong = torch.full((1, 6), -4.0)
    wrong[0, 5] = 4.0
    for _ in range(2):
        criterion(wrong.clone().requires_grad_(), torch.tensor([1]), index=torch.tensor([7]))
    found = plotting.hardest(criterion, 3)
    assert found.samples[0] == 7
    assert found.taken_for[0] == 5
    assert found.doubt[0] > found.doubt[1] >= found.doubt[2]
    assert len(plotting.hardest(criterion, 100).samples) == 12
    with pytest.raises(ValueError, match="ranking='history'"):
        plotting.hardest(trained(ranking="none"))
