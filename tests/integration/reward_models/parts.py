"""Tiny tokenizers, trunks and files in the forms that public reward models have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerFast

WINDOW = 512
"""Tokens that a tiny model reads."""

# ------------------------------------------------------------------------------------------------- tokenizers


def byte_level(
    specials: Sequence[str], *, frame: str = "$A", words: Sequence[str] = (), **named: Any
) -> PreTrainedTokenizerFast:
    """Like Llama 3's, Qwen's and GPT-2's: a byte a token, ids from 0; then the special tokens in their order.

    frame: special tokens around a text, as `TemplateProcessing` takes it, for example `<bos> $A`.
    words: texts that are one token each.
    named: `bos_token`, `eos_token`, `pad_token`, `chat_template`, ... of the tokenizer.
    """
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges = _joined([as_bytes.pre_tokenize_str(word)[0][0] for word in words], vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, specials, frame, named)


def pieces(
    specials: Sequence[str] = ("<unk>", "<s>", "</s>"),
    *,
    more: Sequence[str] = (),
    frame: str = "<s> $A",
    words: Sequence[str] = (),
    opens: bool = True,
    **named: Any,
) -> PreTrainedTokenizerFast:
    """Like those of a SentencePiece model (Llama 2, Mistral, Yi, Gemma): special tokens, then bytes for what
    is not known, then letters, a space being one of them.

    specials: the first ids. more: special tokens that were added later, the last ids.
    opens: whether a space is put before each stretch of text, as with Llama 2; Gemma puts none.
    frame, words, named: as for `byte_level`; a word with its space is for example "▁word".
    """
    vocabulary = {token: index for index, token in enumerate(specials)}
    for number in range(256):
        vocabulary[f"<0x{number:02X}>"] = len(vocabulary)
    for letter in ("▁", "\n", *(chr(code) for code in range(33, 127)), *"".join(words)):
        vocabulary.setdefault(letter, len(vocabulary))
    merges = _joined(words, vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if opens else spaces
    first = [decoders.Strip(" ", 1, 0)] if opens else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *first]
    )
    return _finished(tokenizer, (*specials, *more), frame, named)


def unigram(specials: Sequence[str], *, frame: str, pair: str, **named: Any) -> PreTrainedTokenizerFast:
    """Like DeBERTa v3's: a SentencePiece unigram model of letters, a token at either end and between a pair.

    frame, pair: of one text and of two, as `TemplateProcessing` takes them.
    """
    letters = ("▁", *(chr(code) for code in range(33, 127)))
    scores = [(token, 0.0) for token in (*specials, *letters)]
    unknown = [token for token, _ in scores].index("[UNK]")
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _finished(tokenizer, specials, frame, named, pair=pair)


def wordpiece(specials: Sequence[str], *, frame: str, pair: str, **named: Any) -> PreTrainedTokenizerFast:
    """Like BERT's: lower case, a letter a token, a token at either end and between a pair.

    frame, pair: of one text and of two, as `TemplateProcessing` takes them.
    """
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {
        token: index for index, token in enumerate((*specials, *letters, *(f"##{each}" for each in letters)))
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _finished(tokenizer, specials, frame, named, pair=pair)


def as_published(tokenizer: Any, tokenizer_class: str, **keys: Any) -> Any:
    """Have `save_tokenizer` write this class and these keys into tokenizer_config.json, as its family has."""
    tokenizer.published = {"tokenizer_class": tokenizer_class, **keys}
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write the tokenizer's files."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    content = {**json.loads(file.read_text()), **getattr(tokenizer, "published", {})}
    content.pop("backend", None)  # of transformers 5; the published ones are older
    file.write_text(json.dumps(content, indent=2))


def _joined(words: Sequence[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Add the words to a vocabulary that has their letters; return the merges that make them."""
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    return merges


def _finished(
    tokenizer: Tokenizer,
    specials: Sequence[str],
    frame: str,
    named: dict[str, Any],
    *,
    pair: str | None = None,
) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    framed = {part.split(":")[0] for part in f"{frame} {pair or ''}".split()} - {"$A", "$B"}
    tokenizer.post_processor = TemplateProcessing(
        single=frame, pair=pair, special_tokens=[(token, tokenizer.token_to_id(token)) for token in framed]
    )
    chat_template = named.pop("chat_template", None)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = chat_template
    return fast


# ----------------------------------------------------------------------------------------------------- trunks

_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "max_position_embeddings": WINDOW,
}
_GEMMA = {**_SHAPE, "head_dim": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": _SHAPE,
    "mistral": {**_SHAPE, "sliding_window": None},
    "qwen2": _SHAPE,
    "qwen3": {**_SHAPE, "head_dim": 16},
    "olmo2": _SHAPE,
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, "query_pre_attn_scalar": 16},
    "gptj": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": WINDOW, "rotary_dim": 8},
    "gpt_neox": {key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"},
    "bert": {**_SHAPE, "type_vocab_size": 2},
    "deberta-v2": {
        **_SHAPE,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
}
"""Family of trunks -> two layers of width 32 over a window of 512 tokens."""


def config_of(family: str, tokenizer: Any, **overrides: Any) -> Any:
    """Configuration of a tiny trunk that embeds the tokenizer's ids, with its special tokens' ids."""
    named = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return AutoConfig.for_model(
        family, **{"vocab_size": len(tokenizer), **named, **SHAPES[family], **overrides}
    )


def scattered(module: Any, *, seed: int = 0) -> Any:
    """Make a module's weights random enough that scores differ, and exact in bfloat16; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            spread = parameter + 0.1 * noise if parameter.ndim == 1 else 0.25 * noise
            parameter.copy_(spread.to(torch.bfloat16))
    return module.eval()


# ------------------------------------------------------------------------------------------------------ files


def save_config(folder: Path, config: Any, **keys: Any) -> None:
    """Write config.json; `keys` are added to it, None takes one out."""
    content = {**config.to_diff_dict(), **keys}
    content = {key: value for key, value in content.items() if not (key in keys and value is None)}
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True))


def save_tensors(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    shards: int = 1,
    pickled: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write weights as they are published: one file or several with an index, safetensors or pickles."""
    stored = {
        name: tensor.detach().clone().to(dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}.{ending}" if shards > 1 else f"{stem}.{ending}"
        part = {name: stored[name] for name in list(stored)[number::shards]}
        weight_map |= dict.fromkeys(part, file)
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def named_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """Return a module's tensors, the prefix before their names."""
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
