"""The scripts of docs/recipes run as they are written, learn their task, and resume where they say so."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "recipes"
FRAMEWORKS = {
    "huggingface_trainer": "transformers",
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
    "huggingface_trainer": 0.5,
    "lightning_module": 0.85,
    "mixup": 0.9,
    "plain_pytorch": 0.85,
    "segmentation": 0.8,
    "skorch_classifier": 0.85,
}
RESUMED = {  # epochs before and after; where the state of the random numbers is saved, the result is the same
    "huggingface_trainer": (1, 2, "--out=runs/uninterrupted"),
    "lightning_module": (3, 6, None),  # Lightning does not save the state of torch's generator
    "plain_pytorch": (3, 6, "--checkpoint=uninterrupted.pt"),
}


def run(name, folder, *options):
    needed = FRAMEWORKS.get(name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed; the extra recipes has it")
    command = [sys.executable]
    if name in ("ddp", "fsdp2"):
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command += [str(FOLDER / f"{name}.py"), *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()[-1]


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
