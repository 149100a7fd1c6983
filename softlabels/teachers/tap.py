"""The tap: a forward pre-hook that keeps the inputs of a training forward pass until the loss asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class AutocastState(NamedTuple):
    """Autocast of one device type."""

    device_type: str
    enabled: bool
    dtype: torch.dtype


class Captured(NamedTuple):
    """One forward pass: its inputs, and the autocast state that it ran under."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[AutocastState, ...]
    versions: tuple[int, ...]
    passes: int  # training passes since inputs were last handed over
    logits: Tensor | None  # what the model made of them, without its graph; shares their storage

    def changed(self) -> bool:
        """Whether any input has been written to since the pass began."""
        return bool(self.versions) and self.versions != _versions((self.args, self.kwargs))

    @contextmanager
    def autocast_state(self) -> Iterator[None]:
        """Restore the autocast state of the pass."""
        with ExitStack() as stack:
            for device_type, enabled, dtype in self.autocast:
                if enabled or torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled))
            yield


class _Hook:
    """A hook that does not follow its module into copies and pickles."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inactive_tap

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inactive, ()


class InputTap(_Hook):
    """Callable for ``register_forward_pre_hook(..., with_kwargs=True)`` that keeps the latest training inputs.

    A pass counts if the module is in training mode and grad is enabled. In a copy or a pickle of the model the hook
    is inactive: it keeps nothing and knows no loss.

    Args:
        select: Picks the logits out of what the model returns; None: do not look at them.
    """

    def __init__(self, select: Callable[[Any], Tensor | None] | None = None) -> None:
        self._captured: Captured | None = None
        self._select = select

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the inputs of a training pass."""
        if module.training and torch.is_grad_enabled():
            passes = 1 if self._captured is None else self._captured.passes + 1
            self._captured = Captured(args, kwargs, _autocast_states(), _versions((args, kwargs)), passes, None)

    def note_logits(self, module: nn.Module, output: Any) -> None:
        """Remember where the logits of a kept pass lie."""
        if self._captured is None or self._select is None:
            return
        if module.training and torch.is_grad_enabled():
            logits = self._select(output)
            if logits is not None:
                kept = self._captured  # spelled out: torch.compile of torch 2.11 cannot trace _replace
                self._captured = Captured(
                    kept.args, kept.kwargs, kept.autocast, kept.versions, kept.passes, logits.detach()
                )

    def take(self) -> Captured | None:
        """Hand the inputs over and forget them."""
        captured, self._captured = self._captured, None
        return captured


class AfterPass(_Hook):
    """Callable for ``register_forward_hook`` that shows a tap what the pass returned."""

    def __init__(self, tap: InputTap) -> None:
        self._tap = tap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note the logits."""
        self._tap.note_logits(module, output)


def inactive_tap(*_: Any) -> None:
    """Do nothing: what the hooks of a tap become in a copy of its model."""


def _make_inactive() -> Callable[..., None]:
    return inactive_tap


def remove_taps(model: nn.Module) -> None:
    """Remove the inactive taps that a copied model carries."""
    for module in model.modules():
        for hooks, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key, hook in list(hooks.items()):
                if hook is inactive_tap:
                    del hooks[key]
                    flags.pop(key, None)


def _autocast_states() -> tuple[AutocastState, ...]:
    accelerator = torch.accelerator.current_accelerator()
    types = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return tuple(AutocastState(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types)


def tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def _versions(value: Any) -> tuple[int, ...]:
    """In-place write counters of the inputs; none where tensors have no counter (tracing, inference mode)."""
    if torch.compiler.is_compiling():
        return ()
    return tuple(t._version for t in tensors(value) if not t.is_inference())
