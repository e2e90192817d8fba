"""The command line of ``fastdpop train``."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("trl")

from fastdpop import losses
from fastdpop.cli import main
from fastdpop.data import tokens
from fastdpop.integrations.trl import FastDPOConfig
from fastdpop.train import options
from fastdpop.train.options import SHORT, TRL_SHOWN, PairArguments, short_help
from fastdpop.train.parse import Asked, parse
from tests.train.files import WARNINGS

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]
REQUIRED = ("--model", "m", "--pairs", "p", "--output", "o", "--device", "cpu")


def asked(*more: str) -> Asked:
    return parse([*REQUIRED, *more])


def test_defaults_are_the_papers() -> None:
    """Smaug, Section 6: beta 0.3, lambda 50, AdamW; and nothing is cut."""
    config = asked().config
    assert (config.loss_type, config.beta, config.dpop_lambda) == (["dpop"], 0.3, 50.0)
    assert config.optim.startswith("adamw")
    assert config.max_length is None
    assert config.precompute_ref_log_probs
    assert config.report_to in ([], ["none"])
    assert (config.bf16, config.gradient_checkpointing, config.use_cpu) == (False, False, True)


def test_short_options_stand_for_trls() -> None:
    given = asked(
        "--batch-pairs", "3", "--accumulate=2", "--epochs", "0.5", "--warmup", "4", "--lora",
        "--lora-rank", "5", "--lora-targets", "q_proj,v_proj", "--schedule", "cosine",
        "--reference", "online", "--save-every", "7",
    )  # fmt: skip
    config, model = given.config, given.model
    assert model.model_name_or_path == "m"
    assert config.output_dir == "o"
    assert config.per_device_train_batch_size == config.per_device_eval_batch_size == 3
    assert config.gradient_accumulation_steps == 2
    assert config.num_train_epochs == 0.5
    assert config.warmup_steps == 4
    assert (model.use_peft, model.lora_r, model.lora_target_modules) == (
        True,
        5,
        ["q_proj", "v_proj"],
    )
    assert config.lr_scheduler_type == "cosine"
    assert config.precompute_ref_log_probs is False
    assert (config.save_strategy, config.save_steps) == ("steps", 7)
    assert asked("--steps", "9").config.max_steps == 9
    assert asked("--schedule", "constant").config.lr_scheduler_type == "constant_with_warmup"
    assert asked("--lora", "--lora-targets", "q_proj").model.lora_target_modules == "q_proj"
    assert asked("--save-every", "0").config.save_strategy == "no"
    with_pairs = asked("--eval-pairs", "e", "--eval-every", "3").config
    assert (with_pairs.eval_strategy, with_pairs.eval_steps) == ("steps", 3)
    assert asked("--eval-pairs", "e", "--eval-every", "0").config.eval_strategy == "no"
    assert asked().config.eval_strategy == "no"


def test_every_option_of_trl_works_under_its_name() -> None:
    given = asked(
        "--eval-pairs", "e", "--per_device_eval_batch_size", "6", "--adam_beta2", "0.5", "--loss_type", "robust", "sft",
        "--loss_weights", "1.0", "0.1", "--label_smoothing", "0.3", "--lora", "--use_dora",
        "--no_remove_unused_columns", "--dataset_num_proc", "2", "--attn-implementation", "eager",
        "--dtype", "bfloat16",
    )  # fmt: skip
    assert given.config.per_device_eval_batch_size == 6
    assert given.config.adam_beta2 == 0.5
    assert given.config.loss_type == ["robust", "sft"]
    assert given.config.loss_weights == [1.0, 0.1]
    assert given.config.label_smoothing == 0.3
    assert given.config.remove_unused_columns is False
    assert given.config.dataset_num_proc == 2
    assert given.model.use_dora
    assert given.model.dtype == "bfloat16"
    assert given.model.attn_implementation == "eager"
    assert {"loss_type", "loss_weights", "remove_unused_columns"} <= given.given


def test_what_it_does_anyhow_may_be_said() -> None:
    given = asked(
        "--do_train", "--do_eval", "--eval-pairs", "e", "--max_steps", "-1", "--padding_free", "false",
        "--truncation_mode", "keep_start", "--save_strategy", "best", "--metric_for_best_model", "eval_loss",
    )  # fmt: skip
    assert given.own.eval_pairs == "e"
    data = ["--dataset_name", "d", "--eval_strategy", "steps", "--eval_steps", "2"]
    assert parse([*REQUIRED[:2], *REQUIRED[4:], *data]).config.eval_steps == 2


def test_two_names_for_one_way_to_leave_padding_out() -> None:
    for more in (["--share-prefixes"], ["--share_prefixes", "true"], ["--padding_free"]):
        config = asked(*more).config
        assert (config.share_prefixes, config.padding_free) == (True, False)
    for more in ([], ["--share-prefixes", "false"], ["--padding_free", "false"]):
        assert asked(*more).config.share_prefixes is False


def test_trls_way_to_resume() -> None:
    given = asked("--resume_from_checkpoint", "true")
    assert (given.own.resume, given.config.resume_from_checkpoint) == (True, None)
    given = asked("--resume_from_checkpoint", "some/checkpoint-3")
    assert (given.own.resume, given.config.resume_from_checkpoint) == (False, "some/checkpoint-3")


def test_a_reference_that_moves_is_scored_online() -> None:
    assert not asked("--sync_ref_model").config.precompute_ref_log_probs


def test_lists_may_be_given_in_parts() -> None:
    own = asked(
        "--columns", "prompt=a", "--loss", "dpop", "--columns", "chosen=b", "rejected=c"
    ).own
    assert own.columns == ["prompt=a", "chosen=b", "rejected=c"]


def test_a_loss_of_the_family() -> None:
    given = asked("--loss", "dpop", "--loss-option", "lam=5", "--loss-option", "form=outside")
    assert given.loss == losses.get("dpop", lam=5, form="outside")
    assert asked("--loss", "orpo").loss == losses.get("orpo")
    assert asked("--loss", "dpo", "--beta", "0.2").loss == losses.get("dpo", beta=0.2)
    assert asked().loss is None


def test_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\npairs: p\noutput: o\nbatch-pairs: 3\nlearning_rate: 1e-4\nschedule: cosine\n"
        "loss_type: [dpop, sft]\nuse_cpu: true\nsave_every: 0\nlora: true\ncolumns: [prompt=q]\n"
    )
    given = parse(["--config", str(file), "--batch-pairs", "5"])
    assert given.config.per_device_train_batch_size == 5  # the command line comes last
    assert given.config.learning_rate == 1e-4
    assert given.config.lr_scheduler_type == "cosine"
    assert given.config.loss_type == ["dpop", "sft"]
    assert given.config.save_strategy == "no"
    assert given.model.use_peft
    assert given.own.columns == ["prompt=q"]
    assert given.own.pairs == "p"
    assert parse([f"--config={file}"]).config.per_device_train_batch_size == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\npairs: p\noutput: o\nbatchpairs: 3\n", "there is no option --batchpairs"),
        ("- a\n- b\n", "must contain a YAML mapping"),
        ("model: [m\n", "run.yaml is no YAML"),
        ("model: m\npairs: p\noutput: o\nsave_every: often\n", "--save-every is often"),
        ("model: m\npairs: p\noutput: o\nsteps: null\n", "max_steps is None, expected one value"),
        ("model: m\npairs: p\noutput: o\nsteps: 2.5\n", "invalid int value: '2.5'"),
        ("model: m\npairs: p\noutput: o\nsteps: true\n", "invalid int value: 'True'"),
        ("model: m\npairs: p\noutput: o\nseed: 3.7\n", "invalid int value: '3.7'"),
        ("model: m\npairs: p\noutput: o\nbeta: null\n", "beta is None, expected one value"),
        ("model: m\npairs: p\noutput: o\ndtype: foo\n", "dtype is 'foo', expected one of"),
        ("model: m\npairs: p\noutput: o\nreference: [online]\n", "--reference is ['online']"),
        ("model: m\npairs: p\noutput: o\nloss_weights: [a]\n", "loss_weights is ['a']"),
        ("model: m\npairs: p\noutput: o\n1: 2\n", "the key 1 is no option"),
        ("model: m\npairs: p\npairs: q\noutput: o\n", "the key 'pairs' stands twice"),
        (
            "model: m\npairs: p\noutput: o\nsteps: 2\nmax_steps: 3\n",
            "--steps and --max_steps are two names of one option",
        ),
        ("model: m\npairs: p\noutput: o\ndatasets: json\n", "datasets"),
        ("model: m\npairs: p\noutput: o\nlearning_rate: fast\n", "learning_rate"),
        (
            "model: m\npairs: p\noutput: o\nwarmup: [1, 2]\n",
            "warmup_steps is [1, 2], expected one value",
        ),
    ],
)
def test_yaml_that_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with contextlib.suppress(SystemExit):
        assert main(["train", "--config", str(file), "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err


def test_yaml_of_every_shape(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\npairs: p\noutput: o\ndevice: cpu\nlora: yes\nlora-targets: [q_proj, v_proj]\n"
        "save_strategy: no\nreport_to: [none]\ncolumns: {prompt: question}\nloss: dpop\n"
        "loss-option: {lam: 5, form: outside}\nlearning_rate: 1e-4\nlr_scheduler_type: cosine_with_min_lr\n"
        "lr_scheduler_kwargs: {min_lr: 1.0e-5}\nmodel_init_kwargs: {revision: x}\n"
    )
    given = parse(["--config", str(file)])
    assert given.model.lora_target_modules == ["q_proj", "v_proj"]
    assert given.config.save_strategy == "no"
    assert given.own.columns == ["prompt=question"]
    assert given.loss == losses.get("dpop", lam=5, form="outside")
    assert given.config.learning_rate == 1e-4
    assert given.config.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert given.config.model_init_kwargs == {"revision": "x"}
    assert given.config.use_cpu
    given = parse(["--config", str(file), "--lora-targets", "k_proj"])
    assert given.model.lora_target_modules == "k_proj"
    file.write_text("model: m\npairs: p\noutput: o\ndevice: nope\n")
    with pytest.raises(ValueError, match="--device is 'nope'"):
        parse(["--config", str(file)])


def test_yaml_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "/nowhere.yaml"]) == 1
    assert "/nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval-evry", "3"], "there is no option --eval_evry; is --eval-every"),
        (["--loss", "nonsense"], "argument --loss: invalid choice: 'nonsense'"),
        (["--threads", "many"], "argument --threads: invalid int value: 'many'"),
        (["--too-long", "cut"], "argument --too_long/--too-long: invalid choice: 'cut'"),
        (["stray"], "stray"),
        (["--learning-rate"], "expected one argument"),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", *REQUIRED, *more])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("usage: fastdpop train")
    assert len(said.splitlines()) == 2


@pytest.mark.parametrize("missing", ["--model", "--pairs", "--output"])
def test_what_is_missing(capsys: pytest.CaptureFixture[str], missing: str) -> None:
    at = REQUIRED.index(missing)
    with pytest.raises(SystemExit):
        main(["train", *REQUIRED[:at], *REQUIRED[at + 2 :]])
    assert f"{missing} is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "nope"], "--device is 'nope', expected a device that torch can use here"),
        (["--device", "cuda:999"], "--device is 'cuda:999'"),
        (["--device", "meta"], "--device is 'meta'"),
        (["--engine", "warp"], "engine is 'warp'"),
        (["--engine", "triton"], "engine 'triton' cannot run on cpu"),
        (["--workspace-bytes", "0"], "workspace_bytes is 0"),
        (["--lora-rank", "2"], "--lora-rank has no effect without --lora"),
        (["--lora-alpha", "2"], "--lora-alpha has no effect without --lora"),
        (["--lora", "--lora-rank", "0"], "--lora-rank is 0"),
        (["--lora", "--lora-alpha", "-1"], "--lora-alpha is -1, expected a positive number"),
        (["--lora", "--lora-dropout", "nan"], "--lora-dropout is nan, expected a number from 0"),
        (["--lora", "--lora-dropout", "1"], "--lora-dropout is 1.0, expected a number from 0"),
        (["--loss", "dpop", "--loss-option", "lam"], "--loss-option is 'lam', expected NAME=VALUE"),
        (["--loss", "dpop", "--loss-option", "lambda=3"], "has no option 'lambda'"),
        (["--loss", "dpop", "--loss-option", "beta=-1"], "beta is -1"),
        (["--loss-option", "beta=1"], "--loss-option has no effect without --loss"),
        (["--beta", "nan"], "beta is nan"),
        (["--dpop-lambda", "-1"], "--dpop-lambda is -1.0"),
        (["--loss_type", "dop"], "loss_type is 'dop'"),
        (["--learning-rate", "0"], "--learning-rate is 0.0, expected more than 0"),
        (["--learning-rate", "inf"], "--learning-rate is inf"),
        (["--weight-decay", "-1"], "--weight-decay is -1.0"),
        (["--max-grad-norm", "-1"], "--max-grad-norm is -1.0"),
        (["--epochs", "0"], "--epochs is 0.0"),
        (["--epochs", "nan"], "--epochs is nan"),
        (["--epochs", "1e300"], "--epochs is 1e+300"),
        (["--steps", "0"], "--steps is 0, expected at least 1"),
        (["--max-steps", "0"], "--max-steps is 0, expected at least 1"),
        (["--steps", "1", "--epochs", "2"], "--epochs has no effect beside --steps"),
        (
            ["--max_steps", "1", "--steps", "2"],
            "--max_steps and --steps are two names of one option",
        ),
        (["--eval-every", "5"], "--eval-every has no effect without --eval-pairs"),
        (["--bf16", "--fp16"], "At most one of --fp16 and --bf16 can be True"),
        (
            ["--lr_scheduler_type", "constant", "--warmup", "3"],
            "--warmup has no effect with --lr_scheduler_type constant",
        ),
        (["--config", "/nowhere.yaml"], "--config is '/nowhere.yaml': there is no such file"),
        (["--batch-pairs", "0"], "--batch-pairs is 0"),
        (["--accumulate", "0"], "--accumulate is 0"),
        (["--warmup", "-1"], "--warmup = -1.0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", "9" * 23], f"--seed is {'9' * 23}"),
        (["--max-length", "1"], "--max-length is 1, expected at least 2"),
        (["--eval-every", "x", "--eval-pairs", "e"], "--eval-every is x"),
        (["--eval-steps", "5"], "--eval-steps has no effect without --eval-pairs"),
        (["--schedule", "linear"], "--schedule is 'linear'"),
        (["--reference", "none"], "--reference is 'none'"),
        (["--threads", "1025"], "--threads is 1025"),
        (
            ["--padding_free", "--share-prefixes", "false"],
            "--share-prefixes is False beside --padding_free=True, expected True or None",
        ),
        (["--truncation_mode", "keep_end"], "--truncation_mode has no place here"),
        (["--dataset_streaming"], "`fastdpop trl dpo` takes a stream"),
        (["--do_train", "false"], "--do_train has no place here"),
        (["--device", "cpu", "--warmup", "nan"], "--warmup is nan"),
        (["--logging-steps", "nan"], "--logging-steps is nan, expected more than 0"),
        (["--logging-steps", "-1"], "--logging-steps is -1"),
        (["--data_seed", "-1"], "--data_seed is -1"),
        (["--save_total_limit", "-3"], "--save_total_limit is -3, expected at least 1"),
        (["--precompute_ref_batch_size", "0"], "--precompute_ref_batch_size is 0"),
        (["--sync_ref_model", "--ref_model_sync_steps", "0"], "--ref_model_sync_steps is 0"),
        (["--ref_model_mixup_alpha", "0.5"], "has no effect without --sync_ref_model"),
        (["--neftune_noise_alpha", "nan"], "--neftune_noise_alpha is nan"),
        (["--loss_type", "sigmoid", "--dpop-lambda", "7"], "--dpop-lambda has no effect"),
        (["--loss_type", "ipo", "--label_smoothing", "0.2"], "--label_smoothing has no effect"),
        (["--loss", "simpo", "--loss_type", "sigmoid"], "--loss and --loss_type each name a loss"),
        (["--loss", "ipo", "--dpop-lambda", "7"], "--dpop-lambda has no effect: --loss ipo does"),
        (
            ["--loss", "dpop", "--beta", "0.1", "--loss-option", "beta=0.2"],
            "--beta and --loss-option beta=0.2 are one: give one of them",
        ),
        (
            ["--load_best_model_at_end"],
            "--load_best_model_at_end has no effect without --eval-pairs",
        ),
        (["--eval_on_start"], "--eval_on_start has no effect without --eval-pairs"),
        (["--save-every", "0", "--save_steps", "2"], "--save-every and --save_steps are two"),
        (["--hub_model_id", "a/b"], "--hub_model_id has no effect without --push_to_hub"),
        (["--lr_scheduler_kwargs", "garbage"], "--lr_scheduler_kwargs is 'garbage'"),
        (["--lr_scheduler_kwargs", '{"num_cycles": 3}'], "has no effect with --lr_scheduler_type"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "--lr_scheduler_type warmup_stable_decay"),
        (["--accelerator_config", '{"foo": false}'], "foo"),
        (["--lora", "--merge-adapter"], "--merge-adapter beside --lora"),
        (["--output", ""], "--output is empty"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    fixed = [
        "--model",
        "/nowhere",
        "--pairs",
        "/nowhere",
        "--output",
        "/nowhere",
        "--device",
        "cpu",
    ]
    assert main(["train", *fixed, *more]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fastdpop: error: ")
    assert message in said
    assert len(said.splitlines()) == 1


def test_trls_settings_reach_a_loss_of_the_family() -> None:
    given = ("--beta", "0.2", "--f_divergence_type", "js_divergence")
    assert asked("--loss", "dpo", *given).loss == losses.get("dpo", beta=0.2, divergence="js")
    robust = losses.get("robust", label_smoothing=0.1)
    assert asked("--loss", "robust", "--label_smoothing", "0.1").loss == robust


def test_help_shows_every_short_option() -> None:
    said = short_help()
    shown = {*SHORT, *TRL_SHOWN, *(f.name for f in fields(PairArguments))}
    for name in shown:
        assert f"  --{name.replace('_', '-')}" in said
    assert max(map(len, said.splitlines())) <= 100
    known = {f.name for f in fields(FastDPOConfig)}
    assert {trl for trl, *_ in SHORT.values()} - known == {
        "model_name_or_path", "use_peft", "lora_r", "lora_target_modules"
    }  # fmt: skip


def test_what_becomes_of_long_pairs_has_one_list() -> None:
    """It stands in a module that imports little, too."""
    assert options.TOO_LONG == tokens.TOO_LONG


def test_whole_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help-all"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "--per_device_train_batch_size" in said
    assert "--dpop_lambda" in said


def test_help_imports_no_more_than_the_package() -> None:
    code = """
import sys
import fastdpop
before = set(sys.modules)
from fastdpop.cli import main
assert main(["train", "--help"]) == 0
heavy = {"transformers", "accelerate", "peft", "trl", "datasets", "tqdm", "matplotlib", "numpy"}
assert not (set(sys.modules) - before) & heavy, heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: fastdpop train" in done.stdout
