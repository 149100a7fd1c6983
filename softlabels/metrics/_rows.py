"""Rows of predictions for the metrics: arguments checked, and worked on a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from softlabels.functional import _checks
from softlabels.functional._rows import check_labels

CHUNK = {"cpu": 2**18, "other": 2**24}  # elements worked on at once: a cache's worth; 128 MiB of float64


def labels(input: Tensor, target: Tensor, ignore_index: int, name: str = "input") -> tuple[Tensor, Tensor]:
    """Check predictions against class indices; the indices, 0 where ignored, and which rows are kept."""
    check_predictions(input, name)
    _checks.check_ignore_index(ignore_index)
    _checks.check_tensor("target", target)
    _checks.check_device("target", target, input)
    wanted = row_shape(input)
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(
            f"target must hold class indices of shape {tuple(wanted)}, got {target.dtype} of shape "
            f"{tuple(target.shape)}; for class probabilities pass target.argmax(1)"
        )
    if target.shape != wanted and not (input.dim() == 1 and target.numel() == 1):
        raise ValueError(
            f"target must hold class indices of shape {tuple(wanted)} for {name} of shape {tuple(input.shape)}, got "
            f"shape {tuple(target.shape)}"
        )
    target = target.reshape(wanted).long()
    kept = target != ignore_index
    target = target.masked_fill(~kept, 0)
    num_classes = input.shape[class_dim(input)]
    if target.device.type != "cpu":  # out of range fails in a device-side assertion, as in torch
        target.new_empty(num_classes).index_select(0, target.flatten())
    check_labels(target, num_classes, f" or ignore_index={ignore_index}")
    return target, kept


def check_predictions(input: Tensor, name: str = "input") -> None:
    """Predictions are a floating tensor with at least one class, where float64 exists."""
    _checks.check_input(input, name)
    if input.shape[class_dim(input)] == 0:
        raise ValueError(f"{name} must have at least one class, got shape {tuple(input.shape)}")
    if input.device.type == "mps":
        raise NotImplementedError(f"metrics are computed in float64, which mps devices lack; pass {name}.cpu()")


def check_probabilities(input: Tensor, kept: Tensor | None = None) -> None:
    """With ``from_logits=False``, the rows that count are probabilities, where looking costs nothing."""
    if input.numel() == 0:
        return
    dim = class_dim(input)
    total, smallest = input.sum(dim, dtype=torch.float64), input.amin(dim)
    tolerance = max(1e-3, 4 * torch.finfo(input.dtype).eps * input.shape[dim] ** 0.5)
    bad = (smallest < 0) | ~((total - 1).abs() < tolerance)
    bad = bad if kept is None else bad & kept
    if _checks.peek(bad.any()):
        raise ValueError(
            "with from_logits=False, input must hold class probabilities that sum to 1, got a row whose smallest value "
            f"is {smallest[bad][0].item():g} and whose sum is {total[bad][0].item():g}; logits need from_logits=True"
        )


def below_top(logits: Tensor) -> Tensor:
    """Logits less the largest of their row, of (n, K, d), in a float64 tensor of its own: at most 0.

    A constant added to a row falls out before anything is rounded.
    """
    return logits.to(torch.float64, copy=True).sub_(logits.amax(1, keepdim=True))


def true_class_log_odds(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """log(p_y / (1 - p_y)) of softmax(logits / temperature); (n, d) in float64 from (n, K, d) and (n, d).

    Infinite where 1 - p_y is less than the smallest float64.
    """
    target = target.unsqueeze(1)
    scaled = below_top(logits)
    if temperature != 1.0:
        scaled /= temperature
    own = scaled.gather(1, target).squeeze(1)
    others = scaled.exp_().scatter_(1, target, 0.0).sum(1)
    return own - others.log_()


def class_dim(input: Tensor) -> int:
    """Dimension of the classes: the only one of (K), dimension 1 of (N, K, d1, ...)."""
    return min(input.dim() - 1, 1)


def row_shape(input: Tensor) -> torch.Size:
    """Shape of ``input`` without its classes."""
    dim = class_dim(input)
    return input.shape[:dim] + input.shape[dim + 1 :]


def by_chunks(function: Callable[..., Tensor], input: Tensor, *per_row: Tensor) -> Tensor:
    """Apply a function of rows to a few rows at a time, so that its float64 temporaries stay small.

    Args:
        function: From (n, K, d) in the dtype of ``input``, and (n, d) of each of ``per_row``, to (..., n, d).
        input: (K), (N, K) or (N, K, d1, ...).
        per_row: Tensors of row shape.

    Returns:
        (..., *row shape).
    """
    shape = row_shape(input)
    rows = input.reshape(1, -1, 1) if input.dim() == 1 else input.flatten(2) if input.dim() > 2 else input.unsqueeze(2)
    matched = [values.reshape(rows.shape[0], rows.shape[2]) for values in per_row]
    done = [
        _join([function(rows[i, :, j], *(v[i, j] for v in matched)) for j in columns], -1)
        for i, columns in _tiles(rows)
    ]
    result = _join(done, -2)
    return result.reshape(result.shape[:-2] + shape)


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _tiles(rows: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of the batch, each with the slices of the positions, of at most a chunk of elements where K allows."""
    count, num_classes, positions = rows.shape
    chunk = CHUNK.get(rows.device.type, CHUNK["other"])
    width = max(min(chunk // num_classes, positions), 1)
    height = max(chunk // (num_classes * width), 1) if width == positions else 1
    columns = [slice(j, j + width) for j in range(0, max(positions, 1), width)]
    for i in range(0, max(count, 1), height):
        yield slice(i, i + height), columns
