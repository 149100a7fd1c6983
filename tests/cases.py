"""The losses under contract. A new loss joins every contract test by one more entry in ``CASES``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import reference
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import softlabels
from softlabels import functional

SEED = 7


@dataclass(frozen=True)
class Case:
    """One loss: its two forms, options that exercise it, options that switch it off, and its reference rows."""

    name: str
    module: type[nn.Module]
    functional: Callable[..., Tensor]
    on: dict[str, Any]
    off: dict[str, Any]
    reference: Callable[..., list[float]]
    argument: str | None = None  # the call argument beside input and target
    counts: bool = False  # whole-number targets of the shape of the logits are label counts

    def extras(self, logits: Tensor) -> dict[str, Tensor]:
        """The extra call argument for these logits: always the same numbers for the same shape."""
        if self.argument is None:
            return {}
        generator = torch.Generator().manual_seed(SEED)
        shape = logits.shape
        if self.argument == "confidence":
            shape = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else torch.Size(())
            return {"confidence": torch.rand(shape, generator=generator, dtype=torch.float64)}
        return {self.argument: 2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(logits.dtype)}

    def random(self) -> dict[str, Any]:
        return {"generator": torch.Generator().manual_seed(SEED)} if self.argument == "confidence" else {}

    def call(self, logits: Tensor, target: Tensor, *, off: bool = False, **common: Any) -> Tensor:
        """The functional form; ``common`` are the options that all losses share, or extra call arguments."""
        options = {**(self.off if off else self.on), **self.extras(logits), **self.random(), **common}
        return self.functional(logits, target, **options)

    def make(self, *, off: bool = False, **common: Any) -> nn.Module:
        options = {**(self.off if off else self.on), **self.random(), **common}
        return self.module(**options)

    def call_module(self, logits: Tensor, target: Tensor, *, off: bool = False, **common: Any) -> Tensor:
        call = {k: common.pop(k) for k in ("sample_weight", self.argument) if k in common}
        return self.make(off=off, **common)(logits, target, **{**self.extras(logits), **call})

    def __repr__(self) -> str:
        return self.name


def _beta_rows(logits, labels, class_weight, kept, *, confidence, alpha, concentration):
    generator = torch.Generator().manual_seed(SEED)
    uniforms = torch.rand(len(logits), generator=generator, dtype=torch.float64).tolist()
    draws = reference.beta_draws(uniforms, confidence, kept, concentration)
    return [
        reference.beta_smoothing(x, y, class_weight, b, alpha) for x, y, b in zip(logits, labels, draws, strict=True)
    ]


def _teacher_rows(logits, labels, class_weight, kept, *, teacher_logits, **options):
    return [
        reference.self_distillation(x, y, class_weight, f, **options)
        for x, y, f in zip(logits, labels, teacher_logits, strict=True)
    ]


def _dirichlet_rows(logits, labels, class_weight, kept, *, teacher_logits, beta, temperature, gamma, sample_weighting):
    s = reference.strengths(teacher_logits, kept, temperature, sample_weighting)
    return [
        reference.dirichlet_map(x, y, class_weight, f, s_i, beta, temperature, gamma)
        for x, y, f, s_i in zip(logits, labels, teacher_logits, s, strict=True)
    ]


def _simple_rows(row_loss):
    def rows(logits, labels, class_weight, kept, **options):
        return [row_loss(x, y, class_weight, **options) for x, y in zip(logits, labels, strict=True)]

    return rows


def _dirichlet(name: str, **on: Any) -> Case:
    options = {"beta": 0.7, "temperature": 2.0, "gamma": 1.0, "sample_weighting": "normalized", **on}
    return Case(
        f"dirichlet_map-{name}",
        softlabels.InstanceDirichletMAPLoss,
        functional.dirichlet_map_loss,
        options,
        {**options, "beta": 0.0, "gamma": 1.0},
        _dirichlet_rows,
        "teacher_logits",
        counts=True,
    )


CASES = [
    Case(
        "beta_smoothing",
        softlabels.BetaSmoothingLoss,
        functional.beta_smoothing_loss,
        {"alpha": 0.3, "concentration": 2.0},
        {"alpha": 1.0, "concentration": 2.0},
        _beta_rows,
        "confidence",
    ),
    Case(
        "self_distillation",
        softlabels.SelfDistillationLoss,
        functional.self_distillation_loss,
        {"alpha": 0.6, "temperature": 3.0},
        {"alpha": 1.0, "temperature": 3.0},
        _teacher_rows,
        "teacher_logits",
    ),
    Case(
        "self_distillation-scale_student",
        softlabels.SelfDistillationLoss,
        functional.self_distillation_loss,
        {"alpha": 0.3, "temperature": 3.0, "scale_student": True},
        {"alpha": 1.0, "temperature": 3.0, "scale_student": True},
        _teacher_rows,
        "teacher_logits",
    ),
    Case(
        "pruned_distillation",
        softlabels.PrunedDistillationLoss,
        functional.pruned_distillation_loss,
        {"prune": 0.5, "alpha": 0.4, "temperature": 2.0},
        {"prune": 0.5, "alpha": 1.0, "temperature": 2.0},
        _teacher_rows,
        "teacher_logits",
    ),
    _dirichlet("normalized"),
    _dirichlet("exact", sample_weighting="exact"),
    _dirichlet("none", sample_weighting="none"),
    _dirichlet("pruned", gamma=0.9),
    _dirichlet("uniform", gamma=1.2, sample_weighting="exact"),
    Case(
        "label_smoothing_map",
        softlabels.LabelSmoothingMAPLoss,
        functional.label_smoothing_map_loss,
        {"beta": 0.4},
        {"beta": 0.0},
        _simple_rows(reference.label_smoothing_map),
    ),
    Case(
        "confidence_penalty",
        softlabels.ConfidencePenaltyLoss,
        functional.confidence_penalty_loss,
        {"beta": 0.4},
        {"beta": 0.0},
        _simple_rows(reference.confidence_penalty),
    ),
]


def expected(case: Case, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
    """The reference's answer for a call of any shape, float64, row-shaped for ``reduction="none"``."""
    on = {**case.on, **{k: v for k, v in common.items() if k in case.on}}
    ignore_index = common.get("ignore_index", -100)
    reduction = common.get("reduction", "mean")
    single = logits.dim() == 1
    num_classes = logits.shape[0 if single else 1]
    row_shape = torch.Size(()) if single else logits.shape[:1] + logits.shape[2:]

    def rows(value: Tensor) -> list[list[float]]:
        value = value.unsqueeze(0) if single else value
        return value.detach().double().movedim(1, -1).reshape(-1, num_classes).tolist()

    is_index = target.shape != logits.shape
    labels: list[Any] = target.flatten().tolist() if is_index else rows(target)
    kept = [label != ignore_index for label in labels] if is_index else [True] * len(labels)
    labels = [label if k else 0 for label, k in zip(labels, kept, strict=True)]
    weight = common.get("weight")
    class_weight = [1.0] * num_classes if weight is None else weight.double().tolist()
    sample_weight = common.get("sample_weight")
    sample_weight = [1.0] * len(labels) if sample_weight is None else sample_weight.double().flatten().tolist()
    arguments = {name: common.get(name, value) for name, value in case.extras(logits).items()}
    extra = {k: v.double().flatten().tolist() if k == "confidence" else rows(v) for k, v in arguments.items()}
    losses = case.reference(rows(logits), labels, class_weight, kept, **extra, **on)
    result = reference.reduce(losses, labels, class_weight, sample_weight, kept, reduction)
    result = torch.tensor(result, dtype=torch.float64)
    return result.view(row_shape) if reduction == "none" else result


@st.composite
def calls(draw):
    """A valid call of any loss: shapes with a reason, masks, weights, both kinds of target."""
    num_classes = draw(st.sampled_from([1, 2, 3, 5, 17]))  # 1 and 2 are edges, 17 is wider than a vector register
    trailing = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    rows = draw(st.sampled_from([None, 0, 1, 2, 7]))  # None: no batch dimension
    shape = (num_classes,) if rows is None else (rows, num_classes, *trailing)
    row_shape = () if rows is None else (rows, *trailing)
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 1.0, 8.0]))  # ties, ordinary, saturated
    logits = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    options = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    if draw(st.booleans()):
        target = torch.randint(num_classes, row_shape, generator=generator)
        options["ignore_index"] = draw(st.sampled_from([-100, 0, 99]))
        if options["ignore_index"] != 0:
            ignored = torch.rand(row_shape, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
            target = torch.where(ignored, options["ignore_index"], target)
    else:
        target = torch.rand(shape, generator=generator, dtype=torch.float64)
        target = target / target.sum(0 if rows is None else 1, keepdim=True)
    if draw(st.booleans()):
        options["weight"] = torch.rand(num_classes, generator=generator)
    if draw(st.booleans()):
        options["sample_weight"] = torch.rand(row_shape, generator=generator)
    return logits, target, options
