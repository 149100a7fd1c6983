"""Rule 2: a step is noted when it happens, and taken in when it is over.

A hook on all optimizers notes that one of a model's has stepped. Whoever looks, at the model's next training pass, or
at the average, takes the step in: then wrappers that step inside their own step, swap weights or freeze a part for a
while have finished. Several optimizers that step between two looks make one step.
"""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from softlabels.teachers.averaged_weights import Parts, local
from softlabels.teachers.hooks import hang

HOST = "cpu"
SAMPLED, ENTRIES = 16, 64  # parameters, and entries of each, that tell whether weights have changed
PATIENCE = 4  # looks after which an average on an accelerator is asked for the first time whether it stands still

_listening: weakref.WeakValueDictionary[int, Steps] = weakref.WeakValueDictionary()


@functools.cache
def _listen() -> None:
    """Hear of all steps through one hook that stays: hooks must not change while another thread steps."""
    register_optimizer_step_post_hook(_note)


def _note(optimizer: Optimizer, *_: Any) -> None:
    for reference in _listening.valuerefs():
        steps = reference()
        if steps is not None:
            steps.note(optimizer)


class Steps:
    """What has happened to the weights of a model since somebody looked.

    Args:
        model: The model.
        optimizer: The optimizer whose steps count, or one that wraps it; None, or when it is gone: all that own
            parameters of the model, whenever they are made; False: none.
    """

    def __init__(self, model: nn.Module, optimizer: object = None) -> None:
        self._only = weakref.WeakSet(_inside(optimizer))  # and when these are gone, all
        self._known = True if optimizer is False else None  # whether an optimizer owns the weights; None: not known
        self._mine: set[int] = set()
        self._looks = 0
        self._versions: list[int] = []
        self.by_hand = False  # whether, at the last look, somebody else than an optimizer had written to the weights
        self.forget()
        for module in model.modules():
            hang(self, "_load", module.register_load_state_dict_post_hook)
        if optimizer is not False:
            _listen()
            _listening[id(self)] = self

    def forget(self, *, restored: bool = False) -> None:
        """Forget all that happened: the average begins anew, or has been loaded (``restored``)."""
        self.begun = False  # whether there was a training pass
        self._noted = self._loaded = False
        self._restored = restored  # until the next pass, weights that are loaded belong to the average
        self._found_inf: Tensor | None = None  # of steps that their own GradScaler may have skipped
        self._sample: tuple[Any, Tensor] | None = None

    def note(self, optimizer: Optimizer) -> None:
        """Note a step of an optimizer, if it counts."""
        if optimizer in self._only if self._only else _owns(optimizer, self._mine):
            self._known, self._sample = True, None
            found_inf = getattr(optimizer, "found_inf", None)
            if found_inf is None:
                self._noted = True
            else:
                self._found_inf = found_inf if self._found_inf is None else torch.minimum(self._found_inf, found_inf)

    def loaded(self) -> bool:
        """Whether weights were loaded into the model since the last look, and not the average with them."""
        loaded, self._loaded = self._loaded and not self._restored, False
        return loaded

    def taken(self, found: Parts, passing: bool) -> bool:
        """Whether there was a step since the last look, which this is; ``passing``: in a training pass.

        A step that a GradScaler skips is no step: either the optimizer is not called at all, or, if it does its own
        unscaling, it is called with ``found_inf`` set. (Reading that flag is the one place where an accelerator is
        waited for: fused optimizers under a GradScaler.) Where nobody's steps are known, changed weights are a step.
        """
        stepped = self._noted or (self._found_inf is not None and not bool(self._found_inf))
        self._noted, self._found_inf = False, None
        self._mine = {id(parameter) for parameter in found.parameters.values()}
        trained = found.trained()
        before, self._versions = self._versions, [parameter._version for parameter in trained.values()]
        self.by_hand = not stepped and before != self._versions
        if not (stepped or self._known) and (passing or self._sample is not None):
            stepped = self._changed(trained)
        self._restored = self._restored and not (passing or stepped)
        return stepped

    def _changed(self, trained: dict[str, nn.Parameter]) -> bool:
        """Whether a sample of the weights has changed, of which no optimizer is known.

        Raises:
            RuntimeError: they have, and to see each change the device would have to be waited for.
        """
        self._looks += 1
        here = all(parameter.device.type == HOST for parameter in trained.values())
        if not trained or (not here and (self._looks < PATIENCE or self._looks & (self._looks - 1))):  # 4, 8, 16, ...
            return False
        names = [*list(trained)[:: max(len(trained) // SAMPLED, 1)], *list(trained)[-1:]]
        entries = torch.cat([_entries(trained[name]).to(trained[names[0]].device) for name in names])
        kind = (names, entries.shape, entries.dtype, entries.device)
        before, self._sample = self._sample, (kind, entries)
        if before is None or before[0] != kind or entries.is_meta or torch.equal(before[1], entries):
            return False
        if self._known is None:
            self._known = _is_owned(self._mine)  # and then they were changed in the middle of a step, as by SAM
        if not (self._known or here):
            raise RuntimeError(
                "the weights of the attached model change, but no step of a torch.optim.Optimizer that owns them was "
                "seen, so its average stands still; call attach(model, optimizer=False) and criterion.teacher.update() "
                "after each step"
            )
        return not self._known

    def _load(self, *_: Any) -> None:
        self._loaded = True


def _entries(parameter: nn.Parameter) -> Tensor:
    values = local(parameter.detach()).flatten()
    return values[:: max(len(values) // ENTRIES, 1)]


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
