"""The Mean Teacher: a model run with an exponential moving average of its weights."""

from __future__ import annotations

import copy
import types
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from softlabels.functional import _checks
from softlabels.teachers.averaged_weights import (
    Parts,
    averaged,
    is_sharded,
    laid_out_as,
    local,
    own_randomness,
    parts,
    reshard,
)
from softlabels.teachers.steps import Steps
from softlabels.teachers.structures import check_model, unwrap

COUNTERS = ("num_updates", "num_passes")


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
        self, model: nn.Module, decay: float = 0.999, *, mode: str = "train", module: nn.Module | None = None
    ) -> None:
        super().__init__()
        _checks.check_number("decay", decay, low=0.0, high=1.0, high_open=True)
        _checks.check_choice("mode", mode, ("train", "eval"))
        if not isinstance(module, (nn.Module, types.NoneType)):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self.decay, self.mode = decay, mode
        self.__dict__["module"] = module  # not a submodule: neither saved nor moved nor trained with the teacher
        self._num_updates = 0
        self._num_passes = 0  # the seed of each pass's own random stream
        self._averages: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] = {}
        self._begun = False  # whether there was a training pass
        self._restored = False  # whether the state was loaded and not used yet
        self.follow(model)
        if module is not None and not self._averages.keys() <= parts(module).parameters.keys():
            raise ValueError("module does not have the parameters of model by their names")

    @property
    def source(self) -> nn.Module | None:
        """The model that is followed, or None if it is gone."""
        return None if self._source is None else self._source()

    @property
    def num_updates(self) -> int:
        """How many optimizer steps are in the average."""
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
        return dict(self._averages) if self.num_updates else self._trained()

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
        parameters = parts(source).parameters
        for name, parameter in parameters.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"model has a parameter that is not initialised yet, {name!r}; run one forward pass before the "
                    "teacher is made"
                )
        if any(name not in parameters or parameters[name].shape != a.shape for name, a in self._averages.items()):
            raise ValueError("model does not have the parameters of the model that this EMATeacher was made from")
        self._source: weakref.ref[nn.Module] | None = weakref.ref(source)
        self._steps: weakref.ref[Steps] | None = None
        if not self._averages:
            self._begin()

    def follow_steps(self, optimizer: object) -> Steps:
        """Take steps of the model in for as long as what is returned is kept.

        Losses that share this teacher share one, so that it moves once per step.
        """
        running = self._steps() if self._steps else None
        if running is not None and optimizer is not None:
            raise ValueError("optimizer cannot be given: this EMATeacher already follows the steps of its model")
        steps = running or Steps(self._present(), optimizer)
        self._steps = weakref.ref(steps)
        return steps

    def take_in(self, *, passing: bool = False) -> bool:
        """Take in what was noted: a step, or weights that were loaded. Whether there was a step.

        Args:
            passing: In a training pass of the model. At the first one the average is the model, whatever was loaded or
                broadcast since it was attached.
        """
        steps, source = self._steps() if self._steps else None, self.source
        stepped = False
        if source is not None and steps is not None:
            if steps.loaded and not self._restored:
                if self._num_updates:
                    warnings.warn(
                        "weights were loaded into the attached model after its average was begun, which restarts from "
                        "them; to go on with it, load the state_dict of the criterion as well",
                        stacklevel=2,
                    )
                self.restart()
            steps.loaded = False
            stepped = steps.taken(parts(source).parameters, passing)
            if stepped:
                self._average(source)
            self._restored = self._restored and not (passing or stepped)
        if passing and self._num_updates == 0 and not (self._begun and self._fits()):
            self._begin()
        self._begun = self._begun or passing
        return stepped

    def restart(self) -> None:
        """Begin again from the model's present weights and statistics, with no updates made."""
        self._num_updates = self._num_passes = 0
        self._begun = False
        self._begin()
        self._forget_steps()

    def update(self) -> None:
        """Average the model's present parameters in; call it after each optimizer step.

        A teacher that is attached to a loss takes optimizer steps in by itself; if there was one, this call does it.
        With ``attach(model, optimizer=False)`` there is none, and this call is the step.

        Raises:
            RuntimeError: the model is gone, or has no longer the parameters that are averaged.
        """
        if not self.take_in():
            self._average(self._present())

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged model without a graph and without touching torch's random generators."""
        self.take_in()
        if torch.compiler.is_compiling():
            return torch._dynamo.disable(self.run)(args, kwargs)  # type: ignore[no-untyped-call]
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: list[bool] | None = None) -> Any:
        """Run the averaged model, each module in its mode; None: in the model's, unless ``eval()`` was called."""
        source = self._present()
        found = self._fit(source)
        self._num_passes += 1
        devices = found.parameters.values()
        with torch.inference_mode(False), torch.no_grad(), own_randomness(devices, self._num_passes - 1):
            if self.module is not None:
                for name, parameter in self.module.named_parameters():
                    if name in self._averages:
                        local(parameter.data).copy_(local(laid_out_as(self._averages[name], parameter)))
                return self.module(*args, **kwargs)
            if self.mode == "eval" or (training is None and not self.training):
                training = [False] * len(found.modules)
            averages = self._averages if self._num_updates else {}
            with averaged(found, averages, {} if self.mode == "eval" else self._statistics, training):
                return source(*args, **kwargs)

    def averaged_model(self) -> nn.Module:
        """A copy of the model that has the averages as its weights, in eval mode: for evaluation and export.

        Returns:
            A module of the model's class, with nothing of this package in it.

        Raises:
            RuntimeError: ``forward`` of the model was replaced by a function, which may refer to the model.
            AssertionError: the model is sharded, and FSDP2 lets nobody copy it; see ``averages`` for the weights.
        """
        averages, source = self.averages, self._present()
        found = parts(source)
        memo: dict[int, Any] = {}
        for module in found.modules:
            if not isinstance(vars(module).get("forward", module.forward), types.MethodType):
                raise RuntimeError(
                    f"forward of {type(module).__name__} was replaced by a function, whose copy would run the model "
                    "itself; call the teacher after teacher.eval() instead"
                )
            results = [
                value for value in vars(module).values() if isinstance(value, Tensor)
            ]  # cannot be copied as such
            memo.update({id(value): value.detach().clone() for value in results})
        with torch.no_grad(), averaged(found, averages, self._statistics):
            twin = copy.deepcopy(source, memo).eval()
        for name, parameter in parts(twin).parameters.items():
            parameter.requires_grad = found.parameters[name].requires_grad
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

    def _forget_steps(self) -> None:
        """Drop steps that were not taken in yet: the state is another from now on."""
        steps = self._steps() if self._steps else None
        if steps is not None:
            steps.restart()

    def _begin(self) -> None:
        """Let averages and, before the first pass, running statistics be the model's."""
        if self.source is not None:
            self._averages = self._trained()
            if self._num_passes == 0:
                self._statistics = {name: t.detach().clone() for name, t in parts(self.source).statistics.items()}

    def _fits(self) -> bool:
        shapes = {name: average.shape for name, average in self._averages.items()}
        return shapes == {n: p.shape for n, p in parts(self._present()).parameters.items() if p.requires_grad}

    def _trained(self) -> dict[str, Tensor]:
        parameters = parts(self._present()).parameters
        return {name: _average_of(parameter) for name, parameter in parameters.items() if parameter.requires_grad}

    def _fit(self, source: nn.Module) -> Parts:
        """Bring each average to where its parameter is, and raise before if the model has no parameter like it."""
        found = parts(source)
        if any(hasattr(type(module), "reshard") for module in found.modules):
            reshard(found.modules)
            found = parts(source)
        parameters = found.parameters
        for name, average in self._averages.items():
            if name not in parameters or parameters[name].shape != average.shape:
                now = f"has shape {tuple(parameters[name].shape)} now" if name in parameters else "is gone"
                raise RuntimeError(
                    f"the model has changed since its average was begun: its parameter {name!r} of shape "
                    f"{tuple(average.shape)} {now}; call criterion.detach() and criterion.attach(model), or restart() "
                    "of an EMATeacher on its own, to begin a new one"
                )
        for name, average in self._averages.items():
            wanted = parameters[name]
            dtype = wanted.dtype if wanted.dtype == average.dtype else torch.promote_types(wanted.dtype, torch.float32)
            if average.dtype != dtype or average.device != wanted.device or is_sharded(average) != is_sharded(wanted):
                self._averages[name] = laid_out_as(average.to(dtype), wanted)
        return found

    @torch.no_grad()
    def _average(self, source: nn.Module) -> None:
        parameters = self._fit(source).parameters
        added = {name: p for name, p in parameters.items() if p.requires_grad and name not in self._averages}
        self._averages.update({name: _average_of(parameter) for name, parameter in added.items()})
        self._num_updates += 1
        decay = min(1.0 - 1.0 / (self._num_updates + 1), self.decay)
        averages = [local(average) for average in self._averages.values()]
        values = [
            local(parameters[name].detach()).to(a.dtype) for name, a in zip(self._averages, averages, strict=True)
        ]
        if averages:
            torch._foreach_mul_(averages, decay)
            torch._foreach_add_(averages, values, alpha=1.0 - decay)

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
        missing, unexpected = args[2], args[3]
        state = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        parameters = parts(self.source).parameters if self.source is not None else {}
        if "_extra_state" in state:
            state = _from_copies(state, self._entries(), parameters)
        later = {n: p for n, p in parameters.items() if n not in self._averages and _key("averages", n) in state}
        self._averages.update({name: _average_of(parameter) for name, parameter in later.items()})
        entries, own = nn.Module(), self._entries()
        for key, tensor in own.items():
            entries.register_buffer(key, tensor)
        state = {key: laid_out_as(value, own[key]) if key in own else value for key, value in state.items()}
        absent, unknown = entries.load_state_dict(state, strict=False)
        missing += [prefix + key for key in absent]
        unexpected += [prefix + key for key in unknown]
        self._num_updates, self._num_passes = (int(entries.get_buffer(name)) for name in COUNTERS)
        self._restored = True
        self._forget_steps()

    def __getstate__(self) -> dict[str, Any]:
        """A copy follows no model until it is told to."""
        self.take_in()
        return {**self.__dict__, "_source": None, "_steps": None}


def _key(kind: str, name: str) -> str:
    """A name without dots: torch.distributed.checkpoint looks each entry up as an attribute."""
    return f"{kind}/{name.replace('.', '/')}"


def _average_of(tensor: Tensor) -> Tensor:
    """A copy of a floating tensor in at least float32."""
    dtype = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype, copy=True)


def _from_copies(state: dict[str, Any], entries: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the first teachers, which were copies of the model, as one of today."""
    averages = {name: state.get("average_" + name.replace(".", "__")) for name in parameters}
    values = {name: state.get("module." + name) if average is None else average for name, average in averages.items()}
    new = {_key("averages", name): value for name, value in values.items() if _key("averages", name) in entries}
    for key, value in state.items():
        new.update({k: value for k in entries if k == _key("statistics", key.removeprefix("module."))})
    extra = state["_extra_state"]
    return {**new, "num_updates": torch.tensor(extra["num_updates"]), "num_passes": torch.tensor(extra["streams"])}
