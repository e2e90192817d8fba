"""The paper's experiments, with a tiny model that trains for two steps."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import fastdpop
from recipes.smaug import figures, runner, runs, tables
from recipes.smaug.__main__ import main
from recipes.smaug.data import Source, load_sets
from recipes.smaug.measure import answer_questions
from recipes.smaug.runs import Run, Schedule, chosen_runs
from recipes.smaug.training import perform, result_file
from tests.tiny_model import tiny_llama, tiny_tokenizer

TINY = Schedule(
    steps=2, groups=2, learning_rate=1e-3, every=1, held_out=2, train=2, warmup=1, max_tokens=128
)


def load_tiny() -> tuple[Any, Any]:
    return tiny_llama(), tiny_tokenizer()


def problem(i: int) -> dict[str, str]:
    return {
        "question": f"{i} and 2?",
        "answer": f"{i}+2=<<{i}+2={i + 2}>>{i + 2}\n2*2=<<2*2=4>>4\n#### 4",
    }


def question(i: int) -> dict[str, Any]:
    return {
        "id": f"q{i}",
        "question": f"What is {i}?",
        "choices": ["a b", "cde", "f", "gh"],
        "label": i % 4,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data sets of a few rows."""
    for name, make in (("gsm8k", problem), ("arc_challenge", question)):
        for split, first in (("train", 0), ("test", 100)):
            path = tmp_path / "data" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(make(first + i)) + "\n" for i in range(5)))
    return tmp_path / "data"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedules of two steps."""
    monkeypatch.setattr(
        runs, "SCHEDULES", {"gsm8k": TINY, "arc": dataclasses.replace(TINY, questions=True)}
    )


def run_of(source: Source, data: str = "gsm8k", loss: str = "dpop", **settings: Any) -> Run:
    schedule = dataclasses.replace(TINY, questions=data == "arc")
    options: dict[str, Any] = {"beta": 0.3, "seed": 0, "schedule": schedule, **settings}
    if loss == "dpop":
        options.setdefault("lam", 50.0)
    return Run(data=data, loss=loss, source=source.identity(data), precision="float32", **options)


def finish(run: Run, source: Source, output: Path) -> dict[str, Any]:
    for one in (run.untrained(), run):
        perform(one, source, output, load_tiny, 1)
    found: dict[str, Any] = json.loads(result_file(output, run).read_text())
    return found


def test_a_run_and_its_untrained_one(folder: Path, tmp_path: Path) -> None:
    source, output = Source("folder", folder), tmp_path / "out"
    run = run_of(source, "arc")
    result = finish(run, source, output)
    before = json.loads(result_file(output, run.untrained()).read_text())

    (start,), (first, last) = before["evaluations"], result["evaluations"]
    assert [row["step"] for row in result["training"]] == [1, 2]
    assert [start["step"], first["step"], last["step"]] == [0, 1, 2]
    # Policy and reference are equal at the start, to the bit: the first step is DPO's.
    step = result["training"][0]
    assert (step["chosen"], step["rejected"], step["hinge_on"]) == (0.0, 0.0, 0.0)
    assert step["loss"] == pytest.approx(math.log(2), rel=1e-4)
    for name in ("held_out", "train"):
        for side in ("chosen", "rejected"):
            assert start[name][side]["change"] == 0
            change = last[name][side]["sum"] - start[name][side]["sum"]
            assert last[name][side]["change"] == pytest.approx(change, abs=2e-3)
    assert last["held_out"]["chosen"]["change"] != 0
    assert before["questions"]["questions"] == result["questions"]["questions"] == 5
    assert set(result["versions"]) >= {"torch", "transformers", "trl", "fastdpop"}
    assert str(tmp_path) not in result_file(output, run).read_text()
    assert not list(output.rglob("*.part"))


def test_both_losses_see_the_same_batches_and_differ(folder: Path, tmp_path: Path) -> None:
    source = Source("folder", folder)
    schedule = dataclasses.replace(TINY, steps=8, learning_rate=1e-2)
    dpo, dpop, ipo = (
        finish(run_of(source, loss=loss, schedule=schedule), source, tmp_path / "out")
        for loss in ("dpo", "dpop", "ipo")
    )
    assert dpo["training"][0] == dpop["training"][0]
    # Equal until the first batch with a chosen log-prob below the reference's.
    first = [step["hinge_on"] > 0 for step in dpo["training"]].index(True)
    assert [s["chosen"] for s in dpo["training"][: first + 1]] == [
        s["chosen"] for s in dpop["training"][: first + 1]
    ]
    assert dpop["training"][first]["loss"] > dpo["training"][first]["loss"]
    # Azar et al.'s IPO, of sums: (0 - 1 / (2 beta))^2 at the start.
    assert ipo["training"][0]["loss"] == pytest.approx((1 / 0.6) ** 2, rel=1e-4)


def test_bfloat16_trains_as_float32_does(folder: Path, tmp_path: Path) -> None:
    """Every step sees the weights that the last one has left."""
    source = Source("folder", folder)
    changes = []
    for precision in ("float32", "bfloat16"):
        schedule = dataclasses.replace(TINY, steps=6, learning_rate=3e-3)
        run = dataclasses.replace(run_of(source, schedule=schedule), precision=precision)
        result = finish(run, source, tmp_path / "out")
        changes.append(result["evaluations"][-1]["train"]["chosen"]["change"])
    assert changes[0] > 1
    assert changes[1] == pytest.approx(changes[0], rel=0.1)


def test_settings_and_data_change_the_key(folder: Path) -> None:
    source = Source("folder", folder)
    run = run_of(source)
    others = [
        dataclasses.replace(run, beta=0.1),
        dataclasses.replace(run, lam=5.0),
        dataclasses.replace(run, seed=1),
        dataclasses.replace(run, precision="bfloat16"),
        dataclasses.replace(run, schedule=dataclasses.replace(TINY, learning_rate=2e-3)),
    ]
    with (folder / "gsm8k" / "train.jsonl").open("a") as file:
        file.write(json.dumps(problem(7)) + "\n")
    others.append(run_of(source))
    assert len({run.key, *(other.key for other in others)}) == 7
    # The reference does not depend on the loss.
    assert run.untrained() == dataclasses.replace(run, beta=0.1).untrained()


def test_a_seed_draws_other_batches_and_the_same_held_out_pairs(folder: Path) -> None:
    source, tokenizer = Source("folder", folder), tiny_tokenizer()
    same, again, other = (
        load_sets(run_of(source, seed=seed), source, tokenizer) for seed in (0, 0, 1)
    )
    assert same == again
    assert same.held_out == other.held_out
    assert same.batches != other.batches


def test_a_small_data_set_is_gone_through_again(folder: Path) -> None:
    source = Source("folder", folder)
    run = run_of(source, schedule=dataclasses.replace(TINY, steps=5))
    batches = load_sets(run, source, tiny_tokenizer()).batches
    prompts = [tuple(group[0]["prompt_ids"]) for groups in batches for group in groups]
    assert len(prompts) == 10
    assert len(set(prompts[:5])) == len(set(prompts[5:])) == 5


def test_too_few_pairs_are_said(folder: Path) -> None:
    source = Source("folder", folder)
    run = run_of(source, schedule=dataclasses.replace(TINY, held_out=6))
    with pytest.raises(ValueError, match=r"gsm8k: 5 prompts of the test split .* expected 6"):
        load_sets(run, source, tiny_tokenizer())


def test_answers_are_those_of_plain_log_softmax(folder: Path) -> None:
    """acc and acc_norm, one sequence at a time, from the text up."""
    source, tokenizer = Source("folder", folder), tiny_tokenizer()
    model = tiny_llama(3).eval()
    sets = load_sets(run_of(source, "arc"), source, tokenizer)
    expected = {"acc": "", "acc_norm": ""}
    rows = map(json.loads, (folder / "arc_challenge" / "test.jsonl").read_text().splitlines())
    for row in rows:
        logps = []
        for choice in row["choices"]:
            prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
            answer = tokenizer(f" {choice}").input_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            logps.append(logits.log_softmax(-1)[range(len(answer)), answer].sum().item())
        normed = [logp / len(choice) for logp, choice in zip(logps, row["choices"], strict=True)]
        for name, scores in (("acc", logps), ("acc_norm", normed)):
            expected[name] += str(int(scores.index(max(scores)) == row["label"]))
    fastdpop.attach(model)
    found = answer_questions(model, sets.questions, batch=2)
    assert (found["right"], found["right_norm"]) == (expected["acc"], expected["acc_norm"])
    assert found["acc"] == expected["acc"].count("1") / 5
    assert "01" in found["right"] or "10" in found["right"]  # no constant


@pytest.mark.usefixtures("tiny")
def test_main_resumes_and_does_nothing_twice(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    calls: list[str] = []

    def perform_here(todo: Any, source: Source, output: Path, *_: Any, **__: Any) -> list[str]:
        everything = [one for run in todo for one in (run.untrained(), run)]
        for run in runner.missing(everything, output):
            calls.append(run.name)
            perform(run, source, output, load_tiny, 1)
        return []

    monkeypatch.setattr("recipes.smaug.__main__.perform_all", perform_here)
    output = tmp_path / "out"
    arguments = ["--data", str(folder), "--output", str(output)]
    assert main([*arguments, "--only", "gsm8k-dpo-beta0.3-seed0"]) == 0
    assert calls == ["gsm8k-untrained-seed0", "gsm8k-dpo-beta0.3-seed0"]
    calls.clear()
    assert main([*arguments, "--only", "gsm8k-*-beta0.3*-seed0"]) == 0
    assert "gsm8k-dpo-beta0.3-seed0" not in calls
    assert "gsm8k-untrained-seed0" not in calls
    assert "gsm8k-ipo-beta0.3-seed0" in calls
    assert (output / "figure2.png").stat().st_size > 10_000
    assert not (output / "figure6.png").exists()
    calls.clear()
    assert main([*arguments, "--only", "gsm8k-*-beta0.3*-seed0"]) == 0
    assert calls == []
    printed = capsys.readouterr().out
    assert "| gsm8k | DPOP | 0.3 | 50 |" in printed


def test_processes_do_the_untrained_run_first(folder: Path, tmp_path: Path) -> None:
    source, output = Source("folder", folder), tmp_path / "out"
    todo = [run_of(source, loss=loss) for loss in ("dpo", "dpop")]
    assert runner.perform_all(todo, source, output, load_tiny, jobs=2, threads=1) == []
    assert runner.missing(todo, output) == []
    # A reference that is lost is made again; what is finished stays.
    kept = result_file(output, todo[0]).stat().st_mtime_ns
    for path in (output / "references").iterdir():
        path.unlink()
    result_file(output, todo[1]).unlink()
    assert runner.perform_all(todo, source, output, load_tiny, jobs=1, threads=1) == []
    assert runner.missing(todo, output) == []
    assert result_file(output, todo[0]).stat().st_mtime_ns == kept


def test_a_failed_run_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    source, output = Source("folder", folder), tmp_path / "out"
    huge = run_of(source, schedule=dataclasses.replace(TINY, learning_rate=1e38, steps=3))
    (failure,) = runner.perform_all([huge], source, output, load_tiny, jobs=1, threads=1)
    assert failure.startswith("gsm8k-dpop-beta0.3-lambda50-seed0: FloatingPointError: step ")
    assert runner.missing([huge], output) == [huge]


def test_runs_are_those_of_the_issue() -> None:
    found = list(chosen_runs({"gsm8k": "x", "arc": "y"}, "float32"))
    assert len(set(found)) == len(found) == 26
    assert len({run.name for run in found}) == 26
    quick = list(chosen_runs({"gsm8k": "excerpt"}, "float32", quick=True))
    assert [run.loss for run in quick] == ["dpo", "dpop", "ipo"]


@pytest.mark.usefixtures("tiny")
def test_quick_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The excerpt's problems are enough for what quick runs watch."""
    monkeypatch.setattr(runs, "QUICK", {"gsm8k": dataclasses.replace(TINY, max_tokens=1000)})
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []

    def perform_none(todo: Any, source: Source, output: Path, *_: Any, **__: Any) -> list[str]:
        seen.extend([*todo, output])
        return []

    monkeypatch.setattr("recipes.smaug.__main__.perform_all", perform_none)
    assert main(["--quick"]) == 0
    assert [run.source for run in seen[:-1]] == ["excerpt"] * 3
    assert seen[-1] == Path("build/smaug-quick")
    sets = load_sets(seen[0], Source("excerpt"), tiny_tokenizer())
    assert len(sets.held_out) == 2


def test_the_excerpt_has_enough_problems() -> None:
    pairs = list(Source("excerpt").pairs("gsm8k", "test", 0))
    assert len(pairs) >= runs.QUICK["gsm8k"].held_out
    assert len(list(Source("excerpt").pairs("gsm8k", "train", 0))) >= runs.QUICK["gsm8k"].train


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing*"], "--only 'nothing*' matches no run"),
        (["--data", "missing"], "missing/gsm8k/train.jsonl is missing"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--data" not in arguments:
        arguments = [*arguments, "--data", str(folder)]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def fake(run: Run, end: float) -> dict[str, Any]:
    """A result whose chosen log-prob per token ends at `end`."""

    def evaluation(step: int) -> dict[str, Any]:
        value = end * step / 4 - 0.5
        names = ("sum", "change", "per_token", "before", "at", "after", "after_text", "end")
        side = dict.fromkeys(names, value)
        one = {"chosen": side, "rejected": {n: v - 1 for n, v in side.items()}, "told_apart": 0.5}
        one["by_position"] = {
            "places": [-2, -1, 0, 1, 2],
            "means": [-0.5, -0.4, -1.0, value, None],
            "pairs": [4, 4, 4, 2, 0],
        }
        return {"step": step, "held_out": one, "train": one}

    trained = run.loss != runs.UNTRAINED
    steps = [2, 4] if trained else [0]
    return {
        "name": run.name,
        "settings": dataclasses.asdict(run),
        "evaluations": [evaluation(step) for step in steps],
        "seconds": {"cpu": 100.0, "wall": 50.0},
        **({"questions": {"acc": 0.25, "acc_norm": 0.28}} if run.data == "arc" else {}),
    }


def write_fakes(output: Path) -> None:
    output.mkdir()
    for run in chosen_runs({"gsm8k": "x", "arc": "y"}, "float32"):
        end = {"dpo": -2.0, "ipo": -0.5, "dpop": 0.2}[run.loss] - 0.1 * run.seed
        for one in (run, run.untrained()):
            result_file(output, one).write_text(json.dumps(fake(one, end)))


def test_all_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_fakes(tmp_path / "out")
    paths = list(figures.draw(tables.load(tmp_path / "out"), tmp_path / "out"))
    assert [path.stem for path in paths] == [*figures.FIGURES]
    assert all(10_000 < path.stat().st_size < 150_000 for path in paths)


def test_means_and_spread_over_seeds(tmp_path: Path) -> None:
    write_fakes(tmp_path / "out")
    results = tables.load(tmp_path / "out")
    arm = tables.Arm.of("gsm8k", "dpo")
    steps, course = tables.course(results, arm, lambda e: e["held_out"]["chosen"]["per_token"])
    assert steps == [0, 2, 4]
    assert [spread.mean for spread in course] == pytest.approx([-0.5, -1.525, -2.55])
    assert (course[2].low, course[2].high) == pytest.approx((-2.6, -2.5))
    assert course[2].text(".2f") == "\N{MINUS SIGN}2.55 ± 0.05"
    assert "| gsm8k | DPO | 0.3 |  | \N{MINUS SIGN}2.5 ± 0.1 |" in tables.summary(results)


def test_two_results_of_one_run_are_refused(tmp_path: Path) -> None:
    write_fakes(tmp_path / "out")
    path = next((tmp_path / "out").glob("gsm8k-dpo-beta0.3-seed0-*"))
    path.with_name("gsm8k-dpo-beta0.3-seed0-other.json").write_text(path.read_text())
    with pytest.raises(ValueError, match="are the same run with other settings"):
        tables.load(tmp_path / "out")
