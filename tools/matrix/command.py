"""Run cells one after the other, and write what became of them."""

from __future__ import annotations

import argparse
import datetime
import subprocess
from collections.abc import Sequence

from tools.matrix import environment, smoke, table
from tools.matrix.cells import CELLS, Cell
from tools.matrix.smoke import Result


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is 1 where a cell failed or, of cells that were asked for by name, could not be had here."""
    args = _parser().parse_args(argv)
    cells = {cell.name: cell for cell in CELLS}
    unknown = sorted(set(args.cells) - set(cells))
    if unknown:
        raise SystemExit(f"cell is {unknown[0]!r}, expected one of {', '.join(cells)}")
    asked = [cells[name] for name in args.cells or cells]
    if args.resolve:
        for cell in asked:
            environment.resolve(cell)
        return 0
    failed, left_out = [], []
    for cell in asked:
        try:
            if not run(cell):
                failed.append(cell.name)
        except environment.NotHere as reason:
            print(f"{cell.name}: not run, {reason}", flush=True)
            left_out.append(cell.name)
    table.PAGE.write_text(table.page(table.PAGE.read_text()))
    print(f"{len(asked) - len(failed) - len(left_out)} passed", end="")
    print(f", {len(failed)} failed" * bool(failed), end="")
    print(f", {len(left_out)} not run ({', '.join(left_out)})" * bool(left_out))
    return int(bool(failed) or bool(args.cells and left_out))


def run(cell: Cell) -> bool:
    """Make the environment, run the tests in it, and write the result; whether it is right.

    Raises:
        environment.NotHere: the environment cannot be had on this machine.
    """
    try:
        result = smoke.smoke(cell, environment.make(cell))
    except (environment.Failed, subprocess.TimeoutExpired) as error:
        print(f"{cell.name}: failed, {error}", flush=True)
        reason = str(error).splitlines()[-1]
        smoke.save(cell, Result(datetime.date.today().isoformat(), {}, [], [reason], {}, 0))
        return False
    smoke.save(cell, result)
    right = result.right(cell)
    unexpected = {name: why for name, why in result.skipped.items() if name not in cell.skips}
    print(
        f"{cell.name}: {'passed' if right else 'FAILED'}, {len(result.passed)} tests in {result.seconds} s",
        *(f"\n  failed: {name} (see {cell.folder / 'log.txt'})" for name in result.failed),
        *(f"\n  skipped: {name}: {why}" for name, why in unexpected.items()),
        flush=True,
    )
    return right


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.matrix", description=__doc__)
    parser.add_argument("cells", nargs="*", metavar="CELL", help="all of them by default")
    parser.add_argument(
        "--resolve",
        action="store_true",
        help="write the constraints anew instead, with newer packages",
    )
    return parser
