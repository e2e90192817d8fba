"""A machine that runs the Gluon kernel's own source on the CPU: Triton's interpreter knows neither
warp specialisation nor barriers.

The kernel's functions run as plain Python, on numpy, with `gl`, `tma`, `mbarrier` and the rest
replaced. The parts of a program are threads, one of which runs at a time; whenever one of them
touches shared memory, the machine draws at random what happens next: another part goes on, a box
lands, a product ends, a store leaves; one of these kinds may be slower than all others. It stops at
what a chip would not tell:

* a product, or a store, that read something else when it ended than when it began;
* loads and stores outside the tensors, where no mask forbids them;
* parts that wait for each other.

Numbers are float32, rounded as the interpreter rounds.
"""

from __future__ import annotations

import functools
import random
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper


class Stuck(AssertionError):
    """The parts of a program wait for each other."""


class Overwritten(AssertionError):
    """Shared memory changed while something asynchronous read it."""


class Array(np.ndarray):
    """A tensor of the kernel. Nothing changes in place, however the kernel may write it."""

    def __iadd__(self, other: Any) -> Array:
        return array(self + other)

    def to(self, dtype: np.dtype[Any] | torch.dtype) -> Array:
        if isinstance(dtype, torch.dtype):
            return array(torch.from_numpy(np.ascontiguousarray(self)).to(dtype).float().numpy())
        return array(self.astype(dtype))


def array(x: Any) -> Array:
    return np.asarray(x).view(Array)


def values(tensor: Tensor) -> Array:
    """A tensor's elements in memory order; 16-bit floats as float32."""
    return array((tensor.float() if tensor.is_floating_point() else tensor).flatten().numpy())


class Pointer:
    """Addresses in a tensor."""

    def __init__(self, tensor: Tensor, at: Any = 0) -> None:
        assert tensor.is_contiguous()
        self.tensor, self.at = tensor, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.at + offset)

    def checked(self, mask: Any) -> Any:
        inside = (np.asarray(self.at) >= 0) & (np.asarray(self.at) < self.tensor.numel())
        assert np.all(inside | ~np.asarray(mask)), "an access outside the tensor"
        return np.where(inside, self.at, 0)


class Shared:
    """Shared memory, and views of it; a barrier, where it holds one."""

    def __init__(self, data: Array) -> None:
        self.data = data
        self.views: dict[int, Shared] = {}
        self.arrivals = self.pending = self.bytes = self.phase = 0

    def index(self, i: int) -> Shared:
        assert 0 <= i < len(self.data)
        return self.views.setdefault(i, Shared(self.data[i]))

    def store(self, value: Array) -> None:
        self.data[...] = value

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.transpose(order))

    def settle(self) -> None:
        """Turns the barrier's phase, where nothing is missing any more."""
        assert self.pending >= 0, "more arrivals than the barrier expects"
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.arrivals


class Box:
    """A tensor descriptor in the kernel."""

    def __init__(self, described: Any) -> None:
        self.tensor = described.base
        self.shape = tuple(described.block_shape)
        self.dtype, self.layout = described.base.dtype, described.layout

    def load(self, row: int, column: int) -> Array:
        assert row >= 0
        assert 0 <= column < self.tensor.shape[1]
        found = np.zeros(self.shape, np.float32)
        part = self.tensor[row : row + self.shape[0], column : column + self.shape[1]].float()
        found[: part.shape[0], : part.shape[1]] = part.numpy()
        return array(found)

    def store(self, row: int, column: int, data: Array) -> None:
        assert 0 <= row < self.tensor.shape[0]
        assert 0 <= column <= self.tensor.shape[1] - self.shape[1], "whole tiles are kept"
        part = self.tensor[row : row + self.shape[0], column : column + self.shape[1]]
        part.copy_(torch.from_numpy(np.array(data))[: part.shape[0]])


class Part(threading.Thread):
    """A part of a program; it runs while it has the turn."""

    def __init__(self, machine: Machine, function: Callable[..., None], arguments: Any) -> None:
        super().__init__(daemon=True)
        self.machine, self.function, self.arguments = machine, function, arguments
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.done = False
        self.failure: BaseException | None = None
        self.products: list[Callable[[], None]] = []
        self.stores: list[Callable[[], None]] = []

    def run(self) -> None:
        self.turn.acquire()
        try:
            self.function(*self.arguments)
        except BaseException as failure:
            self.failure = failure
        self.done = True
        self.machine.turn.release()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Lets others go on, at least until `ready`."""
        self.ready = ready
        self.machine.turn.release()
        self.turn.acquire()
        if self.machine.stopped:
            raise SystemExit


class Machine:
    """One launch, program after program, in an order drawn from `seed`."""

    def __init__(self, kernel: Any, seed: int) -> None:
        self.rng = random.Random(seed)
        self.slow = self.rng.choice(("nothing", "product", "store", "box", "part"))
        self.turn = threading.Semaphore(0)
        self.stopped = False
        self.landing: list[Callable[[], None]] = []
        self.program, self.programs = 0, 1
        self.part: Part | None = None
        self.converted: dict[int, Any] = {}
        self.kernel = self.convert(kernel)

    # What the kernel's source sees.

    def convert(self, value: Any) -> Any:
        """A global of the kernel's modules, for this machine."""
        if isinstance(value, tl.constexpr):
            return value.value
        if value is gl or value is tl:
            return self.language
        if value in (hopper.tma, hopper.mbarrier):
            return self
        name = getattr(value, "__name__", "")
        renamed = {
            "async_load": self.load_box,
            "async_copy_global_to_shared": self.load_box,
            "async_store": self.store_box,
            "async_copy_shared_to_global": self.store_box,
            "fence_async_shared": lambda: None,
            "warpgroup_mma": self.warpgroup_mma,
            "warpgroup_mma_wait": self.warpgroup_mma_wait,
        }
        if name in renamed:
            return renamed[name]
        function = getattr(value, "fn", None)
        if isinstance(function, types.FunctionType):
            if id(value) not in self.converted:
                # Filled in after it is known under its name: functions call each other.
                names: dict[str, Any] = {}
                new = types.FunctionType(function.__code__, names, function.__name__)
                self.converted[id(value)] = new
                for name in function.__code__.co_names:
                    if name in function.__globals__:
                        names[name] = self.convert(function.__globals__[name])
            return self.converted[id(value)]
        return value

    @functools.cached_property
    def language(self) -> types.SimpleNamespace:
        """`gl`, as far as the kernel uses it."""

        def split(x: Array) -> tuple[Array, Array]:
            return array(x[..., 0]), array(x[..., 1])

        def load(at: Pointer, mask: Any = True, other: float = 0.0) -> Any:
            found = values(at.tensor)[at.checked(mask)]
            return array(np.where(mask, found, np.asarray(other, found.dtype)))

        def store(at: Pointer, value: Array, mask: Array) -> None:
            where = at.checked(mask)
            flat = at.tensor.view(-1)
            flat[torch.from_numpy(where[mask])] = torch.from_numpy(np.array(value))[mask]

        def multiple_of(at: Pointer, factor: int) -> Pointer:
            assert at.tensor.data_ptr() % factor == 0
            return at

        def numbers(function: Any) -> Any:
            return lambda *x: array(function(*x)) if np.ndim(x[0]) else int(function(*x))

        return types.SimpleNamespace(
            constexpr=None,
            float32=np.dtype(np.float32),
            int32=np.dtype(np.int32),
            int64=np.dtype(np.int64),
            program_id=lambda axis: self.program,
            num_programs=lambda axis: self.programs,
            assume=lambda condition: None,
            static_range=range,
            cdiv=lambda x, y: -(-x // y),
            cast=lambda x, dtype: x,
            minimum=numbers(np.minimum),
            maximum=numbers(np.maximum),
            arange=lambda start, end, layout: array(np.arange(start, end)),
            zeros=lambda shape, dtype, layout: array(np.zeros(shape, dtype)),
            where=lambda c, x, y: array(np.where(c, x, np.asarray(y, np.float32))),
            sum=lambda x, axis: array(np.sum(x, axis)),
            max=lambda x, axis: np.max(x, axis),
            exp2=lambda x: array(np.exp2(x)),
            fma=lambda x, y, z: array(x * np.float32(y) + np.float32(z)),
            reshape=lambda x, shape: x.reshape(shape),
            permute=lambda x, order: x.transpose(order),
            split=split,
            convert_layout=lambda x, layout, assert_trivial: x,
            load=load,
            store=store,
            multiple_of=multiple_of,
            SliceLayout=lambda *_: None,
            NVMMADistributedLayout=lambda *_: None,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize,
        )

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        return Shared(array(np.full(shape, np.nan, np.float32)))

    def MBarrierLayout(self) -> None:
        return None

    def init(self, barrier: Shared, count: int) -> None:
        barrier.arrivals = barrier.pending = count

    def expect(self, barrier: Shared, size: int) -> None:
        assert barrier.pending == 1, "bytes are announced twice in a phase"
        barrier.bytes += size
        barrier.pending -= 1
        barrier.settle()
        self.now().pause()

    def arrive(self, barrier: Shared, count: int, pred: bool = True) -> None:
        if pred:
            barrier.pending -= count
            barrier.settle()
        self.now().pause()

    def wait(self, barrier: Shared, parity: int, pred: bool = True) -> None:
        if pred:
            self.now().pause(lambda: barrier.phase != parity)

    def load_box(self, box: Box, at: list[int], barrier: Shared, target: Shared) -> None:
        def land() -> None:
            target.data[...] = box.load(*at)
            barrier.bytes -= target.data.size * box.dtype.itemsize
            barrier.settle()

        self.landing.append(land)
        self.now().pause()

    def store_box(self, box: Box, at: list[int], source: Shared) -> None:
        began = np.array(source.data)

        def leave() -> None:
            if not np.array_equal(began, source.data, equal_nan=True):
                raise Overwritten("a store read what was written after it")
            box.store(*at, source.data)

        self.now().stores.append(leave)
        self.now().pause()

    def store_wait(self, most: int) -> None:
        part = self.now()
        part.pause(lambda: len(part.stores) <= most)

    def warpgroup_mma(self, a: Shared, b: Shared, acc: Array, is_async: bool) -> Array:
        assert is_async
        began = np.array(a.data), np.array(b.data)
        assert not np.isnan(began[0]).any()
        assert not np.isnan(began[1]).any()

        def end() -> None:
            if not all(map(np.array_equal, began, (a.data, b.data))):
                raise Overwritten("a product read what landed after it began")

        self.now().products.append(end)
        self.now().pause()
        new = (began[0].astype(np.float64) @ began[1].astype(np.float64)).astype(np.float32)
        return array(acc + new)

    def warpgroup_mma_wait(self, most: int, deps: tuple[Array]) -> Array:
        part = self.now()
        part.pause(lambda: len(part.products) <= most)
        return deps[0]

    # How it runs.

    def now(self) -> Part:
        assert self.part is not None
        return self.part

    def warp_specialize(self, parts: Any, warps: list[int], registers: list[int]) -> None:
        assert warps == [4, 1]
        threads = [Part(self, function, arguments) for function, arguments in parts]
        for thread in threads:
            thread.start()
        try:
            while not all(thread.done for thread in threads):
                self.step(threads)
            for thread in threads:
                assert not thread.products, "products are still under way at the end"
                assert not thread.stores, "stores are still under way at the end"
            assert not self.landing, "boxes are still under way at the end"
        finally:
            self.stopped = True
            for thread in threads:
                thread.turn.release()
                thread.join()
            self.stopped = False

    def step(self, threads: list[Part]) -> None:
        """One thing that may happen."""
        # Products end in their order, and so do stores; boxes land in any.
        able: dict[str, list[Callable[[], None]]] = {
            "part": [lambda t=t: self.resume(t) for t in threads if not t.done and t.ready()],
            "product": [lambda t=t: t.products.pop(0)() for t in threads if t.products],
            "store": [lambda t=t: t.stores.pop(0)() for t in threads if t.stores],
            "box": [lambda i=i: self.landing.pop(i)() for i in range(len(self.landing))],
        }
        others = [event for kind, events in able.items() if kind != self.slow for event in events]
        slow = able.get(self.slow, [])
        if not others and not slow:
            raise Stuck("every part waits")
        self.rng.choice(others if others and self.rng.random() < 0.98 else others + slow)()

    def resume(self, part: Part) -> None:
        self.part = part
        part.turn.release()
        self.turn.acquire()
        if part.failure is not None:
            raise part.failure

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        """As a launcher calls a kernel."""

        def launch(*arguments: Any, **constants: Any) -> None:
            for option in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion"):
                constants.pop(option)
            given = [
                Pointer(x) if isinstance(x, Tensor) else Box(x) if hasattr(x, "block_shape") else x
                for x in arguments
            ]
            self.programs = grid[0]
            for program in range(self.programs):
                self.program = program
                self.kernel(*given, **constants)

        return launch
