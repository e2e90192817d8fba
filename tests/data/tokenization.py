"""Small datasets of pairs, and their tokenisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, Value
from trl import DPOConfig

from fastdpop.data.tokens import tokenize

WARNINGS = ["ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*fork:RuntimeWarning"]
"""Of what TRL imports."""
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": content, **more}]


def pair(prompt: Any, chosen: Any = "4", rejected: Any = "5", **more: Any) -> dict[str, Any]:
    """A row of text; one of messages where ``prompt`` is a list."""
    if isinstance(prompt, list):
        chosen, rejected = (
            answer(completion) if isinstance(completion, str) else completion
            for completion in (chosen, rejected)
        )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def dataset(*rows: dict[str, Any]) -> Dataset:
    """Rows as `fastdpop.data` gives them, from ``pairs.jsonl:1`` on."""
    chat = isinstance(rows[0]["prompt"], list)
    kinds: dict[str, Any] = {name: Value("string") for name in rows[0]}
    if chat:
        kinds |= {name: List(Json()) for name in ("prompt", "chosen", "rejected")}
    if "chat_template_kwargs" in kinds:
        kinds["chat_template_kwargs"] = Json()
    rows_ = [
        row
        | ({"tools": json.dumps(row["tools"])} if row.get("tools") else {})
        | {"place": f"pairs.jsonl:{i}"}
        for i, row in enumerate(rows, 1)
    ]
    return Dataset.from_list(rows_, features=Features(kinds | {"place": Value("string")}))


def arguments(folder: str | Path = "unused", **options: Any) -> Any:
    defaults = {"bf16": False, "gradient_checkpointing": False, "report_to": [], "use_cpu": True}
    return DPOConfig(output_dir=str(folder), **{**defaults, **options})


def tokens(data: Any, tokenizer: Any, **options: Any) -> tuple[Dataset, int]:
    if isinstance(data, dict):
        data = dataset(data)
    return tokenize(data, tokenizer, **{"progress": False, **options})


def texts(data: Any, tokenizer: Any, **options: Any) -> tuple[str, str, str]:
    """What is trained on of the first pair, as text."""
    row = tokens(data, tokenizer, **options)[0][0]
    prompt, chosen, rejected = (
        tokenizer.decode(row[f"{field}_ids"]) for field in ("prompt", "chosen", "rejected")
    )
    return prompt, chosen, rejected
