"""YAML of the documentation, by whoever reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fastdpop.integrations.axolotl_args import FastDpopArgs
from tests.snippets import files

_AXOLOTL = yaml.safe_load((Path(__file__).parents[2] / "examples" / "axolotl-h100.yml").read_text())
"""A whole file, whose keys `make test-axolotl` holds to Axolotl's."""


def check_yaml(text: str) -> None:
    """Check a block's keys and values.

    Raises:
        AssertionError, ValueError: whoever reads it would refuse it.
    """
    given = yaml.safe_load(text)
    assert isinstance(given, dict)
    if "plugins" in given or any(key.startswith("fastdpop") for key in given):
        _axolotl(given)
    elif "distributed_type" in given:
        from accelerate.commands.config.config_args import load_config_from_file

        path = Path("accelerate.yaml")
        path.write_text(text)
        load_config_from_file(str(path))
    else:
        _train(text, given)


def _axolotl(given: dict[str, Any]) -> None:
    ours = {*FastDpopArgs.model_fields}
    FastDpopArgs.model_validate({"rl": "dpo", "fastdpop": True, **given})
    unknown = {*given} - ours - {*_AXOLOTL}
    assert not unknown, f"examples/axolotl-h100.yml does not have {sorted(unknown)}"


def _train(text: str, given: dict[str, Any]) -> None:
    from fastdpop.train.parse import parse

    path = Path("snippet.yaml")
    path.write_text(text)
    for name in ("model", "pairs", "eval-pairs"):
        if name in given:
            files.provide([f"--{name}", given[name]])
    parse(["--config", str(path), "--device", "cpu"])
