"""What models are given and return: tensors in tuples, dicts and objects; and models inside wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, jit, nn
from torch.nn.utils.rnn import PackedSequence

from softlabels.kernels import LinearLogits

Output = str | int | Callable[[Any], Tensor] | None
Logits = Tensor | LinearLogits
LOGITS = -1
DEPTH = 8  # containers inside containers; an object counts for three, since objects may refer to each other in circles


def tensors(value: Any, depth: int = DEPTH) -> Iterator[Tensor]:
    """All tensors in a structure, in their order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for _, item in _entries(value, depth):
            yield from tensors(item, _deeper(value, depth))


def rebuilt(value: Any, change: Callable[[Tensor], Tensor], depth: int = DEPTH) -> Any:
    """A structure of the same types: containers and objects are copied (copy.copy), tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):  # its batch sizes stay on the CPU
        indices = (index if index is None else change(index) for index in value[2:])
        return PackedSequence(change(value.data), value.batch_sizes, *indices)
    entries = [(key, rebuilt(item, change, _deeper(value, depth))) for key, item in _entries(value, depth)]
    if isinstance(value, tuple):
        return getattr(value, "_make", type(value))(item for _, item in entries)
    new = copy.copy(value) if entries or isinstance(value, (MutableMapping, list)) else value
    for key, item in entries:
        if isinstance(new, (MutableMapping, list)):
            new[key] = item
        else:
            object.__setattr__(new, key, item)  # also of a frozen dataclass
    return new


def copied_layers(value: Any) -> Any:
    """A structure whose LinearLogits hold copies of their tensors, since FSDP2 gives back the memory of parameters."""
    inside = isinstance(value, LinearLogits) or any(
        isinstance(item, LinearLogits) for _, item in _entries(value, DEPTH)
    )
    return rebuilt(value, lambda tensor: tensor.detach().clone()) if inside else value


def _entries(value: Any, depth: int) -> list[tuple[Any, Any]]:
    if depth > 0 and isinstance(value, Mapping):
        return list(value.items())
    if depth > 0 and isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if depth < 3 or isinstance(value, (Tensor, nn.Module, type)) or callable(value):
        return []
    return list(getattr(value, "__dict__", {}).items())


def _deeper(value: Any, depth: int) -> int:
    return depth - (1 if isinstance(value, (Mapping, tuple, list)) else 3)


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
    logits = find_logits(result, output)
    others: dict[int, Logits] = {
        position: tensor for position, tensor in enumerate(tensors(result)) if tensor is not logits
    }
    return {LOGITS: logits, **others} if isinstance(logits, Logits) else others


def rows_of(logits: Logits) -> Tensor:
    """The tensor whose graph tells which pass and which rows these logits are of: of LinearLogits the layer's input."""
    return logits.hidden if isinstance(logits, LinearLogits) else logits


def like_parameters(value: Any, module: nn.Module) -> Any:
    """Tensors moved to the device of a module, floating ones to its dtype."""
    own = next((p for p in module.parameters() if p.is_floating_point()), None)
    return (
        value
        if own is None
        else rebuilt(value, lambda t: t.to(own.device, own.dtype if t.is_floating_point() else None))
    )


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
