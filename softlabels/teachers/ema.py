"""The Mean Teacher: a model run with an exponential moving average of its weights."""

from __future__ import annotations

import copy
import types
import warnings
import weakref
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from softlabels import _checks
from softlabels.teachers.averaged_weights import (
    Parts,
    averaged,
    is_sharded,
    laid_out_as,
    local,
    own_randomness,
    parts,
)
from softlabels.teachers.steps import Steps
from softlabels.teachers.structures import check_model, copied_layers, unwrap

KINDS, COUNTERS = ("averages", "statistics"), ("num_updates", "num_passes")


class EMATeacher(nn.Module):
    r"""A model, run with an exponential moving average of the weights that are trained.

    At the t-th update (t = 1, 2, ...), with $d_t = \min(1 - 1 / (t + 1), \mathtt{decay})$,

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
        ValueError: ``decay`` or ``mode`` is out of range, or the model has parameters that are not yet initialised.

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

    def __init__(
        self, model: nn.Module | None, decay: float = 0.999, *, mode: str = "train", module: nn.Module | None = None
    ) -> None:
        super().__init__()
        _checks.check_number("decay", decay, low=0.0, high=1.0, high_open=True)
        _checks.check_choice("mode", mode, ("train", "eval"))
        if not isinstance(module, (nn.Module, types.NoneType)):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self.decay, self.mode = decay, mode
        self.__dict__["module"] = module  # not a submodule: neither saved nor moved nor trained with the teacher
        self._source: weakref.ref[nn.Module] | None = None
        self._steps: weakref.ref[Steps] | None = None
        self._num_updates = 0
        self._num_passes = 0  # the seed of each pass's own random stream
        self._averages: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] = {}
        self._begun = False  # whether there was a training pass
        if model is not None:
            self.follow(model)
        if module is not None and not self._averages.keys() <= parts(module).parameters.keys():
            raise ValueError("module does not have the parameters of model by their names")

    @property
    def source(self) -> nn.Module | None:
        """The model that is followed, or None if it is gone."""
        return None if self._source is None else self._source()

    @property
    def num_updates(self) -> int:
        """How many times the model was averaged in: steps between two looks, such as training passes, are one."""
        self.take_in()
        return self._num_updates

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._num_updates = value

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averages by parameter name, float32 where parameters have fewer bits. They are not copied.

        Until the first update they are the model's parameters, copied.
        """
        if self.num_updates == 0 and self.source is not None:
            return _averages_of(parts(self.source))
        return dict(self._averages)

    def follow(self, model: nn.Module) -> None:
        """Follow ``model`` from now on, as a teacher that was copied or unpickled must be told.

        Args:
            model: A model with parameters of the names and shapes of those that have averages.

        Raises:
            TypeError: the model is no module, or of a kind whose weights cannot be exchanged.
            ValueError: the parameters differ, or are not yet initialised.
        """
        check_model(model)
        source = unwrap(model)
        found = parts(source)
        for name, parameter in found.parameters.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"model has a parameter that is not initialised yet, {name!r}; run one forward pass before the "
                    "teacher is made"
                )
        if not _fits(self._averages, found.parameters):
            raise ValueError("model does not have the parameters of the model that this EMATeacher was made from")
        self._source, self._steps = weakref.ref(source), None
        if not self._num_updates:
            self._begin(found)

    def follow_steps(self, optimizer: object) -> Steps:
        """Take steps of the model in for as long as what is returned is kept.

        Losses that share this teacher share one, so that it moves once per step.
        """
        steps = self._running_steps()
        if steps is not None and optimizer is not None:
            raise ValueError("optimizer cannot be given: this EMATeacher already follows the steps of its model")
        steps = steps or Steps(self._present(), optimizer)
        self._steps = weakref.ref(steps)
        return steps

    def begin_pass(self) -> frozenset[int] | None:
        """Take in what was noted, at a training pass of the model. Which modules are in training mode, by id.

        At the first one the average is the model, whatever was loaded or broadcast since it was attached.
        """
        source, steps = self.source, self._running_steps()
        if source is None or steps is None:
            return None
        found = parts(source)
        self._take_in(steps, found, passing=True)
        if self._num_updates == 0:
            trained = found.trained()
            if not (self._begun and self._averages.keys() == trained.keys() and _fits(self._averages, trained)):
                check_model(source)
                self._begin(found)
        self._begun = True
        return frozenset(id(module) for module in found.modules.values() if module.training)

    def take_in(self) -> bool:
        """Take in what was noted: a step, or weights that were loaded. Whether there was a step."""
        source, steps = self.source, self._running_steps()
        return source is not None and steps is not None and self._take_in(steps, parts(source), passing=False)

    def _take_in(self, steps: Steps, found: Parts, *, passing: bool) -> bool:
        if steps.loaded():
            if self._num_updates:
                warnings.warn(
                    "weights were loaded into the attached model after its average was begun, which restarts from "
                    "them; to go on with it, load the state_dict of the criterion as well",
                    stacklevel=2,
                )
            self.restart()
        stepped = steps.taken(found.parameters, passing)
        if stepped:
            self._average(found)
        return stepped

    def restart(self) -> None:
        """Begin again from the model's present weights and statistics, with no updates made."""
        self._num_updates = self._num_passes = 0
        self._begin(parts(self._present()))
        self._forget_steps()

    def update(self) -> None:
        """Average the model's present parameters in; call it after each optimizer step.

        A teacher that is attached to a loss takes optimizer steps in by itself; if there was one, this call does it.
        With ``attach(model, optimizer=False)`` there is none, and this call is the step.

        Raises:
            RuntimeError: the model is gone, or has no longer the parameters that are averaged.
        """
        if not self.take_in():
            self._average(parts(self._present()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged model without a graph and without touching torch's random generators."""
        self.take_in()
        if torch.compiler.is_compiling():
            return torch._dynamo.disable(self.run)(args, kwargs)  # type: ignore[no-untyped-call]
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: frozenset[int] | None = None) -> Any:
        """Run the averaged model, with these modules in training mode; None: as they are, or as ``eval()`` says."""
        model = self._present()
        found = parts(model)
        self._fit(found)
        stream, self._num_passes = self._num_passes, self._num_passes + 1
        with torch.inference_mode(False), torch.no_grad(), own_randomness(found.parameters.values(), stream):
            if self.module is not None:
                for name, parameter in self.module.named_parameters():
                    if name in self._averages:
                        local(parameter.data).copy_(local(laid_out_as(self._averages[name], parameter)))
                return self.module(*args, **kwargs)
            if self.mode == "eval" or (training is None and not self.training):
                training = frozenset()
            averages = self._averages if self._num_updates else {}
            with averaged(found, averages, {} if self.mode == "eval" else self._statistics, training):
                result = model(*args, **kwargs)
                sharded = any(is_sharded(parameter) for parameter in found.parameters.values())
                return copied_layers(result) if sharded else result

    def averaged_model(self) -> nn.Module:
        """A copy of the model that has the averages as its weights, in eval mode: for evaluation and export.

        Returns:
            A module of the model's class, with nothing of this package in it.

        Raises:
            RuntimeError: ``forward`` of the model was replaced by a function, which may refer to the model.
            AssertionError: the model is sharded, and FSDP2 lets nobody copy it; see ``averages`` for the weights.
        """
        averages, model = self.averages, self._present()
        memo: dict[int, Any] = {}
        for module in model.modules():
            if not isinstance(vars(module).get("forward", module.forward), types.MethodType):
                raise RuntimeError(
                    f"forward of {type(module).__name__} was replaced by a function, whose copy would run the model "
                    "itself; call the teacher after teacher.eval() instead"
                )
            results = [value for value in vars(module).values() if isinstance(value, Tensor)]  # have graphs: no copies
            memo.update({id(value): value.detach().clone() for value in results})
        twin = copy.deepcopy(model, memo).eval()
        nn.Module.load_state_dict(twin, {**averages, **self._statistics}, strict=False)
        return twin

    def extra_repr(self) -> str:
        """Show the options."""
        name = "no model" if self.source is None else type(self.source).__name__
        return f"{name}, decay={self.decay}, mode={self.mode!r}, num_updates={self.num_updates}"

    def _present(self) -> nn.Module:
        source = self.source
        if source is None:
            raise RuntimeError(
                "the model that this EMATeacher follows is gone (deleted, or the teacher was copied or unpickled: "
                "then call follow(model))"
            )
        return source

    def _running_steps(self) -> Steps | None:
        return None if self._steps is None else self._steps()

    def _forget_steps(self, *, restored: bool = False) -> None:
        """Drop steps that were not taken in yet: the state is another from now on."""
        self._begun = False
        steps = self._running_steps()
        if steps is not None:
            steps.forget(restored=restored)

    def _begin(self, found: Parts) -> None:
        """Let averages and, before the first pass, running statistics be the model's."""
        self._averages = _averages_of(found)
        if self._num_passes == 0:
            self._statistics = {name: tensor.detach().clone() for name, tensor in found.statistics().items()}

    def _fit(self, found: Parts) -> None:
        """Bring each average to where its parameter is, and raise if the model has no parameter like it."""
        for name, average in self._averages.items():
            parameter = found.parameters.get(name)
            if parameter is None or parameter.shape != average.shape:
                now = "is gone" if parameter is None else f"has shape {tuple(parameter.shape)} now"
                raise RuntimeError(
                    f"the model has changed since its average was begun: its parameter {name!r} of shape "
                    f"{tuple(average.shape)} {now}; call criterion.detach() and criterion.attach(model), or restart() "
                    "of an EMATeacher on its own, to begin a new one"
                )
            moved = average.dtype != parameter.dtype or average.device != parameter.device
            if moved or (type(average) is Tensor) != (type(parameter) is nn.Parameter):  # or sharded
                self._averages[name] = laid_out_as(average.to(_precise(parameter.dtype)), parameter)

    @torch.no_grad()
    def _average(self, found: Parts) -> None:
        self._fit(found)
        self._averages.update(_averages_of(found, but=self._averages))
        self._num_updates += 1
        decay = min(1.0 - 1.0 / (self._num_updates + 1), self.decay)
        averages = [local(average) for average in self._averages.values()]
        if averages:
            torch._foreach_mul_(averages, decay)
            torch._foreach_add_(averages, [local(found.parameters[name]) for name in self._averages], alpha=1.0 - decay)

    def _entries(self) -> dict[str, Tensor]:
        """What a checkpoint holds: tensors alone."""
        entries = {_key("averages", name): average for name, average in self._averages.items()}
        entries.update({_key("statistics", name): tensor for name, tensor in self._statistics.items()})
        return {**entries, **{name: torch.tensor(getattr(self, "_" + name)) for name in COUNTERS}}

    def __getattr__(self, name: str) -> Any:
        entries = self._entries() if "/" in name or name in COUNTERS else {}
        return entries[name] if name in entries else super().__getattr__(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.take_in()
        destination.update({prefix + key: value for key, value in self._entries().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, _, missing_keys, unexpected_keys, error_msgs = args
        state = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        source = self.source
        own, found = self._entries(), Parts({}, {}) if source is None else parts(source)
        others = {} if source is None else dict(source.named_buffers())  # which the first version saved too
        if "_extra_state" in state:
            state = {k: v for k, v in _from_copies(state).items() if k in own or source is None}
        wanted = {**self._averages, **self._statistics, **found.parameters, **found.statistics()}
        names = {name.replace(".", "/"): name for name in wanted}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            name = names.get(name, name.replace("/", "."))
            if key in COUNTERS:
                setattr(self, f"_{key}", int(value))
            elif kind not in KINDS or (name not in wanted and source is not None):
                unexpected_keys += [] if name in others else [prefix + key]
            elif name in wanted and wanted[name].shape != value.shape:
                shapes = f"{tuple(value.shape)} in the checkpoint, {tuple(wanted[name].shape)} in the model"
                error_msgs.append(f"size mismatch for {key}: {shapes}")
            else:
                value = laid_out_as(value, wanted[name]) if name in wanted else value
                getattr(self, f"_{kind}")[name] = value.detach().clone()
        missing_keys += [prefix + key for key in own if key not in state]
        self._forget_steps(restored=True)

    def __getstate__(self) -> dict[str, Any]:
        """A copy follows no model until it is told to."""
        self.take_in()
        return {**self.__dict__, "_source": None, "_steps": None}


def _key(kind: str, name: str) -> str:
    """A name without dots: torch.distributed.checkpoint looks each entry up as an attribute."""
    return f"{kind}/{name.replace('.', '/')}"


def _fits(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether each of the first has the shape of one of its name."""
    return all(name in others and others[name].shape == tensor.shape for name, tensor in tensors.items())


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _averages_of(found: Parts, but: Container[str] = ()) -> dict[str, Tensor]:
    """Copies of the parameters that are trained, in at least float32."""
    trained = {name: parameter.detach() for name, parameter in found.trained().items() if name not in but}
    return {name: parameter.to(_precise(parameter.dtype), copy=True) for name, parameter in trained.items()}


def _from_copies(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the first teachers, which were copies of the model, as one of today."""
    counts = state["_extra_state"]
    new = {"num_updates": torch.tensor(counts["num_updates"]), "num_passes": torch.tensor(counts["streams"])}
    for key, value in state.items():
        kind, _, name = key.partition(".")
        if kind == "module":
            own = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
            average = state.get("average_" + name.replace(".", "__"), value)
            new[_key("statistics" if own else "averages", name)] = average
    return new
