"""Rows of predictions for the metrics: arguments checked, and worked on a chunk at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from softlabels import _checks
from softlabels._reading import can_read, peek

CHUNK = {"cpu": 2**18, "other": 2**24}  # elements worked on at once: a cache's worth; 128 MiB of float64


def checked(
    input: Tensor, target: Tensor | None, sample_weight: Tensor | None, from_logits: bool, ignore_index: int, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Check predictions, class indices and weights, and bring them to where float64 is: mps devices have none.

    Args:
        input: (K), (N, K) or (N, K, d1, ...).
        target: Class indices of row shape. None: all rows count.
        sample_weight: Of row shape; rows of weight 0 do not count. None: 1.
        from_logits: False says that ``input`` holds probabilities.
        ignore_index: Label of the rows that do not count.
        name: What the caller calls ``input``.

    Returns:
        ``input``; the indices, 0 where ignored; and the weights in float64, 0 where ignored.
    """
    _checks.check_flag("from_logits", from_logits)
    _checks.check_ignore_index(ignore_index)
    _checks.check_input(input, name)
    if input.dtype.itemsize == 1:
        raise NotImplementedError(f"{name} must be of at least 16 bits, got {input.dtype}; pass {name}.float()")
    if input.shape[class_dim(input)] < 2:
        raise ValueError(
            f"{name} must have at least two classes, got shape {tuple(input.shape)}; the one logit z of a sigmoid "
            "becomes two by torch.cat([torch.zeros_like(z), z], 1)"
        )
    if target is not None:
        check_target(target, input, name)
    if sample_weight is not None:
        _checks.check_like_rows("sample_weight", sample_weight, input, row_shape(input))
    input = input.cpu() if input.device.type == "mps" else input
    wanted, num_classes = row_shape(input), input.shape[class_dim(input)]
    target = input.new_full(wanted, float(ignore_index == 0)) if target is None else target.reshape(wanted)
    target = target.to(input.device, torch.long)
    ignored = target == ignore_index
    target = target.masked_fill(ignored, 0)
    _checks.check_labels(target, num_classes, f" or ignore_index={ignore_index}")
    weight = (~ignored).double()
    if not can_read(target):  # labels out of range fail as an index, as in torch; compiled code would wrap -1
        weight = weight * weight.new_ones(num_classes)[target.masked_fill(target < 0, num_classes)]
    if sample_weight is not None:
        weight = torch.where(ignored, 0.0, weight * sample_weight.detach().to(weight.device))
        bad = ~((weight >= 0.0) & (weight < torch.inf))
        if peek(bad.any()):
            raise ValueError(f"sample_weight must be finite and not negative, got {weight[bad][0].item():g}")
        weight = weight.masked_fill(bad, torch.nan)
    return input if from_logits else _probabilities(input, weight), target, weight


def check_target(target: Tensor, input: Tensor, name: str) -> None:
    """A target holds one class index per row."""
    _checks.check_tensor("target", target)
    _checks.check_device("target", target, input)
    wanted = row_shape(input)
    fits = target.shape == wanted or (input.dim() == 1 and target.numel() == 1)
    rule = f"target must hold class indices of shape {tuple(wanted)}"
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        remedy = "pass target.long()" if fits else "for class probabilities pass target.argmax(1)"
        raise TypeError(f"{rule}, got {target.dtype} of shape {tuple(target.shape)}; {remedy}")
    if not fits:
        raise ValueError(f"{rule} for {name} of shape {tuple(input.shape)}, got shape {tuple(target.shape)}")


def _probabilities(input: Tensor, weight: Tensor) -> Tensor:
    """Rows that count are probabilities; where looking is impossible, other ones become nan.

    Rounding to the dtype changes a sum by up to half a step of 1, and each probability by half a subnormal step: sums
    may be four times as far off, and 1e-3 in any dtype.
    """
    dim, finfo = class_dim(input), torch.finfo(input.dtype)
    total, smallest = input.sum(dim, dtype=torch.float64), input.amin(dim)
    tolerance = max(1e-3, 2 * finfo.eps + 2 * finfo.smallest_normal * finfo.eps * input.shape[dim])
    bad = ((smallest < 0) | ~((total - 1).abs() < tolerance)) & (weight != 0)
    seen = peek(bad.any())
    if seen:
        raise ValueError(
            "with from_logits=False, input must hold class probabilities that sum to 1, got a row whose smallest value "
            f"is {smallest[bad][0].item():g} and whose sum is {total[bad][0].item():g}; logits need from_logits=True"
        )
    return input if seen is False else input.masked_fill(bad.unsqueeze(dim), torch.nan)


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
    rows = input.reshape(1, -1, 1) if input.dim() == 1 else input.flatten(2) if input.dim() > 2 else input.unsqueeze(2)
    matched = [values.reshape(rows.shape[0], rows.shape[2]) for values in per_row]
    tiles = list(_tiles(rows))
    parts = (function(rows[i, :, j], *(v[i, j] for v in matched)) for i, j in tiles)
    result = first = next(parts)
    if len(tiles) > 1:
        result = first.new_empty(first.shape[:-2] + rows.shape[::2])
        for (i, j), part in zip(tiles, itertools.chain([first], parts), strict=True):
            result[..., i, j] = part  # many small tensors that stay would scatter the large ones over memory
    return result.reshape(result.shape[:-2] + row_shape(input))


def _tiles(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the positions, of at most a chunk of elements where K allows."""
    count, num_classes, positions = rows.shape
    chunk = CHUNK.get(rows.device.type, CHUNK["other"])
    width = max(min(chunk // num_classes, positions), 1)
    height = max(chunk // (num_classes * width), 1) if width == positions else 1
    for i in range(0, max(count, 1), height):
        for j in range(0, max(positions, 1), width):
            yield slice(i, i + height), slice(j, j + width)
