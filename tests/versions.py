"""What depends on the version of torch."""

from __future__ import annotations

import pytest

from softlabels.kernels.compiled import OLDEST_TORCH
from softlabels.kernels.reading import TORCH

whole_graph = pytest.mark.skipif(TORCH < OLDEST_TORCH, reason="older compilers break the graph in the loss")
