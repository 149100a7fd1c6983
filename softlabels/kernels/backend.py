"""Which implementation of the row kernels runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("auto", "eager", "compile")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_backend = _checked(os.environ.get("SOFTLABELS_BACKEND", "auto"), "the environment variable SOFTLABELS_BACKEND")


def get_backend() -> str:
    """Return the name of the backend in force.

    Returns:
        ``"auto"``, ``"eager"`` or ``"compile"``; see [`set_backend`][softlabels.set_backend].

    Example:
        >>> import softlabels
        >>> softlabels.get_backend()
        'auto'
    """
    return _backend


def set_backend(name: str) -> None:
    """Choose the implementation of the row kernels for the whole process.

    Args:
        name: ``"eager"`` runs plain PyTorch operations. ``"compile"`` runs graphs made by torch.compile, which needs a
            C++ compiler for a CPU and Triton for a GPU; the first call with each number of classes, dtype and set of
            options takes seconds. On a CPU, batches of at most 65,536 logits are not compiled: to start a graph takes
            longer than to work on them. ``"auto"`` (the default) compiles on a GPU and not on a CPU, and where
            compiling fails warns once and goes on uncompiled. The environment variable ``SOFTLABELS_BACKEND`` sets the
            same choice before the program starts.

    Inside a torch.compile region of your own, under vmap and the other transforms of torch.func, for
    ``create_graph=True``, and where a gradient to anything but the logits is asked for, all backends run the same plain
    formula.

    Raises:
        ValueError: ``name`` is not a backend.
        RuntimeError: later, when a loss is to be compiled for the first time, if ``"compile"`` was asked for and cannot
            work here.

    Example:
        >>> import softlabels
        >>> softlabels.set_backend("eager")
        >>> softlabels.set_backend("auto")
    """
    global _backend
    _backend = _checked(name, "name")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend inside a ``with`` block.

    Args:
        name: As in [`set_backend`][softlabels.set_backend].

    Raises:
        ValueError: ``name`` is not a backend.

    Example:
        >>> import softlabels
        >>> with softlabels.backend("eager"):
        ...     softlabels.get_backend()
        'eager'
    """
    previous = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)
