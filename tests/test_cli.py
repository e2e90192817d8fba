"""The command line, without ``fastdpop train``, whose tests are in tests/train."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdpop
from fastdpop.cli import main
from tests.tiny_model import CHATML, tiny_llama, tiny_tokenizer


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ([], 2),
        (["nonsense"], 2),
        (["demo", "--steps", "0"], 2),
        (["demo", "--threads", "9" * 23], 2),
        (["--help"], 0),
        (["demo", "--help"], 0),
    ],
)
def test_usage(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == code
    said = capsys.readouterr()
    assert "usage:" in (said.err if code else said.out)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for name in ("train", "trl", "pairs", "analyze", "demo", "doctor"):
        assert f"\n    {name} " in said


def test_train_without_arguments_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert "usage: fastdpop train" in capsys.readouterr().out


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fastdpop", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"fastdpop {fastdpop.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "unbuffered"),
    [(["train", "--help"], ""), (["train", "--help"], "1"), (["pairs", "--help"], "")],
)
def test_nothing_is_said_where_nobody_reads(argv: list[str], unbuffered: str) -> None:
    """As behind ``fastdpop train --help | head -0``, which is gone before the first line comes."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "fastdpop", *argv],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 141


def test_a_pipe_that_is_not_the_output_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("fastdpop.cli.doctor.run", broken)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "fastdpop: error: [Errno 32] Broken pipe\n"


def test_what_ends_a_command_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code, said in (
        (KeyboardInterrupt(), 130, "\nfastdpop: interrupted\n"),
        (FileNotFoundError(2, "No such file", "/x"), 1, "fastdpop: error: /x: No such file\n"),
        (OSError("the disk is gone"), 1, "fastdpop: error: the disk is gone\n"),
    ):

        def fail(error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("fastdpop.doctor.facts", fail)
        assert main(["doctor"]) == code
        assert capsys.readouterr().err == said


def test_a_terminal_without_the_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdpop.doctor.report", lambda _: "1 \xb1 2")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["doctor"]) == 0
    assert out.buffer.getvalue() == b"1 ? 2\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("given", "then"), [(None, "1"), ("0", "0")])
def test_telemetry_is_off_unless_it_is_asked_for(
    given: str | None, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "HF_HUB_DISABLE_TELEMETRY"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    if given is not None:
        monkeypatch.setenv(name, given)
    monkeypatch.setattr("fastdpop.doctor.report", lambda _: "")
    main(["doctor"])
    assert os.environ[name] == then


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastdpop {fastdpop.__version__}\n"


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said
    assert any(line.startswith("  -> ") for line in said.splitlines())


@pytest.mark.parametrize(
    ("dpo", "dpop", "steps", "code"),
    [(-9.0, 3.0, 60, 0), (-1.0, 3.0, 60, 1), (-9.0, -1.0, 60, 1), (-1.0, 3.0, 2, 0)],
)
def test_demo_reports_draws_and_judges(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    dpo: float,
    dpop: float,
    steps: int,
    code: int,
) -> None:
    """The demo with its model and its training replaced; `make demo` runs the real ones."""
    pytest.importorskip("trl")
    from fastdpop import demo

    ends = {"DPO": dpo, "DPOP": dpop}

    def fake_train(*_: Any, title: str) -> list[dict[str, float]]:
        names = ("logratios/chosen_standard_error", "logratios/rejected_standard_error")
        rest = {f"eval_{name}": 0.5 for name in (*names, "rewards/accuracies")}
        return [
            {"step": step, "eval_logratios/chosen": y, "eval_logratios/rejected": y - 1, **rest}
            for step, y in ((0, 0.0), (steps, ends[title]))
        ]

    monkeypatch.setattr(demo, "load_smollm2", lambda: (tiny_llama(), tiny_tokenizer(CHATML)))
    monkeypatch.setattr(demo, "train", fake_train)
    threads = torch.get_num_threads()
    arguments = ["--output", str(tmp_path / "new"), "--steps", str(steps)]
    assert main(["demo", *arguments]) == code
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "times less likely" in said
    assert ("not what was expected" in said) == (code == 1)
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "new" / "demo.json").read_text())
    assert written["held_out"]["DPO"][-1]["eval_logratios/chosen"] == dpo
