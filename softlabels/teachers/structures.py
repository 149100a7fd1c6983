"""What models are given and return: tensors in tuples, dicts and objects; and models inside wrappers."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor, jit, nn
from torch.nn.utils.rnn import PackedSequence

from softlabels.kernels import LinearLogits

Output = str | int | Callable[[Any], Tensor] | None
Logits = Tensor | LinearLogits
LOGITS = -1
DEPTH = 8  # containers inside containers; an object counts for three, since objects may refer to each other in circles


def rebuilt(value: Any, change: Callable[[Tensor], Tensor], depth: int = DEPTH) -> Any:
    """A structure of the same types: containers and objects are copied (copy.copy), tensors changed, in their order."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):  # its batch sizes stay on the CPU
        indices = (index if index is None else change(index) for index in value[2:])
        return PackedSequence(change(value.data), value.batch_sizes, *indices)
    if isinstance(value, tuple) and depth:
        return getattr(value, "_make", type(value))([rebuilt(item, change, depth - 1) for item in value])
    if isinstance(value, (MutableMapping, list, deque)) and depth:
        new = copy.copy(value)
        for key, item in value.items() if isinstance(value, MutableMapping) else enumerate(value):
            new[key] = rebuilt(item, change, depth - 1)
        return new
    if depth < 3 or isinstance(value, (nn.Module, type)) or callable(value) or not hasattr(value, "__dict__"):
        return value
    new = copy.copy(value)
    for key, item in vars(value).items():
        object.__setattr__(new, key, rebuilt(item, change, depth - 3))  # also of a frozen dataclass
    return new


def copied_layers(value: Any) -> Any:
    """What a model returned, where its LinearLogits hold copies, since FSDP2 takes back the memory of parameters."""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    inside = any(isinstance(item, LinearLogits) for item in (value, *items, *getattr(value, "__dict__", {}).values()))
    return rebuilt(value, lambda tensor: tensor.detach().clone()) if inside else value


def find_logits(result: Any, output: Output) -> Any:
    """Logits in what a model returned; whatever stands there.

    Args:
        result: A tensor or LinearLogits; a mapping with ``"logits"`` or ``"out"``; an object with ``.logits``; or a
            tuple or list, whose first tensor with dimensions counts.
        output: A key or attribute name, an index, or a callable that takes ``result``; None searches as above.
    """
    if callable(output):
        return output(result)
    if output is not None:
        try:
            return result[output]
        except (TypeError, KeyError, IndexError):
            return getattr(result, output, None) if isinstance(output, str) else None
    if isinstance(result, Logits):
        return result
    if isinstance(result, Mapping):
        return result.get("logits", result.get("out"))
    if not hasattr(result, "logits") and isinstance(result, (tuple, list)):
        return next(
            (item for item in result if isinstance(item, LinearLogits) or (isinstance(item, Tensor) and item.dim())),
            None,
        )
    return getattr(result, "logits", None)


def outputs(result: Any, output: str | int | None) -> dict[int, Logits]:
    """All tensors in what a model returned by their position, its logits first and as LOGITS."""
    logits, found = find_logits(result, output), dict[int, Tensor]()
    if isinstance(result, Logits) and logits is result:
        return {LOGITS: logits}
    rebuilt(result, lambda tensor: found.setdefault(len(found), tensor))
    others: dict[int, Logits] = {position: tensor for position, tensor in found.items() if tensor is not logits}
    return {LOGITS: logits, **others} if isinstance(logits, Logits) else others


def rows_of(logits: Logits) -> Tensor:
    """The tensor whose graph tells which pass and which rows these logits are of: of LinearLogits the layer's input."""
    return logits.hidden if isinstance(logits, LinearLogits) else logits


def like_parameters(value: Any, module: nn.Module) -> Any:
    """Tensors moved to the device of a module, floating ones to its dtype."""
    own = next((p for p in module.parameters() if p.is_floating_point()), None)
    if own is None:
        return value
    return rebuilt(value, lambda t: t.to(own.device, own.dtype if t.is_floating_point() else None))


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside wrappers that run it as it is: torch.compile's, those of data parallelism."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile's wrapper; its class lives in a slow import
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def check_model(model: Any) -> None:
    """Raise for what is no model, or has weights that are not the parameters that it names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    sharded = any(hasattr(type(module), "reshard") for module in model.modules())  # by FSDP2, with the same mark
    for module in model.modules():
        if hasattr(module, "_fsdp_wrapped_module") or ("_fsdp_use_orig_params" in vars(module) and not sharded):
            raise TypeError(
                "model is sharded by FullyShardedDataParallel (FSDP1), or only a part of what is sharded; shard it "
                "with fully_shard (FSDP2)"
            )
        if isinstance(module, jit.ScriptModule):
            raise TypeError("model holds a ScriptModule; attach to the module that it was made of, and train that")
