"""What the build of the site does beyond its plugins: formulas become MathML, which browsers draw without a script."""

from __future__ import annotations

import html
import re
from typing import Any

import tomllib
from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """The addresses are those of the package."""
    with open("pyproject.toml", "rb") as file:
        urls = tomllib.load(file)["project"]["urls"]
    config.site_url, config.repo_url = urls["Documentation"], urls["Source"]
    config.repo_name = config.site_name
    return config


def on_page_content(content: str, **_: Any) -> str:
    """Turn the formulas of a page into MathML."""
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    tag, bracket, formula = found.groups()
    element = convert(html.unescape(formula), display="block" if bracket == "[" else "inline")
    for font in ("normal", "monospace"):  # browsers know words, but not letters in a font
        letters = rf'(?:<mi mathvariant="{font}">[^<]+</mi>)+'
        word = rf'<mtext class="{font}">'
        element = re.sub(letters, lambda run, word=word: word + re.sub("<[^>]+>", "", run[0]) + "</mtext>", element)
    element = re.sub("(<m[io]>(?:log|exp)</m[io]>)(?!<mo[^>]*>&#x00028;)", r'\1<mspace width="0.17em" />', element)
    return f'<{tag} class="formula">{element}</{tag}>'
