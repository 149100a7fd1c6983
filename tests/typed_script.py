"""A user's script, which `mypy --strict` accepts (it is among what is checked) and the tests run."""

import torch
from torch import Tensor, nn

import softlabels
from softlabels.functional import beta_smoothing_targets, label_smoothing_map_loss
from softlabels.metrics import CalibrationError, calibration_error, reliability_curve
from softlabels.tuning import match_temperature


def train() -> nn.Module:
    """One step of Beta smoothing, and its average."""
    model = nn.Linear(4, 3)
    criterion = softlabels.BetaSmoothingLoss(torch.ones(3), label_smoothing=0.05).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    loss: Tensor = criterion(model(x), y, sample_weight=torch.rand(8), confidence=torch.rand(8))
    loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
    optimizer.step()
    assert criterion.attached
    average: nn.Module = criterion.teacher.averaged_model()
    criterion.detach()
    return average


def distil(teacher: nn.Module) -> float:
    """The other losses, and numbers to look at."""
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    with torch.no_grad():
        logits: Tensor = teacher(x)
    temperature = match_temperature(logits, y, alpha=0.6, true_class=0.75)
    student = nn.Linear(4, 3)
    losses = [
        softlabels.SelfDistillationLoss(temperature=temperature)(student(x), y, teacher_logits=logits),
        softlabels.PrunedDistillationLoss(prune=0.5)(student(x), y, teacher_logits=logits),
        softlabels.InstanceDirichletMAPLoss()(student(x), y, teacher_logits=logits),
        softlabels.LabelSmoothingMAPLoss(beta=0.1)(student(x), y),
        softlabels.ConfidencePenaltyLoss()(student(x), y, sample_weight=torch.ones(8)),
        label_smoothing_map_loss(student(x), y, beta=0.1),
    ]
    metric = CalibrationError(n_bins=5)
    metric.update(logits, y)
    gap: Tensor = metric.compute() - calibration_error(logits, y, n_bins=5)
    assert reliability_curve(logits, y).error() >= 0
    assert beta_smoothing_targets(y, 3).shape == (8, 3)
    return torch.stack(losses).sum().item() + gap.item()
