"""The Mean Teacher: a copy of a model whose weights are an exponential moving average."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from softlabels.functional import _checks
from softlabels.teachers.clock import StepClock
from softlabels.teachers.models import is_sharded, unwrap
from softlabels.teachers.tap import remove_taps

if TYPE_CHECKING:
    from typing_extensions import Self

MODES = ("train", "eval")


class EMATeacher(nn.Module):
    r"""A copy of ``model`` whose parameters are an exponential moving average of the model's.

    At the t-th update (t = 1, 2, ...), with $d_t = \min(1 - 1 / (t + 1), \mathtt{decay})$,

    $$\theta' \leftarrow d_t\, \theta' + (1 - d_t)\, \theta.$$

    Parameters of fewer than 32 bits are averaged in float32 (at a decay of 0.999 a bfloat16 average would never
    move) and rounded for the forward pass. Frozen parameters are copied. The teacher never requires gradients and
    keeps its own training mode whatever is done to the modules around it.

    Hooks on the modules of the model are copied with them. A hook that captures features therefore sees the teacher's
    pass as well, where grad is disabled: let it return at once if ``not torch.is_grad_enabled()``.

    Args:
        model: The model to follow. It is copied, without its gradients; wrappers of torch.compile and
            DistributedDataParallel are looked through. The teacher holds no strong reference to it.
        decay: The largest decay, in [0, 1).
        mode: ``"train"``: forward passes use batch statistics and dropout, as in Mean Teacher, and buffers are the
            teacher's own. ``"eval"``: they use running statistics, and buffers are copied from the model at each
            update.

    Shape:
        As the model's: ``teacher(*args, **kwargs)`` returns what the model returns, without a graph. Randomness in
        the pass, such as dropout, leaves the generators of torch as they were.

    Raises:
        ValueError: ``decay`` or ``mode`` is out of range, or the model has parameters that are not yet initialised.

    Example:
        >>> import torch
        >>> from softlabels import EMATeacher
        >>> model = torch.nn.Linear(4, 3)
        >>> teacher = EMATeacher(model, decay=0.99)
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_()
        >>> teacher.update()
        >>> teacher.num_updates, teacher(torch.ones(2, 4)).shape
        (1, torch.Size([2, 3]))

    Reference:
        Tarvainen & Valpola, *Mean teachers are better role models*, NeurIPS 2017.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, *, mode: str = "train") -> None:
        super().__init__()
        _checks.check_number("decay", decay, low=0.0, high=1.0, high_open=True)
        _checks.check_choice("mode", mode, MODES)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        source = unwrap(model)
        for name, parameter in source.named_parameters():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"model has a parameter that is not initialised yet, {name!r}; run one forward pass before the "
                    "teacher is made"
                )
            if is_sharded(parameter):
                raise ValueError(
                    f"model is sharded already (parameter {name!r}) and cannot be copied; make the EMATeacher "
                    "first, then shard model and teacher.module alike, and pass teacher= to attach"
                )
        self.decay = decay
        self.mode = mode
        self.num_updates = 0
        self._source: weakref.ref[nn.Module] | None = weakref.ref(source)
        self._clock: weakref.ref[StepClock] | None = None
        self._streams = 0  # teacher passes so far: the seed of each pass's own random stream
        self.module = copy.deepcopy(source)
        remove_taps(self.module)
        self.module.requires_grad_(False)
        self.module.zero_grad(set_to_none=True)
        self.module.train(mode == "train")
        self._set_averages({name: p.detach() for name, p in self.module.named_parameters()})

    @property
    def source(self) -> nn.Module | None:
        """The model that is followed, or None if it is gone."""
        return None if self._source is None else self._source()

    def follow_steps(self, optimizer: Optimizer | None) -> StepClock:
        """Update after each real optimizer step of the model for as long as the returned clock is kept.

        Losses that share this teacher share one clock, so that it moves once per step.
        """
        running = None if self._clock is None else self._clock()
        if running is not None:
            if optimizer is not None:
                raise ValueError("optimizer cannot be given: this EMATeacher already follows the steps of its model")
            return running
        source = self.source
        assert source is not None
        clock = StepClock(source, self.update, optimizer)
        self._clock = weakref.ref(clock)
        return clock

    def restart(self) -> None:
        """Begin again from the model's present weights and buffers, with no updates made."""
        source = self.source
        if source is not None:
            self.module.load_state_dict(source.state_dict())
            self._set_averages({name: p.detach() for name, p in self.module.named_parameters()})
            self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Average the model's present parameters in; call it after each optimizer step.

        A teacher that is attached to a loss is updated by the loss and must not be updated by hand as well.

        Raises:
            RuntimeError: the model is gone, or has no longer the parameters that it was copied with.
        """
        source = self.source
        if source is None:
            raise RuntimeError(
                "the model that this EMATeacher follows is gone (deleted, or the teacher was copied or unpickled: "
                "then call follow(model))"
            )
        self.follow_dtype_and_device()
        live = dict(source.named_parameters())
        own = dict(self.module.named_parameters())
        if live.keys() != own.keys():
            changed = sorted(live.keys() ^ own.keys())
            raise RuntimeError(f"the model's parameters have changed since the EMATeacher was made: {changed[:5]}")
        self._check_sharding(live, own)
        self.num_updates += 1
        decay = min(1.0 - 1.0 / (self.num_updates + 1), self.decay)
        accumulators = self._accumulators
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for name, parameter in live.items():
            average = accumulators.get(name, own[name])
            if parameter.requires_grad:
                averages.append(average)
                values.append(parameter.detach().to(average.dtype))
            else:
                average.copy_(parameter)
        if averages:
            torch._foreach_mul_(averages, decay)
            torch._foreach_add_(averages, values, alpha=1.0 - decay)
        for name, average in accumulators.items():
            own[name].copy_(average)
        if self.mode == "eval":
            buffers = dict(source.named_buffers())
            for name, buffer in self.module.named_buffers():
                buffer.copy_(buffers[name])

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged model without a graph and without touching torch's random generators."""
        if self.mode == "eval":
            result = self.module(*args, **kwargs)
            self._reshard()
            return result
        devices = list({p.device for p in self.module.parameters() if p.device.type not in ("cpu", "meta")})
        with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
            _seed(torch.initial_seed() ^ (0x5EED << 32 | self._streams), devices)
            self._streams += 1
            result = self.module(*args, **kwargs)
        self._reshard()
        return result

    def train(self, mode: bool = True) -> EMATeacher:
        """Change nothing: the teacher's mode is chosen when it is made."""
        return self

    def extra_repr(self) -> str:
        """Show the options."""
        return f"{type(self.module).__name__}, decay={self.decay}, mode={self.mode!r}, num_updates={self.num_updates}"

    def __repr__(self) -> str:
        return f"EMATeacher({self.extra_repr()})"

    def get_extra_state(self) -> dict[str, Any]:
        """Return what the checkpoint holds beside tensors: plain numbers."""
        return {"num_updates": self.num_updates, "streams": self._streams}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what [`get_extra_state`][softlabels.EMATeacher.get_extra_state] returned."""
        self.num_updates = int(state["num_updates"])
        self._streams = int(state["streams"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None, "_clock": None}

    @property
    def _accumulators(self) -> dict[str, Tensor]:
        """float32 averages of the parameters of fewer bits, by parameter name."""
        return {name: self.get_buffer(buffer) for name, buffer in self._accumulator_names.items()}

    def _set_averages(self, averages: dict[str, Tensor]) -> None:
        """Take over averages by parameter name: as they are, or in float32 beside parameters of fewer bits."""
        for buffer in getattr(self, "_accumulator_names", {}).values():
            del self._buffers[buffer]
        self._accumulator_names: dict[str, str] = {}
        for name, parameter in self.module.named_parameters():
            parameter.data = averages[name].to(parameter.device, parameter.dtype)
            if parameter.is_floating_point() and parameter.dtype.itemsize < 4:
                buffer = "average_" + name.replace(".", "__")
                self.register_buffer(buffer, averages[name].to(parameter.device, torch.float32))
                self._accumulator_names[name] = buffer

    def follow(self, model: nn.Module) -> None:
        """Follow ``model`` from now on, as a teacher that was copied or unpickled must be told.

        Args:
            model: A model with parameters of the names and shapes of the one that was copied.

        Raises:
            ValueError: the parameters differ.
        """
        source = unwrap(model)
        shapes = {name: p.shape for name, p in source.named_parameters()}
        if shapes != {name: p.shape for name, p in self.module.named_parameters()}:
            raise ValueError("model does not have the parameters of the model that this EMATeacher was made from")
        self._source = weakref.ref(source)

    @torch.no_grad()
    def follow_dtype_and_device(self) -> None:
        """Move to where, and to what dtype, the model has gone since it was copied."""
        source = self.source
        own = next(self.module.parameters(), None)
        first = None if source is None else next(source.parameters(), None)
        if own is None or source is None or first is None or (own.device, own.dtype) == (first.device, first.dtype):
            return
        self.to(first.device)
        accumulators = self._accumulators
        averages = {name: accumulators.get(name, p).detach() for name, p in self.module.named_parameters()}
        live = dict(source.named_parameters())
        for name, parameter in self.module.named_parameters():
            parameter.data = parameter.data.to(live[name].dtype if name in live else parameter.dtype)
        buffers = dict(source.named_buffers())
        for name, buffer in self.module.named_buffers():
            buffer.data = buffer.data.to(buffers[name].dtype if name in buffers else buffer.dtype)
        self._set_averages(averages)

    def _reshard(self) -> None:
        """After a pass, give gathered FSDP2 parameters back: FSDP waits for a backward pass that never comes."""
        for module in self.module.modules():
            reshard = getattr(module, "reshard", None)
            if callable(reshard):
                reshard()

    @staticmethod
    def _check_sharding(live: dict[str, nn.Parameter], own: dict[str, nn.Parameter]) -> None:
        for name, parameter in live.items():
            if is_sharded(parameter) != is_sharded(own[name]):
                raise RuntimeError(
                    f"of the model and its EMATeacher only one is sharded (parameter {name!r}); apply fully_shard to "
                    "teacher.module as to the model"
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves between devices, but keep the model's dtypes and the float32 averages."""
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)  # type: ignore[no-untyped-call, no-any-return]


def _seed(seed: int, devices: list[torch.device]) -> None:
    """Seed the generators of the CPU and of these devices alone.

    torch.manual_seed also notes the seed for every kind of accelerator that is not in use, stack trace and all, which
    takes longer than a small network's step, and would seed them so when they come into use.
    """
    torch.default_generator.manual_seed(seed)
    for device in devices:
        module = torch.get_device_module(device)
        if hasattr(module, "default_generators"):
            module.default_generators[device.index or 0].manual_seed(seed)
        else:
            module.manual_seed(seed)
