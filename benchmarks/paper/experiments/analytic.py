"""Eq. 7 and App. 9.1: two identities, checked with numbers instead of training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet

import softlabels
from benchmarks.paper.experiment import Experiment, Plan, Results
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Identity
from softlabels import tuning

CLASSES = (2, 10, 100, 1000)
BETAS = (0.05, 0.25, 1.0, 3.0)


def plan(setting: Setting) -> Plan:
    """Train nothing."""
    return {}


def minimiser(loss: Callable[[Tensor, Tensor], Tensor], num_classes: int) -> Tensor:
    """Probabilities at which the loss of one sample of class 0 is least, by L-BFGS over its logits in float64."""
    logits = torch.zeros(1, num_classes, dtype=torch.float64)
    logits[0, 0] = 1.0  # a confident start: the loss is not convex where the wrong class is the likeliest
    logits.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=1000, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(logits, torch.zeros(1, dtype=torch.long))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(1)[0]


@functools.cache
def penalty_minimiser(beta: float, num_classes: int) -> Tensor:
    """Probabilities at which the confidence penalty is least; the verdict and the figure both ask."""
    return minimiser(softlabels.ConfidencePenaltyLoss(beta=beta), num_classes)


def _label_smoothing_identities() -> tuple[float, float]:
    """Greatest deviations of Eq. 7 from torch's label smoothing, and from the Dirichlet posterior."""
    generator = torch.Generator().manual_seed(0)
    from_torch, from_posterior = [], []
    for num_classes in CLASSES:
        logits = 3 * torch.randn(64, num_classes, dtype=torch.float64, generator=generator)
        labels = torch.randint(num_classes, (64,), generator=generator)
        for beta in BETAS:
            loss = softlabels.LabelSmoothingMAPLoss(beta=beta, reduction="none")(logits, labels)
            smoothing = tuning.beta_to_smoothing(beta)
            smoothed = nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none")(logits, labels)
            from_torch.append(((loss - (1 + beta) * smoothed) / loss).abs().max())
            log_likelihood = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
            prior = Dirichlet(torch.full((num_classes,), beta / num_classes + 1.0, dtype=torch.float64))
            constant = loss + log_likelihood + prior.log_prob(logits.softmax(1))
            from_posterior.append(((constant - constant.mean()) / loss).abs().max())
    return torch.stack(from_torch).max().item(), torch.stack(from_posterior).max().item()


def _penalty_deviations() -> tuple[float, float]:
    """Greatest deviations of the confidence penalty's minimiser from the formula, and from label smoothing's."""
    from_formula, from_smoothing = 0.0, 0.0
    for num_classes in CLASSES:
        for beta in BETAS:
            found = penalty_minimiser(beta, num_classes)
            optimum = tuning.confidence_penalty_optimum(beta, num_classes)
            smoothing = tuning.label_smoothing_for(optimum, num_classes)
            smoothed = minimiser(nn.CrossEntropyLoss(label_smoothing=smoothing), num_classes)
            from_formula = max(from_formula, abs(found[0].item() - optimum))
            from_smoothing = max(from_smoothing, (found - smoothed).abs().max().item())
    return from_formula, from_smoothing


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide C14 and C15."""
    from_torch, from_posterior = _label_smoothing_identities()
    from_formula, from_smoothing = _penalty_deviations()
    return [
        Claim(
            "C14",
            "Label smoothing is MAP with a uniform Dirichlet prior",
            [
                Identity("Eq. 7 against (1 + beta) times torch's label smoothing, relative", from_torch, 1e-12),
                Identity("Eq. 7 against -log Cat - log Dir(beta / K + 1) and a constant", from_posterior, 1e-10),
            ],
        ),
        Claim(
            "C15",
            "The optimum of the confidence penalty is that of label smoothing",
            [
                Identity("probability of the true class, minimiser against formula", from_formula, 1e-6),
                Identity("all probabilities, minimiser against that of label smoothing", from_smoothing, 1e-6),
            ],
        ),
    ]


def table(setting: Setting, results: Results) -> str:
    """Tabulate optima of the confidence penalty as label smoothing."""
    lines = [
        "| beta | " + " | ".join(f"K = {num_classes}" for num_classes in CLASSES) + " |",
        "|---:|" + "---:|" * len(CLASSES),
    ]
    for beta in BETAS:
        optima = [tuning.confidence_penalty_optimum(beta, num_classes) for num_classes in CLASSES]
        cells = [
            f"{optimum:.4f} ({tuning.label_smoothing_for(optimum, num_classes):.4f})"
            for optimum, num_classes in zip(optima, CLASSES, strict=True)
        ]
        lines.append(f"| {beta:g} | " + " | ".join(cells) + " |")
    heading = "Probability of the true class at the optimum (label smoothing with the same optimum):"
    return "\n".join([heading, "", *lines])


def draw(setting: Setting, results: Results, folder: Path) -> None:
    """Draw the optimum against beta: the formula as a line, minimisers as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    line = torch.logspace(-2, 1, 200).tolist()
    for index, num_classes in enumerate(CLASSES):
        formula = [tuning.confidence_penalty_optimum(beta, num_classes) for beta in line]
        axes.plot(line, formula, color=f"C{index}", label=f"K = {num_classes}")
        found = [penalty_minimiser(beta, num_classes)[0].item() for beta in BETAS]
        axes.plot(BETAS, found, "o", color=f"C{index}")
    axes.set(xscale="log", xlabel="beta", ylabel="probability of the true class", title="App. 9.1")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "figure.png", dpi=120)


EXPERIMENT = Experiment("Label smoothing, MAP and the confidence penalty", "Eq. 7, App. 9.1", plan, claims, draw, table)
