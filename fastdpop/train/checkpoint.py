"""The checkpoints of a run: which of them are whole, and which run may go on from them.

TRL writes a checkpoint file by file. A marker stands in its folder until all are written; then a
manifest takes its place, with a checksum of each file, and with the settings and data of the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "fastdpop.json"
_INCOMPLETE = "fastdpop-incomplete"
_MODEL_FILES = ("config.json", "adapter_config.json")
_STATE = "trainer_state.json"  # Trainer's

WARM_UP = "warmup_steps"
HELD_OUT, DECIDES = "held-out pairs", "decided by evaluations"
NOTHING = "nothing"
"""Names of an identity, and of the latter the value with which held-out pairs do not matter for what comes out."""

Identity = Mapping[str, str]
"""What a checkpoint and the run that goes on from it must agree on, by name."""


def begin(folder: Path) -> None:
    """Mark a checkpoint that is about to be written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _INCOMPLETE).touch()


def marked(folder: Path) -> bool:
    """Whether what is in a folder was not written to its end."""
    return (folder / _INCOMPLETE).exists()


def end(folder: Path) -> None:
    """Take the mark of :func:`begin` away."""
    (folder / _INCOMPLETE).unlink(missing_ok=True)


def seal(folder: Path, identity: Identity) -> None:
    """Say that a checkpoint is whole, once every process has written its part."""
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (MANIFEST, _INCOMPLETE)
    )
    manifest = {"identity": dict(identity), "files": _checksums(folder, names)}
    partial = folder / (MANIFEST + ".partial")
    partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / MANIFEST)
    end(folder)


def prune(output: Path, keep: int | None, best: str | None) -> None:
    """Delete all but the newest `keep` checkpoints; the best one stays, too."""
    for folder in checkpoints(output)[keep:] if keep else ():
        if best is None or folder.resolve() != Path(best).resolve():
            shutil.rmtree(folder)


def checkpoints(output: Path) -> list[Path]:
    """The folders of checkpoints, newest first."""
    found = [
        (int(match[1]), path)
        for path in (output.iterdir() if output.is_dir() else ())
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def open_run(output: Path, resume: bool, identity: Identity) -> tuple[Path | None, list[str]]:
    """Look at a run's folder before the run begins.

    Args:
        output: the folder; it need not exist.
        resume: whether to go on from what is there.
        identity: of the run.

    Returns:
        The checkpoint to go on from, None for a start from the beginning; and what to tell the user.

    Raises:
        FileExistsError: the folder holds a run, and `resume` is False; or a model and no checkpoint.
        ValueError: the newest checkpoint is damaged, or belongs to other settings or data.
    """
    notes = []
    if ".." in output.parts:  # through a folder that need not be there yet
        output = output.resolve()
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file, expected a folder for the run")
    for folder in checkpoints(output):
        if marked(folder) and not (folder / MANIFEST).exists():
            shutil.rmtree(folder)
            notes.append(f"{folder} had not been written to its end, and was removed.")
    whole = checkpoints(output)
    if whole and not resume:
        raise FileExistsError(
            f"{output} already holds a run ({whole[0].name}): go on with --resume, or choose another folder"
        )
    if whole:
        verify(whole[0], identity)
        return whole[0], notes
    if ended(output):
        raise FileExistsError(f"{output} already holds a model: choose another folder")
    if resume:
        notes.append(f"No checkpoint in {output}: starting from the beginning.")
    return None, notes


def step(folder: Path) -> int:
    """After which step a checkpoint was written."""
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    return int(state["global_step"])


def ended(output: Path) -> bool:
    """Whether a run's folder holds the model that it was to make, and not one that another was to take the place of."""
    return any((output / name).exists() for name in _MODEL_FILES) and not marked(output)


def make(output: Path) -> None:
    """Make the folder that ``--output`` names, if it is not there.

    Raises:
        OSError: it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"--output is {str(output)!r}, expected a folder that is there or can be made: {error.strerror}"
        ) from None


def check_named(folder: Path, output: Path) -> None:
    """Look at what ``--resume_from_checkpoint`` names, and at the folder of the run that goes on from it.

    Raises:
        ValueError: it is no checkpoint.
        FileExistsError: the folder holds a model, and is not that of the checkpoint.
    """
    if not (folder / _STATE).is_file():
        raise ValueError(
            f"--resume_from_checkpoint is {str(folder)!r}, expected the folder of a checkpoint, with its {_STATE}"
        )
    if ended(output.resolve()) and folder.resolve().parent != output.resolve():
        raise FileExistsError(f"{output} already holds a model: choose another folder")


def held_out(folder: Path) -> str | None:
    """What a checkpoint that was verified says of its run's held-out pairs."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    found: str | None = manifest["identity"].get(HELD_OUT)
    return found


def verify(folder: Path, identity: Identity) -> None:
    """Check that a checkpoint is as it was written, and belongs to this run.

    Raises:
        ValueError: it is damaged, or of other settings or data; the message names what differs.
    """
    other = f"To go on from an earlier checkpoint, remove {folder}"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, saved = dict(manifest["files"]), dict(manifest["identity"])
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {MANIFEST}: it was not written by fastdpop train. "
            "--resume_from_checkpoint takes it as it is"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error}. {other}") from None
    free: tuple[str, ...] = ()
    if NOTHING in (saved.get(DECIDES), identity.get(DECIDES)):
        free = (HELD_OUT, DECIDES)
    changes = [
        f"{name}: {saved.get(name)} then, {identity.get(name)} now"
        for name in sorted({*identity, *saved})
        if saved.get(name) != identity.get(name) and name not in free
    ]
    if changes:
        text = f"{folder} belongs to another run; " + "; ".join(changes)
        # Its default depends on how long a run is.
        if len(changes) == 1 and changes[0].startswith(WARM_UP):
            text += f". Go on with --warmup {saved[WARM_UP]}"
        raise ValueError(text)
    if not any("optimizer" in name or name.startswith("global_step") for name in files):
        raise ValueError(
            f"{folder} holds no state of an optimizer (--save_only_model): nothing can go on from it"
        )
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing. {other}")
    for name, found in _checksums(folder, files).items():
        if found != files[name]:
            raise ValueError(f"{folder / name} is damaged: its checksum has changed. {other}")


def _checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """By name. Those of a sharded checkpoint are many and large: several at a time."""
    names = list(names)
    with ThreadPoolExecutor(8) as threads:
        return dict(
            zip(names, threads.map(lambda name: _checksum(folder / name), names), strict=True)
        )


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
