"""Names, options and their errors; sums, wrappers and losses of one's own; keys; the table in the
documentation.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdpop import losses
from fastdpop.losses import PairLogps, presets
from fastdpop.losses.options import positive
from fastdpop.pair_loss import PairLoss, Totals
from fastdpop.rows import rows_from_labels
from tests.batches import batch, fused

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"


@pytest.mark.parametrize("name", losses.available())
def test_losses_are_values(name: str) -> None:
    loss = losses.get(name)
    assert loss == losses.get(name)
    assert hash(loss) == hash(losses.get(name))
    assert losses.as_loss(name) == loss
    assert losses.as_loss(loss) is loss
    assert losses.by_key(losses.key_of(loss)) == loss
    assert eval(repr(loss), vars(losses)) == loss
    options = [option.name for option in fields(loss)]  # type: ignore[arg-type]
    if not isinstance(loss, losses.WeightedSum):
        assert losses.get(name, **{option: getattr(loss, option) for option in options}) == loss
    for option in options:
        with pytest.raises(FrozenInstanceError):
            setattr(loss, option, None)


@pytest.mark.parametrize("name", losses.available())
def test_every_loss_is_documented(name: str) -> None:
    doc = getattr(presets, name, type(losses.get(name))).__doc__ or ""
    assert name == "sft" or re.search(r"arXiv:\d{4}\.\d{5}", doc)


def test_examples_that_stand_alone_run() -> None:
    blocks = re.findall(r"^```python\n(import torch\n.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, object] = {}
        exec(block, names)
        assert bool(torch.isfinite(names["out"].loss))  # type: ignore[attr-defined]


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"'DPPO', which is not a loss \(did you mean 'dpo'"):
        losses.get("DPPO")
    with pytest.raises(ValueError, match="'xyzzy', which is not a loss: expected one of dpop, dpo"):
        losses.get("xyzzy")


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="'dpo' has no option 'lam'; it has beta, divergence"):
        losses.get("dpo", lam=50.0)
    with pytest.raises(TypeError, match="'sft' has no option 'beta'; it has per"):
        losses.get("sft", beta=0.1)
    with pytest.raises(TypeError, match="'mpo' has no option 'alpha'; it has beta"):
        losses.get("mpo", alpha=0.1)


@pytest.mark.parametrize(
    ("name", "option", "value", "error", "expected"),
    [
        ("dpop", "beta", 0.0, ValueError, "a finite number > 0"),
        ("dpop", "beta", float("nan"), ValueError, "a finite number > 0"),
        ("dpop", "beta", "0.3", TypeError, "a finite number > 0"),
        ("dpop", "beta", True, TypeError, "a finite number > 0"),
        ("dpop", "lam", -1.0, ValueError, "a finite number >= 0"),
        ("dpop", "lam", float("inf"), ValueError, "a finite number >= 0"),
        ("dpop", "form", "outer", ValueError, "one of 'inside', 'outside', 'additive'"),
        ("dpo", "label_smoothing", 0.5, ValueError, r"a number in \[0, 0.5\)"),
        ("exo_pair", "label_smoothing", 0.0, ValueError, r"a number in \(0, 0.5\)"),
        ("robust", "label_smoothing", 0.7, ValueError, r"a number in \[0, 0.5\)"),
        ("hinge", "divergence", "kl", ValueError, "one of 'reverse_kl', 'forward_kl'"),
        ("ipo", "average", 1, TypeError, "True or False"),
        ("simpo", "gamma", -0.5, ValueError, "a finite number >= 0"),
        ("discopop", "tau", 0.0, ValueError, "a finite number > 0"),
        ("dpo_shift", "f_lambda", 0.0, ValueError, r"a number in \(0, 1\]"),
        ("dpo_shift", "f_lambda", 1.5, ValueError, r"a number in \(0, 1\]"),
        ("alpha_po", "alpha", float("inf"), ValueError, "a finite number"),
        ("alpha_po", "alpha", None, TypeError, "a finite number"),
        ("sft", "per", "batch", ValueError, "one of 'token', 'sequence'"),
        ("rpo_sq", "eta", 0.0, ValueError, "a finite number > 0"),
        ("rpo", "alpha", -1.0, ValueError, "a finite number >= 0"),
        ("rpo", "alpha", "1", TypeError, "a finite number >= 0"),
        ("mpo", "beta", 0.0, ValueError, "a finite number > 0"),
    ],
)
def test_bad_value(
    name: str, option: str, value: object, error: type[Exception], expected: str
) -> None:
    message = rf"{option} is {re.escape(repr(value))}, expected {expected}"
    with pytest.raises(error, match=message):
        losses.get(name, **{option: value})


def test_alpha_belongs_to_the_alpha_divergence() -> None:
    with pytest.raises(ValueError, match=r"alpha is 0\.5, expected None with divergence 'js'"):
        losses.get("dpo", divergence="js", alpha=0.5)
    with pytest.raises(ValueError, match="alpha is nan, expected a finite number or None"):
        losses.get("dpo", divergence="alpha", alpha=float("nan"))


def test_weighted_sum(four_pairs: PairLogps) -> None:
    dpo, sft = losses.get("dpo"), losses.get("sft")
    total = 2 * dpo + sft * 0.1 + 0.5 * (dpo + sft)
    torch.testing.assert_close(total(four_pairs), 2.5 * dpo(four_pairs) + 0.6 * sft(four_pairs))
    assert total.traits.needs_reference
    assert not total.traits.accepts_unpaired
    assert (losses.get("kto") + sft).traits.accepts_unpaired
    assert (sft + losses.get("kto")).traits.couples_pairs_without_kl
    assert torch.equal(total.rewards(four_pairs)[0], dpo.rewards(four_pairs)[0])
    assert losses.by_key(losses.key_of(total)) == total
    with pytest.raises(ValueError, match="is nan, expected a finite number"):
        float("nan") * dpo
    with pytest.raises(ValueError, match="weigh tokens differently"):
        dpo + losses.length_desensitised(sft, 0.5)
    with pytest.raises(TypeError):
        dpo + 1  # type: ignore[operator]


def test_length_desensitised_tells_the_caller_and_leaves_the_formula(four_pairs: PairLogps) -> None:
    loss = losses.length_desensitised(losses.get("dpo") + losses.get("sft"), 0.25)
    assert loss.traits.ld_alpha == 0.25
    assert torch.equal(loss(four_pairs), (losses.get("dpo") + losses.get("sft"))(four_pairs))
    assert losses.by_key(losses.key_of(loss)) == loss
    with pytest.raises(ValueError, match=r"alpha is 1.5, expected a value in \[0, 1\]"):
        losses.length_desensitised(losses.get("dpo"), 1.5)


def test_wpo_weighs_pairs_by_the_policys_own_likelihood(four_pairs: PairLogps) -> None:
    dpo = losses.get("dpo")
    loss = losses.wpo_weighted(dpo)
    assert loss.traits.statistics == ("aligned_logps",)
    weights = [-4 / 10 - 6 / 12, -3 / 16 - 1 / 14, 1.5 / 7 - 2 / 7, -0.5 / 3 + 0.25 / 5]
    weights = torch.tensor(weights, dtype=torch.float64).exp()
    torch.testing.assert_close(loss(four_pairs), weights * dpo(four_pairs))
    gradient = torch.autograd.grad(loss(four_pairs).sum(), four_pairs.chosen)[0]
    plain = torch.autograd.grad(dpo(four_pairs).sum(), four_pairs.chosen)[0]
    torch.testing.assert_close(gradient, weights * plain)
    assert losses.by_key(losses.key_of(loss)) == loss
    assert torch.equal(loss.rewards(four_pairs)[1], dpo.rewards(four_pairs)[1])
    empty = replace(
        four_pairs,
        chosen_lengths=torch.zeros(4).double(),
        rejected_lengths=torch.zeros(4).double(),
        chosen_aligned_logps=torch.zeros(4).double(),
        rejected_aligned_logps=torch.zeros(4).double(),
    )
    assert torch.equal(loss(empty), dpo(empty))
    with pytest.raises(ValueError, match="'aligned_logps', which this call lacks"):
        loss(replace(four_pairs, chosen_aligned_logps=None))


def test_presets_are_sums() -> None:
    dpo, bco, sft = losses.get("dpo", beta=0.2), losses.get("bco_pair", beta=0.2), losses.get("sft")
    assert losses.get("mpo", beta=0.2) == 0.8 * dpo + 0.2 * bco + 1.0 * sft
    assert losses.get("rpo", alpha=0.5, beta=0.2) == dpo + 0.5 * sft
    paper = losses.get("rpo", beta=0.2, per="sequence")
    assert paper == dpo + 1.0 * losses.get("sft", per="sequence")


def test_a_loss_of_ones_own(four_pairs: PairLogps) -> None:
    def margin(pairs: PairLogps) -> torch.Tensor:
        return torch.relu(3.0 - pairs.chosen_logratios + pairs.rejected_logratios)

    whole, single = losses.as_loss(margin), losses.pairwise(margin)
    assert whole.traits.couples_pairs
    assert not single.traits.couples_pairs
    assert torch.equal(whole(four_pairs), single(four_pairs))
    assert losses.as_loss(single) is single
    assert losses.by_key(losses.key_of(single)) is single
    assert torch.equal(single.rewards(four_pairs)[0], four_pairs.chosen_logratios)
    mixed = single + 0.1 * losses.get("sft")
    assert losses.by_key(losses.key_of(mixed)) is mixed


def test_pairwise_is_put_to_the_test() -> None:
    with pytest.raises(ValueError, match="is not pairwise: on three pairs at once"):
        losses.pairwise(lambda pairs: pairs.chosen - pairs.chosen.mean())


def test_a_function_must_give_one_value_a_pair(four_pairs: PairLogps) -> None:
    loss = losses.as_loss(lambda pairs: pairs.chosen.sum())
    with pytest.raises(ValueError, match=r"returned \(\), expected one value per pair"):
        loss(four_pairs)


@pytest.mark.parametrize("wrong", [None, 3, losses.DPO])
def test_as_loss_refuses(wrong: object) -> None:
    with pytest.raises(TypeError, match="expected a name, a PreferenceLoss object or a function"):
        losses.as_loss(wrong)  # type: ignore[arg-type]


def test_a_forgotten_function_is_an_error(make_pairs: Callable[..., PairLogps]) -> None:
    key = losses.key_of(losses.as_loss(lambda pairs: pairs.chosen))
    with pytest.raises(KeyError, match="must outlive the graph"):
        losses.by_key(key)


class Squared(torch.nn.Module):
    """A user's loss whose options do not show in its repr."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, pairs: PairLogps) -> Tensor:
        return self.factor * (pairs.chosen_logratios - pairs.rejected_logratios) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO(losses.DPO):
    """A user's class of the name of one of ours."""

    def __call__(self, pairs: PairLogps) -> Tensor:
        return 7.0 + 0.0 * pairs.chosen


def test_losses_that_read_the_same_have_keys_of_their_own() -> None:
    one, two = losses.pairwise(Squared(1.0)), losses.pairwise(Squared(2.0))
    assert repr(one) == repr(two)
    assert losses.by_key(losses.key_of(one)) is one
    assert losses.by_key(losses.key_of(two)) is two
    assert losses.by_key(losses.key_of(one)) is one
    ours, theirs = losses.DPO(), DPO()
    keys = {losses.key_of(loss) for loss in (ours, theirs, losses.DPO(), DPO())}
    assert len(keys) == 2
    assert losses.by_key(losses.key_of(ours)) == ours
    assert type(losses.by_key(losses.key_of(theirs))) is DPO


def test_a_class_of_the_name_of_one_of_ours_is_none_of_ours() -> None:
    example = batch(2)
    assert fused(example, DPO()).loss == 7.0
    rows = rows_from_labels(example.labels, 37, torch.tensor([[0, 2], [1, 3]]))
    reference = torch.zeros(2, 2)
    assert PairLoss(rows, losses.DPO(), Totals.of(rows), reference).plan() is not None
    assert PairLoss(rows, DPO(), Totals.of(rows), reference).plan() is None


@pytest.mark.parametrize("loss", ["aot", "kto", "dpo"])
def test_pairwise_takes_functions(loss: str) -> None:
    for given in (loss, losses.get(loss)):
        with pytest.raises(TypeError, match="expected a function of PairLogps"):
            losses.pairwise(given)  # type: ignore[arg-type]


def test_pairwise_sees_what_couples_log_ratios() -> None:
    with pytest.raises(ValueError, match="is not pairwise"):
        losses.pairwise(lambda pairs: (pairs.chosen_logratios - pairs.chosen_logratios.mean()) ** 2)
    with pytest.raises(ValueError, match="is not pairwise"):
        losses.pairwise(lambda pairs: pairs.rejected_logratios - pairs.rejected_logratios.amax())


@pytest.mark.parametrize("trained", [True, False])
def test_a_loss_of_integers_is_refused(trained: bool) -> None:
    example = batch(2, trained=trained)
    with pytest.raises(ValueError, match=r"returned torch\.int64, expected floating point"):
        fused(example, losses.pairwise(lambda pairs: pairs.chosen.long()))


def test_what_is_no_loss_is_named() -> None:
    for wrap in (losses.wpo_weighted, lambda loss: losses.length_desensitised(loss, 0.5)):
        with pytest.raises(TypeError, match="loss is 'dpo', expected a PreferenceLoss"):
            wrap("dpo")
    with pytest.raises(ValueError, match="alpha is 'a', expected a value in"):
        losses.length_desensitised(losses.get("dpo"), "a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="terms is empty"):
        losses.WeightedSum(())
    with pytest.raises(ValueError, match=r"loss is \['a'\], which is not a loss"):
        losses.get(["a"])  # type: ignore[arg-type]


def test_a_loss_that_derives_from_another_checks_what_it_declares() -> None:
    @dataclasses.dataclass(frozen=True)
    class Derived(losses.get("dpop").__class__):  # type: ignore[misc]
        lam: float = 7.0  # without a check
        margin: float = positive(0.1)

    assert Derived(lam=-1.0).lam == -1.0
    with pytest.raises(ValueError, match=r"^Derived: beta is -1, expected a finite number > 0$"):
        Derived(beta=-1)
    with pytest.raises(ValueError, match=r"^Derived: margin is -2, expected a finite number > 0$"):
        Derived(margin=-2)
    with pytest.raises(ValueError, match="lam is -1"):
        losses.get("dpop", lam=-1)
