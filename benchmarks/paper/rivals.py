"""Soft labels of other papers, after their text, to compare with. Each forgets nothing and draws no random number.

Their labels change from epoch to epoch: who trains calls ``begin_epoch(epoch, epochs)`` before each, ``epoch`` from 0.
Where ``num_samples`` is set, the loss takes ``index=``, which samples of the training set the rows are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class OnlineLabelSmoothing(nn.Module):
    r"""Online label smoothing (Zhang et al., *Delving deep into label smoothing*, TIP 2021).

    $\alpha\,\mathrm{CE}(p, y) + (1 - \alpha)\,\mathrm{CE}(p, S_y)$, where row $c$ of $S$ is the mean prediction of the
    last epoch on the rows of class $c$ that were predicted rightly; uniform in the first epoch, and where there were
    none.
    """

    def __init__(self, alpha: float, num_classes: int) -> None:
        super().__init__()
        self.alpha, self.num_classes, self.num_samples = alpha, num_classes, None
        self.register_buffer("soft", torch.full((num_classes, num_classes), 1.0 / num_classes))
        self.register_buffer("found", torch.zeros(num_classes, num_classes))

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Use what the last epoch found."""
        if epoch == 0:
            return
        total = self.found.sum(1, keepdim=True)
        self.soft = torch.where(total > 0, self.found / total.clamp(min=1e-12), 1.0 / self.num_classes)
        self.found = torch.zeros_like(self.found)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean over the batch."""
        with torch.no_grad():
            right = logits.argmax(1) == target
            self.found.index_add_(0, target[right], logits[right].softmax(1))
        soft = functional.cross_entropy(logits, self.soft[target])
        return self.alpha * functional.cross_entropy(logits, target) + (1.0 - self.alpha) * soft


class ProgressiveSelfKnowledgeDistillation(nn.Module):
    r"""Progressive self-knowledge distillation (Kim et al., ICCV 2021).

    Cross-entropy with $(1 - \alpha_t)\,\mathrm{onehot}(y) + \alpha_t\,P_{t-1}$, $P_{t-1}$ being the sample's prediction
    of the last epoch; $\alpha_t$ rises in a line to ``alpha`` in the last one.
    """

    def __init__(self, alpha: float, num_samples: int, num_classes: int) -> None:
        super().__init__()
        self.alpha, self.num_samples, self.share = alpha, num_samples, 0.0
        self.register_buffer("last", torch.zeros(num_samples, num_classes))
        self.register_buffer("seen", torch.zeros(num_samples, dtype=torch.bool))

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Trust the last epoch a little more."""
        self.share = self.alpha * (epoch + 1) / epochs

    def forward(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        """Mean over the batch."""
        hard = functional.one_hot(target, logits.shape[1]).to(logits.dtype)
        share = torch.where(self.seen[index], self.share, 0.0).unsqueeze(1)
        soft = (1.0 - share) * hard + share * self.last[index]
        self.last[index] = logits.detach().softmax(1)
        self.seen[index] = True
        return functional.cross_entropy(logits, soft)


class EarlyLearningRegularization(nn.Module):
    r"""Early-learning regularisation (Liu et al., NeurIPS 2020), a specialist for wrong labels.

    $\mathrm{CE}(p, y) + \lambda\,\log(1 - \langle p, t\rangle)$, with $t$ the sample's average of normalised
    predictions, $t \leftarrow \beta t + (1 - \beta) p / \sum p$, and $p$ clamped to [1e-4, 1 - 1e-4] as in the authors'
    program.
    """

    def __init__(self, strength: float, num_samples: int, num_classes: int, beta: float = 0.7) -> None:
        super().__init__()
        self.strength, self.num_samples, self.beta = strength, num_samples, beta
        self.register_buffer("average", torch.zeros(num_samples, num_classes))

    def forward(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        """Mean over the batch."""
        p = logits.softmax(1).clamp(1e-4, 1.0 - 1e-4)
        own = p.detach()
        self.average[index] = self.beta * self.average[index] + (1.0 - self.beta) * own / own.sum(1, keepdim=True)
        agreement = (self.average[index] * p).sum(1)
        return functional.cross_entropy(logits, target) + self.strength * (1.0 - agreement).log().mean()
