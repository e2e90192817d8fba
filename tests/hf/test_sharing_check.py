"""The comparison at the first shared call: it finds what is wrong, and leaves no trace."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from fastdpop import attach, detach
from fastdpop.hf import tree_attention
from fastdpop.hf.sharing_check import verdict_of
from tests.hf.test_sharing_refused import NO_EFFECT, batch, encoder, logps
from tests.models.shrink import build
from tests.tiny_models import SIZES, V, tiny

BF16 = torch.bfloat16
WRONG = "over a prefix tree differ from its own by .* leave out share_prefixes"


# ---- wrong numbers never come out ---------------------------------------------------------------


def attended(tree: Tensor) -> Tensor:
    """``(N, N)``: who sees whom."""
    end = tree[0, 0, 0]
    place = torch.arange(len(end))
    return (place <= place[:, None]) & (place[:, None] < end)


def branches_see_each_other(tree: Tensor) -> Tensor:
    return torch.ones(tree.shape[-1], tree.shape[-1], dtype=torch.bool).tril()


def next_branch_sees_the_last(tree: Tensor) -> Tensor:
    allowed, position = attended(tree), tree[0, 0, 1]
    for i in range(1, len(position)):
        if position[i] <= position[i - 1]:
            allowed[i, i - 1] = True
    return allowed


def an_ancestor_is_missing(tree: Tensor) -> Tensor:
    """The third token, for all that come after the first path."""
    allowed, (end, position) = attended(tree), tree[0, 0, :2]
    leaf = int((end == torch.arange(1, len(end) + 1)).nonzero()[0])
    allowed[leaf + 1 :, position == 2] &= (position[leaf + 1 :] == 2)[:, None]
    return allowed


def instead(mask: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor, tree: Tensor, **how: Any) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return nn.functional.scaled_dot_product_attention(
            query, key, value, mask(tree), scale=how["scale"]
        )

    return attention


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny(dtype=torch.float32),
    "phi": lambda: tiny("phi, bias", torch.float32),
    "mixtral": lambda: tiny("mixtral, router loss", torch.float32),
    "qwen3, small weights": lambda: build("qwen3"),
}


@pytest.mark.parametrize("how", ["float32", "bfloat16", "float16", "autocast"])
@pytest.mark.parametrize(
    "mask", [branches_see_each_other, next_branch_sees_the_last, an_ancestor_is_missing]
)
@pytest.mark.parametrize("name", MODELS)
def test_wrong_attention(
    name: str, mask: Callable[[Tensor], Tensor], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mask is an_ancestor_is_missing and "small" in name and how in ("bfloat16", "autocast"):
        pytest.skip("one token of the context means less to this model than rounding")
    torch.manual_seed(0)
    model = MODELS[name]()
    model = attach(model if how == "autocast" else model.to(getattr(torch, how)), check=False)
    with torch.autocast("cpu", BF16, enabled=how == "autocast"):
        right = instead(attended)
        monkeypatch.setattr(tree_attention, "tree_attention", instead(mask))
        for _ in range(2):  # the answer is not kept
            with pytest.raises(RuntimeError, match=WRONG):
                logps(model, batch(), True)
            assert model.config._attn_implementation == "sdpa"
            assert verdict_of(model) is None
        expected, _ = logps(model, batch(), False)
        monkeypatch.setattr(tree_attention, "tree_attention", right)
        found, said = logps(model, batch(), True)
    assert not said
    assert verdict_of(model).mode == "shared"
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0.1)


def blind(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **how: Any) -> Any:
    """Attention to all there is."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = nn.functional.scaled_dot_product_attention(query, key, value, scale=how.get("scaling"))
    return out.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_an_implementation_that_ignores_its_mask(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "blind_of_this_test"
    AttentionInterface.register(name, blind)
    monkeypatch.setattr(  # forgotten in the end
        AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping)
    )
    model = tiny(dtype=dtype)
    model.set_attn_implementation(name)
    expected, _ = logps(attach(model, check=False), batch(), False)
    found, said = logps(model, batch(), True)
    assert "'blind_of_this_test' is not one of transformers' own" in str(said[0])
    assert torch.equal(found, expected)
    assert model.config._attn_implementation == name


class CausalByItself(nn.Module):
    """In the place of a layer's attention: no mask is looked at."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.inner.head_dim)
        parts = (self.inner.q_proj, self.inner.k_proj, self.inner.v_proj)
        q, k, v = (part(hidden_states).view(shape).transpose(1, 2) for part in parts)
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.inner.o_proj(out.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("layers", [2, 6])
def test_a_layer_that_drops_the_tree(layers: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": layers, "initializer_range": 0.15})
    model: Any = LlamaForCausalLM(config).to(dtype).eval()
    model.model.layers[-1].self_attn = CausalByItself(model.model.layers[-1].self_attn)
    with pytest.raises(RuntimeError, match=WRONG):
        logps(attach(model), batch(), True)


# ---- no false alarms ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "gemma4_text", "gpt2", "opt"])
def test_rounding_is_no_difference(name: str, how: str) -> None:
    model = build(name)
    model = attach(model if how == "autocast" else model.to(getattr(torch, how)), check=False)
    with torch.autocast("cpu", BF16, enabled=how == "autocast"):
        _, said = logps(model, batch(), True)
    assert not said
    assert verdict_of(model).mode == "shared"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["float32", "bfloat16", "float16"])
def test_encoders_are_told_by_their_masks(how: str) -> None:
    """Their numbers may be too close: random ones hardly attend."""
    model = attach(encoder("bert").to(getattr(torch, how)), check=False)
    expected, _ = logps(model, batch(), False)
    found, said = logps(model, batch(), True)
    assert torch.equal(found, expected)
    assert "attend to more than what stands before a token" in said[0]


# ---- no trace -----------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its calls in buffers, in whatever mode."""

    count: Tensor
    renewed: Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("renewed", torch.zeros(3))

    def forward(self, hidden: Tensor) -> Tensor:
        self.count += 1
        self.renewed = self.renewed + 1
        return self.inner(hidden)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_the_check_leaves_no_trace() -> None:
    models: list[Any] = []
    for known in (False, True):
        model = tiny(dtype=torch.float32)
        models.append(model)
        model.model.layers[0].mlp = Counting(model.model.layers[0].mlp)
        attach(model, check=False)
        if known:
            logps(model, batch(), True)
            model.model.layers[0].mlp.load_state_dict(models[0].model.layers[0].mlp.state_dict())
    for model in models:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model.model.norm.eval()  # a mode of its own
        inputs = batch()
        torch.manual_seed(3)
        model(**inputs, return_logps=True, preference_options={"share_prefixes": True})
        counter = model.model.layers[0].mlp
        assert (counter.count.item(), counter.renewed.tolist()) == (1, [1.0] * 3)
        assert model.training
        assert model.model.layers[0].training
        assert not model.model.norm.training
        assert all(p.grad is None for p in model.parameters())
    first, second = (model.config.to_dict() for model in models)
    assert first == second
    with torch.random.fork_rng():
        torch.manual_seed(3)
        untouched = torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), untouched)


def test_what_the_model_itself_refuses_is_its_own_error() -> None:
    """And not a verdict on the model."""
    model, inputs = attach(tiny()), batch()
    inputs["input_ids"][:, 2] = V + 3
    for share in (False, True):
        with pytest.raises(ValueError, match=f"input_ids contains {V + 3}, expected ids in"):
            logps(model, inputs, share)
    assert model.config._attn_implementation == "sdpa"
    _, said = logps(model, batch(), True)
    assert not said
    assert verdict_of(model).mode == "shared"


def test_an_error_in_a_tree_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("mask has 4 dimensions, " + "which is too many " * 40)

    model = attach(tiny())
    expected, _ = logps(model, batch(), False)
    monkeypatch.setattr(tree_attention, "tree_attention", attention)
    found, said = logps(model, batch(), True)
    assert torch.equal(found, expected)
    assert len(said) == 1
    assert said[0].startswith(
        "share_prefixes has no effect, because LlamaForCausalLM cannot compute attention over a tree "
        "(AssertionError: mask has 4 dimensions, which is too many"
    )
    assert len(said[0]) < 340


def test_out_of_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory left")

    model = attach(tiny())
    with monkeypatch.context() as patch:
        patch.setattr(tree_attention, "tree_attention", attention)
        with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
            logps(model, batch(), True)
    assert model.config._attn_implementation == "sdpa"
    _, said = logps(model, batch(), True)
    assert not said
    assert verdict_of(model).mode == "shared"


# ---- side by side -------------------------------------------------------------------------------


class Summing(nn.Module):
    """A state that runs along the sequence: sums of what came before, from the start of a sequence on."""

    def __init__(self, honest: bool) -> None:
        super().__init__()
        self.honest = honest

    def forward(self, hidden: Tensor, seq_idx: Tensor | None) -> Tensor:
        sums = hidden.cumsum(1)
        if seq_idx is None or not self.honest:
            return sums
        first = torch.searchsorted(seq_idx[0], seq_idx[0])
        return sums - (sums - hidden)[:, first]


class LinearAttentionMixer(Summing):
    """Of a name that tells."""


class Toy(nn.Module):
    def __init__(self, honest: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, 16), nn.Linear(16, V, bias=False)
        self.mixer = LinearAttentionMixer(honest)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.mixer(self.embed(input_ids), seq_idx).tanh()))


TOY = "Toy has LinearAttentionMixer, whose state runs along the sequence"


def test_side_by_side() -> None:
    torch.manual_seed(0)
    model = attach(Toy(honest=True).double())
    inputs = batch(right=3)
    expected, _ = logps(model, inputs, False)
    found, said = logps(model, inputs, True)
    _, silence = logps(model, inputs, True)
    assert said == [f"share_prefixes only leaves out padding and shares nothing, because {TOY}"]
    assert not silence
    assert verdict_of(model).mode == "packed"
    torch.testing.assert_close(found, expected)
    widths: list[torch.Size] = []
    model.mixer.register_forward_hook(lambda _, args, out: widths.append(out.shape))
    logps(model, inputs, True)
    assert widths == [(1, 4 * 24 - 3, 16)]


def test_side_by_side_where_sequences_do_not_stay_apart() -> None:
    torch.manual_seed(0)
    model, inputs = attach(Toy(honest=False).double()), batch(right=3)
    expected, _ = logps(model, inputs, False)
    found, said = logps(model, inputs, True)
    assert said == [NO_EFFECT.format(TOY)]
    assert verdict_of(model).mode == "padded"
    assert torch.equal(found, expected)


# ---- models come and go -------------------------------------------------------------------------


def test_two_first_calls_at_once() -> None:
    model, inputs = attach(tiny(), share_prefixes=True), batch()
    expected, _ = logps(model, inputs, False)
    found: list[Tensor] = []
    start = threading.Barrier(2)

    def run() -> None:
        start.wait()
        found.append(model(**inputs, return_logps=True).logps.detach())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for one in found:
        torch.testing.assert_close(one, expected)


def test_a_verdict_keeps_no_model() -> None:
    model, inputs = attach(tiny()), batch()
    logps(model, inputs, True)
    del inputs["labels"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**inputs, labels=inputs["input_ids"], return_logps=True)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_copy_finds_out_for_itself() -> None:
    model = attach(tiny())
    expected, _ = logps(model, batch(), True)
    twin = copy.deepcopy(model)
    assert verdict_of(twin) is None
    assert twin.config._attn_implementation == "sdpa"
    detach(model)
    found, said = logps(twin, batch(), True)
    assert not said
    assert verdict_of(twin).mode == "shared"
    assert torch.equal(found, expected)
    assert model.config._attn_implementation == "sdpa"
