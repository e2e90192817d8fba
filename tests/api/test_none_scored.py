"""A batch that has nothing to score has a loss, and a warning; a loss without a reference is given none."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastdpop import fused_logps, fused_preference_loss, losses

NONE_SCORED = "no token of the batch is scored"


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = torch.randn(4, 5, 8), torch.randn(11, 8, requires_grad=True)
    return hidden, weight, torch.randint(11, (4, 5)), torch.full((4,), -3.0)


@pytest.mark.parametrize("first", [-100, 3])
def test_nothing_is_scored(first: int) -> None:
    hidden, weight, labels, ref_logps = problem()
    labels[:] = -100
    labels[:, 0] = first  # which no hidden state predicts
    with pytest.warns(UserWarning, match=NONE_SCORED):
        out = fused_preference_loss(hidden, weight, labels, ref_logps=ref_logps)
    # Log-probs of 0 against the reference's -3 on both sides: log-ratios of 3 and 3.
    torch.testing.assert_close(out.loss, torch.tensor(2.0).log())
    out.loss.backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    with pytest.warns(UserWarning, match=NONE_SCORED):
        assert not fused_logps(hidden, weight, labels).any()


def test_it_is_said_once() -> None:
    hidden, weight, labels, _ = problem()
    labels[:] = -100
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            fused_preference_loss(hidden, weight, labels, loss="simpo")
            fused_logps(hidden, weight, labels)
    assert [str(warning.message).startswith(NONE_SCORED) for warning in said] == [True]


def test_one_token_is_enough() -> None:
    hidden, weight, labels, ref_logps = problem()
    labels[:] = -100
    labels[2, 4] = 7
    out = fused_preference_loss(hidden, weight, labels, ref_logps=ref_logps)
    assert out.lengths.tolist() == [0, 0, 1, 0]


def reads_no_reference() -> list[str]:
    return [name for name in losses.available() if not losses.get(name).traits.needs_reference]


def test_which_losses_read_no_reference() -> None:
    assert reads_no_reference() == ["sft", "cpo", "simpo", "alpha_po", "orpo", "aft"]


@pytest.mark.parametrize("name", reads_no_reference())
def test_a_reference_that_is_not_read(name: str) -> None:
    hidden, weight, labels, ref_logps = problem()
    loss = losses.get(name)
    for each in (loss, loss + losses.get("sft"), losses.length_desensitised(loss, 0.5)):
        chosen = ref_logps.chunk(2)
        for given in ({"ref_logps": ref_logps}, {"ref_logps": chosen}, {"ref_hidden": hidden}):
            message = f"{next(iter(given))} is given, but .* does not read it: leave it out$"
            with pytest.raises(ValueError, match=message):
                fused_preference_loss(hidden, weight, labels, loss=each, **given)


def test_a_function_and_a_sum_may_read_it() -> None:
    hidden, weight, labels, ref_logps = problem()
    given = {"ref_logps": ref_logps}
    out = fused_preference_loss(hidden, weight, labels, loss=lambda p: -p.chosen, **given)
    assert out.penalty is not None
    total = losses.get("simpo") + losses.get("dpo")
    assert fused_preference_loss(hidden, weight, labels, loss=total, **given).loss.isfinite()
