"""Problems of attention over trees, and the same numbers from separate sequences."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpop.prefix.attention import tree_attention
from fastdpop.prefix.tree import PrefixTree, build_tree

LETTERS = 3


@dataclass
class Attending:
    """Inputs of one call: leaves, in the dtype and the layout asked for."""

    tree: PrefixTree
    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    window: int | None
    softcap: float | None
    scale: float

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x in (self.query, self.key, self.value, self.sinks) if isinstance(x, Tensor)]

    @property
    def table(self) -> Tensor:
        rows = [self.tree.end, self.tree.position_ids]
        if self.window is not None:
            rows.append(torch.full_like(self.tree.end, self.window))
        return torch.stack(rows)[None, None]

    def shared(self, how: str = "auto") -> Tensor:
        return tree_attention(
            self.query,
            self.key,
            self.value,
            self.table,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            how=how,
        )

    def in_float64(self) -> Attending:
        def wide(tensor: Tensor) -> Tensor:
            return tensor.detach().double().requires_grad_()

        sinks = None if self.sinks is None else wide(self.sinks)
        return Attending(
            self.tree,
            wide(self.query),
            wide(self.key),
            wide(self.value),
            sinks,
            self.window,
            self.softcap,
            self.scale,
        )

    def separate(self) -> Tensor:
        """Every sequence by itself; where several meet, the output of the first."""
        out = torch.zeros_like(self.query[..., :1]).repeat(1, 1, 1, self.value.shape[3])
        seen = torch.zeros(self.query.shape[2], dtype=torch.bool)
        tree = self.tree
        for first, last in zip(tree.offsets[:-1], tree.offsets[1:], strict=True):
            nodes = tree.nodes[first:last]
            new = ~seen[nodes]
            found = self._sequence(nodes)[:, :, new]
            out = out.index_put(
                (torch.tensor(0), slice_of(out.shape[1]), nodes[new][None, :]), found[0]
            )
            seen[nodes] = True
        return out

    def _sequence(self, nodes: Tensor) -> Tensor:
        groups = self.query.shape[1] // self.key.shape[1]
        query = self.query[:, :, nodes]
        key, value = (x[:, :, nodes].repeat_interleave(groups, 1) for x in (self.key, self.value))
        scores = query @ key.transpose(2, 3) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        distance = torch.arange(len(nodes))[:, None] - torch.arange(len(nodes))
        visible = distance >= 0
        if self.window is not None:
            visible &= distance < self.window
        scores = scores.masked_fill(~visible, -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.view(1, -1, 1, 1).expand(-1, -1, len(nodes), -1)
            scores = torch.cat([scores, sinks], dim=3)
        return scores.softmax(3)[..., : len(nodes)] @ value


def slice_of(size: int) -> Tensor:
    return torch.arange(size)[:, None]


def sequences(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Sequences with common prefixes, one of which is another's prefix, and two of which are equal."""
    chance = random.Random(seed)
    found: list[list[int]] = []
    for _ in range(count):
        start = chance.choice(found) if found and chance.random() < 0.8 else []
        kept = chance.randrange(len(start) + 1)
        own = [chance.randrange(LETTERS) for _ in range(chance.randrange(1, longest))]
        found.append(start[:kept] + own)
    return [*found, found[0], found[-1][: 1 + len(found[-1]) // 2]]


def attending(
    of: Sequence[Sequence[int]],
    *,
    heads: tuple[int, int] = (4, 2),
    sizes: tuple[int, int] = (8, 8),
    dtype: torch.dtype = torch.float64,
    sinks: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    by_token: bool = True,
    least: int = 1,
) -> Attending:
    """A problem; with ``by_token`` its tensors are ``(1, N, H, D)`` transposed, as models give them."""
    tree = build_tree(of, least)
    n = len(tree.end)

    def new(heads: int, size: int) -> Tensor:
        if by_token:
            return torch.randn(1, n, heads, size).to(dtype).transpose(1, 2).requires_grad_()
        return torch.randn(1, heads, n, size).to(dtype).requires_grad_()

    return Attending(
        tree,
        new(heads[0], sizes[0]),
        new(heads[1], sizes[0]),
        new(heads[1], sizes[1]),
        torch.randn(heads[0]).to(dtype).requires_grad_() if sinks else None,
        window,
        softcap,
        sizes[0] ** -0.5,
    )


def gradients(problem: Attending, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, problem.inputs, dout)


def assert_as_separate(problem: Attending, how: str, tolerance: float) -> None:
    """Output and all gradients against separate sequences in float64."""
    out = problem.shared(how)
    dout = torch.randn_like(out)
    exact = problem.in_float64()
    want = exact.separate()
    assert out.dtype == problem.query.dtype
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    for got, expected, given in zip(
        gradients(problem, out, dout),
        gradients(exact, want, dout.double()),
        problem.inputs,
        strict=True,
    ):
        assert got.dtype == given.dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
