"""TRL's ``DPOTrainer`` on fastdpop, as ``fastdpop train`` and the demo use it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import RandomSampler, Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from fastdpop.integrations.trl import FastDPOTrainer, batch, metrics, values
from fastdpop.prefix.sampler import PromptSampler
from fastdpop.train import checkpoint, reference
from fastdpop.train.report import MetricsFile, Progress

_OF_WRITING = (RuntimeError, OSError, SafetensorError)


class PairTrainer(FastDPOTrainer):
    """A :class:`~fastdpop.integrations.trl.FastDPOTrainer` for data that are tokenised already.

    - A step's loss is the mean over its pairs, also where its last batch has fewer; with `global_batch` over those of
      all processes, each once.
    - A loss or a gradient's norm that is not finite ends the run.
    - Checkpoints are sealed (:mod:`fastdpop.train.checkpoint`), if `identity` is given.
    - `begun` is the step that a run has gone on from, or 0; `pairs` is how many pairs it has trained on since.
    - A run that goes on from its last step trains no further one.
    - Metrics go to ``metrics.jsonl`` in the output folder, if `write_metrics` is set.

    Raises:
        FloatingPointError: from ``train``; the message names the step.
        OSError: a checkpoint cannot be written.
    """

    said_of_data = ("chosen-equals-rejected",)
    """Findings of a first batch that ``fastdpop train`` has said of all its data."""

    def __init__(
        self,
        *args: Any,
        identity: Mapping[str, str] | None = None,
        write_metrics: bool = False,
        title: str = "train",
        **kwargs: Any,
    ) -> None:
        self._identity = identity
        self._of_step = (0, 0)  # batches and pairs of the current step
        self._last: list[Any] = []  # the batches of the current step
        self._goes_on_from: int | None = None  # the step of a checkpoint
        self.begun = self.pairs = 0
        super().__init__(*args, **kwargs)
        config: Any = self.args
        # The data are in such batches already, and their order is that of batches.
        if getattr(config, "train_sampling_strategy", None) == "group_by_length":
            config.train_sampling_strategy = "random"
        self._reference_moves: bool = config.sync_ref_model
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        if not self.args.disable_tqdm:
            self.add_callback(Progress(title))
        if write_metrics:
            self.add_callback(MetricsFile())
        self.add_callback(_GoOn(self))

    def _prepare_dataset(self, dataset: Any, processing: Any, args: Any, name: str) -> Any:
        """TRL's own would tokenise; see :mod:`fastdpop.data.tokens`."""
        values.check_dataset(dataset, args, name, self._fastdpop.loss)
        return dataset

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's; whatever ends it, what is printed next begins a line. A reference that moves goes on, too.

        Raises:
            ValueError: the checkpoint does not hold such a reference.
        """
        if isinstance(resume_from_checkpoint, str):
            self._goes_on_from = checkpoint.step(Path(resume_from_checkpoint))
            if self._reference_moves:
                reference.load(self.ref_model, Path(resume_from_checkpoint))
        if self._identity is not None and self.args.should_save:
            checkpoint.begin(Path(str(self.args.output_dir)))  # until the model is there
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Progress):
                    callback.close()

    def has_ended(self, start: Path) -> bool:
        """Whether a checkpoint is that of the last step, or of one beyond it."""
        *_, steps = super().set_initial_training_values(self.args, self.get_train_dataloader())
        return checkpoint.step(start) >= steps

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with no epoch to go through where nothing is left to train: its loop looks after a step only."""
        epochs, *more, steps = super().set_initial_training_values(*args, **kwargs)
        if self._goes_on_from is not None and self._goes_on_from >= steps:
            epochs = 0
        return (epochs, *more, steps)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, of which training does not depend: a loader draws a random number."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def _get_train_sampler(self, *args: Any) -> Any:
        """Batches of consecutive pairs, in which a precomputed reference was scored, stay together.

        A pair that is padded as it was then has the very same log-probs, so that a policy which has
        not moved has log-ratios of exactly 0. Every epoch has an order of batches of its own.
        """
        sampler = super()._get_train_sampler(*args)
        if isinstance(sampler, (RandomSampler, PromptSampler)):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            # Those of all processes together: one process with a batch as large trains alike.
            size = self._train_batch_size * self.args.world_size
            return _InBatches(len(sampler), size, seed, lambda: self.state.epoch or 0)
        return sampler

    # ---- averages over pairs --------------------------------------------------------------------

    def get_batch_samples(self, *args: Any) -> Any:
        """The batches of a step, counted."""
        batches, items = super().get_batch_samples(*args)
        pairs = [batch.count(inputs) for inputs in batches]
        last = len(batches) - 1
        of_all = [batch.total(self, one, final=at == last) for at, one in enumerate(pairs)]
        self.pairs += sum(of_all)
        self._of_step = (len(batches), sum(of_all if self._fastdpop.global_batch else pairs))
        self._last = batches
        return batches, items

    def after_last_step(self) -> dict[str, float]:
        """Metrics of the last step's pairs under the weights that it has left, since what a step logs is of those
        before it; empty where there was no step.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        self.model_wrapped.eval()
        for inputs in self._last:
            self.prediction_step(self.model_wrapped, inputs, prediction_loss_only=True)
        metrics.fill(self, "eval")
        found = {name: values[-1] for name, values in self._metrics["eval"].items()}
        self._metrics["eval"].clear()
        if not math.isfinite(found.get("loss", 0.0)):
            raise FloatingPointError(
                f"after step {self.state.global_step}, the last one, the loss of its pairs is {found['loss']}, and the "
                "model was not saved. Lower --learning-rate"
            )
        return found

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's, weighted such that the mean over a step's batches is the mean over its pairs."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batches, pairs = self._of_step
        own = batch.count(inputs)
        if self._fastdpop.global_batch:
            own = batch.total(self, own)
        share = own * batches
        if not self.model.training or share == pairs:
            return result
        loss, *outputs = result if return_outputs else (result,)
        loss = loss * (share / pairs)
        return (loss, *outputs) if return_outputs else loss

    # ---- no NaN ---------------------------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        # On other devices to look at it now would wait for the whole step: `log` does.
        if isinstance(norm, Tensor) and norm.device.type == "cpu" and not norm.isfinite():
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the gradient's norm is {norm.item()}; "
                "the weights were not changed by this step. Lower --learning-rate, or go on from an earlier checkpoint"
            )
        return norm

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """TRL's, of finite numbers, and with the speed of the pairs that were trained on."""
        if (
            "train_samples_per_second" in logs
        ):  # Trainer's counts a step's pairs as if its batches were full
            logs["train_samples_per_second"] = round(self.pairs / logs["train_runtime"], 3)
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise FloatingPointError(
                    f"step {self.state.global_step}: {name} is {logs[name]}. "
                    "Lower --learning-rate, or go on from an earlier checkpoint"
                )
        super().log(logs, *args)

    # ---- checkpoints ----------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._identity is None:
            super()._save_checkpoint(model, trial)
            return
        output = Path(self._get_output_dir(trial=trial))
        folder = output / f"checkpoint-{self.state.global_step}"
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with self._writing(folder):
                super()._save_checkpoint(model, trial)
                if self._reference_moves:
                    reference.save(self.ref_model, folder, self.args.should_save)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    checkpoint.seal(folder, self._identity)
                    # Only now: whatever happens, one whole checkpoint is there.
                    checkpoint.prune(output, keep, self.state.best_model_checkpoint)
        finally:
            self.args.save_total_limit = keep

    def save_at_the_end(self) -> None:
        """The whole model and its tokenizer into the output folder, without the reference's adapter.

        Where parameters are sharded, the first process gathers them in its main memory.
        """
        peft_config = getattr(self.model, "peft_config", {})
        if "ref" in peft_config and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.model.delete_adapter("ref")
        folder = Path(str(self.args.output_dir))
        if self.is_fsdp_enabled:  # else nothing is saved where checkpoints are sharded
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        with self._writing(folder):
            self.save_model()
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if (folder / "ref" / "adapter_config.json").exists():
                    shutil.rmtree(folder / "ref")
                checkpoint.end(folder)

    @contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        """Mark a folder that is being written to, and say which one could not be."""
        try:
            if self.args.should_save:
                checkpoint.begin(folder)
            self.accelerator.wait_for_everyone()  # no process writes before the mark is there
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Of tokenizers it is an Exception itself. torch does not say that a disk is full.
            if type(error) is not Exception and not isinstance(error, _OF_WRITING):
                raise
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            free = f"{shutil.disk_usage(there).free / 2**20:,.0f} MiB are free there"
            raise OSError(f"{folder} cannot be written ({free}): {error}") from error


class _InBatches(Sampler[int]):
    """The batches of a data set in another order in each epoch, its last and smaller one last."""

    def __init__(self, pairs: int, size: int, seed: int, epoch: Callable[[], float]) -> None:
        self._pairs, self._size, self._seed, self._epoch = pairs, size, seed, epoch

    def __len__(self) -> int:
        return self._pairs

    def __iter__(self) -> Iterator[int]:
        whole = self._pairs // self._size
        # A function of seed and epoch alone: a run that goes on needs no state of an iterator.
        generator = torch.Generator().manual_seed(self._seed + int(self._epoch()))
        for number in torch.randperm(whole, generator=generator).tolist():
            yield from range(number * self._size, (number + 1) * self._size)
        yield from range(whole * self._size, self._pairs)


class _GoOn(TrainerCallback):
    """What a run that goes on from a checkpoint needs to log the same lines.

    A checkpoint ends an interval of logging; so what is saved has been found to be finite, too.
    """

    def __init__(self, trainer: PairTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)  # as this run was told, not the one before
        set_seed(args.seed)  # to have scored the reference, or to have found it, is no difference
        self._trainer.begun = state.global_step
        counts = [row["num_tokens"] for row in state.log_history if "num_tokens" in row]
        self._trainer._total_train_tokens = counts[-1] if counts else 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            control.should_log = True
