"""The README's code runs, its commands are those that CI runs, and its numbers are the committed ones."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pages
import pytest

import softlabels
from softlabels import functional, metrics, plotting, tuning

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", [name for name in pages.PAGES if pages.code(name)])
def test_code_runs(name, tmp_path, monkeypatch):
    (tmp_path / "docs").symlink_to(ROOT / "docs")  # from where the site is built, figures are in docs
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    namespace = {}
    for block in pages.code(name):
        exec(compile(block, name, "exec"), namespace)
    written = {path.name for path in tmp_path.iterdir()} - {"docs"}
    assert written == {"docs/faq.md": {"checkpoint.pt"}, "docs/metrics.md": {"reliability.png", "soft-labels.png"}}.get(
        name, set()
    )


def test_every_block_of_python_is_run():
    for name in pages.PAGES:
        fences = [line for line in (ROOT / name).read_text().splitlines() if "```py" in line]
        recipes = [block for block in pages.blocks(name, "python") if block.startswith("--8<--")]
        assert len(fences) == len(pages.code(name)) + len(recipes)
        if name != "docs/recipes.md":  # tests/test_recipes.py runs these
            assert not recipes
    assert pages.summary().startswith("code in README and docs: ")


def test_ci_runs_the_commands_of_the_readme():
    commands = "".join(pages.blocks("README.md", "bash"))
    script = (ROOT / ".ci" / "run").read_text()
    for line in (
        'pip install -c constraints.txt -e ".[dev]" && pytest',
        'pip install -c constraints.txt -e ".[benchmarks]" && python -m benchmarks.paper comparison',
    ):
        assert line in commands
    assert "README.md" in script  # it takes the test command from there


def test_the_diff_of_the_readme_runs_before_and_after():
    (diff,) = pages.blocks("README.md", "diff")
    for sign in "+-":
        exec("\n".join(line[1:] for line in diff.splitlines() if line[:1] in (" ", sign, "")), {})


def test_readme_numbers_are_the_committed_ones():
    """A calibration error or an accuracy has two decimals; 0.95 is the strength of a method."""
    expected = README.split("## What to expect")[1].split("\n## ")[0]
    tables = [path.read_text() for path in (ROOT / "benchmarks/results/paper").glob("*/comparison/table.md")]
    numbers = re.findall(r"(?<![\w.])\d+\.\d\d+(?![\w.])", expected)
    assert numbers
    for number in numbers:
        assert any(number in table for table in tables), number


def test_readme_is_short():
    assert len(README.splitlines()) <= 90


@pytest.mark.parametrize("name", pages.PAGES)
def test_relative_links_resolve(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_api_pages_are_complete():
    page = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    modules = ("data", "functional", "metrics", "plotting", "tuning")
    names = [f"softlabels.{n}" for n in softlabels.__all__ if n != "__version__" and n not in modules]
    for module in (functional, metrics, plotting, tuning):
        names += [f"{module.__name__}.{n}" for n in module.__all__]
    for name in [*names, "softlabels.data.WithIndex"]:
        assert f"::: {name}\n" in page, name


def test_every_line_of_the_table_of_loops_is_a_test():
    rows = re.findall(r"^\| .* \| `(test_\w+)` \|$", (ROOT / "docs/attach.md").read_text(), re.MULTILINE)
    assert len(rows) > 30
    tests = "".join(
        path.read_text() for folder in ("losses", "teachers") for path in (ROOT / "tests" / folder).glob("*.py")
    )
    for name in rows:
        assert f"def {name}(" in tests, name
