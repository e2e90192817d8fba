"""Estimates beside what was measured: on a CPU here, and on an H200 (bench/results/h200.json)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from bench import pairs as workloads
from bench.chip.setup import LLAMA_1B, Setup
from bench.memory import allocator_peak, peak_extra_bytes
from fastdpop.plan.hardware import GPUS, Cluster
from fastdpop.plan.heads import HEADS, Rows
from fastdpop.plan.memory import Job, Memory, Setting, bytes_of, memory_of, standing
from fastdpop.plan.model import Lora, Model
from fastdpop.plan.speed import step_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing"),  # asked for by peft
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable"),
]

WITHIN = 0.1
SEQUENCES, LENGTH = 4, 128
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "use_cache": False,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, sliding_window=64),
}
H200 = json.loads((Path(__file__).parents[2] / "bench/results/h200.json").read_text())


def whole(name: str, dtype: torch.dtype, lora: bool) -> Any:
    """A model with weights, an adapter of rank 8 on it where asked for."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).train()
    if lora:
        peft = pytest.importorskip("peft")
        peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
    return model


def planned(name: str, lora: bool) -> Model:
    return Model(CONFIGS[name], Lora(8) if lora else None)


def autocast(on: bool) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=on)


def mask() -> torch.Tensor:
    return torch.ones(SEQUENCES, 1, LENGTH, LENGTH, dtype=torch.bool)


def saved_bytes(call: Callable[[], Any], parameters: Any) -> tuple[int, Any]:
    """Storages that autograd saves while a call runs, without those of parameters."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return sum(found.values()), result


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    ("dtype", "cast", "lora"),
    [
        (torch.bfloat16, False, False),
        (torch.float32, False, False),
        (torch.float32, True, False),
        (torch.bfloat16, True, True),
    ],
    ids=["bf16", "fp32", "autocast", "lora"],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_activations_of_real_layers(
    name: str, dtype: torch.dtype, cast: bool, lora: bool, checkpointing: bool
) -> None:
    trunk = whole(name, dtype, lora).base_model
    if checkpointing:
        trunk.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in trunk.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids = torch.zeros(SEQUENCES, LENGTH, dtype=torch.long)

    def forward() -> torch.Tensor:
        with autocast(cast):
            hidden: torch.Tensor = trunk(input_ids=ids, attention_mask=mask())[0]
        return hidden

    def step() -> None:
        hidden = forward()
        hidden.backward(torch.zeros_like(hidden))

    step()  # whatever is made once
    found = planned(name, lora).traced(
        SEQUENCES, LENGTH, dtype=dtype, autocast=cast, checkpointing=checkpointing
    )
    assert found.peak == pytest.approx(allocator_peak(step)[0], rel=WITHIN)
    if not checkpointing:  # whose own hooks hide what it keeps
        saved, _ = saved_bytes(forward, trunk.parameters())
        assert found.saved == pytest.approx(saved, rel=WITHIN)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("precision", ["mixed", "bf16", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_memory_of_real_steps(name: str, precision: str, checkpointing: bool) -> None:
    """Weights, gradients, AdamW's states, activations and logits, in the second step."""
    lora = precision == "lora"
    cast = precision != "bf16"
    dtype = torch.float32 if precision == "mixed" else torch.bfloat16
    model = whole(name, dtype, lora)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False)
    ids = torch.zeros(SEQUENCES, LENGTH, dtype=torch.long)
    head = model.get_output_embeddings().weight

    def step() -> None:
        with autocast(cast):
            hidden = model.base_model(input_ids=ids, attention_mask=mask())[0].flatten(0, 1)
            # Nobody holds the logits but autograd, as in bench.contenders.upcast.
            loss = F.cross_entropy(F.linear(hidden, head).float(), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    states = [s for of in optimizer.state.values() for s in of.values()]
    always = sum(t.nbytes for t in {id(t): t for t in [*parameters, *states]}.values())
    measured = always + allocator_peak(step)[0]
    job = Job(
        planned(name, lora),
        Cluster(1, "H100", GPUS["H100"]),
        SEQUENCES // 2,
        LENGTH,
        LENGTH,
        precision="bf16" if precision == "bf16" else "mixed",
    )
    setting = Setting("one GPU", checkpointing=checkpointing, head="logits in float32")
    assert memory_of(job, setting).total == pytest.approx(measured, rel=WITHIN)
    parts = standing(job, setting)
    assert parts["weights"] + parts["optimizer"] == pytest.approx(always, rel=0.01)
    size = bytes_of(job, setting)
    counts = job.model.counts()
    assert counts.all == sum(p.numel() for p in {id(p): p for p in parameters}.values())
    assert counts.trained == sum(p.numel() for p in trained)
    assert size.gradient == trained[0].element_size()


def test_all_that_malloc_hands_out() -> None:
    """What PyTorch does not see is in it, such as Python's objects, a megabyte or two; so with larger layers."""
    larger = SIZES | {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 32}
    config = LlamaConfig(**larger)
    trunk = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train().base_model
    for parameter in trunk.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids = torch.zeros(4, 256, dtype=torch.long)

    def step() -> None:
        hidden = trunk(input_ids=ids, attention_mask=torch.ones(4, 1, 256, 256).bool())[0]
        hidden.backward(torch.zeros_like(hidden))

    step()
    found = Model(config).traced(4, 256)
    assert found.peak == pytest.approx(peak_extra_bytes(step, "cpu")[0], rel=WITHIN)


SIZES_OF_HEADS = {
    "Llama-3-8B": (4096, 128256),
    "Qwen3-8B": (4096, 151936),
    "Gemma-2-2B": (2304, 256000),
}
CONTENDERS = {
    "fastdpop triton": ("fastdpop", GPUS["H200"].memory / 16),
    "fastdpop triton in 512 MiB": ("fastdpop", 512 * 2**20),
    "gather, fp32 upcast": ("logits in float32", 0.0),
    "TRL, scored rows": ("TRL's chunks", 0.0),
    "Liger": ("Liger's chunks", 0.0),
}
STEPS = [
    row
    for row in H200["rows"]
    if row["kind"] == "step" and row["contender"] in CONTENDERS and row["mode"] != "log-probs only"
]


@pytest.mark.parametrize(
    "row", STEPS, ids=[f"{r['workload']}-{r['mode']}-{r['contender']}" for r in STEPS]
)
def test_heads_measured_on_an_h200(row: dict[str, Any]) -> None:
    name, workspace = CONTENDERS[row["contender"]]
    width, vocabulary = SIZES_OF_HEADS[row["workload"].split(", ")[0]]
    count = row["scored_rows"]
    trained = row["mode"] == "trained head"
    # Liger sees the prompts' 16 tokens, too; the logits of the other one were gathered.
    every = count + 16 * count // 512 if name.startswith("Liger") else count
    pair = 2 * 528
    rows = Rows(count, every, pair, vocabulary, width, trained, True, workspace)
    head = HEADS[name]
    assert head.memory(rows) == pytest.approx(row["peak_extra_bytes"], rel=0.03)
    if row["contender"] != "fastdpop triton in 512 MiB":  # more passes over dWeight
        seconds = head.seconds(rows, GPUS["H200"].peak)
        assert seconds == pytest.approx(row["seconds"], rel=0.2)


@pytest.fixture(scope="module")
def llama_1b() -> Model:
    return Model(LlamaConfig(**LLAMA_1B))


def estimated(model: Model, row: dict[str, Any]) -> tuple[Job, Setting, Memory]:
    pairs = workloads.WORKLOADS[row["workload"]](128256, Setup().copies[row["workload"]])
    scored = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    sequences = 2 * len(pairs)
    assert row["pairs"] == len(pairs)
    job = Job(
        model,
        Cluster(1, "H200", GPUS["H200"]),
        len(pairs),
        round(row["padded_tokens"] / sequences),
        round(scored / sequences),
        real=row["real_tokens"] / row["padded_tokens"],
        tree=row["tree_tokens"] / row["padded_tokens"],
        reference="live",
        precision="bf16",
    )
    setting = Setting("one GPU", shared="shared" in row["contender"])
    return job, setting, memory_of(job, setting)


SHARING = {f"{row['workload']}, {row['contender']}": row for row in H200["sharing"]}


@pytest.mark.parametrize("name", SHARING)
def test_steps_measured_on_an_h200(llama_1b: Model, name: str) -> None:
    """A model of 1.24 billion weights, a live reference, no optimizer; padded, and shared."""
    row = SHARING[name]
    job, setting, memory = estimated(llama_1b, row)
    own = ("gradients", "activations", "head", "gathered")
    extra = sum(memory.parts.get(part, 0.0) for part in own)
    assert extra == pytest.approx(row["peak_extra_bytes"], rel=0.03)
    step = step_of(job, setting)
    assert step.seconds - step.optimizer == pytest.approx(row["seconds"], rel=0.2)


def test_there_is_something_to_compare_with() -> None:
    assert len(STEPS) >= 27
    assert len(SHARING) == 6
