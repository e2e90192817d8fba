"""The reference's log-probs of a data set, computed once and kept on disk for later runs that would compute the same.

TRL finds what it computed by the weights and a fingerprint of how the data set came about, and beside the data set,
which for one in memory is a temporary folder. Here everything that the log-probs depend on finds them, in one place.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model, tqdm
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import hash_module

from fastdpop.hf.tree_attention import original
from fastdpop.integrations.trl import values
from fastdpop.integrations.trl.loss import preference
from fastdpop.version import VERSION

_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
_DIGEST = hashlib.sha256().digest_size
_NO_PART_OF_A_RESULT = {"_name_or_path", "architectures", "transformers_version", "use_cache"}
"""Of a model's config."""


def with_logps(
    trainer: Any, own: Callable[..., Any], dataset: Any, name: str, batch_size: int
) -> Any:
    """``DPOTrainer._precompute_ref_logps``: the data set with two columns more, in nats, float32.

    Args:
        own: TRL's, which says what it cannot take.
        name: of the data set, for messages; batch_size: in pairs.

    Raises:
        FloatingPointError: a log-prob is not finite.
    """
    if not isinstance(dataset, Dataset):
        return own(dataset, name, batch_size)
    # Columns of that name are of another reference, or of an earlier call.
    dataset = dataset.remove_columns([n for n in _COLUMNS if n in dataset.column_names])
    path = Path(datasets.config.HF_DATASETS_CACHE) / "fastdpop"
    path /= f"ref-logps-{_key(trainer, dataset, batch_size)}"
    logps = _read(path)
    said = f"reference log-probs of the {name} dataset found in {path}"
    # Where every node has a disk of its own, some may have the file and others not.
    if not all(gather_object([logps is not None])):
        logps = _computed(trainer, dataset, name, batch_size)
        said = f"reference log-probs of the {name} dataset computed, and kept in {path}"
        if trainer.accelerator.is_local_main_process:
            try:
                _write(path, logps)
            except OSError as error:
                said = f"reference log-probs of the {name} dataset computed, and not kept: {error}"
    if trainer.accelerator.is_main_process:
        _say(said)
    added = Dataset.from_dict(dict(zip(_COLUMNS, logps.T, strict=True)))
    return concatenate_datasets([dataset, added], axis=1)


def _read(path: Path) -> Any:
    """The log-probs ``(pairs, 2)`` that a file holds; None if there is none, or it is not as it was written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _say(f"{path} cannot be read: {error}")
        return None
    digest, numbers = data[:_DIGEST], data[_DIGEST:]
    if hashlib.sha256(numbers).digest() != digest:
        _say(f"{path} is damaged, and not used")
        return None
    return np.load(io.BytesIO(numbers))


def _write(path: Path, logps: Any) -> None:
    """All of it or nothing."""
    numbers = io.BytesIO()
    np.save(numbers, logps)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as file:
            file.write(hashlib.sha256(numbers.getvalue()).digest())
            file.write(numbers.getvalue())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _say(text: str) -> None:
    print(f"fastdpop: {text}", file=sys.stderr)


# ---- what the log-probs depend on ---------------------------------------------------------------


def _key(trainer: Any, dataset: Dataset, batch_size: int) -> str:
    """A hash of it, the same in all processes."""
    model = trainer.accelerator.unwrap_model(trainer.ref_model or trainer.model)
    config = model.config.to_dict()
    args = trainer.args
    parts = {
        "versions": (VERSION, torch.__version__, transformers.__version__),
        "tokens": hash_of_tokens(dataset),
        "weights": _hash_of_weights(trainer),
        "adapters": model.peft_config if is_peft_model(model) else {},
        "config": {k: v for k, v in config.items() if k not in _NO_PART_OF_A_RESULT},
        "attention": original(model.config._attn_implementation),
        "kernels": getattr(args, "use_liger_kernel", False),
        "precision": (str(model.dtype), trainer.accelerator.mixed_precision, args.tf32),
        "device": trainer.accelerator.device.type,
        "engine": trainer._fastdpop.engine,
        "prefixes": trainer._fastdpop.share_prefixes,
        # A subclass may have its own; FastDPOTrainer's and that of a patched DPOTrainer are one.
        "scored by": trainer.compute_ref_log_probs.__qualname__.removeprefix("Fast"),
        "ld_alpha": preference(trainer).traits.ld_alpha,
        # What is cut off, and how sequences are padded, by which products are rounded.
        "batches": (batch_size, args.max_length, args.truncation_mode),
        "collator": Hasher.hash(values.without(trainer.data_collator)),
    }
    text = json.dumps(parts, sort_keys=True, default=_plain)
    key = [hashlib.sha256(text.encode()).hexdigest()]
    broadcast_object_list(key, from_process=0)
    return key[0]


def _plain(value: Any) -> Any:
    """What JSON does not know, the same in every process."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return value.to_dict() if hasattr(value, "to_dict") else str(value)


def _hash_of_weights(trainer: Any) -> str:
    """Before TRL 1.15 it is not known from when the models were whole."""
    known = getattr(trainer, "_precompute_model_hash", None)
    return known or hash_module(trainer.ref_model or trainer.model)


def hash_of_tokens(dataset: Dataset) -> str:
    """Of the token ids in their order, however they came about."""
    found = hashlib.sha256()
    for table in dataset.select_columns(list(_TOKENS)).with_format("arrow").iter(1000):
        for name in _TOKENS:
            lists = table.column(name).combine_chunks()
            for numbers in (lists.value_lengths(), lists.flatten()):
                found.update(numbers.cast("int64").to_numpy().tobytes())
    return found.hexdigest()


# ---- computing them -----------------------------------------------------------------------------


def _computed(trainer: Any, dataset: Dataset, name: str, batch_size: int) -> Any:
    """``(pairs, 2)``, in every process.

    Raises:
        ValueError: a process has no weights.
    """
    if trainer.ref_model is None and trainer.is_fsdp_enabled and _loaded_by_the_first():
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is true, expected false where the reference is the model without its "
            "adapter, scored before training: processes but the first have no weights yet. Or score it in every step "
            "(precompute_ref_log_probs=False, --reference online)"
        )
    accelerator, args = trainer.accelerator, trainer.args
    loader = accelerator.prepare(
        DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=trainer.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )
    )
    model = trainer.ref_model
    if model is None:
        model = _engine(trainer) if trainer.is_deepspeed_enabled else trainer.model
    # TRL's gives the model too since 1.9.
    parameters = [*inspect.signature(trainer.compute_ref_log_probs).parameters]
    given = () if parameters == ["inputs"] else (model,)
    logps = []
    for batch in tqdm(
        iterable=loader,
        desc=f"Computing reference log probs for {name} dataset",
        disable=args.disable_tqdm,
    ):
        both = torch.stack(trainer.compute_ref_log_probs(*given, batch), dim=1)
        logps.append(accelerator.gather_for_metrics(both))
    found = torch.cat(logps).float().cpu().numpy()
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found).all(1))[0])
        raise FloatingPointError(
            f"the reference's log-probs of pair {row + 1} of the {name} dataset are {found[row].tolist()}, "
            "expected finite ones"
        )
    return found


def _loaded_by_the_first() -> bool:
    """Whether a model that FSDP has not sharded yet has weights in one process only."""
    return os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() in ("1", "true")


def _engine(trainer: Any) -> Any:
    """DeepSpeed places a model in ``train``, which comes later: as TRL does it since 1.9."""
    if getattr(trainer, "_precompute_engine", None) is None:
        trainer._precompute_engine = prepare_deepspeed(trainer.model, trainer.accelerator)
    return trainer._precompute_engine
