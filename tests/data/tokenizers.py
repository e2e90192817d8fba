"""Tokenizers made in the test, and chat templates in the shape of those that models come with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
    "</s>",
    "<s>",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALWAYS_ASKS = CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}" + CHATML

# Thinking of earlier turns is dropped; the last answer gets an empty one.
QWEN3 = """\
{%- set last = messages | length - 1 -%}
{%- for m in messages -%}
{%- set content = m.content.split('</think>')[-1].lstrip('\n') -%}
{%- set thoughts = m.reasoning_content or '' -%}
{%- if '</think>' in m.content -%}
{%- set thoughts = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' and loop.index0 == last -%}
{{- '<think>\n' + thoughts + '\n</think>\n\n' -}}
{%- endif -%}
{{- content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}
{{- '<think>\n\n</think>\n\n' -}}
{%- endif -%}
{%- endif -%}"""

# The generation prompt alone opens the thinking, and an answer's thinking is cut.
R1 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# The same, but nothing is cut.
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}"
    "{% if m.role == 'assistant' %}"
    "{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
    "<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
GEMMA = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set shown = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set shown = messages %}{% set system = '' %}{% endif %}"
    "{% for m in shown %}"
    "{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def byte_level(
    template: str | None = None,
    *,
    merges: Sequence[tuple[str, str]] = (),
    eos: str | None = "<|im_end|>",
    bos: str | None = None,
    adds: str = "$A",
) -> Any:
    """One token per byte but for the merges, as in GPT-2; ``adds`` is what goes around a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters += [a + b for a, b in merges]
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return _finish(inner, template, eos, bos, adds)


def sentencepiece(
    template: str | None = None, *, legacy: bool = False, adds: str = "<s> $A"
) -> Any:
    """Pieces with a dummy prefix, as in Llama 2; ``legacy`` writes it as the first files did."""
    pieces = [" 4", " a", "Q", ":", "2", "+", "=", "4", "▁"]
    pieces = ["<unk>", *(piece.replace(" ", "▁") for piece in pieces)]
    pieces += [chr(code) for code in range(33, 127) if chr(code) not in pieces] + ["\n"]
    inner = Tokenizer(models.Unigram([(piece, -1.0 * len(piece) ** 0.5) for piece in pieces], 0))
    if legacy:
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace()
    tokenizer = _finish(inner, template, "</s>", "<s>", adds)
    tokenizer.unk_token = "<unk>"
    return tokenizer


def _finish(inner: Tokenizer, template: str | None, eos: Any, bos: Any, adds: str) -> Any:
    inner.add_special_tokens(SPECIAL)
    ids = [(token, inner.token_to_id(token)) for token in SPECIAL]
    inner.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer
