"""The metrics as torchmetrics classes: fed batch by batch, synchronised between processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from softlabels import _checks
from softlabels.metrics.calibration import (
    NORMS,
    ReliabilityCurve,
    check_bins,
    curve,
    curve_of_sums,
    equal_width_sums,
    events,
)
from softlabels.metrics.diversity import nearest_neighbor_entropy, true_class_log_odds
from softlabels.metrics.uncertainty import entropy_sums


class _Metric(Metric):
    """A metric of predictions: the options that all share, and states in float64.

    States are replaced, never changed in place: those made under ``torch.inference_mode`` may not be, outside of it.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, from_logits: bool, ignore_index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _checks.check_flag("from_logits", from_logits)
        _checks.check_ignore_index(ignore_index)
        self.from_logits, self.ignore_index = from_logits, ignore_index
        self.set_dtype(torch.float64)  # also what a process without data contributes

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Follow `.to` to another device but not to another dtype: in bfloat16, a count stops at 256."""

        def move(tensor: Tensor) -> Tensor:
            try:
                moved = fn(tensor)
            except TypeError:  # a device without float64, such as mps: states stay where they are
                return tensor
            return tensor.to(moved.device, torch.float64) if tensor.is_floating_point() else moved

        return super()._apply(move, *args, **kwargs)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several.

        Args:
            val: A result of ``forward`` or ``compute``, or a list of them. None: the result of ``compute``.
            ax: Axes to draw on. None: new ones.

        Returns:
            The figure and the axes.
        """
        return self._plot(val, ax)


class AveragePredictiveUncertainty(_Metric):
    r"""Mean entropy of the predictions, in nats, fed batch by batch.

    The value of [`average_predictive_uncertainty`][softlabels.metrics.average_predictive_uncertainty] over all
    batches of all processes. The state is two numbers.

    Args:
        from_logits: False says that predictions are class probabilities instead of logits.
        ignore_index: Label of the rows that do not count.
        **kwargs: Options of ``torchmetrics.Metric``.

    Shape:
        ``update(preds, target=None, sample_weight=None)``: logits (K), (N, K) or (N, K, d1, ...); class indices of row
        shape, which only say which rows are left out; weights of row shape. ``compute()``: a scalar in [0, log K],
        float64; nan without rows.

    Raises:
        ImportError: torchmetrics is not installed.

    Example:
        >>> import torch
        >>> from softlabels.metrics import AveragePredictiveUncertainty
        >>> metric = AveragePredictiveUncertainty()
        >>> metric.update(torch.zeros(8, 4))
        >>> metric.update(torch.tensor([[100.0, 0.0, 0.0, 0.0]]))
        >>> metric.compute()  # 8 / 9 of log 4
        tensor(1.2323, dtype=torch.float64)

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, 2020, Eq. 4.
    """

    higher_is_better = None
    plot_lower_bound = 0.0
    sums: Tensor

    def __init__(self, *, from_logits: bool = True, ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(from_logits, ignore_index, **kwargs)
        self.add_state("sums", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor | None = None, sample_weight: Tensor | None = None) -> None:
        """Take a batch of predictions."""
        with torch.no_grad():
            sums = entropy_sums(preds, target, sample_weight, self.from_logits, self.ignore_index)
        self.sums = self.sums + torch.stack(sums)

    def compute(self) -> Tensor:
        """Mean entropy so far."""
        return torch.div(*self.sums)


class ConfidenceDiversity(_Metric):
    r"""Differential entropy of the true-class probability, in nats, fed batch by batch.

    The value of [`confidence_diversity`][softlabels.metrics.confidence_diversity] over all batches of all processes.
    Neighbours are found among all samples, so the state is two float64 per sample, 16 MB per million;
    ``compute_on_cpu=True`` keeps it in main memory. (torchmetrics' wrapper ``Running`` does not support metrics that
    keep samples.)

    Args:
        n_neighbors: Which nearest neighbour measures the density, at least 1.
        from_logits: False says that predictions are class probabilities instead of logits.
        ignore_index: Label of the rows that do not count.
        **kwargs: Options of ``torchmetrics.Metric``.

    Shape:
        ``update(preds, target, sample_weight=None)``: logits (K), (N, K) or (N, K, d1, ...); class indices and weights
        of row shape. ``compute()``: a scalar, float64; nan while no more than ``n_neighbors`` samples count.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: ``n_neighbors`` is out of range.

    Example:
        >>> import torch
        >>> from softlabels.metrics import ConfidenceDiversity, confidence_diversity
        >>> metric = ConfidenceDiversity()
        >>> logits, target = torch.randn(64, 10), torch.randint(10, (64,))
        >>> for batch in torch.arange(64).split(16):
        ...     metric.update(logits[batch], target[batch])
        >>> bool(metric.compute().isclose(confidence_diversity(logits, target)))
        True

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, 2020, Eq. 5.
    """

    higher_is_better = None
    rows: list[Tensor]

    def __init__(
        self, *, n_neighbors: int = 3, from_logits: bool = True, ignore_index: int = -100, **kwargs: Any
    ) -> None:
        super().__init__(from_logits, ignore_index, **kwargs)
        _checks.check_count("n_neighbors", n_neighbors)
        self.n_neighbors = n_neighbors
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> None:
        """Take a batch of predictions and their labels."""
        rows = true_class_log_odds(preds, target, sample_weight, self.from_logits, self.ignore_index)
        self.rows.append(torch.stack(rows, 1).flatten())

    def compute(self) -> Tensor:
        """Diversity so far."""
        odds, weight = _joined(self.rows, 2)
        return nearest_neighbor_entropy(odds, weight, self.n_neighbors)


class CalibrationError(_Metric):
    r"""Calibration error, fed batch by batch.

    The value of [`calibration_error`][softlabels.metrics.calibration_error] over all batches of all processes, to
    rounding in float64. With equal-width bins the state is four sums per bin (and class) and does not grow with the
    data. Equal-mass bins are found among all confidences: the state is three float64 per sample, 24 MB per million, or
    K + 2 class-wise.

    Args:
        n_bins: Number of bins.
        norm: ``"l1"`` (expected calibration error), ``"l2"`` or ``"max"``.
        binning: ``"equal-width"`` or ``"equal-mass"``.
        classwise: Of all classes instead of the most likely one.
        num_classes: $K$, which ``classwise=True`` needs.
        from_logits: False says that predictions are class probabilities instead of logits.
        ignore_index: Label of the rows that do not count.
        **kwargs: Options of ``torchmetrics.Metric``.

    Shape:
        ``update(preds, target, sample_weight=None)``: logits (K), (N, K) or (N, K, d1, ...); class indices and weights
        of row shape. ``compute()``: a scalar in [0, 1], float64; nan without rows.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: an option is out of range.

    Example:
        >>> import torch
        >>> from softlabels.metrics import CalibrationError
        >>> metric = CalibrationError(n_bins=20)
        >>> metric.update(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
        >>> metric.compute()  # sure at 0.8808, right at 0.5
        tensor(0.3808, dtype=torch.float64)
        >>> metric.reliability_curve().count.sum()
        tensor(2)

    Reference:
        Guo et al., *On Calibration of Modern Neural Networks*, 2017, Eq. 3; class-wise: Kull et al., *Beyond
        Temperature Scaling*, 2019, Eq. 4.
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    sums: Tensor
    rows: list[Tensor]

    def __init__(
        self,
        *,
        n_bins: int = 15,
        norm: str = "l1",
        binning: str = "equal-width",
        classwise: bool = False,
        num_classes: int | None = None,
        from_logits: bool = True,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(from_logits, ignore_index, **kwargs)
        check_bins(n_bins, binning, classwise)
        _checks.check_choice("norm", norm, NORMS)
        _checks.check_count("num_classes", num_classes if classwise else 1)
        self.n_bins, self.norm, self.binning = n_bins, norm, binning
        self.classwise, self.num_classes = classwise, num_classes
        self._events = num_classes if classwise and num_classes else 1
        if binning == "equal-width":
            self.add_state("sums", torch.zeros(self._events, 4, n_bins, dtype=torch.float64), dist_reduce_fx="sum")
        else:
            self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> None:
        """Take a batch of predictions and their labels."""
        p, true, weight = events(preds, target, sample_weight, self.classwise, self.from_logits, self.ignore_index)
        if len(p) != self._events:
            raise ValueError(f"preds must have num_classes={self.num_classes} classes, got shape {tuple(preds.shape)}")
        if self.binning == "equal-mass":
            self.rows.append(torch.cat([p, true.unsqueeze(0), weight.unsqueeze(0)]).T.flatten())
        else:
            self.sums = self.sums + equal_width_sums(p, true, weight, self.n_bins)

    def compute(self) -> Tensor:
        """Calibration error so far."""
        return self._curve().error(self.norm)

    def reliability_curve(self) -> ReliabilityCurve:
        """Bins so far, of all processes: see [`reliability_curve`][softlabels.metrics.reliability_curve].

        All processes must call it: one that calls alone waits for the others for ever.
        """
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            return self._curve()

    def _curve(self) -> ReliabilityCurve:
        if self.binning == "equal-width":
            return curve_of_sums(self.sums)
        rows = _joined(self.rows, self._events + 2)
        return curve(rows[:-2], rows[-2], rows[-1], self.n_bins, self.binning)


def _joined(state: list[Tensor], columns: int) -> Tensor:
    """Columns of the rows that were kept, flat as what a process without data contributes."""
    rows: Tensor = dim_zero_cat(state) if len(state) else torch.zeros(0, dtype=torch.float64)
    return rows.reshape(-1, columns).T
