"""A model of the Gluon kernel's barriers, and every order of events on it.

One transition for each thing that a chip does in its own time. Beside each of them stands the line
of kernels/gluon_parts.py that it stands for; a state is small, so that on small rings *all*
states that can be reached are looked at, and on the real ring random walks.

Checked in every state:

* a product reads the boxes of its own tile and step, from its beginning to its end;
* no box lands in a stage that a consumer still needs;
* a staging buffer is not written while a store reads it;
* a state without a next one is the last: nobody waits for ever.

A barrier is PTX's mbarrier: arrivals and bytes that are still missing, and a bit that turns when
there are none; ``wait(parity)`` passes when the bit differs from `parity`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

CONSUMERS = 2
QUARTERS, BUFFERS = 4, 2
"""Stores of an epilogue, and the buffers that they take turns in."""

FAULTS = (
    "arrives for the stage that is still read",
    "waits for one product fewer",
    "counts one consumer",
    "expects a box fewer",
    "does not wait for stores",
    "waits for the wrong store",
    "the producer counts a tile more",
    "a consumer counts a tile fewer",
    "forgets to arrive for a tile's last step",
    "does not wait for an empty stage",
)


class Hazard(Exception):
    """Something that a chip would not tell."""


@dataclass(frozen=True)
class Setup:
    """A program.

    Attributes:
        stages: of the ring.
        steps: of the hidden states in a tile.
        tiles: of this program; 0 where num_active leaves it none.
        lag: LAG.
        keep: KEEP. Without it there are no stores.
        outside: consumers whose rows of every tile lie outside: they multiply, and have no epilogue.
        quarters: stores of an epilogue; fewer make fewer states.
        fault: what is wrong with it, one of `FAULTS`.
    """

    stages: int
    steps: int
    tiles: int
    lag: int = 1
    keep: bool = True
    outside: frozenset[int] = frozenset()
    quarters: int = QUARTERS
    fault: str = ""

    def total(self, who: str) -> int:
        """Steps of a part in all: every part counts the tiles from the same numbers."""
        more = (self.fault == "the producer counts a tile more" and who == "producer") - (
            self.fault == "a consumer counts a tile fewer" and who == "consumer 1"
        )
        return self.steps * (self.tiles + more)


SMALL = (
    Setup(2, 1, 2, quarters=2),
    Setup(2, 2, 2, quarters=2, outside=frozenset({1})),
    Setup(2, 3, 1, quarters=2),
    Setup(2, 2, 2, keep=False),
    Setup(3, 1, 3, keep=False),
    Setup(3, 2, 2, keep=False, lag=2),
    Setup(3, 4, 1, keep=False),
    Setup(3, 2, 1, quarters=3),
    Setup(4, 3, 1, keep=False),
    Setup(4, 5, 0),
)
"""Programs small enough for all their states."""


# Where a part stands.
WAIT, ISSUE = "wait", "issue"  # producer and consumer
RETIRE, DRAIN, ROOM, STORE, LEAVE, DONE = "retire", "drain", "room", "store", "leave", "done"


class Consumer(NamedTuple):
    step: int
    at: str
    products: tuple[int, ...]  # steps whose products are under way, oldest first
    quarter: int
    stores: tuple[int, ...]  # buffers that are being read, oldest first


class State(NamedTuple):
    produced: tuple[int, str]
    consumers: tuple[Consumer, ...]
    ready: tuple[tuple[int, int, int], ...]  # bit, missing arrivals, missing boxes
    empty: tuple[tuple[int, int], ...]  # bit, missing arrivals
    boxes: tuple[tuple[int, ...], ...]  # by stage: the step whose data each box holds, or -1
    landing: tuple[tuple[int, int, int], ...]  # stage, box, step


def arrivals(s: Setup) -> int:
    """``mbarrier.init(empty.index(i), count=2)``."""
    return 1 if s.fault == "counts one consumer" else CONSUMERS


def initial(s: Setup) -> State:
    return State(
        produced=(0, WAIT),
        consumers=(Consumer(0, WAIT if s.tiles else LEAVE, (), 0, ()),) * CONSUMERS,
        ready=((0, 1, 0),) * s.stages,
        empty=((0, arrivals(s)),) * s.stages,
        boxes=((-1,) * (CONSUMERS + 1),) * s.stages,
        landing=(),
    )


def put(items: tuple, i: int, item: object) -> tuple:
    return (*items[:i], item, *items[i + 1 :])


def settled(barrier: tuple[int, int, int]) -> tuple[int, int, int]:
    bit, missing, boxes = barrier
    return (bit ^ 1, 1, 0) if missing == 0 and boxes == 0 else barrier


def successors(s: Setup, state: State) -> Iterator[State]:
    yield from producer(s, state)
    yield from landings(s, state)
    for which in range(CONSUMERS):
        yield from consumer(s, state, which)


def producer(s: Setup, state: State) -> Iterator[State]:
    step, at = state.produced
    if step == s.total("producer"):
        return
    stage, parity = step % s.stages, (step // s.stages & 1) ^ 1
    if at == WAIT:  # mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        if state.empty[stage][0] != parity or s.fault == "does not wait for an empty stage":
            yield state._replace(produced=(step, ISSUE))
    else:  # mbarrier.expect(arrived, ..), load_box(..), three times
        bit, missing, _ = state.ready[stage]
        if missing != 1:
            raise Hazard("bytes are announced twice in a phase")
        expected = CONSUMERS + 1 - (s.fault == "expects a box fewer")
        sent = tuple((stage, box, step) for box in range(CONSUMERS + 1))
        yield state._replace(
            produced=(step + 1, WAIT),
            ready=put(state.ready, stage, (bit, 0, expected)),
            landing=tuple(sorted(state.landing + sent)),
        )


def landings(s: Setup, state: State) -> Iterator[State]:
    """A box lands, in any order: the hidden states of either consumer, or the weight of both."""
    for i, (stage, box, step) in enumerate(state.landing):
        for which, part in enumerate(state.consumers):
            if box not in (which, CONSUMERS):
                continue
            if any(f % s.stages == stage for f in part.products):
                raise Hazard("a box lands in a stage that a product reads")
            held = state.boxes[stage][box]
            if held != -1 and held >= part.step + (part.at == RETIRE):
                raise Hazard("a box lands on data that is still wanted")
        bit, missing, boxes = state.ready[stage]
        yield state._replace(
            ready=put(state.ready, stage, settled((bit, missing, max(boxes - 1, 0)))),
            boxes=put(state.boxes, stage, put(state.boxes[stage], box, step)),
            landing=state.landing[:i] + state.landing[i + 1 :],
        )


def consumer(s: Setup, state: State, which: int) -> Iterator[State]:
    c = state.consumers[which]
    total = s.total(f"consumer {which}")
    stage, parity = c.step % s.stages, c.step // s.stages & 1

    def go(**changes: object) -> State:
        return state._replace(consumers=put(state.consumers, which, c._replace(**changes)))

    def arrive(after: State, step: int) -> State:
        """``mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)``."""
        bit, missing = after.empty[step % s.stages]
        now = (bit, missing - 1) if missing > 1 else (bit ^ 1, arrivals(s))
        return after._replace(empty=put(after.empty, step % s.stages, now))

    if c.products:  # the oldest product ends
        oldest = c.products[0]
        if any(state.boxes[oldest % s.stages][box] != oldest for box in (which, CONSUMERS)):
            raise Hazard("a product read other data")
        yield go(products=c.products[1:])
    if c.stores:  # the oldest store has read its buffer
        yield go(stores=c.stores[1:])

    next_tile = WAIT if c.step < total else LEAVE
    first_of_all = c.step == 0 and which == 1 and s.steps > s.lag
    if c.at == WAIT:
        # mbarrier.wait(ready.index(LAG), 0, pred=(step == 0) & (width > LAG * BLOCK_H))
        behind = not (s.lag and first_of_all) or state.ready[s.lag][0] != 0
        if behind and state.ready[stage][0] != parity:  # mbarrier.wait(ready.index(stage), ..)
            yield go(at=ISSUE)
    elif c.at == ISSUE:  # acc = warpgroup_mma(h, w, acc, is_async=True)
        if any(state.boxes[stage][box] != c.step for box in (which, CONSUMERS)):
            raise Hazard("a product begins on other data")
        yield go(at=RETIRE, products=(*c.products, c.step))
    elif c.at == RETIRE:  # acc = warpgroup_mma_wait(1, deps=(acc,)), and the arrival
        if len(c.products) <= 1 + (s.fault == "waits for one product fewer"):
            k = c.step % s.steps
            after = go(step=c.step + 1, at=DRAIN if k == s.steps - 1 else WAIT)
            current = s.fault == "arrives for the stage that is still read"
            yield arrive(after, c.step if current else c.step - 1) if k > 0 else after
    elif c.at == DRAIN:  # acc = warpgroup_mma_wait(0, deps=(acc,)), and the arrival
        if not c.products:
            no_epilogue = which in s.outside or not s.keep  # if row < rows; if KEEP
            after = go(at=next_tile if no_epilogue else ROOM, quarter=0)
            forgets = s.fault == "forgets to arrive for a tile's last step"
            yield after if forgets else arrive(after, c.step - 1)
    elif c.at == ROOM:  # tma.store_wait(1), in each quarter
        allowed = BUFFERS - 1 + (s.fault == "waits for the wrong store")
        if len(c.stores) <= allowed or s.fault == "does not wait for stores":
            yield go(at=STORE)
    elif c.at == STORE:  # staging.store(..); store_box(exp_logits, [row, token], staging)
        if c.quarter % BUFFERS in c.stores:
            raise Hazard("a staging buffer is written while a store reads it")
        last = c.quarter == s.quarters - 1
        yield go(
            at=next_tile if last else ROOM,
            quarter=0 if last else c.quarter + 1,
            stores=(*c.stores, c.quarter % BUFFERS),
        )
    elif c.at == LEAVE and not c.stores:  # if KEEP: tma.store_wait(0)
        yield go(at=DONE)


def is_final(s: Setup, state: State) -> bool:
    """Everybody is through, and nothing is under way."""
    ended = all(c.at == DONE and not c.products and not c.stores for c in state.consumers)
    return ended and state.produced[0] == s.total("producer") and not state.landing


def explore(s: Setup, most: int = 2_000_000) -> int:
    """Goes through all states; their number.

    Raises:
        Hazard: in one of them something is wrong.
    """
    seen, queue = {initial(s)}, deque([initial(s)])
    ends = 0
    while queue:
        state = queue.popleft()
        moved = False
        for after in successors(s, state):
            moved = True
            if after not in seen:
                seen.add(after)
                queue.append(after)
        if len(seen) > most:
            raise RuntimeError("too many states")
        if not moved:
            if not is_final(s, state):
                raise Hazard(f"everybody waits: {state}")
            ends += 1
    assert ends == 1, "there is one last state"
    return len(seen)


def walk(s: Setup, seed: int) -> int:
    """One random order of events; their number. Some orders starve a part for long."""
    rng = random.Random(seed)
    state, n = initial(s), 0
    while options := list(successors(s, state)):
        draw = rng.random()
        state = options[0] if draw < 0.3 else options[-1] if draw < 0.5 else rng.choice(options)
        n += 1
    if not is_final(s, state):
        raise Hazard(f"everybody waits: {state}")
    return n


def assert_tiles_covered(
    place: Callable[..., tuple[int, int]],
    rows: int,
    wanted: int,
    vocabulary: int,
    programs: int,
    group_n: int,
) -> None:
    """Every tile of the wanted rows has one program, and all parts of a program see it alike."""
    wanted = min(wanted, rows)
    columns = -(-vocabulary // 256)
    count = -(-wanted // 128) * columns
    blocks = max(-(-wanted // 128), 1)
    seen = set()
    for first in range(programs):
        ahead = place(first, count, blocks, columns, group_n)  # the consumers form it a tile ahead
        for program in range(first, count, programs):
            at = place(program, count, blocks, columns, group_n)  # the producer, when it is there
            assert at == ahead
            assert 0 <= at[0] < blocks
            assert 0 <= at[1] < columns
            assert at not in seen
            seen.add(at)
            ahead = place(program + programs, count, blocks, columns, group_n)
    assert len(seen) == count
