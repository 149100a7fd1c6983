"""Argument checks of all floors.

Every message names the argument, what it was, and what would be right. No check makes an accelerator wait: the numbers
in a tensor are looked at where reading them is free. Where torch's own cross-entropy raises, the exception has the same
type.
"""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Protocol

import torch
from torch import Tensor

from softlabels._reading import can_check, can_read, check_when_run, peek

REDUCTIONS = ("none", "mean", "sum")


class Logits(Protocol):
    """A tensor, or what stands for one."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...


def check_reduction(value: object) -> str:
    """``reduction`` is one that torch knows."""
    if not isinstance(value, str) or value not in REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {value!r}")
    return value


def check_ignore_index(value: object) -> int:
    """``ignore_index`` is a whole number."""
    if type(value) is not int and (not isinstance(value, numbers.Integral) or isinstance(value, bool)):
        raise TypeError(f"ignore_index must be an int, got {value!r}")
    return int(value)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> object:
    """A string option is one of its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> float:
    """A number option lies in its interval, whose ends belong to it unless they are open; the number."""
    if type(value) is float and low < value < high:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    above = number > low if low_open else number >= low
    below = number < high if high_open else number <= high
    if not (above and below):
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise ValueError(f"{name} must be in {left}{low:g}, {high:g}{right}, got {number!r}")
    return number


def check_flag(name: str, value: object) -> bool:
    """An option is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_positive(name: str, value: object, *, infinite: bool = False) -> float:
    """A number option is greater than 0, and finite unless ``infinite``."""
    return check_number(name, value, low=0.0, low_open=True, high_open=not infinite)


def check_non_negative(name: str, value: object) -> float:
    """A number option is finite and not negative."""
    return check_number(name, value, low=0.0, high_open=True)


def check_fraction(name: str, value: object) -> float:
    """A number option lies in [0, 1]."""
    return check_number(name, value, low=0.0, high=1.0)


def check_count(name: str, value: object) -> None:
    """An option is a whole number of at least 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def check_classes(num_classes: object, at_least: int = 1) -> None:
    """``num_classes`` is a whole number of classes."""
    if not isinstance(num_classes, numbers.Integral) or isinstance(num_classes, bool) or int(num_classes) < at_least:
        raise ValueError(f"num_classes must be an int of at least {at_least}, got {num_classes!r}")


def check_tensor(name: str, value: object) -> None:
    """An argument is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if type(value) is not Tensor and hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor, and plain tensors are wanted: sharded over the batch, pass {name}.to_local(), with "
            f"the rows of this process in all arguments; sharded over classes, pass {name}.full_tensor()"
        )


def check_class_weight(weight: Tensor | None, num_classes: int | None = None) -> None:
    """Class weights are a floating (K,) tensor."""
    if weight is None:
        return
    check_tensor("weight", weight)
    if not weight.is_floating_point():
        raise RuntimeError(f"weight must be of a floating dtype, got {weight.dtype}")
    if weight.dim() != 1 or num_classes not in (None, weight.shape[0]):
        wanted = "one weight per class, shape (K,)" if num_classes is None else f"shape ({num_classes},)"
        raise RuntimeError(f"weight must have {wanted}, got shape {tuple(weight.shape)}")


def check_device(name: str, value: Logits, input: Logits) -> None:
    """A tensor argument lies where the logits lie."""
    if value.device != input.device:
        raise RuntimeError(f"{name} is on {value.device} but input is on {input.device}; move one of them")


def check_like_rows(name: str, value: Tensor, input: Logits, row_shape: torch.Size) -> None:
    """A row-shaped argument (sample_weight, confidence) is a real tensor with one number per row."""
    check_tensor(name, value)
    check_device(name, value, input)
    if value.shape != row_shape:
        raise ValueError(
            f"{name} must have one value per row, shape {tuple(row_shape)} for input of shape "
            f"{tuple(input.shape)}, got shape {tuple(value.shape)}"
        )
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {value.dtype}")


def check_like_logits(name: str, value: Tensor, input: Logits) -> None:
    """A floating tensor (teacher_logits, spread) is shaped like the logits."""
    check_tensor(name, value)
    check_device(name, value, input)
    if value.shape != input.shape:
        raise ValueError(f"{name} must have the shape of input, {tuple(input.shape)}, got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, got {value.dtype}")


def check_input(input: Tensor, name: str = "input") -> None:
    """Logits are a floating tensor of shape (K), (N, K) or (N, K, d1, ...)."""
    check_tensor(name, input)
    if input.dim() == 0:
        raise RuntimeError(f"{name} must have shape (K), (N, K) or (N, K, d1, ...), got a scalar")
    if not input.is_floating_point():
        raise NotImplementedError(f"{name} must be logits of a floating dtype, got {input.dtype}")


def check_target(input: Tensor, target: Tensor, ignore_index: int) -> None:
    """The target holds class indices per row, or class probabilities in the shape of the logits."""
    check_tensor("target", target)
    check_device("target", target, input)
    if target.dtype == torch.int64 and input.dim() == 2 and target.dim() == 1 and target.shape[0] == input.shape[0]:
        return  # without the messages below, as almost always
    shapes = f"for input of shape {tuple(input.shape)}, got shape {tuple(target.shape)}"
    if target.shape == input.shape:
        if not target.is_floating_point():
            raise RuntimeError(
                f"a target of the shape of input, {tuple(input.shape)}, holds class probabilities and must be of a "
                f"floating dtype, got {target.dtype}; class indices have no class dimension"
            )
        if ignore_index >= 0:
            raise RuntimeError(
                f"ignore_index={ignore_index} has no meaning for class probabilities or counts; use sample_weight to "
                "leave rows out"
            )
        return
    if input.dim() == 1:
        if target.dim() == 1 and target.shape[0] != 1:
            raise ValueError(f"target must be one class index, shape (), {shapes}")
        if target.dim() > 1:
            raise RuntimeError(f"target must be one class index, shape (), {shapes}")
    else:
        rows = input.shape[:1] + input.shape[2:]
        if target.dim() == 0 or target.shape[0] != rows[0]:
            raise ValueError(f"target must have batch size {input.shape[0]}, shape {tuple(rows)}, {shapes}")
        if target.shape != rows:
            raise RuntimeError(
                f"target must be class indices of shape {tuple(rows)} or class probabilities of the shape of "
                f"input, {shapes}"
            )
    check_index_dtype(target)


def check_index_dtype(target: Tensor) -> None:
    """Class indices are of a dtype that torch takes."""
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"target must hold class indices as torch.int64 (or uint8), got {target.dtype}")


def check_labels(target: Tensor, num_classes: int, alternative: str = "") -> None:
    """Raise an IndexError for labels outside [0, num_classes), where reading them costs nothing."""
    if not can_check(target):
        return
    valid = (target >= 0) & (target < num_classes)
    all_valid = valid.all()
    wanted = f"target must hold class indices in [0, {num_classes}){alternative}"
    if peek(all_valid) is False:
        raise IndexError(f"{wanted}, got {target[~valid][0].item()}")
    check_when_run(all_valid, wanted)


def check_counts(counts: Tensor) -> None:
    """Raise a ValueError for label counts below 0, where reading them costs nothing."""
    if not can_read(counts):
        return
    valid = counts >= 0
    wanted = "target must hold label counts of at least 0 (sample_weight=0 leaves a row out)"
    if not bool(valid.all()):
        negative = counts[~valid & ~counts.isnan()]
        if negative.numel():
            raise ValueError(f"{wanted}, got {negative[0].item():g}")


def check_spread(spread: Tensor) -> None:
    """Raise a ValueError for a spread with numbers below 0, where reading them costs nothing."""
    if peek((spread < 0).any()):
        raise ValueError(f"spread must hold numbers of at least 0, got {spread.min().item():g}")


def warn_of_probabilities(teacher_logits: Tensor) -> None:
    """Warn of probabilities in the place of logits, where looking is free: one number tells nearly always."""
    if teacher_logits.numel() == 0 or teacher_logits.shape[1] == 1 or not can_read(teacher_logits):
        return
    if not 0.0 <= teacher_logits[(0,) * teacher_logits.dim()].item() <= 1.0:
        return
    sums = teacher_logits.sum(1, dtype=torch.float32)
    if bool((sums - 1.0).abs().amax() < 1e-2) and bool((teacher_logits >= 0).all()):
        warnings.warn(
            "teacher_logits look like probabilities: none is negative and each row sums to 1. Pass logits, or "
            "teacher_logits=probabilities.log(), whose softmax at temperature=1 is the probabilities",
            stacklevel=2,
        )
