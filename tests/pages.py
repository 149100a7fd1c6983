"""Blocks of code on the pages: which are run, and how many are not."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
PAGES = [name for name in PAGES if not name.startswith("docs/results/")]  # tables that are made, not written


def blocks(name: str, language: str) -> list[str]:
    """The blocks in a language on a page."""
    return re.findall(rf"^```{language}\b[^\n]*\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


def code(name: str) -> list[str]:
    """The Python on a page, but for included scripts, which are tested as what they are."""
    return [block for block in blocks(name, "python") if not block.startswith("--8<--")]


def summary() -> str:
    """How many blocks are run, and how many of which kind are not."""
    fences = Counter(
        language for name in PAGES for language in re.findall(r"^```(\w+)", (ROOT / name).read_text(), re.MULTILINE)
    )
    python = fences.pop("python")
    others = ", ".join(f"{count} {language}" for language, count in sorted(fences.items()))
    return f"code in README and docs: all {python} blocks of Python are run; not run: {others}"
