"""What CUDA's FlashAttention is asked for, with plain torch in its place: same arguments, same contract."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpop.prefix import varlen
from fastdpop.prefix.chunks import Problem
from fastdpop.prefix.plan import plan
from tests.prefix.attending import Attending, assert_as_separate, attending, sequences
from tests.prefix.test_attention import DEGENERATE


def scores_of(
    query: Tensor, key: Tensor, causal: bool, scale: float, left: int, right: int
) -> Tensor:
    """``(H, n, m)`` of one sequence, ``(tokens, heads, D)``, as FlashAttention 2 defines them: masks
    are aligned with the last query and the last key.
    """
    scores = torch.einsum("qhd,khd->hqk", query, of_queries(key, query)) * scale
    n, m = scores.shape[1:]
    distance = torch.arange(n)[:, None] + (m - n) - torch.arange(m)
    hidden = torch.zeros(n, m, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if causal or right >= 0:
        hidden |= distance < (0 if causal else -right)
    return scores.masked_fill(hidden, -torch.inf)


def of_queries(keys: Tensor, query: Tensor) -> Tensor:
    return keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)


class Stand:
    """In the place of ``torch.ops.aten``: its FlashAttention for sequences of different lengths."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _check(self, query: Tensor, key: Tensor, value: Tensor, rest: tuple[Any, ...]) -> None:
        cu_queries, cu_keys, most_queries, most_keys, dropout, causal, _ = rest
        assert query.shape[2] == key.shape[2] == value.shape[2]
        assert query.shape[2] % 8 == 0
        for tensor, bounds, most in (
            (query, cu_queries, most_queries),
            (key, cu_keys, most_keys),
            (value, cu_keys, most_keys),
        ):
            assert tensor.dim() == 3
            assert tensor.stride(-1) == 1
            assert bounds.dtype == torch.int32
            assert bounds[0] == 0
            assert bounds[-1] == len(tensor)
            assert bounds.diff().max() <= most
        assert (cu_keys.diff() >= cu_queries.diff()).all()
        assert dropout == 0
        assert causal is True
        assert most_queries > 1  # else lse is laid out otherwise

    def _sequences(
        self, inputs: tuple[Tensor, Tensor, Tensor], cu_queries: Tensor, cu_keys: Tensor
    ) -> Iterator[tuple[Tensor, ...]]:
        query, key, value = inputs
        spans = zip(cu_queries[:-1], cu_queries[1:], cu_keys[:-1], cu_keys[1:], strict=True)
        for a, b, c, d in spans:
            yield query[a:b], key[c:d], value[c:d]

    def _flash_attention_forward(
        self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, scale: float, **window: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        self.calls.append("forward")
        self._check(query, key, value, rest)
        outs, norms = [], []
        for q, k, v in self._sequences((query, key, value), *rest[:2]):
            scores = scores_of(q, k, rest[5], scale, *edges(**window))
            norms.append(scores.logsumexp(-1))
            weights = scores.softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, of_queries(v, q)))
        lse = torch.cat(norms, dim=1)
        return torch.cat(outs), lse, lse.new_empty(2), lse.new_empty(()), lse.new_empty(0)

    def _flash_attention_backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *rest: Any,
        scale: float,
        **window: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From the given out and lse, as the kernel does, so that sinks count."""
        self.calls.append("backward")
        *rest_, state, _ = rest
        assert state.dtype == torch.uint64
        self._check(query, key, value, (*rest_, None))
        assert dout.shape == out.shape == query.shape
        assert lse.shape == (query.shape[1], len(query))
        assert lse.is_contiguous()  # the kernel reads it without strides
        found, start = [], 0
        for q, k, v in self._sequences((query, key, value), *rest[:2]):
            span = slice(start, start + len(q))
            scores = scores_of(q, k, rest[5], scale, *edges(**window))
            weights = (scores - lse[:, span, None]).exp()
            dvalue = torch.einsum("hqk,qhd->khd", weights, dout[span])
            dweights = torch.einsum("qhd,khd->hqk", dout[span], of_queries(v, q))
            rows = torch.einsum("qhd,qhd->hq", dout[span], out[span])
            dscores = weights * (dweights - rows[..., None]) * scale
            dquery = torch.einsum("hqk,khd->qhd", dscores, of_queries(k, q))
            dkey = torch.einsum("hqk,qhd->khd", dscores, q)
            groups = (k.shape[1], -1)
            found.append((dquery, *(x.unflatten(1, groups).sum(2) for x in (dkey, dvalue))))
            start = span.stop
        first, second, third = (torch.cat(x) for x in zip(*found, strict=True))
        return first, second, third


def edges(window_size_left: int = -1, window_size_right: int = -1) -> tuple[int, int]:
    return window_size_left, window_size_right


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    found = Stand()
    ops = SimpleNamespace(aten=found)
    monkeypatch.setattr(varlen, "torch", _torch_with(ops))
    monkeypatch.setattr(varlen, "supports", lambda problem: problem.softcap is None)
    return found


def _torch_with(ops: SimpleNamespace) -> Any:
    """torch with other operators, which are read-only themselves."""

    class Module:
        def __getattr__(self, name: str) -> Any:
            return ops if name == "ops" else getattr(torch, name)

    return Module()


@pytest.mark.parametrize("how", ["auto", "segments"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": (2, 2)},
        {"sizes": (12, 5)},
        {"sizes": (5, 12)},
        {"sinks": True},
        {"window": 6},
        {"window": 1, "sinks": True},
        {"by_token": False},
    ],
    ids=str,
)
def test_as_separate_sequences(options: dict[str, Any], how: str, stand: Stand) -> None:
    assert_as_separate(attending(sequences(7, 30), **options), how, 1e-5)
    assert stand.calls == ["forward", "backward"]


@pytest.mark.parametrize("name", [name for name in DEGENERATE if name != "no token"])
def test_degenerate_trees(name: str, stand: Stand) -> None:
    assert_as_separate(attending(DEGENERATE[name], window=3), "auto", 1e-5)
    assert stand.calls == ["forward", "backward"]


@pytest.mark.parametrize("how", ["masked", "plain"])
def test_asked_for_otherwise(how: str, stand: Stand) -> None:
    attending(sequences(3, 10)).shared(how)
    assert stand.calls == []


def test_lengths() -> None:
    problem = attending([[0, 1, 2, 3], [0, 1, 4], [5, 6], [5, 7]])
    found = plan(problem.table.numpy().tobytes(), 2, "segments", 1)
    lengths = varlen.lengths(found, torch.device("cpu"))
    assert lengths.keys.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 5, 6, 5, 7]
    (call,) = lengths.calls
    assert call.cu_queries.tolist() == [0, 2, 4, 5, 6, 7, 8]
    assert call.cu_keys.tolist() == [0, 2, 6, 9, 10, 12, 14]
    assert call[4:] == (2, 4)
    places, bounds = lengths.copies
    assert bounds.tolist() == [0, 3, 6, 7, 8, 9, 12, 13, 14]
    assert lengths.keys[places].tolist() == [0] * 3 + [1] * 3 + [2, 3, 4] + [5] * 3 + [6, 7]
    assert varlen.lengths(found, torch.device("cpu")) is lengths


def test_more_sequences_than_a_grid_has_columns(stand: Stand) -> None:
    """CUDA launches no grid of more than 65,535 columns: the runs are computed in several calls."""
    problem = attending([[0, i] for i in range(1, 66_001)], heads=(1, 1), sizes=(8, 8))
    found = plan(problem.table.numpy().tobytes(), 2, "segments", 1)
    assert len(found.chunks) == 66_001
    lengths = varlen.lengths(found, torch.device("cpu"))
    assert max(len(call.cu_queries) - 1 for call in lengths.calls) == 1_024
    assert sum(len(call.cu_queries) - 1 for call in lengths.calls) == 66_001
    assert lengths.calls[0].most_keys == 2
    assert lengths.calls[-1].queries == slice(64 * 1_024, 66_001)
    assert lengths.calls[-1].keys == slice(2 * 64 * 1_024 - 1, 2 * 66_001 - 1)


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("options", [{"heads": (4, 2)}, {"window": 4, "sinks": True}], ids=str)
def test_in_several_calls(
    options: dict[str, Any], most: int, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "_MOST", most)
    problem = attending(sequences(7, 30, seed=most), **options)
    assert_as_separate(problem, "auto", 1e-5)
    found = plan(problem.table.numpy().tobytes(), problem.table.shape[2], "segments", 1)
    calls = -(-len(found.chunks) // most)
    assert calls > 2
    assert stand.calls == ["forward"] * calls + ["backward"] * calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_are_added_in_fp32(dtype: torch.dtype) -> None:
    """A key's many copies: added in 16 bits, their gradients would be lost."""
    problem = attending([[0, i] for i in range(400)], dtype=dtype, heads=(2, 2), sizes=(8, 8))
    found = plan(problem.table.numpy().tobytes(), 2, "segments", 1)
    lengths = varlen.lengths(found, torch.device("cpu"))
    gradient = torch.full((len(lengths.keys), 2, 8), 1.0, dtype=dtype)
    gradient[lengths.copies.places[0]] = 1024.0
    total = varlen._summed(gradient, problem.key, lengths.copies)
    assert total.shape == problem.key.shape
    assert total.dtype == dtype
    assert (total[0, :, 0] == torch.tensor(1024.0 + 400.0).to(dtype)).all()
    assert (total[0, :, 1:] == 1).all()


def problem_of(example: Attending) -> Problem:
    return Problem(
        example.query, example.key, example.value, example.sinks, example.scale, example.softcap
    )


def test_never_on_a_cpu() -> None:
    assert not varlen.supports(problem_of(attending([[0, 1]], dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "softcap", "want"),
    [
        ((9, 0), torch.bfloat16, 256, None, True),
        ((8, 0), torch.float16, 64, None, True),
        ((8, 9), torch.bfloat16, 192, None, True),
        ((8, 9), torch.bfloat16, 200, None, False),
        ((12, 0), torch.bfloat16, 256, None, False),
        ((12, 0), torch.bfloat16, 128, None, True),
        ((9, 0), torch.bfloat16, 264, None, False),
        ((9, 0), torch.float32, 64, None, False),
        ((9, 0), torch.bfloat16, 64, 50.0, False),
        ((7, 5), torch.float16, 64, None, False),
    ],
)
def test_what_it_supports(
    capability: tuple[int, int],
    dtype: torch.dtype,
    size: int,
    softcap: float | None,
    want: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    meta = SimpleNamespace(
        device=torch.device("cuda", 0), dtype=dtype, shape=torch.Size((1, 2, 4, size))
    )
    problem = Problem(meta, meta, meta, None, 1.0, softcap)  # type: ignore[arg-type]
    assert varlen.supports(problem) is want
    meta.shape = torch.Size((1, 2, 0, size))
    assert not varlen.supports(problem)
    meta.shape = torch.Size((1, 2, 4, size))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not varlen.supports(problem)
