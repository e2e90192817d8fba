"""Numbers that the data give for each pair: a weight for any loss, others for losses that read them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from fastdpop import engines, fused_dpop_loss, fused_preference_loss, losses
from fastdpop.losses import PairLogps, PreferenceLoss, Traits, pairwise
from fastdpop.losses.base import FunctionLoss
from fastdpop.pair_values import pair_value
from tests.batches import LOSSES, Batch, batch, fused, losses_by_definition

WEIGHTS = torch.tensor([0.5, 0.0, 2.5], dtype=torch.float64)


@dataclass(frozen=True)
class Margins(PreferenceLoss):
    """A loss that reads two names and needs one of them."""

    _traits: ClassVar[Traits] = Traits(reads=("margin", "offset"), needs=("margin",))

    def __call__(self, pairs: PairLogps) -> Tensor:
        logits = pairs.chosen_logratios - pairs.rejected_logratios - pairs.values["margin"]
        return F.softplus(-logits)


def margins(pairs: PairLogps) -> Tensor:
    """The same as a user's function."""
    logits = pairs.chosen_logratios - pairs.rejected_logratios - pairs.values["my margin"]
    return F.softplus(-logits)


def assert_same(got: Tensor, want: Tensor, example: Batch, wide: Batch) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(got.sum(), example.trained)
    theirs = torch.autograd.grad(want.sum(), wide.trained)
    for a, b in zip(ours, theirs, strict=True):
        bound = 2e-5 * float(b.abs().max()) + 1e-6
        torch.testing.assert_close(a.double(), b, rtol=0, atol=bound)


@pytest.mark.parametrize("workspace", [None, 2_000], ids=["whole", "chunks"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("engine", engines.available("cpu"))
@pytest.mark.parametrize("name", ["dpop", "ipo", "aot", "kto", "wpo", "ld dpop", "sum"])
def test_a_weight_of_any_loss(
    name: str, engine: str, trained: bool, reduction: str, workspace: int | None
) -> None:
    example = batch(3, bias=True, trained=trained)
    wide = example.to(torch.float64)
    out = fused(
        example,
        LOSSES[name],
        engine=engine,
        reduction=reduction,
        workspace_bytes=workspace,
        pair_values={"weight": WEIGHTS},
    )
    want = losses_by_definition(wide, LOSSES[name]) * WEIGHTS
    torch.testing.assert_close(out.losses.double(), want.detach(), rtol=1e-5, atol=1e-6)
    reduced = {"mean": want.mean(), "sum": want.sum(), "none": want}[reduction]
    assert_same(out.loss, reduced, example, wide)


@pytest.mark.parametrize("workspace", [None, 2_000], ids=["whole", "chunks"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize(
    "pairs", [None, [[2, 5], [0, 3], [1, 4]], [[0, 3], [2, 4], [0, 5], [1, 3]]]
)
def test_what_a_loss_reads_is_its_own_pairs(
    pairs: list[list[int]] | None, trained: bool, reduction: str, workspace: int | None
) -> None:
    """Chunks hold other pairs than the batch, groups stand in another order than the caller's pairs."""
    example = batch(3, dtype=torch.float64, bias=True, trained=trained)
    given = torch.tensor([0.7, -3.0, 5.0, 1.0][: 3 if pairs is None else len(pairs)])

    def by_hand(of: PairLogps) -> Tensor:
        return margins(replace(of, values={"my margin": given.double()}))

    want = losses_by_definition(example, FunctionLoss(by_hand, Traits()), pairs=pairs)
    want = want.mean() if reduction == "mean" else want
    for loss, name in (
        (Margins(), "margin"),
        (margins, "my margin"),
        (pairwise(margins), "my margin"),
    ):
        out = fused(
            example,
            loss,
            pairs=pairs,
            ref_logps=example.ref_logps,
            reduction=reduction,
            workspace_bytes=workspace,
            pair_values={name: given},
        )
        torch.testing.assert_close(out.loss, want, rtol=1e-11, atol=1e-13)
        grads = torch.autograd.grad(out.loss.sum(), example.trained)
        wanted = torch.autograd.grad(want.sum(), example.trained, retain_graph=True)
        torch.testing.assert_close(grads, wanted, rtol=1e-9, atol=1e-12)


def test_values_of_every_number_type_are_float64() -> None:
    example = batch(3, dtype=torch.float64)
    seen: dict[str, Tensor] = {}

    def look(pairs: PairLogps) -> Tensor:
        seen.update(pairs.values)
        return pairs.chosen

    given = {
        "list": torch.tensor([2**53, 1, -7]),
        "a": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "b": torch.tensor([0.1, 0.2, 0.3]),
        "c": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
    }
    fused(example, look, ref_logps=example.ref_logps, pair_values=given)
    assert list(seen) == ["a", "b", "c", "list"]
    for name, value in seen.items():
        assert value.dtype == torch.float64
        assert torch.equal(value, given[name].double())
        assert value.data_ptr() != given[name].data_ptr()


def test_a_sum_reads_what_its_parts_read() -> None:
    traits = (Margins() + losses.get("sft")).traits
    assert traits.reads == ("margin", "offset")
    assert traits.needs == ("margin",)
    assert (pairwise(margins) + losses.get("dpo")).traits.reads is None
    assert losses.get("dpo").traits.needs == ()
    wrapped = losses.length_desensitised(losses.wpo_weighted(Margins()), 0.5).traits
    assert (wrapped.reads, wrapped.needs) == (("margin", "offset"), ("margin",))


def test_pairs_of_a_part_have_the_values_of_the_part() -> None:
    seen = []
    pairwise(lambda pairs: (seen.append(pairs), pairs.chosen * pairs.values["x"])[1])
    whole = seen[0]
    assert torch.equal(whole[1:].values["x"], whole.values["x"][1:])
    assert hash(whole) != hash(whole[1:])  # a frozen dataclass, whatever its values


def test_a_function_that_compares_values_is_not_pairwise() -> None:
    def divided(pairs: PairLogps) -> Tensor:
        weight = pairs.values.get("weight")
        return pairs.chosen if weight is None else pairs.chosen * weight / weight.sum()

    with pytest.raises(ValueError, match="is not pairwise"):
        pairwise(divided)


def test_a_pairwise_function_may_read_probabilities() -> None:
    def likely(pairs: PairLogps) -> Tensor:
        return pairs.chosen * torch.logit(pairs.values["p"]) * (1 - pairs.values["p"]).sqrt()

    def undefined(pairs: PairLogps) -> Tensor:
        return pairs.chosen * (pairs.values["p"] - 1).sqrt()  # NaN, together and one by one

    def looked_up(pairs: PairLogps) -> Tensor:
        return pairs.chosen * torch.tensor([1.0, 2.0])[pairs.values["kind"].long() + 9]

    pairwise(likely)
    pairwise(undefined)
    with pytest.raises(ValueError, match=r"cannot be tried: .*with values .*IndexError"):
        pairwise(looked_up)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_no_values_are_no_values(trained: bool) -> None:
    example = batch(3, trained=trained)
    want = fused(example, "dpop")
    for given in (None, {}, {"weight": torch.ones(3)}):
        out = fused(example, "dpop", pair_values=given)
        assert torch.equal(out.losses, want.losses)
        grads = zip(
            torch.autograd.grad(out.loss, example.trained, retain_graph=True),
            torch.autograd.grad(want.loss, example.trained, retain_graph=True),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in grads)


def test_dpop_by_its_own_function() -> None:
    example = batch(3, dtype=torch.float64)
    out = fused_dpop_loss(
        example.hidden,
        example.weight,
        example.labels,
        ref_logps=example.ref_logps,
        pair_values={"weight": WEIGHTS},
    )
    want = losses_by_definition(example, "dpop") * WEIGHTS
    torch.testing.assert_close(out.loss, want.mean(), rtol=1e-11, atol=0)


NAN = torch.tensor([1.0, torch.nan, 2.0])


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ([1.0], TypeError, r"pair_values is list, expected a mapping from names to tensors"),
        ({3: NAN}, TypeError, r"pair_values contains 3, expected names that are strings"),
        ({"weight": [1.0]}, TypeError, r"pair_values\['weight'\] is list, expected a torch.Tensor"),
        ({"weight": torch.ones(2)}, ValueError, r"\['weight'\] has shape \(2,\), expected \(3,\)"),
        ({"weight": torch.ones(3, 1)}, ValueError, r"has shape \(3, 1\), expected \(3,\)"),
        ({"weight": torch.ones(3) > 0}, ValueError, r"has dtype torch.bool, expected floating"),
        ({"weight": torch.ones(3) * 1j}, ValueError, r"has dtype torch.complex64, expected"),
        ({"weight": torch.ones(3).bfloat16()}, ValueError, r"torch.bfloat16.*fastdpop.exact"),
        ({"weight": torch.ones(3, device="meta")}, ValueError, r"is on meta, expected cpu"),
        (
            {"weight": torch.ones(3).requires_grad_()},
            ValueError,
            r"requires grad, expected numbers",
        ),
        ({"weight": NAN}, ValueError, r"is nan for pair 1, expected a finite number of at least 0"),
        ({"weight": -NAN}, ValueError, r"is -1.0 for pair 0, expected a finite number of at least"),
        ({"weight": torch.tensor([1.0, 1.0, torch.inf])}, ValueError, r"is inf for pair 2"),
        ({"margin": NAN}, ValueError, r"\['margin'\] is nan for pair 1, expected a finite number,"),
        ({"margin": torch.tensor([1, 2, 2**53 + 1])}, ValueError, r"9007199254740993 for pair 2"),
        (
            {"weigth": NAN},
            ValueError,
            r"pair_values contains 'weigth' \(did you mean 'weight'\?\), which Margins\(\) does not read",
        ),
    ],
)
def test_what_is_wrong_is_said(given: Any, kind: type[Exception], said: str) -> None:
    example, loss = batch(3), Margins()
    if isinstance(given, dict) and "margin" not in given:
        given = {"margin": torch.ones(3), **given}
    with pytest.raises(kind, match=said):
        fused(example, loss, pair_values=given)


def test_names_that_a_loss_does_not_read_or_cannot_do_without() -> None:
    example, ones = batch(3), torch.ones(3)
    with pytest.raises(ValueError, match=r"contains 'margin'.*expected names among \['weight'\]"):
        fused(example, losses.get("sft"), pair_values={"margin": ones, "weight": ones})
    for given in (None, {}, {"offset": ones, "weight": ones}):
        with pytest.raises(
            ValueError, match=r"and Margins\(\) needs more: pair_values=\{'margin': ...\}"
        ):
            fused(example, Margins(), pair_values=given)
    assert fused(example, Margins(), pair_values={"margin": -ones}).loss.isfinite()


@pytest.mark.parametrize("value", [torch.rand(3), torch.rand(3).double(), torch.arange(3)])
def test_the_operator(value: Tensor) -> None:
    opcheck(pair_value, (value, "weight", False))


def test_one_graph() -> None:
    def run(hidden: Tensor, weight: Tensor, labels: Tensor, ref: Tensor, by: Tensor) -> Tensor:
        return fused_preference_loss(
            hidden, weight, labels, ref_logps=ref, pair_values={"weight": by}
        ).loss

    torch._dynamo.reset()
    example = batch(3)
    given = (example.hidden, example.weight, example.labels, example.ref_logps)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given, WEIGHTS), run(*given, WEIGHTS))
    with pytest.raises(ValueError, match=r"is -0\.5 for pair 0"):
        compiled(*given, -WEIGHTS)
    torch._dynamo.reset()
