"""What options go together: nothing is out of range, and nothing is accepted and ignored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from fastdpop import checks, engines
from fastdpop.integrations.trl.config import shares_prefixes
from fastdpop.integrations.trl.loss import unread
from fastdpop.integrations.trl.options import check_best_metric
from fastdpop.train.options import MOST_THREADS

_LARGEST_SEED = 2**32 - 1  # numpy takes no more
_RANGES = {
    "learning_rate": (0.0, math.inf, False),
    "max_grad_norm": (0.0, math.inf, True),  # 0: no clipping, to TRL
    "num_train_epochs": (0.0, 1e6, False),
    "weight_decay": (0.0, math.inf, True),
    "warmup_steps": (0, math.inf, True),
    "logging_steps": (0, math.inf, False),
    "per_device_train_batch_size": (1, math.inf, True),
    "per_device_eval_batch_size": (1, math.inf, True),
    "gradient_accumulation_steps": (1, math.inf, True),
    "precompute_ref_batch_size": (1, math.inf, True),
    "save_total_limit": (1, math.inf, True),
    "seed": (0, _LARGEST_SEED, True),
    "data_seed": (0, _LARGEST_SEED, True),
    "max_length": (2, math.inf, True),
    "ref_model_sync_steps": (1, math.inf, True),
    "ref_model_mixup_alpha": (0.0, 1.0, True),
    "neftune_noise_alpha": (0.0, math.inf, True),
}
"""TRL's numbers: the least, the greatest, and whether the least itself is meant."""

_NEEDS = {
    "fsdp_config": "fsdp",
    "bnb_4bit_quant_type": "load_in_4bit",
    "use_bnb_nested_quant": "load_in_4bit",
    "bnb_4bit_quant_storage": "load_in_4bit",
    "ref_model_mixup_alpha": "sync_ref_model",
    "ref_model_sync_steps": "sync_ref_model",
    "hub_model_id": "push_to_hub",
    "precompute_ref_batch_size": "precompute_ref_log_probs",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "greater_is_better": "metric_for_best_model",
}
"""Options that mean nothing without another."""
_NO_WARM_UP = ("constant", "reduce_lr_on_plateau", "greedy")
"""Schedules that pass over a warm-up."""
_EVALUATION = (
    *("eval_strategy", "eval_steps", "eval_on_start", "eval_delay", "load_best_model_at_end"),
    *("metric_for_best_model", "per_device_eval_batch_size"),
)
_REFUSED = {
    "truncation_mode": "nothing is ever cut",
    "do_train": "it always trains",
    "do_eval": "it evaluates where there are --eval-pairs",
    "do_predict": "it does not predict",
    "streaming": "pairs are checked before training: `fastdpop trl dpo` takes a stream",
    "dataset_streaming": "pairs are checked before training: `fastdpop trl dpo` takes a stream",
    "label_names": "pairs have no labels",
}


def missing(asked: Any) -> Iterator[str]:
    """The options without which there is no run."""
    if not asked.model.model_name_or_path:
        yield "--model"
    if not (asked.own.pairs or asked.data.dataset_name or asked.mixture.datasets):
        yield "--pairs"
    if "output_dir" not in asked.given:
        yield "--output"


def check(asked: Any) -> None:
    """Refuse what is out of range, without effect, or a contradiction.

    Args:
        asked: a :class:`fastdpop.train.parse.Asked`.

    Raises:
        ValueError: the message names the option.
    """
    own, config, given = asked.own, asked.config, asked.given
    for name, why in _REFUSED.items():
        where = next(x for x in (config, asked.data, asked.mixture) if hasattr(x, name))
        # What it does anyhow may be said.
        harmless = bool(getattr(where, name)) == (name in ("do_train", "do_eval"))
        harmless |= getattr(where, name) == "keep_start"
        if name in given and not harmless:
            raise ValueError(f"--{name} has no place here: {why}")
    if bool(own.pairs) + bool(asked.data.dataset_name) + bool(asked.mixture.datasets) > 1:
        raise ValueError("--pairs, --dataset_name and datasets each name pairs: give one of them")
    if not config.output_dir:
        raise ValueError("--output is empty, expected a folder")
    if own.threads is not None and not 1 <= own.threads <= MOST_THREADS:
        raise ValueError(f"--threads is {own.threads}, expected 1 to {MOST_THREADS}")
    if config.max_steps < 1 and config.max_steps != -1:  # TRL's way to say --epochs
        raise ValueError(f"--steps is {config.max_steps}, expected at least 1")
    for name, (least, most, inclusive) in _RANGES.items():
        value = getattr(config, name, None)
        if value is not None and not (
            least < value < most or (inclusive and value in (least, most))
        ):
            bound = f"{'at least' if inclusive else 'more than'} {least:g}"
            bound += "" if most == math.inf else f" and at most {most:.10g}"
            raise ValueError(f"--{name} is {value}, expected {bound}")
    if asked.mixture.test_split_size and (own.eval_pairs or not asked.mixture.datasets):
        raise ValueError("--test_split_size has no effect beside --eval-pairs, or without datasets")
    _check_effects(asked)
    check_best_metric(config)
    checks.workspace(own.workspace_bytes, engines.DEFAULT_WORKSPACE_BYTES)
    if own.engine != "auto":
        engines.get(own.engine)
    engines.choose(own.engine, config.device, torch.bfloat16 if config.bf16 else torch.float32)
    _check_lora(asked)
    _check_moving_reference(asked)
    _check_schedule(config, given)
    _check_order(config)
    if by_evaluations(config) and not evaluates(asked):
        raise ValueError(
            f"--lr_scheduler_type {_word(config.lr_scheduler_type)} has no effect without --eval-pairs: it lowers the "
            "learning rate where evaluations get worse"
        )


def evaluates(asked: Any) -> bool:
    """Whether there are held-out pairs."""
    named = asked.data.dataset_name and {"dataset_test_split", "eval_strategy"} & asked.given
    return bool(asked.own.eval_pairs or named or asked.mixture.test_split_size)


def by_evaluations(config: Any) -> bool:
    """Whether the learning rate depends on evaluations."""
    return _word(config.lr_scheduler_type) in ("reduce_lr_on_plateau", "greedy")


def grouped_by_length(config: Any) -> bool:
    """Whether pairs of similar length are batched."""
    return getattr(config, "train_sampling_strategy", None) == "group_by_length"


def _word(value: Any) -> str:
    """Of an enumeration."""
    return str(getattr(value, "value", value))


def _check_effects(asked: Any) -> None:
    """Refuse what was given and would change nothing."""
    own, config, given = asked.own, asked.config, asked.given
    if own.loss is None:
        for name in unread(config):
            if name in given:
                raise ValueError(f"--{name} has no effect: {config.loss_type} does not read it")
    elif "loss_type" in given:
        raise ValueError("--loss and --loss_type each name a loss: give one of them")
    for name, needed in _NEEDS.items():
        has = getattr(config, needed, None) or getattr(asked.model, needed, None)
        if name in given and not has:
            raise ValueError(f"--{name} has no effect without --{needed}")
    if {"max_steps", "num_train_epochs"} <= given and config.max_steps > 0:
        raise ValueError("--epochs has no effect beside --steps: give one of them")
    for kind in ("save", "eval"):
        if f"{kind}_steps" in given and getattr(config, f"{kind}_strategy") == "no":
            raise ValueError(f"--{kind}_steps has no effect with --{kind}_strategy no")
    if not evaluates(asked):
        for name in _EVALUATION:
            if name in given and getattr(config, name) not in ("no", False):
                raise ValueError(f"--{name} has no effect without --eval-pairs")
    for source, split in ((own.pairs, "train"), (own.eval_pairs, "test")):
        is_file = source is not None and Path(source).is_file()
        nothing = source is None and not asked.data.dataset_name
        if f"dataset_{split}_split" in given and (is_file or nothing):
            why = "a file has no splits" if is_file else f"no {split} data are named"
            raise ValueError(f"--dataset_{split}_split has no effect: {why}")


def _check_order(config: Any) -> None:
    if grouped_by_length(config) and shares_prefixes(config):
        raise ValueError(
            "--train_sampling_strategy group_by_length has no place with --share-prefixes, which computes no padding "
            "and puts pairs of one prompt side by side"
        )
    if getattr(config, "train_sampling_strategy", None) == "batch_rebalance":
        raise ValueError(
            "--train_sampling_strategy is batch_rebalance, expected random, sequential or group_by_length: batches are "
            "made before training, and the reference is scored in them"
        )


def _check_moving_reference(asked: Any) -> None:
    config = asked.config
    if not config.sync_ref_model:
        return
    if "precompute_ref_log_probs" in asked.given and config.precompute_ref_log_probs:
        raise ValueError(
            "--reference precomputed has no place with --sync_ref_model, whose reference moves: leave it out"
        )
    if asked.model.use_peft:
        raise ValueError(
            "--lora has no place with --sync_ref_model: an adapter's reference is the model without it, which does not "
            "move"
        )


def _check_lora(asked: Any) -> None:
    model = asked.model
    if not model.use_peft:
        for name in sorted(asked.given):
            if name.startswith("lora_") or name in ("use_rslora", "use_dora"):
                raise ValueError(f"--{name} has no effect without --lora")
    elif asked.own.merge_adapter:
        raise ValueError(
            "--merge-adapter beside --lora would save an adapter of a model that is saved nowhere: merge "
            "first, and name the merged model"
        )
    if not 0 < model.lora_alpha < math.inf:
        raise ValueError(f"--lora_alpha is {model.lora_alpha}, expected a positive number")
    if not 0 <= model.lora_dropout < 1:
        raise ValueError(
            f"--lora_dropout is {model.lora_dropout}, expected a number from 0 to less than 1"
        )
    if model.lora_r < 1:
        raise ValueError(f"--lora_r is {model.lora_r}, expected at least 1")


def _check_schedule(config: Any, given: set[str]) -> None:
    """Make the schedule once, for its mistakes."""
    options = config.lr_scheduler_kwargs
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"--lr_scheduler_kwargs is {options!r}, expected a JSON object")
    name = _word(config.lr_scheduler_type)
    if options and name.startswith("constant"):
        raise ValueError(f"--lr_scheduler_kwargs has no effect with --lr_scheduler_type {name}")
    if config.warmup_steps and "warmup_steps" in given and name in _NO_WARM_UP:
        raise ValueError(f"--warmup has no effect with --lr_scheduler_type {name}, which has none")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        get_scheduler(name, optimizer, 1, 10, dict(options or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--lr_scheduler_type {name} and its --lr_scheduler_kwargs: {error}"
        ) from None
