"""The figures of bench.md, of README.md and of the first page are those of bench/results."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.docs.site import ROOT, Site

pytestmark = pytest.mark.xdist_group("site")

# What a table calls a contender, and what the results do: (trained head, frozen head), loss.
CPU = {
    "bare matrix products, into memory kept for them": ("bare products", ""),
    "bare matrix products, as one writes them": ("bare products, as written", ""),
    "fastdpop `cpu`, DPOP": ("fastdpop cpu", "dpop"),
    "gathered rows, fp32 upcast, DPOP": ("gather, fp32 upcast", "dpop"),
    "gathered rows, 16-bit logits, DPOP": ("gather, 16-bit logits", "dpop"),
    "the fastest in plain PyTorch: gathered rows, 16-bit logits, DPOP": (
        "gather, 16-bit logits",
        "dpop",
    ),
    "`F.linear_cross_entropy`, chunked, DPOP": ("F.linear_cross_entropy", "dpop"),
    "Liger, compiled (frozen: not compiled), DPO": ("Liger, compiled", "dpo"),
    "TRL, its kernel on scored rows, DPO": ("TRL, scored rows", "dpo"),
    "TRL, as its trainer calls it on CPUs, DPO": ("TRL, as called", "dpo"),
    "TRL 1.16, as its trainer calls it on CPUs, DPO": ("TRL, as called", "dpo"),
    "fastdpop `eager`, DPOP": ("fastdpop eager", "dpop"),
}
H200 = {
    "bare matrix products": ("bare products", ""),
    "fastdpop `triton`, DPOP": ("fastdpop triton", "dpop"),
    "fastdpop `triton` in 512 MiB, DPOP": ("fastdpop triton in 512 MiB", "dpop"),
    "gathered rows, fp32 upcast, compiled, DPOP": ("gather, fp32 upcast, compiled", "dpop"),
    "gathered rows, fp32 upcast, DPOP": ("gather, fp32 upcast", "dpop"),
    "TRL, its kernel on scored rows, DPO": ("TRL, scored rows", "dpo"),
    "Liger, DPO": ("Liger", "dpo"),
    "checkpointed chunks, DPOP": ("checkpointed chunks", "dpop"),
}


def results(device: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Steps of the workload that everybody got, in bf16, by contender, loss and mode."""
    rows = json.loads((ROOT / f"bench/results/{device}.json").read_text(encoding="utf-8"))["rows"]
    steps = [r for r in rows if r["kind"] == "step" and r["dtype"] == "bf16"]
    return {
        (r["contender"], r["loss"], r["mode"]): r
        for r in steps
        if r["workload"] == steps[0]["workload"]
    }


def table(file: str, header: str) -> dict[str, list[str]]:
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def agree(shown: str, value: float, unit: float) -> bool:
    """Whether a number is the value, rounded to the digits that it shows."""
    number = shown.split()[0].replace(",", "")
    digits = len(number.partition(".")[2]) if "e" not in number else None
    if digits is None:
        return float(
            f"{value / unit:.{len(number.partition('e')[0].partition('.')[2])}e}"
        ) == float(number)
    return abs(float(number) - value / unit) <= 0.5001 * 10**-digits


@pytest.mark.parametrize(("file", "floor"), [("docs/bench.md", "x floor"), ("README.md", "memory")])
def test_the_table_of_a_cpu(file: str, floor: str) -> None:
    header = "| forward and backward | time, trained head | " + floor
    rows, known = table(file, header), results("cpu")
    assert len(rows) >= 3
    for name, cells in rows.items():
        ratios = [cells.pop(1), cells.pop(3)] if floor == "x floor" else []
        trained, trained_mib, frozen, frozen_mib, error = cells
        contender, loss = CPU[name]
        of = known[contender, loss, "trained head"]
        without = known[contender.removesuffix(", compiled"), loss, "frozen head"]
        assert agree(trained, of["seconds"], 1), name
        assert agree(frozen, without["seconds"], 1), name
        for shown, row in zip(ratios, (of, without), strict=False):
            assert agree(shown, row["to_floor"], 1), name
        assert not trained_mib or agree(trained_mib, of["peak_extra_bytes"], 2**20), name
        assert not frozen_mib or agree(frozen_mib, without["peak_extra_bytes"], 2**20), name
        assert not error or agree(error, of["logp_error_nat"], 1), name


def test_the_table_of_a_gpu() -> None:
    times = "time, trained head | x floor | memory | time, frozen head | x floor | memory"
    header = f"| forward and backward | {times} | log-prob error, relative |"
    rows, known = table("docs/bench.md", header), results("h200")
    assert len(rows) == len(H200)
    for name, (*cells, error) in rows.items():
        contender, loss = H200[name]
        for mode, shown in (("trained head", cells[:3]), ("frozen head", cells[3:])):
            of = known.get((contender, loss, mode))
            units = (("seconds", 1e-3), ("to_floor", 1), ("peak_extra_bytes", 2**20))
            for cell, (what, unit) in zip(shown, units, strict=True):
                assert not cell or of is None or agree(cell, of[what], unit), (name, mode, what)
        assert not error or agree(
            error, known[contender, loss, "trained head"]["logp_error_relative"], 1
        )


def test_the_first_page_has_the_same(site: Site) -> None:
    text = site.page("index").text
    readme = table("README.md", "| forward and backward | time, trained head | memory |")
    for time, memory, _, _, error in readme.values():
        assert time in text
        assert memory in text
        assert error in text
    assert re.search(r"as fast as TRL's trainer", text)


def test_every_table_is_on_the_page_of_benchmarks(site: Site) -> None:
    page = site.page("bench")
    for device in ("cpu", "h200"):
        source = (ROOT / f"bench/results/{device}.md").read_text(encoding="utf-8")
        titles = re.findall(r"^### (.+)$", source, re.MULTILINE)
        assert len(titles) > 20
        assert not [
            title
            for title in titles
            if title.replace("'", "’") not in page.text and title not in page.text
        ]
