"""FSDP2: whatever group the head is in, loss and gradients are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

pytest.importorskip("transformers")

import fastdpop
from fastdpop.hf import attach
from tests.displacing import NAMES
from tests.distributed.pool import Pool
from tests.distributed.sharded_models import (
    LAYOUTS,
    assert_gradients,
    assert_loss,
    expected,
    model,
    own_batch,
    references,
    shard,
)
from tests.tiny_models import DPOP


def _gathers() -> tuple[list[str], Any]:
    """The groups that are gathered from now on, and how to stop noting them."""
    import torch.distributed.fsdp._fully_shard._fsdp_param_group as groups

    noted, own = [], groups.foreach_all_gather

    def gather(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        noted.extend(p._param_fqn for p in parameters)
        return own(parameters, *args, **kwargs)

    groups.foreach_all_gather = gather
    return noted, lambda: setattr(groups, "foreach_all_gather", own)


def _layouts(rank: int, name: str, layouts: tuple[str, ...]) -> None:
    given = {**own_batch(rank), "preference": DPOP, "ref_logps": references(rank)}
    losses, gradients = expected(model(name))
    with torch.no_grad():
        logps = attach(model(name))(**own_batch(rank), return_logps=True).logps
    for number, layout in enumerate(layouts):
        whole = model(name)
        if number % 2:
            attach(whole)
        sharded = shard(whole, layout, tied="tied" in name)
        attach(sharded)  # the second time it has no effect
        with torch.no_grad():
            assert torch.equal(sharded(**own_batch(rank), return_logps=True).logps, logps), layout
            assert_loss(sharded(**given).loss, losses[rank], layout)
        freed = layout.endswith("freed") and not layout.startswith("root")
        assert not freed or hasattr(sharded.lm_head.weight, "placements"), layout
        noted, stop = _gathers()
        out = sharded(**given)
        stop()
        # Once; what is not freed is there still.
        head = "model.embed_tokens.weight" if "tied" in name else "lm_head.weight"
        assert noted.count(head) == int(layout.endswith("freed")), layout
        assert_loss(out.loss, losses[rank], layout)
        out.loss.backward()
        assert_gradients(sharded, gradients, layout)
        assert hasattr(sharded.lm_head.weight, "placements"), layout
        # The weight is kept for backward, which comes behind that of another forward.
        options = {"preference_options": {"reduction": "none"}}
        both = [sharded(**given, **options).loss.mean() for _ in range(2)]
        sum(both).backward()
        assert_gradients(sharded, gradients, f"{layout}, two forwards", times=2.0)
        with pytest.raises(ValueError, match="ref_logps has shape"):
            sharded(**own_batch(rank), preference=DPOP, ref_logps=torch.zeros(3))
        assert not freed or hasattr(sharded.lm_head.weight, "placements"), layout
        sharded(**given).loss.backward()
        assert_gradients(sharded, gradients, f"{layout}, after an error")


def test_layouts(two: Pool) -> None:
    two.run(_layouts, "llama", LAYOUTS)


def test_a_tied_head(two: Pool) -> None:
    two.run(_layouts, "llama, tied", ("root", "tail", "tail, freed"))


def test_other_heads(two: Pool) -> None:
    two.run(_layouts, "phi, bias", ("root", "head, freed"))
    two.run(_layouts, "gemma2, softcap", ("root",))


ASKED = {"statistics": ["displacement"]}
WEIGHTS = torch.tensor([1.000001, 0.3])  # bfloat16 has neither


def _mixed_precision(rank: int) -> None:
    """As accelerate sets it: arguments and outputs are cast to bfloat16."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16
    )
    inputs = own_batch(rank)
    rounded = attach(model())
    for parameter in rounded.parameters():  # and no buffers
        parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        own = rounded(**inputs, return_logps=True).logps
    for layout in ("root", "tail", "head, freed"):
        sharded = shard(attach(model()), layout, mp_policy=policy)
        with torch.no_grad():
            logps = sharded(**inputs, return_logps=True).logps
        # The head's products and sums are float32's, and nothing rounds them afterwards.
        assert torch.equal(logps, own), layout
        out = sharded(
            **inputs,
            preference=DPOP,
            ref_logps=fastdpop.exact(logps),
            preference_options={**ASKED, "pair_values": {"weight": fastdpop.exact(WEIGHTS)}},
        )
        assert torch.equal(out.logps, logps), layout  # policy == reference
        assert torch.equal(out.losses, torch.tensor(2.0).log() * WEIGHTS[: len(out.losses)]), layout
        monitored = rounded(**inputs, preference="sft", preference_options=ASKED)
        for name in NAMES:
            assert torch.equal(getattr(out, name), getattr(monitored, name)), (layout, name)
        for name in ("loss", "losses", "chosen_logps", "rejected_logps", "margins", "penalty"):
            assert getattr(out, name).dtype == torch.float32, (layout, name)
        out.loss.backward()
        rounded.zero_grad()
        plain = {"preference_options": {"pair_values": {"weight": WEIGHTS}}}
        rounded(**inputs, preference=DPOP, ref_logps=own, **plain).loss.backward()
        for name, parameter in sharded.named_parameters():
            found, want = parameter.grad.full_tensor(), rounded.get_parameter(name).grad.float()
            dist.all_reduce(want)
            want /= dist.get_world_size()
            assert (found - want).abs().max() <= 2e-2 * want.abs().max(), (layout, name)
        with pytest.raises(
            ValueError, match=r"ref_logps has dtype torch\.bfloat16.*fastdpop\.exact"
        ):
            sharded(**inputs, preference=DPOP, ref_logps=logps)


def test_mixed_precision(two: Pool) -> None:
    two.run(_mixed_precision)


def _accumulated(rank: int) -> None:
    """Two micro-batches, the first of which is not exchanged."""
    given = {**own_batch(rank), "preference": DPOP, "ref_logps": references(rank)}
    _, gradients = expected(model())
    for layout in ("root", "tail", "head, freed"):
        sharded = shard(attach(model()), layout)
        for synchronized in (False, True):
            sharded.set_requires_gradient_sync(synchronized)
            sharded(**given).loss.backward()
        assert_gradients(sharded, gradients, layout, times=2.0)


def test_gradient_accumulation(two: Pool) -> None:
    two.run(_accumulated)


def _uneven(rank: int) -> dict[str, Any]:
    """One pair in the first process, two in the others."""
    given = {**own_batch(rank), "ref_logps": references(rank)}
    rows = slice(None) if rank else slice(None, None, 2)
    return {name: value[rows] for name, value in given.items()} | {"preference": DPOP}


def _joined(rank: int) -> None:
    """Log-probs for a loss of one's own, and a batch that is one over all processes."""
    one, size = attach(model()), dist.get_world_size()
    losses = [one(**_uneven(r), preference_options={"reduction": "sum"}).loss for r in range(size)]
    loss = sum(losses) / (2 * size - 1)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in one.named_parameters()}
    one.zero_grad()
    for r in range(size):
        (one(**own_batch(r), return_logps=True).logps.sum() / size).backward()
    of_logps = {n: p.grad for n, p in one.named_parameters()}
    for layout in ("root", "tail", "head, freed"):
        sharded = shard(attach(model(), group=dist.group.WORLD), layout)
        out = sharded(**_uneven(rank))
        assert_loss(out.loss, loss.item(), layout)  # the same everywhere
        out.loss.backward()
        assert_gradients(sharded, gradients, f"joined, {layout}")
        sharded(**own_batch(rank), return_logps=True).logps.sum().backward()
        assert_gradients(sharded, of_logps, f"log-probs, {layout}")


def test_joined_batches(two: Pool) -> None:
    two.run(_joined)


def _hybrid(rank: int) -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    given = {**own_batch(rank), "preference": DPOP, "ref_logps": references(rank)}
    losses, gradients = expected(model())
    for layout in ("root", "tail", "head, freed"):
        sharded = shard(attach(model()), layout, mesh=mesh)
        out = sharded(**given)
        assert_loss(out.loss, losses[rank], layout)
        out.loss.backward()
        assert_gradients(sharded, gradients, f"HSDP, {layout}")


def test_hybrid_sharding(four: Pool) -> None:
    four.run(_hybrid)


def _live_reference(rank: int) -> None:
    """A reference that is sharded too, without gradients but in no ``torch.no_grad``."""
    inputs = own_batch(rank)
    for layout in ("tail", "head, freed"):
        policy = shard(attach(model()), layout)
        reference = shard(attach(model().requires_grad_(False)), layout)
        for _ in range(2):
            logps = reference(**inputs, return_logps=True).logps
            assert not logps.requires_grad
            if layout == "head, freed":
                assert hasattr(reference.lm_head.weight, "placements")
            out = policy(**inputs, preference=DPOP, ref_logps=logps)
            assert torch.equal(out.logps, logps), layout
            assert out.loss.item() == torch.tensor(2.0).log().item(), layout
            out.loss.backward()
            assert all(p.grad is not None for p in policy.parameters()), layout


def test_a_live_reference(two: Pool) -> None:
    two.run(_live_reference)


class _Reading(torch.nn.Module):
    """A head that reads a weight and does not call the module that has it."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> torch.nn.Parameter:
        return self.inner.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, self.inner.weight)


def _refused(rank: int) -> None:
    """What FSDP shards, outside of its forward."""
    sharded = shard(attach(model()), "head, freed")
    hidden, labels = torch.randn(2, 4, 32), torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weight is a DTensor \(97, 32\).*tp_group="):
        fastdpop.fused_logps(hidden, sharded.lm_head.weight, labels)
    whole = model()
    whole.lm_head = _Reading(whole.lm_head)
    fully_shard(attach(whole).lm_head.inner)
    with pytest.raises(RuntimeError, match="is read where FSDP has not gathered it"):
        fully_shard(whole)(**own_batch(rank), return_logps=True)
    seen = []
    sharded.lm_head.register_forward_hook(lambda head, *_: seen.append(head.weight), prepend=True)
    with torch.no_grad():
        sharded(input_ids=own_batch(rank)["input_ids"])
    with pytest.raises(RuntimeError, match=r"weight \(97, 32\) has no storage any more"):
        fastdpop.fused_logps(hidden, seen[0], labels)


def test_refused(two: Pool) -> None:
    two.run(_refused)
