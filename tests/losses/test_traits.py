"""What a loss says of itself is true: what it reads, and whether its pairs are independent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpop import losses
from fastdpop.losses import PairLogps, PreferenceLoss
from tests.batches import needed_values

VARIANTS: dict[str, PreferenceLoss] = {
    **{name: losses.get(name) for name in losses.available()},
    "bco_pair shifted": losses.get("bco_pair", batch_shift=True),
    "sum": losses.get("dpop") + 0.5 * losses.get("cpo"),
    "sum coupled": losses.get("sft") + losses.get("aot"),
    "wpo": losses.wpo_weighted(losses.get("dpo")),
    "ld": losses.length_desensitised(losses.get("ipo"), 0.5),
}


def batch_of(rows: list[tuple[float, ...]]) -> PairLogps:
    columns = torch.tensor(rows, dtype=torch.float64).T
    there = torch.ones(len(rows), dtype=torch.bool)
    lengths = (-columns[:2]).ceil()
    count = torch.tensor(float(len(rows)), dtype=torch.float64)
    return PairLogps(
        *columns[:2],
        *lengths,
        *columns[2:4],
        *columns[:2] / 2,
        there,
        there,
        None,
        count,
        2 * count,
        lengths[0].sum(),
        needed_values(len(rows)),
    )


logps = st.floats(-300.0, -0.5)
batches = st.lists(st.tuples(logps, logps, logps, logps), min_size=2, max_size=7)


@pytest.mark.parametrize("name", VARIANTS)
@settings(deadline=None, max_examples=30)
@given(rows=batches, data=st.data())
def test_independent_pairs_may_be_taken_in_any_chunks_and_order(
    name: str, rows: list[tuple[float, ...]], data: st.DataObject
) -> None:
    loss, pairs = VARIANTS[name], batch_of(rows)
    if loss.traits.couples_pairs_without_kl:
        pairs = replace(pairs, kl=torch.tensor(0.3, dtype=torch.float64))
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    whole = loss(pairs)
    reordered = loss(pairs[order])
    if loss.traits.couples_pairs:  # ranks of equal margins are theirs to share
        torch.testing.assert_close(reordered.mean(), whole.mean(), rtol=1e-11, atol=1e-11)
    else:
        torch.testing.assert_close(reordered, whole[order], rtol=1e-12, atol=1e-12)
        cut = data.draw(st.integers(1, len(rows) - 1))
        chunked = torch.cat([loss(pairs[:cut]), loss(pairs[cut:])])
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_coupled_pairs_really_couple(name: str, four_pairs: PairLogps) -> None:
    loss = VARIANTS[name]
    apart = torch.cat([loss(four_pairs[i : i + 1]) for i in range(4)])
    couples = loss.traits.couples_pairs or loss.traits.couples_pairs_without_kl
    assert torch.allclose(apart, loss(four_pairs), rtol=1e-12) != couples


@pytest.mark.parametrize("name", VARIANTS)
def test_needs_reference(name: str, four_pairs: PairLogps) -> None:
    alone = replace(four_pairs, ref_chosen=None, ref_rejected=None)
    loss = VARIANTS[name]
    if loss.traits.needs_reference:
        with pytest.raises(ValueError, match="pass ref_logps= or ref_hidden="):
            loss(alone)
    else:
        assert torch.equal(loss(alone), loss(four_pairs))
        assert all(torch.isfinite(side).all() for side in loss.rewards(alone))


@pytest.mark.parametrize("name", VARIANTS)
def test_uses_kl(name: str, four_pairs: PairLogps) -> None:
    loss = VARIANTS[name]
    with_kl = loss(replace(four_pairs, kl=torch.tensor(5.0, dtype=torch.float64)))
    assert torch.equal(with_kl, loss(four_pairs)) != loss.traits.uses_kl


@pytest.mark.parametrize("name", losses.available())
def test_plain_losses_read_no_statistics_and_plain_sums(name: str, four_pairs: PairLogps) -> None:
    loss = losses.get(name)
    assert loss.traits.statistics == ()
    assert loss.traits.ld_alpha is None
    bare = replace(four_pairs, chosen_aligned_logps=None, rejected_aligned_logps=None)
    assert torch.equal(loss(bare), loss(four_pairs))


@pytest.mark.parametrize("value", ["margin", "offset"])
@pytest.mark.parametrize("name", VARIANTS)
def test_reads(name: str, value: str, four_pairs: PairLogps) -> None:
    loss = VARIANTS[name]
    ahead = torch.tensor([0.5, -0.25, 2.0, 1.0], dtype=torch.float64)
    with_value = replace(four_pairs, values={**four_pairs.values, value: ahead})
    assert torch.equal(loss(with_value), loss(four_pairs)) != (value in (loss.traits.reads or ()))


@pytest.mark.parametrize("name", VARIANTS)
def test_needs(name: str, four_pairs: PairLogps) -> None:
    loss = VARIANTS[name]
    only = {needed: four_pairs.values[needed] for needed in loss.traits.needs}
    assert torch.equal(loss(replace(four_pairs, values=only)), loss(four_pairs))
    assert set(loss.traits.needs) <= set(loss.traits.reads or ())
    for needed in only:
        rest = {other: value for other, value in only.items() if other != needed}
        with pytest.raises(ValueError, match=rf"pass pair_values=\{{'{needed}'"):
            loss(replace(four_pairs, values=rest))
