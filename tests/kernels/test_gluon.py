"""The Gluon kernel without a GPU: its source on a machine of our own against the plain kernel in
Triton's interpreter, a model of its barriers in every order of events, and what launches compile.
"""

from __future__ import annotations

import ast
import inspect
import random
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from fastdpop.kernels import config, epilogue, forward, gluon_forward, gluon_parts
from tests.kernels import pipeline_model
from tests.kernels.gluon_machine import Machine, Overwritten, Stuck
from tests.kernels.pipeline_model import Hazard, Setup

KERNEL = gluon_forward.forward_kernel
HOPPER = {dtype: config.of("sm_90a", dtype) for dtype in (torch.bfloat16, torch.float16)}


def exact(rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Operands whose products, exponentials and sums are exact, so that no order of summation can
    hide a difference.
    """
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.zeros(rows, width)
    for column in (0, width - 1):
        hidden[:, column] = torch.randint(-1, 2, (rows,), generator=generator)
    weight = torch.randint(-1, 2, (vocabulary, width), generator=generator)
    bias = torch.randint(0, 2, (vocabulary,), generator=generator).to(dtype)
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "bias": forward.padded_bias(bias, HOPPER[dtype]),
        "targets": torch.randint(0, vocabulary, (rows,), generator=generator),
        "shift": torch.randint(0, 2, (rows,), generator=generator).float(),
    }


def both(
    monkeypatch: pytest.MonkeyPatch,
    machine: Machine,
    programs: int,
    given: dict[str, Any],
    transform: forward.Transform,
    keep: bool,
    **options: Any,
) -> tuple[forward.Forward, forward.Forward]:
    """Ours and the plain kernel's."""
    of = HOPPER[given["hidden"].dtype]
    monkeypatch.setattr(gluon_forward, "forward_kernel", machine)
    monkeypatch.setattr(config, "processors", lambda device: programs)
    results = []
    for module in (gluon_forward, forward):
        kept = None
        if keep:
            shape = (len(given["hidden"]), forward.kept_width(len(given["weight"]), of))
            kept = torch.full(shape, torch.nan, dtype=given["hidden"].dtype)
        results.append(
            module.forward(**given, transform=transform, of=of, exp_logits=kept, **options)
        )
    return results[0], results[1]


beside_the_interpreter = pytest.mark.skipif(
    triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="triton 3.6's interpreter takes arrays for numbers, as numpy 2.4 no longer does",
)

PLAIN = forward.Transform(scale=1.0, cap=1.0, softcap=False, slope=1.0)
SOFTCAP = forward.Transform(scale=2.9, cap=0.25, softcap=True, slope=1.3)


@beside_the_interpreter
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "programs", "dtype", "with_bias", "keep", "statistics"),
    [
        (200, 600, 136, 2, torch.bfloat16, False, True, False),
        (129, 512, 64, 4, torch.float16, True, True, True),
        (190, 300, 200, 1, torch.bfloat16, True, False, True),
        (40, 1100, 328, 3, torch.bfloat16, False, False, False),
    ],
)
def test_the_source_does_what_the_plain_kernel_does(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    vocabulary: int,
    width: int,
    programs: int,
    dtype: torch.dtype,
    with_bias: bool,
    keep: bool,
    statistics: bool,
) -> None:
    """Bit for bit: coordinates, masks, what is written where."""
    given: dict[str, Any] = exact(rows, vocabulary, width, dtype)
    if not with_bias:
        given["bias"] = None
    machine = Machine(KERNEL, seed=rows)
    ours, plain = both(monkeypatch, machine, programs, given, PLAIN, keep, statistics=statistics)
    for name in ("tile_sumexp", "target_logit", "statistics", "exp_logits"):
        expected = getattr(plain, name)
        if expected is None:
            assert getattr(ours, name) is None
        else:
            torch.testing.assert_close(getattr(ours, name), expected, rtol=0, atol=0)


@beside_the_interpreter
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_softcap(monkeypatch: pytest.MonkeyPatch, with_bias: bool) -> None:
    """With a bias, or with the zeros that take its place."""
    given: dict[str, Any] = exact(140, 300, 72, torch.bfloat16)
    if not with_bias:
        given["bias"] = None
    machine = Machine(KERNEL, seed=1)
    ours, plain = both(monkeypatch, machine, 2, given, SOFTCAP, True, statistics=True)
    for name in ("tile_sumexp", "target_logit", "statistics"):
        # Neither the interpreter's sums nor its fma are the same in every version.
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-5, atol=1e-6)
    assert ours.exp_logits is not None
    torch.testing.assert_close(ours.exp_logits, plain.exp_logits, rtol=2**-7, atol=0)


@beside_the_interpreter
@pytest.mark.parametrize("active", [0, 1, 128, 129, 300, 1000])
def test_rows_that_are_not_wanted(monkeypatch: pytest.MonkeyPatch, active: int) -> None:
    """Their tiles are left alone, and nobody waits for them."""
    given = exact(300, 520, 72, torch.bfloat16)
    ours, plain = both(
        monkeypatch,
        Machine(KERNEL, seed=active),
        2,
        given,
        PLAIN,
        True,
        num_active=torch.tensor(active, dtype=torch.int32),
    )
    assert ours.exp_logits is not None
    assert plain.exp_logits is not None
    whole = min(-(-active // 128) * 128, 300)
    assert ours.exp_logits[whole:].isnan().all()
    torch.testing.assert_close(ours.exp_logits, plain.exp_logits, rtol=0, atol=0, equal_nan=True)
    for name in ("tile_sumexp", "target_logit"):
        found, expected = getattr(ours, name), getattr(plain, name)
        torch.testing.assert_close(found[..., :whole], expected[..., :whole], rtol=0, atol=0)


class NoStoreWait(Machine):
    def store_wait(self, most: int) -> None:
        super().store_wait(most if most == 0 else 9)


class EarlyArrival(Machine):
    def warpgroup_mma_wait(self, most: int, deps: Any) -> Any:
        return super().warpgroup_mma_wait(most + 1 if most else 0, deps)


class OneArrivalTooFew(Machine):
    def init(self, barrier: Any, count: int) -> None:
        super().init(barrier, 1)


class TooManyBytes(Machine):
    def expect(self, barrier: Any, size: int) -> None:
        super().expect(barrier, size + 2)


class ThirdPartUnheard(Machine):
    def init(self, barrier: Any, count: int) -> None:
        super().init(barrier, count + (count == 2))


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (NoStoreWait, Overwritten),
        (EarlyArrival, Overwritten),
        (OneArrivalTooFew, AssertionError),
        (TooManyBytes, Stuck),
        (ThirdPartUnheard, Stuck),
    ],
)
def test_the_machine_notices(
    monkeypatch: pytest.MonkeyPatch, broken: type[Machine], error: type[AssertionError]
) -> None:
    """What is not synchronised goes wrong within a few runs."""
    given: dict[str, Any] = {**exact(128, 520, 512, torch.bfloat16), "bias": None}
    # Different in every step, or a product would not notice that it read another's.
    given["hidden"] = torch.randn(128, 512).bfloat16()
    monkeypatch.setattr(config, "processors", lambda device: 1)
    of = HOPPER[torch.bfloat16]

    def try_often() -> None:
        for seed in range(20):
            monkeypatch.setattr(gluon_forward, "forward_kernel", broken(KERNEL, seed))
            kept = torch.empty(128, 768, dtype=torch.bfloat16)
            gluon_forward.forward(**given, transform=PLAIN, of=of, exp_logits=kept)

    with pytest.raises(error):
        try_often()


# --- the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("setup", pipeline_model.SMALL, ids=str)
def test_every_order_of_events(setup: Setup) -> None:
    assert pipeline_model.explore(setup) > 0


def test_random_orders_of_events_on_the_real_ring() -> None:
    for seed in range(60):
        setup = Setup(
            stages=gluon_forward.STAGES,
            steps=(1, 2, 3, 4, 5, 7, 64)[seed % 7],
            tiles=(0, 1, 2, 3, 5)[seed % 5],
            lag=gluon_forward.LAG,
            keep=seed % 3 > 0,
            outside=frozenset({1} if seed % 4 == 0 else ()),
        )
        pipeline_model.walk(setup, seed)


@pytest.mark.parametrize("fault", pipeline_model.FAULTS)
def test_the_model_notices(fault: str) -> None:
    setup = Setup(stages=3, steps=4, tiles=3, fault=fault)

    def try_often() -> None:
        for seed in range(300):
            pipeline_model.walk(setup, seed)

    with pytest.raises(Hazard):
        try_often()


def test_every_tile_has_one_program() -> None:
    """For odd sizes, with the place of the next tile formed one tile ahead."""
    rng = random.Random(0)
    for _ in range(400):
        pipeline_model.assert_tiles_covered(
            place=Machine(KERNEL, 0).convert(gluon_parts.place),
            rows=rng.choice((1, 64, 127, 128, 129, 300, 1000, 2048, 4097)),
            wanted=rng.choice((0, 1, 100, 128, 129, 5000)),
            vocabulary=rng.choice((8, 255, 256, 257, 1000, 5003)),
            programs=rng.choice((1, 2, 7, 114, 132)),
            group_n=rng.choice((1, 3, 8, 16, 64)),
        )


# --- one formula ------------------------------------------------------------------------------------


class Neutral(ast.NodeTransformer):
    """Names as they would be if there were one language: ``tl`` for ``gl``, and no layouts."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name("tl") if node.id == "gl" else ast.Name(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == "tiles":
            return ast.Name(node.attr)
        return self.generic_visit(node)


def statements(function: Any) -> list[str]:
    """Of an epilogue, from the bias to the exponentials that are kept; see the test below."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    body = [ast.unparse(Neutral().visit(node)) for node in tree.body]
    first = next(i for i, text in enumerate(body) if text.startswith("if BIAS"))
    return body[first:]


def test_the_epilogue_is_the_plain_kernels() -> None:
    """Statement by statement, but for how bias is loaded and how E leaves."""
    ours, plain = statements(gluon_parts.quarter), statements(epilogue.quarter)
    assert len(ours) == len(plain)
    assert ours[1:-2] == plain[1:-2]
    assert ours[-1] == plain[-1]
    kept = "e = e * tl.maximum(tl.fma(-u, u, 1.0), 0.0)"
    assert kept in ours[-2]
    assert kept in plain[-2]
    for text in (ours[0], plain[0]):
        assert text.endswith("u = u + tl.load(at).to(tl.float32)[None, :]")
    # And they compare something.
    assert any("tl.exp2(x)" in text for text in ours[1:-2])


# --- launches ---------------------------------------------------------------------------------------


class Recorder:
    """In the kernel's place: keeps what a launch passes."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **keywords: Any) -> None:
            self.grid, self.arguments, self.keywords = grid, arguments, keywords

        return launch


def type_of(argument: Any) -> str:
    """As Triton names it in a signature."""
    names = {
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.float32: "fp32",
        torch.int32: "i32",
        torch.int64: "i64",
    }
    if isinstance(argument, Tensor):
        return f"*{names[argument.dtype]}"
    if hasattr(argument, "block_shape"):
        box = ", ".join(map(str, argument.block_shape))
        return f"tensordesc<{names[argument.base.dtype]}[{box}],{argument.layout!r}>"
    return {type(None): "constexpr", int: "i32", float: "fp32"}[type(argument)]


@pytest.mark.parametrize("dtype", HOPPER)
@pytest.mark.parametrize("options", range(32))
def test_launches_are_what_the_registry_lists(
    monkeypatch: pytest.MonkeyPatch, options: int, dtype: torch.dtype
) -> None:
    keep, bias, softcap, statistics, active = (bool(options >> i & 1) for i in range(5))
    given: dict[str, Any] = exact(130, 300, 64, dtype)
    if not bias:
        given["bias"] = None
    elif options % 4 == 3:
        # Not aligned: the launcher has to see to it.
        given["bias"] = torch.cat([given["bias"][:1], given["bias"]])[1:]
    signature, constants, launch = gluon_forward.variants_signature(
        {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype],
        keep,
        bias,
        softcap,
        statistics,
        active,
    )
    recorder = Recorder()
    names = gluon_forward.forward_kernel.arg_names
    monkeypatch.setattr(gluon_forward, "forward_kernel", recorder)
    monkeypatch.setattr(config, "processors", lambda device: 132)
    gluon_forward.forward(
        **given,
        transform=SOFTCAP if softcap else PLAIN,
        of=HOPPER[dtype],
        exp_logits=torch.empty(130, 512, dtype=dtype) if keep else None,
        statistics=statistics,
        num_active=torch.tensor(7, dtype=torch.int32) if active else None,
    )
    assert recorder.grid == (4,)
    passed = dict(zip(names, recorder.arguments, strict=False))
    expected = {name: kind for name, kind in signature.items() if name in passed}
    assert {name: type_of(argument) for name, argument in passed.items()} == expected
    none = {name: None for name, argument in passed.items() if argument is None}
    assert {**recorder.keywords, **none} == {**constants, **launch}
    assert passed["bias"] is None or passed["bias"].data_ptr() % 16 == 0
    if softcap and not bias:
        assert passed["bias"].signbit().all(), "only -0 leaves every number as it is"


def test_what_is_not_supported() -> None:
    of = HOPPER[torch.bfloat16]
    hidden, weight = torch.zeros(4, 64).bfloat16(), torch.zeros(300, 64).bfloat16()
    kept = torch.zeros(4, 512).bfloat16()

    def reason(h: Tensor = hidden, w: Tensor = weight, e: Tensor | None = kept, of=of) -> str:
        return gluon_forward.supported(h, w, e, of) or ""

    assert "on cpu" in reason()
    assert "16 bits" in reason(h=hidden.float())
    assert "weight is torch.float16" in reason(w=weight.half())
    assert "exp_logits is torch.float32" in reason(e=kept.float())
    assert "rows of weight do not" in reason(w=torch.zeros(300, 68).bfloat16()[:, 1:65])
    assert "(128, 128, 64)" in reason(of=config.of("sm_100", torch.bfloat16))
    assert "tiles are more" in reason(w=weight[:1].expand(2**39, 64))
