"""One training run: a configuration, the key that it is stored under, and what comes of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import softlabels
from benchmarks.paper import models
from benchmarks.paper.data import Data, DataSpec, load, shape, train_size
from benchmarks.paper.methods import Method, Task, make_criterion
from benchmarks.paper.models import ModelSpec
from benchmarks.paper.recipe import Recipe, evaluate, predict, temperature_scaled, train
from benchmarks.provenance import hardware, versions
from softlabels.metrics import reliability_curve

VERSION = 1  # to be raised when the same configuration no longer gives the same numbers

TEACHER_SEED = 100  # a teacher's seed is this much more than its student's: other weights, another order of the data


@dataclass(frozen=True)
class Run:
    """Everything that decides the numbers of one training run, its teacher's run included."""

    data: DataSpec
    model: ModelSpec
    recipe: Recipe
    method: Method
    teacher: Run | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check that there is a batch to train on."""
        samples = train_size(self.data)
        if self.recipe.batch_size > samples:
            raise ValueError(
                f"batch_size={self.recipe.batch_size} is more than the {samples:,} training samples of {self.data.name}"
            )
        if shape(self.data)[2]:
            if self.model.name not in models.FLAT:
                known, given = ", ".join(models.FLAT), self.model.name
                raise ValueError(f"model must be one of {known} on {self.data.name}, got {given}")
            if self.recipe.padding or self.recipe.flip:
                raise ValueError(f"padding and flip are for pictures, not for {self.data.name}")

    def describe(self, with_seed: bool = True) -> str:
        """Name the run in a message."""
        options = {name: value for name, value in self.method.options.items() if value}
        seed = f", seed {self.seed}" if with_seed else ""
        return f"{self.method.name} {options or ''} on {self.data.name} with {self.model.name}{seed}"

    def repeated(self, repetition: int) -> Run:
        """Give the same run and its teachers, each with its seed plus ``repetition``."""
        teacher = None if self.teacher is None else self.teacher.repeated(repetition)
        return dataclasses.replace(self, seed=self.seed + repetition, teacher=teacher)

    def config(self) -> dict[str, Any]:
        """Plain values, for JSON; the teacher is given by its key."""
        config = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        config = {name: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for name, v in config.items()}
        return {**config, "teacher": None if self.teacher is None else self.teacher.key, "version": VERSION}

    @functools.cached_property
    def key(self) -> str:
        """Hash of the configuration."""
        config = self.config()
        if not self.data.label_noise:  # which older runs did not have
            del config["data"]["label_noise"]
        text = json.dumps(config, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


Record = dict[str, Any]
Weights = bytes  # a state dict, as torch.save writes it


def execute(
    run: Run,
    taught_by: Weights | None = None,
    *,
    save: bool = False,
    folder: Path | None = None,
    cache: Path | None = None,
    expected: str | None = None,
    on_epoch: Callable[[int], None] = lambda steps: None,
) -> tuple[Record, Weights | None]:
    """Train, evaluate and return the record, and the weights if they are to be saved.

    Args:
        run: What to do.
        taught_by: Weights of the teacher.
        save: Whether to return the weights.
        folder: Where the data set lies; None for the usual places.
        cache: Folder of decoded data sets.
        expected: Digest that the data set should have; None is any.
        on_epoch: Called with the number of optimizer steps after each epoch.

    Raises:
        ValueError: the data set is another than expected.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    data, digest = _data(run.data, folder, cache, run.device)
    if digest != (expected or digest):
        raise ValueError(f"{run.data.name} has the digest {digest} on {platform.node()}, and should have {expected}")
    torch.manual_seed(run.seed)
    model = _make(run, data)
    task = Task(model, data.num_classes, data.train.labels)
    if run.teacher is not None:
        teacher = _make(run.teacher, data)
        assert taught_by is not None
        teacher.load_state_dict(torch.load(io.BytesIO(taught_by), map_location=run.device))
        teacher.requires_grad_(False)
        task = dataclasses.replace(
            task, teacher=teacher, teacher_logits=predict(teacher, data.train, data.normalise, run.teacher.recipe)
        )
    criterion = make_criterion(run.method, task)
    torch.manual_seed(run.seed)  # whatever the model and its teacher drew, methods draw the same
    epochs = train(model, criterion, data, run.recipe, run.seed, on_epoch)
    weights = _weights(model) if save else None
    splits = {name: getattr(data, name) for name in ("train", "validation", "test")}
    logits = {name: predict(model, split, data.normalise, run.recipe) for name, split in splits.items()}
    curve = vars(reliability_curve(logits["test"], data.test.labels))
    del curve["weight"]  # every prediction counts once
    metrics: dict[str, Any] = {
        name: evaluate(logits[name], split.labels, split.posterior) for name, split in splits.items()
    }
    metrics["scaled"] = temperature_scaled(logits["test"], data.test, logits["validation"], data.validation)
    details = {
        "curve": {name: values.tolist() for name, values in curve.items()},
        "soft_labels": _soft_labels(criterion, task),
        "epochs": epochs,
    }
    record = {
        "key": run.key,
        **run.config(),
        **_finite(metrics),
        **_finite(details, digits=6),
        "data_digest": digest,
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu_start, 2),
        "versions": versions(),
        "hardware": hardware(run.device),
    }
    return record, weights


def _weights(model: nn.Module) -> Weights:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


def _make(run: Run, data: Data) -> nn.Module:
    model = models.make(run.model, data.num_classes, data.channels, data.flat).to(run.device)
    return model.to(memory_format=torch.channels_last) if run.recipe.channels_last else model


@functools.lru_cache(maxsize=2)
def _data(spec: DataSpec, folder: Path | None, cache: Path | None, device: str) -> tuple[Data, str]:
    """Load a data set once per process, with a hash of its bytes."""
    data = load(spec, folder, cache)
    return data.to(device), data.digest()


def _soft_labels(criterion: nn.Module, task: Task) -> dict[str, Any]:
    """What the criterion's labels were made with: matched parameters, and the teacher's labels on the training set."""
    facts: dict[str, Any] = {}
    if isinstance(criterion, softlabels.BetaSmoothingLoss):
        facts["concentration"] = criterion.concentration_for(task.num_classes)
    if task.teacher_logits is not None:
        temperature = criterion.temperature
        facts["temperature"] = temperature
        facts["teacher"] = evaluate(task.teacher_logits / temperature, task.labels)
        facts["sample_weights"] = sample_weight_spread(task.teacher_logits, temperature)
    return facts


def sample_weight_spread(teacher_logits: Tensor, temperature: float) -> dict[str, float]:
    r"""How much the weights $S = \sum_c \exp(f_c / T)$ of Eq. 9 differ between training samples.

    ``variation`` is the standard deviation of S over its mean, ``effective_share`` is
    $(\sum S)^2 / (n \sum S^2)$: 1 where all are equal, 1/n where one sample has it all. The ``centred`` ones are of
    logits whose mean over the classes was taken away row by row, which is what ``"normalized"`` weights use.
    """
    logits = teacher_logits.double() / temperature
    spread = {}
    for prefix, values in (("", logits), ("centred_", logits - logits.mean(1, keepdim=True))):
        log_weight = values.logsumexp(1)
        weight = (log_weight - log_weight.max()).exp()
        spread[prefix + "variation"] = (weight.std(correction=0) / weight.mean()).item()
        spread[prefix + "effective_share"] = (weight.sum() ** 2 / (len(weight) * (weight**2).sum())).item()
    return spread


def _finite(value: Any, digits: int = 17) -> Any:
    """Give a value with null for nan and infinity, which JSON does not have, and this many significant digits."""
    if isinstance(value, dict):
        return {name: _finite(item, digits) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
