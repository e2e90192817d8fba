"""The plugin's hooks, as Axolotl calls them, on a stand-in for Axolotl. Runs of Axolotl itself are in tests/axolotl."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("trl")

from trl import DPOConfig, DPOTrainer

from fastdpop.integrations import trl as integration
from fastdpop.integrations.axolotl_args import FastDpopTrainingArgs
from tests.integrations.trl_setup import WARNINGS, logged, namespace, trainer

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]

ROOT = Path(__file__).parents[2]
NAME = "fastdpop.integrations.axolotl"


class Settings(dict[str, Any]):
    """As Axolotl's: what is not set is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


ON = Settings(fastdpop=True, dpop_lambda=5.0, fastdpop_engine="eager")


@pytest.fixture(name="module")
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    for made in (ModuleType("axolotl"), ModuleType("axolotl.integrations"), base):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    integration.unpatch_trl()
    monkeypatch.delitem(sys.modules, NAME)


def test_patches_once_and_leaves_nothing(module: Any) -> None:
    before = namespace(DPOTrainer), namespace(DPOConfig)
    plugin = module.FastDpopPlugin()
    plugin.pre_model_load(ON)
    once = namespace(DPOTrainer), namespace(DPOConfig)
    assert once != before
    module.FastDpopPlugin().pre_model_load(ON)  # of the reference model, or by another instance
    assert (namespace(DPOTrainer), namespace(DPOConfig)) == once
    module.FastDpopPlugin().post_train_unload(ON)
    assert (namespace(DPOTrainer), namespace(DPOConfig)) == before


def test_a_file_without_the_flag(module: Any) -> None:
    before = namespace(DPOTrainer)
    plugin = module.FastDpopPlugin()
    off = Settings(fastdpop=False)
    plugin.pre_model_load(off)
    assert plugin.get_training_args(off) == {}
    plugin.post_trainer_create(off, object())
    assert namespace(DPOTrainer) == before

    plugin.pre_model_load(ON)  # a run that failed, so nothing was unloaded
    plugin.pre_model_load(off)
    assert namespace(DPOTrainer) == before


def test_a_patch_of_the_users_own_stays(module: Any) -> None:
    integration.patch_trl()
    patched = namespace(DPOTrainer)
    module.FastDpopPlugin().pre_model_load(Settings())
    module.FastDpopPlugin().post_train_unload(Settings())
    assert namespace(DPOTrainer) == patched


def test_dotted_names_lead_to_classes(module: Any) -> None:
    plugin = module.FastDpopPlugin()
    for name in (plugin.get_input_args(), plugin.get_training_args_mixin()):
        owner, _, attribute = name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(owner), attribute), type)


@pytest.mark.parametrize("patched_first", [True, False])
def test_lambda_reaches_the_trainer(module: Any, patched_first: bool, tmp_path: Path) -> None:
    """Through training arguments made as Axolotl makes them, before or after the patch."""
    plugin = module.FastDpopPlugin()
    if patched_first:
        plugin.pre_model_load(ON)

    class Mixins(FastDpopTrainingArgs):
        pass

    @dataclass
    class Config(Mixins, DPOConfig):
        pass

    plugin.pre_model_load(ON)
    assert [f.name for f in fields(Config)].count("dpop_lambda") == 1
    found = plugin.get_training_args(ON)
    assert found == {"dpop_lambda": 5.0}
    options: dict[str, Any] = {"loss_type": ["dpop"], "max_steps": 1}
    made = trainer(DPOTrainer, tmp_path, config=Config, **options, **found)
    plugin.post_trainer_create(ON, made)
    made.train()
    (ours,) = logged(made, "loss", "penalty")
    for lam in (5.0, 50.0):
        direct = trainer(DPOTrainer, tmp_path, **options, dpop_lambda=lam)
        direct.train()
        assert ([ours] == logged(direct, "loss", "penalty")) is (lam == 5.0)


@pytest.mark.parametrize(
    ("share", "padding_free", "shares"),
    [(True, False, True), (None, False, False), (False, False, False), (None, True, True)],
)
def test_prefixes(
    module: Any, share: bool | None, padding_free: bool, shares: bool, tmp_path: Path
) -> None:
    module.FastDpopPlugin().pre_model_load(Settings(fastdpop=True, fastdpop_share_prefixes=share))
    of = trainer(DPOTrainer, tmp_path, padding_free=padding_free)
    assert of._fastdpop.share_prefixes is shares


@pytest.mark.parametrize("asked", [True, False, None])
def test_the_batch_of_all_processes(module: Any, asked: bool | None, tmp_path: Path) -> None:
    module.FastDpopPlugin().pre_model_load(Settings(fastdpop=True, fastdpop_global_batch=asked))
    assert trainer(DPOTrainer, tmp_path)._fastdpop.global_batch is bool(asked)


def test_what_goes_to_the_trainers_arguments(module: Any) -> None:
    said = {"fastdpop_pair_values": ["weight"], "fastdpop_warn_displacement": False}
    found = module.FastDpopPlugin().get_training_args(Settings(fastdpop=True, **said))
    assert found == {"pair_values": ["weight"], "warn_displacement": False}
    assert {field.name for field in fields(FastDpopTrainingArgs)} >= {*found, "dpop_lambda"}


def test_the_entry_point_is_the_plugin(module: Any) -> None:
    tomllib = pytest.importorskip("tomllib")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    point = EntryPoint("fastdpop", declared["axolotl.plugins"]["fastdpop"], "axolotl.plugins")
    assert point.load() is module.FastDpopPlugin


def test_no_lambda_is_the_papers(module: Any) -> None:
    assert module.FastDpopPlugin().get_training_args(Settings(fastdpop=True)) == {}
    assert module.FastDpopPlugin().get_training_args(Settings(fastdpop=True, dpop_lambda=0.0)) == {
        "dpop_lambda": 0.0
    }


def test_a_trainer_with_its_own_loss(module: Any) -> None:
    class Own(DPOTrainer):
        def _compute_loss(self, *args: Any) -> Any:
            raise NotImplementedError

    plugin = module.FastDpopPlugin()
    for kind in (Own, object):
        with pytest.raises(ValueError, match=rf"the trainer is a \w+\S*{kind.__name__}, expected"):
            plugin.post_trainer_create(ON, kind.__new__(kind))


def test_without_axolotl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "axolotl", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(ImportError, match="needs axolotl"):
        importlib.import_module(NAME)
