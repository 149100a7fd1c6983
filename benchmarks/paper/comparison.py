"""The comparison of Fig. 3, with the random ranking of Fig. 7 and the pruning of Fig. 9."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import multiprocessing as mp
from tqdm import tqdm

from benchmarks.paper.data import DATASETS
from benchmarks.paper.methods import METHODS, TEACHER
from benchmarks.paper.models import CIFARResNet
from benchmarks.paper.recipe import Recipe, evaluate, predict, train
from softlabels.metrics import reliability_curve


@dataclass(frozen=True)
class Comparison:
    """Everything that decides the numbers, but for the seeds."""

    dataset: str = "digits"
    depth: int = 8
    width: int = 16
    ema_decay: float = 0.99  # 0.999 is meant for runs of many thousand steps; these have a few hundred
    device: str = "cpu"
    recipe: Recipe = field(default_factory=Recipe)


def run_seed(config: Comparison, seed: int, on_epoch: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Train every method from the same initial weights on the same batches; one record each.

    A record's ``curve`` is the reliability curve of its test set.
    """
    data = DATASETS[config.dataset](config.device)
    teacher = None
    records = []
    for name, make_criterion in METHODS.items():
        torch.manual_seed(seed)
        model = CIFARResNet(config.depth, data.num_classes, data.channels, config.width).to(config.device)
        criterion = make_criterion(model, teacher, data, config.ema_decay)
        start = time.perf_counter()
        model = train(model, criterion, data, config.recipe, seed, on_epoch)
        seconds = time.perf_counter() - start
        if name == TEACHER:
            teacher = model
        logits = predict(model, data.test)
        curve = reliability_curve(logits, data.test.labels)
        records.append(
            {
                "method": name,
                "seed": seed,
                **evaluate(logits, data.test.labels),
                "seconds": round(seconds, 2),
                "curve": {name: values.tolist() for name, values in vars(curve).items()},
            }
        )
    return records


def _work(config: Comparison, seeds: Any, events: Any) -> None:
    """One process: take seeds until there are none, report epochs (None) and records."""
    torch.set_num_threads(1)  # these networks are too small to share; one thread also makes runs repeatable
    while (seed := seeds.get()) is not None:
        events.put(run_seed(config, seed, lambda: events.put(None)))


def run(config: Comparison, seeds: int, workers: int) -> list[dict[str, Any]]:
    """Train all methods with seeds 0, 1, ... in parallel processes, with a progress bar over epochs."""
    context = mp.get_context("spawn")
    todo, events = context.SimpleQueue(), context.SimpleQueue()
    for item in [*range(seeds), *[None] * workers]:
        todo.put(item)
    processes = [context.Process(target=_work, args=(config, todo, events), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    records: list[dict[str, Any]] = []
    finished = 0
    epochs = seeds * len(METHODS) * config.recipe.epochs
    interval = 0.2 if sys.stderr.isatty() else 15.0  # seconds between lines of a log file
    with tqdm(total=epochs, unit="epoch", smoothing=0.05, mininterval=interval) as bar:
        while finished < seeds:
            while events.empty():
                dead = [p.exitcode for p in processes if p.exitcode]
                if dead:
                    raise RuntimeError(f"a training process ended with exit code {dead[0]}; its error is above")
                time.sleep(0.05)
            event = events.get()
            if event is None:
                bar.update()
            else:
                records += event
                finished += 1
    for process in processes:
        process.join()
    order = list(METHODS)
    return sorted(records, key=lambda r: (order.index(r["method"]), r["seed"]))
