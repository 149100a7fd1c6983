"""How long the EMA that ranks should remember: fixed decays and a window that follows the run, at two lengths."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.paper import figures
from benchmarks.paper.experiment import Experiment, Plan, Results
from benchmarks.paper.methods import cross_entropy
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Part

LENGTHS = {"short": 1, "long": 4}  # times the epochs of the setting
DECAYS = (0.9, 0.99, 0.999)
WINDOW = "the last tenth of the run"
NO_HARM = {"accuracy": 0.3, "ece": 0.3, "nll": 0.01}  # points, points, nats: less is as good


def _label(what: str, length: str) -> str:
    return f"EMA of {what}, {length} run"


def plan(setting: Setting) -> Plan:
    """Make Beta smoothing with each memory, in runs of each length."""
    runs = {"cross-entropy": setting.run(cross_entropy())}
    for length, times in LENGTHS.items():
        recipe = replace(setting.recipe, epochs=times * setting.recipe.epochs)
        setting_of_length = replace(setting, recipe=recipe)
        for decay in DECAYS:
            runs[_label(f"decay {decay:g}", length)] = setting_of_length.beta(ema_decay=decay)
        runs[_label(WINDOW, length)] = setting_of_length.beta(ema_decay=0.999, warmup=10.0)
    return runs


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide whether one number does for both lengths."""

    def no_worse(length: str) -> list[Part]:
        parts = []
        for decay in DECAYS:
            for metric, margin in NO_HARM.items():
                part = results.better(_label(WINDOW, length), _label(f"decay {decay:g}", length), metric)
                parts.append(replace(part, margin=margin))
        return parts

    return [
        Claim(
            f"window, {length}",
            f"In a {length} run a window that follows the run (`warmup=10`, at most 0.999) ranks no worse than any "
            "fixed decay: accuracy, ECE and NLL",
            no_worse(length),
        )
        for length in LENGTHS
    ]


EXPERIMENT = Experiment("How long the EMA remembers", "", plan, claims, figures.draw_differences("EMA"))
