"""Which token a tokenizer pads with: its own where it has one, else the config's, else one chosen here.

No mask of a trainer derives from a pad token, so a policy may pad with eos. A reward model may not:
transformers' classifiers read the score at the last token that is not padding, and would skip an eos.
"""

from __future__ import annotations

import copy
import json
import re

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from conch.errors import ConfigError
from conch.log import get_logger

_log = get_logger(__name__)

_PADDING_NAMES = (
    *("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<PAD>", "<|PAD|>", "<|finetune_right_pad_id|>"),
    *("<|endoftext|>", "<|end_of_text|>"),
)
"""Tokens that models pad with, as their vocabularies name them. The last two where they are not eos."""

_SPARE_NAMES = re.compile(
    r"(<\|?|\[)(reserved(_special_token)?|extratoken|extra|unused|placeholder|dummy)[_-]?\d+(\|?>|\])"
)
"""Tokens that vocabularies keep for their users, which no text contains."""

_NO_TEXT = "ÿ"
"""How byte-level vocabularies write the byte 0xFF, which no UTF-8 text contains."""

_NO_TEXT_NAME = "<|pad|>"
"""What `_NO_TEXT` is renamed to as a pad token. A pad token is looked for in the text before that becomes
bytes, and words have a "ÿ" of their own."""


def with_pad_token(
    tokenizer: PreTrainedTokenizerBase, wanted: str | None, *, name: str, reward_model: bool = False
) -> PreTrainedTokenizerBase:
    """Return the tokenizer, or where its pad token is another a copy of it.

    wanted: `tokenizer.pad_token`, for a tokenizer that has none, or none but its eos token.
    name: of the tokenizer, in messages.
    reward_model: take another token than eos.

    A pad token that is an ordinary word of the vocabulary becomes a special token at once, as saving and
    loading would make it, so that training and serving tokenise alike.

    Raises:
        ConfigError: `wanted` is not in the vocabulary.
    """
    own, eos = _special(tokenizer, "pad_token"), _special(tokenizer, "eos_token")
    is_eos = own is not None and tokenizer.pad_token_id == tokenizer.eos_token_id
    if own is not None and not (is_eos and (reward_model or wanted is not None)):
        if wanted is not None and wanted != own:
            _log.warning(
                "%r has a pad token of its own, %s, which stays: `tokenizer.pad_token` = %s is for those "
                "without one",
                *(name, own, wanted),
            )
        is_special = tokenizer.pad_token_id in tokenizer.added_tokens_decoder
        return tokenizer if is_special else _padding_with(copy.deepcopy(tokenizer), own)
    if wanted is not None:
        _check_wanted(tokenizer, wanted, name)
    chosen = wanted or _choice(tokenizer, reward_model)
    if chosen is None:
        return tokenizer
    padded = copy.deepcopy(tokenizer)
    if wanted is None and chosen == _NO_TEXT and _rename(padded, _NO_TEXT, _NO_TEXT_NAME):
        chosen = _NO_TEXT_NAME
    if wanted is None:
        lack = f"no pad token but its eos token {eos}" if is_eos else "no pad token"
        _log.info("%r has %s and pads with %s here; `tokenizer.pad_token` names another", name, lack, chosen)
    return _padding_with(padded, chosen)


def pad_token_hint(example: str = "<|pad|>") -> str:
    """How a command line names a pad token: `<` and `|` mean something to shells and to Hydra alike."""
    return f"on a command line \"tokenizer.pad_token='{example}'\", with both kinds of quotes"


def _check_wanted(tokenizer: PreTrainedTokenizerBase, wanted: str, name: str) -> None:
    if wanted not in tokenizer.get_vocab():
        # Adding it would give an id for which the model has no embedding.
        raise ConfigError(
            f"`tokenizer.pad_token` = {wanted!r} is not in the vocabulary of {name!r}: name a token that is, "
            f"{pad_token_hint()}, or leave it out"
        )


def _choice(tokenizer: PreTrainedTokenizerBase, reward_model: bool) -> str | None:
    """A token to pad with: made for it, else spare, else eos, or for a reward model one that no text has."""
    vocabulary = tokenizer.get_vocab()
    taken = {_special(tokenizer, "eos_token"), _special(tokenizer, "bos_token")}
    spare = sorted((index, token) for token, index in vocabulary.items() if _SPARE_NAMES.fullmatch(token))
    for token in (*_PADDING_NAMES, *(token for _, token in spare)):
        if token in vocabulary and token not in taken:
            return token
    if not reward_model:
        return _special(tokenizer, "eos_token")
    unknown = _special(tokenizer, "unk_token")
    if unknown is not None and unknown not in taken and not _occurs(tokenizer, unknown):
        return unknown
    if _NO_TEXT in vocabulary and tokenizer.decode([vocabulary[_NO_TEXT]]) == "\N{REPLACEMENT CHARACTER}":
        return _NO_TEXT
    return None


def _padding_with(tokenizer: PreTrainedTokenizerBase, token: str) -> PreTrainedTokenizerBase:
    """The tokenizer, changed to pad with this token, which becomes a special one where it was a word."""
    tokenizer.pad_token = token
    if tokenizer.pad_token_id not in tokenizer.added_tokens_decoder:
        tokenizer.add_special_tokens({"pad_token": token})
    return tokenizer


def _rename(tokenizer: PreTrainedTokenizerBase, token: str, name: str) -> bool:
    """Give a token of the vocabulary another name, at the same id; False, and nothing done, where the name is
    taken or a merge makes or takes the token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer) or name in tokenizer.get_vocab():
        return False
    state = json.loads(backend.to_str())
    vocabulary = state["model"].get("vocab")
    if not isinstance(vocabulary, dict) or token not in vocabulary:
        return False
    if any(token in piece for merge in state["model"].get("merges", ()) for piece in merge):
        return False
    state["model"]["vocab"] = {name if key == token else key: index for key, index in vocabulary.items()}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))  # pyright: ignore[reportAttributeAccessIssue]
    return True


def _special(tokenizer: PreTrainedTokenizerBase, name: str) -> str | None:
    token = getattr(tokenizer, name)
    return None if token is None else str(token)


def _occurs(tokenizer: PreTrainedTokenizerBase, unknown: str) -> bool:
    """Whether text can become the unknown token: not where every byte is in the vocabulary."""
    rare = tokenizer("\N{LANGUAGE TAG}", add_special_tokens=False)["input_ids"]
    return tokenizer.convert_tokens_to_ids(unknown) in rare  # pyright: ignore[reportOperatorIssue]
