from __future__ import annotations

import os

import pages
import pytest
import torch
from hypothesis import settings

import softlabels

collect_ignore = ["look_at_the_site.py"]  # a command, which needs a browser

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start: the suite has two already

settings.register_profile("softlabels", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("softlabels")


@pytest.fixture(autouse=True)
def _repeatable():
    """One thread (the suite runs in several processes) and known random numbers for every test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _backend_given_back():
    """A test that leaves another backend behind would have all later ones of its process compiled."""
    before = softlabels.get_backend()
    yield
    after = softlabels.get_backend()
    softlabels.set_backend(before)
    assert after == before


def pytest_terminal_summary(terminalreporter):
    """Say what of the documentation is not run."""
    terminalreporter.write_line(pages.summary())
