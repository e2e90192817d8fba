"""What a rank holds in a training step, moment by moment.

Three moments can be the fullest: the head's, when the forward pass has ended; the first layer's of the
backward pass, when all that was saved is still there; and the last one's, when all gradients are. What
only one of them has is not added to the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from fastdpop.plan.hardware import GIB, Cluster
from fastdpop.plan.heads import HEADS, Rows
from fastdpop.plan.model import Model
from fastdpop.plan.trace import Traced

DEEPSPEED_BUCKETS = 4 * 500_000_000
"""Two buckets of 16-bit gradients, as ZeRO-1 and 2 keep them by default (overlap_comm)."""

DEEPSPEED_LIVE = 2 * 1_000_000_000
"""Gathered 16-bit weights that ZeRO-3 keeps by default (stage3_max_live_parameters)."""

REFERENCES = ("precomputed", "live", "adapter")
PRECISIONS = ("mixed", "bf16")

SHARDED = ("nothing", "optimizer", "gradients", "weights")
"""What each rank has only a part of; each includes those before it."""


@dataclass(frozen=True)
class Setting:
    """A way to divide the work.

    Attributes:
        name: what it is called.
        sharded: one of :data:`SHARDED`, over `shards` ranks; each shard is held by `replicas` ranks.
        tp: tensor-parallel ranks, which see one batch together.
        deepspeed: it is DeepSpeed's; if not, torch's.
        reshard: gathered weights are freed after a layer's forward pass.
        checkpointing: each layer keeps its input only.
        shared: prefixes are shared.
        head: one of :data:`~fastdpop.plan.heads.HEADS`.
    """

    name: str
    sharded: str = "nothing"
    shards: int = 1
    replicas: int = 1
    tp: int = 1
    deepspeed: bool = False
    reshard: bool = True
    checkpointing: bool = False
    shared: bool = False
    head: str = "fastdpop"

    @property
    def data_ranks(self) -> int:
        """Ranks that see different pairs."""
        return self.shards * self.replicas

    def over(self, what: str) -> int:
        """Among how many ranks gradients, say, are divided."""
        return self.shards if SHARDED.index(self.sharded) >= SHARDED.index(what) else 1


@dataclass
class Job:
    """What is trained, on what.

    Attributes:
        model: on the meta device.
        cluster: the GPUs.
        pairs: in one forward pass of a data-parallel rank.
        length: tokens of a sequence, prompt and completion, as padded.
        completion: of them, those that are scored, on average.
        real: share of the padded tokens that are no padding.
        tree: tokens of the tree over padded tokens, or None without sharing.
        reference: one of :data:`REFERENCES`.
        precision: "mixed": float32 weights, gradients and AdamW states that are trained, products and
            all that is frozen in bfloat16; "bf16": all of it in bfloat16.
        accumulate: forward passes in one step.
        reserve: bytes that are not there for tensors.
    """

    model: Model
    cluster: Cluster
    pairs: int
    length: int
    completion: int
    real: float = 1.0
    tree: float | None = None
    reference: str = "precomputed"
    precision: str = "mixed"
    accumulate: int = 1
    reserve: float = 4 * GIB
    _traced: dict[tuple[object, ...], Traced] = field(default_factory=dict, repr=False)

    def with_pairs(self, pairs: int) -> Job:
        """The same with another number of pairs: what was traced grows with them."""
        grown = {key: traced * (pairs / self.pairs) for key, traced in self._traced.items()}
        return replace(self, pairs=pairs, _traced=grown)

    @property
    def room(self) -> float:
        """Bytes of a GPU that tensors can have."""
        return self.cluster.gpu.memory - self.reserve

    def traced(self, setting: Setting) -> Traced:
        """The layers' pass in a setting; of a shared batch, as many sequences as its tree has tokens
        for.

        Raises:
            ValueError: the model's layers cannot be traced.
        """
        # FSDP and DeepSpeed have 16-bit weights and no autocast; what an adapter adds to has both.
        cast = self.model.lora is not None
        replicated = setting.sharded == "nothing" and not setting.deepspeed and setting.tp == 1
        float32 = replicated and self.precision == "mixed" and not cast
        key = (float32, setting.checkpointing, setting.shared, setting.tp)
        share = self.tree if setting.shared and self.tree is not None else 1.0
        sequences = max(1, round(2 * self.pairs * share))
        if key not in self._traced:
            self._traced[key] = self.model.traced(
                sequences,
                self.length,
                dtype=torch.float32 if float32 else torch.bfloat16,
                mask=not setting.shared,
                autocast=cast or float32,
                checkpointing=setting.checkpointing,
                tp=setting.tp,
            )
        return self._traced[key] * (2 * self.pairs * share / sequences)

    def rows(self, setting: Setting) -> Rows:
        """What goes through the head."""
        model = self.model
        sequences = 2 * self.pairs
        return Rows(
            scored=sequences * self.completion,
            all=sequences * self.length,
            pair=2 * self.length,
            vocabulary=-(-model.vocabulary // setting.tp),
            width=model.width,
            trained=model.counts().head_trained,
            copied=self.precision == "bf16" or setting.deepspeed or setting.sharded != "nothing",
            workspace=max(512 * 2**20, self.cluster.gpu.memory / 16),
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at its fullest moment, by what they are for.

    Attributes:
        moment: "head", "backward" or "gradients".
        parts: bytes by name.
    """

    moment: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True)
class Bytes:
    """Bytes a number: of trained weights, their gradients and their optimizer's states, of frozen
    weights, and of the copies that products take.
    """

    weight: int
    gradient: int
    states: int
    frozen: int = 2
    gathered: int = 2


def bytes_of(job: Job, setting: Setting) -> Bytes:
    """In a setting. DeepSpeed keeps float32 weights among its optimizer's states."""
    if setting.deepspeed:
        return Bytes(2, 2, 12)
    return Bytes(2, 2, 4) if job.precision == "bf16" else Bytes(4, 4, 8)


def standing(job: Job, setting: Setting) -> dict[str, float]:
    """What a rank holds all the time: weights, the optimizer's states, the reference, buckets."""
    counts, size = job.model.counts(setting.tp), bytes_of(job, setting)
    frozen = counts.all - counts.trained
    weights = setting.over("weights")
    parts = {
        "weights": (frozen * size.frozen + counts.trained * size.weight) / weights,
        "optimizer": counts.trained * size.states / setting.over("optimizer"),
        "reference": counts.all * size.frozen / weights if job.reference == "live" else 0.0,
        "buffers": 0.0,
    }
    if setting.deepspeed and setting.sharded != "weights":
        parts["buffers"] = min(DEEPSPEED_BUCKETS, 4.0 * counts.trained)
    elif not setting.deepspeed and setting.replicas > 1 and setting.sharded == "nothing":
        parts["buffers"] = float(counts.trained * size.gradient)  # DDP's buckets
    return parts


def gathered(job: Job, setting: Setting) -> tuple[float, float, float]:
    """Bytes of whole weights and gradients that a rank has for a while where it owns shards: at the
    head, in the first layer's backward pass, and in the last one's.

    As accelerate divides a model for FSDP2: a layer each, the embedding, and the last norm with the head.
    A layer's weights are gathered into a buffer and copied out while those of the layer before are
    still in use; its gradients are copied into a buffer that is then reduced.
    """
    counts, size = job.model.counts(setting.tp), bytes_of(job, setting)
    if setting.sharded != "weights":
        return 0.0, 0.0, 0.0
    layer, head = size.gathered * counts.layer, float(size.gathered * counts.head)
    if setting.deepspeed:
        live = min(DEEPSPEED_LIVE, size.gathered * counts.all)
        return float(live), float(live), float(live)
    gradients = 2 * size.gathered * counts.layer_trained
    embedding = 2.0 * size.gathered * counts.embedding if counts.head_trained else 0.0
    backward = 3.0 * layer + gradients
    if job.model.tied:
        # One matrix at both ends is gathered, and its gradient whole, from one to the other.
        backward += head + embedding / 2
    if setting.reshard:
        return head, backward, max(backward, embedding)
    layers = size.gathered * counts.layers
    return layers + head, layers + gradients, max(backward, embedding)


def memory_of(job: Job, setting: Setting) -> Memory:
    """What a rank holds at its fullest moment.

    Raises:
        ValueError: the model's layers cannot be traced.
    """
    counts, size = job.model.counts(setting.tp), bytes_of(job, setting)
    traced, rows = job.traced(setting), job.rows(setting)
    always = standing(job, setting)
    whole = counts.trained * size.gradient / setting.over("gradients")
    before = whole if job.accumulate > 1 else 0.0
    of_head = counts.head * size.gradient / setting.over("gradients") if rows.trained else 0.0
    layers = 1 if setting.checkpointing else job.model.depth
    working = traced.peak - traced.saved + (0 if setting.checkpointing else traced.saved / layers)
    at_head, first, last = gathered(job, setting)
    moments = {
        "head": {
            "gradients": before,
            "activations": traced.at_head,
            "head": HEADS[setting.head].memory(rows),
            "gathered": at_head,
        },
        "backward": {
            "gradients": max(before, of_head),
            "activations": traced.peak,
            "gathered": first,
        },
        "gradients": {"gradients": whole, "activations": working, "gathered": last},
    }
    fullest = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory(fullest, always | moments[fullest])
