"""Pictures of soft labels and of what they do to a model (extra ``softlabels[plot]``).

Each function draws on the axes it is given, or on those of a figure of its own, and returns them; pyplot and its
current figure are left alone. Text and lines take the colours of the axes' style, so that a dark style stays dark.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from softlabels import _checks
from softlabels.metrics import _rows
from softlabels.metrics.calibration import ReliabilityCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from softlabels import BetaSmoothingLoss

__all__ = ["HardSamples", "class_profiles", "hardest", "reliability_diagram", "soft_labels"]

# Of middling luminance: contrast of at least 3 with white paper and with dark pages, and different in grey.
BLUE, ORANGE, GREY = "#2f81c1", "#dd7e33", "#8c8c8c"
MARKERS = "osD^v"  # told apart in print
CALIBRATED = "as right as sure"  # the diagonal, drawn once


def reliability_diagram(
    curve: ReliabilityCurve, *, ax: Axes | None = None, title: str | None = None, label: str | None = None
) -> Axes:
    """Draw accuracy against confidence.

    Bars are the accuracy of each bin; hatched is the gap between it and the bin's mean confidence, the error of
    calibration. Dots stand at mean confidence and accuracy, with an area in proportion to the samples in the bin, so
    that a large gap of few samples looks as small as it counts. On the diagonal, predictions are right as often as
    they are sure.

    With a ``label``, the dots are joined by a line instead, and the error stands in the legend: curves are compared by
    drawing one after the other on the same axes.

    Args:
        curve: From [`reliability_curve`][softlabels.metrics.reliability_curve], or from the method of that name of
            [`CalibrationError`][softlabels.metrics.CalibrationError].
        ax: Matplotlib axes to draw on. None: those of a new figure, ``ax.figure``, which pyplot does not know.
        title: Written above; without a label, before the expected calibration error. None: the error alone, or the
            title that the axes have.
        label: Name of the curve, for a diagram of several.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``curve`` is not a reliability curve, or ``ax`` is not axes.
        ValueError: ``curve`` is class-wise.

    Example:
        >>> import torch
        >>> from softlabels.metrics import reliability_curve
        >>> from softlabels.plotting import reliability_diagram
        >>> logits, target = 3 * torch.randn(500, 10), torch.randint(10, (500,))
        >>> ax = reliability_diagram(reliability_curve(logits, target), title="untrained")
        >>> ax.get_title().startswith("untrained, ECE ")
        True
        >>> ax = reliability_diagram(reliability_curve(logits, target), label="untrained", title="digits")
        >>> ax = reliability_diagram(reliability_curve(logits / 3, target), label="divided by 3", ax=ax)
        >>> len(ax.get_legend().get_texts())  # perfect calibration, and the two curves
        3

    Reference:
        Guo et al., *On Calibration of Modern Neural Networks*, 2017, Fig. 1.
    """
    if not isinstance(curve, ReliabilityCurve):
        raise TypeError(
            f"curve must be a ReliabilityCurve, such as softlabels.metrics.reliability_curve(logits, target) returns, "
            f"got {type(curve).__name__}"
        )
    if curve.count.dim() != 1:
        raise ValueError(
            f"curve must be of the most likely class, (B,), got class-wise curves of shape {tuple(curve.count.shape)}"
        )
    ax = _axes(ax)
    ink = ax.xaxis.label.get_color()
    if CALIBRATED not in ax.get_legend_handles_labels()[1]:
        ax.plot([0, 1], [0, 1], color=ink, linestyle="--", linewidth=1.0, label=CALIBRATED)
    filled = curve.count > 0
    weight = curve.count if curve.weight is None else curve.weight
    confidence, accuracy = curve.confidence[filled].tolist(), curve.accuracy[filled].tolist()
    areas = (400.0 * weight[filled] / weight.sum()).tolist()
    error = f"ECE {100 * curve.error().item():.1f} %"
    if label is None:
        color, marker = ORANGE, "o"
        _bars(ax, curve, filled, ink)
        ax.set_title(", ".join(filter(None, [title, error])))
    else:
        earlier = len(ax.lines) - 1
        color, marker = (BLUE, ORANGE, GREY)[earlier % 3], MARKERS[earlier % len(MARKERS)]
        ax.plot(confidence, accuracy, color=color, marker=marker, markersize=4.0, label=f"{label}, {error}")
        if title is not None:
            ax.set_title(title)
    dots = functools.partial(ax.scatter, color=color, marker=marker, edgecolors=ink, linewidths=0.8, zorder=3)
    dots(confidence, accuracy, areas, clip_on=False)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="confidence", ylabel="accuracy")
    handles, labels = ax.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))  # what was drawn twice is named once
    ax.legend(named.values(), named.keys(), loc="upper left", fontsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def soft_labels(targets: Tensor, target: Tensor, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Draw the soft label of each sample of a batch, the one with the surest true class first.

    Each sample is one column, split into the probability of its true class, of the other class that gets most, and
    of all the rest. Label smoothing gives columns that are all alike; Beta smoothing gives each sample a true class of
    its own; a teacher also says which class the rest goes to. The dashed line is the mean of the true class, which is
    what methods are compared at.

    Args:
        targets: Soft labels (N, K), for example from
            [`beta_smoothing_targets`][softlabels.functional.beta_smoothing_targets] or
            [`distillation_targets`][softlabels.functional.distillation_targets].
        target: Class indices (N).
        ax: Matplotlib axes to draw on. None: those of a new figure, ``ax.figure``, which pyplot does not know.
        title: Written above.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        IndexError: a label is not a class.
        ValueError: shapes do not match.

    Example:
        >>> import torch
        >>> from softlabels.functional import beta_smoothing_targets
        >>> from softlabels.plotting import soft_labels
        >>> target = torch.randint(10, (32,))
        >>> confidence = torch.rand(32)  # in training: of an EMA of the model
        >>> ax = soft_labels(beta_smoothing_targets(target, 10, confidence), target)
        >>> ax.get_xlabel()
        'samples, by soft label of the true class'

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, 2020, sec. 5 and 6.
    """
    _checks.check_tensor("targets", targets)
    if targets.dim() != 2 or 0 in targets.shape or not targets.is_floating_point():
        raise ValueError(
            f"targets must be soft labels (N, K) of a floating dtype, got {targets.dtype} of shape "
            f"{tuple(targets.shape)}"
        )
    _rows.check_target(target, targets, "targets")
    target = target.long()
    if (target == -100).any():
        raise IndexError("target must hold the class of each row, got the ignored label -100; leave such rows out")
    _checks.check_labels(target, targets.shape[1])
    total = targets.sum(1, dtype=torch.float64)
    bad = (targets.amin(1) < 0) | ~((total - 1.0).abs() < 0.01)
    if bad.any():
        raise ValueError(
            f"targets must be probabilities that sum to 1, got a row {targets[bad][0, :5].tolist()}... with sum "
            f"{total[bad][0].item():g}; logits need softmax(1)"
        )
    count = targets.shape[0]
    targets, target = targets.detach().double().cpu(), target.cpu()
    ax = _axes(ax)
    ink = ax.xaxis.label.get_color()
    own = targets.gather(1, target.unsqueeze(1)).squeeze(1)
    others = targets.scatter(1, target.unsqueeze(1), 0.0)
    order = own.argsort(descending=True, stable=True)
    top = others.amax(1)
    levels = torch.stack([own * 0, own, own + top, targets.sum(1)])[:, order].tolist()
    edges = [i + 0.5 for i in range(count + 1)]
    parts = functools.partial(ax.stairs, edges=edges, fill=True, edgecolor=ink, linewidth=0.4 if count <= 128 else 0.0)
    for name, color, hatch, low, high in zip(
        ("true class", "largest other class", "all other classes"),
        (BLUE, ORANGE, GREY),
        ("", "///", "..."),
        levels[:-1],
        levels[1:],
        strict=True,
    ):
        parts(high, baseline=low, facecolor=color, hatch=hatch, label=name)
    mean = own.mean().item()
    ax.axhline(mean, color=ink, linestyle="--", linewidth=1.0, label=f"mean of the true class, {mean:.2f}")
    ax.set(xlim=(0.5, count + 0.5), ylim=(0, 1), ylabel="probability")
    ax.set_xlabel("samples, by soft label of the true class")
    ax.legend(loc="lower left", fontsize="small")
    if title:
        ax.set_title(title)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def class_profiles(
    criterion: BetaSmoothingLoss,
    *,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    r"""Draw which classes are taken for which, in an order that puts classes next to those that they are like.

    The shade of row $c$ and column $k$ is the share of class $k$ in what the predictions on rows of class $c$ give to
    other classes: where Beta smoothing with ``spread="classes"`` puts the mass that leaves the label. Groups of alike
    classes are dark squares on the diagonal, which itself is empty. The order is that of the leaves of an average
    linkage of the shares, both ways summed.

    Args:
        criterion: A loss with ``spread="classes"`` or ``"samples"`` that has seen training batches.
        names: Names of the classes, written at both axes. None: their numbers, where there are at most 40.
        ax: Matplotlib axes to draw on. None: those of a new figure, ``ax.figure``, which pyplot does not know.
        title: Written above.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the loss has no class profiles, or ``names`` are not one per class.

    Example:
        >>> import torch, softlabels
        >>> criterion = softlabels.BetaSmoothingLoss(ranking="batch", spread="classes")
        >>> logits = torch.randn(64, 5, requires_grad=True)
        >>> loss = criterion(logits, torch.randint(5, (64,)))
        >>> ax = softlabels.plotting.class_profiles(criterion, names=["shirt", "coat", "dress", "bag", "boot"])
        >>> ax.get_ylabel()
        'class'

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, 2020, sec. 8, which leaves better
        priors open; this is one of ours.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    profiles = getattr(criterion, "class_profiles", None)
    if profiles is None or profiles.numel() == 0:
        raise ValueError(
            f"criterion must be a loss with spread='classes' or 'samples' after a training batch, got {criterion!r}"
        )
    num_classes = len(profiles)
    if names is not None and len(names) != num_classes:
        raise ValueError(f"names must be one per class, {num_classes}, got {len(names)}")
    shares = profiles.detach().double().cpu().clone().fill_diagonal_(0.0)
    shares /= shares.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    order = list(range(num_classes))
    if num_classes > 2:
        alike = shares + shares.T
        distances = squareform((alike.max() - alike).fill_diagonal_(0.0).numpy())
        order = leaves_list(linkage(distances, "average", optimal_ordering=num_classes <= 500)).tolist()
    ax = _axes(ax)
    image = ax.imshow(shares[order][:, order].numpy(), cmap="Blues", vmin=0.0, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label="share of what leaves the label")
    ax.set(ylabel="class", xlabel="taken for")
    if names is not None or num_classes <= 40:
        shown = [str(c) if names is None else names[c] for c in order]
        ax.set_xticks(range(num_classes), shown, rotation=90)
        ax.set_yticks(range(num_classes), shown)
    if title:
        ax.set_title(title)
    return ax


class HardSamples(NamedTuple):
    """What [`hardest`][softlabels.plotting.hardest] returns.

    Attributes:
        samples: (n,) int64. Their numbers, the one of most doubt first.
        doubt: (n,) float32. One less the mean probability that their label had at past visits.
        taken_for: (n,) int64. The class of the largest mean probability at past visits; None where the loss does not
            remember predictions.

    Example:
        >>> import torch
        >>> from softlabels.plotting import HardSamples
        >>> found = HardSamples(samples=torch.tensor([2]), doubt=torch.tensor([0.9]), taken_for=None)
        >>> found.samples.tolist()
        [2]

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, 2020, sec. 8, which leaves better
        priors open; this is one of ours.
    """

    samples: Tensor
    doubt: Tensor
    taken_for: Tensor | None


def hardest(criterion: BetaSmoothingLoss, n: int = 20) -> HardSamples:
    """List the samples whose label was doubted most over the whole run: wrong labels are among them.

    Args:
        criterion: A loss with ``ranking="history"`` that has seen training batches; with ``spread="samples"`` it also
            says what the samples were taken for.
        n: How many, at least 1; fewer where fewer samples were seen.

    Raises:
        ValueError: the loss has no history of its samples.

    Example:
        >>> import torch, softlabels
        >>> criterion = softlabels.BetaSmoothingLoss(ranking="history", spread="samples", num_samples=3)
        >>> logits = torch.tensor([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0]], requires_grad=True)
        >>> loss = criterion(logits, torch.tensor([0, 1, 1]), index=torch.arange(3))  # the last label is wrong
        >>> found = softlabels.plotting.hardest(criterion, n=1)
        >>> found.samples.item(), found.taken_for.item()
        (2, 0)

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, 2020, sec. 8, which leaves better
        priors open; this is one of ours.
    """
    _checks.check_count("n", n)
    history = getattr(criterion, "history", None)
    if history is None:
        raise ValueError(f"criterion must be a loss with ranking='history', got {criterion!r}")
    seen = (history.visits > 0).nonzero().squeeze(1)
    doubt, place = history.doubt[seen].sort(descending=True, stable=True)
    index = seen[place[:n]]
    past = getattr(getattr(criterion, "learned_spread", None), "past", None)
    return HardSamples(index, doubt[:n], None if past is None else past.likeliest(index))


def _bars(ax: Axes, curve: ReliabilityCurve, filled: Tensor, ink: Any) -> None:
    """The accuracy of each bin that holds samples, and the gap to its confidence."""
    confidence, accuracy = curve.confidence[filled], curve.accuracy[filled]
    left, right = curve.edges[:-1][filled], curve.edges[1:][filled]
    bars = functools.partial(ax.bar, left.tolist(), width=(right - left).tolist(), align="edge", linewidth=0.8)
    bars(accuracy.tolist(), color=BLUE, edgecolor=ink, label="accuracy")
    hatched = functools.partial(bars, facecolor="none", edgecolor=ORANGE, hatch="////", label="gap to confidence")
    hatched((confidence - accuracy).tolist(), bottom=accuracy.tolist())


def _axes(ax: Axes | None) -> Axes:
    """The axes given, or those of a figure of its own."""
    try:
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("softlabels.plotting needs matplotlib: pip install 'softlabels[plot]'") from error
    if ax is None:
        return Figure(layout="constrained").subplots()
    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be Axes, such as figure.subplots() returns, got {type(ax).__name__}")
    return ax
