"""Hooks that leave no trace: they keep nothing alive, and are not there in copies of their module."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import operator
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn


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


class Scriptable:
    """What torch.jit.script calls as ``model.__prepare_scriptable__()``: the model without hooks.

    Args:
        model: The model, not kept alive.
    """

    NAME = "__prepare_scriptable__"

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self) -> nn.Module:
        """Return a shallow copy."""
        model = self._model()
        assert model is not None
        twin = copy.copy(model)
        twin.__dict__.pop(self.NAME)
        twin.__dict__["_modules"] = dict(model._modules)
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            kept = {key: hook for key, hook in getattr(model, name).items() if not isinstance(hook, Hook)}
            twin.__dict__[name] = collections.OrderedDict(kept)
        return twin

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return functools.partial, (operator.itemgetter(0), (self._model(),))
