"""The scripts of docs/recipes run as they are written, learn their task, and resume where they say so."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import runpy
import sys
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "recipes"
FRAMEWORKS = {
    "huggingface_trainer": "transformers",
    "language_model": "transformers",
    "offline_teacher": "safetensors",
    "lightning_module": "lightning",
    "accelerate_loop": "accelerate",
    "skorch_classifier": "skorch",
}
LEAST_ACCURACY = {  # chance is 0.1, in huggingface_trainer 0.25; in segmentation, all background is 0.67
    "accelerate_loop": 0.85,
    "born_again": 0.85,
    "compiled_step": 0.85,
    "ddp": 0.85,
    "export_average": 0.85,
    "fsdp2": 0.85,
    "fsdp2_linear_logits": 0.85,
    "huggingface_trainer": 0.5,
    "language_model": 0.2,
    "lightning_module": 0.85,
    "mixup": 0.9,
    "offline_teacher": 0.2,
    "plain_pytorch": 0.85,
    "segmentation": 0.8,
    "skorch_classifier": 0.85,
    "token_classification": 0.8,
}
RESUMED = {  # epochs before and after; where the state of the random numbers is saved, the result is the same
    "huggingface_trainer": (1, 2, "--out=runs/uninterrupted"),
    "lightning_module": (3, 6, None),  # Lightning does not save the state of torch's generator
    "plain_pytorch": (3, 6, "--checkpoint=uninterrupted.pt"),
}


def run(name, folder, *options):
    """The last line that a script prints, run as it is in a process of its own, or in two."""
    needed = FRAMEWORKS.get(name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed; the extra recipes has it")
    if name in ("ddp", "fsdp2", "fsdp2_linear_logits"):
        return processes.both(printed, name, folder, options)[0]
    return processes.call(printed, name, folder, options)


def printed(name, folder, options):
    os.chdir(folder)
    script = str(FOLDER / f"{name}.py")
    sys.argv = [script, *options]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(script, run_name="__main__")
    return (out.getvalue().splitlines() or [""])[-1]


def test_every_recipe_is_tested_and_on_the_page():
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts == set(LEAST_ACCURACY)
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert set(re.findall(r'--8<-- "docs/recipes/(\w+)\.py"', page)) == scripts


@pytest.mark.parametrize("name", sorted(set(LEAST_ACCURACY) - set(RESUMED)))
def test_recipe_learns(name, tmp_path):
    assert float(run(name, tmp_path).split()[-1]) > LEAST_ACCURACY[name]


@pytest.mark.parametrize("name", RESUMED)
def test_recipe_learns_and_resumes(name, tmp_path):
    before, after, elsewhere = RESUMED[name]
    first = run(name, tmp_path, f"--epochs={before}")
    second = run(name, tmp_path, f"--epochs={after}")
    assert float(second.split()[-1]) > LEAST_ACCURACY[name]
    assert first != second
    if elsewhere is not None:
        assert run(name, tmp_path, f"--epochs={after}", elsewhere) == second
