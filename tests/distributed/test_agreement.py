"""What goes wrong on one rank is an error on all of them, at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastdpop import fused_preference_loss, losses
from tests.distributed.pool import Pool
from tests.distributed.worlds import World


def _message(call: Any) -> str:
    with pytest.raises((RuntimeError, ValueError, TypeError)) as raised:
        call()
    return str(raised.value)


def _different(rank: int) -> None:
    """Each of these differs on rank 1."""
    world, group = World.of(2), dist.group.WORLD
    odd = rank == 1
    cases: dict[str, Any] = {
        "loss": lambda: world.run(losses.get("dpop", lam=5.0) if odd else "dpop", group=group),
        "reduction": lambda: world.run("dpop", group=group, reduction="sum" if odd else "mean"),
        "kl True": lambda: world.run(
            "kto", group=group, **({"kl": torch.tensor(0.5)} if odd else {})
        ),
        "check_finite": lambda: world.run("dpop", group=group, check_finite=odd),
        "gradients": lambda: world.run("dpop", group=group, trained=not odd),
        "statistics": lambda: world.run(
            "dpop", group=group, statistics=("entropy",) if odd else ()
        ),
        "Softcap|softcap": lambda: world.run("dpop", group=group, softcap=3.0 if odd else None),
        "lm_head": lambda: (world.tokens(slice(0, 50)) if False else _narrow(world, odd)).run(
            "dpop", group=group
        ),
        "sequences in pairs": lambda: world.run(
            "dpop", cp_group=group, pairs=[[0, 2], [1, 3]] if odd else [[1, 3], [0, 2]]
        ),
    }
    import re

    for what, call in cases.items():
        said = _message(call)
        assert "were given different things" in said, said
        assert "rank 0: " in said
        assert "rank 1: " in said
        assert re.search(what, said), said


def _narrow(world: World, odd: bool) -> World:
    if not odd:
        return world
    return replace(world, hidden=world.hidden[..., :20], weight=world.weight[:, :20])


def test_different_settings(two: Pool) -> None:
    two.run(_different)


def _failing(rank: int) -> None:
    """Rank 1's own arguments are wrong; rank 0's are not."""
    group = dist.group.WORLD
    for argument in ("group", "cp_group", "tp_group"):
        world = World.of(2)
        if rank == 1:
            world.labels[0, 3] = 10_000
        said = _message(lambda argument=argument, w=world: w.run("dpop", **{argument: group}))
        expected = "labels contain 10000" if rank == 1 else f"rank 1 of {argument} raised an error"
        assert expected in said, said
        name = "no such loss" if rank == 1 else "dpop"
        said = _message(lambda argument=argument, n=name: World.of(2).run(n, **{argument: group}))
        assert ("no such loss" if rank == 1 else f"rank 1 of {argument}") in said, said


def test_an_error_on_one_rank(two: Pool) -> None:
    two.run(_failing)


def _wrong_arguments(rank: int) -> None:
    """Whatever is wrong on rank 1, rank 0 hears of it."""
    world = World.of(2)
    ref = world.ref_logps
    states = {"reference": False, "ref_hidden": world.hidden}
    wrong: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "ref_logps has shape": ({}, {"ref": ref[:3]}),
        "ref_logps has dtype torch.bfloat16": ({}, {"ref": ref.bfloat16()}),
        "ref_logps is int": ({}, {"ref": 3}),
        "needs a reference": ({}, {"reference": False}),
        "ref_hidden has shape": (states, {**states, "ref_hidden": world.hidden[:, :3]}),
        "ref_hidden has dtype": (states, {**states, "ref_hidden": world.hidden.long()}),
        "ref_weight has": (states, {**states, "ref_weight": world.weight[:9]}),
        "grad_reduction is 'avg'": ({}, {"grad_reduction": "avg"}),
        "sequence_parallel is 'yes'": ({}, {"sequence_parallel": "yes"}),
        "engine is": ({}, {"engine": "none"}),
        "workspace_bytes is": ({}, {"workspace_bytes": -1}),
        "statistics contains": ({}, {"statistics": ("median",)}),
        "reduction is": ({}, {"reduction": "max"}),
        "vocab_size is": ({}, {"vocab_size": "5"}),
        "check_finite is": ({}, {"check_finite": 1}),
        "softcap": ({}, {"softcap": -1.0}),
    }
    for argument in ("group", "cp_group", "tp_group"):
        for what, given in wrong.items():
            own = dict(given[rank])
            part = replace(world, ref_logps=own.pop("ref", ref))
            own[argument] = dist.group.WORLD
            said = _message(lambda part=part, own=own: part.run("dpop", **own))
            expected = what if rank == 1 else f"rank 1 of {argument} raised an error"
            assert expected in said, (argument, what, said)
    both = {"reference": False, "ref_hidden": world.hidden} if rank == 1 else {}
    said = _message(lambda: world.run("dpop", cp_group=dist.group.WORLD, **both))
    assert "reference hidden states through" in said, said
    for tokens in (54, 1_000):  # more than there are, on all ranks
        own = world.tokens(slice(27 * rank, 27 + 26 * rank))
        said = _message(
            lambda own=own, n=tokens: own.run("dpop", tp_group=dist.group.WORLD, vocab_size=n)
        )
        assert f"vocab_size is {tokens}, expected a number of tokens from 1 to 53" in said, said
    said = _message(lambda: world.run("dpop", tp_group=dist.group.WORLD, vocab_size=50 + rank))
    assert "vocab_size 50" in said, said


def test_wrong_arguments_on_one_rank(two: Pool) -> None:
    two.run(_wrong_arguments)


def _failing_of_four(rank: int) -> None:
    """Who has nothing to do with the failing rank hears of it through others."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    world = World.of(2)
    if rank == 3:
        world.labels[0, 3] = 10_000
    said = _message(lambda: world.run("dpop", group=mesh["dp"], cp_group=mesh["cp"]))
    assert ("labels contain" if rank == 3 else "raised an error before the loss") in said, said
    assert torch.isfinite(World.of(2).run("dpop", group=mesh["dp"], cp_group=mesh["cp"])[0].loss)


def test_an_error_on_one_of_four(four: Pool) -> None:
    four.run(_failing_of_four)


def _twice(rank: int) -> None:
    with pytest.raises(ValueError, match="are not all different"):
        World.of(2).run("dpop", group=dist.group.WORLD, cp_group=dist.group.WORLD)


def test_one_group_for_two_purposes(two: Pool) -> None:
    two.run(_twice)


def _nobody(rank: int) -> None:
    said = _message(lambda: World.of(2).pairs([]).run("dpop", group=dist.group.WORLD))
    assert said == "the batch holds 0 pairs on every rank of group, expected at least one"


def test_no_pairs_anywhere(two: Pool) -> None:
    two.run(_nobody)


def test_arguments() -> None:
    world = World.of(2)
    for given, message in (
        ({"grad_reduction": "max"}, "grad_reduction is 'max', expected one of"),
        ({"sequence_parallel": True}, "sequence_parallel is set without tp_group"),
        ({"sequence_parallel": 1}, "sequence_parallel is 1, expected True or False"),
        ({"vocab_size": 54}, "vocab_size is 54, expected a number of tokens from 1 to 53"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"group": "dp"}, "group is 'dp', expected a process group"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            world.run("dpop", **given)


def test_a_padded_vocabulary() -> None:
    """Rows beyond the vocabulary take no part, and get no gradient."""
    world, tokens = World.of(2, bias=True), 50
    world.labels[world.labels >= tokens] = 1
    out, found = world.run("dpop", vocab_size=tokens)
    expected, gradients = world.tokens(slice(0, tokens)).run("dpop")
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(found[0], gradients[0])
    for ours, theirs in zip(found[1:], gradients[1:], strict=True):
        assert torch.equal(ours[:tokens], theirs)
        assert not ours[tokens:].any()
    world.labels[0, 5] = tokens
    with pytest.raises(ValueError, match=r"expected token ids in \[0, 50\)"):
        fused_preference_loss(
            world.hidden, world.weight, world.labels, ref_logps=world.ref_logps, vocab_size=tokens,
            bias=world.bias, shift_labels=False,
        )  # fmt: skip
