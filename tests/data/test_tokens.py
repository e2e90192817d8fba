"""The token ids of pairs: TRL's, the text's own, with one end, and none too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk
from datasets.fingerprint import Hasher
from trl import DPOTrainer

from fastdpop.data import tokens as module
from fastdpop.data.tokenizer import PairTokenizer
from tests.data.tokenization import (
    TOOL,
    WARNINGS,
    answer,
    arguments,
    dataset,
    pair,
    texts,
    tokens,
    user,
)
from tests.data.tokenizers import (
    ALWAYS_ASKS,
    CHATML,
    HARMONY,
    LLAMA2,
    MISTRAL,
    QWEN3,
    R1,
    THINKS,
    TOOLS,
    byte_level,
    sentencepiece,
)
from tests.tiny_model import tiny_llama

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]

ASKED = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
CHAT = [user("2+2?")]
SLICES = pytest.mark.skipif(module._TRL_SLICES, reason="this TRL cuts by the prompt's length")
LEFT_OUT = "ends the prompt alone with '<think>.n', which is not there when an answer follows"


def whole(tokenizer: Any, *messages: dict[str, Any], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template([*messages], **options)["input_ids"])


# ------------------------------------------------------------------------------------------ TRL's


@pytest.mark.parametrize(
    ("template", "rows"),
    [
        (None, [pair("2+2=", "4", "5, no"), pair("a b", " c", "")]),
        (CHATML, [pair([user("2+2?")], "4", ""), pair([user("x"), *answer("y"), user("z")])]),
        (TOOLS, [pair(CHAT, tools=[TOOL]), pair(CHAT, tools=None)]),
        (
            QWEN3,
            [
                pair(CHAT, chat_template_kwargs={"enable_thinking": False}),
                pair(CHAT, "<think>\nsum\n</think>\n\n4", chat_template_kwargs={}),
            ],
        ),
    ],
    ids=["text", "messages", "tools", "options"],
)
def test_ids_are_those_of_a_trainer(tmp_path: Path, template: Any, rows: list[Any]) -> None:
    tokenizer = byte_level(template)
    tokenizer.pad_token = "</s>"
    data = dataset(*rows)
    ours, dropped = tokens(data, tokenizer)
    trainer = DPOTrainer(
        tiny_llama(),
        ref_model=tiny_llama(),
        args=arguments(tmp_path, max_length=None),
        train_dataset=data,
        processing_class=tokenizer,
    )
    fields = ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert dropped == 0
    assert ours.column_names == [*fields, "place"]
    assert ours.select_columns(fields)[:] == trainer.train_dataset.select_columns(fields)[:]


def test_ids_by_several_processes_are_the_same() -> None:
    rows = dataset(*(pair([user(f"{n}?")], f"{n}", f"{n + 1}") for n in range(6)))
    tokenizer = byte_level(CHATML)
    alone, _ = tokens(rows, tokenizer)
    several, _ = tokens(rows, tokenizer, num_proc=2)
    assert alone[:] == several[:]


# ------------------------------------------------------------------- what templates write in front


@pytest.mark.parametrize(
    ("template", "chosen", "options", "expected"),
    [
        (CHATML, "4", {}, (ASKED, "4<|im_end|>\n")),
        (QWEN3, "4", {}, (ASKED, "<think>\n\n</think>\n\n4<|im_end|>\n")),
        (
            QWEN3,
            "<think>\nsum\n</think>\n\n4",
            {},
            (ASKED, "<think>\nsum\n</think>\n\n4<|im_end|>\n"),
        ),
        (
            QWEN3,
            "4",
            {"enable_thinking": False},
            (ASKED + "<think>\n\n</think>\n\n", "4<|im_end|>\n"),
        ),
        (
            THINKS,
            "<think>\nsum\n</think>\n\n4",
            {},
            (ASKED + "<think>\n", "sum\n</think>\n\n4<|im_end|>\n"),
        ),
        (
            HARMONY,
            "4",
            {},
            (
                "<|start|>user<|message|>2+2?<|end|><|start|>assistant",
                "<|channel|>final<|message|>4<|return|>",
            ),
        ),
    ],
)
def test_prompt_and_completion_are_the_whole_conversation(
    template: str, chosen: str, options: dict[str, Any], expected: tuple[str, str]
) -> None:
    tokenizer = byte_level(template)
    row = pair(CHAT, chosen, chosen.replace("4", "5"), chat_template_kwargs=options)
    made = tokens(row, tokenizer)[0][0]
    assert (tokenizer.decode(made["prompt_ids"]), tokenizer.decode(made["chosen_ids"])) == expected
    for field in ("chosen", "rejected"):
        ids = made["prompt_ids"] + made[f"{field}_ids"]
        assert ids == whole(tokenizer, *CHAT, *row[field], **options)


@SLICES
def test_thinking_that_only_a_generation_prompt_opens_is_reported(caplog: Any) -> None:
    tokenizer = byte_level(R1)
    rows = dataset(pair(CHAT), pair(CHAT))
    with pytest.warns(UserWarning, match=rf"^pairs.jsonl:1 and 1 more: .*{LEFT_OUT}"):
        prompt, chosen, rejected = texts(rows, tokenizer)
    assert not caplog.text  # TRL's own words for it
    # As it is: the template gives the model no place to train what it is asked for.
    assert (prompt, chosen, rejected) == (
        "<|im_start|>user\n2+2?<|im_end|><|im_start|>assistant\n",
        "4<|im_end|>",
        "5<|im_end|>",
    )


@SLICES
def test_one_completion_with_thinking_shares_the_prompt_with_one_without() -> None:
    tokenizer = byte_level(THINKS)
    row = pair(CHAT, "<think>\nsum\n</think>\n\n4", "5")
    with pytest.warns(UserWarning, match=LEFT_OUT):
        made = texts(row, tokenizer)
    assert made == (ASKED, "<think>\nsum\n</think>\n\n4<|im_end|>\n", "5<|im_end|>\n")


def test_a_release_that_cuts_by_length_is_refused_where_it_mangles(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_TRL_SLICES", True)
    assert texts(pair(CHAT), byte_level(QWEN3))[0] == ASKED
    for row, tokenizer in (
        (pair(CHAT), byte_level(R1)),
        (pair("2+2= ", "4"), byte_level(merges=[("Ġ", "4")])),
    ):
        with pytest.raises(
            ValueError, match=r"^pairs.jsonl:1: the tokens of the prompt .* TRL 1.15 or later"
        ):
            tokens(row, tokenizer)


# ----------------------------------------------------------------------------- the text's own tokens


@pytest.mark.parametrize("legacy", [False, True])
def test_no_space_comes_between_prompt_and_completion(legacy: bool) -> None:
    tokenizer = sentencepiece(legacy=legacy)
    made = tokens(pair("Q: 2+2=", "4"), tokenizer)[0][0]
    pieces = ["<s>", "▁", "Q", ":", "▁", "2", "+", "2", "="]
    assert tokenizer.convert_ids_to_tokens(made["prompt_ids"]) == pieces
    assert tokenizer.convert_ids_to_tokens(made["chosen_ids"]) == ["4", "</s>"]
    assert made["prompt_ids"] + made["chosen_ids"] == tokenizer("Q: 2+2=4</s>")["input_ids"]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("template", "end"), [(LLAMA2, ["▁", "</s>"]), (MISTRAL, ["</s>"])])
def test_templates_of_llama_and_mistral_get_one_space(
    template: str, end: list[str], legacy: bool
) -> None:
    tokenizer = sentencepiece(template, legacy=legacy)
    row = pair([user("2+2="), *answer("4"), user("a")])
    made = tokens(row, tokenizer)[0][0]
    assert tokenizer.convert_ids_to_tokens(made["chosen_ids"]) == ["▁4", *end]
    ids = whole(tokenizer, *row["prompt"], *row["chosen"])
    assert made["prompt_ids"] + made["chosen_ids"] == ids


@SLICES
def test_a_token_across_the_boundary_is_reported_and_the_text_kept() -> None:
    tokenizer = byte_level(merges=[("Ġ", "4")])
    with pytest.warns(UserWarning, match=r"pairs.jsonl:1: .* make one token, .* with ' 4'"):
        made = tokens(pair("2+2= ", "4", "5"), tokenizer)[0][0]
    assert tokenizer.decode(made["prompt_ids"]) == "2+2="
    assert tokenizer.convert_ids_to_tokens(made["chosen_ids"]) == ["Ġ4", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(made["rejected_ids"]) == ["Ġ", "5", "<|im_end|>"]


def test_text_unknown_to_the_tokenizer_is_reported() -> None:
    rows = dataset(pair("Q", "4"), pair("Q", "é"))
    with pytest.warns(UserWarning, match=r"^pairs.jsonl:2: .* reaches the model as '<unk>'"):
        tokens(rows, sentencepiece())


# ------------------------------------------------------------------------------------------ one end


@pytest.mark.parametrize("chosen", ["4", "4<|im_end|>"])
def test_text_ends_once(chosen: str) -> None:
    assert texts(pair("2+2=", chosen), byte_level()) == ("2+2=", "4<|im_end|>", "5<|im_end|>")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (pair("2=", "4<|im_end|>\n"), ("2=", "4<|im_end|>", "5<|im_end|>")),
        (
            pair("2=<|im_end|>", "4<|im_end|> <|im_end|>"),
            ("2=<|im_end|>", "4<|im_end|>", "5<|im_end|>"),
        ),
        (pair(CHAT, "4<|im_end|>"), (ASKED, "4<|im_end|>\n", "5<|im_end|>\n")),
        (pair(CHAT, "4", "5<|im_end|>\n"), (ASKED, "4<|im_end|>\n", "5<|im_end|>\n")),
        (pair(CHAT, "4 <|im_end|><|im_end|>"), (ASKED, "4 <|im_end|>\n", "5<|im_end|>\n")),
    ],
)
def test_an_end_in_the_text_is_not_doubled(row: dict[str, Any], expected: Any) -> None:
    rows = dataset(row, pair(row["prompt"]))
    with pytest.warns(UserWarning, match=r"^pairs.jsonl:1: a completion brings an end of turn"):
        assert texts(rows, byte_level(CHATML)) == expected


def test_a_template_without_ends_leaves_them_to_the_text() -> None:
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    made = texts(pair(CHAT, "4<|im_end|>"), byte_level(bare))
    assert made == ("user: 2+2?\n", "assistant: 4<|im_end|>\n", "assistant: 5\n")


def test_a_tokenizer_that_ends_every_text_ends_completions_once() -> None:
    tokenizer = byte_level(eos="</s>", bos="<s>", adds="<s> $A </s>")
    with pytest.warns(UserWarning, match="and 1 more: the tokenizer ends every text with"):
        made = texts(dataset(pair("2+2="), pair("2+2=")), tokenizer)
    assert made == ("<s>2+2=", "4</s>", "5</s>")


def test_a_text_that_begins_with_bos_has_one() -> None:
    tokenizer = byte_level(eos="</s>", bos="<s>", adds="<s> $A")
    assert texts(pair("<s>2+2="), tokenizer) == ("<s>2+2=", "4</s>", "5</s>")
    assert texts(pair("2+2="), tokenizer) == ("<s>2+2=", "4</s>", "5</s>")


def test_a_template_that_writes_bos_has_one() -> None:
    tokenizer = byte_level("{{ bos_token }}" + CHATML, bos="<s>", adds="<s> $A")
    assert texts(pair(CHAT), tokenizer) == ("<s>" + ASKED, "4<|im_end|>\n", "5<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ALWAYS_ASKS, (ASKED, "4<|im_end|>\n", "5<|im_end|>\n")),
        (  # a header of plain text, whose line break would make one token with the one before
            "{% for m in messages %}{{ m.role }}:\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{{ 'assistant:\n' }}",
            ("user:\n2+2?<|im_end|>\nassistant:\n", "4<|im_end|>\n", "5<|im_end|>\n"),
        ),
    ],
)
def test_a_header_that_is_always_appended_is_not_scored(template: str, expected: Any) -> None:
    assert texts(pair(CHAT), byte_level(template, merges=[("Ċ", "a")])) == expected


# ---------------------------------------------------------------------------------- errors, lengths


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^pairs.jsonl:2: field 'prompt' has no tokens of its own"
    ):
        tokens(dataset(pair("2="), pair("")), byte_level())
    assert texts(pair(""), byte_level(bos="<s>", adds="<s> $A"))[0] == "<s>"


@SLICES
def test_a_prompt_that_is_part_of_the_completions_token_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^pairs.jsonl:1: field 'prompt' has no tokens of its own"
    ):
        tokens(pair("2", "4"), byte_level(merges=[("2", "4")]))


def test_a_completion_without_tokens_is_refused() -> None:
    tokenizer = byte_level("{% for m in messages %}{{ m.content }}{% endfor %}", eos=None)
    with pytest.raises(
        ValueError, match=r"^pairs.jsonl:1: field 'rejected' has no .* EOS token is None"
    ):
        tokens(pair(CHAT, "4", ""), tokenizer)
    assert texts(pair("2=", ""), byte_level())[1] == "<|im_end|>"


def test_text_without_an_eos_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no EOS token.*set eos_token"):
        tokens(pair("2="), byte_level(eos=None))


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^pairs.jsonl:1: field 'prompt' is a list .* no chat template"
    ):
        tokens(pair(CHAT), byte_level())


def test_ids_beyond_the_embedding_are_refused() -> None:
    tokenizer = byte_level()
    size = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokens(pair("2="), tokenizer, vocab_size=size + 1)
    expected = (
        rf"^pairs.jsonl:1: field 'chosen': the token '<.im_end.>' has the id {size}, but the model's "
        rf"embedding has {size} rows and the tokenizer {len(tokenizer)} tokens"
    )
    with pytest.raises(ValueError, match=expected):
        tokens(pair("2="), tokenizer, vocab_size=size)
    rows = dataset(pair("2="), pair("2<s>"))
    with pytest.raises(ValueError, match=r"^pairs.jsonl:2: field 'prompt': the token '<s>'"):
        tokens(rows, tokenizer, vocab_size=size + 1)


def test_pairs_that_are_too_long_are_never_cut() -> None:
    tokenizer = byte_level()
    rows = dataset(pair("2="), pair("2=", "44"), pair("2=", "4", "555"), pair("2=", "", ""))
    expected = (
        "^pairs.jsonl:2: the pair has 5 tokens, more than max_length = 4. Completions are never cut: "
        "raise --max-length, or drop such pairs with --too-long drop$"
    )
    with pytest.raises(ValueError, match=expected):
        tokens(rows, tokenizer, max_length=4)
    made, dropped = tokens(rows, tokenizer, max_length=4, too_long="drop")
    assert dropped == 2
    assert made["place"][:] == ["pairs.jsonl:1", "pairs.jsonl:4"]
    assert tokens(rows, tokenizer, max_length=6)[1] == 0
    with pytest.raises(ValueError, match="all 4 pairs have more than max_length = 2 tokens"):
        tokens(rows, tokenizer, max_length=2, too_long="drop")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"too_long": "cut"}, "too_long is 'cut', expected 'error' or 'drop'"),
        ({"max_length": 1}, "max_length is 1, expected at least 2"),
    ],
)
def test_options_are_checked(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        tokens(pair("2="), byte_level(), **options)


def test_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="the train dataset is a IterableDataset, expected a"):
        tokens(dataset(pair("2=")).to_iterable_dataset(), byte_level())


def test_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="the train dataset has no pairs"):
        tokens(dataset(pair("2=")).select([]), byte_level())


@pytest.mark.parametrize("progress", [False, True])
def test_progress_bars_are_shown_on_request(progress: bool, capfd: Any) -> None:
    tokens(pair("2="), byte_level(), progress=progress)
    bars = capfd.readouterr().err
    assert ("Checking train dataset" in bars) is progress
    assert ("Tokenizing train dataset" in bars) is progress


# ------------------------------------------------------------------------------------------ caching


def test_a_cached_tokenisation_is_never_stale(tmp_path: Path) -> None:
    dataset(pair(CHAT)).save_to_disk(tmp_path / "pairs")

    def read(tokenizer: Any) -> tuple[Dataset, tuple[str, ...]]:
        rows = load_from_disk(tmp_path / "pairs")
        return tokens(rows, tokenizer)[0], texts(rows, tokenizer)

    first, shown = read(byte_level(CHATML))
    again, _ = read(byte_level(CHATML))
    assert first.cache_files == again.cache_files != []
    other = [
        byte_level(QWEN3),
        byte_level(CHATML, merges=[("2", "+")]),
        byte_level(CHATML, bos="<s>", adds="<s> $A"),
    ]
    caches = [read(tokenizer)[0].cache_files for tokenizer in other]
    assert all(cache != first.cache_files for cache in caches)
    assert shown[1] == "4<|im_end|>\n"
    assert read(other[0])[1][1] == "<think>\n\n</think>\n\n4<|im_end|>\n"


def test_a_template_with_a_date_is_cached_for_a_day(monkeypatch: Any) -> None:
    dated = PairTokenizer(byte_level("{{ strftime_now('%d') }}" + CHATML))
    before = Hasher.hash(dated)
    assert Hasher.hash(dated) == before
    dated.day = "2024-01-01"
    assert Hasher.hash(dated) != before
    assert PairTokenizer(byte_level(CHATML)).day is None
