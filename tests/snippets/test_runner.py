"""The runner of code blocks notices what is wrong with one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("sybil")
pytest.importorskip("trl")

from tests.snippets.page import Page, compare

Runner = Callable[[str], Page]

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of TRL and what it imports
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    def run(text: str) -> Page:
        path = tmp_path / "page.md"
        path.write_text(text)
        page = Page(path)
        page.run()
        return page

    return run


def block(language: str, *lines: str, comment: str = "") -> str:
    above = f"<!-- {comment} -->\n" if comment else ""
    return "\n".join([f"{above}```{language}", *lines, "```\n"])


def test_blocks_share_names_and_output_is_compared(run: Runner) -> None:
    page = run(
        block("python", "x = 1")
        + block("python", "print(labels.shape[0] + x)", comment="given: labels")
        + block("text", "5")
        + block("python", "x +", comment="not run: of another planet").replace("x +", "fly(x)")
    )
    assert page.failures == []
    assert page.count == Counter({"run": 2, "compared": 1, "not run": 1})
    assert [reason for _, reason in page.marked] == ["of another planet"]


def test_a_file_is_there_for_the_blocks_below(run: Runner) -> None:
    page = run(
        block("yaml", "model: PATH", "pairs: p.jsonl", "output: out", comment="file: run.yaml")
        + block("python", "from pathlib import Path", "print(Path('run.yaml').read_text())")
        + block("text", "model: ... output: out")
    )
    assert page.failures == []


def test_a_file_of_the_repository_is_run_where_it_is_included(run: Runner) -> None:
    page = run(
        block('{ .python title="x" }', '--8<-- "fastdpop/choices.py"')
        + block("python", "print(words(Per))")
    )
    assert page.failures == []
    assert "No such file" in run(block("python", '--8<-- "docs/no.py"')).failures[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (block("python", "", "1 / 0"), "page.md:1: .*line 3.*ZeroDivisionError"),
        (block("python", "print(model)"), "name 'model' is not defined"),
        (block("python", "1", comment="given: nothing_like_it"), "has no attribute 'nothing_like_"),
        (block("python", "x = ", comment="not run: why"), "SyntaxError"),
        (block("python", "1", comment="not run"), "'not run' has no reason"),
        (block("", "x"), "a block of ''; CONTRIBUTING.md has the languages"),
        (block("rust", "x"), "a block of 'rust'"),
        (block("text", "5"), "nothing was run before"),
        (block("python", "print(4)") + block("text", "5"), r"-5\n\+4"),
        (block("console", "$ fastdpop train --model PATH --pairz x"), "pairz"),
        (block("console", "$ fastdpop pairs stat x"), "invalid choice: 'stat'"),
        (block("console", "$ fastdpop doctor", "no engines"), "this was printed"),
        (block("console", "$ fastdpop train ... --loss dop"), "dop"),
        (block("console", "$ accelerate launch -m fastdpop train --betta 1"), "betta"),
        (block("console", "$ accelerate launch --config_file examples/no.yaml -m fastdpop"), "no.yaml"),
        (block("console", "$ python examples/no.py"), "there is no file examples/no.py"),
        (block("console", "$ python -m tools.no"), "there is no module tools.no"),
        (block("console", "$ make nothing"), "the Makefile has no target nothing"),
        (block("console", "$ rm -rf x"), "how is this run"),
        (block("console", "$ pip uninstall x"), "pip uninstall is not run"),
        (block("console", "$ fastdpop doctor | python -c '1 +'"), "SyntaxError"),
        (block("console", "$ fastdpop trl dpo ... --lozz dpop"), "lozz"),
        (block("yaml", "fastdpop: true", "dpop_lambda: -1"), "dpop_lambda"),
        (block("yaml", "fastdpop: true", "lamda: 1"), "does not have .'lamda'"),
        (block("yaml", "model: PATH", "pears: p.jsonl"), "pears"),
        (block("json", "{"), "JSONDecodeError"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(run: Runner, text: str, message: str) -> None:
    page = run(text)
    assert len(page.failures) == 1
    assert page.failures[0].startswith("page.md:")

    assert re.search(message, page.failures[0], re.DOTALL), page.failures[0]


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a  b\nc", "a b c\n", True),
        ("b", "a b c", True),
        ("a ... d", "a b c d", True),
        ("1.5 (2)", "1.5 (2)", True),
        ("1.5", "125", False),
        ("a c", "a b c", False),
    ],
)
def test_comparing(shown: str, printed: str, same: bool) -> None:
    if same:
        compare(shown, printed)
        return
    with pytest.raises(AssertionError, match="this was printed"):
        compare(shown, printed)
