"""The patch and each trainer that it serves say so; a lambda that no loss reads is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("trl")

import trl

import fastdpop
from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer, told
from tests.integrations.trl_setup import WARNINGS, DPOTrainer, logged, trainer

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    with caplog.at_level(logging.INFO, logger="fastdpop"):
        yield caplog.messages
    fastdpop.unpatch_trl()


def test_what_is_said(tmp_path: Path, said: list[str], caplog: pytest.LogCaptureFixture) -> None:
    fastdpop.patch_trl(engine="eager", share_prefixes=True)
    assert caplog.messages[0].startswith(f"fastdpop: TRL {trl.__version__} is patched; each new")
    assert "DPOTrainer" in caplog.messages[0]
    caplog.clear()
    weighted = {"loss_type": ["dpop", "sft"], "loss_weights": [1.0, 0.5]}
    trainer(DPOTrainer, tmp_path, **weighted)
    assert (
        "lam=50.0, form='inside', label_smoothing=0.0) + 0.5 * SFT(per='token'),"
        in caplog.messages[-1]
    )
    caplog.clear()
    of = trainer(DPOTrainer, tmp_path, loss_type=["dpop"], dpop_lambda=7.0)
    assert caplog.messages == [
        "fastdpop: this DPOTrainer computes DPOP(beta=0.5, lam=7.0, form='inside', label_smoothing=0.0), "
        "engine eager, shared prefixes computed once"
    ]
    of.train()
    assert len([m for m in caplog.messages if m.startswith("fastdpop: this")]) == 1


def test_the_engine_that_auto_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, said: list[str]
) -> None:
    fastdpop.patch_trl()
    trainer(DPOTrainer, tmp_path)
    best = fastdpop.engines.available("cpu")[0]
    assert caplog.messages[-1].endswith(f"engine {best}, prefixes not shared")
    caplog.clear()
    trainer(FastDPOTrainer, tmp_path, config=FastDPOConfig)  # its class says it
    assert not caplog.messages


def test_where_nobody_has_set_up_logging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.Logger("fastdpop")  # without parents
    monkeypatch.setattr(told, "_logger", logger)
    told._say("a line")
    assert capsys.readouterr().err == "a line\n"
    logger.setLevel(logging.WARNING)
    told._say("unwanted")
    assert capsys.readouterr().err == ""


def test_other_processes_say_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, said: list[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    fastdpop.patch_trl()
    assert not caplog.messages


@pytest.mark.parametrize("types", [["sigmoid"], ["sft", "ipo"]])
def test_a_lambda_that_no_loss_reads(tmp_path: Path, types: list[str], said: list[str]) -> None:
    for config, kind in ((FastDPOConfig, FastDPOTrainer), (None, DPOTrainer)):
        if config is None:
            fastdpop.patch_trl()
        given = {"loss_type": types, **({} if config is None else {"config": config})}
        with pytest.raises(ValueError, match=r"dpop_lambda is 7.0 beside loss_type .* expected"):
            trainer(kind, tmp_path, dpop_lambda=7.0, **given)
        trainer(kind, tmp_path, dpop_lambda=50.0, **given)  # the default: nobody can tell
    trainer(DPOTrainer, tmp_path, dpop_lambda=7.0, loss_type=[*types, "dpop"])


def test_a_loss_without_a_reference_is_logged_beside_one(tmp_path: Path) -> None:
    """The reference is for what is logged; the loss is not given it."""
    sft = fastdpop.losses.get("sft")
    of = trainer(FastDPOTrainer, tmp_path, config=FastDPOConfig, given={"loss": sft})
    of.train()
    for logratio, penalty, hinge_on in logged(of, "logratios/chosen", "penalty", "hinge_on"):
        assert penalty >= max(0.0, -logratio) - 1e-5
        assert (hinge_on > 0) == (penalty > 0)
