"""What is installed, what is public, and what importing it costs."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pages
import pytest
import typed_script
import yaml

import softlabels
from softlabels import functional, metrics, plotting, tuning

tomllib = pytest.importorskip("tomllib")  # of Python 3.11

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


def imported_by(statement, before="import sys"):
    script = f"import sys; {before}; before = {{*sys.modules}}; {statement}; print(*{{*sys.modules}} - before)"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_import_needs_no_extra():
    added = imported_by("import softlabels", before="import torch")
    assert added.isdisjoint(EXTRAS)
    assert "softlabels.losses" in added
    assert "hypothesis" in imported_by("import hypothesis")  # the probe can fail


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


def api_methods():
    page = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    for name, members in re.findall(
        r"^::: (softlabels[\w.]+)\n    options: {members: \[([\w, ]+)\]", page, re.MULTILINE
    ):
        module, _, last = name.rpartition(".")
        thing = getattr(importlib.import_module(module), last)
        found = set(members.split(", ")) - {"teacher"}  # an attribute of attached losses
        yield from ((getattr(thing, member), f"{name}.{member}") for member in sorted(found))


@pytest.mark.parametrize(("thing", "name"), [*api_methods()], ids=lambda v: v if isinstance(v, str) else "")
def test_public_methods_are_documented(thing, name):
    if name.endswith(".forward"):  # what a loss is called with is described in its class
        check_parameters(thing, name, inspect.getdoc(getattr(softlabels, name.split(".")[1])))
    elif not isinstance(thing, property):
        check_parameters(thing, name)


def check_parameters(thing, name, doc=None):
    doc = doc or inspect.getdoc(thing)
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
        "concentration: 'float | None' = None, ranking: 'str' = 'ema', "
        "spread: 'str | tuple[str, ...]' = 'uniform', rank_by: 'str' = 'max', ema_decay: 'float' = 0.999, "
        "num_samples: 'int | None' = None, global_ranking: 'bool' = False, "
        "generator: 'torch.Generator | None' = None"
    )


@pytest.mark.parametrize("name", [name for name in softlabels.__all__ if name.endswith("Loss")])
def test_a_call_shows_the_arguments_of_the_loss(name):
    """In a notebook; for editors and type checkers there is tests/typed_script.py."""
    loss = getattr(softlabels, name)(**({"beta": 0.1} if name == "LabelSmoothingMAPLoss" else {}))
    shown = inspect.signature(loss)
    assert list(shown.parameters)[:3] == ["input", "target", "sample_weight"]
    assert shown == inspect.signature(loss.forward)


def test_a_typed_script_runs():
    assert typed_script.distil(typed_script.train()) > 0


def imports_of(path):
    """The modules of softlabels that a file imports at any place, but for those that only type checkers see."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    unseen = [n for n in nodes if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    hidden = {id(node) for block in unseen for statement in block.body for node in ast.walk(statement)}
    for node in nodes:
        if id(node) in hidden or not isinstance(node, ast.ImportFrom):
            continue
        if f"{node.module}.".startswith("softlabels."):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


GROUND = "_processes", "_reading", "_checks"
FLOORS = *GROUND, "kernels", "functional", "ranking", "priors", "metrics", "tuning", "teachers", "losses"


def test_floors_import_downwards_only():
    for height, floor in enumerate(FLOORS):
        for path in (ROOT / "softlabels").rglob("*.py"):
            if floor in (path.stem, path.parent.name):
                above = {module.split(".")[1] for module in imports_of(path) if "." in module} & set(
                    FLOORS[height + 1 :]
                )
                assert not above, f"{path} imports {above}"


def test_modules_import_in_no_circle():
    package = ROOT / "softlabels"
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in package.rglob("*.py")}
    needed = {name: set(imports_of(path)) & set(names) - {name} for name, path in names.items()}
    assert len(needed["softlabels.functional.distillation"]) >= 2
    assert list(graphlib.TopologicalSorter(needed).static_order())


def test_version_is_in_one_place():
    metadata = importlib.import_module("importlib.metadata")
    assert metadata.version("softlabels") == softlabels.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == softlabels.__version__
    assert citation["url"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
    assert f"[{softlabels.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_github_runs_the_same_ci():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    everything, versions = workflow["jobs"]["everything"], workflow["jobs"]["versions"]
    assert everything["steps"][-1]["run"] == ".ci/run"
    tested = {everything["steps"][1]["with"]["python-version"]}
    tested |= {version["python"] for version in versions["strategy"]["matrix"]["include"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    claimed = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert sorted(tested) == claimed
    assert project["requires-python"] == f">={claimed[0]}"


def test_the_oldest_versions_are_those_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["metrics"], *extras["plot"]]
    lines = (ROOT / ".github" / "oldest.txt").read_text().splitlines()
    pinned = [line.replace("==", ">=") for line in lines if not line.startswith("#")]
    for need in wanted:
        assert any(pin == need or pin.startswith(f"{need}.") for pin in pinned), need


def test_citation_is_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the schema requires
    assert citation["preferred-citation"]["title"] == "Self-Distillation as Instance-Specific Label Smoothing"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--sdist",
        "--outdir",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_wheel_holds_the_package_and_nothing_else_and_runs_the_readme(built, tmp_path):
    (wheel,) = built.glob("*.whl")
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


def test_sdist_holds_what_the_wheel_is_made_of(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "softlabels").rglob("*.py")}
    assert sources | {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= names
    assert not any(name.startswith("tests") for name in names)  # they need pages and results that are not in it


def test_readme_renders_as_on_an_index_of_packages(built):
    readme_renderer = pytest.importorskip("readme_renderer.markdown", reason="readme-renderer[md] is in the extra dev")
    (wheel,) = built.glob("*.whl")
    metadata = zipfile.ZipFile(wheel).read(f"softlabels-{softlabels.__version__}.dist-info/METADATA").decode()
    page = readme_renderer.render(metadata.split("\n\n", 1)[1])
    assert page is not None
    for element in ("<h1", "<table>", "<pre", '<a href="https://arxiv.org/abs/2006.05065"'):
        assert element in page
    assert "|---" not in page  # a table that was not understood
    assert not re.search(r"\$[^$<]+\$", page)  # a formula that nobody draws
    for address in re.findall(r'(?:href|src)="([^"]+)"', page):
        assert address.startswith(("https://", "#")), address
