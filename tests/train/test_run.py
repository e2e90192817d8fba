"""``fastdpop train``, end to end on a tiny model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fastdpop.cli import main
from fastdpop.train.trainer import PairTrainer
from tests.tiny_model import tiny_llama
from tests.train.files import WARNINGS, Files, rows, write

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files.make(tmp_path / "files")


def test_a_run_from_a_file_to_a_model(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    test = files.folder / "test.jsonl"
    assert files.run("--eval-pairs", str(test), "--eval-every", "2") == 0
    said = capsys.readouterr().out
    assert "train.jsonl: 6 pairs" in said
    assert "test.jsonl: 3 pairs" in said
    assert "3 steps in" in said
    assert "after 0 steps" in said
    assert "after 3 steps" in said
    assert f"Saved to {files.out}" in said
    evaluated = [row for row in files.metrics() if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 2, 3]
    assert evaluated[0]["eval_logratios/chosen"] == 0.0  # the policy is the reference
    assert evaluated[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert evaluated[-1]["eval_logratios/chosen"] != 0.0
    assert [row["step"] for row in files.metrics() if "loss" in row] == [1, 2, 3]
    assert set(files.metrics()[1]) >= {"penalty", "rewards/chosen", "logps/rejected", "grad_norm"}
    saved = AutoModelForCausalLM.from_pretrained(files.out)
    start = tiny_llama(initializer_range=0.2)
    assert not torch.equal(saved.lm_head.weight, start.lm_head.weight)


def test_every_pair_is_trained_on_once(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven pairs in batches of two, two batches in a step: the last step has three pairs."""
    write(files.folder / "train.jsonl", rows(7))
    seen: list[list[int]] = []
    own = PairTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        half = len(inputs["input_ids"]) // 2
        if model.training:  # and not after the last step
            seen.extend(inputs["input_ids"][:half].tolist())
        return own(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PairTrainer, "compute_loss", compute_loss)
    assert files.run("--accumulate", "2", "--epochs", "1") == 0
    assert [row["step"] for row in files.metrics() if "loss" in row] == [1, 2]
    firsts = sorted(bytes(i for i in ids if i < 256)[:3] for ids in seen)
    assert len(firsts) == 7
    assert len({tuple(ids) for ids in map(tuple, seen)}) == 7


def test_a_step_is_the_mean_over_its_pairs(files: Files) -> None:
    """Three pairs in batches of two and one: the step of one batch of three."""
    write(files.folder / "train.jsonl", rows(3))
    apart = files.folder / "apart"
    assert files.run("--batch-pairs", "3", "--steps", "2") == 0
    assert files.run("--batch-pairs", "2", "--accumulate", "2", "--steps", "2", out=apart) == 0
    assert files.losses(apart) == pytest.approx(files.losses(), rel=2e-5)
    for name, weight in files.weights().items():
        torch.testing.assert_close(files.weights(apart)[name], weight, rtol=1e-4, atol=1e-5)
    for name in ("rewards/chosen", "logps/rejected", "rewards/accuracies"):
        both = [[r[name] for r in files.metrics(out) if "loss" in r] for out in (None, apart)]
        assert both[1] == pytest.approx(both[0], rel=1e-4, abs=1e-5)


def test_held_out_pairs_count_alike(files: Files) -> None:
    """Three held-out pairs, in one batch of three or in batches of two and one."""
    test = ("--eval-pairs", str(files.folder / "test.jsonl"), "--steps", "1")
    apart = files.folder / "apart"
    assert files.run(*test, "--per_device_eval_batch_size", "3") == 0
    assert files.run(*test, "--per_device_eval_batch_size", "2", out=apart) == 0
    one, two = (
        files.metrics(out)[-2 if "train_loss" in files.metrics(out)[-1] else -1]
        for out in (None, apart)
    )
    names = [
        name
        for name in one
        if name.startswith("eval_") and "second" not in name and "runtime" not in name
    ]
    assert "eval_loss" in names
    assert "eval_logratios/chosen_standard_error" in names
    for name in names:
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("name", ["ipo", "orpo", "kto", "simpo"])
def test_losses_of_the_family(files: Files, name: str) -> None:
    assert files.run("--loss", name) == 0
    assert all(map(torch.isfinite, map(torch.tensor, files.losses())))


def test_the_loss_and_trls_settings_are_the_same_loss(files: Files) -> None:
    other = files.folder / "other"
    assert files.run("--loss", "dpop", "--loss-option", "lam=5", "--loss-option", "beta=0.2") == 0
    assert files.run("--dpop-lambda", "5", "--beta", "0.2", out=other) == 0
    assert files.losses() == files.losses(other)
    both = files.folder / "both"
    assert files.run("--loss", "dpop", "--dpop-lambda", "5", "--beta", "0.2", out=both) == 0
    assert files.losses() == files.losses(both)
    third = files.folder / "third"
    assert files.run("--dpop-lambda", "5", "--beta", "0.21", out=third) == 0
    assert files.losses() != files.losses(third)


def test_online_and_precomputed_references_agree(files: Files) -> None:
    online = files.folder / "online"
    assert files.run() == 0
    assert files.run("--reference", "online", out=online) == 0
    assert files.losses(online) == pytest.approx(files.losses(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-length", "8"], "train.jsonl:1: the pair has"),
        (["--eval-pairs", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--columns", "prompt"], "--columns is 'prompt', expected NAME=COLUMN"),
        (["--columns", "prompt=question"], "question"),
        (["--columns", "prompt=a", "prompt=b"], "expected each name once"),
        (
            ["--chat_template_path", "/nowhere.jinja"],
            "--chat-template-path is '/nowhere.jinja': there is no such file",
        ),
        (["--chat", "--chat_template_path", "PAIRS"], "train.jsonl: no chat template"),
        (["--tokenizer", "PAIRS"], "which is a file, expected a folder"),
        (["--tokenizer", "FOLDER"], "which holds no tokenizer ("),
        (
            ["--tokenizer", "nosuch"],
            "--tokenizer is 'nosuch': its tokenizer cannot be loaded: there is",
        ),
        (["--model", "PAIRS"], "which is a file, expected a folder"),
        (
            ["--output", "/proc/run"],
            "--output is '/proc/run', expected a folder that is there or can",
        ),
        (["--dataloader_drop_last", "--batch-pairs", "9"], "6 pairs are fewer than the 9 of one"),
        (["--resume_from_checkpoint", "nope"], "--resume_from_checkpoint is 'nope', expected"),
        (["--lora", "--lora-targets", "q_proj,foo"], "--lora-targets names 'foo', which the model"),
        (["--lora", "--lora-targets", "q_proj,"], "--lora-targets names ''"),
        (
            ["--lora", "--lora-targets", "q_prj"],
            "has not (did you mean 'q_proj'",
        ),
        (["--lora", "--lora_modules_to_save", "head"], "--lora_modules_to_save names 'head'"),
        (["--merge-adapter"], "--merge-adapter has no effect"),
    ],
)
def test_errors_are_one_plain_line(
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    paths = {"FOLDER": files.folder, "PAIRS": files.folder / "train.jsonl"}
    assert files.run(*(str(paths.get(word, word)) for word in more)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fastdpop: error: ")
    assert message in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b" ", "the chat template is empty"),
        (b"{% for m in messages %}\n{{ m.content }", "template.jinja:2: no valid template"),
    ],
)
def test_a_chat_template_that_is_none(
    files: Files, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    path = files.folder / "template.jinja"
    path.write_bytes(content)
    assert files.run("--chat", "--chat_template_path", str(path)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"fastdpop: error: {path}")
    assert message in said


def test_another_chat_template(files: Files) -> None:
    path = files.folder / "template.jinja"
    path.write_text(
        "{% for m in messages %}({{ m.content }}){% generation %}{% endgeneration %}{% endfor %}"
    )
    assert files.run("--chat", "--chat_template_path", str(path)) == 0
    assert (files.out / "chat_template.jinja").read_text() == path.read_text()


@pytest.mark.filterwarnings("default:.*chosen equals rejected")
def test_pairs_that_teach_nothing(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted among those that are trained on."""
    equal = {"prompt": "a", "chosen": "b", "rejected": "b"}
    long = {name: text * 50 for name, text in equal.items()}
    path = write(files.folder / "train.jsonl", [*rows(2), equal, long])
    assert files.run("--max-length", "60", "--too-long", "drop") == 0
    assert f"warning: {path}: chosen equals rejected in 1 of 3 pairs" in capsys.readouterr().err


def test_a_malformed_row(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(files.folder / "train.jsonl", [*rows(2), {**rows(1)[0], "chosen": 4}])
    assert files.run() == 1
    assert f"{path}:3: " in capsys.readouterr().err


def test_weights_that_are_cut_short(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    weights = files.folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert files.run() == 1
    assert (
        f"fastdpop: error: {files.folder / 'model'} cannot be loaded: " in capsys.readouterr().err
    )


def test_weights_that_are_not_numbers(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(initializer_range=0.2)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(files.folder / "model")
    assert files.run() == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(
        "cannot be loaded: model.layers.0.mlp.up_proj.weight holds NaN or infinity, expected finite weights"
    )


def test_more_tokens_than_the_embedding_has(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    config = files.folder / "model" / "tokenizer.json"
    text = json.loads(config.read_text())
    tokens = {"id": 300, "content": "zebra", "single_word": False, "lstrip": False, "rstrip": False}
    text["added_tokens"].append({**tokens, "normalized": False, "special": False})
    config.write_text(json.dumps(text))
    write(files.folder / "train.jsonl", [{"prompt": "a zebra ", "chosen": "c", "rejected": "d"}])
    assert files.run() == 1
    said = capsys.readouterr().err
    assert "train.jsonl:1" in said
    assert "258" in said


def test_a_model_that_cannot_be_attached_to(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda _: None)
    assert files.run() == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"fastdpop: error: {files.folder / 'model'} cannot be trained so: ")
    assert "no output embedding" in said


def test_memory_that_is_not_there(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert files.run("--lora", "--lora-rank", "9" * 15) == 1
    said = capsys.readouterr().err
    assert "fastdpop: error: there is not enough memory: " in said
    assert "Lower --batch-pairs" in said


def test_a_fault_of_the_program_keeps_its_traceback(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(PairTrainer, "train", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        files.run()


def test_a_loss_that_is_not_finite(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        files.run(
            "--learning-rate", "1e30", "--warmup", "0", "--max-grad-norm", "1e30", "--epochs", "4"
        )
        == 1
    )
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fastdpop: error: step ")
    assert not list(files.out.glob("*.safetensors"))


def test_an_interruption(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = PairTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    monkeypatch.setattr(PairTrainer, "training_step", training_step)
    assert files.run("--save-every", "1") == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "fastdpop: interrupted after step 2; go on from checkpoint-2 with --resume"


def test_a_disk_that_is_full(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(PairTrainer, "_save_optimizer_and_scheduler", save)
    assert files.run("--save-every", "1") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"fastdpop: error: {files.out / 'checkpoint-1'} cannot be written (")
    monkeypatch.undo()
    assert files.run("--save-every", "1") == 0  # the same command starts again


def test_a_model_that_cannot_be_written(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the very end; the same command starts again."""

    def save_model(self: Any, *_: Any, **__: Any) -> None:
        (files.out / "config.json").write_text("{}")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PairTrainer, "save_model", save_model)
        assert files.run("--save-every", "0") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"fastdpop: error: {files.out} cannot be written (")
    assert said.endswith(" MiB are free there): No space left on device")
    assert files.run("--save-every", "0") == 0
    assert not list(files.out.glob("*incomplete*"))


def test_a_model_that_is_no_causal_language_model(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its head would be a random one."""
    tiny_llama(tied=False).model.save_pretrained(files.folder / "model")
    assert files.run() == 1
    assert "cannot be loaded: it has no weights for ['lm_head.weight']" in capsys.readouterr().err


def test_a_logger_that_is_not_installed(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    assert files.run("--report_to", "trackio") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fastdpop: error: ")
    assert "trackio" in said


def test_a_mixture_of_data_sets(files: Files) -> None:
    """TRL's way to name data, which YAML alone can."""
    file = files.folder / "run.yaml"
    data = [
        {"path": "json", "data_files": str(files.folder / f"{n}.jsonl")} for n in ("train", "test")
    ]
    file.write_text(json.dumps({"datasets": data, "test_split_size": 0.33}))
    argv = files.argv("--config", str(file))
    at = argv.index("--pairs")
    assert main([*argv[:at], *argv[at + 2 :]]) == 0
    assert [row["step"] for row in files.metrics() if "loss" in row] == [1, 2, 3]
    assert [row["step"] for row in files.metrics() if "eval_loss" in row] == [0, 3]


def test_two_runs_do_not_share_a_folder(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert files.run("--save-every", "0") == 0
    assert files.run("--save-every", "0") == 1
    assert "already holds a model" in capsys.readouterr().err
    saved = (files.folder / "model" / "model.safetensors").read_bytes()
    for model in (files.folder / "model", files.folder / "not there" / ".." / "model"):
        assert main(files.argv("--output", str(model))) == 1
        assert "already holds a model" in capsys.readouterr().err
        assert main(files.argv("--output", str(model), "--resume_from_checkpoint", "nope")) == 1
    assert (files.folder / "model" / "model.safetensors").read_bytes() == saved
