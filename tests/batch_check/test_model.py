"""What only a model shows, on one small enough to make anew; and that it is left as it was."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fastdpop
from fastdpop.batch_check import BatchReport, check_batch
from fastdpop.prefix.pack import pack
from tests.tiny_model import tiny_llama, tiny_tokenizer

PAIRS = [
    ("What is 2 + 3? ", "It is 5, of course.", "It is 6."),
    ("Name a colour of the sky. ", "Blue", "Green, as grass is"),
    ("Is a whale a fish? ", "No, it is a mammal.", "Yes, it is a fish."),
]


def batch(side: str = "right") -> dict[str, torch.Tensor]:
    """Chosen first, padded on one side."""
    tokenizer = tiny_tokenizer()
    texts = [
        (p, own + "<|end|>") for which in (1, 2) for p, own in ((x[0], x[which]) for x in PAIRS)
    ]
    sequences = [[tokenizer(text)["input_ids"] for text in pair] for pair in texts]
    width = max(len(prompt) + len(own) for prompt, own in sequences)
    shape = (len(sequences), width)
    ids, labels = torch.full(shape, 257), torch.full(shape, -100)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, (prompt, own) in enumerate(sequences):
        at = 0 if side == "right" else width - len(prompt) - len(own)
        end = at + len(prompt) + len(own)
        ids[row, at:end] = torch.tensor(prompt + own)
        labels[row, at + len(prompt) : end] = torch.tensor(own)
        mask[row, at:end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def check(model: Any, given: Any, ref_logps: Any = None, **options: Any) -> BatchReport:
    return check_batch(
        model, given, ref_logps, tokenizer=tiny_tokenizer(), verbose=False, **options
    )


def model(**options: Any) -> Any:
    return tiny_llama(initializer_range=0.3, **options)


def references(attached: Any, given: Any) -> torch.Tensor:
    with torch.no_grad():
        return fastdpop.attach(attached)(**given, return_logps=True).logps


# ---- hidden states and head ---------------------------------------------------------------------


def states(own: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What comes out of the first layer, goes into the final norm, and comes out of it."""
    seen = {}
    hook = own.model.norm.register_forward_pre_hook(lambda _, args: seen.update(before=args[0]))
    call = {name: given[name] for name in ("input_ids", "attention_mask")}
    out = own.model(**call, output_hidden_states=True)
    hook.remove()
    return {"first": out.hidden_states[1], "last": out.last_hidden_state, **seen}


def test_hidden_states() -> None:
    own, given = model(), batch()
    found = states(own, given)
    assert check(own, given, hidden=found["last"]).ok
    assert check(own, given, hidden=found["last"].bfloat16()).ok
    assert check(own, given, hidden=found["before"]).codes == ("hidden-before-norm",)
    assert "model.norm" in check(own, given, hidden=found["before"]).findings[0].message
    assert check(own, given, hidden=found["first"]).codes == ("hidden-of-other-layer",)
    assert "model.layers.0 " in check(own, given, hidden=found["first"]).findings[0].message
    assert check(own, given, hidden=found["last"].flip(0)).codes == ("hidden-differs",)
    later = found["last"].clone()
    later[1] = later[2]  # of pair 1
    assert check(own, given, hidden=later).codes == ("hidden-differs",)
    later[1, 0, 0] = torch.nan
    assert check(own, given, hidden=later).codes == ("hidden-not-finite",)


def test_the_head() -> None:
    own, given = model(tied=False), batch()
    assert check(own, given, weight=own.lm_head.weight).ok
    embedding = own.get_input_embeddings().weight
    report = check(own, given, weight=embedding)
    assert [(f.code, f.severity) for f in report.findings] == [("head-is-embedding", "error")]
    assert check(own, given, weight=torch.randn_like(embedding)).codes == ("head-differs",)
    tied = model()
    assert check(tied, given, weight=tied.get_input_embeddings().weight).ok


# ---- dropout, padding ---------------------------------------------------------------------------


def test_dropout() -> None:
    own, given = model(attention_dropout=0.2), batch()
    assert check(own, given).ok  # in evaluation mode there is none
    own.train()
    report = check(own, given)
    assert report.codes == ("dropout-on",)
    assert "model.layers.0.self_attn (0.2) and 1 other module" in report.findings[0].message
    little = tiny_llama(attention_dropout=0.1).train()  # of which log-probs take little notice
    assert check(little, given).codes == ("dropout-on",)
    assert check(model().train(), given).ok


def test_padding_on_the_left_of_absolute_positions() -> None:
    """GPT-2 counts padding as positions; rotary embeddings do not mind."""
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=258, initializer_range=0.3,
        eos_token_id=256, bos_token_id=None, pad_token_id=257,
    )  # fmt: skip
    own, given = GPT2LMHeadModel(config).eval(), batch("left")
    assert check(own, given).codes == ("padding-changes-logps",)
    places = (given["attention_mask"].cumsum(1) - 1).clamp_min(0)
    assert check(own, {**given, "position_ids": places}).ok
    assert check(own, batch()).ok
    assert check(model(), given).ok


def test_tokens_of_another_tokenizer() -> None:
    own, given = model(), batch()
    with torch.no_grad():
        own.lm_head.weight.mul_(20.0)  # very sure, and wrong
    assert check(own, given).codes == ("tokens-unlikely",)


# ---- layouts ------------------------------------------------------------------------------------


def test_all_layouts_have_the_same_references() -> None:
    """Of the model itself, to the last nat; a pair's two swapped are found in each."""
    own, given = model(), batch()
    ref = references(own, given)
    swapped = ref.view(2, -1).flip(0).flatten()
    kept = given["attention_mask"].bool()
    packed = {name: given[name][kept][None] for name in ("input_ids", "labels")}
    bounds = torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).long()
    plain = {name: given[name] for name in ("input_ids", "attention_mask")}
    trl = {**plain, "completion_mask": (given["labels"] != -100).long()}
    tokenizer = tiny_tokenizer()
    (tree,) = pack(
        *(
            [tokenizer(x[i] + ("<|end|>" if i else ""))["input_ids"] for x in PAIRS]
            for i in range(3)
        )
    )
    layouts: list[tuple[Any, dict[str, Any]]] = [
        (given, {}),
        (packed, {"cu_seqlens": bounds}),
        (trl, {}),
        (tree, {}),
        ({**plain, "shift_labels": given["labels"].roll(-1, 1)}, {}),
    ]
    for number, (laid_out, options) in enumerate(layouts):
        assert check(own, laid_out, ref, at_start=True, **options).ok, number
        assert check(own, laid_out, tuple(ref.chunk(2)), at_start=True, **options).ok, number
        assert not check(own, laid_out, swapped, at_start=True, **options).ok, number
    chosen, rejected = ref.chunk(2)
    columns = {"ref_chosen_logps": rejected, "ref_rejected_logps": chosen}
    assert not check(own, {**trl, **columns}, at_start=True).ok
    assert not check(own, {**given, "ref_logps": fastdpop.exact(swapped)}, at_start=True).ok


def test_pairs_without_a_side() -> None:
    """Their references stand beside those of whole pairs."""
    own, given = model(), batch()
    ref = references(own, given)
    pairs = torch.tensor([[0, 3], [1, -1], [2, 5]])
    chosen, rejected = ref[:3], torch.tensor([ref[3], 0.0, ref[5]], dtype=ref.dtype)
    assert check(own, given, (chosen, rejected), pairs=pairs, at_start=True).ok
    assert not check(own, given, (rejected, chosen), pairs=pairs, at_start=True).ok


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"input_ids": None}, {}, "expected input_ids among them"),
        ({"labels": None}, {}, "expected labels"),
        ({"labels": torch.zeros(6, 2)}, {}, "labels has shape (6, 2), expected (6, "),
        (
            {"attention_mask": torch.ones(6, 2)},
            {},
            "attention_mask has shape (6, 2), expected (6, ",
        ),
        ({}, {"pairs": [(0, 9)]}, "pairs contains 9, expected sequence indices in [0, 6) or -1"),
        ({}, {"ref_logps": torch.zeros(3)}, "ref_logps has shape (3,), expected (6,)"),
        (
            {},
            {"hidden": torch.zeros(6, 2, 4)},
            "hidden has shape (6, 2, 4) and dtype torch.float32, expected (6, ",
        ),
        (
            {},
            {"ref_logps": torch.zeros(6).long()},
            "ref_logps has dtype torch.int64, expected floating point",
        ),
        (
            {},
            {"ref_logps": torch.zeros(6).half()},
            "ref_logps has dtype torch.float16, in which it is rounded",
        ),
        (
            {},
            {"ref_logps": [torch.zeros(3).bfloat16()] * 2},
            "ref_logps[0] has dtype torch.bfloat16",
        ),
        ({"ref_chosen_logps": torch.zeros(3)}, {}, "batch has ref_chosen_logps alone of"),
        (
            {"input_ids": torch.zeros(6, 2)},
            {},
            "input_ids has shape (6, 2) and dtype torch.float32, expected (2B, T)",
        ),
        (
            {},
            {"cu_seqlens": torch.zeros(3)},
            "cu_seqlens has shape (3,) and dtype torch.float32, expected",
        ),
        ({}, {"max_pairs": True}, "max_pairs is True, expected a number of pairs"),
        ({}, {"weight": torch.zeros(2, 4)}, "weight has shape (2, 4), expected (258, 16)"),
        ({}, {"max_pairs": -1}, "max_pairs is -1, expected a number of pairs"),
    ],
)
def test_what_is_no_batch(changes: dict[str, Any], options: Any, message: str) -> None:
    given = {n: v for n, v in {**batch(), **changes}.items() if v is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        check(model(), given, **options)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"labels": batch()["labels"].numpy()}, {}, "labels is ndarray, expected a tensor (2B, T)"),
        ({"attention_mask": [[1]]}, {}, "attention_mask is list, expected a torch.Tensor"),
        ({"input_ids": batch()["input_ids"].to("meta")}, {}, "input_ids is on the meta device"),
        ({}, {"cu_seqlens": 3}, "cu_seqlens is int, expected a torch.Tensor"),
        ({}, {"weight": 3}, "weight is int, expected a torch.Tensor"),
        ({}, {"pairs": "x"}, "pairs is 'x', expected (P, 2) sequence indices"),
        ({}, {"at_start": "no"}, "at_start is 'no', expected True or False"),
        ({}, {"shift_labels": "no"}, "shift_labels is 'no', expected True or False"),
    ],
)
def test_what_is_no_tensor(changes: dict[str, Any], options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        check(model(), {**batch(), **changes}, **options)


@pytest.mark.parametrize("given", ["HuggingFaceTB/x", 3, GPT2LMHeadModel, torch.nn.Linear(1, 1)])
def test_what_is_no_model(given: Any) -> None:
    with pytest.raises(TypeError, match="expected a Hugging Face causal language model"):
        check(given, batch())


def test_what_is_no_tokenizer() -> None:
    with pytest.raises(TypeError, match="tokenizer is 'gpt2', expected a tokenizer"):
        check_batch(None, batch(), tokenizer="gpt2")


# ---- without a trace ----------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_as_it_was(attached: bool, training: bool) -> None:
    own, given = model(attention_dropout=0.1, tied=False), batch()
    ref = references(copy.deepcopy(own), given)
    if attached:
        fastdpop.attach(own)
    own.train(training)
    own.model.layers[0].eval()
    own(**{n: v[:2] for n, v in given.items()}).loss.backward()
    kept = copy.deepcopy(given)
    before = copy.deepcopy(own)
    gradients = [parameter.grad.clone() for parameter in own.parameters()]
    modes = [module.training for module in own.modules()]
    attributes = set(vars(own))
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in own.modules()]
    state = torch.get_rng_state()
    check(own, given, ref, hidden=states(before.eval(), given)["last"], weight=own.lm_head.weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in own.modules()] == modes
    assert set(vars(own)) == attributes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in own.modules()] == hooks
    assert fastdpop.is_attached(own) is attached
    for one, other, gradient in zip(own.parameters(), before.parameters(), gradients, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.grad, gradient)
    assert all(torch.equal(given[name], kept[name]) for name in given)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # asked for by peft
def test_adapters_and_wrappers() -> None:
    peft = pytest.importorskip("peft")
    own, given = model(), batch()
    ref = references(own, given)
    adapted = peft.get_peft_model(own, peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5))
    assert check(adapted.eval(), given, ref, at_start=True).ok
    fresh = check(adapted.train(), given, ref, at_start=True)
    assert fresh.codes == ("dropout-on",)
    assert "; it changes nothing yet" in fresh.findings[0].message
    adapted.eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert check(adapted, given, ref, at_start=True).codes == ("ref-stale",)
    assert check(adapted.train(), given).codes == ("dropout-on",)
    wrapper = torch.nn.Module()
    wrapper.module = own
    assert check(wrapper.eval(), given).ok


def test_what_cannot_run_is_said() -> None:
    given = batch()
    report = check(model().to("meta"), given)
    assert report.ok
    assert "not there yet" in report.facts[-1]
    assert check(None, given).ok
    assert check(model(), given, max_pairs=0).facts[-1] == "the model was not run: max_pairs is 0"
    one_sided = check(model(), given, pairs=[(0, -1), (-1, 4)])
    assert one_sided.facts[-1] == "the model was not run: there is no pair with both sides"


def test_bfloat16() -> None:
    own, given = model(), batch()
    ref = references(own, given)
    narrow = copy.deepcopy(own).bfloat16().requires_grad_(False)
    assert check(narrow, given, ref, at_start=True).ok
    assert "nats; 0 apart in the mean" in check(own, given, ref).facts[-1]
    wide = references(own, given).double()
    assert "nats; 0 apart in the mean" in check(own, given, wide).facts[-1]
