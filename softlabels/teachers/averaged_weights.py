"""Rule 1: the teacher is the model itself, run with averaged weights.

For the length of a pass the values of the parameters are exchanged for their averages (their ``data``: parameters keep
their identity, so that closures, recurrent layers and compiled functions see the averages), running statistics for the
teacher's own. Afterwards everything is as it was, what modules keep in their attributes included.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

CONTAINERS = frozenset((dict, list, set, collections.deque))
PLAIN = frozenset((Tensor, nn.Parameter))


class Parts:
    """The modules of a model, its parameters and running statistics by name, each once, found in one walk.

    FSDP2 parameters are as they are kept between passes. Names have slashes for dots, since
    torch.distributed.checkpoint looks each entry of a state up as an attribute; those of modules end in one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        self._walk("", model, set())
        self.reshard()
        seen: set[int] = set()
        self.parameters = {
            prefix + name: parameter
            for prefix, module in self.modules.items()
            for name, parameter in module._parameters.items()
            if parameter is not None and not (id(parameter) in seen or seen.add(id(parameter)))  # type: ignore[func-returns-value]
        }

    def _walk(self, prefix: str, module: nn.Module, seen: set[nn.Module]) -> None:
        if module not in seen:
            seen.add(module)
            self.modules[prefix] = module
            for name, child in module._modules.items():
                if child is not None:
                    self._walk(f"{prefix}{name}/", child, seen)

    def reshard(self) -> None:
        """Let FSDP2 put its parameters away."""
        for module in self.modules.values():
            if hasattr(type(module), "reshard"):
                module.reshard()  # type: ignore[operator]

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that have averages."""
        return {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics."""
        norms = [(prefix, module) for prefix, module in self.modules.items() if isinstance(module, _NormBase)]
        return {prefix + name: t for prefix, norm in norms for name, t in norm._buffers.items() if t is not None}


@contextlib.contextmanager
def averaged(
    found: Parts, averages: dict[str, Tensor], statistics: dict[str, Tensor], training: set[int] | None, stream: int
) -> Iterator[None]:
    """Let a model be run with other weights: grad must be disabled.

    Args:
        found: The model's parts.
        averages: Values by parameter name, of any dtype; the other parameters stay as they are.
        statistics: The teacher's own running statistics by name, which the pass may change.
        training: The modules that are in training mode, by id; None: as they are.
        stream: The number of its random stream; torch's generators are left as they were.
    """
    attributes = [module.__dict__ for module in found.modules.values()]
    noted = [(held, held.copy()) for own in attributes for held in (own, *own.values()) if type(held) in CONTAINERS]
    exchanged = [(found.parameters[name], average) for name, average in averages.items()]
    sharded = [(local(p.data), local(p.data).clone(), local(average)) for p, average in exchanged if is_sharded(p)]
    whole = [(p, p.data, average) for p, average in exchanged if not is_sharded(p)]
    cast = [p for p in found.parameters.values() if p.requires_grad and not is_sharded(p)] if _autocasts() else []
    states = [(generator, generator.get_state()) for generator in _generators(found.parameters.values())]
    seed = torch.initial_seed() ^ (0x5EED << 32 | stream)
    caching, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        for generator, _ in states:
            generator.manual_seed(seed)
        if training is not None:
            for own, module in zip(attributes, found.modules.values(), strict=True):
                own["training"] = id(module) in training
        _exchange_buffers(found, statistics)
        for parameter in cast:
            parameter.requires_grad = False  # autocast neither reads nor writes its cache for it
        for shard, _, average in sharded:
            shard.copy_(average)
        for parameter, value, average in whole:
            parameter.data = average if average.dtype is value.dtype else average.to(value.dtype)
        yield
        now = found.statistics()
        statistics.update({name: now[name].to(tensor.dtype) for name, tensor in statistics.items() if name in now})
    finally:
        found.reshard()
        parametrize._cache_enabled = caching
        for shard, value, _ in sharded:
            shard.copy_(value)
        for parameter, value, _ in whole:
            parameter.data = value
        for parameter in cast:
            parameter.requires_grad = True
        _put_back(noted)
        for generator, state in states:
            generator.set_state(state)


def _autocasts() -> bool:
    """Whether there is an autocast region, enabled or not, whose cache outlives a pass."""
    depth: int = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth > 1


def _exchange_buffers(found: Parts, statistics: dict[str, Tensor]) -> None:
    """Give a pass copies of the buffers to write to; of running statistics the teacher's own.

    Statistics that are frozen, in eval mode while the model trains, are the model's for the teacher too.
    """
    evaluating = not found.modules[""].training
    given: dict[int, Tensor] = {}  # by the buffer, which several modules may share
    for prefix, module in found.modules.items():
        for name, live in module._buffers.items():
            own = statistics.get(prefix + name) if module.training or evaluating else None
            if live is not None:
                new = live.clone() if own is None else own.to(live.device, live.dtype)
                module._buffers[name] = given.setdefault(id(live), new)


def _put_back(noted: list[tuple[Any, Any]]) -> None:
    for held, contents in noted:
        if type(held) is dict:
            held.update(contents)
            if len(held) > len(contents):
                for name in held.keys() - contents.keys():
                    del held[name]
        elif held or contents:
            held.clear()
            (held.update if isinstance(held, set) else held.extend)(contents)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, told without importing torch.distributed.tensor."""
    return type(tensor) not in PLAIN and hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def laid_out_as(tensor: Any, like: Any) -> Tensor:
    """A tensor on the device and in the shards of another."""
    if is_sharded(like) and not is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    whole = tensor.full_tensor() if is_sharded(tensor) and not is_sharded(like) else tensor
    return whole.to(like.device)  # type: ignore[no-any-return]


def _generators(parameters: Iterable[Tensor]) -> list[torch.Generator]:
    """Torch's own, for the CPU and for each accelerator that is in use."""
    generators = [torch.default_generator]
    for device in {parameter.device for parameter in parameters} if torch.accelerator.is_available() else ():
        if device.type not in ("cpu", "meta"):
            backend: Any = torch.get_device_module(device)
            mps = device.type == "mps"
            generators.append(backend._get_default_mps_generator() if mps else backend.default_generators[device.index])
    return generators
