"""What a newcomer meets: options that are wrong in a way that shows late, and the last lines of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from transformers import LlamaForCausalLM
from trl import DPOConfig

from fastdpop.cli import main
from fastdpop.integrations.trl.options import EVALUATED
from fastdpop.train.trainer import PairTrainer
from tests.tiny_model import tiny_llama
from tests.train.files import WARNINGS, Files, rows, write

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]
GROUPED = ("--train_sampling_strategy", "group_by_length")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files.make(tmp_path / "files")


@pytest.fixture
def held_out(files: Files) -> tuple[str, str]:
    return ("--eval-pairs", str(files.folder / "test.jsonl"))


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("eval_los",), "is 'eval_los' (did you mean 'loss'?), expected what an evaluation logs"),
        (("accuracy",), "did you mean 'rewards/accuracies'?"),
        (("eval_epoch",), "is 'eval_epoch', expected"),
        (("penalty",), "the greatest penalty, which is the worst: give --greater_is_better false"),
        (("loss", "--greater_is_better", "true"), "the greatest loss, which is the worst"),
    ],
)
def test_a_metric_that_chooses_nothing_good(
    given: tuple[str, ...],
    message: str,
    files: Files,
    held_out: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert files.run(*held_out, "--metric_for_best_model", *given) == 1
    assert message in last_error(capsys)
    assert not files.out.exists()


def test_a_metric_in_yaml(
    files: Files, held_out: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = files.folder / "run.yaml"
    path.write_text("metric_for_best_model: eval_los\n")
    assert files.run(*held_out, "--config", str(path)) == 1
    assert "did you mean 'loss'?" in last_error(capsys)


def test_the_best_by_every_metric_that_is_logged(
    files: Files, held_out: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    best = ("--load_best_model_at_end", "--metric_for_best_model", "logratios/rejected")
    best += ("--greater_is_better", "false", "--eval-every", "1", "--save-every", "1")
    assert files.run(*held_out, *best) == 0
    evaluated = [row for row in files.metrics() if "eval_loss" in row]
    logged = {name.removeprefix("eval_") for name in evaluated[-1] if name.startswith("eval_")}
    assert logged == set(EVALUATED)
    in_training = {row["step"]: row["eval_logratios/rejected"] for row in evaluated[:-1]}
    step = min((s for s in in_training if s), key=in_training.__getitem__)
    assert evaluated[-1]["eval_logratios/rejected"] == in_training[step]
    said = capsys.readouterr().out
    assert f"Saved to {files.out}, as after step {step}, the best by logratios/rejected" in said
    assert f"after {step} steps" in said


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_by_evaluations_without_any(
    name: str, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.run("--lr_scheduler_type", name) == 1
    assert f"--lr_scheduler_type {name} " in last_error(capsys)


def test_a_revision_of_a_folder(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert files.run("--model_revision", "v2") == 1
    assert "--model_revision v2 has no effect: " in last_error(capsys)
    assert files.run("--model_revision", "main", "--steps", "1") == 0


# ---- the order of pairs -------------------------------------------------------------------------


def batches(files: Files, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[list[int]]:
    """The longer sequence's tokens, of every pair of every batch that was trained on."""
    own, found = PairTrainer.training_step, []

    def training_step(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        lengths = inputs["attention_mask"].sum(1).view(2, -1).amax(0)
        found.append(lengths.tolist())
        return own(self, model, inputs, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PairTrainer, "training_step", training_step)
        assert files.run(*more) == 0
    return found


needs_strategies = pytest.mark.skipif(
    not hasattr(DPOConfig, "train_sampling_strategy"), reason="transformers has no such option"
)


@needs_strategies
def test_pairs_of_similar_length(
    files: Files, held_out: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16 pairs in batches of 2 a group is of 4, and the two longest of it come together."""
    write(files.folder / "train.jsonl", rows(16))
    mixed = batches(files, monkeypatch, "--epochs", "1", *held_out)
    assert files.losses()[0] == pytest.approx(0.6931, abs=1e-4)
    files.out.rename(files.folder / "mixed")
    grouped = batches(files, monkeypatch, "--epochs", "1", *held_out, *GROUPED)
    flat = sorted(n for batch in mixed for n in batch)
    assert sorted(n for batch in grouped for n in batch) == flat  # every pair once
    padding = [sum(2 * max(b) - sum(b) for b in run) for run in (mixed, grouped)]
    assert padding[1] < padding[0]
    # The reference was scored in these batches.
    assert files.metrics()[1]["logratios/chosen"] == 0.0


@needs_strategies
def test_the_order_of_the_file(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [{"prompt": "a", "chosen": "b" * n, "rejected": "c"} for n in range(1, 7)]
    write(files.folder / "train.jsonl", pairs)
    found = batches(files, monkeypatch, "--train_sampling_strategy", "sequential")
    first = found[0][0]
    assert found == [[first + n, first + n + 1] for n in (0, 2, 4)]


@needs_strategies
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((*GROUPED, "--share-prefixes"), "group_by_length has no place with --share-prefixes"),
        (("--train_sampling_strategy", "batch_rebalance"), "is batch_rebalance, expected random, "),
    ],
)
def test_orders_that_are_refused(
    more: tuple[str, ...], message: str, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.run(*more) == 1
    assert message in last_error(capsys)


@pytest.mark.skipif(hasattr(DPOConfig, "group_by_length"), reason="transformers has the option")
def test_an_option_of_earlier_versions(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        files.run("--group_by_length")
    assert "it is --train_sampling_strategy group_by_length" in last_error(capsys)


# ---- other held-out pairs -----------------------------------------------------------------------


def test_going_on_with_other_held_out_pairs(
    files: Files, held_out: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Training is the same; evaluations of old and of new pairs are not compared."""
    other = str(write(files.folder / "other.jsonl", rows(4, 2)))
    assert files.run("--steps", "4", *held_out, out=files.folder / "whole") == 0
    for before, now in ((held_out, ("--eval-pairs", other)), ((), held_out)):
        out = files.folder / f"out{len(before)}"
        assert files.run("--steps", "2", *before, out=out) == 0
        capsys.readouterr()
        assert files.run("--steps", "4", *now, "--resume", out=out) == 0
        said = capsys.readouterr().out
        assert "which changes no step of training" in said
        assert "after 2 steps" in said
        assert "after 0 steps" not in said
        assert "2 steps in " in said
        assert "(2 were done before)" in said
        assert files.losses(out) == files.losses(files.folder / "whole")


def test_held_out_pairs_that_decide(
    files: Files, held_out: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The best so far was the best on other pairs, or by another metric."""
    best = ("--metric_for_best_model", "loss", "--eval-every", "2", "--save-every", "2")
    other = str(write(files.folder / "other.jsonl", rows(4, 2)))
    assert files.run("--steps", "2", *held_out, *best) == 0
    assert files.run("--steps", "4", "--eval-pairs", other, *best, "--resume") == 1
    assert "held-out pairs: " in last_error(capsys)
    by = ("--metric_for_best_model", "rewards/margins", *best[2:])
    assert files.run("--steps", "4", *held_out, *by, "--resume") == 1
    assert "decided by evaluations: the best model, by loss" in last_error(capsys)
    assert files.run("--steps", "4", *held_out, *best, "--resume") == 0


# ---- the last lines -----------------------------------------------------------------------------


def test_the_last_lines(
    files: Files, held_out: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of them can be followed as it stands."""
    assert files.run(*held_out, "--chat") == 0
    said = capsys.readouterr().out
    ratio = [row for row in files.metrics() if "eval_loss" in row][-1]["eval_logratios/chosen"]
    assert (
        f"Held-out chosen completions became more likely (eval_logratios/chosen {ratio:+.2f} nats)"
        in said
    )
    assert f"AutoModelForCausalLM.from_pretrained({str(files.out)!r})" in said
    LlamaForCausalLM.from_pretrained(files.out)
    folder = files.folder
    assert (
        f"fastdpop analyze --model {files.out} --reference {folder}/model --pairs {folder}/test.jsonl --chat\n"
        in said
    )


def test_chosen_completions_that_fall(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the last step's pairs, where there are no others."""
    own = PairTrainer.after_last_step

    def fallen(self: Any) -> dict[str, float]:
        return own(self) | {"logratios/chosen": -0.5}

    monkeypatch.setattr(PairTrainer, "after_last_step", fallen)
    assert files.run("--steps", "1") == 0
    assert (
        "Chosen completions of the last step became LESS likely (logratios/chosen, after that step, -0.50"
        in capsys.readouterr().out
    )


@pytest.mark.filterwarnings("ignore:.*held-out pairs are training pairs")
def test_what_is_said_is_of_the_model_that_is_saved(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step logs what was before it, for which a single one has log-ratios of 0."""
    one = ("--loss", "dpo", "--batch-pairs", "6", "--steps", "1")
    assert files.run(*one) == 0
    assert [row["logratios/chosen"] for row in files.metrics() if "loss" in row] == [0.0]
    said = capsys.readouterr().out
    assert "1 step in " in said
    held = files.folder / "held"
    assert files.run(*one, "--eval-pairs", str(files.folder / "train.jsonl"), out=held) == 0
    known = [row for row in files.metrics(held) if "eval_loss" in row][-1]["eval_logratios/chosen"]
    assert abs(known) > 0.05
    assert f"(logratios/chosen, after that step, {known:+.2f} nats)" in said
    blown = files.folder / "blown"
    big = ("--learning-rate", "1e39", "--steps", "1")
    assert files.run(*big, out=blown) == 1
    assert "after step 1, the last one, the loss of its pairs is nan" in capsys.readouterr().err
    assert not list(blown.glob("*.safetensors"))


def test_the_speed_is_of_pairs_that_were_trained_on(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.run("--accumulate", "100", "--epochs", "2") == 0  # six pairs, in two steps
    (last,) = (row for row in files.metrics() if "train_runtime" in row)
    pairs = last["train_samples_per_second"] * last["train_runtime"]
    assert pairs == pytest.approx(12, abs=0.1)
    assert f"{12 / last['train_runtime']:.3g} pairs per second" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:--warmup is 3")
def test_a_run_that_hardly_moved(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert files.run("--learning-rate", "1e-12") == 0
    said = capsys.readouterr().out
    assert "Chosen completions of the last step are as likely as under the reference" in said
    assert "Train for more --epochs, or raise --learning-rate" in said
    warm = files.folder / "warm"
    assert files.run("--learning-rate", "1e-9", "--warmup", "3", out=warm) == 0
    said = capsys.readouterr()
    assert "Lower --warmup, in which the learning rate still was" in said.out


@pytest.mark.filterwarnings("default::UserWarning")
def test_held_out_pairs_that_are_trained_on(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    test = write(files.folder / "both.jsonl", [*rows(2), *rows(1, 5)])
    assert files.run("--eval-pairs", str(test), "--steps", "1") == 0
    assert "2 of 3 held-out pairs are training pairs, too" in capsys.readouterr().err


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_warm_up_and_the_length_of_the_run(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = files.argv("--steps", "4")
    at = argv.index("--warmup")
    assert main([*argv[:at], *argv[at + 2 :]]) == 0
    rates = [row["learning_rate"] for row in files.metrics() if "loss" in row]
    assert rates == [0.0, 1e-2, 1e-2, 1e-2]  # a quarter of it
    assert "--warmup" not in capsys.readouterr().err
    long = files.folder / "long"
    assert files.run("--steps", "2", "--warmup", "10", out=long) == 0
    assert "--warmup is 10, and the run has 2 steps: " in capsys.readouterr().err


@pytest.mark.filterwarnings("default::UserWarning")
def test_pairs_beyond_the_models_context(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(initializer_range=0.2)
    model.config.max_position_embeddings = 20
    model.save_pretrained(files.folder / "model")
    assert files.run("--max-length", "64", "--steps", "1") == 0
    said = capsys.readouterr().err
    assert (
        "pairs have more tokens than the model's context, 20, which --max-length 64 allows" in said
    )


# ---- messages that name what was written --------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--batch-pairs", "x"), "argument --batch-pairs: invalid int value: 'x'"),
        (("--num_train_epochs", "x"), "argument --num_train_epochs/"),
        (("--loss", "dop"), "(did you mean 'dpop'"),
        (("--lr", "1e-4"), "there is no option --lr; it is --learning-rate"),
        (("--bf16", "true", "stray"), "'stray' belongs to no option"),
    ],
)
def test_wrong_usage(
    more: tuple[str, ...], message: str, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        files.run(*more)
    assert message in last_error(capsys)


def test_a_model_that_is_nowhere(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert files.run("--model", "nosuch") == 1
    assert (
        "--model is 'nosuch': there is no folder nosuch, and of the Hub: "
        in capsys.readouterr().err
    )
