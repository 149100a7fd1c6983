"""Calibration: whether predictions are right as often as they are sure (Guo et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softlabels.functional import _checks
from softlabels.metrics import _rows

NORMS = ("l1", "l2", "max")
BINNINGS = ("equal-width", "equal-mass")


@dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """What [`reliability_curve`][softlabels.metrics.reliability_curve] returns; B is the number of bins.

    Attributes:
        confidence: (B,) Mean confidence of each bin, float64; nan where the bin is empty.
        accuracy: (B,) Share of right predictions of each bin, float64; nan where the bin is empty.
        count: (B,) Number of samples in each bin, int64.
        edges: (B + 1,) Bin b holds the confidences in (edges[b], edges[b + 1]], float64. Probabilities of a narrower
            dtype are compared with the edges rounded to that dtype.

    Example:
        >>> import torch
        >>> from softlabels.metrics import ReliabilityCurve
        >>> half, quarter = torch.tensor([0.5]), torch.tensor([0.25])
        >>> ReliabilityCurve(half, quarter, count=torch.tensor([8]), edges=torch.tensor([0.0, 1.0])).error()
        tensor(0.2500, dtype=torch.float64)

    Reference:
        Guo et al., *On Calibration of Modern Neural Networks*, 2017, sec. 2.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor
    edges: Tensor

    def error(self, norm: str = "l1") -> Tensor:
        """Calibration error of this curve; see [`calibration_error`][softlabels.metrics.calibration_error].

        Args:
            norm: ``"l1"``, ``"l2"`` or ``"max"``.

        Returns:
            A float64 scalar, nan for a curve of no samples.

        Raises:
            ValueError: ``norm`` is another.
        """
        _checks.check_choice("norm", norm, NORMS)
        gap = torch.where(self.count > 0, (self.accuracy - self.confidence).abs(), 0.0).double()
        share = self.count.double() / self.count.sum()  # nan without samples, and so is the error
        if norm == "l1":
            return (share * gap).sum()
        if norm == "l2":
            return (share * gap**2).sum().sqrt()
        return (gap + 0.0 * share).max()


def calibration_error(
    input: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    norm: str = "l1",
    binning: str = "equal-width",
    from_logits: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    r"""How far the confidence of predictions is from their accuracy.

    The confidence of a prediction is its largest class probability. Samples are binned by confidence; with $n_b$
    samples, accuracy $\mathrm{acc}_b$ and mean confidence $\mathrm{conf}_b$ in bin $b$, the error is

    $$\sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|, \qquad
    \Big(\sum_b \frac{n_b}{n} (\mathrm{acc}_b - \mathrm{conf}_b)^2\Big)^{1/2}, \qquad
    \max_{b:\, n_b > 0} |\mathrm{acc}_b - \mathrm{conf}_b|$$

    for ``norm`` ``"l1"`` (the expected calibration error, ECE), ``"l2"`` and ``"max"``. Bins are open on the left and
    closed on the right; a confidence of exactly 1 is in the last bin, one of exactly 0 in the first.

    Args:
        input: Logits (K), (N, K) or (N, K, d1, ...) of any floating dtype.
        target: Class indices of row shape.
        n_bins: Number of bins. The paper's scripts use 20.
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        binning: ``"equal-width"``: bins of the same width on [0, 1]. ``"equal-mass"``: bins that each hold the same
            number of samples, but that equal confidences share a bin.
        from_logits: False says that ``input`` holds class probabilities instead.
        ignore_index: Label of the rows that do not count.

    Returns:
        A scalar in [0, 1], float64 (multiply by 100 for the percentages in papers); nan where no row counts.
        Sums are float64, so that the order of the samples does not matter.

    Raises:
        IndexError: a label is neither a class nor ``ignore_index``.
        ValueError: an option is out of range; shapes do not match; or ``input`` was said to hold probabilities and
            does not.

    Example:
        >>> import torch
        >>> from softlabels.metrics import calibration_error
        >>> probabilities = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 1.0], [0.0, 1.0]])
        >>> target = torch.tensor([0, 1, 1, 1])  # sure at 0.75: right at 0.5; sure at 1: right at 1
        >>> calibration_error(probabilities, target, from_logits=False)
        tensor(0.1250, dtype=torch.float64)

    Reference:
        Guo et al., *On Calibration of Modern Neural Networks*, 2017, Eq. 3 and 5; used in Zhang & Sabuncu (2020),
        sec. 7.
    """
    _checks.check_choice("norm", norm, NORMS)
    return reliability_curve(
        input, target, n_bins=n_bins, binning=binning, from_logits=from_logits, ignore_index=ignore_index
    ).error(norm)


def reliability_curve(
    input: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    binning: str = "equal-width",
    from_logits: bool = True,
    ignore_index: int = -100,
) -> ReliabilityCurve:
    r"""Mean confidence, accuracy and number of samples in each bin of confidence.

    Args:
        input: Logits (K), (N, K) or (N, K, d1, ...) of any floating dtype.
        target: Class indices of row shape.
        n_bins: Number of bins.
        binning: ``"equal-width"`` or ``"equal-mass"``, as in
            [`calibration_error`][softlabels.metrics.calibration_error].
        from_logits: False says that ``input`` holds class probabilities instead.
        ignore_index: Label of the rows that do not count.

    Returns:
        ``confidence``, ``accuracy``, ``count`` and ``edges`` of the bins; ``error(norm)`` is their calibration error,
        and [`plotting.reliability_diagram`][softlabels.plotting.reliability_diagram] draws it.

    Raises:
        IndexError: a label is neither a class nor ``ignore_index``.
        ValueError: an option is out of range; shapes do not match; or ``input`` was said to hold probabilities and
            does not.

    Example:
        >>> import torch
        >>> from softlabels.metrics import reliability_curve
        >>> probabilities = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 1.0], [0.0, 1.0]])
        >>> curve = reliability_curve(probabilities, torch.tensor([0, 1, 1, 1]), n_bins=4, from_logits=False)
        >>> curve.count.tolist(), curve.accuracy.tolist()
        ([0, 0, 2, 2], [nan, nan, 0.5, 1.0])

    Reference:
        Guo et al., *On Calibration of Modern Neural Networks*, 2017, sec. 2.
    """
    _checks.check_count("n_bins", n_bins)
    _checks.check_choice("binning", binning, BINNINGS)
    if binning == "equal-width":
        return curve_of_sums(bin_sums(input, target, n_bins, from_logits, ignore_index))
    confidence, correct, kept = _top_class(input, target, from_logits, ignore_index)
    confidence, correct = confidence[kept], correct[kept]
    n = confidence.numel()
    last_of_bin = torch.arange(1, n_bins, device=confidence.device) * n // n_bins - 1
    inner = confidence.sort().values[last_of_bin.clamp(min=0)] if n else confidence.new_zeros(n_bins - 1)
    edges = torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])
    return curve_of_sums(_sums(confidence, correct, torch.bucketize(confidence, inner), n_bins), edges)


def bin_sums(input: Tensor, target: Tensor, n_bins: int, from_logits: bool, ignore_index: int) -> Tensor:
    """Count, summed confidence and right predictions of each equal-width bin: (3, B) in float64, to be added up."""
    confidence, correct, kept = _top_class(input, target, from_logits, ignore_index)
    # A probability of 0.7 in the caller's dtype is on the edge 0.7, whatever both round to.
    dtype = torch.float64 if from_logits else input.dtype
    inner = equal_edges(n_bins, confidence.device)[1:-1].to(dtype).double()
    index = torch.where(kept, torch.bucketize(confidence, inner), n_bins)  # a bin too many, for the ignored rows
    return _sums(confidence, correct, index, n_bins + 1)[:, :n_bins]


def curve_of_sums(sums: Tensor, edges: Tensor | None = None) -> ReliabilityCurve:
    """Means of the bins, from their sums."""
    count, confidence, correct = sums
    edges = equal_edges(len(count), sums.device) if edges is None else edges
    return ReliabilityCurve(confidence / count, correct / count, count.long(), edges)


def equal_edges(n_bins: int, device: torch.device) -> Tensor:
    """Edges of equal-width bins, (B + 1,) in float64."""
    return torch.arange(n_bins + 1, dtype=torch.float64, device=device) / n_bins


def _sums(confidence: Tensor, correct: Tensor, index: Tensor, n_bins: int) -> Tensor:
    values = torch.stack([torch.ones_like(confidence), confidence, correct])
    return values.new_zeros(3, n_bins).scatter_add_(1, index.expand(3, -1), values)


def _top_class(input: Tensor, target: Tensor, from_logits: bool, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest class probability (float64), whether its class is the label (float64), which rows count; each (n,)."""
    _checks.check_flag("from_logits", from_logits)
    target, kept = _rows.labels(input, target, ignore_index)
    input = input.detach()
    if not from_logits:
        _rows.check_probabilities(input, kept)
        largest, predicted = input.max(_rows.class_dim(input))
        return largest.double().flatten(), (predicted == target).double().flatten(), kept.flatten()
    total, correct = _rows.by_chunks(_compare_with_top_class, input, target)
    # Where the total is 2 or more, another class may be as large as the label's: then the first of them is predicted.
    doubtful = (correct > 0) & (total >= 2.0)
    if _checks.peek(doubtful.any()):
        rows = input.movedim(_rows.class_dim(input), -1)[doubtful]
        correct[doubtful] = (rows.argmax(1) == target[doubtful]).double()
    return (1.0 / total).flatten(), correct.flatten(), kept.flatten()


def _compare_with_top_class(logits: Tensor, target: Tensor) -> Tensor:
    """Probabilities' sum over that of the top class, and whether the label is the top class; (2, n, d) from (n, K, d).

    On a CPU, where argmax is slow, a label that is as large as the top class counts as the top class.
    """
    total = _rows.below_top(logits).exp_().sum(1)
    if logits.device.type == "cpu":
        correct = (logits.gather(1, target.unsqueeze(1)) == logits.amax(1, keepdim=True)).squeeze(1)
    else:
        correct = logits.argmax(1) == target
    return torch.stack([total, correct.double()])
