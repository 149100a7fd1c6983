"""The step clock: one tick per real optimizer step, however the training loop is written."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


class StepClock:
    """Calls ``tick`` after each round of optimizer steps of a model.

    With an ``optimizer``, a round is one step of it. Without, every optimizer that owns parameters of the model
    counts, whenever it was made, and a round ends as soon as (1) the optimizers that stepped own all of the model's
    trainable parameters, or (2) one of them is about to step again, or (3) [`flush`][] is called because somebody
    wants to see the average. So two optimizers that own half of the model each make one round.

    An optimizer that wraps others and steps them in its own step counts once. A step that a GradScaler skips is no
    step: either the optimizer is not called at all, or, if it does its own unscaling, it is called with ``found_inf``
    set. (Reading that flag is the one place where an accelerator is waited for: fused optimizers under a GradScaler.)

    The clock listens as long as it is referenced.
    """

    def __init__(self, model: nn.Module, tick: Callable[[], None], optimizer: Optimizer | None) -> None:
        self._model = weakref.ref(model)
        self._tick = tick
        self._pending: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._running: list[weakref.ref[Optimizer]] = []  # steps begun and not ended: wrappers step optimizers inside
        self._only = optimizer is not None
        myself = weakref.ref(self)

        def before(opt: Optimizer, *_: Any) -> None:
            clock = myself()
            if clock is not None:
                clock._steps(opt)

        def after(opt: Optimizer, *_: Any) -> None:
            clock = myself()
            if clock is not None:
                clock._stepped(opt)

        if optimizer is not None:
            self._handles = [optimizer.register_step_post_hook(after)]
        else:
            self._handles = [
                register_optimizer_step_pre_hook(before),
                register_optimizer_step_post_hook(after),
            ]
        for handle in self._handles:
            weakref.finalize(self, handle.remove)

    def flush(self) -> None:
        """End the round if any optimizer has stepped in it."""
        if self._pending:
            self._pending.clear()
            self._tick()

    def clear(self) -> None:
        """Forget the steps of the round."""
        self._pending.clear()

    def _steps(self, optimizer: Optimizer) -> None:
        self._leave(optimizer)  # it is there already only if its last step raised
        if not self._running and optimizer in self._pending:
            self.flush()
        self._running.append(weakref.ref(optimizer))

    def _leave(self, optimizer: Optimizer) -> None:
        """Drop an optimizer, and those that it stepped inside, from the running ones."""
        for depth, running in enumerate(self._running):
            if running() is optimizer:
                del self._running[depth:]
                return

    def _stepped(self, optimizer: Optimizer) -> None:
        self._leave(optimizer)
        model = self._model()
        found_inf = getattr(optimizer, "found_inf", None)
        if model is None or (found_inf is not None and bool(found_inf)):
            return
        if self._only:
            self._tick()
            return
        if not _owned(optimizer).isdisjoint(id(p) for p in model.parameters()):
            self._pending.add(optimizer)
            if self._running:
                return  # the round ends no sooner than the step of the optimizer around this one
            owned = set().union(*(_owned(opt) for opt in self._pending))
            if all(id(p) in owned for p in model.parameters() if p.requires_grad):
                self.flush()


def _owned(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
