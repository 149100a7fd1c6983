"""Beta smoothing (paper sec. 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from softlabels import _checks, tuning
from softlabels._reading import least_and_greatest
from softlabels.functional._rows import Rows
from softlabels.functional.beta_smoothing import Spreads, beta_smoothing, mean_smoothing
from softlabels.kernels import LinearLogits
from softlabels.losses.attachable import AttachableLoss
from softlabels.losses.base import called_as, runs_twice
from softlabels.priors import SPREADS, LearnedSpread
from softlabels.priors.evidence import Evidence
from softlabels.ranking import PredictionHistory, log_odds
from softlabels.ranking.scores import RANK_BY
from softlabels.teachers import EMATeacher

GENERATOR = "generator_state"
RANKINGS = ("ema", "history", "batch", "random", "none")


def _check_concentration(name: str, value: object) -> object:
    return None if value is None else _checks.check_positive(name, value, infinite=True)


def _check_num_samples(name: str, value: object) -> object:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(
            f"{name} must be the size of the training set, which ranking='history' and spread='samples' need, got "
            f"{value!r}"
        )
    return value


def _check_spread(name: str, value: object) -> object:
    kinds = value if isinstance(value, tuple) else (value,)
    known = all(kind in SPREADS for kind in kinds)
    if value != "uniform" and not (kinds and known and len(set(kinds)) == len(kinds)):
        raise ValueError(
            f"{name} must be 'uniform', or one or a tuple of {', '.join(map(repr, SPREADS))}, got {value!r}"
        )
    return value


def _check_generator(name: str, value: object) -> object:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator or None, got {value!r}")
    return value


class BetaSmoothingLoss(AttachableLoss):
    r"""Label smoothing whose amount is drawn anew for each sample, less for samples the model is sure of.

    In training, the $m$ rows of the batch get draws $b_1, \dots, b_m \sim \mathrm{Beta}(a, 1)$ in the order of their
    confidence, the largest to the surest, and the loss is the cross-entropy against

    $$t_{i,y_i} = \alpha + (1 - \alpha) b_i, \qquad t_{ic} = (1 - \alpha) \frac{1 - b_i}{K - 1} \quad (c \ne y_i).$$

    $a$ is set so that the soft labels average to those of
    ``nn.CrossEntropyLoss(label_smoothing=label_smoothing)``; in evaluation (``criterion.eval()``, or grad disabled)
    the loss is that one, without randomness.

    Args:
        weight: Class weights of shape (K,), any floating dtype.
        label_smoothing: Average smoothing in torch's convention, in [0, 1): the true class gets
            $1 - e + e / K$ on average, which must exceed ``alpha``. 0 is plain cross-entropy.
        alpha: Weight of the hard label, in [0, 1]: the least that the true class ever gets. 1 is plain
            cross-entropy, whatever ``label_smoothing`` says.
        concentration: $a$ itself, greater than 0; overrides ``label_smoothing``.
        ranking: Whose confidence orders the batch. ``"ema"``: an exponential moving average of the model (needs
            [`attach`][softlabels.BetaSmoothingLoss.attach]). ``"history"``: the mean over a sample's past visits of the
            probability of its label, whatever ``rank_by`` says, without a second forward pass (needs ``num_samples``
            and the call argument ``index``). ``"batch"``: the logits given to the loss. ``"random"``: nobody's; draws
            are assigned at random. ``"none"``: no row differs from another; all get the mean amount.
        spread: Where the amount goes. ``"uniform"``: evenly to all classes, as in the paper. ``"classes"``: as the mean
            prediction on the rows of the label's class says. ``"neighbours"``: as the labels of the batch's other rows
            say, weighted by how alike their logits are. ``"samples"``: as the mean of this sample's past predictions
            says (needs ``num_samples`` and the call argument ``index``; where a number per class would take more than
            512 MiB, the 16 largest of each sample are kept). A tuple: the mean of these. In evaluation the
            spread is even, so that the value depends on nothing but the row and compares with other losses.
        rank_by: ``"max"``: confidence is the largest class probability, as in the paper's text. ``"true_class"``: it is
            the probability of the label, as in the paper's published scripts.
        ema_decay: Decay of the average per optimizer step, in [0, 1), for ``"ema"``.
        num_samples: Size of the training set, for ``"history"`` and ``"samples"``.
        global_ranking: Rank and draw over the rows of all processes of the default torch.distributed group together,
            with the draws of process 0. What is remembered of classes and samples, and the neighbours, are then those
            of all processes, so that any of them may save it. Every process must call the loss equally often; the
            processes wait for each other. False: each process ranks and remembers its own rows.
        generator: Source of the random numbers, on the device of the logits; None uses torch's default.
        ignore_index: Rows with this label count for nothing; they are neither ranked nor drawn for.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - input: (K), (N, K) or (N, K, d1, ...), any floating dtype. Half-precision logits are worked on in float32.
        - target: (), (N) or (N, d1, ...) int64 or uint8 class indices, or class probabilities of the shape of input.
        - sample_weight: row shape, that of an index target; non-negative.
        - confidence: row shape; higher is surer. Replaces whatever ``ranking`` says.
        - index: row shape, int64 in [0, num_samples): which training sample each row is (``"history"`` and
          ``"samples"``). Rows of one id are visits of one sample.
        - output: a scalar, or row shape with ``reduction="none"``; float64 for float64 logits, else float32.

    Raises:
        ValueError: an option is out of range or contradicts another.
        RuntimeError: in training, the ranking that was asked for has nothing to rank by.

    Example:
        >>> import torch, softlabels
        >>> model = torch.nn.Linear(4, 3)
        >>> criterion = softlabels.BetaSmoothingLoss().attach(model)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for _ in range(2):
        ...     loss = criterion(model(torch.randn(8, 4)), torch.randint(3, (8,)))
        ...     loss.backward()
        ...     optimizer.step()
        >>> criterion.teacher.num_updates
        2

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, NeurIPS 2020, sec. 6.
    """

    options = {  # noqa: RUF012
        "label_smoothing": lambda name, value: _checks.check_number(name, value, low=0.0, high=1.0, high_open=True),
        "alpha": _checks.check_fraction,
        "concentration": _check_concentration,
        "ranking": lambda name, value: _checks.check_choice(name, value, RANKINGS),
        "spread": _check_spread,
        "rank_by": lambda name, value: _checks.check_choice(name, value, RANK_BY),
        "ema_decay": lambda name, value: _checks.check_number(name, value, low=0.0, high=1.0, high_open=True),
        "num_samples": _check_num_samples,
        "global_ranking": _checks.check_flag,
        "generator": _check_generator,
    }

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        label_smoothing: float = 0.15,
        alpha: float = 0.4,
        concentration: float | None = None,
        ranking: str = "ema",
        spread: str | tuple[str, ...] = "uniform",
        rank_by: str = "max",
        ema_decay: float = 0.999,
        num_samples: int | None = None,
        global_ranking: bool = False,
        generator: torch.Generator | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction)
        self.label_smoothing = label_smoothing
        self.alpha = alpha
        self.concentration = concentration
        self.ranking = ranking
        self.spread = spread
        self.rank_by = rank_by
        self.ema_decay = ema_decay
        self.num_samples = num_samples
        self.global_ranking = global_ranking
        self.generator = generator
        if concentration is None and self.alpha < 1.0 and tuning.true_class_for(label_smoothing, 2) <= self.alpha:
            raise ValueError(
                f"label_smoothing={label_smoothing} asks for a true class below alpha={alpha}, the weight that it "
                "always has; lower one of them"
            )
        kinds = () if spread == "uniform" else spread if isinstance(spread, tuple) else (spread,)
        if num_samples is None and (ranking == "history" or "samples" in kinds):
            raise ValueError(
                "num_samples must be the size of the training set, which ranking='history' and spread='samples' need, "
                "got None"
            )
        if ranking == "history":
            assert num_samples is not None
            self.history = PredictionHistory(num_samples)
        if kinds:
            self.learned_spread = LearnedSpread(kinds, num_samples)

    def forward(
        self,
        input: Tensor | LinearLogits,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        confidence: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss, called as ``criterion(input, target, ...)``; see the class for the arguments."""
        rows = self.rows(input, target, sample_weight)
        concentration = self.concentration_for(rows.num_classes)
        if concentration == float("inf"):
            return rows.loss(rows.label(1.0), total=1.0)
        if not self.in_training:
            return mean_smoothing(rows, self.alpha, concentration)
        ranks_by_history = confidence is None and self.ranking == "history"
        remembers = ranks_by_history or self.spread not in ("uniform", "neighbours")
        if (remembers or self.generator is not None) and runs_twice():
            raise RuntimeError(
                "BetaSmoothingLoss is called inside torch.utils.checkpoint, which calls it again in the backward pass: "
                "a generator would draw anew then, and what it remembers of samples and classes would be recorded "
                "twice; call the loss outside of the checkpointed function"
            )
        if index is not None:
            index = self._sample_ids(rows, index)
        elif ranks_by_history or "samples" in self.spread:
            raise RuntimeError(
                "BetaSmoothingLoss with ranking='history' or spread='samples' needs the ids of the samples in the "
                "batch: pass index= to the call"
            )
        if self.spread != "uniform" and isinstance(input, LinearLogits):
            raise ValueError(
                f"spread={self.spread!r} keeps or compares predictions of all classes, which LinearLogits are there to "
                "avoid; use spread='uniform'"
            )
        known, mean = None, False
        predicted: Any = rows.logits.detach()
        if confidence is not None:
            confidence = rows.row_argument("confidence", confidence)
        elif self.ranking == "ema":
            predicted = rows.teacher_argument(self.ask_teacher(input, "confidence"), check=self.is_first_answer)
            confidence = log_odds(predicted, rows.target, self.rank_by, counted=rows.counted)
        elif self.ranking == "none":
            mean = True
        elif self.ranking != "random":
            known = rows.statistics()
            rank_by = "true_class" if self.ranking == "history" else self.rank_by
            confidence = log_odds(predicted, rows.target, rank_by, known, rows.counted)
            if ranks_by_history:
                confidence = self._past(rows, index, confidence)
        spreads: Spreads = ()
        if self.spread != "uniform":
            batch = Evidence.of(rows, predicted, index)
            recorded, own = batch.of_all_processes() if self.global_ranking else (batch, slice(0, len(batch.counted)))
            spreads = self.learned_spread.sources(rows, batch, recorded, own, index)
        if mean:
            loss = mean_smoothing(rows, self.alpha, concentration, spreads)
        else:
            loss = beta_smoothing(
                rows,
                confidence,
                self.alpha,
                concentration,
                self.generator,
                spreads,
                joint=self.global_ranking,
                known=known,
            )
        if spreads:
            self.learned_spread.record(recorded)
        return loss

    __call__ = called_as(forward)

    def concentration_for(self, num_classes: int) -> float:
        """The parameter $a$ of Beta(a, 1) for this number of classes; infinity where nothing is smoothed.

        Args:
            num_classes: $K$, at least 1.

        Raises:
            ValueError: with this many classes, ``label_smoothing`` leaves the true class no more than ``alpha``.
        """
        if self.alpha == 1.0 or num_classes <= 1:
            return float("inf")
        if self.concentration is not None:
            return self.concentration
        true_class = tuning.true_class_for(self.label_smoothing, num_classes)
        if true_class <= self.alpha:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} with {num_classes} classes asks for a true class of "
                f"{true_class:.4g} on average, but it always has at least alpha={self.alpha}; lower one of them"
            )
        return tuning.beta_concentration(true_class, self.alpha)

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher's confidence ranks the batch: where nothing is smoothed, there is nothing to rank."""
        return self.ranking == "ema" and self.concentration_for(2) != float("inf")

    def make_teacher(self, model: nn.Module | None) -> EMATeacher:
        """Make an EMA of the model with this loss's decay."""
        return EMATeacher(model, self.ema_decay)

    @property
    def class_profiles(self) -> Tensor | None:
        """The mean prediction on the rows of each class (K, K), float32; None without a spread that needs it.

        Empty until the first training batch tells the number of classes.
        """
        return getattr(getattr(self, "learned_spread", None), "class_profiles", None)

    @property
    def generator_state(self) -> Tensor | None:
        """What a checkpoint holds of ``generator``; torch.distributed.checkpoint looks entries up as attributes."""
        return None if self.generator is None else self.generator.get_state()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.generator is not None:
            destination[prefix + GENERATOR] = self.generator_state
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.generator is not None:
            state = state_dict.pop(prefix + GENERATOR, None)
            if state is None:
                self._warn_missing("generator state", "its generator goes on from where it is")
            else:
                self.generator.set_state(state.cpu())
        if self.ranking == "history" and not self.history.is_in(state_dict, prefix + "history."):
            self._warn_missing("prediction history", "it restarts empty")
        if self.spread != "uniform" and not self.learned_spread.is_in(state_dict, prefix + "learned_spread."):
            self._warn_missing("learned spread", "it restarts empty")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _past(self, rows: Rows, index: Tensor | None, confidence: Tensor) -> Tensor:
        """The log-odds of each sample's past confidence; the present one is averaged in."""
        if index is None or not hasattr(self, "history"):
            raise RuntimeError("ranking='history' must be chosen, with num_samples, when the loss is made")
        counted = rows.counted
        counted = torch.ones_like(index, dtype=torch.bool) if counted is None else counted
        return self.history.rank_and_update(index, confidence, counted, joint=self.global_ranking)

    def _sample_ids(self, rows: Rows, index: Tensor) -> Tensor:
        index = rows.row_argument("index", index)
        if index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"index must hold sample ids as torch.int64, got {index.dtype}")
        ends = least_and_greatest(index)
        if self.num_samples is not None and ends is not None and (ends[0] < 0 or ends[1] >= self.num_samples):
            raise IndexError(f"index must hold sample ids in [0, {self.num_samples}), got {ends[0]} to {ends[1]}")
        return index
