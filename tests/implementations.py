"""Tests choose the implementation of the row kernels, not the size of their inputs."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from softlabels.kernels import dispatch, eager

IMPLEMENTATIONS = ("formula", "few", "closed", "blocks", "far")


@contextmanager
def implementation(name):
    """Formula: as if somebody traced. Few: without care first. The closed form in eager PyTorch: at once, in blocks of
    rows, and as if logits were far from 0."""
    with ExitStack() as stack:
        if name == "formula":
            stack.enter_context(patch.object(dispatch, "is_observed", return_value=True))
        elif name != "few":
            stack.enter_context(patch.object(dispatch, "FEW", 0))
        if name == "blocks":
            stack.enter_context(patch.multiple(eager, BLOCK=12, IN_PLACE_BLOCK=24))
        elif name == "far":
            stack.enter_context(patch.object(eager, "NEAR", -1.0))
        yield
