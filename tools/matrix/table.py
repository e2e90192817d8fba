"""The table of docs/versions.md, from the results."""

from __future__ import annotations

import re

from tools.matrix.cells import CELLS, ROOT, Cell
from tools.matrix.smoke import load

PAGE = ROOT / "docs" / "versions.md"
BEGIN = "<!-- Written by `make test-matrix` from tools/matrix/results. -->"
END = "<!-- The end of the table. -->"
COLUMNS = ("torch", "triton", "transformers", "trl", "accelerate", "peft", "datasets")


def table() -> str:
    """In Markdown, a row for each cell."""
    head = ("cell", "Python", *COLUMNS, "tests", "tested on")
    lines = [head, ("---",) * len(head), *map(_row, CELLS)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(text: str) -> str:
    """The page with the table of today's results."""
    between = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(between, lambda _: f"{BEGIN}\n\n{table()}\n\n{END}", text, flags=re.DOTALL)


def _row(cell: Cell) -> tuple[str, ...]:
    result = load(cell)
    if result is None:
        return (f"`{cell.name}`", cell.python, *("",) * len(COLUMNS), "not run", "")
    said = f"{len(result.passed)} passed"
    if result.failed or not result.right(cell):
        wrong = [*result.failed, *sorted(set(result.skipped) ^ set(cell.skips))]
        said = f"**failed**: {', '.join(wrong)}"
    elif result.skipped:
        said += f", {len(result.skipped)} without its packages"
    return (
        f"`{cell.name}`",
        result.versions.get("python") or cell.python,
        *((result.versions.get(name) or "-").partition("+")[0] for name in COLUMNS),
        said,
        result.date,
    )
