"""The keys that fastdpop adds to Axolotl's YAML, and the field that it adds to its training arguments.

Axolotl imports this in every run once fastdpop is installed, so nothing heavy is imported before ``fastdpop: true`` is
seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from pydantic import (
    BaseModel,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from fastdpop import engines
from fastdpop.integrations import dpop_lambda as lambdas
from fastdpop.names import hint

TRAINERS = ("dpo", "ipo")
"""Values of ``rl`` that Axolotl trains with TRL's ``DPOTrainer``."""

_PLUGIN = "fastdpop.integrations.axolotl.FastDpopPlugin"
_OPTIONS = (
    *("dpop_lambda", "fastdpop_engine", "fastdpop_workspace_bytes"),
    *("fastdpop_share_prefixes", "fastdpop_global_batch"),
    *("fastdpop_pair_values", "fastdpop_warn_displacement"),
)
_SHARDED = ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size")


class FastDpopArgs(BaseModel):
    """What a YAML file may say; every error names the key, its value and what was expected.

    Attributes:
        fastdpop: compute the losses of ``rl: dpo`` with fastdpop.
        dpop_lambda: DPOP's lambda, 0 or above, for ``dpo_loss_type: ["dpop"]``; the default is the paper's 50.
        fastdpop_engine, fastdpop_workspace_bytes, fastdpop_share_prefixes, fastdpop_global_batch: as in
            :func:`fastdpop.patch_trl`.
        fastdpop_pair_values, fastdpop_warn_displacement: `pair_values` and `warn_displacement` of
            :class:`~fastdpop.integrations.trl.FastDPOConfig`.
    """

    fastdpop: StrictBool | None = Field(
        default=None,
        json_schema_extra={"description": "Compute the losses of `rl: dpo` with fastdpop."},
    )
    dpop_lambda: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        json_schema_extra={"description": lambdas.HELP},
    )
    fastdpop_engine: str | None = Field(
        default=None,
        json_schema_extra={"description": "fastdpop's engine. The default is 'auto'."},
    )
    fastdpop_workspace_bytes: StrictInt | None = Field(
        default=None,
        gt=0,
        json_schema_extra={"description": "Upper bound of fastdpop's scratch memory."},
    )
    fastdpop_share_prefixes: StrictBool | None = Field(
        default=None,
        json_schema_extra={
            "description": "Compute what sequences of a batch begin with in common once, and no padding, through the "
            "whole model. The default is what dpo_padding_free is."
        },
    )
    fastdpop_global_batch: StrictBool | None = Field(
        default=None,
        json_schema_extra={
            "description": "On several GPUs, take the loss of all their pairs, as one with all of them would. The "
            "default is false: each takes that of its own."
        },
    )

    fastdpop_pair_values: list[StrictStr] | None = Field(
        default=None,
        json_schema_extra={
            "description": "Columns of the data whose numbers go to the loss with each pair: weight, margin, ..."
        },
    )
    fastdpop_warn_displacement: StrictBool | None = Field(
        default=None,
        json_schema_extra={
            "description": "Warn once where chosen completions become less likely for good. The default is true."
        },
    )

    @field_validator("dpop_lambda", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, bool):  # pydantic would take it for 0 or 1
            raise ValueError(f"dpop_lambda is {value!r}, expected a finite number >= 0")
        return value

    @field_validator("fastdpop_engine")
    @classmethod
    def _engine(cls, value: str | None) -> str | None:
        if value not in (None, "auto"):
            engines.get(value)
        return value

    # Of the whole file, before Axolotl's own checks: those do not see keys that they do not know.
    @model_validator(mode="before")
    @classmethod
    def _fastdpop(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        own = ("fastdpop", *_OPTIONS)
        for key in data:
            if str(key) in ("share_prefixes", "padding_free"):  # TRL's names
                raise ValueError(f"{key} is no key of Axolotl's, expected fastdpop_share_prefixes")
            if str(key).startswith(("fastdpop", "dpop")) and key not in own:
                raise ValueError(
                    f"{key} is not a key that fastdpop knows, expected one of {own}{hint(key, own)}"
                )
        if data.get("fastdpop") is True:
            _check_on(data)
        elif data.get("fastdpop") in (None, False):  # anything else is refused as a value
            _check_off(data)
        return data


def _check_on(data: Mapping[str, Any]) -> None:
    """
    Raises:
        ImportError: fastdpop does not serve the TRL that is installed.
        ValueError: other keys do not go together with ``fastdpop: true``.
    """
    from fastdpop.integrations.trl import LOSS_TYPES
    from fastdpop.integrations.trl.config import value_names

    rl = data.get("rl")
    if rl not in TRAINERS:
        raise ValueError(
            f"rl is {_plain(rl)!r}, expected one of {TRAINERS} with fastdpop: true, which serves TRL's DPOTrainer"
        )
    types = data.get("dpo_loss_type")
    if not isinstance(types, (list, tuple, type(None))):
        raise ValueError(f"dpo_loss_type is {types!r}, expected a list such as ['dpop']")
    for name in types or ():
        if name not in LOSS_TYPES:
            raise ValueError(
                f"dpo_loss_type contains {name!r}, expected names among {LOSS_TYPES}{hint(name, LOSS_TYPES)}"
            )
    if data.get("dpop_lambda") is not None and "dpop" not in (types or ()):
        raise ValueError(
            f"dpop_lambda is {data['dpop_lambda']!r}, expected none unless dpo_loss_type contains 'dpop': "
            f"it is {types!r}"
        )
    names = data.get("fastdpop_pair_values")
    if isinstance(names, list):  # anything else is refused as a value
        value_names(SimpleNamespace(pair_values=names))
    if data.get("dpo_use_liger_kernel"):
        raise ValueError(
            "dpo_use_liger_kernel is true, expected false with fastdpop: true: it replaces the loss that fastdpop "
            "computes"
        )
    if data.get("dpo_padding_free") and data.get("fastdpop_share_prefixes") is False:
        raise ValueError(
            "fastdpop_share_prefixes is false beside dpo_padding_free: true, expected true or none: fastdpop leaves "
            "the padding out by the same computation"
        )
    for key in _SHARDED:
        degree = data.get(key) or 1
        if degree != 1:
            raise ValueError(
                f"{key} is {degree!r}, expected 1 with fastdpop: true, which needs whole sequences and the whole head "
                "on each GPU: shard weights with FSDP or DeepSpeed instead"
            )


def _check_off(data: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: a key has no effect without ``fastdpop: true``, or the plugin is listed and nothing is said.
    """
    for key in _OPTIONS:
        if data.get(key) is not None:
            raise ValueError(f"{key} is {data[key]!r}, expected none without fastdpop: true")
    types = data.get("dpo_loss_type")
    if types == "dpop" or (isinstance(types, (list, tuple)) and "dpop" in types):
        raise ValueError(
            f"dpo_loss_type is {types!r}, expected TRL's own losses without fastdpop: true, "
            "which brings 'dpop'"
        )
    listed = [str(name).replace(":", ".") for name in data.get("plugins") or ()]
    if _PLUGIN in listed and data.get("fastdpop") is None:
        raise ValueError(
            f"fastdpop is not set, expected true or false where plugins lists {_PLUGIN}"
        )


def _plain(value: Any) -> Any:
    """An enum's value, as the file has it."""
    return getattr(value, "value", value)


@dataclass
class FastDpopTrainingArgs:
    """Mixed into Axolotl's training arguments, also those of other trainers, where it has no effect."""

    dpop_lambda: float = field(
        default=lambdas.DEFAULT,
        metadata={"help": lambdas.HELP},
    )
    pair_values: list[str] | None = field(
        default=None, metadata={"help": "Columns whose numbers go to the loss with each pair."}
    )
    warn_displacement: bool = field(
        default=True,
        metadata={"help": "Warn once where chosen completions become less likely for good."},
    )
