"""Which checkpoints a run may go on from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastdpop.train import checkpoint

IDENTITY = {"beta": "0.3", "training pairs": "abc"}


def make(output: Path, step: int, identity: dict[str, str] = IDENTITY) -> Path:
    folder = output / f"checkpoint-{step}"
    checkpoint.begin(folder)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "deep").mkdir()
    (folder / "deep" / "optimizer.pt").write_bytes(b"state")
    checkpoint.seal(folder, identity)
    return folder


def test_a_run_goes_on_from_the_newest(tmp_path: Path) -> None:
    folders = [make(tmp_path, step) for step in (2, 10, 9)]
    assert checkpoint.open_run(tmp_path, True, IDENTITY) == (folders[1], [])
    assert sorted(p.name for p in folders[1].iterdir()) == [
        "deep",
        "fastdpop.json",
        "model.safetensors",
    ]


def test_a_fresh_folder(tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert checkpoint.open_run(new, False, IDENTITY) == (None, [])
    assert not new.exists()
    start, notes = checkpoint.open_run(new, True, IDENTITY)
    assert start is None
    assert notes == [f"No checkpoint in {new}: starting from the beginning."]


def test_a_checkpoint_that_was_not_finished_is_removed(tmp_path: Path) -> None:
    """A run that is killed while it writes: the one before is gone on from, or the run starts again."""
    whole = make(tmp_path, 2)
    torn = tmp_path / "checkpoint-4"
    checkpoint.begin(torn)
    (torn / "model.safetensors").write_bytes(b"half")
    start, notes = checkpoint.open_run(tmp_path, True, IDENTITY)
    assert start == whole
    assert notes == [f"{torn} had not been written to its end, and was removed."]
    assert not torn.exists()

    first = tmp_path / "first"
    checkpoint.begin(first / "checkpoint-1")
    assert checkpoint.open_run(first, False, IDENTITY)[0] is None


def test_a_seal_that_was_interrupted(tmp_path: Path) -> None:
    """Between the manifest and the marker's end: it is whole."""
    folder = make(tmp_path, 2)
    (folder / checkpoint._INCOMPLETE).touch()
    assert checkpoint.open_run(tmp_path, True, IDENTITY)[0] == folder


@pytest.mark.parametrize("count", [1, 64])
def test_flipped_bytes_are_found(tmp_path: Path, count: int) -> None:
    folder = make(tmp_path, 2)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    for i in range(count):
        content[100 * i + 7] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"model\.safetensors is damaged: its checksum has changed"
    ) as error:
        checkpoint.open_run(tmp_path, True, IDENTITY)
    assert f"To go on from an earlier checkpoint, remove {folder}" in str(error.value)


@pytest.mark.parametrize("length", [0, 100])
def test_files_cut_short_or_missing(tmp_path: Path, length: int) -> None:
    path = make(tmp_path, 2) / "deep" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:length][:3])
    with pytest.raises(ValueError, match=r"optimizer\.pt is damaged"):
        checkpoint.open_run(tmp_path, True, IDENTITY)
    path.unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing"):
        checkpoint.open_run(tmp_path, True, IDENTITY)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3, "identity": {}}', '"x"'])
def test_a_damaged_manifest(tmp_path: Path, text: str) -> None:
    (make(tmp_path, 2) / "fastdpop.json").write_text(text)
    with pytest.raises(ValueError, match=r"fastdpop\.json is damaged"):
        checkpoint.open_run(tmp_path, True, IDENTITY)


def test_a_checkpoint_of_another_program(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="it was not written by fastdpop train"):
        checkpoint.open_run(tmp_path, True, IDENTITY)
    with pytest.raises(FileExistsError, match=r"already holds a run \(checkpoint-3\)"):
        checkpoint.open_run(tmp_path, False, IDENTITY)
    assert (tmp_path / "checkpoint-3").exists()


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    folder = make(tmp_path, 2)
    with pytest.raises(
        ValueError, match=f"{folder} belongs to another run; beta: 0.3 then, 0.1 now"
    ):
        checkpoint.open_run(tmp_path, True, {**IDENTITY, "beta": "0.1"})


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    make(tmp_path, 2)
    with pytest.raises(FileExistsError, match="go on with --resume"):
        checkpoint.open_run(tmp_path, False, IDENTITY)
    model = tmp_path / "model"
    model.mkdir()
    (model / "adapter_config.json").write_text("{}")
    for resume in (False, True):  # there is nothing to go on from, and nothing to write over
        with pytest.raises(FileExistsError, match="already holds a model"):
            checkpoint.open_run(model, resume, IDENTITY)
    with pytest.raises(FileExistsError, match="is a file, expected a folder"):
        checkpoint.open_run(model / "adapter_config.json", False, IDENTITY)


def test_a_model_that_was_not_written_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    checkpoint.begin(tmp_path)
    assert checkpoint.open_run(tmp_path, False, IDENTITY) == (None, [])
    checkpoint.end(tmp_path)
    with pytest.raises(FileExistsError, match="already holds a model"):
        checkpoint.open_run(tmp_path, False, IDENTITY)


def test_a_checkpoint_without_an_optimizer(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    checkpoint.begin(folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    checkpoint.seal(folder, IDENTITY)
    with pytest.raises(ValueError, match="holds no state of an optimizer"):
        checkpoint.open_run(tmp_path, True, IDENTITY)


def test_old_checkpoints_are_deleted(tmp_path: Path) -> None:
    folders = {step: make(tmp_path, step) for step in (1, 2, 3, 4)}
    checkpoint.prune(tmp_path, None, None)
    assert all(folder.exists() for folder in folders.values())
    checkpoint.prune(tmp_path, 2, str(folders[1]))
    assert [step for step, folder in folders.items() if folder.exists()] == [1, 3, 4]


def test_the_manifest_is_plain(tmp_path: Path) -> None:
    manifest = json.loads((make(tmp_path, 2) / "fastdpop.json").read_text())
    assert manifest["identity"] == IDENTITY
    assert set(manifest["files"]) == {"model.safetensors", "deep/optimizer.pt"}
