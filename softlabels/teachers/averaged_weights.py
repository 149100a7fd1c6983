"""Rule 1: the teacher is the model itself, run with averaged weights.

For the length of a pass the values of the parameters are exchanged for their averages (their ``data``: parameters keep
their identity, so that closures, recurrent layers and compiled functions see the averages), running statistics for the
teacher's own. Afterwards everything is as it was, what modules keep in their attributes included.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

CONTAINERS = frozenset((dict, list, set, collections.deque))


class Parts(NamedTuple):
    """The modules of a model; by name, each once, its parameters, running statistics and other buffers."""

    modules: list[nn.Module]
    parameters: dict[str, nn.Parameter]
    statistics: dict[str, Tensor]
    buffers: dict[str, Tensor]


def parts(model: nn.Module) -> Parts:
    """As named_modules, named_parameters and named_buffers, in one walk."""
    found = Parts([], {}, {}, {})
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.modules.append(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found.parameters[prefix + name] = parameter
        if module._buffers:
            buffers = found.statistics if isinstance(module, _NormBase) else found.buffers
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) not in seen:
                    seen.add(id(buffer))
                    buffers[prefix + name] = buffer
        if module._modules:
            children = [(f"{prefix}{name}.", child) for name, child in module._modules.items() if child is not None]
            waiting += reversed(children)
    return found


@contextlib.contextmanager
def averaged(
    found: Parts, averages: dict[str, Tensor], statistics: dict[str, Tensor], training: list[bool] | None = None
) -> Iterator[None]:
    """Let a model be run with other weights: grad must be disabled.

    Args:
        found: The model's parts, after `reshard`.
        averages: Values by parameter name, of any dtype; the other parameters stay as they are.
        statistics: The teacher's own running statistics by name, which the pass may change. Of other buffers a pass
            gets copies.
        training: Mode of each module, in the order of `parts`; None: as it is.
    """
    modules, parameters, norms, others = found
    noted = [_contents(module) for module in modules]
    values = {name: parameters[name].data for name in averages}
    others_than_tensors = [name for name, value in values.items() if type(value) is not Tensor]
    sharded = {name: local(values[name]).clone() for name in others_than_tensors if is_sharded(values[name])}
    trained = [p for p in parameters.values() if p.requires_grad and (type(p) is nn.Parameter or not is_sharded(p))]
    buffers = {
        id(live): statistics[name].to(live.device, live.dtype) if name in statistics else live.clone()
        for name, live in {**norms, **others}.items()
    }
    caching, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        for module, mode in zip(modules, training or (), strict=False):
            module.__dict__["training"] = mode
        for held in [module._buffers for module in modules if module._buffers] if buffers else ():
            held.update({name: buffers[id(live)] for name, live in held.items() if live is not None})
        for parameter in trained:
            parameter.requires_grad = False  # autocast neither reads nor writes its cache for it
        for name, average in averages.items():
            value = values[name]
            if name in sharded:
                local(value).copy_(local(average))
            else:
                parameters[name].data = average if average.dtype == value.dtype else average.to(value.dtype)
        yield
        if statistics:
            statistics.update({n: now for n, now in parts(modules[0]).statistics.items() if n in statistics})
    finally:
        reshard(modules)
        parametrize._cache_enabled = caching
        for name, value in values.items():
            if name in sharded:
                local(value).copy_(sharded[name])
            else:
                parameters[name].data = value
        for parameter in trained:
            parameter.requires_grad = True
        for module, contents in zip(modules, noted, strict=True):
            _put_back(module.__dict__, *contents)


def _contents(module: nn.Module) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """The attributes of a module, and what is in those that are containers."""
    attributes = module.__dict__
    return attributes.copy(), [(value, value.copy()) for value in attributes.values() if type(value) in CONTAINERS]


def _put_back(attributes: dict[str, Any], before: dict[str, Any], containers: list[tuple[Any, Any]]) -> None:
    attributes.update(before)
    if len(attributes) > len(before):
        for name in attributes.keys() - before.keys():
            del attributes[name]
    for container, contents in containers:
        if container or contents:
            container.clear()
            (container.extend if hasattr(container, "extend") else container.update)(contents)


def reshard(modules: list[nn.Module]) -> None:
    """Give gathered FSDP2 parameters back: without a backward pass FSDP keeps some."""
    for module in modules:
        if hasattr(type(module), "reshard"):
            module.reshard()  # type: ignore[operator]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, told without importing torch.distributed.tensor."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "device_mesh")


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


@contextlib.contextmanager
def own_randomness(parameters: Iterable[Tensor], stream: int) -> Iterator[None]:
    """Draw from a random stream of one's own, and leave torch's generators as they were."""
    devices = [device for device in {p.device for p in parameters} if device.type not in ("cpu", "meta")]
    with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
        # torch.manual_seed also notes the seed for every kind of accelerator that is not in use, stack trace and
        # all, which takes longer than a small network's step, and would seed them so when they come into use.
        seed = torch.initial_seed() ^ (0x5EED << 32 | stream)
        torch.default_generator.manual_seed(seed)
        for device in devices:
            backend = torch.get_device_module(device)
            if hasattr(backend, "default_generators"):
                backend.default_generators[device.index or 0].manual_seed(seed)
            else:
                backend.manual_seed(seed)
        yield
