"""What would be launched on a GPU, without one: kernels are recorded, and neither compiled nor run.

    with recorded("sm_90a") as recording:
        engine.logps(problem, ())          # on the CPU or on the meta device
    recording.launches                     # in order, products by cuBLAS among them
    recording.compiled                     # what would have been compiled for them

Triton itself binds the arguments and decides what a launch compiles; only its driver, its compiler
and the launch are replaced. Results are what memory happens to hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastdpop.engines import STATISTICS, Engine, GroupLoss, NeedsGrad, Problem
from fastdpop.engines.triton import FORWARDS, PRODUCTS, TritonEngine
from fastdpop.kernels import config, gluon_forward
from fastdpop.kernels import losses as jitted
from fastdpop.transform import LogitTransform
from tests.batches import LOSSES, batch, fused
from tools.kernels import registry
from tools.kernels.chips import CHIPS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

PROCESSORS = 132
"""Multiprocessors of the chip that is not there."""

CUBLAS = "cuBLAS"
"""The kernel of a launch that is a product by cuBLAS."""

HEADS = {"plain": LogitTransform(), "softcap": LogitTransform(softcap=30.0, logit_scale=0.5)}
"""One for each choice of the kernels' constants: scales are numbers."""

_devices = itertools.count()


@dataclass(frozen=True)
class Compiled:
    """What a launch compiles; two that are equal are compiled once.

    Attributes:
        module, kernel: where the kernel stands, and its name.
        signature: the type of each argument, in order.
        constants: values by name, as text.
        attrs: what is known of arguments, where anything is.
        options: warps, stages, whether sums and products are contracted, registers at most.
        source: the jitted function and Triton's own arguments for it, to compile it in earnest.
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, str], ...]
    attrs: tuple[tuple[str, str], ...]
    options: tuple[Any, ...]
    source: tuple[Any, ...] = field(compare=False, repr=False, default=())


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: the name of the kernel, or :data:`CUBLAS`.
        grid: its programs.
        sizes: arguments that are numbers, by name; of a product, its m, n and k.
        compiled: what it compiles; None for cuBLAS.
    """

    kernel: str
    grid: tuple[int, ...]
    sizes: dict[str, float]
    compiled: Compiled | None


@dataclass
class Recording:
    """What happened so far."""

    target: str
    launches: list[Launch] = field(default_factory=list)

    @property
    def compiled(self) -> list[Compiled]:
        """Each once, in the order of their first launches."""
        return list(dict.fromkeys(one.compiled for one in self.launches if one.compiled))

    @property
    def kernels(self) -> list[str]:
        """The names of what was launched, in order."""
        return [one.kernel for one in self.launches]


class _Driver:
    """All that Triton asks a driver for before it compiles."""

    def __init__(self, capability: int) -> None:
        # A device of its own, because what is compiled is kept by device.
        self.device = f"recorded {next(_devices)}"
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _text(value: Any) -> str:
    """A constant, told apart from all others that compile to something else."""
    if isinstance(value, JITFunction):
        return f"{value.fn.__module__}.{value.fn.__name__}"
    value = getattr(value, "value", value)  # tl.constexpr
    return str(value) if type(value).__name__ == "dtype" else repr(value)


def _identity(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], attrs: dict[str, Any],
    options: dict[str, Any], source: tuple[Any, ...] = (),
) -> Compiled:  # fmt: skip
    return Compiled(
        kernel.fn.__module__,
        kernel.fn.__name__,
        tuple(signature.items()),
        tuple(sorted((name, _text(value)) for name, value in constants.items())),
        tuple(sorted((name, str(value)) for name, value in attrs.items() if value)),
        tuple(
            options.get(name, default)
            for name, default in (
                ("num_warps", 4), ("num_stages", 3), ("enable_fp_fusion", True), ("maxnreg", None),
            )
        ),
        source,
    )  # fmt: skip


def names(recording: Recording) -> list[str]:
    """The registry's names of what was compiled; of what it does not know, the kernel's."""
    known = {of_variant(variant): variant.name for variant in registry.variants(recording.target)}
    return [known.get(one, f"{one.kernel}, not in the registry") for one in recording.compiled]


def of_variant(variant: Any) -> Compiled:
    """What the registry's variant says is compiled, to compare with what is."""
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    names = variant.kernel.arg_names
    attrs = {names[path[0]]: value for path, value in variant.attrs.items()}
    return _identity(
        variant.kernel, variant.signature, variant.constants, attrs, options | variant.options
    )


@contextlib.contextmanager
def recorded(target: str = "sm_90a", processors: int = PROCESSORS) -> Iterator[Recording]:
    """Record instead of launching, as on a chip of that target. The Triton engine takes tensors of
    any device meanwhile.

    Raises:
        RuntimeError: Triton runs in its interpreter, which launches nothing.
    """
    if config.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter has nothing to record")
    recording = Recording(target)
    launch, mm, addmm = JITFunction.run, torch.mm, torch.addmm
    cannot = TritonEngine.unavailable

    def compile_(
        self: Any, key: str, signature: Any, device: Any, constants: Any, options: Any, attrs: Any,
        warmup: bool,
    ) -> Compiled:  # fmt: skip
        names = self.arg_names
        found = _identity(
            self,
            dict(signature),
            {names[path[0]]: value for path, value in constants.items()},
            {names[path[0]]: value for path, value in attrs.items()},
            options.__dict__,
            (self, dict(signature), dict(constants), dict(attrs), dict(options.__dict__)),
        )
        self.device_caches[device][0][key] = found
        return found

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        found = launch(self, *args, grid=grid, warmup=True, **kwargs)
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        sizes = {name: v for name, v in given.items() if isinstance(v, (int, float))}
        recording.launches.append(Launch(self.fn.__name__, tuple(grid), sizes, found))
        return found

    def product(a: Tensor, b: Tensor, out: Tensor | None, dtype: torch.dtype) -> Tensor:
        (m, k), n = a.shape, b.shape[1]
        recording.launches.append(Launch(CUBLAS, (), {"m": m, "n": n, "k": k}, None))
        result = a.new_empty((m, n), dtype=dtype) if out is None else out
        assert result.shape == (m, n)
        assert result.dtype == dtype
        assert len(b) == k
        return result

    def mm_(a: Tensor, b: Tensor, out_dtype: Any = None, *, out: Tensor | None = None) -> Tensor:
        if out_dtype is None:
            return mm(a, b) if out is None else mm(a, b, out=out)
        return product(a, b, out, out_dtype)

    def addmm_(c: Tensor, a: Tensor, b: Tensor, out_dtype: Any = None, **more: Any) -> Tensor:
        if out_dtype is None:
            return addmm(c, a, b, **more)
        assert c.dtype == out_dtype
        assert set(more) <= {"out"}
        return product(a, b, more.get("out"), out_dtype)

    def unavailable(self: TritonEngine, device: torch.device, dtype: torch.dtype) -> str | None:
        return cannot(self, torch.device("cuda"), dtype)

    with contextlib.ExitStack() as stack:
        stack.enter_context(config.assumed(target, processors))
        for owner, name, what in (
            (driver, "_active", _Driver(CHIPS[target].capability)),
            (JITFunction, "_do_compile", compile_),
            (JITFunction, "run", run),
            (torch, "mm", mm_),
            (torch, "addmm", addmm_),
            (TritonEngine, "unavailable", unavailable),
        ):
            stack.enter_context(mock.patch.object(owner, name, what))
        yield recording


def problem(
    dtype: torch.dtype,
    *,
    rows: int = 300,
    width: int = 512,
    vocabulary: int = 3_001,
    groups: list[int] | None = None,
    head: str = "plain",
    bias: bool = False,
    workspace: int = 1 << 30,
    device: str = "meta",
    stored: torch.dtype | None = None,
) -> Problem:
    """Rows that hold nothing. Their groups are thirds where nothing else is said; tensors are
    `stored` in another dtype than that of the products under autocast.
    """
    stored = stored or dtype
    return Problem(
        hidden=torch.empty(rows, width, dtype=stored, device=device),
        weight=torch.empty(vocabulary, width, dtype=stored, device=device),
        bias=torch.empty(vocabulary, dtype=stored, device=device) if bias else None,
        targets=torch.zeros(rows, dtype=torch.int64, device=device),
        groups=groups or [0, rows // 3, 2 * rows // 3, rows],
        transform=HEADS[head],
        compute_dtype=dtype,
        workspace_bytes=workspace,
    )


def every_route(engine: Engine, p: Problem, statistics: tuple[str, ...] = ()) -> None:
    """Every method on a problem, the one that asks for coefficients in one chunk, chunk by chunk,
    and with groups beyond the workspace; and each gradient by itself.
    """
    c = p.targets.new_empty(len(p.targets), dtype=torch.float32)
    lse = torch.empty_like(c)
    every = NeedsGrad(True, True, p.bias is not None)

    def one_pass(p: Problem, wanted: NeedsGrad) -> None:
        engine.logps_and_gradients(
            p,
            statistics,
            GroupLoss(lambda first, last, *_: c[p.groups[first] : p.groups[last]]),
            wanted,
        )

    logits = len(p.weight) * len(p.targets) * p.compute_dtype.itemsize
    for workspace in (p.workspace_bytes, logits * 2 // 3, logits // 4):
        small = dataclasses.replace(p, workspace_bytes=max(workspace, 1))
        one_pass(small, every)
        engine.gradients(small, lse, c, every)
    engine.logps(p, statistics)
    engine.logps_and_dlogp_dhidden(p, statistics)
    for wanted in (NeedsGrad(True, False, False), NeedsGrad(False, True, False)):
        one_pass(p, wanted)


def problems(dtype: torch.dtype) -> Iterator[tuple[Problem, tuple[str, ...]]]:
    """Every choice of a head, and shapes beside whole tiles, with statistics or without."""
    for head, bias in itertools.product(HEADS, (False, True)):
        for statistics in ((), STATISTICS):
            yield problem(dtype, head=head, bias=bias), statistics
    for rows, width, vocabulary in ((1, 8, 9), (129, 72, 1_000), (257, 577, 4_097)):
        yield problem(dtype, rows=rows, width=width, vocabulary=vocabulary, groups=[0, rows]), ()
    if dtype != torch.float32:
        yield problem(dtype, stored=torch.float32, bias=True), ()


def odd_views(dtype: torch.dtype) -> Problem:
    """Tensors on the CPU that begin at odd addresses, with rows of odd strides."""
    rows, width, vocabulary = 33, 40, 300

    def odd(*shape: int) -> Tensor:
        wide = torch.zeros(*shape[:-1], shape[-1] + 3, dtype=dtype)
        return wide[..., 1 : 1 + shape[-1]]

    return Problem(
        hidden=odd(rows, width).contiguous(),
        weight=odd(vocabulary, width),
        bias=odd(vocabulary),
        targets=torch.zeros(rows + 1, dtype=torch.int64)[1:],
        groups=[0, 1, 12, 13, 33],
        transform=HEADS["plain"],
        compute_dtype=dtype,
        workspace_bytes=1 << 14,
    )


def launch_losses() -> None:
    """Every loss that has a kernel, through the public function."""
    for loss in LOSSES.values():
        if type(loss).__name__ in jitted.BY_NAME:
            example = batch(2, length=6, width=8, vocabulary=20)
            fused(example, loss, engine="triton").loss.backward()


def everything(target: str) -> Recording:
    """What the engine launches on a target over all of these problems, however it is set."""
    with recorded(target) as recording, torch.random.fork_rng():
        for products, forward in zip(PRODUCTS, FORWARDS, strict=True):
            engine = TritonEngine(products=products, forward=forward)
            for dtype in DTYPES:
                for p, statistics in problems(dtype):
                    every_route(engine, p, statistics)
                every_route(engine, odd_views(dtype))
        launch_losses()
    return recording


def settle_keys() -> None:
    """Have Triton hash all kernels, in a fixed order. In triton 3.6 a kernel's hash, and with it
    its place in the cache on disk, depends on which others were hashed before it: so processes that
    are to share what they compile do this first.
    """
    kernels = [variant.kernel for variant in registry.variants(config.TARGETS[0])]
    for function in dict.fromkeys([*jitted.ALL, *kernels, gluon_forward.forward_kernel]):
        _ = function.cache_key
