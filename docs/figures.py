"""Figures of the pages, drawn while the site is built, in the colours of the page: light or dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from softlabels.functional import beta_smoothing_targets, distillation_targets
from softlabels.plotting import BLUE, GREY, ORANGE, soft_labels
from softlabels.tuning import beta_concentration, match_temperature, true_class_for

INK = "#000000"
COLORS = (BLUE, ORANGE, GREY, "#9c63b8")  # legible on white and on dark pages


def svg(figure: Figure, description: str) -> str:
    """The figure as an SVG element whose ink is the text colour of the page around it."""
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        for axes in figure.axes:
            axes.patch.set_visible(False)
            if axes.get_legend() is not None:
                axes.get_legend().get_frame().set_visible(False)
        figure.patch.set_visible(False)
        figure.savefig(text, format="svg", metadata={"Date": None})
    element = text.getvalue()[text.getvalue().index("<svg") :].replace(INK, "currentColor")
    width = float(re.search(r'width="([\d.]+)pt"', element)[1])
    for pattern, instead in (
        (r"<(metadata|style).*?</\1>", ""),  # the style is for all elements of the page, so the root has it below
        (r'^(<svg[^>]*?) width="[^"]*"', r"\1"),
        (r'^(<svg[^>]*?) height="[^"]*"', r"\1"),
        (r"(font: [\d.]+px) [^;\"]*", r"\1 sans-serif"),
        (r"\s*\n\s*", "\n"),  # a blank line would end the element for Markdown
    ):
        element = re.sub(pattern, instead, element, flags=re.DOTALL)
    label = html.escape(description, quote=True)
    style = "stroke-linejoin: round; stroke-linecap: butt; "
    style += f"width: 100%; max-width: {1.25 * width:.0f}px; height: auto"
    return element.replace("<svg", f'<svg role="img" aria-label="{label}" fill="currentColor" style="{style}"', 1)


def digits_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a small network for 64 training digits, and their labels."""
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32)[:256], torch.tensor(digits)[:256]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model(x[:64]), y[:64]


def three_soft_labels() -> list[Figure]:
    """Label smoothing, Beta smoothing and a teacher, as strong as each other, on the same 64 digits."""
    logits, labels = digits_batch()
    share = true_class_for(0.15, 10)
    smooth = torch.full((64, 10), (1 - share) / 9).scatter_(1, labels[:, None], share)
    confidence = logits.softmax(1).amax(1)
    drawn = beta_smoothing_targets(
        labels,
        10,
        confidence,
        concentration=beta_concentration(share, alpha=0.4),
        generator=torch.Generator().manual_seed(0),
    )
    temperature = match_temperature(logits, labels, alpha=0.6, true_class=share)
    taught = distillation_targets(labels, logits, alpha=0.6, temperature=temperature)
    figures = []
    for name, targets in {"label smoothing": smooth, "Beta smoothing": drawn, "a teacher's": taught}.items():
        figures.append(Figure(figsize=(3.7, 3), layout="constrained"))
        soft_labels(targets, labels, ax=figures[-1].subplots(), title=name)
    return figures


def bars(rows: dict[str, torch.Tensor], ylabel: str) -> Figure:
    """Class probabilities side by side, one colour per row."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(rows)
    for i, (name, values) in enumerate(rows.items()):
        left = [c - 0.4 + (i + 0.5) * width for c in range(len(values))]
        axes.bar(left, values.tolist(), width, label=name, color=COLORS[i])
    axes.set(xlabel="class", ylabel=ylabel, xticks=range(len(next(iter(rows.values())))))
    return _finish(figure)


def loss_curves(loss: Callable[..., torch.Tensor], betas: Sequence[float], num_classes: int = 10) -> Figure:
    """A loss against the probability of the true class, where the other classes share the rest equally."""
    share = torch.linspace(0.02, 0.9999, 2000, dtype=torch.float64)
    rest = ((1 - share) / (num_classes - 1))[:, None].expand(-1, num_classes - 1)
    logits, labels = torch.cat([share[:, None], rest], 1).log(), torch.zeros(len(share), dtype=torch.int64)
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for color, beta in zip(COLORS, betas, strict=False):
        values = loss(logits, labels, beta=beta, reduction="none")
        least = values.argmin()
        axes.plot(share.tolist(), values.tolist(), color=color, label=f"beta {beta:g}")
        axes.plot(share[least].item(), values[least].item(), "o", color=color, clip_on=False)
    axes.set(xlabel="probability of the true class", ylabel="loss (nats)", xlim=(0, 1))
    return _finish(figure)


def _finish(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.legend(fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    return figure
