"""Tokenizers of the form that families of models have, over a vocabulary of a few hundred tokens.

Each is made by the class of `transformers` that loads the family's own, where there is one: that class, and
not the file, decides about spaces, bytes and special tokens. The pieces are learned from `CORPUS` by the
library `tokenizers`.

Special tokens are called as the families call them, have ids in front of all others (`first`) or behind them
(`last`), as theirs do, and are added to a text, or not, as theirs are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import Sequence as ProcessorSequence
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertTokenizer,
    BlenderbotTokenizer,
    CohereTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    MBartTokenizer,
    OpenAIGPTTokenizer,
    PegasusTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
    XGLMTokenizer,
)

CORPUS = (
    "the harbour was quiet and the boats came home before the rain",
    "a good answer says what is known and what is not known",
    "she wrote a short letter to her brother in the mountains",
    "two and two are four, and four and four are eight",
    "the film was great, the music was better than the story",
    "why does the moon look larger when it stands near the horizon?",
    "please tell me a story about a fox, a bridge and an old clock",
    "he said: that is not what the map shows, look again",
    "user assistant system question answer",
    "I like this model. It reads 12 pages a day; that is 84 a week!",
)
"""Sentences that the pieces are learned from."""

_MERGES = 80
_WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")


# ------------------------------------------------------------------------------------------- pieces


@functools.cache
def _learned(kind: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Pieces in the order of their ids, and merges, of a byte-pair encoding.

    kind: `bytes`, `metaspace`, or `words`, whose last pieces end by `</w>`.
    """
    suffix = {"end_of_word_suffix": "</w>"} if kind == "words" else {}
    tokenizer = Tokenizer(models.BPE(**suffix))
    letters = sorted({letter for line in CORPUS for letter in line if letter != " "})
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(_WORDS, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        alphabet = [*letters, "▁", "\n"]
    else:
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        alphabet = letters
    size = len(alphabet) + _MERGES
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False, **suffix)
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocabulary = tokenizer.get_vocab()
    pieces = tuple(sorted(vocabulary, key=vocabulary.__getitem__))
    return pieces, _merges_of(tokenizer)


def _merges_of(tokenizer: Tokenizer) -> tuple[tuple[str, str], ...]:
    import json

    return tuple(tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"])


@functools.cache
def _unigram_pieces() -> tuple[tuple[str, float], ...]:
    """Pieces of a unigram model with their scores, without special tokens."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=160, show_progress=False, max_piece_length=6)
    )
    import json

    return tuple((piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"])


@functools.cache
def _word_pieces() -> tuple[str, ...]:
    tokenizer = Tokenizer(models.WordPiece())
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocabulary = tokenizer.get_vocab()
    return tuple(sorted(vocabulary, key=vocabulary.__getitem__))


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def byte_pieces(first: Sequence[str] = (), last: Sequence[str] = ()) -> dict[str, Any]:
    """`vocab` and `merges` of a byte-level encoding, GPT-2's alphabet of bytes included."""
    pieces, merges = _learned("bytes")
    return {"vocab": _numbered([*first, *pieces, *last]), "merges": list(merges)}


def metaspace_pieces(first: Sequence[str] = (), last: Sequence[str] = ()) -> dict[str, Any]:
    """`vocab` and `merges` of a SentencePiece-like encoding: a token for each byte, `▁` for a space."""
    pieces, merges = _learned("metaspace")
    in_bytes = [f"<0x{number:02X}>" for number in range(256)]
    return {"vocab": _numbered([*first, *in_bytes, *pieces, *last]), "merges": list(merges)}


def unigram_pieces(first: Sequence[str] = (), last: Sequence[str] = ()) -> list[tuple[str, float]]:
    """`vocab` of a unigram model without tokens for bytes, as those from before 2022 are."""
    ahead, behind = ([(token, 0.0) for token in tokens] for tokens in (first, last))
    return [*ahead, *_unigram_pieces(), *behind]


def _specials(tokens: Sequence[str], *, plain: Sequence[str] = ()) -> list[AddedToken]:
    """Tokens that are never cut; those in `plain` are part of a text when it is decoded."""
    return [AddedToken(token, special=token not in plain, normalized=False) for token in tokens]


# ----------------------------------------------------------------------------------- byte-level encodings


def byte_level(
    specials: Sequence[str],
    *,
    front: Sequence[str] = (),
    plain: Sequence[str] = (),
    chat_template: str | None = None,
    **roles: str | None,
) -> PreTrainedTokenizerFast:
    """A tokenizer that exists as a file alone, as those of Llama-3, OLMo 2, GLM-4 and gpt-oss do.

    front: special tokens that it puts before each text.
    plain: those of `specials` that are no special tokens to `decode`.
    roles: `bos_token`, `eos_token`, `pad_token`, ...
    """
    pieces = byte_pieces(last=specials)
    tokenizer = Tokenizer(models.BPE(**_as_pairs(pieces), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORDS, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_specials(specials, plain=plain))
    if front:
        added = TemplateProcessing(
            single=[*front, "$A"],
            pair=[*front, "$A", *front, "$B:1"],
            special_tokens=[(token, pieces["vocab"][token]) for token in front],
        )
        tokenizer.post_processor = ProcessorSequence([ByteLevelProcessor(trim_offsets=False), added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **roles)


def _as_pairs(pieces: Mapping[str, Any]) -> dict[str, Any]:
    return {"vocab": pieces["vocab"], "merges": [tuple(pair) for pair in pieces["merges"]]}


def gpt2(*, first: Sequence[str] = (), chat_template: str | None = None, **settings: Any) -> GPT2Tokenizer:
    """GPT-2's: one special token, behind all others, and no pad token. `first` is for OPT, whose stand in
    front."""
    last = () if first else ("<|endoftext|>",)
    return GPT2Tokenizer(**byte_pieces(first, last), chat_template=chat_template, **settings)


def opt() -> GPT2Tokenizer:
    """OPT's: puts `</s>`, which is bos and eos, before each text."""
    roles = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return gpt2(first=("<s>", "<pad>", "</s>", "<unk>"), add_bos_token=True, **roles)


def gpt_neox(*, chat_template: str | None = None, **settings: Any) -> GPTNeoXTokenizer:
    """Pythia's and Mamba's: eos in front of all others."""
    first = ("<|endoftext|>", "<|padding|>")
    return GPTNeoXTokenizer(**byte_pieces(first), chat_template=chat_template, **settings)


def qwen2(*, chat_template: str | None = None, eos_token: str = "<|im_end|>") -> Qwen2Tokenizer:
    """Qwen's: no BOS; a turn ends by `<|im_end|>`, a text by `<|endoftext|>`, which is the pad token, too."""
    last = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = Qwen2Tokenizer(**byte_pieces(last=last), chat_template=chat_template, eos_token=eos_token)
    # As in Qwen3: the last two are part of the text.
    thoughts = ("<think>", "</think>")
    tokenizer.add_tokens(_specials((*last, *thoughts), plain=thoughts))
    return tokenizer


def cohere(*, chat_template: str) -> CohereTokenizer:
    """Command R's: puts BOS before each text; the tokens of roles are no special ones to `decode`."""
    first = ("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>")
    roles = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>")
    last = (*roles, "<|END_OF_TURN_TOKEN|>")
    tokenizer = CohereTokenizer(**byte_pieces(first, last), chat_template=chat_template)
    tokenizer.add_tokens(_specials(last, plain=roles))
    return tokenizer


def roberta() -> RobertaTokenizer:
    """RoBERTa's and BART's: `<s>` before and `</s>` behind each text."""
    return RobertaTokenizer(**byte_pieces(("<s>", "<pad>", "</s>", "<unk>"), ("<mask>",)))


def blenderbot(*, chat_template: str | None = None) -> BlenderbotTokenizer:
    """Blenderbot's: a space before and `</s>` behind each text."""
    pieces = byte_pieces(("<pad>", "<s>", "</s>", "<unk>"), ("<mask>",))
    tokenizer = BlenderbotTokenizer(**pieces, chat_template=chat_template)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", pieces["vocab"]["</s>"])]
    )
    return tokenizer


def openai_gpt() -> OpenAIGPTTokenizer:
    """GPT-1's: lower case, the end of a word marked; it has no eos of its own."""
    pieces, merges = _learned("words")
    vocabulary = _numbered(["<unk>", *pieces])
    tokenizer = OpenAIGPTTokenizer(vocab=vocabulary, merges=list(merges), eos_token="<eos>")
    return tokenizer


# ------------------------------------------------------------------------------ SentencePiece-like encodings

_LLAMA = ("<unk>", "<s>", "</s>")


def llama(
    last: Sequence[str] = (), *, chat_template: str | None = None, add_bos_token: bool = True, **roles: Any
) -> LlamaTokenizer:
    """Llama-2's, Mistral's and Phi-3's: a space before each text, `decode` takes the first one away."""
    tokenizer = LlamaTokenizer(
        **metaspace_pieces(_LLAMA, last), add_bos_token=add_bos_token, chat_template=chat_template, **roles
    )
    tokenizer.add_tokens(_specials(last))
    return tokenizer


def gemma(*, chat_template: str | None = None) -> GemmaTokenizer:
    """Gemma's: no space before a text; a turn ends by a token that is not the tokenizer's eos."""
    first, last = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), ("<start_of_turn>", "<end_of_turn>")
    tokenizer = GemmaTokenizer(
        **metaspace_pieces(first, last), chat_template=chat_template, add_bos_token=True
    )
    tokenizer.add_tokens(_specials(last))
    return tokenizer


def t5() -> T5Tokenizer:
    """T5's: `</s>` behind each text, and sentinels at the end of the vocabulary."""
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(4))]
    return T5Tokenizer(unigram_pieces(("<pad>", "</s>", "<unk>"), sentinels), extra_ids=4)


def mbart() -> MBartTokenizer:
    """mBART's: `</s>` and the language behind each text; about two dozen languages beside the pieces."""
    from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

    last = (*FAIRSEQ_LANGUAGE_CODES, "<mask>")
    return MBartTokenizer(
        unigram_pieces(("<s>", "<pad>", "</s>", "<unk>"), last), src_lang="en_XX", tgt_lang="de_DE"
    )


def pegasus() -> PegasusTokenizer:
    """Pegasus's: `</s>` behind each text."""
    first = ("<pad>", "</s>", "<mask_1>", "<mask_2>", *(f"<unk_{number}>" for number in range(2, 6)), "<unk>")
    return PegasusTokenizer(unigram_pieces(first), offset=6)


def marian() -> PreTrainedTokenizerFast:
    """Marian's: `</s>` behind each text, the pad token last. Its own class needs the library
    sentencepiece."""
    pieces = unigram_pieces(("</s>", "<unk>"), ("<pad>",))
    return _unigram(pieces, "$A </s>", "</s>", unk=1, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def m2m100() -> PreTrainedTokenizerFast:
    """NLLB's and M2M-100's: the source language before and `</s>` behind each text."""
    languages = ("__en__", "__de__", "__fr__")
    pieces = unigram_pieces(("<s>", "<pad>", "</s>", "<unk>"), languages)
    roles = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = _unigram(pieces, "__en__ $A </s>", "</s>", "__en__", unk=3, **roles)
    tokenizer.add_tokens(_specials(languages))
    return tokenizer


def xglm() -> XGLMTokenizer:
    """XGLM's: `</s>`, which ends a text, before each as well."""
    return XGLMTokenizer(unigram_pieces(("<s>", "<pad>", "</s>", "<unk>")))


def _unigram(
    pieces: list[tuple[str, float]], single: str, *specials: str, unk: int, **roles: str
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    ids = _numbered([piece for piece, _ in pieces])
    tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[(token, ids[token]) for token in specials]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def bert() -> BertTokenizer:
    """BERT's word pieces: lower case, `[CLS]` before and `[SEP]` behind each text, here bos and eos."""
    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = _numbered([*specials, *_word_pieces()])
    return BertTokenizer(vocabulary, bos_token="[CLS]", eos_token="[SEP]")
