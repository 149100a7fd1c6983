"""Rule 2: a step is noted when it happens, and taken in when it is over.

A hook on all optimizers notes that one of a model's has stepped. Whoever looks, at the model's next training pass, or
at the average, takes the step in: then wrappers that step inside their own step, swap weights or freeze a part for a
while have finished. Several optimizers that step between two looks make one step.
"""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from softlabels.teachers.averaged_weights import local
from softlabels.teachers.hooks import Hook

HOST = "cpu"
SAMPLED, ENTRIES = 16, 64  # parameters, and entries of each, that tell whether weights have changed
PATIENCE = 4  # looks after which an average on an accelerator is asked for the first time whether it stands still

_lock = threading.Lock()
_listening: tuple[weakref.ref[Steps], ...] | None = None  # replaced, never changed: other threads may be stepping


def _listen(steps: Steps) -> None:
    """Let a model's steps be noted, through one hook for all that stays: hooks must not change while others step."""
    global _listening
    with _lock:
        if _listening is None:
            register_optimizer_step_post_hook(_note)
        _listening = (*(ref for ref in _listening or () if ref() is not None), weakref.ref(steps))


def _note(optimizer: Optimizer, *_: Any) -> None:
    for reference in _listening or ():
        steps = reference()
        if steps is not None:
            steps.note(optimizer)


class Steps:
    """What has happened to the weights of a model since somebody looked.

    Args:
        model: The model.
        optimizer: The optimizer whose steps count, or one that wraps it; None: all that own parameters of the model,
            whenever they are made; False: none.
    """

    def __init__(self, model: nn.Module, optimizer: object = None) -> None:
        if not (optimizer is None or optimizer is False or callable(getattr(optimizer, "step", None))):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; or False, if you call "
                "criterion.teacher.update() yourself"
            )
        self.loaded = False  # weights were loaded into the model
        self._only = [weakref.ref(counting) for counting in _inside(optimizer)]
        self._noted = False
        self._found_inf: Tensor | None = None  # of steps that their own GradScaler may have skipped
        self._known = optimizer is False  # whether it is known who makes the steps
        self._mine: set[int] = set()
        self._sample: list[Tensor] = []
        self._looks = 0
        for module in model.modules():
            handle = module.register_load_state_dict_post_hook(Hook(self, "_load"))  # type: ignore[no-untyped-call]
            weakref.finalize(self, handle.remove)
        if optimizer is not False:
            _listen(self)

    def note(self, optimizer: Optimizer) -> None:
        """Note a step of an optimizer, if it counts."""
        if self._only and not any(reference() is optimizer for reference in self._only):
            return
        if not self._only and not _owns(optimizer, self._mine):
            return
        found_inf = getattr(optimizer, "found_inf", None)
        self._known, self._sample = True, []
        if found_inf is None:
            self._noted = True
        else:
            self._found_inf = found_inf if self._found_inf is None else torch.minimum(self._found_inf, found_inf)

    def taken(self, parameters: dict[str, nn.Parameter], passing: bool) -> bool:
        """Whether there was a step since the last look, which this is; ``passing``: in a training pass.

        A step that a GradScaler skips is no step: either the optimizer is not called at all, or, if it does its own
        unscaling, it is called with ``found_inf`` set. (Reading that flag is the one place where an accelerator is
        waited for: fused optimizers under a GradScaler.) Where nobody's steps are known, changed weights are a step.
        """
        found_inf, noted = self._found_inf, self._noted
        self.clear()
        self._mine = {id(parameter) for parameter in parameters.values()}
        if noted or (found_inf is not None and not bool(found_inf)):
            return True
        if self._known or not (passing or self._sample):
            return False
        return self._changed([p for p in parameters.values() if p.requires_grad])

    def clear(self) -> None:
        """Forget what was noted."""
        self._found_inf, self._noted = None, False

    def restart(self) -> None:
        """Forget all that happened: the average begins anew, or has been loaded."""
        self.clear()
        self.loaded = False
        self._sample = []

    def _changed(self, parameters: list[nn.Parameter]) -> bool:
        """Whether a sample of the weights has changed, of which no optimizer is known.

        Raises:
            RuntimeError: they have, and to see each change the device would have to be waited for.
        """
        self._looks += 1
        here = all(parameter.device.type == HOST for parameter in parameters)
        if not here and (self._looks < PATIENCE or self._looks & (self._looks - 1)):  # asked at 4, 8, 16, ... looks
            return False
        chosen = parameters[:: max(len(parameters) // SAMPLED, 1)] + parameters[-1:]
        before, self._sample = self._sample, [_entries(parameter) for parameter in chosen]
        if [(t.shape, t.dtype, t.device) for t in before] != [(t.shape, t.dtype, t.device) for t in self._sample]:
            return False
        if all(t.is_meta or torch.equal(t, u) for t, u in zip(before, self._sample, strict=True)):
            return False
        if _is_owned(self._mine):
            self._known = True  # the weights were changed in the middle of a step, as by SAM, or by hand
            return False
        if here:
            return True
        raise RuntimeError(
            "the weights of the attached model change, but no step of a torch.optim.Optimizer that owns them was seen, "
            "so its average stands still; call attach(model, optimizer=False) and criterion.teacher.update() after "
            "each step"
        )

    def _load(self, module: nn.Module, *_: Any) -> None:
        self.loaded = True


def _entries(parameter: nn.Parameter) -> Tensor:
    values = local(parameter.detach()).flatten()
    return values[:: max(len(values) // ENTRIES, 1)].clone()


def _owns(optimizer: Optimizer, mine: set[int]) -> bool:
    return any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"])


def _is_owned(mine: set[int]) -> bool:
    """Whether there is an optimizer of these parameters that has not stepped yet. Slow: looks at all objects."""
    optimizers = [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]
    return any(_owns(optimizer, mine) for optimizer in optimizers if hasattr(optimizer, "param_groups"))


def _inside(optimizer: object) -> list[Optimizer]:
    """An optimizer and those that it wraps: a wrapper need not have hooks of its own."""
    found = [optimizer]
    for thing in found:
        for value in getattr(thing, "__dict__", {}).values():
            if isinstance(value, Optimizer) and not any(value is other for other in found):
                found.append(value)
    return [thing for thing in found if isinstance(thing, Optimizer)]
