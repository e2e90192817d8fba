"""No false alarm: 200 good batches and more of real pairs, with real log-probs (tests/batch_check/real.py)."""

from __future__ import annotations

import pytest

from fastdpop.batch_check import check_batch
from tests.batch_check.batches import Made, good, reference_for
from tests.batch_check.real import Recorded, Tokenizer, load, patch

PAIRS = load()


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch)


def found(made: Made, policy: str, reference: str | None, **options: bool) -> tuple[str, ...]:
    report = check_batch(
        Recorded(made.pairs, policy),
        made.batch,
        None if reference is None else reference_for(made, reference),
        tokenizer=Tokenizer(),
        verbose=False,
        **made.options,
        **options,
    )
    return report.codes


def test_two_hundred_good_batches() -> None:
    """Of 1 to 8 pairs, chats and text, long and of one token, whole and truncated, padded on either side, packed ..."""
    alarms = {}
    for number, made in enumerate(good(PAIRS, 200)):
        codes = found(made, "policy", "policy", at_start=made.layout != "no mask")
        if codes:
            alarms[number, made.layout] = codes
    assert alarms == {}


@pytest.mark.parametrize(
    ("policy", "reference"),
    [
        ("policy", "bf16"),
        ("bf16", "policy"),
        ("policy", "other"),
        ("other", "policy"),
        ("policy", None),
    ],
)
def test_another_reference_is_a_good_one(policy: str, reference: str | None) -> None:
    alarms = {
        (number, made.layout): codes
        for number, made in enumerate(good(PAIRS, 60, seed=1))
        if (codes := found(made, policy, reference))
    }
    assert alarms == {}


def test_few_pairs_go_through_the_model_and_once() -> None:
    made = next(m for m in good(PAIRS, 200) if len(m.pairs) == 8 and m.layout == "right")
    model = Recorded(made.pairs)
    report = check_batch(
        model, made.batch, made.references(), tokenizer=Tokenizer(), max_pairs=2, verbose=False
    )
    assert report.ok
    assert model.passes == 1
