"""Hooks that leave no trace: they keep nothing alive, and are not there in copies of their module."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import operator
import sys
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

HELD = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


class Hook:
    """Calls a method of an object for as long as the object is alive.

    In a copy or a pickle of the module that it hangs on, a method of the standard library that does nothing stands in
    its place: to load the module takes no softlabels.
    """

    def __init__(self, target: object, method: str) -> None:
        self._target, self._method = weakref.ref(target), method

    def __call__(self, *args: Any) -> None:
        """Call the method, whose result counts for nothing."""
        target = self._target()
        if target is not None:
            getattr(target, self._method)(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (contextlib.nullcontext(), "__exit__")


def hang(target: object, method: str, register: Callable[..., Any], **options: Any) -> weakref.finalize[..., Any]:
    """Register a hook that goes when its target goes, or when what is returned is called."""
    return weakref.finalize(target, register(Hook(target, method), **options).remove)


def hooks_of(model: nn.Module | None) -> list[int]:
    """The keys of the hooks of this package on a model."""
    return [key for name in HELD[:2] for key, hook in getattr(model, name).items() if isinstance(hook, Hook)]


class Scriptable:
    """What torch.jit.script calls as ``model.__prepare_scriptable__()``: the model without hooks.

    Args:
        model: The model, not kept alive.
    """

    NAME = "__prepare_scriptable__"

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self) -> nn.Module | None:
        """Return a shallow copy.

        Raises:
            RuntimeError: the model is a part of what is scripted, where torch would leave the copy in its place.
        """
        if sys._getframe(1).f_locals.get("memo"):
            raise RuntimeError(
                "a part of the module is attached to a loss, which torch.jit.script would undo; script a copy: "
                "torch.jit.script(copy.deepcopy(module))"
            )
        twin = copy.copy(self._model())
        ours = set(hooks_of(twin))
        del twin.__dict__[self.NAME]
        for name in ("_modules", *HELD):
            twin.__dict__[name] = {key: held for key, held in twin.__dict__[name].items() if key not in ours}
        return twin

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """In a copy, a function that returns the copy; to make it takes the hooks out."""
        model = self._model()
        taken = [_Taken(getattr(model, name), key) for name in HELD for key in hooks_of(model)]
        return functools.partial, (operator.itemgetter(0), (model, *taken))


class _Taken:
    """What stands in an ordered dict; in a copy it is taken out of the copied one."""

    def __init__(self, held: collections.OrderedDict[int, Any], key: int) -> None:
        self._held, self._key = held, key

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return collections.OrderedDict.pop, (self._held, self._key, None)
