"""Metrics of a million predictions: confidence diversity against a k-d tree, calibration error against torchmetrics."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torchmetrics.classification
from scipy.spatial import cKDTree
from scipy.special import digamma
from scipy.stats import differential_entropy
from torch import Tensor

from benchmarks.speed.timing import Measurement, compare, keep_freed_memory, peak_memory
from softlabels import metrics

TITLE = "Metrics"
NEIGHBORS = 3
BINS = 15
BATCHES = 10


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--samples", type=int, default=1_000_000, help="predictions")
    parser.add_argument("--rounds", type=int, default=11, help="repetitions")


def describe(options: argparse.Namespace) -> str:
    """What was measured."""
    return (
        f"{options.samples:,} predictions in float32, each run timed {options.rounds} times between two of the base. "
        f"Diversity: {NEIGHBORS} neighbours, 10 classes, softmax included. Calibration: {BINS} bins, 100 classes, "
        f"without torchmetrics' validation of its arguments. Memory: the most that a run adds to the process."
    )


def measure(options: argparse.Namespace) -> dict[str, dict[str, Measurement]]:
    """Time and memory of each metric and its peers."""
    torch.manual_seed(0)
    n, device = options.samples, options.device
    target = torch.randint(10, (n,), device=device)
    logits = 2 * torch.randn(n, 10, device=device)
    logits.scatter_add_(1, target.unsqueeze(1), torch.full((n, 1), 5.0, device=device))
    diversity: dict[str, Callable[[], object]] = {
        "softlabels.metrics.confidence_diversity": lambda: metrics.confidence_diversity(
            logits, target, n_neighbors=NEIGHBORS
        ),
        "scipy.stats.differential_entropy (Vasicek)": lambda: differential_entropy(true_class(logits, target).numpy()),
    }
    wide_target = torch.randint(100, (n,), device=device)
    wide = 3 * torch.randn(n, 100, device=device)
    parts = list(torch.arange(n).split(-(-n // BATCHES)))
    bounds = [slice(int(p[0]), int(p[-1]) + 1) for p in parts]

    def fed(metric: torchmetrics.Metric) -> Tensor:
        for part in bounds:
            metric.update(wide[part], wide_target[part])
        return metric.compute()

    calibration: dict[str, Callable[[], object]] = {
        "softlabels.metrics.calibration_error": lambda: metrics.calibration_error(wide, wide_target, n_bins=BINS),
        f"softlabels.metrics.CalibrationError, {BATCHES} batches": lambda: fed(
            metrics.CalibrationError(n_bins=BINS).to(device)
        ),
        f"torchmetrics MulticlassCalibrationError, {BATCHES} batches": lambda: fed(
            torchmetrics.classification.MulticlassCalibrationError(100, n_bins=BINS, validate_args=False).to(device)
        ),
    }
    groups = {
        "confidence diversity": (
            ("scipy.spatial.cKDTree", lambda: k_d_tree(logits, target, options.threads)),
            diversity,
        ),
        "calibration error": (
            (
                "torchmetrics multiclass_calibration_error",
                lambda: torchmetrics.functional.classification.multiclass_calibration_error(
                    wide, wide_target, 100, n_bins=BINS, validate_args=False
                ),
            ),
            calibration,
        ),
    }
    peaks = {
        run_name: peak_memory(run, device)
        for base, rivals in groups.values()
        for run_name, run in [base, *rivals.items()]
    }
    if options.malloc == "keep":
        keep_freed_memory()
    return {
        title: compare(base, rivals, options.rounds, device, warmup=1, peaks=peaks)
        for title, (base, rivals) in groups.items()
    }


def true_class(logits: Tensor, target: Tensor) -> Tensor:
    """Probability of the label, on the CPU in float64."""
    return logits.double().softmax(1).gather(1, target.unsqueeze(1)).squeeze(1).cpu()


def k_d_tree(logits: Tensor, target: Tensor, threads: int) -> float:
    """The same estimate with general nearest neighbours."""
    points = true_class(logits, target).unsqueeze(1).numpy()
    distances, _ = cKDTree(points).query(points, k=[NEIGHBORS + 1], workers=threads)
    widths = torch.from_numpy(2.0 * distances).clamp(min=2.0**-52).log()
    return float(digamma(len(points)) - digamma(NEIGHBORS) + widths.mean())
