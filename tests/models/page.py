"""docs/models.md, from the outcomes of a sweep."""

from __future__ import annotations

from collections import Counter

import transformers

from tests.models.outcome import Outcome
from tests.models.shrink import LEFT_OUT

# What people call the types that most of them use; these come first, in this order.
POPULAR = {
    "llama": "Llama 2 to 3.3, SmolLM2, TinyLlama, Yi, Vicuna",
    "qwen3": "Qwen3",
    "qwen2": "Qwen1.5, Qwen2, Qwen2.5, QwQ",
    "mistral": "Mistral 7B, Zephyr, Mistral Nemo",
    "gemma3_text": "Gemma 3 270M and 1B",
    "gemma3": "Gemma 3 4B to 27B",
    "gemma2": "Gemma 2",
    "phi3": "Phi-3, Phi-3.5-mini, Phi-4",
    "gpt_oss": "gpt-oss-20b, gpt-oss-120b",
    "qwen3_moe": "Qwen3-30B-A3B, Qwen3-235B-A22B",
    "qwen3_next": "Qwen3-Next",
    "deepseek_v3": "DeepSeek-V3, DeepSeek-R1",
    "mixtral": "Mixtral 8x7B and 8x22B",
    "llama4": "Llama 4",
    "smollm3": "SmolLM3",
    "olmo2": "OLMo 2",
    "granite": "Granite 3",
    "glm4": "GLM-4 0414",
    "glm4_moe": "GLM-4.5",
    "cohere": "Command R",
    "cohere2": "Command R7B, Command A",
    "falcon": "Falcon",
    "gpt_neox": "Pythia, GPT-NeoX",
    "gpt2": "GPT-2",
}


def page(outcomes: list[Outcome]) -> str:
    """docs/models.md: a table of those that are right, the popular ones first, and why others are not."""
    right = [outcome for outcome in outcomes if outcome.error is None]
    wrong = [outcome for outcome in outcomes if outcome.error is not None]
    places = {name: place for place, name in enumerate(POPULAR)}
    right.sort(key=lambda outcome: (places.get(outcome.name, len(places)), outcome.name))
    lines = [
        "---",
        "description: Which of transformers' causal language models agree with their own full logits, and which share "
        "prefixes.",
        "---",
        "# Tested models",
        "",
        "<!-- Written by `make models`: change tests/models/page.py instead. -->",
        "",
        f"transformers {transformers.__version__} has {len(outcomes)} types of model that `AutoModelForCausalLM` "
        "builds. `make models` makes a tiny random one of each, [attaches](attach.md) it and compares the loss, the "
        "log-probs and the gradient of every parameter with those of the model's own full logits in fp32. "
        f"**{len(right)} agree.** fastdpop has no code for any of them: a new architecture, or one of your own, works "
        "by the same rules, and the check in `attach` compares it before you train.",
        "",
        "## Types that agree",
        "",
        "Look for a model by its name, or by its type, which stands in its `config.json` as `model_type`; the popular "
        "types come first. With [`share_prefixes`](sharing.md) a type is *shared*, common tokens computed once, or "
        "*padded*, as without it. In the last column *tied* is a weight that the embedding shares, and *router loss* "
        "that of a mixture of experts, which is kept.",
        "",
        '<div class="filterable" data-filter="Find a model: Llama-3.1-8B" data-none="No type and no name in this '
        "table has that. A model's type stands in its config.json as model_type; one that is not here is compared "
        'with its own logits when it is attached." markdown>',
        "",
        "| type | models of this type | with `share_prefixes` | its lm_head, beyond a matrix of its own |",
        "|---|---|---|---|",
        *(_row(outcome) for outcome in right),
        "",
        "</div>",
        "",
        "## Shared prefixes",
        "",
        "With [`share_prefixes`](sharing.md) each model then computes two pairs again, with a common prompt, different "
        "lengths and padding, and every number is compared with those without. What cannot share says so once, with "
        "the reason, and computes the padded batch. The shrunken models stand for their type; a larger one may have "
        "other layers.",
        "",
        "| | types |",
        "|---|---|",
        *(f"| {kind} | {count} |" for kind, count in Counter(map(_sharing, right)).most_common()),
        "",
        "## Types that are left out",
        "",
        "| type | why |",
        "|---|---|",
        *(f"| `{o.name}` | {LEFT_OUT.get(o.name) or _short(o.error)} |" for o in wrong),
        "",
    ]
    return "\n".join(lines)


_REASONS = {
    "whose state runs along": "padded: layers whose state runs along the sequence",
    "takes no position_ids": "padded: positions cannot be given",
    "attention by itself": "padded: attention of their own, not transformers' interface",
}


def _sharing(outcome: Outcome) -> str:
    known = (kind for text, kind in _REASONS.items() if text in outcome.reason)
    other = "padded: attention that uses its mask in ways of its own"
    return outcome.sharing if outcome.sharing != "padded" else next(known, other)


def _row(outcome: Outcome) -> str:
    head = [*outcome.head, *(["router loss"] if outcome.router_loss else [])]
    known_as = POPULAR.get(outcome.name, "")
    return f"| `{outcome.name}` | {known_as} | {_sharing(outcome)} | {', '.join(head)} |"


def _short(error: str | None) -> str:
    text = (error or "").replace("|", "\\|")
    return text if len(text) <= 160 else text[:157] + "..."
