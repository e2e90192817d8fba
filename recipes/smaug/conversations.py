"""Conversations for supervised fine-tuning, of the three data sets of Smaug-34B's first stage, in one file:

    python conversations.py NAME:FILE [NAME:FILE ...] --out conversations.jsonl

A source is a data set of the Hub, or a folder of its name here, and a file in it. Rows are told by their fields:
those of MetaMathQA (`query`, `response`), of ORCA-Chat (`instruction`, `conversation` of `input` and `output`) and of
ShareGPT (`conversations` of `from` and `value`). Each line of the result has the `messages` of one conversation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
"""ShareGPT's names of who speaks."""


def messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The turns of a row, from the first of a user, or of the system before it, to the last answer.

    Raises:
        ValueError: the row is none of the three data sets'.
    """
    if {"query", "response"} <= row.keys():
        turns = [("user", row["query"]), ("assistant", row["response"])]
    elif {"instruction", "conversation"} <= row.keys():
        turns = [("system", row["instruction"])] if row["instruction"] else []
        for both in row["conversation"]:
            turns += [("user", both["input"]), ("assistant", both["output"])]
    elif "conversations" in row:
        turns = [(_role(turn["from"]), turn["value"]) for turn in row["conversations"]]
    else:
        raise ValueError(
            f"the fields are {sorted(row)}, expected query and response, instruction and conversation, or conversations"
        )
    while turns and turns[0][0] == "assistant":
        turns = turns[1:]
    while turns and turns[-1][0] == "user":
        turns = turns[:-1]
    return [{"role": role, "content": text} for role, text in turns]


def _role(name: str) -> str:
    if name not in _ROLES:
        raise ValueError(f"field 'from' is {name!r}, expected one of {sorted(_ROLES)}")
    return _ROLES[name]


def takes_turns(conversation: list[dict[str, str]]) -> bool:
    """Whether a user and the assistant speak in turn, after at most one turn of the system."""
    roles = [message["role"] for message in conversation]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    return bool(roles) and roles == ["user", "assistant"] * (len(roles) // 2)


def write(sources: list[str], out: Path) -> list[str]:
    """Write the conversations of all sources, and say of each how many there are, and were left out.

    Raises:
        ValueError, OSError: a source cannot be read, or holds other rows; the message names it.
    """
    notes = []
    with open(out, "w", encoding="utf-8") as file:
        for source in sources:
            name, _, inside = source.partition(":")
            kept = left_out = 0
            rows = datasets.load_dataset(name, data_files=inside or None, split="train")
            for number, row in enumerate(rows, 1):
                try:
                    conversation = messages(row)
                except ValueError as error:
                    raise ValueError(f"{source}: row {number}: {error}") from None
                if takes_turns(conversation):
                    file.write(json.dumps({"messages": conversation}, ensure_ascii=False) + "\n")
                    kept += 1
                else:
                    left_out += 1
            notes.append(f"{source}: {kept} conversations, {left_out} without turns left out")
    return notes


def main() -> None:
    """Read the command line, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="+", metavar="NAME:FILE")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    args = parser.parse_args()
    try:
        print("\n".join(write(args.sources, args.out)))
    except (ValueError, OSError) as error:
        parser.exit(1, f"conversations.py: error: {error}\n")


if __name__ == "__main__":
    main()
