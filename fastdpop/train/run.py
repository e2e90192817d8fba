"""A run of ``fastdpop train``: from files of pairs to a saved model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import set_seed
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl.scripts.utils import get_dataset

from fastdpop import pair_values
from fastdpop.data import load_pairs
from fastdpop.data.tokens import tokenize
from fastdpop.integrations.trl.config import value_names
from fastdpop.integrations.trl.loss import configured
from fastdpop.integrations.trl.models import UnfitModel
from fastdpop.integrations.trl.order import prompts
from fastdpop.integrations.trl.references import hash_of_tokens
from fastdpop.integrations.trl.values import hash_of_values
from fastdpop.prefix.sampler import PromptSampler
from fastdpop.train import checkpoint, picture, processes
from fastdpop.train.consistency import by_evaluations, evaluates, grouped_by_length
from fastdpop.train.ending import nothing_left, summary
from fastdpop.train.model import Source, load_model, load_tokenizer, model_source
from fastdpop.train.parse import Asked, parse
from fastdpop.train.report import evaluations
from fastdpop.train.trainer import PairTrainer

_FREE = (
    "output_dir", "logging", "log_", "eval", "do_", "save_", "per_device_eval", "report_to", "run_name",
    "project", "trackio", "hub_", "push_to_hub", "resume_from_checkpoint", "disable_tqdm", "use_cpu",
    "dataloader_num_workers", "dataloader_pin", "dataloader_persistent", "dataloader_prefetch",
    "dataset_num_proc", "ddp_", "deepspeed", "fsdp", "debug", "skip_memory", "load_best", "metric_for",
    "greater_is", "ignore_data_skip", "include_", "prediction_loss_only", "enable_jit", "restore_",
    "gradient_checkpointing", "activation_", "torch_empty_cache", "max_length", "local_rank", "warn_displacement",
)  # fmt: skip
"""How the names of those of TRL's settings begin on which no number depends that a run computes."""
_LENGTH = ("num_train_epochs", "max_steps")
"""Settings that only say how long it goes on where the learning rate is constant."""


def run(argv: Sequence[str]) -> int:
    """Read, train, save, and say how it went.

    Raises:
        SystemExit: the command line is none.
        ValueError, OSError, ImportError, FloatingPointError: with a message for the user.
        torch.OutOfMemoryError, KeyboardInterrupt: as they come.
    """
    asked = parse(argv)
    if asked.own.threads:
        torch.set_num_threads(asked.own.threads)
    config, say = asked.config, PartialState().print
    processes.agree(processes.settings(asked))
    output = Path(str(config.output_dir))
    source = model_source(asked)
    tokenizer = load_tokenizer(asked, source)
    train, held_out = read(asked, tokenizer, source)
    _settle_warm_up(asked, len(train))
    _look_at_both(asked, train, held_out)
    # Once: what is scored together beforehand is trained on together, see PairTrainer.
    train = _mixed(train, config)
    identity = _identity(asked, source, train, held_out)
    processes.agree(identity)
    start = _open(output, asked, identity)
    others = _others(start, identity)
    if "eval_on_start" not in asked.given:
        config.eval_on_start = held_out is not None and (start is None or others)
    model, ref_model, peft_config = load_model(asked, source)
    set_seed(config.seed)  # of a new adapter, which TRL before 1.15 does not seed
    try:
        trainer = PairTrainer(
            model,
            ref_model,
            config,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=peft_config,
            engine=asked.own.engine,
            workspace_bytes=asked.own.workspace_bytes,
            loss=asked.loss,
            identity=identity,
            write_metrics=True,
        )
    except UnfitModel as error:
        raise ValueError(
            f"{asked.model.model_name_or_path} cannot be trained so: {error}"
        ) from error
    except RuntimeError as error:
        if "install" not in str(error):  # a logger's package, say
            raise
        raise ImportError(str(error)) from error
    processes.check(trainer)
    if asked.data.ignore_bias_buffers:
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    if start is not None and _nothing_left(trainer, Path(start)):
        say(nothing_left(asked, checkpoint.step(Path(start))))
        trainer.accelerator.end_training()
        return 0
    try:
        result = trainer.train(resume_from_checkpoint=start)
    except FloatingPointError:
        _draw(trainer)
        raise
    except KeyboardInterrupt:
        _draw(trainer)
        saved = checkpoint.checkpoints(output)
        hint = f"; go on from {saved[0].name} with --resume" if saved else ""
        raise KeyboardInterrupt(
            f"interrupted after step {trainer.state.global_step}{hint}"
        ) from None
    if held_out is not None:
        known = evaluations(trainer.state.log_history)
        ended = known and known[-1]["step"] == trainer.state.global_step
        if not ended or config.load_best_model_at_end:
            trainer.evaluate()
    trained = {} if held_out is not None else trainer.after_last_step()
    trainer.save_at_the_end()
    say(summary(asked, trainer, result, trained, first=trainer.begun if others else 0))
    _draw(trainer)
    trainer.accelerator.end_training()
    return 0


def read(asked: Asked, tokenizer: Any, source: Source) -> tuple[Any, Any]:
    """Training and held-out pairs, checked and tokenised; None where there are no held-out ones."""
    own, data, mixture = asked.own, asked.data, asked.mixture
    if mixture.datasets:
        try:
            parts = get_dataset(mixture)
        except Exception as error:  # those of hub, network and pyarrow have no common base
            raise ValueError(f"datasets: {error}") from error
        train, held_out = parts["train"], own.eval_pairs or parts.get("test")
    else:
        train = own.pairs or data.dataset_name
        held_out = own.eval_pairs
        if held_out is None and evaluates(asked):
            held_out = data.dataset_name
    splits = (data.dataset_train_split, data.dataset_test_split)
    return tuple(  # type: ignore[return-value]
        None if what is None else _read(what, split, name, asked, tokenizer, source)
        for what, split, name in zip((train, held_out), splits, ("train", "eval"), strict=True)
    )


def _read(what: Any, split: str, name: str, asked: Asked, tokenizer: Any, source: Source) -> Any:
    own, say = asked.own, PartialState().print
    mappings = [_mapping(text) for text in own.columns or ()]
    columns = dict(mappings)
    if len(columns) < len(mappings):
        raise ValueError(f"--columns is {own.columns}, expected each name once")
    config: str | None = asked.data.dataset_config
    label = f"{name} data of the mixture"
    if isinstance(what, str):
        label = what
        if Path(what).is_file():
            split, config = "train", None  # the only ones of a file
    values = value_names(asked.config)
    pairs = load_pairs(
        what, columns=columns, chat=own.chat, split=split, config=config, values=values
    )
    longest = asked.config.max_length or source.context
    dataset, dropped = tokenize(
        pairs.dataset,
        tokenizer,
        name=name,
        max_length=longest,
        too_long=own.too_long,
        vocab_size=source.vocab_size,
        num_proc=asked.config.dataset_num_proc,
        values=values,
    )
    notes = [f"{label}: {len(dataset)} pairs ({pairs.format})"]
    if dropped:
        notes.append(f"{dropped} dropped for more than {longest} tokens")
    if pairs.unused:
        notes.append(f"columns not used: {', '.join(pairs.unused)}")
    say(", ".join(notes))
    unasked = pair_values.readable(configured(asked.config, asked.loss), pairs.offered)
    if unasked and PartialState().is_main_process:
        warnings.warn(
            f"{label}: the loss does not get {' and '.join(unasked)}, expected --pair-values "
            f"{' '.join([*values, *unasked])} if it is to"
            + ("; all training and held-out pairs then need them" if evaluates(asked) else ""),
            stacklevel=2,
        )
    beyond = sum(length > (source.context or math.inf) for length in _lengths(dataset))
    if beyond and PartialState().is_main_process:
        warnings.warn(
            f"{label}: {beyond} of {len(dataset)} pairs have more tokens than the model's context, {source.context}, "
            f"which --max-length {longest} allows",
            stacklevel=2,
        )
    equal = sum(row["chosen_ids"] == row["rejected_ids"] for row in dataset)
    if equal and PartialState().is_main_process:
        warnings.warn(
            f"{label}: chosen equals rejected in {equal} of {len(dataset)} pairs, which teach nothing",
            stacklevel=2,
        )
    return dataset


def _settle_warm_up(asked: Asked, pairs: int) -> None:
    """Fit the warm-up to the run if it was not given; warn if it was, and the run is over before it.

    Raises:
        ValueError: there is no step.
    """
    config = asked.config
    size = config.per_device_train_batch_size * config.world_size
    batches = pairs // size if config.dataloader_drop_last else math.ceil(pairs / size)
    if not batches:
        raise ValueError(
            f"--dataloader_drop_last leaves no batch to train on: {pairs} pairs are fewer than the {size} of one, "
            "expected a smaller --batch-pairs"
        )
    steps = config.max_steps
    if steps < 0:
        each = math.ceil(batches / config.gradient_accumulation_steps)
        steps = math.ceil(config.num_train_epochs * each)
    if "warmup_steps" not in asked.given:
        config.warmup_steps = float(min(config.warmup_steps, steps // 4))  # as one that is given
    elif config.warmup_steps >= steps and PartialState().is_main_process:
        warnings.warn(
            f"--warmup is {config.warmup_steps:g}, and the run has {steps} step{'s'[: steps > 1]}: the learning rate "
            "does not reach --learning-rate, and is 0 in the first step. Expected a warm-up that ends before the run",
            stacklevel=2,
        )


def _look_at_both(asked: Asked, train: Any, held_out: Any) -> None:
    """Warn of pairs that are trained on and held out, too, of which nothing held out can be learnt."""
    if held_out is None or not PartialState().is_main_process:
        return
    known = set(map(_tokens, train))
    both = sum(_tokens(row) in known for row in held_out)
    if both:
        warnings.warn(
            f"{both} of {len(held_out)} held-out pairs are training pairs, too: what evaluations say of them is not "
            "what the model does with pairs that it has not seen. Expected other pairs in --eval-pairs",
            stacklevel=2,
        )


def _tokens(row: dict[str, Any]) -> int:
    """A pair's, as a number that hardly another pair has."""
    return hash(tuple(tuple(row[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")))


def _mapping(text: str) -> tuple[str, str]:
    name, sign, column = text.partition("=")
    if not (name and sign and column):
        raise ValueError(f"--columns is {text!r}, expected NAME=COLUMN, such as prompt=question")
    return name, column


def _mixed(train: Any, config: Any) -> Any:
    """Training pairs in the order of the run's seed; those of one prompt side by side, if they share it; those of
    similar length, if that was asked for. In their own order, if that was.
    """
    if getattr(config, "train_sampling_strategy", None) == "sequential":
        return train
    seed = config.seed if config.data_seed is None else config.data_seed
    if grouped_by_length(config):
        size = config.per_device_train_batch_size * config.world_size
        generator = torch.Generator().manual_seed(seed)
        return train.select(get_length_grouped_indices(_lengths(train), size, generator=generator))
    if not config.share_prefixes:
        return train.shuffle(seed)
    return train.select(list(PromptSampler(prompts(train), seed=seed)))


def _lengths(dataset: Any) -> list[int]:
    """Of the longer sequence of each pair, to which the other is padded."""
    return [
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for row in dataset
    ]


def _identity(asked: Asked, source: Source, train: Any, held_out: Any) -> dict[str, str]:
    """What a checkpoint must agree on with the run that goes on from it."""
    config = asked.config
    constant = config.lr_scheduler_type in ("constant", "constant_with_warmup")
    # A warm-up below 1 is a share of the whole.
    free: tuple[str, ...] = _LENGTH if constant and not 0 < config.warmup_steps < 1 else ()
    own = {
        name: str(value)
        for name, value in sorted(config.to_dict().items())
        if not name.startswith((*_FREE, *free))
    }
    own |= {f"model: {name}": str(value) for name, value in vars(asked.model).items()}
    path = Path(str(asked.model.model_name_or_path))
    if path.exists():  # however it is spelt
        own["model: model_name_or_path"] = str(path.resolve())
    # More processes with fewer pairs each compute the same.
    each = int(own.pop("per_device_train_batch_size"))
    own["pairs of a forward pass in all processes"] = str(each * config.world_size)
    own["parameters"] = processes.layout(config)
    own["merge_adapter"] = str(asked.own.merge_adapter)
    own["model"] = f"{source.vocab_size} tokens, context {source.context}"
    own["loss"] = repr(asked.loss)
    own["engine"] = f"{asked.own.engine}, workspace {asked.own.workspace_bytes}"
    own["training pairs"] = hash_of_tokens(train)
    own[checkpoint.HELD_OUT] = "none" if held_out is None else hash_of_tokens(held_out)
    own[checkpoint.DECIDES] = _decided(config)
    for name in value_names(config):
        own[f"values: {name}"] = hash_of_values(train, name)
    return own


def _decided(config: Any) -> str:
    """What is chosen by evaluations: those of a checkpoint must be of the same kind and of the same pairs."""
    by = f"{config.metric_for_best_model}, greatest: {config.greater_is_better}"
    if by_evaluations(config):
        return f"the learning rate, by {by}, {config.eval_strategy} {config.eval_steps} {config.eval_delay}"
    return f"the best model, by {by}" if config.metric_for_best_model else checkpoint.NOTHING


def _others(start: str | None, identity: dict[str, str]) -> bool:
    """Whether there are held-out pairs, and others than those of the checkpoint to go on from; then that is said."""
    if start is None or not (Path(start) / checkpoint.MANIFEST).exists():
        return False
    now = identity[checkpoint.HELD_OUT]
    if now == "none" or checkpoint.held_out(Path(start)) == now:
        return False
    PartialState().print(
        f"The held-out pairs are not those of {start}, which changes no step of training: evaluations from here on are "
        "of the new ones."
    )
    return True


def _open(output: Path, asked: Asked, identity: dict[str, str]) -> str | None:
    """The checkpoint to go on from, found by one process for all."""
    model = Path(str(asked.model.model_name_or_path))
    if model.is_dir() and model.resolve() == output.resolve():
        raise ValueError(
            f"--output is {str(output)!r}, the folder of --model, which already holds a model: choose another"
        )
    explicit = asked.config.resume_from_checkpoint
    if explicit is not None:
        checkpoint.check_named(Path(explicit), output)
        return str(explicit)
    found: list[Any] = [None, [], None]
    if PartialState().is_main_process:
        try:
            start, notes = checkpoint.open_run(output, asked.own.resume, identity)
            checkpoint.make(output)
            found = [str(start) if start else None, notes, None]
        except (ValueError, OSError) as error:
            found[2] = error
    broadcast_object_list(found)
    if found[2] is not None:
        raise found[2]
    for note in found[1]:
        PartialState().print(note)
    return None if found[0] is None else str(found[0])


def _nothing_left(trainer: PairTrainer, start: Path) -> bool:
    """Whether the run that a checkpoint belongs to has ended, with its model beside the checkpoint: then nothing of it
    is written again.
    """
    output = Path(str(trainer.args.output_dir))
    same = start.resolve().parent == output.resolve()
    found = [same and checkpoint.ended(output) and trainer.has_ended(start)]
    broadcast_object_list(found)  # what the first process sees, so that none waits for another
    return found[0]


def _draw(trainer: PairTrainer) -> None:
    """The picture of what was logged so far, by one process, which says where it is."""
    if trainer.is_world_process_zero():
        line = picture.drawn(trainer.state.log_history, Path(str(trainer.args.output_dir)))
        if line is not None:
            print(line)
