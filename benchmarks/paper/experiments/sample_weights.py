"""Sec. 5.2: the sample weights that Eq. 9 has and Eq. 3 leaves out."""

from __future__ import annotations

from benchmarks.paper import figures
from benchmarks.paper.experiment import Experiment, Plan, Results, cell, metric_table
from benchmarks.paper.experiments.comparison import CE, SD
from benchmarks.paper.methods import cross_entropy, dirichlet_map, self_distillation
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Part

MARGIN = 0.5  # points of accuracy that count as no difference
MOST_VARIATION = 0.5  # of the weights, as a share of their mean, that counts as hardly different

EXACT, NORMALIZED, NONE = (f"Eq. 9, {kind} weights" for kind in ("exact", "normalized", "no"))


def plan(setting: Setting) -> Plan:
    """Make Eq. 9 with each weighting, and Eq. 3."""
    teacher = setting.teacher()
    kinds = {EXACT: "exact", NORMALIZED: "normalized", NONE: "none"}
    return {
        CE: setting.run(cross_entropy()),
        SD: setting.run(self_distillation(), teacher),
        **{label: setting.run(dirichlet_map(kind), teacher) for label, kind in kinds.items()},
    }


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide C13: the weights vary little at the matched temperature, and accuracies agree within the margin."""
    parts = [
        Part(
            f"{MOST_VARIATION:g} - variation of the weights of {name} logits",
            [MOST_VARIATION - value for value in results.values(NONE, key, "soft_labels", "sample_weights")],
            "of their mean",
        )
        for name, key in (("the teacher's", "variation"), ("centred", "centred_variation"))
    ]
    for label in (EXACT, NORMALIZED):
        for first, second in ((label, NONE), (NONE, label)):
            text = f"accuracy, {first} - {second}"
            parts.append(Part(text, results.difference(first, second, "accuracy"), margin=MARGIN))
    return [Claim("C13", "At useful temperatures the sample weights of Eq. 9 hardly differ", parts)]


def table(setting: Setting, results: Results) -> str:
    """Tabulate the metrics, and below them how much the weights differ."""
    spread = [
        f"{heading} {cell(results, NONE, key, 'soft_labels', 'sample_weights')}"
        for heading, key in (("of the teacher's logits", "variation"), ("of its centred logits", "centred_variation"))
    ]
    temperature = cell(results, NONE, "temperature", "soft_labels")
    return (
        f"{metric_table(results)}\n\nStandard deviation of the weights over their mean, at the matched temperature "
        f"({temperature}): {', '.join(spread)}. Eq. 9 without weights is Eq. 3 times 1 / alpha: the same labels at a "
        "learning rate 1.67 times as high."
    )


EXPERIMENT = Experiment(
    "The sample weights of Eq. 9", "sec. 5.2", plan, claims, figures.draw_differences("sec. 5.2"), table
)
