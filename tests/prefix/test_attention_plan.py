"""How the work on a tree is divided, kept, and refused."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fastdpop.prefix import plan as plans
from fastdpop.prefix.attention import tree_attention
from fastdpop.prefix.plan import Chunk, Plan, plan
from fastdpop.prefix.tree import build_tree
from tests.prefix.attending import Attending, attending, sequences


def table(of: list[list[int]], window: int | None = None) -> Tensor:
    tree = build_tree(of, 1)
    rows = [tree.end, tree.position_ids]
    return torch.stack(rows if window is None else [*rows, torch.full_like(tree.end, window)])


def planned(of: list[list[int]], how: str, window: int | None = None) -> Plan:
    rows = table(of, window)
    return plan(rows.numpy().tobytes(), len(rows), how, 1000)


def work(found: Plan) -> int:
    return sum((chunk.last - chunk.first) * chunk.key_count for chunk in found.chunks)


TWO_PAIRS = [[0, 1, 2, 3], [0, 1, 4], [5, 6], [5, 7]]


def test_segments() -> None:
    """A chunk for each run: [0 1] [2 3] [4] [5] [6] [7]."""
    assert planned(TWO_PAIRS, "segments").chunks == (
        Chunk(0, 2, ((0, 2),), causal=True, masked=False),
        Chunk(2, 4, ((0, 4),), causal=False, masked=True),
        Chunk(4, 5, ((0, 2), (4, 5)), causal=False, masked=False),
        Chunk(5, 6, ((5, 6),), causal=False, masked=False),
        Chunk(6, 7, ((5, 7),), causal=False, masked=False),
        Chunk(7, 8, ((5, 6), (7, 8)), causal=False, masked=False),
    )


def test_masked() -> None:
    found = planned(TWO_PAIRS, "masked")
    assert found.chunks == (Chunk(0, 8, ((0, 8),), causal=False, masked=True),)
    mask = found.mask(0, torch.device("cpu"), torch.float32)
    assert mask is not None
    assert mask.eq(0).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 0, 1],
    ]


def test_window_leaves_keys_out() -> None:
    found = planned([[0] * 100], "segments", window=10)
    assert found.window == 10
    (chunk,) = found.chunks
    assert chunk.masked
    chain = planned([[0] * 90 + [1] * 20, [0] * 90 + [2] * 20], "segments", window=10).chunks
    assert [chunk.keys for chunk in chain] == [((0, 90),), ((81, 110),), ((81, 90), (110, 130))]


@pytest.mark.parametrize("window", [4, 100])
def test_window_longer_than_any_path_is_none(window: int) -> None:
    found = planned([[0, 1, 2, 3], [0, 1, 4]], "segments", window)
    assert found.window is None
    assert found.chunks[0].causal
    assert planned([[0, 1, 2, 3], [0, 1, 4]], "segments", 3).window == 3


def test_short_runs_share_a_call_and_long_ones_do_not() -> None:
    short = [[i, 0, j] for i in range(4) for j in range(4)]
    assert len(planned(short, "auto").chunks) == 1
    long = [[0] * 900 + [i] * 400 for i in range(1, 4)]
    bounds = {chunk.first for chunk in planned(long, "auto").chunks}
    assert {0, 1300, 1700} <= bounds  # the first branch goes on where the prefix ends
    assert work(planned(long, "auto")) < work(planned(long, "segments"))


@pytest.mark.parametrize("seed", range(5))
def test_auto_is_the_cheapest(seed: int) -> None:
    of = sequences(8, 200, seed)

    def cost(found: Plan) -> int:
        keys = sum(chunk.key_count for chunk in found.chunks)
        return len(found.chunks) * plans.CALL + 1000 * (work(found) + plans.KEY * keys)

    best = cost(planned(of, "auto"))
    assert best <= min(cost(planned(of, "segments")), cost(planned(of, "masked")))


def test_long_sequences_hold_no_large_scores() -> None:
    found = planned([[0] * 30_000, [0] * 25_000 + [1] * 5_000], "auto").chunks
    sizes = [(chunk.last - chunk.first) * chunk.key_count for chunk in found]
    assert max(sizes) <= 2**21
    assert sum(chunk.last - chunk.first for chunk in found) == 35_000
    deeper = planned([[0] * 40_000], "auto").chunks
    assert all(c.last - c.first <= 64 for c in deeper if c.key_count > 2**15)


def test_planned_once_for_all_copies_of_a_tree() -> None:
    problem = attending(sequences(5, 30), dtype=torch.float32)
    plan.cache_clear()
    for _ in range(3):
        problem.shared().sum().backward()  # `table` is another tensor in every call
    assert plan.cache_info().misses == 1


def test_trees_are_known_by_content() -> None:
    """Neither a changed tensor nor one at the address of another is taken for what was there."""
    query, key, value = torch.randn(3, 1, 2, 8, 4).unbind()
    one, other = table([[0] * 8]), table([[0] * 4, [1] * 4])

    def run(tree: Tensor) -> Tensor:
        return tree_attention(query, key, value, tree[None, None], scale=1.0)

    tree = one.clone()
    first = run(tree)
    tree.copy_(other)
    second = run(tree)
    del tree
    gc.collect()
    assert not torch.equal(first, second)
    assert torch.equal(run(one.clone()), first)
    assert torch.equal(run(other.clone()), second)


def test_masks_are_kept_unless_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for kept, same in ((2**20, True), (1, False)):
        monkeypatch.setattr(plans, "_KEPT", kept)
        plan.cache_clear()
        found = planned([[0, 1], [0, 2]], "masked")
        masks = [found.mask(0, torch.device("cpu"), torch.float32) for _ in range(2)]
        assert (masks[0] is masks[1]) is same
    plan.cache_clear()


def test_threads() -> None:
    problems = [attending(sequences(5, 40, seed), dtype=torch.float32) for seed in range(12)]
    want = [problem.shared().detach() for problem in problems]
    plan.cache_clear()

    def run(problem: Attending) -> Tensor:
        with torch.no_grad():
            return problem.shared()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, problems * 4))
    assert all(torch.equal(a, b) for a, b in zip(found, want * 4, strict=True))


GOOD = table(TWO_PAIRS)


def changed(row: int, place: int, number: int, rows: int = 2) -> Tensor:
    found = torch.cat([GOOD, torch.full_like(GOOD[:1], 2)])[:rows]
    found[row, place] = number
    return found[None, None]


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("past the end", changed(0, 7, 9)),
        ("before itself", changed(0, 3, 3)),
        ("out of its parent", changed(0, 2, 6)),
        ("no window", changed(2, 0, 0, rows=3)),
        ("two windows", changed(2, 0, 3, rows=3)),
        ("of other tokens", GOOD[None, None, :, 1:]),
        ("floats", GOOD[None, None].double()),
        ("flat", GOOD),
        ("four rows", GOOD.repeat(2, 1)[None, None]),
    ],
)
def test_no_tree(name: str, tree: Tensor) -> None:
    query = torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match=r"^tree"):
        tree_attention(query, query, query, tree, scale=1.0)


@pytest.mark.parametrize(
    ("argument", "shape"),
    [
        ("query", (2, 4, 8, 4)),
        ("query", (4, 8, 4)),
        ("key", (1, 2, 7, 4)),
        ("key", (1, 2, 8, 5)),
        ("value", (1, 4, 8, 4)),
        ("value", (2, 8, 4)),
        ("sinks", (2,)),
    ],
)
def test_shapes_that_do_not_fit(argument: str, shape: tuple[int, ...]) -> None:
    given = {
        "query": torch.randn(1, 4, 8, 4),
        "key": torch.randn(1, 2, 8, 4),
        "value": torch.randn(1, 2, 8, 4),
        argument: torch.randn(shape),
    }
    with pytest.raises(ValueError, match=f"^{argument} is"):
        tree_attention(**given, tree=GOOD[None, None], scale=1.0)


def test_other_refusals() -> None:
    query = torch.randn(1, 2, 8, 4)
    tree = GOOD[None, None]
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^scale is {wrong}: expected a number above 0"):
            tree_attention(query, query, query, tree, scale=wrong)
        with pytest.raises(ValueError, match=f"^softcap is {wrong}: expected a number above 0"):
            tree_attention(query, query, query, tree, scale=1.0, softcap=wrong)
    negative = tree.clone()
    negative[0, 0, 0, 0] = -1
    with pytest.raises(ValueError, match=r"^tree: end = -1 of the tokens from 0 to 0"):
        tree_attention(query, query, query, negative, scale=1.0)
    with pytest.raises(ValueError, match=r"^how is 'flash'"):
        tree_attention(query, query, query, tree, scale=1.0, how="flash")
    with pytest.raises(ValueError, match=r"^key is .*float64"):
        tree_attention(query, query.double(), query, tree, scale=1.0)
    with pytest.raises(ValueError, match=r"^query is .*int64"):
        tree_attention(query.long(), query, query, tree, scale=1.0)
    with pytest.raises(ValueError, match=r"^value is .* of which 3"):
        tree_attention(torch.randn(1, 3, 8, 4), query, query, tree, scale=1.0)
