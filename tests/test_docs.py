"""The README's code runs, its commands are those that CI runs, and its numbers are the committed ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import softlabels
from softlabels import functional, metrics, plotting, tuning

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


PAGES = {"README.md": 7, "docs/idea.md": 6, "docs/metrics.md": 5}  # blocks of Python that run, by page
NOT_RUN = {"docs/attach.md": 1}  # FSDP2 wants a process group; tests/teachers/test_distributed.py does the same


@pytest.mark.parametrize("name", PAGES)
def test_code_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks((ROOT / name).read_text(), "python")
    assert len(code) == PAGES[name]
    namespace = {}
    for block in code:
        exec(compile(block, name, "exec"), namespace)
    if name == "docs/metrics.md":
        assert {p.name for p in tmp_path.iterdir()} == {"reliability.png", "soft-labels.png"}


def test_no_page_is_forgotten():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    counts = {str(path.relative_to(ROOT)): len(blocks(path.read_text(), "python")) for path in pages}
    assert {name: count for name, count in counts.items() if count} == {**PAGES, **NOT_RUN}


def test_ci_runs_the_commands_of_the_readme():
    commands = "".join(blocks(README, "bash"))
    script = (ROOT / ".ci" / "run").read_text()
    for line in (
        'pip install -e ".[dev]" && pytest',
        'pip install -e ".[benchmarks]" && python -m benchmarks.paper comparison',
    ):
        assert line in commands
    assert "README.md" in script  # it takes the test command from there


@pytest.mark.parametrize("name", ["laptop-fashion-pairs", "laptop-digits"])
def test_readme_numbers_are_the_committed_ones(name):
    table = (ROOT / "benchmarks/results/paper" / name / "comparison/table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 8
    for row in rows:
        assert row in README


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_relative_links_resolve(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_api_page_is_complete():
    page = (ROOT / "docs/api.md").read_text()
    modules = ("functional", "metrics", "plotting", "tuning")
    names = [f"softlabels.{n}" for n in softlabels.__all__ if n != "__version__" and n not in modules]
    for module in (functional, metrics, plotting):
        names += [f"{module.__name__}.{n}" for n in module.__all__]
    for name in names:
        assert f"::: {name}\n" in page, name
    for name in tuning.__all__:
        assert name in page
