"""Losses that learn from a teacher's logits (paper Eq. 3, Eq. 6-9, App. 9.7)."""

from __future__ import annotations

from torch import Tensor

from softlabels import _checks
from softlabels.functional.dirichlet_map import check_sample_weighting, dirichlet_map
from softlabels.functional.distillation import check_prune, self_distillation
from softlabels.kernels import LinearLogits, TopKLogits
from softlabels.losses.attachable import AttachableLoss
from softlabels.losses.base import called_as


class _TeacherLoss(AttachableLoss):
    """A loss of (input, target, teacher_logits) that is plain cross-entropy when it is not training."""

    def _teacher_logits(
        self, input: Tensor | LinearLogits, teacher_logits: Tensor | LinearLogits | TopKLogits | None
    ) -> Tensor | LinearLogits | TopKLogits | None:
        """The given teacher logits, or those of the attached teacher; None where cross-entropy is meant."""
        if not self.in_training:
            return teacher_logits
        if teacher_logits is not None or not self.needs_teacher:
            return teacher_logits
        return self.ask_teacher(input, "teacher_logits")


class SelfDistillationLoss(_TeacherLoss):
    r"""Cross-entropy against a mixture of the label and a teacher's prediction.

    $$\ell_i = -\alpha \log p_{i,y_i} - (1 - \alpha) \sum_c q_{ic} \log p_{ic}, \qquad
      q = \mathrm{softmax}(\mathtt{teacher\_logits} / T).$$

    Without teacher logits it is plain cross-entropy in evaluation (``criterion.eval()``, or grad disabled); in
    training it asks the attached teacher, and raises if there is none.

    Args:
        weight: Class weights of shape (K,), any floating dtype.
        alpha: Weight of the hard label, in [0, 1]; 1 is plain cross-entropy.
        temperature: $T > 0$ divides the teacher's logits.
        scale_student: Also divide the student's logits by $T$ in the second sum and multiply that sum by $T^2$
            (Hinton et al., 2015). App. 9.2 finds that this calibrates worse.
        ignore_index: Rows with this label count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - input: (K), (N, K) or (N, K, d1, ...), any floating dtype. Half-precision logits are worked on in float32.
        - target: (), (N) or (N, d1, ...) int64 or uint8 class indices, or class probabilities of the shape of input.
        - sample_weight: row shape, that of an index target; non-negative.
        - teacher_logits: the shape of input. Replaces what an attached teacher would say.
        - output: a scalar, or row shape with ``reduction="none"``; float64 for float64 logits, else float32.

    Raises:
        ValueError: an option is out of range.
        RuntimeError: in training, there are neither teacher logits nor a teacher.

    Example:
        >>> import torch, softlabels
        >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> criterion = softlabels.SelfDistillationLoss(temperature=2.0).attach(student, teacher=teacher)
        >>> loss = criterion(student(torch.randn(8, 4)), torch.randint(3, (8,)))
        >>> criterion
        SelfDistillationLoss(alpha=0.6, temperature=2.0)

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, NeurIPS 2020, Eq. 3 and App. 9.2.
    """

    options = {  # noqa: RUF012
        "alpha": _checks.check_fraction,
        "temperature": _checks.check_positive,
        "scale_student": _checks.check_flag,
    }

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        alpha: float = 0.6,
        temperature: float = 4.0,
        scale_student: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction)
        self.alpha = alpha
        self.temperature = temperature
        self.scale_student = scale_student

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher has any weight in the loss."""
        return self.alpha < 1.0

    def forward(
        self,
        input: Tensor | LinearLogits,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        teacher_logits: Tensor | LinearLogits | TopKLogits | None = None,
    ) -> Tensor:
        """Compute the loss, called as ``criterion(input, target, ...)``; see the class for the arguments."""
        teacher_logits = self._teacher_logits(input, teacher_logits)
        rows = self.rows(input, target, sample_weight)
        if teacher_logits is None:
            return rows.loss(rows.label(1.0), total=1.0)
        return self_distillation(rows, teacher_logits, self.alpha, self.temperature, self.scale_student)

    __call__ = called_as(forward)


class PrunedDistillationLoss(_TeacherLoss):
    r"""Self-distillation from the teacher's surest classes alone.

    As [`SelfDistillationLoss`][softlabels.SelfDistillationLoss], with the teacher's softmax taken over the $K -
    \lfloor \mathtt{prune} \cdot K \rfloor$ classes of largest logit in each row (the lower class index where logits
    are equal); all others get probability 0. The true class may be pruned; the hard-label term covers it all the
    same.

    Args:
        weight: Class weights of shape (K,), any floating dtype.
        prune: Fraction of the classes to prune, in [0, 1). At least one class stays.
        alpha: Weight of the hard label, in [0, 1]; 1 is plain cross-entropy.
        temperature: $T > 0$ divides the teacher's logits.
        ignore_index: Rows with this label count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - input: (K), (N, K) or (N, K, d1, ...), any floating dtype. Half-precision logits are worked on in float32.
        - target: (), (N) or (N, d1, ...) int64 or uint8 class indices, or class probabilities of the shape of input.
        - sample_weight: row shape, that of an index target; non-negative.
        - teacher_logits: the shape of input. Replaces what an attached teacher would say.
        - output: a scalar, or row shape with ``reduction="none"``; float64 for float64 logits, else float32.

    Raises:
        ValueError: an option is out of range.
        RuntimeError: in training, there are neither teacher logits nor a teacher.

    Example:
        >>> import torch, softlabels
        >>> criterion = softlabels.PrunedDistillationLoss(prune=0.5)
        >>> loss = criterion(torch.randn(8, 4), torch.randint(4, (8,)), teacher_logits=torch.randn(8, 4))

    Reference:
        Zhang & Sabuncu (2020), App. 9.7.
    """

    options = {  # noqa: RUF012
        "prune": check_prune,
        "alpha": _checks.check_fraction,
        "temperature": _checks.check_positive,
    }

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        prune: float = 0.5,
        alpha: float = 0.6,
        temperature: float = 4.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction)
        self.prune = prune
        self.alpha = alpha
        self.temperature = temperature

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher has any weight in the loss."""
        return self.alpha < 1.0

    def forward(
        self,
        input: Tensor | LinearLogits,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        teacher_logits: Tensor | LinearLogits | TopKLogits | None = None,
    ) -> Tensor:
        """Compute the loss, called as ``criterion(input, target, ...)``; see the class for the arguments."""
        teacher_logits = self._teacher_logits(input, teacher_logits)
        rows = self.rows(input, target, sample_weight)
        if teacher_logits is None:
            return rows.loss(rows.label(1.0), total=1.0)
        return self_distillation(rows, teacher_logits, self.alpha, self.temperature, prune=self.prune)

    __call__ = called_as(forward)


class InstanceDirichletMAPLoss(_TeacherLoss):
    r"""Negative log-posterior of the prediction under a Dirichlet prior set by a teacher.

    With label counts $c$ (one-hot for class indices), $q = \mathrm{softmax}(f / T)$ for teacher logits $f$ and a
    weight $s_i$ per row,

    $$\ell_i = -\sum_j \big( c_{ij} + [\beta s_i q_{ij} + \gamma - 1]_+ \big) \log p_{ij}.$$

    Without teacher logits it is plain cross-entropy in evaluation (``criterion.eval()``, or grad disabled); in
    training it asks the attached teacher, and raises if there is none.

    Args:
        weight: Class weights of shape (K,), any floating dtype.
        beta: Strength of the prior, at least 0. The default is that of Eq. 3 with alpha = 0.6.
        temperature: $T > 0$ divides the teacher's logits.
        gamma: The constant of Eq. 8, at least 0. Below 1 it prunes classes, above 1 it adds uniform mass.
        sample_weighting: $s_i$. ``"exact"``: $\sum_j \exp(f_{ij} / T)$, Eq. 9 to the letter, which a constant added to
            a row's teacher logits changes. ``"normalized"``: the same of row-centred logits, with mean 1 over the kept
            rows; no added constant changes it. ``"none"``: 1. See
            [`dirichlet_map_loss`][softlabels.functional.dirichlet_map_loss].
        ignore_index: Rows with this label count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - input: (K), (N, K) or (N, K, d1, ...), any floating dtype. Half-precision logits are worked on in float32.
        - target: (), (N) or (N, d1, ...) int64 or uint8 class indices; or label counts of the shape of input: several
          labels per sample, class probabilities, or zeros for an unlabelled sample.
        - sample_weight: row shape, that of an index target; non-negative.
        - teacher_logits: the shape of input. Replaces what an attached teacher would say.
        - output: a scalar, or row shape with ``reduction="none"``; float64 for float64 logits, else float32.

    Raises:
        ValueError: an option is out of range, or ``"exact"`` overflows.
        RuntimeError: in training, there are neither teacher logits nor a teacher.

    Example:
        >>> import torch, softlabels
        >>> criterion = softlabels.InstanceDirichletMAPLoss(beta=0.5, temperature=2.0)
        >>> counts = torch.tensor([[3, 1, 0], [0, 0, 0]])  # four labels for one sample, none for the other
        >>> loss = criterion(torch.randn(2, 3), counts, teacher_logits=torch.randn(2, 3))

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, NeurIPS 2020, Eq. 6-9 and App. 9.7.
    """

    options = {  # noqa: RUF012
        "beta": _checks.check_non_negative,
        "temperature": _checks.check_positive,
        "gamma": _checks.check_non_negative,
        "sample_weighting": check_sample_weighting,
    }

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        beta: float = 2 / 3,
        temperature: float = 4.0,
        gamma: float = 1.0,
        sample_weighting: str = "normalized",
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction)
        self.beta = beta
        self.temperature = temperature
        self.gamma = gamma
        self.sample_weighting = sample_weighting

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher has any weight in the loss."""
        return self.beta > 0.0 or self.gamma > 1.0

    def forward(
        self,
        input: Tensor | LinearLogits,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        teacher_logits: Tensor | LinearLogits | TopKLogits | None = None,
    ) -> Tensor:
        """Compute the loss, called as ``criterion(input, target, ...)``; see the class for the arguments."""
        teacher_logits = self._teacher_logits(input, teacher_logits)
        rows = self.rows(input, target, sample_weight, counts=True)
        if teacher_logits is None:
            return rows.loss(rows.label(1.0), total=1.0)
        return dirichlet_map(rows, teacher_logits, self.beta, self.temperature, self.gamma, self.sample_weighting)

    __call__ = called_as(forward)
