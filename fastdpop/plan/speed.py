"""How long a training step takes, by the operations and the bytes in it.

Two rates were fitted to whole steps on an H200 (``bench/results/h200.md``, a training step with shared
prefixes: a model of 1.24 billion weights, 2,400 to 19,500 tokens): what the layers' products reach of
the peak rate, and what a layer costs whatever its size, as kernels are launched one by one. What is
between GPUs was not measured: its rates are those of the links, and shares of them that are assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdpop.plan.hardware import Cluster
from fastdpop.plan.heads import FORWARD_RATE, FORWARD_START, HEADS
from fastdpop.plan.memory import Job, Setting, bytes_of

LAYER_RATE = 0.48
"""Share of the peak rate that the products of layers reach, fitted."""

LAUNCHES = 0.85e-3
"""Seconds a layer takes to launch one forward pass; a backward pass counts as two. Fitted."""

COPY_RATE = 0.79
"""Share of the memory's bandwidth that copies reach, measured."""

LINK_RATE = 0.8
"""Share of a link's rate that collectives reach: assumed."""

HIDDEN = 0.9
"""Share of the communication of weights and gradients that can go on beside products: assumed."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends, within its node and, of those, to other nodes, and seconds."""

    node: float = 0.0
    network: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.node + other.node,
            self.network + other.network,
            self.seconds + other.seconds,
        )

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.node * times, self.network * times, self.seconds * times)


def gather(cluster: Cluster, size: float, ranks: int, within: int) -> Traffic:
    """All ranks of a group get all of `size` bytes, or reduce and scatter as many.

    Args:
        within: ranks of the group in a node. Data enter a node once, through the network links of
            these ranks, and reach each of them within it.
    """
    if ranks <= 1:
        return Traffic()
    nodes = -(-ranks // within)
    sent = size * (ranks - 1) / ranks
    crossing = size * (nodes - 1) / nodes / within
    inside = sent if within > 1 else 0.0
    seconds = max(inside / cluster.gpu.link, crossing / cluster.network) / LINK_RATE
    return Traffic(inside, crossing, seconds)


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        compute: seconds of products and launches, of all forward passes; head, optimizer: likewise.
        traffic: what a rank sends.
        exposed: seconds of it that nothing hides.
        flop: operations of a rank.
    """

    compute: float
    head: float
    optimizer: float
    traffic: Traffic
    exposed: float
    flop: float

    @property
    def seconds(self) -> float:
        """All together."""
        return self.compute + self.head + self.optimizer + self.exposed


def step_of(job: Job, setting: Setting) -> Step:
    """How long it takes.

    Raises:
        ValueError: the model's layers cannot be traced.
    """
    gpu, model = job.cluster.gpu, job.model
    traced, rows, head = job.traced(setting), job.rows(setting), HEADS[setting.head]
    passes = 3 + setting.checkpointing
    flop = traced.forward_flop + traced.backward_flop
    head_seconds = head.seconds(rows, gpu.peak)
    head_flop = head.flop(rows)
    if job.reference != "precomputed":
        passes += 1
        flop += traced.forward_flop
        products = 2 * rows.scored * rows.weights
        head_seconds += FORWARD_START + products / (FORWARD_RATE * gpu.peak)
        head_flop += products
    compute = flop / (LAYER_RATE * gpu.peak) + passes * model.depth * LAUNCHES
    counts, size = model.counts(setting.tp), bytes_of(job, setting)
    updated = counts.trained / setting.over("optimizer")
    # The optimizer reads a gradient, and reads and writes weights and states.
    optimizer = updated * (size.gradient + 2 * (size.weight + size.states))
    hidden, exposed = traffic_of(job, setting)
    times = job.accumulate
    beside = HIDDEN * hidden.seconds
    waiting = max(0.0, beside - times * compute) + (hidden.seconds - beside) + exposed.seconds
    return Step(
        compute=times * compute,
        head=times * head_seconds,
        optimizer=optimizer / (COPY_RATE * gpu.bandwidth),
        traffic=hidden + exposed,
        exposed=waiting,
        flop=times * (flop + head_flop),
    )


def scoring_seconds(job: Job, setting: Setting) -> float:
    """Of one forward pass's pairs under the reference, once, beforehand, without what waits for other
    GPUs.
    """
    traced, rows, peak = job.traced(setting), job.rows(setting), job.cluster.gpu.peak
    layers = traced.forward_flop / (LAYER_RATE * peak) + job.model.depth * LAUNCHES
    return layers + FORWARD_START + 2 * rows.scored * rows.weights / (FORWARD_RATE * peak)


def traffic_of(job: Job, setting: Setting) -> tuple[Traffic, Traffic]:
    """What a rank sends in one optimizer step: beside products, and while they wait."""
    cluster, counts = job.cluster, job.model.counts(setting.tp)
    size = bytes_of(job, setting)
    times, live = job.accumulate, job.reference != "precomputed"
    inside = max(1, min(cluster.in_node // setting.tp, setting.shards))
    weights = gather(cluster, size.gathered * counts.all, setting.shards, inside)
    gradients = gather(cluster, 2.0 * counts.trained, setting.shards, inside)
    hidden, exposed = Traffic(), Traffic()
    if setting.sharded == "weights":
        hidden += weights * (times * (1 + setting.reshard + live))
        hidden += gradients * times
    elif setting.sharded == "gradients":
        hidden += gradients * times
        exposed += gather(cluster, size.weight * counts.trained, setting.shards, inside)
    elif setting.sharded == "optimizer":
        hidden += gradients
        exposed += gather(cluster, size.weight * counts.trained, setting.shards, inside)
    if setting.replicas > 1:
        # An all-reduction is a reduction and a gathering; FSDP2 reduces in 16 bits.
        each = 2.0 if setting.sharded == "weights" else size.gradient
        own = each * counts.trained / setting.shards
        per_node = max(1, cluster.in_node // (setting.tp * inside))
        per_node = min(per_node, setting.replicas)
        hidden += gather(cluster, own, setting.replicas, per_node) * 2
    if setting.tp > 1:
        passes = 2 + setting.checkpointing + live
        tokens = 2 * job.pairs * job.length * (job.tree or 1.0 if setting.shared else 1.0)
        states = 2.0 * tokens * job.model.width
        reduced = gather(cluster, states, setting.tp, setting.tp) * 2
        exposed += reduced * (times * (counts.reduced * passes + 2))
    return hidden, exposed
