"""The paper's experiments by name, in the order of its figures."""

from __future__ import annotations

from benchmarks.paper.experiment import Experiment
from benchmarks.paper.experiments import (
    analytic,
    beta_ablation,
    comparison,
    cross_distillation,
    ema_window,
    label_noise,
    pruned,
    sample_weights,
    sequential,
    spread,
    student_scaling,
    temperature,
    top_k,
    train_size,
    tuned,
    weight_decay,
)

EXPERIMENTS: dict[str, Experiment] = {
    "sequential": sequential.EXPERIMENT,
    "temperature": temperature.EXPERIMENT,
    "comparison": comparison.EXPERIMENT,
    "student-scaling": student_scaling.EXPERIMENT,
    "train-size": train_size.EXPERIMENT,
    "weight-decay": weight_decay.EXPERIMENT,
    "beta-ablation": beta_ablation.EXPERIMENT,
    "cross-distillation": cross_distillation.EXPERIMENT,
    "pruned": pruned.EXPERIMENT,
    "sample-weights": sample_weights.EXPERIMENT,
    "analytic": analytic.EXPERIMENT,
    "tuned": tuned.EXPERIMENT,
    "spread": spread.EXPERIMENT,
    "ema-window": ema_window.EXPERIMENT,
    "label-noise": label_noise.EXPERIMENT,
    "top-k": top_k.EXPERIMENT,
}
