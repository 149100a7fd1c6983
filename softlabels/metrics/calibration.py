"""Calibration: whether predictions are right as often as they are sure (Guo et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softlabels import _checks
from softlabels._reading import can_read
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
        weight: (B,) Summed sample weight of each bin, float64; what bins count for. None: ``count``.

    The curves of class-wise calibration are stacked: (K, B), and with equal-mass bins (K, B + 1) edges.

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
    weight: Tensor | None = None

    def error(self, norm: str = "l1") -> Tensor:
        """Calibration error of this curve; see [`calibration_error`][softlabels.metrics.calibration_error].

        Args:
            norm: ``"l1"``, ``"l2"`` or ``"max"``.

        Returns:
            A float64 scalar, nan for a curve of no samples. Of class-wise curves: the mean over classes.

        Raises:
            ValueError: ``norm`` is another.
        """
        _checks.check_choice("norm", norm, NORMS)
        gap = torch.where(self.count > 0, (self.accuracy - self.confidence).abs(), 0.0).double()
        weight = (self.count if self.weight is None else self.weight).double()
        share = weight / weight.sum(-1, keepdim=True)  # nan without samples, and so is the error
        if norm == "max":
            return (gap + 0.0 * share).amax(-1).mean()
        power = 1.0 if norm == "l1" else 2.0
        return (share * gap**power).sum(-1).pow(1.0 / power).mean()


def calibration_error(
    input: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    norm: str = "l1",
    binning: str = "equal-width",
    classwise: bool = False,
    sample_weight: Tensor | None = None,
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

    Class-wise, the probability of class $k$ is held against how often the label is $k$, over all samples: the error of
    each class has $\mathrm{conf}_b$ of its probabilities and $\mathrm{acc}_b$ of its labels, and the result is their
    mean over the $K$ classes. The probabilities of all classes are kept in float64 then.

    Args:
        input: Logits (K), (N, K) or (N, K, d1, ...) of any floating dtype.
        target: Class indices of row shape.
        n_bins: Number of bins. The paper's scripts use 20.
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        binning: ``"equal-width"``: bins of the same width on [0, 1]. ``"equal-mass"``: bins that each hold the same
            number of samples (the same summed weight), but that equal confidences share a bin.
        classwise: Of all classes instead of the most likely one.
        sample_weight: Weights of row shape, not negative: a sample of weight 2 counts as two. None: 1.
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
        sec. 7. Class-wise: Kull et al., *Beyond Temperature Scaling*, 2019, Eq. 4.
    """
    _checks.check_choice("norm", norm, NORMS)
    check_bins(n_bins, binning, classwise)
    predicted = events(input, target, sample_weight, classwise, from_logits, ignore_index)
    return curve(*predicted, n_bins, binning).error(norm)


def reliability_curve(
    input: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    binning: str = "equal-width",
    classwise: bool = False,
    sample_weight: Tensor | None = None,
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
        classwise: A curve of each class, stacked, instead of one of the most likely class.
        sample_weight: Weights of row shape, not negative. ``count`` is of samples all the same. None: 1.
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
    check_bins(n_bins, binning, classwise)
    predicted = events(input, target, sample_weight, classwise, from_logits, ignore_index)
    return curve(*predicted, n_bins, binning)


def check_bins(n_bins: int, binning: str, classwise: bool) -> None:
    """Check the options that decide the bins."""
    _checks.check_count("n_bins", n_bins)
    _checks.check_choice("binning", binning, BINNINGS)
    _checks.check_flag("classwise", classwise)


def events(
    input: Tensor, target: Tensor, sample_weight: Tensor | None, classwise: bool, from_logits: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The probabilities of C events, which of them came true, -1 for none, and the weight; (C, n), (n,) and (n,).

    Class-wise, the events are the K classes; else the one that the most likely class is the label. Probabilities made
    of logits are float64.
    """
    input, target, weight = _rows.checked(input, target, sample_weight, from_logits, ignore_index, "input")
    dim, input = _rows.class_dim(input), input.detach()
    if classwise:
        p = _rows.by_chunks(_softmax, input) if from_logits else input.movedim(dim, 0)
        return p.reshape(len(p), -1), target.flatten(), weight.flatten()
    if not from_logits:
        p, right = input.amax(dim), (input.argmax(dim) == target).double()
    else:
        p, right = _rows.by_chunks(_top_class, input, target)
        tied = (right > 0) & (p <= 0.5)  # perhaps: in a row that is surer, one class is the largest
        if can_read(tied):
            for some in tied.nonzero().split(_rows.CHUNK["cpu"] // input.shape[dim] + 1):
                rows = some.unbind(1)
                right[rows] = (input.movedim(dim, -1)[rows].argmax(-1) == target[rows]).double()
    return p.reshape(1, -1), right.flatten() - 1.0, weight.flatten()


def curve(p: Tensor, true: Tensor, weight: Tensor, n_bins: int, binning: str) -> ReliabilityCurve:
    """The reliability curve of all samples at once."""
    if binning == "equal-width":
        return curve_of_sums(equal_width_sums(p, true, weight, n_bins))
    p, true, weight = (values[..., weight != 0].double() for values in (p, true, weight))
    inner = p.new_zeros(len(p), n_bins - 1)
    if len(weight):
        ascending, order = p.sort(1)
        mass = weight[order].cumsum(1)
        ends = torch.arange(1, n_bins, device=p.device) * mass[:, -1:] / n_bins
        inner = ascending.gather(1, (torch.searchsorted(mass, ends, right=True) - 1).clamp(min=0))
    edges = torch.cat([inner.new_zeros(len(p), 1), inner, inner.new_ones(len(p), 1)], 1)
    return curve_of_sums(_sums(p, true, weight, inner), edges.squeeze(0))


def equal_width_sums(p: Tensor, true: Tensor, weight: Tensor, n_bins: int) -> Tensor:
    """Sums of equal-width bins, (C, 4, B), to be added up.

    Edges are rounded to the dtype of ``p``: a probability of 0.7 is on the edge 0.7, whatever both round to.
    """
    return _sums(p, true, weight, _equal_edges(n_bins, p)[1:-1].to(p.dtype).double().expand(len(p), -1))


def curve_of_sums(sums: Tensor, edges: Tensor | None = None) -> ReliabilityCurve:
    """Means of the bins, from their sums (C, 4, B)."""
    count, weight, confidence, true = sums.unbind(1) if len(sums) > 1 else sums[0]
    edges = _equal_edges(count.shape[-1], sums) if edges is None else edges
    return ReliabilityCurve(confidence / weight, true / weight, count.long(), edges, weight)


def _equal_edges(n_bins: int, like: Tensor) -> Tensor:
    """Edges of equal-width bins, (B + 1,) in float64."""
    return torch.arange(n_bins + 1, dtype=torch.float64, device=like.device) / n_bins


def _sums(p: Tensor, true: Tensor, weight: Tensor, inner: Tensor) -> Tensor:
    """Samples, weight, and weighted probability and truth of each event between inner edges (C, B - 1); (C, 4, B)."""
    n_bins, sums = inner.shape[1] + 1, []
    for number, (of_event, edges) in enumerate(zip(p, inner, strict=True)):
        # A bin too many, for what does not count.
        index = torch.bucketize(of_event.double().contiguous(), edges).masked_fill(weight == 0, n_bins)
        values = torch.ones_like(weight), weight, weight * of_event, weight * (true == number)
        sums.append(torch.stack([v.new_zeros(n_bins + 1).scatter_add(0, index, v)[:n_bins] for v in values]))
    return torch.stack(sums)


def _softmax(logits: Tensor) -> Tensor:
    """Probabilities, classes first: (K, n, d) from (n, K, d)."""
    return logits.double().softmax(1).movedim(1, 0)


def _top_class(logits: Tensor, target: Tensor) -> Tensor:
    """Largest probability, and 1 where its class is the label: one of several, where numbers can be read; (2, n, d)."""
    largest = logits.amax(1, keepdim=True)
    total = logits.to(torch.float64, copy=True).sub_(largest).exp_().sum(1)
    if can_read(logits, target):  # then argmax is slow
        right = (logits.gather(1, target.unsqueeze(1)) == largest).squeeze(1)
    else:
        right = logits.argmax(1) == target
    return torch.stack([1.0 / total, right.double()])
