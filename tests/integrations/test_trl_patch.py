"""Patching TRL: what it adds, that it is undone, and what is refused with which words."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import trl
from peft import LoraConfig
from torch import nn
from transformers import HfArgumentParser, TrainerCallback

import fastdpop
from fastdpop.integrations import trl as integration
from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer, models, patching
from tests.integrations.trl_setup import (
    RELEASE,
    WARNINGS,
    DPOConfig,
    DPOTrainer,
    arguments,
    logged,
    model,
    namespace,
    pairs,
    step,
    trainer,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]


@pytest.fixture
def patched() -> Iterator[None]:
    fastdpop.patch_trl()
    yield
    fastdpop.unpatch_trl()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = {kind: namespace(kind) for kind in (DPOTrainer, DPOConfig)}
    yield
    for kind, attributes in before.items():
        assert namespace(kind) == attributes


# ---- DPOTrainer ---------------------------------------------------------------------------------


def test_patched_trainer_is_fast_trainer(tmp_path: Path, patched: None) -> None:
    options = {"loss_type": ["dpop", "sft"], "loss_weights": [1.0, 0.2], "dpop_lambda": 7.0}
    ours = trainer(DPOTrainer, tmp_path, **options)
    theirs = trainer(FastDPOTrainer, tmp_path, config=FastDPOConfig, **options)
    for of in (ours, theirs):
        of.train()
    names = ("loss", "grad_norm", "penalty")
    assert logged(ours, *names) == logged(theirs, *names)
    other = trainer(DPOTrainer, tmp_path, **{**options, "dpop_lambda": 8.0})
    assert step(other)[0] != step(trainer(DPOTrainer, tmp_path, **options))[0]


def test_patched_and_stock_side_by_side(tmp_path: Path) -> None:
    stock = trainer(DPOTrainer, tmp_path, max_steps=20)
    stock.train()
    fastdpop.patch_trl()
    fast = trainer(DPOTrainer, tmp_path, max_steps=20)
    fast.train()
    fastdpop.unpatch_trl()
    ours, theirs = ([x for (x,) in logged(of, "loss")] for of in (fast, stock))
    assert len(ours) == 20
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert "penalty" in fast.state.log_history[0]
    assert "penalty" not in stock.state.log_history[0]


def test_patching_again_changes_only_the_settings(tmp_path: Path) -> None:
    fastdpop.patch_trl()
    once = dict(vars(DPOTrainer))
    fastdpop.patch_trl(engine="eager", workspace_bytes=2**20)
    assert dict(vars(DPOTrainer)) == once
    of = trainer(DPOTrainer, tmp_path)
    assert (of._fastdpop.engine, of._fastdpop.workspace_bytes) == ("eager", 2**20)
    fastdpop.unpatch_trl()
    fastdpop.unpatch_trl()


def test_subclasses_follow_and_trainers_made_before_do_not(tmp_path: Path) -> None:
    class Own(DPOTrainer):
        pass

    before = trainer(DPOTrainer, tmp_path)
    fastdpop.patch_trl()
    assert "penalty" in step(trainer(Own, tmp_path))[2]
    assert "penalty" not in step(before)[2]
    made = trainer(DPOTrainer, tmp_path)
    fastdpop.unpatch_trl()
    assert "penalty" not in step(made)[2]
    assert "penalty" not in step(trainer(Own, tmp_path))[2]


def test_models_are_attached_once_and_not_if_their_owner_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached: list[Any] = []

    def attach(of: Any, **settings: Any) -> Any:
        attached.append((of, settings["engine"], settings["workspace_bytes"]))
        return fastdpop.attach(of, **settings)

    monkeypatch.setattr(models, "attach", attach)
    policy, reference = fastdpop.attach(model(), engine="eager"), model()
    settings = {"engine": "eager", "workspace_bytes": 2**20}
    for _ in range(2):
        of = trainer(FastDPOTrainer, tmp_path, policy=policy, reference=reference, given=settings)
        of.train()
    assert attached == [(reference, "eager", 2**20)]


def test_a_model_that_is_trained_again(tmp_path: Path, patched: None) -> None:
    policy = model()
    for _ in range(2):
        of = trainer(DPOTrainer, tmp_path, policy=policy)
        assert "penalty" in step(of)[2]
    fastdpop.detach(policy)
    assert "penalty" in step(trainer(DPOTrainer, tmp_path, policy=policy))[2]


# ---- DPOConfig ----------------------------------------------------------------------------------


def test_config_field(tmp_path: Path, patched: None) -> None:
    config = arguments(tmp_path, loss_type="dpop", dpop_lambda=12)
    assert config.loss_type == ["dpop"]
    assert config.dpop_lambda == config.to_dict()["dpop_lambda"] == 12
    assert json.loads(config.to_json_string())["dpop_lambda"] == 12
    assert dataclasses.asdict(config)["dpop_lambda"] == 12
    assert dataclasses.replace(config, dpop_lambda=3.0).dpop_lambda == 3.0
    assert copy.deepcopy(config).dpop_lambda == 12
    assert pickle.loads(pickle.dumps(config)).dpop_lambda == 12
    assert arguments(tmp_path).dpop_lambda == 50.0


@pytest.mark.parametrize("kind", [DPOConfig, FastDPOConfig])
def test_command_line(kind: Any, tmp_path: Path, patched: None) -> None:
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", "--report_to", "none"]
    line += ["--loss_type", "dpop", "sft", "--loss_weights", "1.0", "0.5", "--dpop_lambda", "2.5"]
    (config,) = HfArgumentParser(kind).parse_args_into_dataclasses(line)
    assert (config.loss_type, config.dpop_lambda) == (["dpop", "sft"], 2.5)
    assert (
        "lambda" in {f.name: f for f in dataclasses.fields(config)}["dpop_lambda"].metadata["help"]
    )


def test_saved_arguments_are_read_without_a_patch(tmp_path: Path) -> None:
    fastdpop.patch_trl()
    torch.save(arguments(tmp_path, loss_type="dpop", dpop_lambda=9.0), tmp_path / "args.bin")
    fastdpop.unpatch_trl()
    code = (
        "import torch; args = torch.load('args.bin', weights_only=False); "
        "print(type(args).__name__, args.loss_type, args.dpop_lambda)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.stdout.split("\n")[-2] == "DPOConfig ['dpop'] 9.0", done.stderr


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1.0, ValueError), (float("nan"), ValueError), ("5", TypeError), (True, TypeError)],
)
def test_wrong_lambda(value: Any, error: type[Exception], tmp_path: Path, patched: None) -> None:
    for config in (DPOConfig, FastDPOConfig):
        with pytest.raises(error, match=f"dpop_lambda is {value!r}, expected a finite number >= 0"):
            arguments(tmp_path, config, dpop_lambda=value)


def test_without_a_patch_the_field_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="dpop_lambda"):
        arguments(tmp_path, dpop_lambda=1.0)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.28.0", "1.17.0", "2.0.0.dev0", "0.9.6", "?"])
def test_other_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(
        ImportError, match=rf"trl is {re.escape(version)}, expected 0.29 to 1.16: pip install"
    ):
        fastdpop.patch_trl()


def test_served_versions() -> None:
    for version in ("0.29.0", "0.29.1", "1.0.0", "1.9.2", "1.16.0", "1.16rc1", "1.16.0.dev0"):
        integration.check_version(version)


class Calls(TrainerCallback):
    """Calls a function in the middle of a training step."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.function()


class Predicts(TrainerCallback):
    """Undoes the patch in the middle of an evaluation."""

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        fastdpop.unpatch_trl()


@pytest.mark.parametrize("function", [fastdpop.patch_trl, fastdpop.unpatch_trl])
def test_while_training(function: Any, tmp_path: Path, patched: None) -> None:
    of = trainer(DPOTrainer, tmp_path, given={"callbacks": [Calls(function)]})
    message = rf"{function.__name__} is called while a DPOTrainer is running train\(\)"
    with pytest.raises(RuntimeError, match=message):
        of.train()
    function()  # the failed training is no obstacle
    fastdpop.patch_trl()


def test_a_stock_trainer_stays_one_when_it_is_patched_while_it_runs(tmp_path: Path) -> None:
    """Also one whose model is assigned anew, as Trainer does it now and then."""

    def patch() -> None:
        fastdpop.patch_trl()
        of.model = of.model

    of = trainer(DPOTrainer, tmp_path, given={"callbacks": [Calls(patch)]})
    own = trainer(DPOTrainer, tmp_path)
    own.train()
    try:
        of.train()
        assert not fastdpop.is_attached(of.model)
        assert "penalty" not in step(of)[2]
        assert "penalty" in step(trainer(DPOTrainer, tmp_path))[2]
    finally:
        fastdpop.unpatch_trl()
    assert logged(of, "loss", "grad_norm") == logged(own, "loss", "grad_norm")


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_while_evaluating(method: str, tmp_path: Path, patched: None) -> None:
    evaluated = {"eval_dataset": pairs(4), "callbacks": [Predicts()]}
    of = trainer(DPOTrainer, tmp_path, given=evaluated)
    arguments = (of.eval_dataset,) if method == "predict" else ()
    with pytest.raises(RuntimeError, match=rf"while a DPOTrainer is running {method}\(\)"):
        getattr(of, method)(*arguments)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"loss_type": "dpo"}, "loss_type is 'dpo', expected one of"),
    ({"f_divergence_type": "kl"}, "f_divergence_type is 'kl', expected one of"),
    (
        {"loss_type": "dpop", "f_divergence_type": "forward_kl"},
        "'forward_kl', expected 'reverse_kl'|only supported for",
    ),
    (
        {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5},
        "ld_alpha is 0.5, expected None with loss_type 'sft'",
    ),
    ({"beta": 0.0}, "beta is 0.0, expected a finite number > 0"),
    ({"ld_alpha": 1.5}, r"alpha is 1.5, expected a value in \[0, 1\]"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_settings_that_do_not_go_together(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(FastDPOTrainer, tmp_path, **options)


def test_no_such_engine(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="warp"):
        fastdpop.patch_trl(engine="warp")
    with pytest.raises(ValueError, match="warp"):
        trainer(FastDPOTrainer, tmp_path, given={"engine": "warp"})


def test_model_without_an_output_embedding(tmp_path: Path) -> None:
    class Headless(type(model())):  # type: ignore[misc]
        def get_output_embeddings(self) -> None:
            return None

    policy = model()
    policy.__class__ = Headless
    with pytest.raises(
        RuntimeError, match=r"no output embedding.*trl.DPOTrainer after fastdpop.unpatch_trl"
    ):
        trainer(FastDPOTrainer, tmp_path, policy=policy)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")  # it has not
@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
def test_adapter_on_the_head(where: str, tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], where: ["lm_head"]})
    given = {"policy": model(tied=False), "reference": None, "given": {"peft_config": config}}
    if where == "target_modules" and RELEASE >= (1, 15):
        with pytest.raises(ValueError, match="lm_head"):  # TRL's own
            trainer(FastDPOTrainer, tmp_path, **given)
        return
    loss, found, _ = step(trainer(FastDPOTrainer, tmp_path, **given))
    torch.testing.assert_close(loss, torch.tensor(2.0).log(), rtol=0, atol=1e-6)
    assert any("lm_head" in name and grad.any() for name, grad in found.items())


def test_vision_batch(tmp_path: Path) -> None:
    of = trainer(FastDPOTrainer, tmp_path)
    batch = next(iter(of.get_train_dataloader())) | {"pixel_values": torch.zeros(1)}
    with pytest.raises(ValueError, match="batch contains 'pixel_values', expected text only"):
        of.compute_loss(of.model, batch)


def test_vision_data(tmp_path: Path) -> None:
    of = trainer(FastDPOTrainer, tmp_path)
    of._is_vision_dataset = True
    with pytest.raises(ValueError, match="train_dataset holds images, expected text only"):
        of.model = model()


def test_several_gpus_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPOConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"2 GPUs in one process.*accelerate launch"):
        trainer(FastDPOTrainer, tmp_path)


@pytest.mark.skipif(RELEASE >= (1, 15), reason="TRL's Liger loss is gone")
def test_ligers_loss(tmp_path: Path) -> None:
    of = trainer(FastDPOTrainer, tmp_path)
    of.use_liger_kernel = True
    with pytest.raises(ValueError, match="use_liger_kernel is True, expected False"):
        of.model = model()


def test_only_models_are_attached(tmp_path: Path) -> None:
    of = trainer(FastDPOTrainer, tmp_path)
    of.ref_model = None
    assert of.ref_model is None
    del of.ref_model
    with pytest.raises(AttributeError, match="ref_model"):
        _ = of.ref_model
    wrapper = nn.Module()
    wrapper.module = of.model
    of.ref_model = wrapper
    assert of.ref_model is wrapper


def test_a_patch_that_fails_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kind: Any) -> None:
        patching._set(kind, "_compute_loss", None)
        raise KeyError("something that this TRL does not have")

    with monkeypatch.context() as patch:
        patch.setattr(patching, "_patch_dpo", fail)
        with pytest.raises(KeyError):
            fastdpop.patch_trl()
    assert "_compute_loss" in vars(DPOTrainer)
    fastdpop.patch_trl()
    try:
        assert "dpop_lambda" in {field.name for field in dataclasses.fields(DPOConfig)}
    finally:
        fastdpop.unpatch_trl()


def test_annotations_that_are_made_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.14 on they are not among a class's own attributes."""

    class Lazy(type):
        @property
        def __annotations__(cls) -> dict[str, Any]:
            return vars(cls).get("_made") or {"beta": float}

        @__annotations__.setter
        def __annotations__(cls, value: dict[str, Any]) -> None:
            type.__setattr__(cls, "_made", value)

    class Config(metaclass=Lazy):
        __dataclass_fields__ = DPOConfig.__dataclass_fields__

        def __init__(self, beta: float = 0.1) -> None:
            pass

    assert "__annotations__" not in vars(Config)
    monkeypatch.setattr(patching, "DPOConfig", Config)
    patching._patch_config()
    flags: dict[str, Any] = {"share_prefixes": bool | None, "global_batch": bool | None}
    flags |= {"pair_values": list[str] | None, "warn_displacement": bool}
    added = {"dpop_lambda": float, **flags}
    assert Config.__annotations__ == {"beta": float} | added
    while patching._undo:
        patching._undo.pop()()
    assert Config.__annotations__ == {"beta": float}


def test_the_latest_trainers_engine_is_used(tmp_path: Path) -> None:
    policy, ref_model = model(), model()

    def one(engine: str) -> Any:
        given = {"engine": engine}
        return trainer(FastDPOTrainer, tmp_path, policy=policy, reference=ref_model, given=given)

    step(one("eager"))
    with pytest.raises(ValueError, match="engine 'triton' cannot run on cpu"):
        step(one("triton"))
    # A model that its owner has attached keeps its owner's.
    policy, ref_model = (fastdpop.attach(model(), engine="eager") for _ in range(2))
    step(one("triton"))
