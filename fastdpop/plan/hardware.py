"""GPUs, and what connects them."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, by its maker's figures.

    Attributes:
        memory: bytes, about as torch reports them.
        peak: dense bfloat16 operations a second, accumulated in float32.
        bandwidth: of its memory, bytes a second.
        link: to another GPU of its node, bytes a second in one direction.
    """

    memory: float
    peak: float
    bandwidth: float
    link: float


GPUS = {
    "H100": Gpu(79.1 * GIB, 989.4e12, 3.35e12, 450e9),
    "H200": Gpu(139.8 * GIB, 989.4e12, 4.8e12, 450e9),
    "A100-80GB": Gpu(79.1 * GIB, 312e12, 2.04e12, 300e9),
    "A100-40GB": Gpu(39.4 * GIB, 312e12, 1.555e12, 300e9),
    "B200": Gpu(178.4 * GIB, 2250e12, 8e12, 900e9),
    "L40S": Gpu(44.4 * GIB, 362e12, 0.864e12, 32e9),
    "RTX-4090": Gpu(23.5 * GIB, 165.2e12, 1.008e12, 32e9),
}
"""SXM where there is such a kind; the last two are connected by PCI Express 4."""

PER_NODE = 8
"""GPUs of a node."""

NETWORK = 50e9
"""Between nodes: bytes a second for each GPU in one direction, 400 Gbit/s InfiniBand."""


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes of 8.

    Attributes:
        gpus: how many.
        kind: its name.
        gpu: what each is.
        network: bytes a second for each GPU between nodes, in one direction.
    """

    gpus: int
    kind: str
    gpu: Gpu
    network: float = NETWORK

    @property
    def nodes(self) -> int:
        """How many."""
        return -(-self.gpus // PER_NODE)

    @property
    def in_node(self) -> int:
        """GPUs of a node."""
        return min(self.gpus, PER_NODE)


def parse(
    text: str,
    *,
    memory: float | None = None,
    peak: float | None = None,
    link: float | None = None,
    network: float = NETWORK,
) -> Cluster:
    """``8xH100``, or ``H100``; what is given takes the place of the kind's own figures.

    Raises:
        ValueError: it is none, or a kind that is not known and of which not all is given.
    """
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?([A-Za-z][\w .-]*)", text.strip(), re.IGNORECASE)
    expected = f"expected a number and a kind such as 8xH100, one of {', '.join(GPUS)}"
    if found is None or found[1] == "0":
        raise ValueError(f"--gpus is {text!r}, {expected}")
    count, name = int(found[1] or 1), found[2].strip().replace(" ", "-").upper()
    kinds = {kind.upper(): kind for kind in GPUS}
    if name in kinds:
        kind = kinds[name]
        base = GPUS[kind]
    elif memory is not None and peak is not None:
        kind, base = found[2].strip(), Gpu(memory, peak, GPUS["H100"].bandwidth, 32e9)
    else:
        raise ValueError(f"--gpus is {text!r}, {expected}; any other needs --gpu-memory and --peak")
    if count > PER_NODE and count % PER_NODE:
        raise ValueError(
            f"--gpus is {text!r}, expected at most {PER_NODE} GPUs, or whole nodes of {PER_NODE}"
        )
    gpu = Gpu(memory or base.memory, peak or base.peak, base.bandwidth, link or base.link)
    return Cluster(count, kind, gpu, network)
