"""Metrics of a million predictions: confidence diversity against a k-d tree, calibration error against torchmetrics."""

from __future__ import annotations

import argparse
import math

import torch
import torchmetrics
from scipy.spatial import cKDTree
from scipy.special import digamma
from scipy.stats import differential_entropy
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError
from torchmetrics.functional.classification import multiclass_calibration_error

from benchmarks.speed.timing import Measurement, Run, compare, keep_freed_memory, peak_memory
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
    groups = {
        "confidence diversity": diversity_runs(options.samples, options.device, options.threads),
        "calibration error": calibration_runs(options.samples, options.device),
    }
    peaks = {name: peak_memory(run, options.device) for runs in groups.values() for name, run in runs.items()}
    if options.malloc == "keep":
        keep_freed_memory()
    return {
        title: compare(runs, options.rounds, options.device, warmup=1, peaks=peaks) for title, runs in groups.items()
    }


def diversity_runs(n: int, device: torch.device, threads: int) -> dict[str, Run]:
    """Everything from logits to the estimate; the base first."""
    target = torch.randint(10, (n,), device=device)
    logits = 2 * torch.randn(n, 10, device=device)
    logits.scatter_add_(1, target.unsqueeze(1), torch.full((n, 1), 5.0, device=device))
    return {
        "scipy.spatial.cKDTree": lambda: k_d_tree(logits, target, threads),
        "softlabels.metrics.confidence_diversity": lambda: metrics.confidence_diversity(
            logits, target, n_neighbors=NEIGHBORS
        ),
        "scipy.stats.differential_entropy (Vasicek)": lambda: differential_entropy(true_class(logits, target).numpy()),
    }


def calibration_runs(n: int, device: torch.device) -> dict[str, Run]:
    """All at once, and fed to a class in batches; the base first."""
    target = torch.randint(100, (n,), device=device)
    logits = 3 * torch.randn(n, 100, device=device)
    size = math.ceil(n / BATCHES)

    def fed(metric: torchmetrics.Metric) -> Tensor:
        metric.to(device)
        for batch, labels in zip(logits.split(size), target.split(size), strict=True):
            metric.update(batch, labels)
        return metric.compute()

    options = {"n_bins": BINS, "validate_args": False}
    return {
        "torchmetrics multiclass_calibration_error": lambda: multiclass_calibration_error(
            logits, target, 100, **options
        ),
        "softlabels.metrics.calibration_error": lambda: metrics.calibration_error(logits, target, n_bins=BINS),
        f"softlabels.metrics.CalibrationError, {BATCHES} batches": lambda: fed(metrics.CalibrationError(n_bins=BINS)),
        f"torchmetrics MulticlassCalibrationError, {BATCHES} batches": lambda: fed(
            MulticlassCalibrationError(100, **options)
        ),
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
