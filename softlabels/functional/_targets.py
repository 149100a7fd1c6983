"""Labels as class probabilities, for the functions that build soft labels."""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels import kernels
from softlabels.functional import _checks
from softlabels.functional._rows import check_labels


def label_probabilities(target: Tensor, num_classes: int) -> Tensor:
    """Class indices as one-hot float32 probabilities with the class dimension at 1; probabilities as they are."""
    _checks.check_tensor("target", target)
    _checks.check_classes(num_classes)
    if target.is_floating_point():
        class_dim = 0 if target.dim() == 1 else 1
        if target.dim() == 0 or target.shape[class_dim] != num_classes:
            raise ValueError(
                f"target must be class indices or probabilities with {num_classes} classes in dimension "
                f"{class_dim}, got shape {tuple(target.shape)}"
            )
        return target.to(kernels.working_dtype(target))
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"target must hold class indices as torch.int64 (or uint8), got {target.dtype}")
    target = target.long()
    check_labels(target, num_classes)
    class_dim = min(target.dim(), 1)
    shape = target.shape[:class_dim] + (num_classes,) + target.shape[class_dim:]
    one_hot = torch.zeros(shape, device=target.device)
    return one_hot.scatter(class_dim, target.unsqueeze(class_dim), 1.0)
