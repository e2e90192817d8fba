"""A page's code blocks, run from top to bottom as a reader would.

Comments that no reader sees stand before a block and say what its page's text has told of:

- ``<!-- given: model, batch -->``: names of :mod:`tests.snippets.given`.
- ``<!-- file: run.yaml -->``: the block is a file of that name.
- ``<!-- not run: needs 8 GPUs -->``: the block is parsed only, and a `text` block is not compared.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import os
import re
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator, pad
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, FencedCodeBlockLexer

from tests.snippets import commands, configs
from tests.snippets.given import Given

_FENCES = FencedCodeBlockLexer(language=r".*")
_COMMENTS = DirectiveInHTMLCommentLexer(directive="given|file|not run", arguments=".*?")
_python = PythonEvaluator()


@dataclass
class Page:
    """A page on its way from top to bottom.

    Attributes:
        path: the Markdown file.
        count: how many blocks were ``run``, ``parsed``, ``compared`` and marked as ``not run``.
        marked: the line and the reason of each block that is not run.
        failures: what went wrong, each with its line.
    """

    path: Path
    count: Counter[str] = field(default_factory=Counter)
    marked: list[tuple[int, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _printed: str | None = None
    _file: str = ""
    _not_run: str = ""

    def run(self) -> None:
        """Run every block in the working directory; go on after one that fails."""
        for example in Document.parse(str(self.path), self._regions).examples():
            with output() as said:
                try:
                    example.evaluate()
                except (Exception, SystemExit) as error:
                    self._not_run = self._file = ""
                    shown = "".join(traceback.format_exception(error)[-3:])
                    self.failures.append(
                        f"{self.path.name}:{example.line}: {shown}{said.getvalue()[-800:]}"
                    )

    def _regions(self, document: Document) -> Iterator[Region]:
        for lexer, evaluate in ((_FENCES, self._block), (_COMMENTS, self._comment)):
            for region in lexer(document):
                region.evaluator = evaluate
                region.parsed = region.lexemes["source"]
                yield region

    def _comment(self, example: Example) -> None:
        value = example.region.lexemes["arguments"].strip()
        match example.region.lexemes["directive"]:
            case "given":
                example.namespace.update(Given().names(value))
            case "file":
                self._file = value
            case _:
                assert value, "'not run' has no reason"
                self._not_run = value

    def _block(self, example: Example) -> None:
        language = example.region.lexemes["language"].split(" ")[0]
        reason, self._not_run = self._not_run, ""
        name, self._file = self._file, ""
        if name:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(example.parsed)
        if reason:
            self.marked.append((example.line, reason))
        printed = self._printed
        self._printed = printed if language in ("json", "yaml") else None
        match language:
            case "python":
                self._python(example, bool(reason))
            case "console" | "bash":
                self._commands(example, bool(reason))
            case "yaml":
                configs.check_yaml(example.parsed)
                self.count["not run" if reason else "parsed"] += 1
            case "json":
                json.loads(example.parsed)
                self.count["not run" if reason else "parsed"] += 1
            case "text":
                if not reason:
                    assert printed is not None, "nothing was run before this block of text"
                    compare(example.parsed, printed)
                self.count["not run" if reason else "compared"] += 1
            case _:
                raise AssertionError(f"a block of {language!r}; CONTRIBUTING.md has the languages")

    def _python(self, example: Example, parse_only: bool) -> None:
        if parse_only:
            line = example.line + example.parsed.line_offset
            compile(pad(example.parsed, line), example.path, "exec")
            self.count["not run"] += 1
            return
        with output() as printed:
            _python(example)
        self._printed = printed.getvalue()
        self.count["run"] += 1

    def _commands(self, example: Example, parse_only: bool) -> None:
        printed = []
        for line, expected in commands.lines(example.parsed, prompt="$ " in example.parsed):
            with output() as out:
                try:
                    commands.check(line, parse_only=parse_only)
                except (AssertionError, SystemExit) as error:
                    raise AssertionError(f"{line}\n{error}\n{out.getvalue()[-800:]}") from error
            printed.append(out.getvalue())
            if expected and not parse_only:
                compare(expected, printed[-1])
        self._printed = "".join(printed)
        self.count["not run" if parse_only else "run"] += 1


@contextlib.contextmanager
def output() -> Iterator[io.StringIO]:
    """What is printed, warnings and errors of the command line too."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield text


def compare(shown: str, printed: str) -> None:
    """Hold what a page shows, in which ``...`` stands for anything, to what was printed.

    White space at the ends of lines does not count, and neither does where lines end.
    """
    words = [re.escape(word) for word in shown.split()]
    pattern = r"\s+".join(words).replace(r"\s+\.\.\.", r".*?").replace(r"\.\.\.", ".*?")
    if not re.search(pattern, printed, re.DOTALL):
        lines = difflib.unified_diff(
            shown.splitlines(), printed.splitlines(), "shown", "printed", lineterm="", n=1
        )
        raise AssertionError("this was printed:" + os.linesep + os.linesep.join(lines))
