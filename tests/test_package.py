"""What is installed, what is public, and what importing it costs."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pages
import pytest
import yaml

import softlabels
from softlabels import functional, metrics, plotting, tuning

ROOT = Path(__file__).parent.parent
EXTRAS = (
    "torchmetrics",
    "scipy.optimize",
    "scipy.special",
    "matplotlib",
    "sklearn",
    "tqdm",
    "mkdocs",
    "hypothesis",
    "distributed",
)
PUBLIC = [
    (module, name)
    for module in (softlabels, functional, metrics, plotting, tuning)
    for name in module.__all__
    if not name.startswith("_") and not inspect.ismodule(getattr(module, name))
]


def imported_by(code):
    script = f"{code}; import sys; print(*sorted(sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_import_needs_no_extra():
    added = imported_by("import torch, softlabels") - imported_by("import torch")
    assert added.isdisjoint(EXTRAS)
    assert "softlabels.losses" in added
    assert "hypothesis" in imported_by("import torch, hypothesis")  # the probe can fail


def test_all_is_complete_and_sorted():
    for module in (softlabels, functional, metrics, plotting, tuning):
        assert sorted(module.__all__) == sorted(set(module.__all__))
        for name in module.__all__:
            assert getattr(module, name) is not None


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda v: getattr(v, "__name__", v))
def test_public_names_are_documented(module, name):
    thing = getattr(module, name)
    doc = inspect.getdoc(thing)
    assert ">>>" in doc
    assert "Reference:" in doc or name in ("backend", "get_backend", "set_backend")  # no science in these
    check_parameters(thing, name)


def methods_on_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text()
    for name, members in re.findall(
        r"^::: (softlabels[\w.]+)\n    options: {members: \[([\w, ]+)\]", page, re.MULTILINE
    ):
        module, _, last = name.rpartition(".")
        thing = getattr(importlib.import_module(module), last)
        yield from ((getattr(thing, member), f"{name}.{member}") for member in members.split(", "))


@pytest.mark.parametrize(("thing", "name"), [*methods_on_the_api_page()], ids=lambda v: v if isinstance(v, str) else "")
def test_public_methods_are_documented(thing, name):
    if not isinstance(thing, property):
        check_parameters(thing, name)


def check_parameters(thing, name):
    doc = inspect.getdoc(thing)
    assert doc, name
    for parameter in inspect.signature(thing).parameters:
        assert parameter == "self" or f"{parameter}:" in doc, f"{name} does not document {parameter}"


def test_signatures_are_the_documented_ones():
    """The order and defaults that DESIGN promises: replacing nn.CrossEntropyLoss is changing the name."""
    for name in ("BetaSmoothingLoss", "SelfDistillationLoss", "PrunedDistillationLoss", "InstanceDirichletMAPLoss"):
        parameters = list(inspect.signature(getattr(softlabels, name)).parameters.values())
        assert parameters[0].name == "weight"
        assert parameters[0].default is None
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters[1:])
        assert [p.name for p in parameters[-2:]] == ["ignore_index", "reduction"]
    assert str(inspect.signature(softlabels.BetaSmoothingLoss)).startswith(
        "(weight: 'Tensor | None' = None, *, label_smoothing: 'float' = 0.15, alpha: 'float' = 0.4, "
        "concentration: 'float | None' = None, ranking: 'str' = 'ema', rank_by: 'str' = 'max', "
        "ema_decay: 'float' = 0.999, num_samples: 'int | None' = None, global_ranking: 'bool' = False, "
        "generator: 'torch.Generator | None' = None"
    )


def test_layers_import_downwards_only():
    order = ["kernels", "functional", "ranking", "metrics", "tuning", "teachers", "losses"]
    for i, layer in enumerate(order):
        for path in (ROOT / "softlabels").rglob("*.py"):
            if layer not in (path.stem, path.parent.name):
                continue
            text = path.read_text()
            for higher in order[i + 1 :]:
                assert f"from softlabels.{higher}" not in text, f"{path} imports {higher}"
                assert f"from softlabels import {higher}" not in text, f"{path} imports {higher}"


def test_version_is_in_one_place():
    metadata = importlib.import_module("importlib.metadata")
    assert metadata.version("softlabels") == softlabels.__version__
    assert f"version: {softlabels.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"[{softlabels.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_renders_as_on_an_index_of_packages():
    readme_renderer = pytest.importorskip("readme_renderer.markdown", reason="readme-renderer[md] is in the extra dev")
    page = readme_renderer.render((ROOT / "README.md").read_text())
    assert page is not None
    for element in ("<h1", "<table>", "<pre", '<a href="https://arxiv.org/abs/2006.05065"'):
        assert element in page
    assert "|---" not in page  # a table that was not understood


def test_github_runs_the_same_ci():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1]["run"] == ".ci/run"
    assert job["timeout-minutes"] <= 90


def test_citation_is_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the schema requires
    assert citation["preferred-citation"]["title"] == "Self-Distillation as Instance-Specific Label Smoothing"


def test_wheel_holds_the_package_and_nothing_else_and_runs_the_readme(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"softlabels", f"softlabels-{softlabels.__version__}.dist-info"}
    assert "softlabels/py.typed" in names
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "softlabels").rglob("*.py")}
    assert sources <= set(names)

    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import softlabels\nprint(softlabels.__file__)\n" + "".join(pages.code("README.md"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
