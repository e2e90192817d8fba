"""Files and their errors through Axolotl's own validation, plugins merged in."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.axolotl.runs import EXAMPLE, PLAIN, ROOT, settings

pytestmark = pytest.mark.filterwarnings("ignore")  # of what Axolotl imports

H100 = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}


def validated(given: dict[str, Any]) -> Any:
    """As `axolotl train` reads a file, on a machine with an H100."""
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault(given)
    prepare_plugins(cfg)
    return validate_config(cfg, capabilities=H100, env_capabilities={"torch_version": "2.13.0"})


def test_the_example() -> None:
    from axolotl.utils.schemas.config import AxolotlInputConfig

    given = yaml.safe_load(EXAMPLE.read_text())
    cfg = validated(given)
    assert (cfg.fastdpop, cfg.dpop_lambda, cfg.dpo_loss_type) == (True, 50.0, ["dpop"])
    # Axolotl does not mention keys that it does not know.
    ours = {"fastdpop", "dpop_lambda"}
    assert set(given) - ours <= set(AxolotlInputConfig.model_fields)
    assert ours == set(given) - set(AxolotlInputConfig.model_fields)


@pytest.mark.parametrize("size", ["7b", "34b", "72b"])
def test_the_recipes(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.utils.schemas.config import AxolotlInputConfig

    monkeypatch.chdir(ROOT)  # where the chat template is
    ours = {"fastdpop", "dpop_lambda", "fastdpop_global_batch"}
    for file in sorted((ROOT / "recipes" / "smaug" / "axolotl" / size).iterdir()):
        given = yaml.safe_load(file.read_text())
        cfg = validated(given)
        assert (cfg.rl_beta, cfg.dpop_lambda) == (given.get("rl_beta"), given.get("dpop_lambda"))
        assert set(given) - ours <= set(AxolotlInputConfig.model_fields)


def test_what_axolotl_asks_the_plugin_for(tmp_path: Path) -> None:
    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_training_args

    cfg = validated(settings(tmp_path, PLAIN))
    manager = PluginManager.get_instance()
    assert manager.get_training_args(cfg) == {"dpop_lambda": 20.0}
    assert "dpop_lambda" in {
        f.name for f in fields(dataclass(type("Args", (merge_training_args(),), {})))
    }
    assert manager.get_training_args(validated(settings(tmp_path, off()))) == {}


def off(**changes: Any) -> dict[str, Any]:
    left_out = ("dpop_lambda", "dpo_loss_type")
    kept = {key: value for key, value in PLAIN.items() if key not in left_out}
    return {**kept, "fastdpop": False, **changes}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**PLAIN, "dpo_loss_type": ["dpopp"]}, "dpo_loss_type contains 'dpopp', expected names"),
        ({**PLAIN, "dpop_lambda": -1}, r"dpop_lambda\n.*greater than or equal to 0"),
        (off(fastdpop=True, rl="kto"), "rl is 'kto', expected one of"),
        (off(fastdpop=True, rl=None), "rl is None, expected one of"),
        (off(fastdpop=None), "fastdpop is not set, expected true or false"),
        (off(dpo_loss_type=["dpop"]), "expected TRL's own losses without fastdpop: true"),
        ({**PLAIN, "dpo_use_liger_kernel": True}, "dpo_use_liger_kernel is true, expected false"),
        ({**PLAIN, "context_parallel_size": 2}, "context_parallel_size is 2, expected 1"),
    ],
)
def test_errors(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        validated(settings(tmp_path, given))
