"""Which tokens, steps and sentences a served model reads, by manifests written by hand; and that the
comparison expects the same, by code of its own."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from conch.converters.checkpoints.reader import RewardCheckpoint
from conch.converters.parity.samples import TWO_ANSWERS, build_cases, pairs_of_answers
from conch.converters.triton_models.encoding import Encoder, RejectedError, Row
from conch.data.chat import what_template_reads
from conch.store.manifest import ScoringRules
from tests.chats import CHATS, chat_tokenizer
from tests.checkpoints import config_of, random_model
from tests.text_tokenizers import byte_level, sentencepiece, wordpiece, wrapped

QUESTION = {"role": "user", "content": "two and two?"}
ANSWER = {"role": "assistant", "content": "four"}
STEPS: dict[str, Any] = {"template": "chat", "pooling": "steps", "aggregate": "min", "step_separator": ";"}
SKYWORK = "{{ bos_token }}{{ messages[0].content }}\n{{ messages[-1].content }}"


def rules_of(tokenizer: Any, **settings: Any) -> ScoringRules:
    rules = {
        "template": "{text}",
        "max_length": 80,
        "reward_names": ("reward",),
        "normalise": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": len(tokenizer),
        "truncation_side": "right",
        **settings,
    }
    if rules["template"] in ("chat", "chat{eos}", "pair"):
        rules["reads"] = "dialogues"
        if tokenizer.chat_template:
            contents, arguments = what_template_reads(tokenizer)
            rules |= {"contents": contents, "arguments": arguments or None}
    if separator := rules.get("step_separator"):
        ids = tokenizer(separator, add_special_tokens=False).input_ids
        rules |= {"separator_id": ids[-1], "separator_ids": tuple(ids) if len(ids) > 1 else ()}
    return ScoringRules(**rules)


def encoder_of(folder: Path, tokenizer: Any, **settings: Any) -> Encoder:
    """What a version with these rules reads."""
    rules = rules_of(tokenizer, **settings)
    tokenizer.save_pretrained(folder)
    manifest = {**rules.model_dump(mode="json"), "trust_remote_code": False}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Encoder(folder)


def row_of(encoder: Encoder, sample: Any) -> Row:
    text = sample if isinstance(sample, str) else json.dumps(sample)
    return encoder.rows_from_texts([text.encode()])[0]


def shown(encoder: Encoder, sample: Any) -> str:
    return encoder.tokenizer.decode(row_of(encoder, sample).ids)


def steps_shown(encoder: Encoder, sample: Any) -> list[str]:
    """What of a sample stands before the end of each step."""
    row = row_of(encoder, sample)
    return [encoder.tokenizer.decode(row.ids[: place + 1]) for place in row.places]


def asked(answer: str) -> list[dict[str, str]]:
    return [QUESTION, {"role": "assistant", "content": answer}]


# ------------------------------------------------------------------------------------------ special tokens


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (None, "<|begin_of_text|>{}<|eot_id|>"),
        ("never", "<|begin_of_text|>{}<|eot_id|>"),
        ("once", "<|begin_of_text|>{}<|eot_id|>"),
        ("always", "<|begin_of_text|><|begin_of_text|>{}<|eot_id|>"),
    ],
)
def test_a_rendered_dialogue_gets_the_special_tokens_that_its_card_says(
    tmp_path: Path, mode: Any, expected: str
) -> None:
    tokenizer = chat_tokenizer("llama")
    tokenizer.chat_template = "{{ bos_token }}{{ messages[-1].content }}<|eot_id|>"
    encoder = encoder_of(tmp_path, tokenizer, template="chat", add_special_tokens=mode)
    assert shown(encoder, asked("four")) == expected.format("four")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(None, "<s>a"), ("once", "<s>a"), ("always", "<s><s>a"), ("never", "<s>a")],
)
def test_a_text_gets_the_special_tokens_that_its_card_says(tmp_path: Path, mode: Any, expected: str) -> None:
    encoder = encoder_of(tmp_path, byte_level("<s> $A"), add_special_tokens=mode)
    assert shown(encoder, "<s>a") == expected
    assert shown(encoder, "a") == ("a" if mode == "never" else "<s>a")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("template", ["{text}", "chat"])
def test_a_closing_token_is_appended_once_and_survives_a_cut(
    tmp_path: Path, template: str, side: str
) -> None:
    """Athene-RM closes the rendered dialogue with its cls token, and reads the score there."""
    tokenizer = chat_tokenizer("llama")
    tokenizer.chat_template = "{{ bos_token }}{{ messages[-1].content }}"
    closing = "<|reserved_special_token_0|>"
    token = tokenizer.convert_tokens_to_ids(closing)
    rules = {"template": template, "closing_token_id": token, "max_length": 6, "truncation_side": side}
    encoder = encoder_of(tmp_path, tokenizer, add_special_tokens="once", **rules)

    def sample(text: str) -> Any:
        return asked(text) if template == "chat" else text

    assert shown(encoder, sample("ab")) == f"<|begin_of_text|>ab{closing}"
    assert shown(encoder, sample(f"ab{closing}")) == f"<|begin_of_text|>ab{closing}"
    kept = "fghi" if side == "left" else "abcd"
    assert shown(encoder, sample("abcdefghi")) == f"<|begin_of_text|>{kept}{closing}"
    assert shown(encoder, sample(f"abcdefghi{closing}")) == f"<|begin_of_text|>{kept}{closing}"


# --------------------------------------------------------------------------------------------------- pairs


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """Like BERT's: [cls] a [sep] b [sep], with types 0 and 1."""
    inputs: Any = {"model_input_names": ["input_ids", "token_type_ids"]}
    tokenizer = wrapped(wordpiece().backend_tokenizer, None, bos_token="<s>", **inputs)
    places = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=cast(Any, places)
    )
    return tokenizer


def test_a_pair_is_read_as_the_tokenizer_joins_prompt_and_answer(tmp_path: Path) -> None:
    tokenizer = pair_tokenizer()
    encoder = encoder_of(tmp_path, tokenizer, template="pair", max_length=40)
    system = {"role": "system", "content": "The film"}
    row = row_of(encoder, [system, {"role": "user", "content": "is it bad"}, ANSWER])
    right = tokenizer("The film\nis it bad", "four")
    assert (row.ids, list(row.types)) == (right.input_ids, right.token_type_ids)
    assert row.types[0] == 0 and row.types[-1] == 1
    in_parts = [{"role": "user", "content": [{"type": "text", "text": "the"}]}, ANSWER]
    assert row_of(encoder, in_parts).ids == tokenizer("the", "four").input_ids


def test_the_prompt_of_a_pair_is_rendered_where_there_is_a_chat_template(tmp_path: Path) -> None:
    tokenizer = pair_tokenizer()
    message = "{{ message.role }} {{ message.content }}"
    tokenizer.chat_template = f"{{% for message in messages %}}{message}{{% endfor %}}"
    encoder = encoder_of(tmp_path, tokenizer, template="pair")
    assert row_of(encoder, asked("four")).ids == tokenizer("user two and two?", "four").input_ids


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("closing", [False, True])
def test_a_pair_that_is_too_long_loses_tokens_of_the_longer_sentence(
    tmp_path: Path, side: str, closing: bool
) -> None:
    tokenizer = pair_tokenizer()
    closes = {"closing_token_id": tokenizer.convert_tokens_to_ids("<|turn|>")} if closing else {}
    encoder = encoder_of(tmp_path, tokenizer, template="pair", max_length=9, truncation_side=side, **closes)
    row = row_of(encoder, [{"role": "user", "content": "the movie was great and i liked it"}, ANSWER])
    tokenizer.truncation_side = side
    room = 8 if closing else 9
    right = tokenizer("the movie was great and i liked it", "four", truncation=True, max_length=room)
    assert row.ids == [*right.input_ids, *closes.values()]
    assert len(row.types) == len(row.ids) == 9


@pytest.mark.parametrize("messages", [[QUESTION], [ANSWER, QUESTION]])
@pytest.mark.parametrize("template", ["pair", "chat"])
def test_a_dialogue_without_an_answer_is_refused_where_the_answer_is_read(
    tmp_path: Path, template: str, messages: Any
) -> None:
    tokenizer = chat_tokenizer("chatml")
    settings = {"template": "pair"} if template == "pair" else STEPS
    encoder = encoder_of(tmp_path, tokenizer, **settings)
    with pytest.raises(RejectedError, match="row 0: the model scores an answer, and the last message is of"):
        row_of(encoder, messages)


# --------------------------------------------------------------------------------------------------- steps


def test_only_separators_inside_the_answer_end_steps(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, chat_tokenizer("chatml"), **STEPS)
    before = "<|im_start|>user\nwhat; is; it?<|im_end|>\n<|im_start|>assistant\n"
    dialogue = [{"role": "user", "content": "what; is; it?"}, {"role": "assistant", "content": "a;bc;"}]
    assert steps_shown(encoder, dialogue) == [f"{before}a;", f"{before}a;bc;"]


def test_an_open_answer_is_closed_and_nothing_behind_it_is_a_step(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, chat_tokenizer("chatml"), **STEPS)
    assert shown(encoder, asked("a;bc")).endswith("assistant\na;bc;<|im_end|>\n")
    assert [text[-3:] for text in steps_shown(encoder, asked("a;bc"))] == ["\na;", "bc;"]
    assert [text[-2:] for text in steps_shown(encoder, asked(""))] == ["\n;"]


def test_a_delimiter_of_the_clients_becomes_the_separator(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, chat_tokenizer("chatml"), **STEPS, step_delimiter="\n\n")
    assert shown(encoder, asked("a\n\nb")) == shown(encoder, asked("a;b;"))
    assert shown(encoder, asked("a\n\nb\n\n")) == shown(encoder, asked("a;b;"))
    assert len(row_of(encoder, asked("a\n\nb")).places) == 2


def test_a_separator_of_several_tokens_ends_a_step_at_its_last(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, chat_tokenizer("chatml"), **{**STEPS, "step_separator": "\n\n"})
    assert [text[-4:] for text in steps_shown(encoder, asked("ab\n\ncd\ne\n\n"))] == ["ab\n\n", "\ne\n\n"]


@pytest.mark.parametrize(
    ("side", "expected"), [("left", ["b;"]), ("right", ["user\n"])], ids=["left", "right"]
)
def test_a_cut_keeps_the_steps_that_are_left(tmp_path: Path, side: str, expected: list[str]) -> None:
    """Where none is left, the last token is read."""
    encoder = encoder_of(tmp_path, chat_tokenizer("chatml"), **STEPS, max_length=6, truncation_side=side)
    assert [text[-len(expected[0]) :] for text in steps_shown(encoder, asked("a;aaaaaaaaaab"))] == expected


def test_steps_are_encoded_apart_where_the_card_does(tmp_path: Path) -> None:
    """Skywork-o1-Open-PRM encodes problem, steps and line breaks one by one: a space is put before each."""
    tokenizer = sentencepiece(None)
    tokenizer.chat_template = SKYWORK
    rules = {**STEPS, "step_separator": "\n", "steps_apart": True}
    row = row_of(encoder_of(tmp_path, tokenizer, **rules), asked("the film\nis bad"))

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    pieces = ["<s>two and two?\n", "the film", "\n", "is bad", "\n"]
    ids, ends = [], []
    for piece in pieces:
        ids += plain(piece)
        ends.append(len(ids) - 1)
    assert row.ids == ids != plain("".join(pieces))
    assert row.places == (ends[2], ends[4])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a;b;", ["a;", "a;b;"]),
        ("a;b", ["a;", "a;b"]),
        ("a;b;<|im_end|>\n", ["a;", "a;b;"]),
        ("a;b<|im_end|>", ["a;", "a;b"]),
        ("a;b; ", ["a;", "a;b;"]),
        ("<|im_end|>", ["<|im_end|>"]),
    ],
)
def test_what_is_no_word_behind_the_last_separator_of_a_text_is_no_step(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    """A text that ends like a rendered turn had a step of `<|im_end|>` alone."""
    encoder = encoder_of(tmp_path, chat_tokenizer("chatml"), **{**STEPS, "template": "{text}"})
    assert steps_shown(encoder, text) == expected
    dense = encoder_of(
        tmp_path, chat_tokenizer("chatml"), **{**STEPS, "template": "{text}", "granularity": "step"}
    )
    ends = row_of(dense, text).ends
    assert [text[:end] for end in ends] == expected


def test_ends_of_steps_that_are_encoded_apart_are_places_in_the_clients_text(tmp_path: Path) -> None:
    rules = {**STEPS, "template": "a {text}{eos}", "granularity": "step", "steps_apart": True}
    encoder = encoder_of(tmp_path, byte_level("<s> $A"), **rules)
    text = "été;the film;"
    assert [text[:end] for end in row_of(encoder, text).ends] == ["été;", "été;the film;"]
    assert shown(encoder, text) == f"<s>a {text}</s>"


# ------------------------------------------------------------- the comparison expects what the server reads

CHAT: dict[str, dict[str, Any]] = {
    "chat": {"template": "chat"},
    "closed": {"template": "chat{eos}"},
    "always": {"template": "chat", "add_special_tokens": "always"},
    "once": {"template": "chat{eos}", "add_special_tokens": "once"},
    "closing": {"template": "chat", "closing_token_id": "<pad>"},
    "closing, once": {"template": "chat", "closing_token_id": "<pad>", "add_special_tokens": "once"},
    "steps": STEPS,
    "steps of clients": {**STEPS, "step_delimiter": "\n\n", "add_special_tokens": "always"},
    "long separator": {**STEPS, "step_separator": "\n\n", "closing_token_id": "<pad>"},
    "steps apart": {**STEPS, "steps_apart": True, "step_separator": "\n", "step_delimiter": "\n\n"},
    "steps apart, framed": {**STEPS, "steps_apart": True, "add_special_tokens": "once"},
    "texts": {"template": "a {text}{eos}", "add_special_tokens": "never", "closing_token_id": "<pad>"},
    "texts, always": {"template": "{text}{eos}", "add_special_tokens": "always"},
    "steps of texts": {**STEPS, "template": "{text}{eos}"},
    "dense steps apart": {**STEPS, "template": "a {text}{eos}", "granularity": "step", "steps_apart": True},
    "dense steps": {**STEPS, "template": "{text}", "granularity": "step", "step_separator": ";;"},
    "pair": {"template": "pair"},
    "pair, closed": {"template": "pair", "closing_token_id": "<pad>"},
}
TOKENIZERS: dict[str, Any] = {
    **{family: lambda family=family: chat_tokenizer(family) for family in CHATS},
    "sentencepiece": sentencepiece,
    "wordpiece": pair_tokenizer,
    "framed": lambda: byte_level("<s> $A </s>"),
}


PAIRED = [
    (named, tokenizer)
    for named, tokenizer in itertools.product(CHAT, TOKENIZERS)
    # To a tokenizer of words a line break is nothing, so it separates no steps.
    if tokenizer != "wordpiece" or "\n" not in CHAT[named].get("step_separator", "")
]


@pytest.fixture(scope="module")
def network() -> Any:
    """Nothing is scored by it."""
    return random_model(AutoModelForSequenceClassification, config_of("llama", num_labels=1))


@pytest.mark.parametrize(("named", "tokenizer"), PAIRED)
def test_the_comparison_expects_what_the_server_reads(
    tmp_path: Path, network: Any, named: str, tokenizer: str
) -> None:
    fast = TOKENIZERS[tokenizer]()
    side = ("left", "right")[(list(CHAT).index(named) + list(TOKENIZERS).index(tokenizer)) % 2]
    if not fast.chat_template and named != "pair":
        fast.chat_template = SKYWORK
    settings = {**CHAT[named], "truncation_side": side}
    if "closing_token_id" in settings:
        settings["closing_token_id"] = fast.convert_tokens_to_ids(settings["closing_token_id"])
    encoder = encoder_of(tmp_path, fast, **settings)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    fast.truncation_side = side
    checkpoint = RewardCheckpoint(
        "here", network, None, fast, rules_of(fast, **settings), longest_compared=80
    )
    cases = build_cases(checkpoint, "text", max_batch_size=4)
    samples = {sample for case in cases for sample in case.samples}
    assert len(samples) > 20
    for sample in samples:
        if not sample.ids:
            with pytest.raises(RejectedError):
                row_of(encoder, sample.text)
            continue
        row = row_of(encoder, sample.text)
        assert row.ids == list(sample.ids), sample.text
        assert row.types == sample.types
        if sample.separators is not None and settings["template"] == "chat":
            assert row.places == sample.separators, sample.text
    if settings["template"] == "chat":
        pairs = pairs_of_answers(cases)
        assert len(pairs) >= 2 and len([case for case in cases if case.name == TWO_ANSWERS]) == 8
