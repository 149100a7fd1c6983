"""The methods that are compared: one criterion each, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import softlabels
from benchmarks.paper import rivals
from softlabels import tuning

TRUE_CLASS = 0.85  # average soft-label value of the true class in every smoothing method (sec. 7.1)
ALPHA = 0.6  # weight of the hard label in distillation (sec. 7.1)
BETA_ALPHA = 0.4  # least share of the label in Beta smoothing


RESTS = ("renormalised", "uniform", "bucket")  # where the mass of classes goes that were not recorded


@dataclass(frozen=True)
class Method:
    """A criterion by name, with every option that decides what it computes."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What a criterion may need to know: the student, its training set, and its teacher, if there is one."""

    model: nn.Module
    num_classes: int
    labels: Tensor
    teacher: nn.Module | None = None
    teacher_logits: Tensor | None = None  # of the training set, in its order


def cross_entropy() -> Method:
    """Plain cross-entropy."""
    return Method("cross-entropy")


def label_smoothing(true_class: float = TRUE_CLASS) -> Method:
    """torch's label smoothing, with the given share of the true class."""
    return Method("label smoothing", {"true_class": true_class})


def beta_smoothing(
    *,
    ema_decay: float,
    true_class: float = TRUE_CLASS,
    alpha: float = BETA_ALPHA,
    ranking: str = "ema",
    rank_by: str = "max",
    spread: str | tuple[str, ...] = "uniform",
    warmup: float = 1.0,
) -> Method:
    """Beta smoothing (sec. 6) with the given average share of the true class."""
    options: dict[str, Any] = {"true_class": true_class, "alpha": alpha, "ranking": ranking, "rank_by": rank_by}
    if spread != "uniform":  # options that came later are left out of the keys of stored runs where they change nothing
        options["spread"] = spread
    if warmup != 1.0:
        options["warmup"] = warmup
    if ranking == "history":
        options["memory"] = "whole run"  # it was as long as the EMA's, before
    return Method("Beta smoothing", {**options, "ema_decay": ema_decay})


def self_distillation(
    *,
    temperature: float | None = None,
    true_class: float = TRUE_CLASS,
    alpha: float = ALPHA,
    scale_student: bool = False,
    prune: float = 0.0,
) -> Method:
    """Distillation (Eq. 3), pruned (App. 9.7) where ``prune`` is not 0.

    Without a temperature it is matched, so that the true class has the given average share (sec. 7.1).
    """
    options = {"alpha": alpha, "scale_student": scale_student, "prune": prune}
    return Method("self-distillation", {"temperature": temperature or matched(true_class), **options})


def recorded_distillation(k: int, rest: str, *, alpha: float = ALPHA) -> Method:
    """Distillation (Eq. 3) from the k largest logits of the teacher, with one of ``RESTS`` for all other classes."""
    return Method("recorded distillation", {"k": k, "rest": rest, "alpha": alpha, "temperature": matched()})


def average_distillation(alpha: float, *, ema_decay: float, temperature: float = 1.0) -> Method:
    """Distillation (Eq. 3) from the average of the network's own weights, in one run."""
    return Method("distillation from the average", {"alpha": alpha, "temperature": temperature, "ema_decay": ema_decay})


def online_label_smoothing(alpha: float) -> Method:
    """Zhang et al. (2021)."""
    return Method("online label smoothing", {"alpha": alpha})


def progressive_distillation(alpha: float) -> Method:
    """Progressive self-knowledge distillation (Kim et al., 2021)."""
    return Method("progressive self-knowledge distillation", {"alpha": alpha})


def early_learning(strength: float) -> Method:
    """Early-learning regularisation (Liu et al., 2020)."""
    return Method("early-learning regularisation", {"strength": strength})


def matched(true_class: float = TRUE_CLASS) -> dict[str, float]:
    """Stand in for a temperature that is found when the teacher is known."""
    return {"true_class": true_class}


def dirichlet_map(sample_weighting: str, *, alpha: float = ALPHA) -> Method:
    r"""Eq. 9, with beta such that ``alpha`` is the average share of the hard label.

    Eq. 3 is Eq. 9 with weights of 1 and $\beta = (1 - \alpha) / \alpha$; with exact weights $S$ it is divided by their
    mean over the training set. The temperature is matched as in ``self_distillation``.
    """
    options = {"sample_weighting": sample_weighting, "alpha": alpha, "temperature": matched()}
    return Method("instance Dirichlet MAP", options)


Temperature = float | Mapping[str, float]  # the temperature, or what it is matched to


def find_temperature(task: Task, alpha: float, temperature: Temperature) -> float:
    """Temperature at which the teacher smooths as much as label smoothing does (sec. 7.1), unless it is given.

    Raises:
        ValueError: the teacher is right too seldom on its training set for any temperature.
    """
    if not isinstance(temperature, Mapping):
        return temperature
    assert task.teacher_logits is not None
    try:
        return tuning.match_temperature(task.teacher_logits, task.labels, alpha=alpha, **temperature)
    except ValueError as error:
        raise ValueError(f"a teacher has learnt too little to be matched with label smoothing: {error}") from error


def mean_sample_weight(teacher_logits: Tensor, temperature: float) -> float:
    r"""Mean over the training set of the weights $S = \sum_c \exp(f_c / T)$ of Eq. 9."""
    return (teacher_logits.double() / temperature).logsumexp(1).exp().mean().item()


def _make_label_smoothing(task: Task, true_class: float) -> nn.Module:
    return nn.CrossEntropyLoss(label_smoothing=tuning.label_smoothing_for(true_class, task.num_classes))


def _make_beta_smoothing(
    task: Task,
    true_class: float,
    alpha: float,
    ranking: str,
    rank_by: str,
    ema_decay: float,
    spread: str | Sequence[str] = "uniform",
    memory: str = "whole run",
    warmup: float = 1.0,
) -> nn.Module:
    if memory != "whole run":
        raise ValueError(f"memory must be 'whole run', got {memory!r}")
    criterion = softlabels.BetaSmoothingLoss(
        label_smoothing=tuning.label_smoothing_for(true_class, task.num_classes),
        alpha=alpha,
        ranking=ranking,
        rank_by=rank_by,
        ema_decay=ema_decay,
        spread=spread if isinstance(spread, str) else tuple(spread),
        num_samples=len(task.labels) if ranking == "history" or "samples" in spread else None,
    )
    if ranking != "ema":
        return criterion
    return criterion.attach(task.model, teacher=softlabels.EMATeacher(task.model, ema_decay, warmup=warmup))


def _make_self_distillation(
    task: Task, temperature: Temperature, alpha: float, scale_student: bool, prune: float
) -> nn.Module:
    temperature = find_temperature(task, alpha, temperature)
    if prune:
        if scale_student:
            raise ValueError("pruned distillation does not scale the student")
        criterion = softlabels.PrunedDistillationLoss(prune=prune, alpha=alpha, temperature=temperature)
    else:
        criterion = softlabels.SelfDistillationLoss(alpha=alpha, temperature=temperature, scale_student=scale_student)
    return criterion.attach(task.model, teacher=task.teacher)


class RecordedDistillation(softlabels.SelfDistillationLoss):
    """Asks the attached teacher, and forgets all but the top of each row."""

    def __init__(self, k: int, rest: str, *, alpha: float, temperature: float) -> None:
        super().__init__(alpha=alpha, temperature=temperature)
        self.k, self.rest = k, rest

    def ask_teacher(self, input: Any, given: str) -> Any:
        """The top of the teacher's logits."""
        logits = super().ask_teacher(input, given)
        if self.rest == "renormalised":
            return softlabels.TopKLogits.of(logits, min(self.k, logits.shape[1]))
        return softlabels.TopKLogits.of(
            logits, min(self.k, logits.shape[1]), temperature=self.temperature, tail=self.rest
        )


def _make_recorded_distillation(task: Task, k: int, rest: str, alpha: float, temperature: Temperature) -> nn.Module:
    criterion = RecordedDistillation(k, rest, alpha=alpha, temperature=find_temperature(task, alpha, temperature))
    return criterion.attach(task.model, teacher=task.teacher)


def _make_average_distillation(task: Task, alpha: float, temperature: float, ema_decay: float) -> nn.Module:
    criterion = softlabels.SelfDistillationLoss(alpha=alpha, temperature=temperature)
    return criterion.attach(task.model, teacher=softlabels.EMATeacher(task.model, decay=ema_decay))


def _make_dirichlet_map(task: Task, sample_weighting: str, alpha: float, temperature: Temperature) -> nn.Module:
    assert task.teacher_logits is not None
    temperature = find_temperature(task, alpha, temperature)
    beta = (1.0 - alpha) / alpha
    if sample_weighting == "exact":
        beta /= mean_sample_weight(task.teacher_logits, temperature)
    criterion = softlabels.InstanceDirichletMAPLoss(
        beta=beta, temperature=temperature, sample_weighting=sample_weighting
    )
    return criterion.attach(task.model, teacher=task.teacher)


CRITERIA: dict[str, Callable[..., nn.Module]] = {
    "cross-entropy": lambda task: nn.CrossEntropyLoss(),
    "label smoothing": _make_label_smoothing,
    "Beta smoothing": _make_beta_smoothing,
    "self-distillation": _make_self_distillation,
    "recorded distillation": _make_recorded_distillation,
    "instance Dirichlet MAP": _make_dirichlet_map,
    "distillation from the average": _make_average_distillation,
    "online label smoothing": lambda task, alpha: rivals.OnlineLabelSmoothing(alpha, task.num_classes),
    "progressive self-knowledge distillation": lambda task, alpha: rivals.ProgressiveSelfKnowledgeDistillation(
        alpha, len(task.labels), task.num_classes
    ),
    "early-learning regularisation": lambda task, strength: rivals.EarlyLearningRegularization(
        strength, len(task.labels), task.num_classes
    ),
}


def make_criterion(method: Method, task: Task) -> nn.Module:
    """Make the criterion of a method. It touches no weight of the model and draws no random number."""
    return CRITERIA[method.name](task, **method.options)
