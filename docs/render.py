"""MkDocs hook: what the pages need besides Markdown.

The project's addresses come from pyproject.toml. TeX becomes MathML, which needs no script to be seen; docstrings'
roles become links, and so do paths into the repository. The button on a block of commands copies the commands alone,
and a picture leads to its file.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):<code>(~?)([\w.]+)</code>")
_INTO_REPOSITORY = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
_PICTURE = re.compile(r'<p>(<img [^>]*src="([^"]+)"[^>]*>)</p>')
_SIGN = re.compile(
    r"(<mo[^>]*>(?:[(\[{=,<>]|&#x0003[CDE];|&#x000(?:28|5B|7B|3D|2C);)</mo>)<mo>(?=(?:−|&#x02212;)<)"
)
_FUNCTION = re.compile(r"(<mi>(?:log|exp|min|max)</mi>)(?=<m(?:i|n|row|sub|sup|frac)\b)")
_OPERATOR = re.compile(r"<mo>([a-z]{3,})</mo>(?=<mo[^>]*>(?:\(|&#x00028;))")
_COMMANDS = re.compile(r'<div class="(language-console highlight)">(<pre>.*?</pre>)', re.DOTALL)
_CELL = re.compile(r"<td.*?</td>", re.DOTALL)
_NAME = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
_SCRIPT = dict(zip("BEFHILMR", "ℬℰℱℋℐℒℳℛ", strict=True))  # these have code points out of the row


def on_config(config: Any) -> Any:
    """Addresses stand once, in pyproject.toml's [project.urls]."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = re.search(r"^\[project\.urls\]\n((?:\w+ = .*\n)+)", text, re.MULTILINE)
    urls = dict(re.findall(r'^(\w+) = "(.+?)"', table[1], re.MULTILINE)) if table else {}
    missing = {"Documentation", "Repository"} - urls.keys()
    if missing:
        raise PluginError(f"pyproject.toml's [project.urls] lacks {' and '.join(sorted(missing))}")
    config.site_url = urls["Documentation"].rstrip("/") + "/"
    config.repo_url, config.repo_name = urls["Repository"], "GitHub"
    return config


def on_page_markdown(markdown: str, *, config: Any, page: Any, **_: object) -> str:
    """Links such as ``../examples/fsdp2.yaml``, which work on a checkout, lead to the repository."""

    def absolute(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        if not (ROOT / path).exists():
            raise PluginError(
                f"{page.file.src_uri} links to ../{path}, which is not in the repository"
            )
        return f"]({config.repo_url}/blob/main/{path}{anchor})"

    return _INTO_REPOSITORY.sub(absolute, markdown)


def on_page_content(content: str, **_: object) -> str:
    """Called with every page's HTML; links are resolved later, by autorefs."""
    content = _PICTURE.sub(r'<p class="picture"><a href="\2">\1</a></p>', content)
    return _COMMANDS.sub(_commands, _ROLE.sub(_link, _FORMULA.sub(_mathml, content)))


def on_post_page(output: str, **_: object) -> str:
    """Long names in tables may break at their signs, on a phone. The search index is made by now."""
    return _CELL.sub(lambda cell: _NAME.sub(_breakable, cell[0]), output)


def _breakable(name: re.Match[str]) -> str:
    return re.sub(r"(?<=\w)([/_])(?=\w)", r"\1<wbr>", name[0])


def _mathml(match: re.Match[str]) -> str:
    tag, delimiter, tex = match.groups()
    display = "block" if delimiter == "[" else "inline"
    mathml = convert(html.unescape(tex).strip(), display=display)
    # Of all variants, browsers know "normal" alone; script letters have code points of their own.
    mathml = re.sub(
        r'<mi mathvariant="script">([A-Z])</mi>', lambda m: f"<mi>{_script(m[1])}</mi>", mathml
    )
    # A minus behind an opening bracket or a relation is a sign, and a named function stands off its argument.
    mathml = _SIGN.sub(r'\1<mo form="prefix">', mathml)
    mathml = _OPERATOR.sub(r'<mo lspace="0.17em" rspace="0">\1</mo>', mathml)
    mathml = _FUNCTION.sub(r'\1<mspace width="0.17em" />', mathml)
    return f'<{tag} class="math">{mathml}</{tag}>'


def _script(letter: str) -> str:
    return _SCRIPT.get(letter) or chr(0x1D49C + ord(letter) - ord("A"))


def _link(match: re.Match[str]) -> str:
    short, name = match.groups()
    target = name if name.startswith("fastdpop.") else f"fastdpop.{name}"
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'


def _commands(match: re.Match[str]) -> str:
    classes, block = match.groups()
    copied = html.escape(commands(html.unescape(re.sub(r"<[^>]+>", "", block))))
    return f'<div class="{classes}" data-copy="{copied}">{block}'


def commands(text: str) -> str:
    """What of a session's text was typed: without prompts, and without what was answered."""
    typed, goes_on = [], False
    for line in text.rstrip("\n").split("\n"):
        if line.startswith("$ ") or goes_on:
            typed.append(line if goes_on else line[2:])
            goes_on = line.endswith("\\")
    return "\n".join(typed)
