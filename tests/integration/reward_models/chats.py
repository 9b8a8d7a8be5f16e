"""Replicas of reward models that are classifiers of transformers: chats, texts and sentence pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.integration.reward_models import templates
from tests.integration.reward_models.classifiers import (
    Encode,
    by_template,
    classifier,
    doubled,
    paired,
    stripped,
    tokenized,
)
from tests.integration.reward_models.parts import as_published, byte_level, pieces, unigram, wordpiece
from tests.integration.reward_models.replica import Messages, Pipeline, Replica

# ------------------------------------------------------------------------------------------------- tokenizers

_LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def llama_3(*more: str, eos: str = "<|eot_id|>", template: str = templates.LLAMA_3, **named: Any) -> Any:
    """Llama 3's tokenizer, which opens a text with the bos and has no pad token unless it is named."""
    tokenizer = byte_level(
        (*_LLAMA_3, "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>", *more),
        frame="<|begin_of_text|> $A",
        words=("\n\n",),
        bos_token="<|begin_of_text|>",
        eos_token=eos,
        chat_template=template,
        **named,
    )
    return as_published(tokenizer, "PreTrainedTokenizerFast", clean_up_tokenization_spaces=True)


def qwen(template: str, *more: str) -> Any:
    """Qwen's tokenizer, which adds nothing to a text."""
    tokenizer = byte_level(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *more),
        words=("\n\n",),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )
    return as_published(tokenizer, "Qwen2Tokenizer", add_bos_token=False, add_prefix_space=False)


def gemma() -> Any:
    """Gemma's tokenizer, which opens a text with the bos."""
    tokenizer = pieces(
        ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"),
        more=("<start_of_turn>", "<end_of_turn>"),
        frame="<bos> $A",
        opens=False,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=templates.GEMMA,
    )
    return as_published(tokenizer, "GemmaTokenizer", add_bos_token=True, add_eos_token=False)


def sentencepiece(
    template: str | None, *more: str, legacy: bool = False, adds_bos: bool = True, **named: Any
) -> Any:
    """Llama 2's, Mistral's and Yi's tokenizer, which has no pad token unless it is named.

    legacy: whether it puts a space behind special tokens too, as Mistral's says of itself.
    """
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    frame = "<s> $A" if adds_bos else "$A"
    tokenizer = pieces(more=more, frame=frame, chat_template=template, **{**special, **named})
    keys = {"legacy": legacy, "add_bos_token": adds_bos, "add_eos_token": False}
    return as_published(tokenizer, "LlamaTokenizer", **keys)


def gpt_2(specials: tuple[str, ...], template: str | None, **named: Any) -> Any:
    """GPT-2's tokenizer with other special tokens: OLMo 2's, SmolLM 2's, GPT-J's."""
    tokenizer = byte_level(specials, chat_template=template, **named)
    return as_published(tokenizer, "GPT2Tokenizer", add_prefix_space=False)


# ------------------------------------------------------------------------------------------------------ chats


def _skywork_llama(folder: Path) -> Pipeline:
    tokenizer = llama_3("[PAD]", template=templates.LLAMA_31, pad_token="[PAD]")
    return classifier(folder, "llama", tokenizer, stripped, seed=1, shards=2)


def _skywork_llama_32(folder: Path) -> Pipeline:
    tokenizer = llama_3(template=templates.LLAMA_32, pad_token="<|finetune_right_pad_id|>")
    return classifier(folder, "llama", tokenizer, stripped, seed=2, tie_word_embeddings=True)


def _skywork_qwen_3(folder: Path) -> Pipeline:
    tokenizer = qwen(templates.QWEN_3, "<think>", "</think>")
    return classifier(folder, "qwen3", tokenizer, stripped, seed=3)


def _btrm_qwen_2(folder: Path) -> Pipeline:
    tokenizer = qwen(templates.chatml_with_system("You are a helpful assistant."))
    return classifier(folder, "qwen2", tokenizer, stripped, seed=4)


def _skywork_gemma_2(folder: Path) -> Pipeline:
    # The published cap of 50 would not be reached by so small a model.
    return classifier(folder, "gemma2", gemma(), by_template, seed=5, attn_logit_softcapping=2.0)


def _grm_gemma_2(folder: Path) -> Pipeline:
    return classifier(folder, "gemma2", gemma(), doubled, seed=6)


def _rm_gemma(folder: Path) -> Pipeline:
    return classifier(folder, "gemma", gemma(), stripped, seed=7)


def _fsfairx(folder: Path) -> Pipeline:
    return classifier(folder, "llama", llama_3("[PAD]", pad_token="[PAD]"), stripped, seed=8)


def _offsetbias(folder: Path) -> Pipeline:
    tokenizer = llama_3("[PAD]", pad_token="[PAD]", padding_side="left")
    return classifier(folder, "llama", tokenizer, stripped, seed=9, shards=3)


def _grm_distill(folder: Path) -> Pipeline:
    tokenizer = llama_3(pad_token="<|end_of_text|>")
    return classifier(folder, "llama", tokenizer, doubled, seed=10)


def _rm_mistral(folder: Path) -> Pipeline:
    tokenizer = sentencepiece(templates.MISTRAL, "[PAD]", legacy=True, pad_token="[PAD]")
    return classifier(folder, "mistral", tokenizer, stripped, seed=11)


def _mistral_raft(folder: Path) -> Pipeline:
    tokenizer = sentencepiece(templates.MISTRAL, legacy=True, pad_token="<unk>")
    return classifier(folder, "mistral", tokenizer, stripped, seed=12)


def _tulu_3(folder: Path) -> Pipeline:
    tokenizer = llama_3("<pad>", eos="<|end_of_text|>", template=templates.TULU, pad_token="<pad>")
    return classifier(folder, "llama", tokenizer, doubled, seed=13)


def _tulu_25(folder: Path) -> Pipeline:
    tokenizer = sentencepiece(templates.TULU, "<pad>", pad_token="<pad>")
    return classifier(folder, "llama", tokenizer, doubled, seed=14)


def _olmo_2(folder: Path) -> Pipeline:
    tokenizer = gpt_2(
        ("<|endoftext|>", "<|pad|>"),
        templates.OLMO_2,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|pad|>",
    )
    return classifier(folder, "olmo2", tokenizer, doubled, seed=15)


def _smoltulu(folder: Path) -> Pipeline:
    tokenizer = gpt_2(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        templates.TULU,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    return classifier(folder, "llama", tokenizer, doubled, seed=16, tie_word_embeddings=True)


def _no_pad_in_config(folder: Path) -> Pipeline:
    tokenizer = llama_3(pad_token="<|finetune_right_pad_id|>")
    keys = {"pad_token_id": None}
    return classifier(folder, "llama", tokenizer, stripped, seed=17, keys=keys, pad_as_rewardbench=True)


def _no_pad_at_all(folder: Path) -> Pipeline:
    """Alone, a dialogue is read at its last token: nothing in it can be padding."""
    return classifier(folder, "llama", llama_3(), stripped, seed=18, keys={"pad_token_id": None})


def _eos_as_pad(folder: Path) -> Pipeline:
    """RewardBench takes the eos for padding: a dialogue is read before the eos that ends it."""
    keys = {"pad_token_id": None}
    return classifier(folder, "llama", llama_3(), stripped, seed=23, keys=keys, pad_as_rewardbench=True)


# ------------------------------------------------------------------------------------------------------ texts


def text_of(words: Callable[[list[tuple[str, str]]], str]) -> Encode:
    """Encode what a card's code writes of the pairs of question and answer."""

    def encode(tokenizer: Any, messages: Messages) -> dict[str, list[int]]:
        contents = [message["content"] for message in messages]
        return tokenized(tokenizer, words(list(zip(contents[::2], contents[1::2], strict=True))))

    return encode


def _hh_open_llama(folder: Path) -> Pipeline:
    encode = text_of(lambda pairs: " ".join(f"###Human: {ask} ###Assistant: {say}" for ask, say in pairs))
    tokenizer = sentencepiece(None, "[PAD]", pad_token="[PAD]")
    return classifier(folder, "llama", tokenizer, encode, seed=19, tie_word_embeddings=False)


_DPA = (
    "[INST] You must read the following conversation carefully and rate the assistant's response from score "
    "0-100 in these aspects: helpfulness, correctness, coherence, honesty, complexity, verbosity\n\n"
)


def _dpa_mistral(folder: Path) -> Pipeline:
    def words(pairs: list[tuple[str, str]]) -> str:
        return _DPA + "\n\n".join(f"User: {ask}\n\nAssistant: {say}" for ask, say in pairs) + " [/INST]"

    tokenizer = sentencepiece(None, legacy=True, pad_token="</s>")
    return classifier(folder, "mistral", tokenizer, text_of(words), seed=20, num_labels=10)


# ------------------------------------------------------------------------------------------------------ pairs


_FRAMES = {"frame": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"}
_NAMED = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}


def _oasst_deberta(folder: Path) -> Pipeline:
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    specials = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
    tokenizer = unigram(specials, **_FRAMES, **_NAMED, model_input_names=inputs)
    tokenizer = as_published(tokenizer, "DebertaV2Tokenizer", do_lower_case=False, split_by_punct=False)
    return classifier(folder, "deberta-v2", tokenizer, paired, seed=21)


def _cross_encoder(folder: Path) -> Pipeline:
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer = wordpiece(specials, **_FRAMES, **_NAMED, model_input_names=inputs)
    tokenizer = as_published(tokenizer, "BertTokenizer", do_lower_case=True)
    return classifier(folder, "bert", tokenizer, paired, seed=22)


CHATS: tuple[Replica, ...] = (
    Replica(
        "Skywork-Reward Llama-3.1",
        _skywork_llama,
        source="card of Skywork-Reward-Llama-3.1-8B-v0.2; reward-bench rewardbench/models/pipeline.py",
    ),
    Replica(
        "Skywork-Reward-V2 Llama-3.2",
        _skywork_llama_32,
        source="card of Skywork-Reward-V2-Llama-3.2-3B; template of Llama 3.2",
    ),
    Replica("Skywork-Reward-V2 Qwen3", _skywork_qwen_3, source="card of Skywork-Reward-V2-Qwen3-8B"),
    Replica("BTRM-Qwen2", _btrm_qwen_2, source="reward-bench scripts/run_rm.py, default pipeline"),
    Replica("Skywork-Reward-Gemma-2", _skywork_gemma_2, source="card of Skywork-Reward-Gemma-2-27B-v0.2"),
    Replica(
        "GRM-Gemma2-2B-rewardmodel-ft",
        _grm_gemma_2,
        {"recipe": "grm"},
        source="card of GRM-Gemma2-2B-rewardmodel-ft: the rendered text is tokenised as any other",
    ),
    Replica("RM-Gemma", _rm_gemma, source="cards of RM-Gemma-2B and RM-Gemma-7B"),
    Replica("FsfairX-LLaMA3-RM", _fsfairx, source="card of FsfairX-LLaMA3-RM-v0.1"),
    Replica("OffsetBias-RM", _offsetbias, source="card of Llama-3-OffsetBias-RM-8B"),
    Replica("GRM-llama3-8B-distill", _grm_distill, {"recipe": "grm"}, source="card of GRM-llama3-8B-distill"),
    Replica("RM-Mistral-7B", _rm_mistral, source="card of RM-Mistral-7B"),
    Replica("Mistral-RM-for-RAFT", _mistral_raft, source="card of Mistral-RM-for-RAFT-GSHF-v0"),
    Replica(
        "Tulu-3-RM",
        _tulu_3,
        {"recipe": "tulu-rm"},
        source="reward-bench rewardbench/models/pipeline.py; open-instruct dataset_transformation.py",
    ),
    Replica("Tulu-2.5-RM", _tulu_25, {"recipe": "tulu-rm"}, source="the same, over Llama 2"),
    Replica("OLMo-2-RM", _olmo_2, source="the same, over OLMo 2"),
    Replica("SmolTulu-RM", _smoltulu, source="the same, over SmolLM 2"),
    Replica("classifier without a pad token in config.json", _no_pad_in_config, source="reward-bench"),
    Replica("classifier without a pad token", _no_pad_at_all, source="transformers modeling_layers.py"),
    Replica(
        "classifier without a pad token, padded with its eos",
        _eos_as_pad,
        {"pad_token": "<|eot_id|>", "pooling": "hf"},
        source="reward-bench scripts/run_rm.py",
    ),
    Replica(
        "hh_rlhf_rm_open_llama_3b",
        _hh_open_llama,
        {"recipe": "hh-rlhf-rm-open-llama"},
        source="card of hh_rlhf_rm_open_llama_3b",
    ),
    Replica(
        "RewardModel-Mistral-7B-for-DPA",
        _dpa_mistral,
        {"recipe": "dpa-rm"},
        source="card of RewardModel-Mistral-7B-for-DPA-v1",
    ),
    Replica(
        "OASST reward-model-deberta-v3-large-v2",
        _oasst_deberta,
        {"recipe": "oasst-deberta"},
        source="card of reward-model-deberta-v3-large-v2",
    ),
    Replica("cross-encoder (BERT)", _cross_encoder, {"template": "pair"}, source="sentence-transformers"),
)
