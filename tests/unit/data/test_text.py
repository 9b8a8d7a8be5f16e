"""How texts become ids and ids text, with tokenizers of the forms that model families have."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import (
    Tokenizer,
    models,
    pre_tokenizers,
)
from transformers import AddedToken, PreTrainedTokenizer, PreTrainedTokenizerFast

from conch.config import GenerationConfig, TokenizerConfig
from conch.data.multi_turn import tokenize_turns
from conch.data.prompts import make_prompts
from conch.data.samples import tokenize_samples
from conch.data.text import TextCodec, lost_in_text, special_frame, special_tokens
from conch.errors import ConfigError, ModelError
from conch.rollouts.stopping import StopCondition
from tests.text_tokenizers import SPECIALS, byte_level, sentencepiece, wordpiece, wrapped

pytestmark = pytest.mark.unit

ALL = {
    "sentencepiece": sentencepiece(),
    "sentencepiece without BOS": sentencepiece(None),
    "byte level": byte_level(),
    "byte level with BOS": byte_level("<s> $A"),
    "byte level closed": byte_level("<s> $A </s>"),
    "wordpiece": wordpiece(),
}
TEXTS = [
    ("The movie", " was great"),
    ("The movie", "was great"),
    ("The movie ", "was great"),
    ("Answer:", " four"),
    ("Answer: ", "four"),
    ("How are you?\n", "Fine!"),
    ("été", " €5"),
    ("été ", "€5 🙂"),
]


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str, **options: Any) -> tuple[int, ...]:
    return tuple(tokenizer(text, **options)["input_ids"])  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------- the prompt


@pytest.mark.parametrize("name", ALL)
def test_a_plain_prompt_is_what_the_tokenizer_gives_less_its_closing_token(name: str) -> None:
    tokenizer = ALL[name]
    whole = ids_of(tokenizer, "The movie")
    closed = whole[:-1] if whole[-1] == tokenizer.eos_token_id else whole
    assert TextCodec(tokenizer).prompt_ids("The movie") == closed
    assert TextCodec(tokenizer, encoder_decoder=True).prompt_ids("The movie") == whole


@pytest.mark.parametrize("name", [name for name in ALL if special_frame(ALL[name])[0]])
def test_a_bos_that_stands_in_the_text_is_not_put_again(name: str) -> None:
    codec = TextCodec(ALL[name])
    # Behind a special token some tokenizers put no space, so only the number of BOS is compared.
    assert codec.prompt_ids("<s>The movie").count(ALL[name].bos_token_id) == 1  # pyright: ignore[reportArgumentType]
    assert codec.prompt_ids("The movie").count(ALL[name].bos_token_id) == 1  # pyright: ignore[reportArgumentType]


def test_no_special_token_is_put_where_the_settings_say_so() -> None:
    tokenizer = ALL["byte level with BOS"]
    codec = TextCodec(tokenizer, add_special_tokens=False)
    assert codec.prompt_ids("The movie") == ids_of(tokenizer, "The movie", add_special_tokens=False)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("encoder_decoder", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_that_is_cut_keeps_its_special_tokens(name: str, encoder_decoder: bool, side: str) -> None:
    codec = TextCodec(ALL[name], encoder_decoder=encoder_decoder)
    ids = codec.prompt_ids("The movie was great and I liked it")
    cut = codec.cut(ids, 6, side)
    front, back = special_frame(ALL[name])
    back = back if encoder_decoder else ()
    own = ids[len(front) : len(ids) - len(back)]
    room = 6 - len(front) - len(back)
    assert cut == (*front, *(own[-room:] if side == "left" else own[:room]), *back)
    text = codec.prompt_text(cut)
    assert not any(special in text for special in SPECIALS)


class Reversing(PreTrainedTokenizer):
    """Reads a number for each character, from the end where it adds special tokens."""

    def __init__(self) -> None:
        super().__init__(eos_token="</s>", bos_token="<s>")

    @property
    def vocab_size(self) -> int:
        return 128

    def get_vocab(self) -> dict[str, int]:
        return {chr(number): number for number in range(128)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [*text, *text.upper()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def build_inputs_with_special_tokens(self, token_ids_0: Any, token_ids_1: Any = None) -> list[int]:
        del token_ids_1
        return [*reversed(token_ids_0)]


def test_a_tokenizer_that_rewrites_a_text_between_its_special_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match=r"`tokenizer\.add_special_tokens=false`"):
        TextCodec(Reversing())
    assert TextCodec(Reversing(), add_special_tokens=False).prompt_ids("a") == (97, 65)


def test_special_tokens_are_found_in_a_vocabulary_without_letters() -> None:
    tokenizer = Tokenizer(
        models.WordLevel({**{token: i for i, token in enumerate(SPECIALS)}, "+": 6, "-": 7})
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    assert special_frame(wrapped(tokenizer, "<s> $A </s>")) == ((1,), (2,))


# ----------------------------------------------------------------------------------------------- the response


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("prompt", "response"), TEXTS)
def test_a_responses_text_is_that_of_both_less_the_prompts(name: str, prompt: str, response: str) -> None:
    tokenizer, codec = ALL[name], TextCodec(ALL[name])
    prompt_ids = codec.prompt_ids(prompt)
    for ids in (codec.response_ids(prompt, prompt_ids, response), codec.rendered_ids(response)):
        parts = (list(prompt_ids), [*prompt_ids, *ids])
        before, whole = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts)
        assert codec.response_text(prompt_ids, ids) == whole[len(before) :]


@pytest.mark.parametrize("name", [name for name in ALL if name != "wordpiece"])
@pytest.mark.parametrize(("prompt", "response"), TEXTS)
def test_a_response_that_is_encoded_decodes_to_itself(name: str, prompt: str, response: str) -> None:
    codec = TextCodec(ALL[name])
    prompt_ids = codec.prompt_ids(prompt)
    ids = codec.response_ids(prompt, prompt_ids, response)
    assert codec.response_text(prompt_ids, ids) == response


def test_a_space_before_a_response_of_sentencepiece_stays() -> None:
    """FAULTS' own case: decoded alone, "▁was▁great" has lost it."""
    tokenizer, codec = ALL["sentencepiece"], TextCodec(ALL["sentencepiece"])
    prompt_ids = codec.prompt_ids("The movie")
    ids = codec.response_ids("The movie", prompt_ids, " was great")
    assert tokenizer.decode(list(ids)) == "was great"
    assert codec.response_text(prompt_ids, ids) == " was great"


def test_text_behind_special_tokens_alone_is_read_behind_the_word_before_them() -> None:
    codec = TextCodec(ALL["sentencepiece"])
    prompt_ids = (
        *codec.prompt_ids("The movie"),
        *[ALL["sentencepiece"].convert_tokens_to_ids("<|turn|>")] * 9,
    )
    ids = codec.response_ids("", (), " was")
    assert codec.response_text(prompt_ids, ids) == " was"  # pyright: ignore[reportArgumentType]


def test_a_character_that_prompt_and_response_share_is_the_responses() -> None:
    codec = TextCodec(ALL["byte level"])
    ids = codec.prompt_ids("Answer: 🙂")
    assert codec.response_text(ids[:-2], ids[-2:]) == "🙂"
    assert codec.response_text(ids[:-2], ids[-2:-1]) == "\ufffd"


def test_special_tokens_of_a_response_are_kept_on_demand() -> None:
    tokenizer, codec = ALL["byte level"], TextCodec(ALL["byte level"])
    prompt_ids = codec.prompt_ids("How are you?")
    ids = codec.rendered_ids("<think>Fine!")
    assert codec.response_text(prompt_ids, ids) == "Fine!"
    assert codec.response_text(prompt_ids, ids, skip_special_tokens=False) == "<think>Fine!"
    assert tokenizer.convert_tokens_to_ids("<think>") in ids


@pytest.mark.parametrize("name", ALL)
def test_an_encoder_decoders_response_has_what_stands_before_a_target(name: str) -> None:
    codec = TextCodec(ALL[name], encoder_decoder=True)
    ids = codec.with_eos(codec.response_ids("The movie", codec.prompt_ids("The movie"), "was great"))
    front, back = special_frame(ALL[name], target=True)
    assert ids == (*front, *ids_of(ALL[name], "was great", add_special_tokens=False), codec.eos_id)
    assert not back or back == (codec.eos_id,)


# ------------------------------------------------------------------------------- the same in every trainer


@pytest.mark.parametrize("name", ALL)
def test_all_trainers_encode_a_prompt_and_its_response_alike(name: str) -> None:
    codec = TextCodec(ALL[name])
    (prompt,) = make_prompts(["The movie"], codec, TokenizerConfig(), max_tokens=None)
    response = codec.response_ids("The movie", prompt.token_ids, " was great")
    wanted = (*prompt.token_ids, *response, codec.eos_id)
    pair = {"prompt": "The movie", "completion": " was great"}
    (sample,) = tokenize_samples([pair], codec, max_tokens=None, truncation_side="left")
    ((turn,), _) = tokenize_turns([["The movie", " was great"]], codec)
    assert sample.token_ids == turn.token_ids == wanted
    assert sample.num_prompt == turn.num_prompt == len(prompt.token_ids)
    (text,) = tokenize_samples(["The movie was great"], codec, max_tokens=None, truncation_side="left")
    assert text.token_ids == wanted


def test_rows_that_a_template_refuses_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|turn|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|turn|>{% endif %}"
    )

    def messages(*roles: str) -> list[dict[str, str]]:
        return [{"role": role, "content": "Fine!"} for role in roles]

    codec = TextCodec(tokenizer)
    rows: Sequence[Any] = [{"prompt": messages(*roles)} for roles in (["user"], ["system", "user"], ["user"])]
    with caplog.at_level(logging.WARNING, logger="conch"):
        made = make_prompts(rows, codec, TokenizerConfig(), max_tokens=None)
    assert [prompt.text for prompt in made] == ["<|turn|>Fine!<|turn|>"] * 2
    assert "1 of 3 prompts left out: the chat template does not take prompt 1: no system" in caplog.text
    caplog.clear()
    dialogues: Sequence[Any] = [messages("system", "user", "assistant"), messages("user", "assistant")]
    with caplog.at_level(logging.WARNING, logger="conch"):
        samples = tokenize_samples(dialogues, codec, max_tokens=None, truncation_side="left")
    assert len(samples) == 1
    assert "1 of 2 samples left out: the chat template does not take sample 0: no system" in caplog.text


@pytest.mark.parametrize("name", ALL)
def test_texts_that_do_not_come_back_as_they_were_are_found(name: str) -> None:
    lost = lost_in_text(TextCodec(ALL[name]))
    if name == "wordpiece":  # lower case, and spaces around signs
        assert lost is not None and lost[0] != lost[1] == lost[1].lower()
    else:
        assert lost is None


def test_tokens_that_only_the_vocabulary_marks_as_special_are_special() -> None:
    """As the ends of turns of many chat models are: no eos, no bos, in no list of the tokenizer's."""
    tokenizer = sentencepiece()
    tokenizer.add_tokens([AddedToken("<|eot|>", special=True)], special_tokens=True)
    end: Any = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert end not in tokenizer.all_special_ids
    assert special_tokens(tokenizer)["<|eot|>"] == end
    # Behind nine of them the response still keeps its space.
    codec = TextCodec(tokenizer)
    prompt_ids = (*codec.prompt_ids("The movie"), *[end] * 9)
    assert codec.response_text(prompt_ids, codec.rendered_ids("was")) == " was"
    with pytest.raises(ConfigError, match=r"give '<\|eot\|>' alone"):
        StopCondition(tokenizer, GenerationConfig(stop=("was<|eot|>",)))
