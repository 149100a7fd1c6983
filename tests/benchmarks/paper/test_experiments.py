"""Experiments from the command line: resuming, sharing runs, planted effects, tables and figures."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.paper import __main__ as command
from benchmarks.paper import figures, report
from benchmarks.paper.experiment import Results, gap
from benchmarks.paper.experiments import EXPERIMENTS, spread, tuned
from benchmarks.paper.recipe import Recipe
from benchmarks.paper.runs import TEACHER_SEED
from benchmarks.paper.setting import PRESETS, Setting, preset
from benchmarks.paper.statistics import mean_interval
from benchmarks.paper.store import Store
from softlabels.metrics import reliability_curve

SMOKE = ["--preset", "smoke", "--workers", "2"]


def made_up(setting: Setting, name: str, folder: Path, effect: float, seeds: int = 8) -> Results:
    """Results in which every claim of an experiment has an effect of this size, among noise of deviation 0.1."""
    experiment, generator = EXPERIMENTS[name], np.random.default_rng(0)
    plan = experiment.plan(setting)
    curve = {k: v.tolist() for k, v in vars(reliability_curve(torch.eye(3), torch.arange(3))).items()}
    with Store(folder) as store:
        pass
    for position, (label, run) in enumerate(plan.items()):
        for seed in range(seeds):
            values = quality(name, label, position, len(plan))
            accuracy = 60.0 + effect * values["accuracy"] + generator.normal(0, 0.1)
            metrics = {
                "accuracy": accuracy,
                "ece": 30.0 - effect * values["ece"] + generator.normal(0, 0.1),
                "nll": 20.0 - effect * values["nll"] + generator.normal(0, 0.1),
                "uncertainty": 20.0 + effect * values["uncertainty"] + generator.normal(0, 0.1),
                "diversity": 20.0 + effect * values["diversity"] + generator.normal(0, 0.1),
                "kl": 20.0 - effect * values["nll"] + generator.normal(0, 0.1),
            }
            weights = {"variation": 0.5 - effect * 0.3 + generator.normal(0, 0.01)}
            weights["centred_variation"] = weights["variation"]
            record = {
                "key": run.repeated(seed).key,
                **dict.fromkeys(("train", "validation", "test"), metrics),
                "scaled": {**metrics, "temperature": 1.5},
                "soft_labels": {"teacher": metrics, "sample_weights": weights, "temperature": 2.0},
                "data_digest": "",
                "versions": {"torch": "0"},
                "hardware": "none",
                "curve": curve,
            }
            store.records[record["key"]] = record
    return Results(plan, seeds, store)


def quality(name: str, label: str, position: int, count: int) -> dict[str, float]:
    """What the paper says a run is better by, in units of the effect."""
    level = float(position)
    if name == "comparison":
        levels = {"cross-entropy": 0, "label smoothing": 1, "Beta smoothing": 2, "self-distillation": 3}
        level = levels[label.split(",")[0]]
    if name == "tuned":
        levels = {"cross-entropy": -2, "label smoothing": 1, "Beta smoothing": 2, "self-distillation": 3}
        level = levels[label.split(",")[0]] - label.endswith("0.98")
    if name == "spread":
        level = spread_level(label)
    if name == "ema-window":
        level = 3.0 * ("last tenth" in label)
    if name == "label-noise":
        levels = {"cross-entropy": -2, "label smoothing": 1, "Beta smoothing": 2, "neighbours and samples": 6}
        level = next((levels[method] for method in levels if label.startswith(method)), 3)
    if name == "temperature":
        students = [0.0, 4.0, 5.0]  # rises, then levels off
        if label.startswith("T ="):
            level = students[position]
            return {
                "accuracy": level,
                "ece": level,
                "nll": [0, 4, 1][position],
                "uncertainty": 2 * position,
                "diversity": level,
            }
        level = 0.0
    if name == "student-scaling":
        level = 2.0 if "teacher only" in label else 0.0
    if name in ("train-size", "weight-decay"):
        level = 3.0 - position if "self-distillation" in label else 0.0
    if name == "beta-ablation":
        level = {"Beta smoothing": 2.0, "Beta, ranked by the true class": 4.0}.get(label, 0.0)
    if name == "cross-distillation":
        level = 4.0 * label.endswith(("resnet8", "resnet8, cross-entropy"))
    if name == "pruned":
        level = 2.0 if "pruned" in label else 0.0
    if name == "sample-weights":
        level = 0.0
    return dict.fromkeys(("accuracy", "ece", "nll", "uncertainty", "diversity"), level)


def spread_level(label: str) -> float:
    """Ranked before equal and random amounts, learned before even spreads, and both before what others do."""
    levels = {"cross-entropy": -2, "label smoothing": 1, "Beta smoothing, ranked by the batch": 3, "Beta smoothing": 2}
    levels |= {spread.NO_INDEX: 5, spread.ALL: 5}
    if " amounts, " in label:
        return 1.0 + 2 * label.startswith("ranked") + (not label.endswith("even"))
    return next((levels[method] for method in levels if label.startswith(method)), 3) - label.endswith("0.98")


CLAIMS = {
    "sequential": ["C1"],
    "temperature": ["C2"],
    "comparison": ["C3", "C4", "C5", "C6", "truth"],
    "student-scaling": ["C7"],
    "train-size": ["C8"],
    "weight-decay": ["C9"],
    "beta-ablation": ["C10", "rank_by", "batch"],
    "cross-distillation": ["C11"],
    "pruned": ["C12"],
    "sample-weights": ["C13"],
    "tuned": ["tuned LS", "tuned Beta", "tuned SD", "tuned truth"],
    "spread": [
        *("S1 classes", "S1 neighbours", "S1 samples", "S2 accuracy", "S2 ECE", "S3", "S4"),
        *("S5", "S5 LS", "S5 Beta", "S5 SD", "S6", "rivals"),
    ],
    "ema-window": ["window, short", "window, long"],
    "top-k": [f"top {k}, {rest}" for k in (1, 2) for rest in ("uniform", "bucket")],
    "label-noise": ["S7 20%", "S7 20%, specialist", "S7 40%", "S7 40%, specialist"],
}


@pytest.mark.parametrize("name", CLAIMS)
def test_planted_effects_are_found_and_reversed_ones_contradicted(name, tmp_path):
    setting = replace(preset("smoke"), seeds=8)
    experiment = EXPERIMENTS[name]
    planted = experiment.claims(setting, made_up(setting, name, tmp_path / "a", 1.0))
    assert [claim.name for claim in planted] == CLAIMS[name]
    assert [claim.verdict() for claim in planted] == ["holds"] * len(planted), report.verdicts(planted)
    reversed_ = experiment.claims(setting, made_up(setting, name, tmp_path / "b", -1.0))
    if name != "cross-distillation":  # there the better teacher is whichever is better
        assert [claim.verdict() for claim in reversed_] == ["contradicted"] * len(planted), report.verdicts(reversed_)
    if name not in ("pruned", "sample-weights", "spread", "ema-window"):  # where no effect is what is claimed
        null = experiment.claims(setting, made_up(setting, name, tmp_path / "c", 0.0))
        assert "holds" not in [claim.verdict() for claim in null], report.verdicts(null)
    results = made_up(setting, name, tmp_path / "d", 1.0)
    if experiment.table is not None:
        table = experiment.table(setting, results)
        assert "\n|---|" in table
        assert "nan" not in table
    experiment.draw(setting, results, tmp_path)
    drawn = list(tmp_path.glob("figure*.png"))
    assert drawn
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_figures_show_differences_from_the_first_with_their_intervals(tmp_path, monkeypatch):
    setting = replace(preset("smoke"), seeds=8)
    results = made_up(setting, "pruned", tmp_path, 1.0)
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *arguments, **options: drawn.append(figure))
    figures.differences(results, tmp_path / "figure.png", "title", metrics=("accuracy", "diversity", "limit"))
    accuracy, diversity = drawn[0].axes  # the limit is not known
    assert [text.get_text() for text in accuracy.get_yticklabels()] == results.labels[1:]
    for axes, metric in ((accuracy, "accuracy"), (diversity, "diversity")):
        for label, bar in zip(results.labels[1:], axes.containers, strict=True):
            mean, half = mean_interval(results.difference(label, "cross-entropy", metric))
            assert bar.lines[0].get_xdata() == pytest.approx([mean])
            assert sorted(bar.lines[2][0].get_segments()[0][:, 0]) == pytest.approx([mean - half, mean + half])


def test_the_strength_is_chosen_on_validation_data(tmp_path):
    """A strength that is best on the test set alone is not chosen, and the table says which one was."""
    setting = replace(preset("smoke"), seeds=8)
    results = made_up(setting, "tuned", tmp_path, 1.0)
    for record in results.records["label smoothing, true class 0.75"]:
        record["validation"] = {**record["validation"], "nll": 1.0}
    for record in results.records["label smoothing, true class 0.5"]:
        record["test"] = {**record["test"], "nll": 0.0}
    chosen = tuned.Tuned(tuned.candidates(setting), results).chosen
    assert chosen[tuned.LS] == ["label smoothing, true class 0.75"] * 8
    assert "| label smoothing | true class 0.75 |" in EXPERIMENTS["tuned"].table(setting, results)
    assert "| cross-entropy, temperature scaled | T = 1.50 ± 0.00 |" in EXPERIMENTS["tuned"].table(setting, results)


def test_summary_says_what_gained_what_by_how_much_and_how_sure(tmp_path):
    setting = replace(preset("smoke"), seeds=8)
    results = made_up(setting, "comparison", tmp_path, 1.0)
    for record, noise in zip(results.records["label smoothing"], (-2, 1, 3, -1, 2, -3, 1, -1), strict=True):
        record["test"] = {**record["test"], "accuracy": 60.0 + noise}
    first, second, third = EXPERIMENTS["comparison"].summary(setting, results)
    assert re.search(r"^Of 100 test samples cross-entropy gets [56]\d\.\d right: label smoothing \d", first)
    assert re.search(
        r"Beta smoothing (1\.9|2\.[01]) ± 0\.1 more and self-distillation (2\.9|3\.[01]) ± 0\.1 more\.$", first
    )
    assert re.search(r"label smoothing (0\.9|1\.[01]) ± 0\.1 points less, Beta .* less; a temperature", second)
    assert third.startswith("Over 8 seeds these six differences are beyond chance, but for these: accuracy of label sm")
    few = EXPERIMENTS["comparison"].summary(replace(setting, seeds=2), made_up(setting, "comparison", tmp_path, 1.0, 2))
    assert "This is a glance at 2 of the 8 seeds" in few[2]


def test_a_better_teacher_that_makes_a_worse_student_contradicts_c11(tmp_path):
    setting = replace(preset("smoke"), seeds=8)
    results = made_up(setting, "cross-distillation", tmp_path, 1.0)
    for label, records in results.records.items():
        if label.endswith("taught by resnet8"):
            for record in records:
                record["test"] = {**record["test"], "accuracy": record["test"]["accuracy"] - 9.0}
    (claim,) = EXPERIMENTS["cross-distillation"].claims(setting, results)
    assert claim.verdict() == "contradicted"


def test_analytic_claims_hold_and_would_be_contradicted(monkeypatch):
    setting = preset("smoke")
    claims = EXPERIMENTS["analytic"].claims(setting, Results({}, 2, None))
    assert [(claim.name, claim.verdict()) for claim in claims] == [("C14", "holds"), ("C15", "holds")]
    monkeypatch.setattr("softlabels.tuning.beta_to_smoothing", lambda beta: beta / (1.001 + beta))
    monkeypatch.setattr("softlabels.tuning.confidence_penalty_optimum", lambda beta, num_classes: 0.9)
    claims = EXPERIMENTS["analytic"].claims(setting, Results({}, 2, None))
    assert [claim.verdict() for claim in claims] == ["contradicted", "contradicted"]


def test_the_test_set_is_not_searched(tmp_path):
    """Temperatures are chosen on the validation set: a run that is best on the test set alone is not."""
    setting = replace(preset("smoke"), seeds=2)
    results = made_up(setting, "temperature", tmp_path, 1.0, seeds=2)
    for record in results.records["T = 1"]:
        record["test"] = {**record["test"], "accuracy": 99.0}
    chosen = results.best(["T = 1", "T = 2", "T = 4"], "accuracy")
    assert chosen == ["T = 4", "T = 4"]
    assert max(results.chosen(chosen, "accuracy")) < 70


def test_chance_seldom_makes_the_chosen_the_best(tmp_path):
    """Every T is as good as any other, and a lucky run is lucky on validation and test set alike."""
    setting = replace(preset("paper"), seeds=5)
    plan = EXPERIMENTS["temperature"].plan(setting)
    generator = np.random.default_rng(0)
    results = Results.__new__(Results)
    results.seeds = 5
    holds = []
    for _ in range(150):
        results.records = {}
        for label in plan:
            luck = generator.normal(size=5)
            metrics = [dict.fromkeys(("accuracy", "nll", "uncertainty", "diversity"), value) for value in luck]
            results.records[label] = [
                {"validation": m, "test": m, "train": m, "soft_labels": {"teacher": m}} for m in metrics
            ]
        (claim,) = EXPERIMENTS["temperature"].claims(setting, results)
        holds.append(
            [part.p_value() < 0.05 and np.mean(part.values) > 0 for part in claim.parts if "best" in part.text]
        )
    assert len(holds[0]) == 3
    assert np.mean(holds) < 0.07


def test_a_rise_that_collapses_does_not_level_off(tmp_path):
    setting = replace(preset("smoke"), seeds=8)
    results = made_up(setting, "temperature", tmp_path, 1.0)
    for record in results.records["T = 4"]:
        record["test"] = {**record["test"], "accuracy": record["test"]["accuracy"] - 20.0}
    (claim,) = EXPERIMENTS["temperature"].claims(setting, results)
    assert claim.verdict() == "contradicted"
    contradicted = [part.text for part in claim.parts if part.verdict() == "contradicted"]
    assert "accuracy keeps half of the rise" in contradicted
    assert "accuracy levels off: that less T = 4 - T = 2" not in contradicted


def test_teachers_that_do_not_differ_decide_nothing(tmp_path):
    setting = replace(preset("smoke"), seeds=8)
    results = made_up(setting, "cross-distillation", tmp_path, 1.0)
    for first, second in zip(*(results.records[f"{n}, cross-entropy"] for n in ("resnet8", "densenet10")), strict=True):
        first["test"] = second["test"]
    (claim,) = EXPERIMENTS["cross-distillation"].claims(setting, results)
    assert claim.verdict() == "undecided"
    assert claim.describe()[0].startswith("premise: accuracy of the teachers")


def test_runs_on_different_copies_of_a_data_set_are_not_compared(tmp_path):
    setting = replace(preset("smoke"), seeds=2)
    made_up(setting, "comparison", tmp_path, 1.0, seeds=2)
    plan = EXPERIMENTS["comparison"].plan(setting)
    with Store(tmp_path / "b") as store:
        for run in plan.values():
            for seed in range(2):
                store.add({"key": run.repeated(seed).key, "data_digest": run.method.name})
    with pytest.raises(ValueError, match=r"different copies of digits .digests cross-entropy and label smoothing\)"):
        Results(plan, 2, store)


def test_missing_values_are_nan(tmp_path):
    results = made_up(replace(preset("smoke"), seeds=2), "comparison", tmp_path, 1.0, seeds=2)
    record = results.records["cross-entropy"][0]
    record["test"] = {**record["test"], "diversity": None}
    first, second = results.values("cross-entropy", "diversity")
    assert math.isnan(first)
    assert math.isfinite(second)
    assert "| nan |" in report.metric_table(results)


def test_gap_between_confidence_and_accuracy():
    logits, labels = torch.randn(200, 4), torch.randint(4, (200,))
    curve = {
        k: [None if v != v else v for v in values.tolist()]
        for k, values in vars(reliability_curve(logits, labels)).items()
    }
    confidence, accuracy = logits.softmax(1).amax(1).mean(), (logits.argmax(1) == labels).float().mean()
    assert gap(curve) == pytest.approx(100 * (confidence - accuracy).item(), abs=1e-4)


def test_pooled_curves_are_those_of_all_predictions(tmp_path):
    results = made_up(replace(preset("smoke"), seeds=3), "comparison", tmp_path, 1.0, seeds=3)
    seeds = [(torch.randn(60, 4), torch.randint(4, (60,))) for _ in range(3)]
    for record, seed in zip(results.records["label smoothing"], seeds, strict=True):
        curve = vars(reliability_curve(*seed))
        record["curve"] = {k: [None if v != v else v for v in values.tolist()] for k, values in curve.items()}
    pooled = figures.pooled_curves(results)["label smoothing"]
    logits, labels = (torch.cat(parts) for parts in zip(*seeds, strict=True))
    torch.testing.assert_close(vars(pooled), vars(reliability_curve(logits, labels)), equal_nan=True)


def test_command_line(tmp_path, capsys):
    command.main(["comparison", "pruned", *SMOKE, "--seeds", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for text in ("| cross-entropy |", "| 50% of the classes pruned |", "**C3: ", "**C12: ", "| C4 |"):
        assert text in printed
    table = (tmp_path / "comparison" / "table.md").read_text()
    assert table in printed
    made_by = "`python -m benchmarks.paper comparison pruned --preset smoke --seeds 1`"
    assert made_by in table
    for picture in ("comparison/figure.png", "comparison/reliability.png", "pruned/figure.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 9  # a teacher, and eight students: self-distillation is in both experiments
    assert {"config", "seconds", "versions", "hardware", "epochs"} - set(runs[0]) == {"config"}
    before = (tmp_path / "runs.jsonl").read_bytes()
    command.main(["comparison", *SMOKE, "--seeds", "1", "--out", str(tmp_path)])  # nothing is trained again
    assert (tmp_path / "runs.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["comparison", "--dataset", "digits", "--pairs", "100"], "pairs is for fashion-pairs"),
        (["comparison", "--dataset", "folder"], "--dataset folder needs --data-dir"),
        (["comparison", "--dataset", "folder", "--data-dir", "/nowhere"], "/nowhere/train is missing"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["comparison", "--seeds", "0"], "seeds must be from 1 to 100, got 0"),
        (["sequential", "--generations", "1"], "generations must be from 2 to 1000, got 1"),
        (["pruned", "--prunes", "0.25,0.75"], "prunes must be below 1, and 0.5 be among them, got 0.25, 0.75"),
        (
            ["comparison", "--true-classes", "0.95,0.85"],
            "true_classes must be above 0.6, below 1 and not 0.85, got 0.95, 0.85",
        ),
        (["weight-decay", "--weight-decays", "0,1e-4"], "weight_decays must be 2 or more numbers above 0 that rise"),
        (["train-size", "--fractions", "0.5,1.5"], "fractions must be at most 1, got 0.5, 1.5"),
        (
            ["comparison", "--dataset", "digits", "--batch-size", "1000"],
            "batch_size=1000 is more than the 810 training samples of digits",
        ),
        (["comparison", "--preset", "gpu", "--dataset", "digits"], "finds no CUDA device; choose --device cpu"),
        (["comparison", "--ou", "somewhere"], "unrecognized arguments: --ou"),
        (["comparison", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["comparison", "--workers", "0"], "workers must be at least 1, got 0"),
        (
            ["temperature", "--temperatures", "4,2"],
            "temperatures must be 3 or more numbers above 0 that rise, got 4, 2",
        ),
        (["temperature", "--temperatures", "2,x"], "argument --temperatures"),
        (["cross-distillation", "--model", "resnet20", "--other-model", "resnet20"], "resnet20 twice"),
    ],
)
def test_bad_options_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([*arguments, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_a_missing_data_set_stops_before_anything_is_trained(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["comparison", "--dataset", "cifar10", "--data-dir", str(tmp_path), "--out", str(tmp_path)])
    assert "no cifar10 in" in capsys.readouterr().err


def test_options_lie_over_the_preset():
    arguments = ["sequential", "--preset", "gpu", "--dataset", "cifar100", "--model", "resnet20", "--lr", "0.05"]
    arguments += ["--milestones", "1/4,0.5", "--no-compile", "--generations", "3", "--prunes", "0.5", "--padding", "2"]
    setting = command.make_setting(command.make_parser().parse_args(arguments))
    assert setting.recipe == Recipe(epochs=100, lr=0.05, milestones=(0.25, 0.5), bf16=True, compile=False, padding=2)
    assert (setting.other_recipe.lr, setting.other_recipe.epochs) == (0.05, 100)
    assert (setting.model.name, setting.generations, setting.prunes) == ("resnet20", 3, (0.5,))
    assert (setting.data.name, setting.device, setting.ema_decay) == ("cifar100", "cuda", 0.999)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_plans_every_experiment(name):
    setting = preset(name)
    for experiment in EXPERIMENTS.values():
        for label, run in experiment.plan(setting).items():
            assert run.seed % TEACHER_SEED == 0, label
            assert run.device == setting.device


def test_each_network_has_its_published_recipe():
    setting = preset("paper", model="densenet100", other_model="resnet34")
    assert (setting.recipe.epochs, setting.recipe.milestones) == (200, (0.5, 0.75))
    assert (setting.other_recipe.epochs, setting.other_recipe.milestones) == (150, (1 / 3, 2 / 3))
    assert preset("gpu", other_model="resnet20").other_recipe.milestones == (1 / 3, 2 / 3)


def test_experiments_that_are_whole_get_their_tables(tmp_path, capsys):
    arguments = ["beta-ablation", "comparison", *SMOKE, "--epochs", "1", "--seeds", "1", "--out", str(tmp_path)]
    with pytest.raises(
        SystemExit, match=r"learnt too little(.|\n)*comparison: no table, since some of its runs failed"
    ):
        command.main(arguments)
    assert (tmp_path / "beta-ablation" / "table.md").exists()
    assert not (tmp_path / "comparison").exists()
