"""Command line: ``python -m benchmarks.paper comparison``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.paper import report
from benchmarks.paper.data import DATASETS, own_folder
from benchmarks.paper.experiment import Plan, Results
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.models import MODELS
from benchmarks.paper.recipe import Recipe
from benchmarks.paper.schedule import do, prepare
from benchmarks.paper.setting import PRESETS, Setting, preset
from benchmarks.paper.statistics import Claim
from benchmarks.paper.store import Store

NOT_SHOWN = {"out", "workers", "data_dir"}  # options that say where and how, and change no number
GRIDS = tuple(name for name, kind in Setting.__annotations__.items() if "tuple" in kind)


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas, each a fraction like 1/3 or a decimal."""
    numbers = []
    for part in text.split(","):
        numerator, _, denominator = part.partition("/")
        numbers.append(float(numerator) / float(denominator or 1))
    return tuple(numbers)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser; an option that is not given is the preset's."""
    names = "\n".join(f"  {name:20}{e.title} ({e.figure})" for name, e in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=f"The paper's experiments, each with a table, a figure and verdicts:\n\n{names}",
        epilog="Runs are stored in OUT/runs.jsonl: what is there is not trained again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the command is printed beside its results
    )
    parser.add_argument("experiment", nargs="+", choices=[*EXPERIMENTS, "all"], metavar="NAME", help="or all")
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="default %(default)s")
    parser.add_argument("--dataset", choices=[*DATASETS, "folder"], help="folder: one of your own, see --data-dir")
    parser.add_argument("--train-size", type=int, help="use so many of the training samples")
    parser.add_argument("--pairs", type=int, help="of fashion-pairs: training and validation pairs")
    parser.add_argument(
        "--size", type=int, help="height of an image, of fashion-pairs (a divisor of 28) and folder (64)"
    )
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--other-model", choices=MODELS, help="the second network of cross-distillation")
    parser.add_argument("--width", type=int, help="channels of the first stage, or growth rate")
    parser.add_argument("--seeds", type=int, help="runs per method")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--workers", type=int, help="processes (default: one per core, at most 8; 4 on a GPU)")
    parser.add_argument("--ema-decay", type=float, help="of Beta smoothing")
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
            recipe.add_argument(flag, type=int if "int" in kind else float)
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
        size = options.size or 64
        setting = preset(
            options.preset, own_folder(options.data_dir, size), options.model, options.other_model, size=size
        )
    else:
        setting = preset(options.preset, options.dataset, options.model, options.other_model)
    given = {name: value for name, value in vars(options).items() if value is not None}
    parts = {
        "data": {name: given[name] for name in ("train_size", "pairs", "size") if name in given},
        "recipe": {name: given[name] for name in Recipe.__annotations__ if name in given},
        "model": {name: given[name] for name in ("width",) if name in given},
    }
    for name, changes in parts.items():
        setting = replace(setting, **{name: replace(getattr(setting, name), **changes)})
    setting = replace(setting, other_recipe=replace(setting.other_recipe, **parts["recipe"]))
    own = ("seeds", "device", "ema_decay", "generations", *GRIDS)
    return replace(setting, **{name: given[name] for name in own if name in given})


def main(arguments: list[str] | None = None) -> None:
    """Do the runs that are missing; print and save tables, figures and verdicts."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 1:
        parser.error(f"workers must be at least 1, got {options.workers}")
    names = list(EXPERIMENTS) if "all" in options.experiment else list(dict.fromkeys(options.experiment))
    start = time.perf_counter()
    try:
        setting = make_setting(options)
        plans = {name: EXPERIMENTS[name].plan(setting) for name in names}
        if setting.device == "cuda" and not torch.cuda.is_available():
            parser.error("this torch finds no CUDA device; choose --device cpu, or --preset laptop")
        runs = [run.repeated(seed) for plan in plans.values() for run in plan.values() for seed in range(setting.seeds)]
        with Store(options.out) as store:
            prepare(runs, store, options.data_dir)
            workers = options.workers or (4 if setting.device == "cuda" else min(os.cpu_count() or 1, 8))
            failures = do(runs, store, workers, options.data_dir)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    failures += write(options.out, setting, plans, store, _command(arguments))
    print(f"{time.perf_counter() - start:.0f} s; runs, tables and figures in {options.out}/")
    if failures:
        sys.exit("\n".join(["", "failed:", *failures]))


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
        print("\n" + (out / name / "table.md").read_text())
    if len(claims) > 1:
        table = report.verdict_table(claims)
        (out / "verdicts.md").write_text(f"# Verdicts: {setting.describe()}\n\n{table}\n")
        print(f"\n{table}\n")
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
