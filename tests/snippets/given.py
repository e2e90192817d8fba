"""What a page's text says exists before a block: a tiny model, a batch, its log-probs."""

from __future__ import annotations

import contextlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import fastdpop
from tests.snippets import files
from tests.tiny_model import CHATML, tiny_llama, tiny_tokenizer


class Given:
    """Two pairs, a policy, its reference, and all that a loop has of them; those of one comment fit together.

    Everything is made when it is asked for.
    """

    beta = 0.3
    lam = 50.0
    rank, n = 0, 1  # this process and the number of them
    switched_off = contextlib.nullcontext()

    def names(self, wanted: str) -> dict[str, Any]:
        """The values of names that are separated by commas.

        Raises:
            AttributeError: there is no such name.
        """
        found = {name: getattr(self, name) for name in map(str.strip, wanted.split(","))}
        return {**found, **found.pop("packed", {})}

    @cached_property
    def tokenizer(self) -> Any:
        return tiny_tokenizer(CHATML)

    @cached_property
    def model(self) -> Any:
        """A policy that has moved away from its reference; attached to nothing."""
        return AutoModelForCausalLM.from_pretrained(files.tiny())

    @cached_property
    def reference(self) -> Any:
        """Attached, frozen."""
        return fastdpop.attach(tiny_llama(tied=False)).requires_grad_(False)

    @cached_property
    def pairs(self) -> list[dict[str, list[int]]]:
        """Rows of token ids."""
        return [
            {
                f"{name}_ids": self.tokenizer(row[name] + ("<|end|>" if name != "prompt" else ""))[
                    "input_ids"
                ]
                for name in ("prompt", "chosen", "rejected")
            }
            for row in files.ROWS[:2]
        ]

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        return fastdpop.collate(self.pairs, self.tokenizer)

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        return [dict(self.batch) for _ in range(3)]

    @cached_property
    def input_ids(self) -> Tensor:
        return self.batch["input_ids"]

    @cached_property
    def attention_mask(self) -> Tensor:
        return self.batch["attention_mask"]

    @cached_property
    def labels(self) -> Tensor:
        return self.batch["labels"]

    @cached_property
    def weight(self) -> Tensor:
        """The lm_head's, (V, H)."""
        return self.model.lm_head.weight

    @cached_property
    def lm_head(self) -> Any:
        return self.model.lm_head

    @cached_property
    def hidden(self) -> Tensor:
        """(2B, T, H), of the policy."""
        return self.model.model(
            self.input_ids, attention_mask=self.attention_mask
        ).last_hidden_state

    @cached_property
    def ref_logps(self) -> Tensor:
        with torch.no_grad():
            return self.reference(**self.batch, return_logps=True).logps

    @cached_property
    def ref_chosen(self) -> Tensor:
        return self.ref_logps[: len(self.pairs)]

    @cached_property
    def ref_rejected(self) -> Tensor:
        return self.ref_logps[len(self.pairs) :]

    ids = property(lambda self: self.input_ids)
    mask = property(lambda self: self.attention_mask)
    hidden_of_own = property(lambda self: self.hidden)
    T = property(lambda self: self.labels.shape[1])

    @cached_property
    def packed(self) -> dict[str, Tensor]:
        """The batch without padding, under the names of its parts."""
        keep = self.mask.bool()
        lengths = keep.sum(1)
        return {
            "ids": self.ids[keep][None],
            "labels": self.labels[keep][None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
            "ref_logps": self.ref_logps,
        }

    @cached_property
    def mesh(self) -> Any:
        """Of this process alone; whoever runs a page destroys its group."""
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        return torch.distributed.init_device_mesh("cpu", (1, 1), mesh_dim_names=("tp", "cp"))

    @cached_property
    def confidences(self) -> Tensor:
        """One number a pair."""
        return torch.tensor([1.0, 0.25])

    weights = property(lambda self: self.confidences)

    @cached_property
    def loader(self) -> Any:
        """Batches with their references' log-probs."""
        return DataLoader([{**self.batch, "ref_logps": self.ref_logps}], batch_size=None)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    @cached_property
    def data(self) -> Any:
        """A dataset of text pairs, each with a number."""
        from datasets import Dataset

        return Dataset.from_list([{**row, "quality": 1.0} for row in files.ROWS])
