"""Dialogues through chat templates: whose tokens are whose, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conch.config import TokenizerConfig
from conch.data.chat import _warn_of_role
from conch.data.multi_turn import tokenize_turns
from conch.data.preferences import PreferencePair, TextEncoder, check_rows, judgements
from conch.data.prompts import make_prompts
from conch.data.samples import TokenizedSample, tokenize_samples
from conch.data.text import TextCodec
from conch.errors import DataError
from tests.tiny import char_tokenizer

DIALOGUE = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f"},
]
OPENED = "{% if add_generation_prompt %}<assistant>{% endif %}"
# Every turn ends in an eos and a new line.
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}" + OPENED
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
# Nothing but words: a new line ends a turn.
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + OPENED.replace(
    "<assistant>", "assistant: "
)
# Shows of earlier answers no more than a dot.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>"
    "{{ m.content if loop.last or m.role == 'user' else '.' }}<eos>\n{% endfor %}" + OPENED
)
# An end of the whole dialogue, where nothing is to follow, as Phi-3's.
ENDED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}.\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% else %}<eos>{% endif %}"
)
# A thought before the last answer alone, as Qwen3's.
THOUGHTFUL = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}z {% endif %}"
    "{{ m.content }}<eos>\n{% endfor %}" + OPENED
)
# The last answer ends in another token than earlier ones, as gpt-oss's.
RETURNED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{{ '<eos>' if loop.last and not add_generation_prompt else '.' }}{% endfor %}" + OPENED
)
# Two blocks to an answer.
TWICE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}z{% endgeneration %}:{% generation %}{{ m.content }}<eos>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}" + OPENED
)
REFUSING = "{{ raise_exception('roles must alternate') }}"


def letters(template: str | None) -> PreTrainedTokenizerFast:
    """One token a character, and one each for what opens a turn."""
    tokenizer = char_tokenizer("abcdefghijklmnopqrstuvwxyz .:\n")
    roles = ["<system>", "<user>", "<assistant>"]
    tokenizer.add_special_tokens({"additional_special_tokens": roles})  # pyright: ignore[reportArgumentType]
    tokenizer.chat_template = template
    return tokenizer


def tokenized(sample: Any, tokenizer: PreTrainedTokenizerFast) -> TokenizedSample:
    (made,) = tokenize_samples([sample], TextCodec(tokenizer), max_tokens=None, truncation_side="left")
    return made


def text_of(sample: TokenizedSample, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """The whole sample, and what is learned of it with dots for the rest."""
    pieces = [str(tokenizer.decode([token])) for token in sample.token_ids]
    learned = [
        piece if is_learned else "." for piece, is_learned in zip(pieces, sample.loss_mask, strict=True)
    ]
    return "".join(pieces), "".join(learned)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by prefixes", "by blocks"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["messages", "list"])
def test_of_dialogues_all_turns_of_the_assistant_are_learned_to_their_ends(
    template: str, wrapped: bool
) -> None:
    tokenizer = letters(template)
    sample = tokenized({"messages": DIALOGUE} if wrapped else DIALOGUE, tokenizer)
    whole, learned = text_of(sample, tokenizer)
    assert whole == "<system>s<eos>\n<user>ab<eos>\n<assistant>cd<eos>\n<user>e<eos>\n<assistant>f<eos>\n"
    assert learned == 10 * "." + "cd<eos>" + 6 * "." + "f<eos>."
    assert list(sample.token_ids) == tokenizer.apply_chat_template(DIALOGUE, return_dict=False)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by prefixes", "by blocks"])
def test_of_a_prompt_with_its_completion_nothing_in_the_prompt_is_learned(template: str) -> None:
    tokenizer = letters(template)
    row = {"prompt": DIALOGUE[:4], "completion": DIALOGUE[4:]}
    whole, learned = text_of(tokenized(row, tokenizer), tokenizer)
    assert whole == "<system>s<eos>\n<user>ab<eos>\n<assistant>cd<eos>\n<user>e<eos>\n<assistant>f<eos>\n"
    assert learned == 19 * "." + "f<eos>."


def test_actions_of_a_dialogue_are_the_assistants_tokens() -> None:
    tokenizer = letters(CHATML)
    whole, completion = ({"messages": DIALOGUE}, {"prompt": DIALOGUE[:4], "completion": DIALOGUE[4:]})
    made, _ = tokenize_turns([whole, completion], TextCodec(tokenizer))
    shown = [text_of(turn, tokenizer)[1] for turn in made]
    assert shown == [10 * "." + "cd<eos>" + 6 * "." + "f<eos>.", 19 * "." + "f<eos>."]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (DIALOGUE[1:4], "<user>ab<eos>\n<assistant>cd<eos>\n<user>e<eos>\n<assistant>"),
        (DIALOGUE[1:3], "<user>ab<eos>\n<assistant>cd"),
    ],
    ids=["the assistant's turn", "the assistant's turn goes on"],
)
def test_prompts_are_rendered_up_to_where_the_answer_begins(messages: Any, text: str) -> None:
    tokenizer = letters(CHATML)
    row = {"prompt": messages, "answer": 3}
    (prompt,) = make_prompts([row], TextCodec(tokenizer), TokenizerConfig(), max_tokens=None)
    assert (prompt.text, dict(prompt.metadata)) == (text, {"answer": 3})
    assert tokenizer.decode(prompt.token_ids) == text


@pytest.mark.parametrize(
    ("template", "end"),
    [("chat", "<eos>\n"), ("{text}", "<eos>"), ("{text}{eos}", "<eos>"), ("{text}.", "<eos>.")],
)
def test_a_reward_model_reads_dialogues_as_the_template_has_them(template: str, end: str) -> None:
    tokenizer = letters(CHATML)
    rows = judgements([{"prompt": DIALOGUE[1:2], "chosen": DIALOGUE[2:3], "rejected": DIALOGUE[4:]}])
    (pair,) = TextEncoder(tokenizer, template, None).encode_rows(rows, check_rows(rows))
    assert isinstance(pair, PreferencePair)
    assert tokenizer.decode(pair.chosen) == "<user>ab<eos>\n<assistant>cd" + end
    assert tokenizer.decode(pair.rejected) == "<user>ab<eos>\n<assistant>f" + end


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template: give it one, or texts"),
        (REFUSING, "does not take prompt 0: roles must alternate"),
    ],
)
def test_prompts_that_cannot_be_rendered_are_refused(template: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_prompts(
            [{"prompt": DIALOGUE[:2]}], TextCodec(letters(template)), TokenizerConfig(), max_tokens=None
        )


def test_a_turn_that_no_special_token_ends_is_learned_with_its_new_line() -> None:
    tokenizer = letters(PLAIN)
    _, learned = text_of(tokenized(DIALOGUE[1:3], tokenizer), tokenizer)
    assert learned == "." * len("user: ab\nassistant: ") + "cd\n"


def test_a_block_that_ends_in_a_new_line_ends_there() -> None:
    tokenizer = letters(MARKED.replace("<eos>{% endgeneration %}", "{{ '\n' }}{% endgeneration %}"))
    _, learned = text_of(tokenized(DIALOGUE, tokenizer), tokenizer)
    assert learned == 10 * "." + "cd\n" + 6 * "." + "f\n."


def test_other_keys_of_a_message_reach_the_template() -> None:
    tokenizer = letters(CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.mood }}"))
    sample = [{**message, "mood": "x"} for message in DIALOGUE[1:3]]
    _, learned = text_of(tokenized(sample, tokenizer), tokenizer)
    assert learned == 7 * "." + "cdx<eos>."


@pytest.mark.parametrize(
    ("template", "answer", "learned_of_it"),
    [
        (PLAIN, "yes no", " yes no\n"),
        (PLAIN, " yes no", " yes no\n"),  # the space before is a token of its own, the template's
        (PLAIN.replace("{{ m.content }}", "{{ m.content }} "), "yes no", " yes no \n"),
    ],
)
def test_tokens_of_several_characters_belong_to_who_begins_them(
    template: str, answer: str, learned_of_it: str
) -> None:
    """With a tokenizer like GPT-2's, which leaves spaces out of its offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user: go on\nassistant: yes no\n"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = template
    messages = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": answer}]
    sample = tokenized(messages * 2, fast)
    learned = [
        str(fast.decode([token]))
        for token, is_learned in zip(sample.token_ids, sample.loss_mask, strict=True)
        if is_learned
    ]
    assert "".join(learned) == 2 * learned_of_it
    assert len(learned) < 2 * len(learned_of_it)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            None,
            DIALOGUE,
            "dialogues need a chat template and the tokenizer has none: set `sft.chat_template`",
        ),
        (CHATML, DIALOGUE[:2], 'sample 0 has no message with the role "assistant"'),
        (CHATML, DIALOGUE[2:], "sample 0 begins with the assistant"),
        (FORGETFUL, DIALOGUE, "renders message 2 of sample 0 differently once others follow"),
        (REFUSING, DIALOGUE, "does not take sample 0: roles must alternate"),
        (
            MARKED.replace("'assistant'", "'nobody'"),
            DIALOGUE,
            "leaves no token of sample 0 to the assistant",
        ),
    ],
)
def test_dialogues_that_cannot_be_told_apart_are_refused(
    template: str | None, messages: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        tokenized(messages, letters(template))


@pytest.mark.parametrize(
    ("template", "learned"),
    [(ENDED, "f.\n<eos>"), (THOUGHTFUL, "z f<eos>"), (RETURNED, "f<eos>")],
    ids=["Phi-3", "Qwen3", "gpt-oss"],
)
def test_of_answers_that_a_template_writes_otherwise_once_others_follow_the_last_is_learned(
    template: str, learned: str
) -> None:
    tokenizer = letters(template)
    with pytest.raises(DataError, match=r"renders message 2 of sample 0 differently once others follow"):
        tokenized({"messages": DIALOGUE}, tokenizer)
    with pytest.raises(DataError, match=r"renders message 2 of sample 0 differently"):
        tokenize_turns([{"messages": DIALOGUE}], TextCodec(tokenizer))
    row = {"prompt": DIALOGUE[:4], "completion": DIALOGUE[4:]}
    whole, mask = text_of(tokenized(row, tokenizer), tokenizer)
    assert whole == tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    assert mask.strip(".") == learned.strip(".")
    (turns,), _ = tokenize_turns([row], TextCodec(tokenizer))
    assert text_of(turns, tokenizer)[1] == mask
    # Of one answer nothing follows.
    assert text_of(tokenized(DIALOGUE[3:], tokenizer), tokenizer)[1].strip(".") == learned.strip(".")


def test_blocks_are_told_from_those_of_the_prompt_however_many_a_turn_has() -> None:
    tokenizer = letters(TWICE)
    whole, mask = text_of(tokenized({"messages": DIALOGUE}, tokenizer), tokenizer)
    assert whole == "<system>s<user>ab<assistant>z:cd<eos><user>e<assistant>z:f<eos>"
    assert mask.replace(".", "") == "zcd<eos>zf<eos>"
    row = {"prompt": DIALOGUE[:4], "completion": DIALOGUE[4:]}
    assert text_of(tokenized(row, tokenizer), tokenizer)[1].replace(".", "") == "zf<eos>"


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What has been warned of, as in a new process."""
    _warn_of_role.cache_clear()
    return lambda: caplog.text


TWO_ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}<eos>"
    "{% endif %}{% endfor %}" + OPENED
)
NAMED = CHATML + "{# the model knows 'critic' #}"


@pytest.mark.parametrize("row", [[], {"prompt": []}], ids=["SFT", "a prompt"])
def test_a_message_of_an_unknown_role_that_the_template_leaves_out_is_refused(row: Any) -> None:
    tokenizer = letters(TWO_ROLES)
    messages = [{"role": "human", "content": "e"}, *DIALOGUE[1:3]]
    with pytest.raises(
        DataError,
        match=r'message 0 of (sample|prompt) 0 has the role "human".* \(roles there: human, user, ass',
    ):
        if row:
            make_prompts([{"prompt": messages}], TextCodec(tokenizer), TokenizerConfig(), max_tokens=None)
        else:
            tokenized(messages, tokenizer)


@pytest.mark.parametrize(
    ("template", "role", "warning"),
    [
        (CHATML, "critic", 'the role "critic", which the chat template does not name'),
        (NAMED, "critic", ""),
        (CHATML, "tool", ""),
        (CHATML, "developer", ""),
        (TWO_ROLES, "system", 'leaves out what messages of the role "system" say'),
    ],
)
def test_roles_that_a_model_may_not_read_are_told_once(
    template: str, role: str, warning: str, warned: Callable[[], str]
) -> None:
    tokenizer = letters(template)
    for _ in range(2):
        tokenized([{"role": role, "content": "e"}, *DIALOGUE[1:3]], tokenizer)
    assert (warning in warned()) and warned().count("role") == (1 if warning else 0)
