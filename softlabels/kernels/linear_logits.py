"""Logits that are a linear layer's, before its product is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


@dataclass(eq=False, repr=False)
class LinearLogits:
    r"""Logits $h W^\top + b$ that are never computed as a whole: for vocabularies that do not fit.

    It stands wherever a loss takes logits: as ``input``, as ``teacher_logits``, and as what an attached model returns.
    The loss works on some rows at a time: their logits, value and gradient, and two products that carry the gradient
    on. With ``reduction="mean"`` or ``"sum"`` that happens in the forward pass, which keeps the gradients of
    ``hidden``, ``weight`` and ``bias``; the backward pass multiplies them. With ``"none"`` it computes the blocks
    again. Without grad nothing is kept. Rows of ``ignore_index`` or of ``sample_weight`` 0 are never computed; to leave
    them out, an accelerator waits once.

    Rows are the leading dimensions of ``hidden``: there is no class dimension, and targets, sample weights and
    confidences have the shape of the leading dimensions. Targets are class indices.

    Half precision: logits are rounded to the dtype of ``hidden``, as torch's own layer does, and worked on in float32;
    the gradients of weight and bias are summed in float32. Made under autocast, its tensors are cast as a layer's.

    All logits are computed at once, as a plain layer would, where somebody differentiates twice
    (``create_graph=True``), under torch.func and forward-mode differentiation, and where ``sample_weight`` or class
    weights want a gradient. ``torch.compile`` breaks the graph at the loss.

    Args:
        hidden: Input of the layer, (..., D), any floating dtype.
        weight: (K, D), in the dtype of ``hidden``.
        bias: (K,), or None.
        block: How many rows are worked on together; None chooses by K and the device: 4 million logits on a CPU, 64
            million elsewhere, and no fewer than 256 rows.

    Raises:
        ValueError: shapes do not match, or ``block`` is no whole number of at least 1.
        TypeError: something is no tensor, is sharded (a DTensor), or of another dtype or device.

    Example:
        >>> import torch, softlabels
        >>> body, head = torch.nn.Embedding(100, 16), torch.nn.Linear(16, 100)
        >>> tokens = torch.randint(100, (4, 9))
        >>> logits = softlabels.LinearLogits(body(tokens[:, :-1]), head.weight, head.bias)
        >>> logits
        LinearLogits(hidden=(4, 8, 16), weight=(100, 16), bias=(100,), dtype=torch.float32)
        >>> softlabels.BetaSmoothingLoss(ranking="batch")(logits, tokens[:, 1:]).backward()

    Reference:
        The closed form is that of every loss here. Working through a linear layer and its loss in blocks: Wijmans et
        al., *Cut Your Losses in Large-Vocabulary Language Models*, 2024; Hsu et al., *Liger Kernel*, 2024.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        given = {name: tensor for name, tensor in named.items() if name != "bias" or tensor is not None}
        for name, tensor in given.items():
            _check_tensor(name, tensor)
        if self.weight.dim() != 2 or self.hidden.dim() == 0 or self.hidden.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"hidden must have shape (..., D) and weight shape (K, D), got {tuple(self.hidden.shape)} and "
                f"{tuple(self.weight.shape)}"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"bias must have shape {tuple(self.weight.shape[:1])}, got {tuple(self.bias.shape)}")
        if self.block is not None and (type(self.block) is not int or self.block < 1):
            raise ValueError(f"block must be an int of at least 1, or None, got {self.block!r}")
        kind = self.hidden.device.type
        if torch.is_autocast_enabled(kind) and self.hidden.dtype != torch.float64:
            cast = torch.get_autocast_dtype(kind)
            self.hidden, self.weight = self.hidden.to(cast), self.weight.to(cast)
            self.bias = None if self.bias is None else self.bias.to(cast)
        # Views: a parameter may be given other values later, and DistributedDataParallel sees what has a graph.
        self.weight = self.weight.view_as(self.weight)
        self.bias = None if self.bias is None else self.bias.view_as(self.bias)
        for name, tensor in {"weight": self.weight, "bias": self.bias}.items():
            if tensor is not None and tensor.dtype != self.hidden.dtype:
                raise TypeError(
                    f"{name} must have the dtype of hidden, {self.hidden.dtype}, got {tensor.dtype}; cast one of them, "
                    "or make LinearLogits inside of torch.autocast"
                )
            if tensor is not None and tensor.device != self.hidden.device:
                raise TypeError(f"{name} is on {tensor.device} but hidden is on {self.hidden.device}; move one of them")

    @property
    def shape(self) -> torch.Size:
        """(..., K): that of the logits."""
        return self.hidden.shape[:-1] + self.weight.shape[:1]

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits."""
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        """Where the layer lies."""
        return self.hidden.device

    def dense(self) -> Tensor:
        """Compute all logits.

        Returns:
            Logits (..., K), classes last.
        """
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias)

    def numel(self) -> int:
        """How many logits these are."""
        return self.shape.numel()

    def dim(self) -> int:
        """Dimensions of the logits."""
        return self.hidden.dim()

    def to(self, device: torch.device) -> LinearLogits:
        """The same on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return self._of(self.hidden.to(device), self.weight.to(device), bias)

    def detach(self) -> LinearLogits:
        """The same without a graph.

        Returns:
            LinearLogits of the detached tensors.
        """
        return self._of(self.hidden.detach(), self.weight.detach(), None if self.bias is None else self.bias.detach())

    def flat(self) -> LinearLogits:
        """The same with one dimension of rows: hidden (N, D)."""
        return self._of(self.hidden.reshape(-1, self.hidden.shape[-1]), self.weight, self.bias)

    def _of(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LinearLogits:
        return rebuilt((hidden, weight, bias), self.block)

    def __repr__(self) -> str:
        bias = "" if self.bias is None else f", bias={tuple(self.bias.shape)}"
        block = "" if self.block is None else f", block={self.block}"
        shapes = f"hidden={tuple(self.hidden.shape)}, weight={tuple(self.weight.shape)}{bias}{block}"
        return f"LinearLogits({shapes}, dtype={self.dtype})"


def rebuilt(parts: Any, block: int | None) -> LinearLogits:
    """LinearLogits of parts that were checked before, or that stand for tensors."""
    new = object.__new__(LinearLogits)
    (new.hidden, new.weight, new.bias), new.block = parts, block
    return new


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor, and LinearLogits takes plain tensors: pass {name}.full_tensor() for a layer that is "
            "sharded over classes; with FSDP2, make LinearLogits in the forward pass of the module that owns the layer"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, got {tensor.dtype}")


# What wraps models (FSDP2, DistributedDataParallel) finds the tensors in what they return.
_pytree.register_pytree_node(
    LinearLogits, lambda logits: ([logits.hidden, logits.weight, logits.bias], logits.block), rebuilt
)
