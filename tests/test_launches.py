"""What the Triton engine launches, without a GPU: nothing that was not compiled ahead of time, no
new variant in the middle of a training run, and no wait for the device.
"""

from __future__ import annotations

import collections
import dataclasses
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

from fastdpop import fused_logps, fused_preference_loss, losses
from fastdpop.engines import STATISTICS, GroupLoss, NeedsGrad, PairLossPlan
from fastdpop.engines.triton import FORWARDS, PRODUCTS, TritonEngine
from fastdpop.kernels import config
from fastdpop.transform import LogitTransform
from tests import launches
from tests.gpu import gluon_twin
from tests.launches import CUBLAS, DTYPES, Recording, every_route, of_variant, problem, recorded
from tools.kernels import registry

TRAINED = NeedsGrad(True, True, False)


@pytest.fixture(scope="module", params=config.TARGETS)
def everything(request: pytest.FixtureRequest) -> Recording:
    return launches.everything(request.param)


def test_every_launch_was_compiled_ahead_of_time(everything: Recording) -> None:
    """With the same constants, types, facts about arguments, warps and stages."""
    shipped = {of_variant(variant) for variant in registry.variants(everything.target)}
    assert CUBLAS in everything.kernels
    for compiled in everything.compiled:
        near = [v for v in shipped if (v.module, v.kernel) == (compiled.module, compiled.kernel)]
        assert compiled in shipped, near


def test_what_is_compiled_ahead_of_time_is_launched(everything: Recording) -> None:
    launched = set(everything.compiled)
    idle = {
        variant.name
        for variant in registry.variants(everything.target)
        if of_variant(variant) not in launched
    }
    assert idle == set()


def test_variants_have_their_own_names_and_meanings() -> None:
    for target in config.TARGETS:
        variants = registry.variants(target)
        assert len({of_variant(v) for v in variants}) == len({v.name for v in variants})
        assert len({v.name for v in variants}) == len(variants)


def test_a_gpu_that_is_assumed() -> None:
    """Wherever tensors are; another one inside it, and nothing of it afterwards."""
    meta = torch.device("meta")
    with config.assumed("sm_80", 108):
        assert (config.target_of(meta), config.processors(meta)) == ("sm_80", 108)
        assert config.on_gpu(meta)
        with config.assumed("sm_90a", 132):
            assert (config.target_of(meta), config.processors(meta)) == ("sm_90a", 132)
        with pytest.raises(KeyError), config.assumed("sm_90a", 132):
            raise KeyError
        assert (config.target_of(meta), config.processors(meta)) == ("sm_80", 108)
    assert not config.on_gpu(meta)
    with pytest.raises(ValueError, match="target is 'sm_1', expected one of sm_80, "):
        config.assumed("sm_1", 1).__enter__()


WIDTH, VOCABULARY = 40, 700

STEPS = (
    # lengths of completions, offset of the hidden states, MiB of workspace
    ([5, 9] * 4, 0, 64.0),
    ([33, 21, 8, 40], 0, 0.02),  # pairs beyond the workspace
    ([5, 9] * 4, 0, 0.06),  # several chunks
    ([1, 0], 0, 64.0),
    ([129, 0], 0, 64.0),
    ([3] * 32, 1, 64.0),
    ([7, 13] * 3, 3, 0.02),
    ([129, 2, 1, 1], 5, 0.1),
    ([255, 257], 1, 0.2),
    ([1, 1], 7, 0.001),
    ([16, 17, 18, 19, 20, 21], 2, 64.0),
)
"""A training run on batches of all sizes: the first three know everything that comes later."""


def one_step(dtype: torch.dtype, lengths: list[int], odd: int, mebi: float, trained: bool) -> None:
    """Reference log-probs and a step with DPOP, the hidden states as a view into wider ones."""
    count, longest = len(lengths), max(lengths) + 2
    hidden = torch.zeros(count, longest + odd, WIDTH + odd, dtype=dtype)[:, odd:, odd:]
    weight = torch.zeros(VOCABULARY * WIDTH + odd, dtype=dtype)[odd:].view(VOCABULARY, WIDTH)
    labels = torch.full((count, longest + odd), -100)[:, odd:]
    for line, length in zip(labels, lengths, strict=True):
        line[2 : 2 + length] = 1
    with torch.no_grad():
        fused_logps(hidden, weight, labels, engine="triton")
    out = fused_preference_loss(
        hidden.requires_grad_(),
        weight.requires_grad_(trained),
        labels,
        loss=losses.get("dpop"),
        ref_logps=torch.zeros(count),
        engine="triton",
        workspace_bytes=int(mebi * 2**20),
    )
    out.loss.backward()


@pytest.mark.parametrize(
    ("dtype", "trained", "variants"),
    [
        # target_logit, forward with and without E, the same two of combine, repair, pair_loss: 7;
        # and what recomputing takes: forward, dhidden, and dweight over what is there and added.
        (torch.bfloat16, True, 11),
        # The same without recomputing: the direction does not wait for the loss.
        (torch.bfloat16, False, 6),
        # The same 11, and the products that are cuBLAS's in bfloat16: dhidden and two of dweight.
        (torch.float32, True, 14),
        (torch.float32, False, 7),
        # Everything is recomputed, with references that are not the targets' rounded logits.
        (torch.float16, True, 11),
        (torch.float16, False, 8),
    ],
)
def test_nothing_is_compiled_in_the_middle_of_a_run(
    dtype: torch.dtype, trained: bool, variants: int
) -> None:
    counts = []
    with recorded() as recording:
        for lengths, odd, mebi in STEPS:
            one_step(dtype, lengths, odd, mebi, trained)
            counts.append(len(recording.compiled))
    names = collections.Counter(one.kernel for one in recording.compiled)
    assert counts[2:] == [variants] * (len(STEPS) - 2), (counts, names)


def test_numbers_are_not_compiled_in() -> None:
    """Scales, a softcap, a temperature and all sizes are arguments."""
    engine = TritonEngine()
    with recorded() as recording:
        for rows, number in ((64, 30.0), (1, 1.0), (16, 16.0)):
            p = problem(torch.bfloat16, rows=rows, width=rows * 8, vocabulary=rows)
            head = LogitTransform(softcap=number, logit_scale=1.0 / number, temperature=number)
            engine.logps(dataclasses.replace(p, transform=head), ())
    assert [one.kernel for one in recording.compiled] == [
        "target_logit_kernel",
        "forward_kernel",
        "combine_kernel",
        "repair_kernel",
    ]


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_host_never_waits(dtype: torch.dtype, products: str, forward: str) -> None:
    """On tensors that hold nothing, what would wait for a number of the device is an error."""
    engine = TritonEngine(products=products, forward=forward)
    p = problem(dtype, rows=2_048, width=4_096, vocabulary=128_256, bias=True, workspace=4 << 30)
    with pytest.raises(RuntimeError):
        p.targets.sum().item()
    with recorded() as recording:
        every_route(engine, p, STATISTICS)
        pairs = PairLossPlan(
            offsets=torch.empty(7, dtype=torch.int64, device="meta"),
            order=torch.empty(3, dtype=torch.int64, device="meta"),
            ref_logps=torch.empty(2, 3, dtype=torch.float64, device="meta"),
            rounded=True,
            loss="DPOP",
            options={"form": "inside", "beta": 0.3, "lam": 50.0, "label_smoothing": 0.0},
            share=1 / 3,
        )

        def dlogp(*_: object) -> torch.Tensor:
            raise AssertionError("the loss has a kernel")

        found = engine.logps_and_gradients(
            p, (), GroupLoss(dlogp, pairs), NeedsGrad(True, True, True)
        )
    assert found.losses is not None
    assert found.sequence_logps is not None
    assert recording.kernels.count("pair_loss_kernel") == 1


def sizes(recording: Recording, kernel: str, name: str) -> list[float]:
    return [one.sizes[name] for one in recording.launches if one.kernel == kernel]


def test_who_forms_the_products() -> None:
    """cuBLAS those of bfloat16 where no row is skipped: with the sizes of whole chunks, into what
    is there already.
    """
    wanted = NeedsGrad(True, True, False)
    for dtype, products, by_cublas in (
        (torch.bfloat16, "auto", 2),
        (torch.bfloat16, "kernels", 0),
        (torch.float32, "auto", 0),
        (torch.float16, "auto", 0),
    ):
        p = problem(dtype, rows=256, width=64, vocabulary=1_000, groups=[0, 256])
        c = torch.empty(256, device="meta")
        with recorded() as recording:
            TritonEngine(products=products).logps_and_gradients(
                p, (), GroupLoss(lambda *_, c=c: c), wanted
            )
        of_cublas = [one.sizes for one in recording.launches if one.kernel == CUBLAS]
        assert len(of_cublas) == by_cublas
        ours = [name for name in recording.kernels if name in ("dhidden_kernel", "dweight_kernel")]
        assert len(ours) == 2 - by_cublas
        assert of_cublas in ([], [{"m": 256, "n": 64, "k": 1_000}, {"m": 1_000, "n": 64, "k": 256}])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_through_the_forward_product(dtype: torch.dtype) -> None:
    """Rows through the forward product: once where a group fits the workspace, twice where it does
    not, and in float16.
    """
    rows = 512
    c = torch.empty(rows, device="meta")
    for workspace, times in ((1 << 30, 1), (1 << 19, 2)):
        p = problem(dtype, rows=rows, vocabulary=2_000, groups=[0, rows], workspace=workspace)
        with recorded() as recording:
            TritonEngine().logps_and_gradients(p, (), GroupLoss(lambda *_: c), TRAINED)
        found = sum(sizes(recording, "forward_kernel", "rows"))
        assert found == rows * (2 if dtype == torch.float16 else times)


@pytest.mark.parametrize("forward", FORWARDS)
def test_the_comparison_on_the_chip_asks_for_what_engines_give(forward: str) -> None:
    """tests/gpu/gluon_twin.py runs on a GPU only, in a process of its own."""
    with recorded() as recording:
        found = gluon_twin.results(
            TritonEngine(forward=forward), torch.bfloat16, torch.device("cpu"), 1
        )
    assert all(isinstance(one, torch.Tensor) for one in found)
    assert "forward_kernel" in recording.kernels
