"""What a YAML file for Axolotl may say, and the errors of one that says something else. Axolotl is not needed."""

from __future__ import annotations

import subprocess
import sys
from enum import Enum
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("trl")

from pydantic import BaseModel, ValidationError

from fastdpop import losses
from fastdpop.integrations import trl as integration
from fastdpop.integrations.axolotl_args import FastDpopArgs, FastDpopTrainingArgs
from tests.integrations.trl_setup import WARNINGS

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]

PLUGIN = "fastdpop.integrations.axolotl.FastDpopPlugin"
ON: dict[str, Any] = {
    "plugins": [PLUGIN],
    "rl": "dpo",
    "fastdpop": True,
    "dpo_loss_type": ["dpop"],
    "dpop_lambda": 5,
}


class Axolotls(BaseModel):
    """Keys of Axolotl's own."""

    rl: str | None = None
    dpo_loss_type: list[str] | None = None


class Merged(Axolotls, FastDpopArgs):
    """As Axolotl merges a plugin's keys with its own."""


def test_a_file() -> None:
    read = Merged(**ON)
    assert (read.fastdpop, read.dpop_lambda, read.dpo_loss_type) == (True, 5.0, ["dpop"])
    assert read.fastdpop_engine is read.fastdpop_workspace_bytes is None


@pytest.mark.parametrize(
    "change",
    [
        {"dpop_lambda": None},
        {"dpop_lambda": 0},
        {"dpop_lambda": "5e1"},  # YAML reads 5e1 as text
        {"dpo_loss_type": ["dpop", "sft"], "dpo_loss_weights": [1.0, 0.1]},
        {"dpo_loss_type": None, "dpop_lambda": None},
        {"rl": "ipo", "dpo_loss_type": None, "dpop_lambda": None},
        {"fastdpop_engine": "eager", "fastdpop_workspace_bytes": 2**20},
        {"fastdpop_engine": "auto"},
        {"fastdpop_share_prefixes": True, "dpo_padding_free": False},
        {"fastdpop_share_prefixes": False},
        {"dpo_padding_free": True},
        {"context_parallel_size": 1, "tensor_parallel_size": None, "dpo_use_liger_kernel": False},
        {"plugins": None},
        {"fastdpop_pair_values": ["weight"], "fastdpop_warn_displacement": False},
    ],
)
def test_settings_that_go_together(change: dict[str, Any]) -> None:
    read = Merged(**{**ON, **change})
    assert read.fastdpop is True
    if change.get("dpop_lambda") == "5e1":
        assert read.dpop_lambda == 50.0


@pytest.mark.parametrize("name", integration.LOSS_TYPES)
def test_every_loss_type(name: str) -> None:
    assert Merged(**{**ON, "dpo_loss_type": [name, "dpop"]}).dpo_loss_type == [name, "dpop"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rl": None}, r"rl is None, expected one of \('dpo', 'ipo'\) with fastdpop: true"),
        ({"rl": "kto"}, "rl is 'kto', expected one of"),
        ({"rl": Enum("RL", {"KTO": "kto"}).KTO}, "rl is 'kto', expected one of"),
        ({"dpo_loss_type": ["dpopp"]}, "dpo_loss_type contains 'dpopp', expected names among"),
        ({"dpo_loss_type": ["sigmoid", "none"]}, "dpo_loss_type contains 'none', expected names"),
        ({"dpo_loss_type": "dpop"}, r"dpo_loss_type is 'dpop', expected a list such as \['dpop'\]"),
        ({"dpo_loss_type": 3}, r"dpo_loss_type is 3, expected a list such as \['dpop'\]"),
        ({"dpo_loss_type": ["sigmoid"]}, "dpop_lambda is 5, expected none unless dpo_loss_type"),
        ({"dpo_loss_type": None}, "dpop_lambda is 5, expected none unless dpo_loss_type"),
        ({"dpop_lambda": -1}, r"dpop_lambda\n.*greater than or equal to 0.*input_value=-1"),
        ({"dpop_lambda": float("inf")}, r"dpop_lambda\n.*finite number.*input_value=inf"),
        ({"dpop_lambda": float("nan")}, r"dpop_lambda\n.*finite number.*input_value=nan"),
        ({"dpop_lambda": "much"}, r"dpop_lambda\n.*valid number.*input_value='much'"),
        ({"dpop_lambda": True}, "dpop_lambda is True, expected a finite number >= 0"),
        (
            {"dpop_lamda": 5},
            r"dpop_lamda is not a key that fastdpop knows, expected one of \('fast",
        ),
        (
            {"share_prefixes": True},
            "share_prefixes is no key of Axolotl's, expected fastdpop_share",
        ),
        ({"fastdpop_lambda": 5}, "fastdpop_lambda is not a key that fastdpop knows"),
        ({"fastdpop": "on"}, r"fastdpop\n.*valid boolean.*input_value='on'"),
        ({"fastdpop_engine": "gpu"}, "engine is 'gpu', expected 'auto' or one of"),
        ({"fastdpop_workspace_bytes": 0}, r"fastdpop_workspace_bytes\n.*greater than 0"),
        ({"fastdpop_workspace_bytes": 1.5}, r"fastdpop_workspace_bytes\n.*valid integer"),
        ({"fastdpop_global_batch": 1}, r"fastdpop_global_batch\n.*valid boolean"),
        ({"fastdpop_share_prefixes": "on"}, r"fastdpop_share_prefixes\n.*valid boolean"),
        ({"fastdpop_warn_displacement": "no"}, r"fastdpop_warn_displacement\n.*valid boolean"),
        ({"fastdpop_pair_values": "weight"}, r"fastdpop_pair_values\n.*valid list"),
        ({"fastdpop_pair_values": ["weight", "weight"]}, "pair_values contains 'weight' twice"),
        ({"fastdpop_pair_values": ["list"]}, "contains 'list', which a trainer cannot give"),
        (
            {"fastdpop_share_prefixes": False, "dpo_padding_free": True},
            "fastdpop_share_prefixes is false beside dpo_padding_free: true, expected true or none",
        ),
        ({"dpo_use_liger_kernel": True}, "dpo_use_liger_kernel is true, expected false"),
        ({"context_parallel_size": 2}, "context_parallel_size is 2, expected 1 with fastdpop"),
        ({"sequence_parallel_degree": 4}, "sequence_parallel_degree is 4, expected 1"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2, expected 1"),
    ],
)
def test_settings_that_do_not(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FastDpopArgs(**{**ON, **change})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dpop_lambda": 5}, "dpop_lambda is 5, expected none without fastdpop: true"),
        ({"fastdpop": False, "dpop_lambda": 5}, "dpop_lambda is 5, expected none without fastdpop"),
        ({"fastdpop_engine": "cpu"}, "fastdpop_engine is 'cpu', expected none without"),
        ({"fastdpop_workspace_bytes": 1}, "fastdpop_workspace_bytes is 1, expected none without"),
        ({"fastdpop_share_prefixes": True}, "fastdpop_share_prefixes is True, expected none"),
        ({"fastdpop_global_batch": True}, "fastdpop_global_batch is True, expected none"),
        (
            {"fastdpop_pair_values": ["weight"]},
            r"fastdpop_pair_values is \['weight'\], expected none",
        ),
        ({"fastdpop_warn_displacement": False}, "fastdpop_warn_displacement is False, expected no"),
        (
            {"rl": "dpo", "dpo_loss_type": ["sft", "dpop"]},
            r"dpo_loss_type is \['sft', 'dpop'\], expected TRL's own losses without fastdpop: true",
        ),
        ({"dpo_loss_type": "dpop"}, "dpo_loss_type is 'dpop', expected TRL's own losses without"),
        ({"plugins": [PLUGIN]}, "fastdpop is not set, expected true or false where plugins lists"),
        ({"plugins": [PLUGIN.replace(".FastD", ":FastD")]}, "fastdpop is not set, expected true"),
    ],
)
def test_settings_without_the_flag(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FastDpopArgs(**given)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"rl": "kto"},
        {"rl": "dpo", "dpo_loss_type": 3},  # Axolotl's own to refuse
        {"rl": "dpo", "dpo_loss_type": ["sigmoid"], "dpo_use_liger_kernel": True},
        {"plugins": [PLUGIN], "fastdpop": False, "rl": "grpo", "context_parallel_size": 4},
        {"plugins": ["another.Plugin"], "dpo_loss_type": ["not trl's"]},
    ],
)
def test_other_files_are_left_alone(given: dict[str, Any]) -> None:
    assert not FastDpopArgs(**given).fastdpop


def test_trl_is_not_imported_for_other_files() -> None:
    """The keys are part of every run's schema where fastdpop is installed."""
    code = (
        "import sys; from fastdpop.integrations.axolotl_args import FastDpopArgs; "
        "FastDpopArgs(rl='dpo', fastdpop=False); "
        "sys.exit(bool({'trl', 'transformers', 'accelerate'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_trl_that_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, integration.__name__)
    monkeypatch.setattr("trl.__version__", "0.20.0")
    with pytest.raises(ImportError, match=r"trl is 0\.20\.0, expected 0\.29 to"):
        Merged(**ON)


def test_the_default_lambda_is_the_losss() -> None:
    assert FastDpopTrainingArgs().dpop_lambda == losses.DPOP().lam == 50.0
