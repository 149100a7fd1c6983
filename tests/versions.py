"""What depends on the version of torch."""

from __future__ import annotations

import pytest

from softlabels._reading import TORCH
from softlabels.kernels.compiled import OLDEST_TORCH

whole_graph = pytest.mark.skipif(TORCH < OLDEST_TORCH, reason="older compilers break the graph in the loss")
compile_backend = pytest.mark.skipif(TORCH < OLDEST_TORCH, reason="the compile backend needs a newer torch")
fsdp2 = pytest.mark.skipif(TORCH < (2, 7), reason="FSDP2 of torch 2.6 does not run on a CPU")
