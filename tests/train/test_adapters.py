"""``--model`` may hold an adapter: it is trained further, and its first state is the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

import peft
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny_model import tiny_llama, tiny_tokenizer
from tests.train.files import WARNINGS, Files

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """``model`` beside ``sft``, an adapter of it that changes what it says by far."""
    files = Files.make(tmp_path / "files")
    base = AutoModelForCausalLM.from_pretrained(files.folder / "model")
    torch.manual_seed(3)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(files.folder / "sft")
    tiny_tokenizer().save_pretrained(files.folder / "sft")
    return files


def mean_chosen_logps(files: Files, model: torch.nn.Module) -> float:
    """Of the six training pairs, from the model's own logits."""
    from tests.train.files import rows

    tokenizer, total = tiny_tokenizer(), 0.0
    for row in rows(6):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(row["chosen"] + "<|end|>")["input_ids"]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1)
        total += logps[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(prompt) - 1 :].sum().item()
    return total / 6


@pytest.mark.parametrize("flag", [(), ("--lora",)])
@pytest.mark.parametrize("reference", ["precomputed", "online"])
def test_an_adapter_is_trained_further(files: Files, flag: tuple[str, ...], reference: str) -> None:
    sft = files.folder / "sft"
    more = ("--model", str(sft), "--batch-pairs", "6", "--steps", "2", "--reference", reference)
    assert files.run(*more, *flag) == 0
    first, second = (row for row in files.metrics() if "loss" in row)
    base = AutoModelForCausalLM.from_pretrained(files.folder / "model")
    tuned = peft.PeftModel.from_pretrained(base, sft)
    assert first["logps/chosen"] == pytest.approx(mean_chosen_logps(files, tuned.eval()), rel=1e-5)
    with tuned.disable_adapter():
        bare = mean_chosen_logps(files, tuned)
    assert abs(bare - first["logps/chosen"]) > 0.1
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert second["rewards/margins"] != 0
    before, after = load_file(sft / WEIGHTS), load_file(files.out / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(before[k].shape == after[k].shape for k in before)
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_an_adapter_may_be_merged_first(files: Files) -> None:
    sft = files.folder / "sft"
    more = ("--model", str(sft), "--merge-adapter", "--batch-pairs", "6", "--steps", "1")
    assert files.run(*more) == 0
    base = AutoModelForCausalLM.from_pretrained(files.folder / "model")
    tuned = peft.PeftModel.from_pretrained(base, sft).merge_and_unload().eval()
    expected = mean_chosen_logps(files, tuned)
    for out, flags in ((None, ()), ("online", ("--reference", "online"))):
        folder = files.folder / out if out else None
        if out:
            assert files.run(*more, *flags, out=folder) == 0
        (row,) = (row for row in files.metrics(folder) if "loss" in row)
        assert row["logps/chosen"] == pytest.approx(expected, rel=1e-5)
        assert row["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert (files.out / "model.safetensors").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "IA3", "target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"peft_type": "LORA", "r": 2, "target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=["ia3", "embedding"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
def test_any_adapters_first_state_is_the_reference(files: Files, config: dict[str, Any]) -> None:
    """TRL copies LoRA's on linear layers alone."""
    tiny_llama(initializer_range=0.2, tied=False).save_pretrained(files.folder / "model")
    base = AutoModelForCausalLM.from_pretrained(files.folder / "model")
    model = peft.get_peft_model(base, peft.get_peft_config({"task_type": "CAUSAL_LM", **config}))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "ia3" in name or "lora" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.5)
    model.save_pretrained(files.folder / "other")
    tiny_tokenizer().save_pretrained(files.folder / "other")
    assert (
        files.run("--model", str(files.folder / "other"), "--batch-pairs", "6", "--steps", "1") == 0
    )
    (row,) = (row for row in files.metrics() if "loss" in row)
    assert row["logratios/chosen"] == row["logratios/rejected"] == 0.0
    assert not (files.out / "ref").exists()


def test_options_of_a_new_adapter_are_refused(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = str(files.folder / "sft")
    assert files.run("--model", sft, "--lora", "--lora-rank", "8") == 1
    assert f"--lora_r has no effect: {sft} holds an adapter" in capsys.readouterr().err


def test_a_new_adapter(files: Files) -> None:
    assert files.run("--lora", "--lora-rank", "2", "--bf16", "--epochs", "2") == 0
    assert (files.out / WEIGHTS).exists()
    assert [row["step"] for row in files.metrics() if "loss" in row] == list(range(1, 7))
    assert files.metrics()[0]["rewards/chosen"] == pytest.approx(0, abs=0.02)


def test_an_adapter_that_is_damaged(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    path = files.folder / "sft" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-8])
    assert files.run("--model", str(files.folder / "sft")) == 1
    assert f"{files.folder / 'sft'} cannot be loaded: " in capsys.readouterr().err
    (files.folder / "sft" / "adapter_config.json").write_text("{")
    assert files.run("--model", str(files.folder / "sft")) == 1
    assert "fastdpop: error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [("q_proj", {"q_proj"}), (r".*\.1\.mlp\..*_proj", {"gate_proj", "up_proj", "down_proj"})],
)
def test_modules_of_a_new_adapter(targets: str, adapted: set[str], files: Files) -> None:
    """A single name is no regular expression of whole names, as PEFT would take it to be."""
    assert files.run("--lora", "--lora-targets", targets, "--steps", "1") == 0
    assert {name.split(".")[-3] for name in files.weights()} == adapted
