"""The Mean Teacher: a model run with an exponential moving average of its weights."""

from __future__ import annotations

import copy
import types
import warnings
import weakref
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from softlabels import _checks
from softlabels.kernels import LinearLogits
from softlabels.teachers.averaged_weights import PLAIN, Parts, averaged, is_sharded, laid_out_as, local
from softlabels.teachers.steps import Steps
from softlabels.teachers.structures import check_model, copied_layers, find_logits, unwrap

AVERAGES, STATISTICS = "averages/", "statistics/"  # in a checkpoint
COUNTERS = ("num_updates", "num_passes")


class EMATeacher(nn.Module):
    r"""A model, run with an exponential moving average of the weights that are trained.

    At the t-th update (t = 1, 2, ...), with $d_t = \min(1 - w / (t + w), \mathtt{decay})$ and $w$ the ``warmup``,

    $$\theta' \leftarrow d_t\, \theta' + (1 - d_t)\, \theta.$$

    There is no copy of the model: for the teacher's pass its parameters take the values of their averages, and
    everything else is the model as it stands: adapters, hooks, frozen layers, ``model.forward = ...``. Afterwards the
    model is as it was. A hook that captures features therefore sees the teacher's pass as well, where grad is
    disabled: let it return at once if ``not torch.is_grad_enabled()``.

    Parameters of fewer than 32 bits are averaged in float32 (at a decay of 0.999 a bfloat16 average would never
    move) and rounded for the pass. Parameters that do not require grad have no average. Buffers that passes write
    to, such as running statistics, are the teacher's own. Until the first update the average is the model.

    Args:
        model: The model to follow; wrappers of torch.compile and of data parallelism are looked through. The teacher
            holds no strong reference to it, and has no parameters or buffers that an optimizer or another average
            would find.
        decay: The largest decay, in [0, 1).
        warmup: $w$, at least 1. Until ``decay`` is reached, the average is over about the last $1 / w$ of the run. 1 is
            Mean Teacher's schedule, an even mean over the whole run. With 10, a run of 500 steps and one of 5,000
            need no different ``decay``.
        mode: ``"train"``: the teacher's pass uses batch statistics and dropout where the model's does, as in Mean
            Teacher; called by hand after ``teacher.eval()``, it does not. ``"eval"``: it never does, and uses the
            model's running statistics.
        module: A module with the parameters of ``model`` that is run in its place, with the averages as its weights:
            in another precision, or sharded in another way. None: the model itself.

    Shape:
        As the model's: ``teacher(*args, **kwargs)`` returns what the model returns, without a graph. Randomness in
        the pass, such as dropout, leaves the generators of torch as they were.

    Raises:
        TypeError: ``model`` or ``module`` is no module, or of a kind whose weights cannot be exchanged.
        ValueError: ``decay``, ``warmup`` or ``mode`` is out of range, or the model has parameters that are not yet
            initialised.

    Example:
        >>> import torch
        >>> from softlabels import EMATeacher
        >>> model = torch.nn.Linear(4, 3)
        >>> teacher = EMATeacher(model, decay=0.99)
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_()
        >>> teacher.update()
        >>> teacher.num_updates, teacher(torch.ones(2, 4)).shape, list(teacher.averages)
        (1, torch.Size([2, 3]), ['weight', 'bias'])

    Reference:
        Tarvainen & Valpola, *Mean teachers are better role models*, NeurIPS 2017.
    """

    __setattr__ = object.__setattr__  # type: ignore[assignment]  # nothing in it is a parameter, buffer or submodule

    def __init__(
        self,
        model: nn.Module | None,
        decay: float = 0.999,
        *,
        warmup: float = 1.0,
        mode: str = "train",
        module: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _checks.check_number("decay", decay, low=0.0, high=1.0, high_open=True)
        _checks.check_number("warmup", warmup, low=1.0, high_open=True)
        _checks.check_choice("mode", mode, ("train", "eval"))
        if not isinstance(module, (nn.Module, types.NoneType)):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self.decay, self.warmup, self.mode = decay, warmup, mode
        self.module = module
        self._source: weakref.ref[nn.Module] | None = None
        self._steps: weakref.ref[Steps] | None = None
        self._num_updates = 0
        self._num_passes = 0  # the seed of each pass's own random stream
        self._averages: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] = {}
        self._fitted: tuple[object, object] = (None, None)  # averages that are where parameters like these are
        self._runs = False
        self.modes: set[int] | None = None  # the modules in training mode at the last training pass, by id
        if model is not None:
            self.follow(model)
        if module is not None and not self._averages.keys() <= Parts(module).parameters.keys():
            raise ValueError("module does not have the parameters of model by their names")

    @property
    def source(self) -> nn.Module | None:
        """The model that is followed, or None if it is gone."""
        return None if self._source is None else self._source()

    @property
    def num_updates(self) -> int:
        """How many times the model was averaged in: steps between two looks, such as training passes, are one."""
        self.look()
        return self._num_updates

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averages by parameter name, float32 where parameters have fewer bits. They are not copied.

        Until the first update they are the model's parameters, copied.
        """
        averages = self._averages
        if self.num_updates == 0 and self.source is not None:
            averages = _averages_of(Parts(self.source))
        return {name.replace("/", "."): average for name, average in averages.items()}

    def follow(self, model: nn.Module) -> None:
        """Follow ``model`` from now on, as a teacher that was copied or unpickled must be told.

        Args:
            model: A model with parameters of the names and shapes of those that have averages.

        Raises:
            TypeError: the model is no module, or of a kind whose weights cannot be exchanged.
            ValueError: a parameter is not yet initialised.
            RuntimeError: parameters that have averages are missing.
        """
        check_model(model)
        source = unwrap(model)
        found = Parts(source)
        for name, parameter in source.named_parameters():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"model has a parameter that is not initialised yet, {name!r}; run one forward pass before the "
                    "teacher is made"
                )
        for name, _ in source.named_buffers():  # of which the first version had copies
            self._averages.pop(name.replace(".", "/"), None)
        self._fit(found)
        self._source, self._steps = weakref.ref(source), None
        if not self._num_updates:
            self._begin(found)

    def follow_steps(self, optimizer: object) -> Steps:
        """Take steps of the model in for as long as what is returned is kept.

        Losses that share this teacher share one, so that it moves once per step.
        """
        steps = self._following
        if steps is not None and optimizer is not None:
            raise ValueError("optimizer cannot be given: this EMATeacher already follows the steps of its model")
        steps = steps or Steps(self._present(), optimizer)
        self._steps = weakref.ref(steps)
        return steps

    def look(self, *, passing: bool = False) -> bool:
        """Take in what has happened to the model: a step, or weights that were loaded. Whether there was a step.

        ``passing``: at a training pass. At the first one the average is the model, whatever was loaded or broadcast
        since it was attached.
        """
        source, steps = self.source, self._following
        if source is None or steps is None or self._runs:
            return False
        found = Parts(source)
        if steps.loaded():
            if self._num_updates:
                warnings.warn(
                    "weights were loaded into the attached model after its average was begun, which restarts from "
                    "them; to go on with it, load the state_dict of the criterion as well",
                    stacklevel=2,
                )
            self.restart()
        stepped = steps.taken(found, passing)
        if steps.by_hand and self._num_updates and self._is_lost(found):
            warnings.warn("the average of the weights is NaN, and they are not: it restarts from them", stacklevel=2)
            self.restart()
        elif stepped:
            self._average(found)
        if passing and self._num_updates == 0 and not (steps.begun and _alike(self._averages, found.trained())):
            check_model(source)
            self._begin(found)
        if passing:
            steps.begun = True
            self.modes = {id(module) for module in found.modules.values() if module.training}
        return stepped

    def restart(self) -> None:
        """Begin again from the model's present weights and statistics, with no updates made."""
        self._num_updates = self._num_passes = 0
        self._begin(Parts(self._present()))
        self._forget(restored=False)

    def update(self) -> None:
        """Average the model's present parameters in; call it after each optimizer step.

        A teacher that is attached to a loss takes optimizer steps in by itself; if there was one, this call does it.
        With ``attach(model, optimizer=False)`` there is none, and this call is the step.

        Raises:
            RuntimeError: the model is gone, or has no longer the parameters that are averaged.
        """
        if not self.look():
            self._average(Parts(self._present()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged model without a graph and without touching torch's random generators."""
        self.look()
        run = torch._dynamo.disable(self.run) if torch.compiler.is_compiling() else self.run  # type: ignore[no-untyped-call]
        with torch.inference_mode(False), torch.no_grad():
            return run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: set[int] | None = None) -> Any:
        """Run the averaged model, with these modules in training mode; None: as they are, or as ``eval()`` says.

        Grad must be disabled.
        """
        model = self._present()
        found = Parts(model)
        self._fit(found)
        averages = self._averages if self._num_updates else {}
        if self.module is not None:
            model, found, training = self.module, Parts(self.module), None
            averages = {name: laid_out_as(average, found.parameters[name]) for name, average in self._averages.items()}
        if self.mode == "eval" or (training is None and not self.training):
            training = set()
        statistics = {} if self.mode == "eval" else self._statistics
        self._num_passes += 1
        self._runs = True  # and what the model calls of itself with grad is no training pass
        try:
            with averaged(found, averages, statistics, training, self._num_passes - 1):
                result = model(*args, **kwargs)
                sharded = any(is_sharded(parameter) for parameter in found.parameters.values())
                result = copied_layers(result) if sharded else result
        finally:
            self._runs = False
        if sharded and hasattr(type(model), "unshard") and isinstance(find_logits(result, None), LinearLogits):
            model.unshard()  # type: ignore[operator]  # the loss still needs the layer of the model's own pass
        return result

    def averaged_model(self) -> nn.Module:
        """A copy of the model that has the averages as its weights, in eval mode: for evaluation and export.

        Returns:
            A module of the model's class, with nothing of this package in it.

        Raises:
            RuntimeError: ``forward`` of the model was replaced by a function, which may refer to the model.
            AssertionError: the model is sharded, and FSDP2 lets nobody copy it; see ``averages`` for the weights.
        """
        self.look()
        model, memo = self._present(), {}
        for module in model.modules():
            if not isinstance(vars(module).get("forward", module.forward), types.MethodType):
                raise RuntimeError(
                    f"forward of {type(module).__name__} was replaced by a function, whose copy would run the model "
                    "itself; call the teacher after teacher.eval() instead"
                )
            results = [value for value in vars(module).values() if isinstance(value, Tensor)]  # have graphs: no copies
            memo.update({id(value): value.detach().clone() for value in results})
        averages = self._averages if self._num_updates else {}
        with torch.no_grad(), averaged(Parts(model), averages, self._statistics, set(), 0):
            return copy.deepcopy(model, memo)

    def extra_repr(self) -> str:
        """Show the options."""
        name = "no model" if self.source is None else type(self.source).__name__
        warmup = "" if self.warmup == 1.0 else f", warmup={self.warmup:g}"
        return f"{name}, decay={self.decay}{warmup}, mode={self.mode!r}, num_updates={self.num_updates}"

    def _present(self) -> nn.Module:
        source = self.source
        if source is None:
            raise RuntimeError(
                "the model that this EMATeacher follows is gone (deleted, or the teacher was copied or unpickled: "
                "then call follow(model))"
            )
        return source

    @property
    def _following(self) -> Steps | None:
        return None if self._steps is None else self._steps()

    def _forget(self, *, restored: bool) -> None:
        """Drop steps that were not taken in yet: the state is another from now on."""
        if self._following is not None:
            self._following.forget(restored=restored)

    def _begin(self, found: Parts) -> None:
        """Let averages and, before the first pass, running statistics be the model's."""
        self._averages = _averages_of(found)
        if self._num_passes == 0:
            self._statistics = {key: tensor.detach().clone() for key, tensor in found.statistics().items()}

    def _fit(self, found: Parts) -> None:
        """Bring each average to where its parameter is, and raise if the model has no parameter like it."""
        layout = [(name, p.shape, p.dtype, p.device, type(p)) for name, p in found.parameters.items()]
        if self._fitted[0] is self._averages and self._fitted[1] == layout:
            return
        for name, average in self._averages.items():
            parameter = found.parameters.get(name)
            if parameter is None or parameter.shape != average.shape:
                now = "is gone" if parameter is None else f"has shape {tuple(parameter.shape)} now"
                raise RuntimeError(
                    f"the model has changed since its average was begun: its parameter {name.replace('/', '.')!r} of "
                    f"shape {tuple(average.shape)} {now}; call criterion.detach() and criterion.attach(model), or "
                    "restart() of an EMATeacher on its own, to begin a new one"
                )
            precise = torch.promote_types(parameter.dtype, torch.float32)
            self._averages[name] = laid_out_as(average.to(precise), parameter)
        self._fitted = self._averages, layout

    def _is_lost(self, found: Parts) -> bool:
        """Whether averages have become NaN or infinite, and the weights not, as somebody has put them back."""
        weights = [parameter for name, parameter in found.parameters.items() if name in self._averages]
        return all(type(p) in PLAIN and bool(p.sum().isfinite()) for p in weights) and not all(
            bool(average.sum().isfinite()) for average in self._averages.values()
        )

    @torch.no_grad()
    def _average(self, found: Parts) -> None:
        self._fit(found)
        self._averages.update(_averages_of(found, but=self._averages))
        self._num_updates += 1
        decay = min(1.0 - self.warmup / (self._num_updates + self.warmup), self.decay)
        averages = [local(average) for average in self._averages.values()]
        if averages:
            torch._foreach_mul_(averages, decay)
            torch._foreach_add_(averages, [local(found.parameters[key]) for key in self._averages], alpha=1.0 - decay)

    def _entries(self) -> dict[str, Tensor]:
        """What a checkpoint holds: tensors alone."""
        counters = {name: torch.tensor(getattr(self, f"_{name}")) for name in COUNTERS}
        averages = {AVERAGES + name: average for name, average in self._averages.items()}
        return {**averages, **{STATISTICS + name: tensor for name, tensor in self._statistics.items()}, **counters}

    def __getattr__(self, name: str) -> Any:
        entries = self._entries() if "/" in name or name in COUNTERS else {}
        return entries[name] if name in entries else super().__getattr__(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.look()
        destination.update({prefix + key: value for key, value in self._entries().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        state = _from_copies(state) if "_extra_state" in state else state
        own, source, new = self._entries(), self.source, state  # without a model, whatever is there
        if source is not None:
            found = Parts(source)
            new = {AVERAGES + name: _precise(p) for name, p in found.parameters.items() if AVERAGES + name in state}
            new.update({STATISTICS + name: tensor for name, tensor in found.statistics().items()})
            for name, _ in source.named_buffers():  # of which the first version had copies
                state.pop(AVERAGES + name.replace(".", "/"), None)
        own.update({key: tensor.clone() for key, tensor in new.items() if key in state and key not in own})
        self._buffers: dict[str, Tensor | None] = {**own}
        state = {prefix + key: laid_out_as(value, own.get(key, value)) for key, value in state.items()}
        super()._load_from_state_dict(state, prefix, {}, *args[1:])
        self._buffers = {}
        self._num_updates, self._num_passes = (int(own[name]) for name in COUNTERS)
        self._averages, self._statistics = (
            {key.removeprefix(kind): tensor for key, tensor in own.items() if key.startswith(kind)}
            for kind in (AVERAGES, STATISTICS)
        )
        self._forget(restored=True)

    def __getstate__(self) -> dict[str, Any]:
        """A copy follows no model until it is told to."""
        self.look()
        return {**self.__dict__, "_source": None, "_steps": None}


def _alike(tensors: dict[str, Tensor], others: dict[str, nn.Parameter]) -> bool:
    return {key: t.shape for key, t in tensors.items()} == {key: t.shape for key, t in others.items()}


def _precise(parameter: Tensor) -> Tensor:
    """A copy in at least float32."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)


def _averages_of(found: Parts, but: Container[str] = ()) -> dict[str, Tensor]:
    return {key: _precise(parameter) for key, parameter in found.trained().items() if key not in but}


def _from_copies(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the first teachers, which were copies of the model, as one of today."""
    counts = state["_extra_state"]
    new = {"num_updates": torch.tensor(counts["num_updates"]), "num_passes": torch.tensor(counts["streams"])}
    for key, value in state.items():
        kind, _, name = key.partition(".")
        if kind == "module":
            own = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
            average = state.get("average_" + name.replace(".", "__"), value)
            new[(STATISTICS if own else AVERAGES) + name.replace(".", "/")] = average
    return new
