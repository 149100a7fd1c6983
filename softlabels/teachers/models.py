"""What is known about models from outside: the module inside a wrapper, and the logits inside an output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Output = str | int | Callable[[Any], Tensor] | None
_PICKING = {f"{name}Backward0" for name in ("Flip", "Gather", "Index", "IndexSelect", "Roll")}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside torch.compile and DistributedDataParallel wrappers."""
    while True:
        compiled = getattr(model, "_orig_mod", None)  # torch.compile's wrapper; its class lives in a slow import
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def check_supported(model: nn.Module) -> None:
    """Raise for wrappers whose replicas or stages a hook cannot follow."""
    for module in model.modules():
        if isinstance(module, nn.DataParallel):
            raise TypeError(
                "torch.nn.DataParallel is not supported: its replicas see only parts of the batch; use "
                "DistributedDataParallel"
            )


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a DTensor, told without importing torch.distributed.tensor."""
    return hasattr(parameter, "device_mesh")


def check_output(output: object) -> None:
    """``output`` is a key, an attribute name, a position, a callable or None."""
    if output is not None and not isinstance(output, (str, int)) and not callable(output):
        raise TypeError(f"output must be a key, an index, a callable or None, got {output!r}")


def find_logits(result: Any, output: Output) -> Tensor:
    """Logits in what a model returned.

    Args:
        result: A tensor; a mapping with ``"logits"`` or ``"out"``; an object with ``.logits``; or a tuple or list,
            whose first tensor with dimensions counts.
        output: A key or attribute name, an index, or a callable that takes ``result``; None searches as above.

    Raises:
        TypeError: nothing that could be logits was found.
    """
    found = _search(result) if output is None else _pick(result, output)
    if isinstance(found, Tensor):
        return found
    raise TypeError(
        f"no logits found in the model's output of type {type(result).__name__} with output={output!r}; say where they "
        "are with attach(..., output=...): a key, an index, or a function of the output"
    )


def select_logits(output: Output) -> Callable[[Any], Tensor | None] | None:
    """Return `find_logits` for a look at the model's own output, without errors; None where it might compute."""
    if callable(output):
        return None

    def select(result: Any) -> Tensor | None:
        found = _search(result) if output is None else _pick(result, output)
        return found if isinstance(found, Tensor) else None

    return select


def as_given(teacher_logits: Tensor, produced: Tensor | None, given: Tensor) -> Tensor | None:
    """Teacher logits in the shape in which the loss was given the model's logits; None if that cannot be told.

    Where ``given`` is a view of what the model ``produced`` (flattened, transposed, sliced), the same view is taken of
    the teacher's logits, so that rows of model and teacher belong together also where the shapes happen to agree.
    """
    if produced is not None and _is_other_view(produced, given):
        offset = given.storage_offset() - produced.storage_offset()
        if teacher_logits.shape != produced.shape or not 0 <= offset <= produced.numel() - _extent(given):
            return None
        laid_out = torch.empty_strided(
            produced.shape, produced.stride(), dtype=teacher_logits.dtype, device=teacher_logits.device
        )
        return laid_out.copy_(teacher_logits).as_strided(given.shape, given.stride(), offset)
    return teacher_logits if teacher_logits.shape == given.shape else None


def is_unrelated(produced: Tensor | None, given: Tensor) -> bool:
    """Whether ``given`` looks like a model's own logits (its shape, its dtype) but lies elsewhere than ``produced``."""
    if produced is None or (produced.shape, produced.dtype) != (given.shape, given.dtype) or is_sharded(produced):
        return False
    return bool(produced.untyped_storage().data_ptr() != given.untyped_storage().data_ptr())


def is_picked(produced: Tensor | None, given: Tensor) -> bool:
    """Whether ``given`` has the shape of a model's own logits, but its rows were just picked or moved among them."""
    if torch.compiler.is_compiling() or given.grad_fn is None or given.grad_fn.name() not in _PICKING:
        return False  # what came before the last operation may be the model's own doing
    return is_unrelated(produced, given)


def _is_other_view(produced: Tensor, given: Tensor) -> bool:
    """Whether ``given`` is another view of the dense tensor ``produced``."""
    if produced.device != given.device or produced.dtype != given.dtype or is_sharded(produced) or not given.numel():
        return False
    if (produced.shape, produced.stride()) == (given.shape, given.stride()) or _extent(produced) != produced.numel():
        return False
    return bool(produced.untyped_storage().data_ptr() == given.untyped_storage().data_ptr())


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last of a tensor in its storage."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _pick(result: Any, output: str | int | Callable[[Any], Tensor]) -> Any:
    if callable(output):
        return output(result)
    try:
        return result[output]
    except (TypeError, KeyError, IndexError):
        return getattr(result, output, None) if isinstance(output, str) else None


def _search(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping):
        for name in ("logits", "out"):
            if name in result:
                return result[name]
        return None
    if hasattr(result, "logits"):
        return result.logits
    if isinstance(result, (tuple, list)):
        return next((item for item in result if isinstance(item, Tensor) and item.dim()), None)
    return None
