"""Fig. 7: what the ranking of Beta smoothing is worth, and which ranking and which settings."""

from __future__ import annotations

from benchmarks.paper import figures
from benchmarks.paper.experiment import Experiment, Plan, Results
from benchmarks.paper.experiments.comparison import BETA, CE, LS
from benchmarks.paper.methods import cross_entropy, label_smoothing
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Part

RANDOM = "random Beta smoothing"
TRUE_CLASS = "Beta, ranked by the true class"
BATCH = "Beta, ranked by the batch's own logits"
DECAYS = (0.99, 0.999)


def _alpha(alpha: float) -> str:
    return f"Beta, alpha {alpha:g}"


def _decay(setting: Setting) -> float:
    return DECAYS[0] if setting.ema_decay == DECAYS[1] else DECAYS[1]


def plan(setting: Setting) -> Plan:
    """Make the figure's three bars and their baseline, then variants of one option each at equal smoothing."""
    return {
        CE: setting.run(cross_entropy()),
        LS: setting.run(label_smoothing()),
        RANDOM: setting.beta(ranking="random"),
        BETA: setting.beta(),
        TRUE_CLASS: setting.beta(rank_by="true_class"),
        BATCH: setting.beta(ranking="batch"),
        f"Beta, ema_decay {_decay(setting):g}": setting.beta(ema_decay=_decay(setting)),
        **{_alpha(alpha): setting.beta(alpha=alpha) for alpha in setting.beta_alphas},
    }


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide C10, and which ranking is the better one."""

    def better(first: str, second: str) -> list[Part]:
        return [results.better(first, second, metric) for metric in ("accuracy", "ece")]

    return [
        Claim(
            "C10",
            "Beta smoothing ranked by an EMA beats randomly assigned Beta smoothing in accuracy and ECE",
            better(BETA, RANDOM),
        ),
        Claim(
            "rank_by",
            'Ranking by the probability of the true class (`rank_by="true_class"`) beats ranking by the largest '
            '(`"max"`) in accuracy and ECE',
            better(TRUE_CLASS, BETA),
        ),
        Claim(
            "batch",
            'Ranking by the EMA of the network (`ranking="ema"`) beats ranking by the batch\'s own logits '
            '(`"batch"`) in accuracy and ECE',
            better(BETA, BATCH),
        ),
    ]


EXPERIMENT = Experiment(
    "What the ranking of Beta smoothing is worth", "Fig. 7", plan, claims, figures.draw_differences("Fig. 7")
)
