"""MkDocs hook: TeX becomes MathML, which needs no script to be seen, and docstrings' roles become links."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):<code>(~?)([\w.]+)</code>")


def on_page_content(content: str, **_: object) -> str:
    """Called with every page's HTML; links are resolved later, by autorefs."""
    return _ROLE.sub(_link, _FORMULA.sub(_mathml, content))


def _mathml(match: re.Match[str]) -> str:
    tag, delimiter, tex = match.groups()
    display = "block" if delimiter == "[" else "inline"
    return f'<{tag} class="math">{convert(html.unescape(tex).strip(), display=display)}</{tag}>'


def _link(match: re.Match[str]) -> str:
    short, name = match.groups()
    target = name if name.startswith("fastdpop.") else f"fastdpop.{name}"
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'
