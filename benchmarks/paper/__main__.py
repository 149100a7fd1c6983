"""Command line: ``python -m benchmarks.paper comparison``."""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.paper import estimate, report
from benchmarks.paper.cluster import existing, local
from benchmarks.paper.data import DATASETS, EMBEDDED, own_folder
from benchmarks.paper.experiment import Plan, Results
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.interrupt import stoppable
from benchmarks.paper.models import MODELS
from benchmarks.paper.recipe import Recipe
from benchmarks.paper.runs import Run
from benchmarks.paper.schedule import do, kept, missing
from benchmarks.paper.setting import PRESETS, Setting, preset
from benchmarks.paper.statistics import Claim
from benchmarks.paper.store import Store, read_records
from benchmarks.paper.worker import prepare

NOT_SHOWN = {"out", "workers", "scheduler", "data_dir"}  # options that say where and how, and change no number
GRIDS = tuple(name for name, kind in Setting.__annotations__.items() if "tuple" in kind)


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas, each a fraction like 1/3 or a decimal."""
    numbers = []
    for part in text.split(","):
        numerator, slash, denominator = part.partition("/")
        divisor = number(denominator) if slash else 1.0
        if divisor == 0:
            raise argparse.ArgumentTypeError(f"cannot divide by 0, got {part}")
        numbers.append(number(numerator) / divisor)
    return tuple(numbers)


def number(text: str) -> float:
    """Make a finite number of a decimal."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def make_parser() -> argparse.ArgumentParser:
    """Make the parser; an option that is not given is the preset's."""
    names = "\n".join(f"  {name:20}{e.heading}" for name, e in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=f"The paper's experiments, each with a table, a figure and verdicts:\n\n{names}",
        epilog="Runs are stored in OUT/runs.jsonl: what is there is not trained again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the command is printed beside its results
    )
    parser.add_argument(
        "experiment", nargs="+", choices=[*EXPERIMENTS, "all"], metavar="NAME", help="all: all of the paper's"
    )
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="default %(default)s")
    parser.add_argument("--dataset", choices=[*DATASETS, "folder"], help="folder: one of your own, see --data-dir")
    parser.add_argument("--train-size", type=int, help="use so many of the training samples")
    parser.add_argument("--pairs", type=int, help="of fashion-pairs: training and validation pairs")
    parser.add_argument("--label-noise", type=number, help="replace this share of the training labels")
    parser.add_argument(
        "--size", type=int, help="height of an image, of fashion-pairs (a divisor of 28) and folder (64)"
    )
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--other-model", choices=MODELS, help="the second network of cross-distillation")
    parser.add_argument("--width", type=int, help="channels of the first stage, or growth rate")
    parser.add_argument("--seeds", type=int, help="runs per method")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--workers", type=int, help="processes (default: one per core, at most 8; 4 on a GPU)")
    parser.add_argument(
        "--scheduler",
        metavar="TCP://HOST:PORT",
        help="use this cluster of Dask, named by its address or scheduler file",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be run, the hours and the disk it takes"
    )
    parser.add_argument("--ema-decay", type=number, help="of Beta smoothing")
    parser.add_argument("--generations", type=int, help="of sequential")
    for name in GRIDS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=numbers, metavar="X,X,...")
    recipe = parser.add_argument_group("recipe")
    for name, kind in Recipe.__annotations__.items():
        flag = f"--{name.replace('_', '-')}"
        if "bool" in kind:
            recipe.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        elif "tuple" in kind:
            recipe.add_argument(flag, type=numbers, metavar="X,X,...")
        else:
            recipe.add_argument(flag, type=int if "int" in kind else number)
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="where the data set lies, in the layout of its archive; of folder: train/CLASS/*, test/CLASS/*",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="folder (default %(default)s)")
    return parser


def make_setting(options: argparse.Namespace) -> Setting:
    """Lay the options over the preset."""
    if options.dataset == "folder":
        if options.data_dir is None:
            raise ValueError("--dataset folder needs --data-dir, the folder with train/CLASS/ and test/CLASS/")
        size = 64 if options.size is None else options.size
        setting = preset(
            options.preset, own_folder(options.data_dir, size), options.model, options.other_model, size=size
        )
    else:
        setting = preset(options.preset, options.dataset, options.model, options.other_model)
        if options.data_dir is not None and setting.data.name in EMBEDDED:
            raise ValueError(f"--data-dir is for data sets of files; {setting.data.name} comes with a package")
    given = {name: value for name, value in vars(options).items() if value is not None}
    parts = {
        "data": {name: given[name] for name in ("train_size", "pairs", "size", "label_noise") if name in given},
        "recipe": {name: given[name] for name in Recipe.__annotations__ if name in given},
        "model": {name: given[name] for name in ("width",) if name in given},
    }
    for name, changes in parts.items():
        setting = replace(setting, **{name: replace(getattr(setting, name), **changes)})
    setting = replace(setting, other_recipe=replace(setting.other_recipe, **parts["recipe"]))
    own = ("seeds", "device", "ema_decay", "generations", *GRIDS)
    return replace(setting, **{name: given[name] for name in own if name in given})


def make_plans(options: argparse.Namespace, setting: Setting) -> dict[str, Plan]:
    """Plan the experiments that are asked for, each once."""
    of_paper = [name for name, experiment in EXPERIMENTS.items() if experiment.figure]
    names = [name for given in options.experiment for name in (of_paper if given == "all" else [given])]
    return {name: EXPERIMENTS[name].plan(setting) for name in names}


def every_run(setting: Setting, plans: dict[str, Plan]) -> list[Run]:
    """Give the runs of the plans, of every seed."""
    return [run.repeated(seed) for plan in plans.values() for run in plan.values() for seed in range(setting.seeds)]


def main(arguments: list[str] | None = None) -> None:
    """Do the runs that are missing; print and save tables, figures and verdicts."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 1:
        parser.error(f"workers must be at least 1, got {options.workers}")
    if options.workers is not None and options.scheduler is not None and not options.dry_run:
        parser.error("--workers is for processes of this machine; the cluster of --scheduler has its own")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # tables have signs that not every terminal has
    start = time.perf_counter()
    try:
        with stoppable():
            setting = make_setting(options)
            check_installed(setting.data.name)
            plans = make_plans(options, setting)
            runs = every_run(setting, plans)
            if options.dry_run:
                print(estimate.describe(runs, Store(options.out, read_only=True), _processes(options, setting.device)))
                return
            store, failures = train(options, runs)
            failures += write(options.out, setting, plans, store, _command(arguments))
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted; {_how_to_go_on(options.out)}", file=sys.stderr)
        sys.exit(128 + int(*interrupt.args or (signal.SIGINT,)))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.errno is None:  # our own, of a data set
            parser.error(str(error))
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        sys.exit(f"{what}; {_how_to_go_on(options.out)}")
    except ValueError as error:
        parser.error(str(error))
    print(f"{time.perf_counter() - start:.0f} s; runs, tables and figures in {options.out}/")
    if failures:
        sys.exit("\n".join(["", "failed:", *failures]))


def check_installed(dataset: str) -> None:
    """Say at the start what is missing, and not after hours of training."""
    needed = ["distributed", "matplotlib", "tqdm"]
    if dataset in EMBEDDED:
        needed.append(EMBEDDED[dataset].package)
    lacking = [name for name in needed if importlib.util.find_spec(name) is None]
    if lacking:
        raise ValueError(f"{', '.join(lacking)} must be installed: pip install -e '.[benchmarks]'")


def train(options: argparse.Namespace, runs: list[Run]) -> tuple[Store, list[str]]:
    """Say what will be done and how long it takes; do the missing runs, and say which failed."""
    with Store(options.out) as store:
        todo = missing(runs, store)
        print(estimate.announce(todo, store, _processes(options, runs[0].device) if runs else None), flush=True)
        if not todo:
            return store, []
        device, keep = todo[0].device, kept([*runs, *todo])
        if options.scheduler is not None:
            with existing(options.scheduler, device) as client:
                return store, do(todo, keep, store, client, prepare(todo, store, options.data_dir))
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("this torch finds no CUDA device; choose --device cpu, or --preset laptop")
        inputs = prepare(todo, store, options.data_dir)
        with local(min(_processes(options, device) or 1, len(todo))) as client:
            return store, do(todo, keep, store, client, inputs)


def _processes(options: argparse.Namespace, device: str) -> int | None:
    if options.workers is not None or options.scheduler is not None:
        return options.workers
    return 4 if device == "cuda" else min(os.cpu_count() or 1, 8)


def _how_to_go_on(out: Path) -> str:
    try:
        count = len(read_records(out / "runs.jsonl"))
    except (OSError, ValueError):
        count = 0
    return (
        f"{count} runs are stored in {out}/, and the same command goes on from there" if count else "nothing is stored"
    )


def write(out: Path, setting: Setting, plans: dict[str, Plan], store: Store, command: str) -> list[str]:
    """Print and save what experiments found; say which have no table, for want of runs."""
    claims: dict[str, list[Claim]] = {}
    incomplete = []
    for name, plan in plans.items():
        if not all(run.repeated(seed).key in store.records for run in plan.values() for seed in range(setting.seeds)):
            incomplete.append(f"{name}: no table, since some of its runs failed")
            continue
        results = Results(plan, setting.seeds, store)
        claims[name] = report.save(out / name, EXPERIMENTS[name], setting, results, command)
        for part in ("table", "claims"):
            print("\n" + (out / name / f"{part}.md").read_text("utf-8"))
    if len(claims) > 1:
        table = report.verdict_table(claims)
        (out / "verdicts.md").write_text(f"# Verdicts: {setting.describe()}\n\n{table}\n", encoding="utf-8")
        print(f"\n{table}\n")
    for name in claims:
        if EXPERIMENTS[name].summary is not None:  # last, where a reader who has no time looks
            print("\n" + (out / name / "summary.md").read_text("utf-8"))
    return incomplete


def _command(arguments: list[str] | None) -> str:
    """The command without the options that change no number."""
    words = iter(sys.argv[1:] if arguments is None else arguments)
    kept = []
    for word in words:
        name, _, value = word.removeprefix("--").replace("-", "_").partition("=")
        if word.startswith("--") and name in NOT_SHOWN:
            if not value:
                next(words, None)
        else:
            kept.append(word)
    return f"python -m benchmarks.paper {shlex.join(kept)}"


if __name__ == "__main__":
    main()
