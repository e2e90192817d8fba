"""Everybody who turns a batch into a preference loss and its gradients, each at its best setting.

| contender | setting |
|---|---|
| bare products | one `torch.mm` a product on the scored rows, in the batch's dtype, into memory kept |
| | for it, each in the orientation that is fastest: 1, 2 or 3 products. The floor, not a loss |
| bare products, as written | `rows @ weight.T`, `logits @ weight`, `logits.T @ rows` |
| gather, fp32 upcast | scored rows, `F.linear`, `.float()`, one `F.cross_entropy`, autograd |
| gather, 16-bit logits | the same without `.float()`: less memory, and logits as the head rounds them |
| all positions | the same as the first, on prompts and padding too |
| F.linear_cross_entropy | scored rows, chunks of 512, `acc_policy="balanced"`: on CPUs 3 to 45 times as |
| | fast as its defaults |
| TRL, as called | its kernel with the arguments and outputs of `DPOTrainer`: on CPUs, all positions |
| TRL, scored rows | its kernel on scored rows, log-probs only, vocabulary tiles of 16,384 |
| Liger | `LigerFusedLinearDPOLoss(chunk_size=1)`: the least memory, and its default but for |
| | `compiled=False` |
| Liger, compiled | `chunk_size=4`: the fastest |
| fastdpop NAME | its engine NAME, in its default workspace; "fastdpop NAME in 512 MiB": in that one |

TRL and Liger have no DPOP. They run DPO, and fastdpop runs the same DPO beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.workloads import Batch, Loss
from fastdpop import engines, fused_logps, fused_preference_loss

Run = Callable[[Batch, str, Loss], Tensor]
"""``(batch, mode, loss) -> (2P,)`` log-probs; gradients are left in ``.grad``."""


@dataclass(frozen=True)
class Contender:
    """A way to get a loss.

    Attributes:
        losses: the losses it is run with, where a workload asks for them.
        needs: the package it comes from, if that is not torch.
        compiles: its first call compiles.
    """

    run: Run
    losses: tuple[str, ...] = ("dpop",)
    needs: str | None = None
    compiles: bool = False


class Floor:
    """The bare products of a batch."""

    def __init__(self, batch: Batch) -> None:
        self.rows, self.weight = batch.rows, batch.weight.detach()
        self.logits = self.rows.new_empty(len(self.weight), len(self.rows))
        self.hidden_gradient = torch.empty_like(self.rows)
        self.weight_gradient = torch.empty_like(self.weight)

    def run(self, mode: str) -> None:
        """1, 2 or 3 matrix products, with nothing between them, as fast as `torch.mm` gets."""
        torch.mm(self.weight, self.rows.T, out=self.logits)
        if mode != "log-probs only":
            torch.mm(self.logits.T, self.weight, out=self.hidden_gradient)
        if mode == "trained head":
            torch.mm(self.logits, self.rows, out=self.weight_gradient)

    @torch.no_grad()
    def run_as_written(self, mode: str) -> None:
        """The same products as a user writes them."""
        logits = self.rows @ self.weight.T
        if mode != "log-probs only":
            _ = logits @ self.weight
        if mode == "trained head":
            _ = logits.T @ self.rows


def _finish(batch: Batch, mode: str, loss: Loss, logps: Tensor) -> Tensor:
    """From ``(2P,)`` log-probs on, for contenders that stop there."""
    if mode != "log-probs only":
        loss.of_logps(logps, batch.ref_logps(loss)).backward()
    return logps.detach()


def of_rows(row_logps: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    """A contender that is given scored rows only: ``(hidden, weight, targets) -> logps``."""

    def run(batch: Batch, mode: str, loss: Loss) -> Tensor:
        sequences, at = (batch.labels[:, 1:] != -100).nonzero(as_tuple=True)
        logps = row_logps(
            batch.hidden[sequences, at], batch.weight, batch.labels[sequences, at + 1]
        )
        sums = logps.new_zeros(len(batch.labels), dtype=torch.float32)
        return _finish(batch, mode, loss, sums.index_add(0, sequences, logps.float()))

    return run


def upcast(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs ``(n,)`` of float32 logits, by cross-entropy."""
    return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def _sixteen_bits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")


def _fp32_throughout(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Rounds gradients to 16 bits once, at the end: what dWeight is compared with."""
    return upcast(hidden.float(), weight.float(), targets)


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512, acc_policy="balanced")
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def _all_positions(batch: Batch, mode: str, loss: Loss) -> Tensor:
    logits = F.linear(batch.hidden, batch.weight).float()[:, :-1]
    targets = batch.labels[:, 1:]
    logps = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return _finish(batch, mode, loss, logps.view_as(targets).sum(dim=1))


def _trl_as_called(batch: Batch, mode: str, loss: Loss) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    hidden, targets = batch.hidden[:, :-1], batch.labels[:, 1:]
    scored = targets != -100
    compact = _use_triton(hidden.device)
    logps = ChunkedLogProbFunction.apply(
        hidden[scored] if compact else hidden.reshape(-1, hidden.shape[-1]),
        batch.weight,
        None,
        targets[scored] if compact else targets.clamp(min=0).reshape(-1),
        1.0,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("log_probs", "entropy", "mean_logits", "is_top1"),
    )[0]
    if compact:
        logps = logps.new_zeros(scored.shape).masked_scatter(scored, logps)
    else:
        logps = logps.view(scored.shape).masked_fill(~scored, 0)
    return _finish(batch, mode, loss, logps.sum(dim=1))


def _trl_scored_rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, 16_384, None, 1.0, ("log_probs",)
    )[0]


def _liger(*, compiled: bool, chunk_size: int) -> Run:
    def run(batch: Batch, mode: str, loss: Loss) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        function = LigerFusedLinearDPOLoss(
            beta=loss.beta, compiled=compiled, use_ref_model=False, chunk_size=chunk_size
        )
        value, (chosen, rejected, *_) = function(
            batch.weight, batch.hidden[:, :-1], batch.labels[:, 1:]
        )
        if mode != "log-probs only":
            value.backward()
        return torch.cat([chosen, rejected]).detach()

    return run


def _fastdpop(engine: str, workspace_bytes: int | None = None) -> Run:
    options = {"engine": engine, "workspace_bytes": workspace_bytes}

    def run(batch: Batch, mode: str, loss: Loss) -> Tensor:
        if mode == "log-probs only":
            return fused_logps(batch.hidden, batch.weight, batch.labels, **options)
        out = fused_preference_loss(
            batch.hidden,
            batch.weight,
            batch.labels,
            loss=loss.fused(),
            ref_logps=batch.ref_logps(loss),
            **options,
        )
        out.loss.backward()
        return torch.cat([out.chosen_logps, out.rejected_logps])

    return run


FLOOR = "bare products"
FLOOR_AS_WRITTEN = "bare products, as written"

PEERS: dict[str, Contender] = {
    "gather, fp32 upcast": Contender(of_rows(upcast)),
    "gather, 16-bit logits": Contender(of_rows(_sixteen_bits)),
    "all positions": Contender(_all_positions),
    "F.linear_cross_entropy": Contender(of_rows(_linear_cross_entropy)),
    "TRL, as called": Contender(_trl_as_called, ("dpo",), "trl"),
    "TRL, scored rows": Contender(of_rows(_trl_scored_rows), ("dpo",), "trl"),
    "Liger": Contender(_liger(compiled=False, chunk_size=1), ("dpo",), "liger_kernel"),
    "Liger, compiled": Contender(
        _liger(compiled=True, chunk_size=4), ("dpo",), "liger_kernel", compiles=True
    ),
}

FP32_THROUGHOUT = "fp32 throughout"
OTHERS = {FP32_THROUGHOUT: Contender(of_rows(_fp32_throughout))}


def ours(device: str) -> list[str]:
    """fastdpop's engines on a device, the one that runs by default first."""
    return [f"fastdpop {name}" for name in engines.available(device, torch.bfloat16)]


def contender(name: str) -> Contender:
    if name.startswith("fastdpop "):
        engine, _, size = name.removeprefix("fastdpop ").partition(" in ")
        workspace_bytes = int(size.removesuffix(" MiB")) * 2**20 if size else None
        return Contender(_fastdpop(engine, workspace_bytes), ("dpop", "dpo"))
    return (PEERS | OTHERS)[name]
