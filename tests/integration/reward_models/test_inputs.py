"""What the pipelines of the replicas read is what the cards of these families write."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.integration.reward_models.chats import CHATS
from tests.integration.reward_models.classifiers import Card
from tests.integration.reward_models.heads import HEADS
from tests.integration.reward_models.replica import DIALOGUES, Replica

ASK, SAY, ASK_AGAIN, SAY_AGAIN = (message["content"] for message in DIALOGUES[3])


def _llama(*, opening: str = "<|begin_of_text|>") -> str:
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>".format
    first = turn("user", ASK) + turn("assistant", SAY)
    return opening + first + turn("user", ASK_AGAIN) + turn("assistant", SAY_AGAIN)


def _chatml(*, system: str = "", thought: str = "", space: str = "") -> str:
    turn = f"<|im_start|>{space}{{}}\n{{}}<|im_end|>{space}\n".format
    opening = turn("system", system) if system else ""
    first = turn("user", ASK) + turn("assistant", SAY)
    return opening + first + turn("user", ASK_AGAIN) + turn("assistant", thought + SAY_AGAIN)


def _gemma(*, opening: str = "<bos>") -> str:
    turn = "<start_of_turn>{}\n{}<end_of_turn>\n".format
    first = turn("user", ASK) + turn("model", SAY)
    return opening + first + turn("user", ASK_AGAIN) + turn("model", SAY_AGAIN)


def _tulu(*, opening: str, eos: str) -> str:
    turn = f"<|user|>\n{{}}\n<|assistant|>\n{{}}{eos}".format
    return f"{opening}{turn(ASK, SAY)}\n{turn(ASK_AGAIN, SAY_AGAIN)}"


def _pairs(pair: str, *, opening: str = "", between: str = "", closing: str = "") -> str:
    return opening + pair.format(ASK, SAY) + between + pair.format(ASK_AGAIN, SAY_AGAIN) + closing


_LLAMA_3 = _llama()
_LLAMA_31 = _llama(
    opening=(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    )
)
_TWO_BOS = _llama(opening="<|begin_of_text|><|begin_of_text|>")
# Tokenizers of SentencePiece models put a space before a text; "legacy" ones behind special tokens as well.
_MISTRAL = _pairs(" [INST] {} [/INST]{}</s>", opening="<s>")
_BEAVER = _pairs("USER: {} ASSISTANT:{}", opening="<s> BEGINNING OF CONVERSATION: ", between="</s>")
_DPA = (
    "<s> [INST] You must read the following conversation carefully and rate the assistant's response from "
    "score 0-100 in these aspects: helpfulness, correctness, coherence, honesty, complexity, verbosity"
)
_ALPACA = (
    "<s> Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
READ: dict[str, str] = {
    "Skywork-Reward Llama-3.1": _LLAMA_31,
    "Skywork-Reward-V2 Qwen3": _chatml(thought="<think>\n\n</think>\n\n"),
    "BTRM-Qwen2": _chatml(system="You are a helpful assistant."),
    "Skywork-Reward-Gemma-2": _gemma(),
    "GRM-Gemma2-2B-rewardmodel-ft": _gemma(opening="<bos><bos>"),
    "RM-Gemma": _gemma(),
    "FsfairX-LLaMA3-RM": _LLAMA_3,
    "OffsetBias-RM": _LLAMA_3,
    "GRM-llama3-8B-distill": _TWO_BOS,
    "RM-Mistral-7B": _MISTRAL,
    "Mistral-RM-for-RAFT": _MISTRAL,
    "Tulu-3-RM": _tulu(opening="<|begin_of_text|>", eos="<|end_of_text|>"),
    "Tulu-2.5-RM": _tulu(opening="<s> ", eos="</s>"),
    "OLMo-2-RM": _tulu(opening="<|endoftext|>", eos="<|endoftext|>"),
    "SmolTulu-RM": _tulu(opening="", eos="<|im_end|>"),
    "classifier without a pad token in config.json": _LLAMA_3,
    "classifier without a pad token": _LLAMA_3,
    "classifier without a pad token, padded with its eos": _LLAMA_3,
    "hh_rlhf_rm_open_llama_3b": _pairs(" ###Human: {} ###Assistant: {}", opening="<s>"),
    "RewardModel-Mistral-7B-for-DPA": _pairs(
        "\n\nUser: {}\n\nAssistant: {}", opening=_DPA, closing=" [/INST]"
    ),
    "OASST reward-model-deberta-v3-large-v2": f"[CLS] {ASK} {SAY} {ASK_AGAIN}[SEP] {SAY_AGAIN}[SEP]",
    "cross-encoder (BERT)": f"[CLS] {ASK} {SAY} {ASK_AGAIN} [SEP] {SAY_AGAIN} [SEP]".lower()
    .replace("[cls]", "[CLS]")
    .replace("[sep]", "[SEP]"),
    "INF-ORM-Llama3.1-70B": _LLAMA_31,
    "Qwen2.5-Math-RM-72B": _chatml(
        system="Please reason step by step, and put your final answer within \\boxed{}."
    ),
    "WorldPM-72B": _chatml(system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "GRM-sftreg": _TWO_BOS,
    "UltraRM-13b": _pairs("Human: {}\n\nAssistant: {}", opening="<s> ", between="\n\n"),
    "Eurus-RM-7b": _pairs(" [INST] {} [/INST] {}", opening="<s>", between="</s>"),
    "Athene-RM": _TWO_BOS + "<|reserved_special_token_1|>",
    "Starling-RM-7B-alpha": _pairs("<s>[INST] {} </s> [/INST] {}</s>", opening="<s>"),
    "Starling-RM-34B": _chatml(space=" "),
    "trlX gptj-rm-static": _pairs("\n\nHuman: {}\n\nAssistant: {}", closing="<|endoftext|>"),
    "OASST pythia": _pairs("<|prompter|>{}<|endoftext|><|assistant|>{}<|endoftext|>"),
    "AlpacaFarm reward-model-human": _pairs("\n\n### Instruction:\n{}\n\n### Response:{}", opening=_ALPACA),
    "beaver reward": _BEAVER,
    "beaver reward, normalised": _BEAVER,
    "beaver cost": _BEAVER,
    "OpenRLHF, normalised": _LLAMA_3,
    "OpenRLHF value_head": _LLAMA_3,
    "OpenRLHF, own prefix": _LLAMA_3,
    "TRL value head": _chatml(),
    "LLaMA-Factory value_head.safetensors": _LLAMA_3,
    "Skywork-VL-Reward, words alone": _chatml(system="You are a helpful assistant."),
    "Nemotron-70B-Reward-HF": _LLAMA_31,
    "a pickled head beside a trunk": _chatml(),
    "three outputs of two layers": _gemma(),
    "a head saved by a wrapper": _LLAMA_3,
    "a tied language model": _chatml(),
    "LDL-Reward-Gemma-2-27B": _gemma(),
}
"""Name of a replica -> what it reads of a dialogue of two turns, as one text."""


@pytest.mark.parametrize("replica", (*CHATS, *HEADS), ids=lambda replica: replica.name)
def test_a_pipeline_reads_what_the_card_writes_and_tells_answers_apart(
    tmp_path: Path, replica: Replica
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    card = replica.build(folder)

    assert isinstance(card, Card)
    if replica.name in READ:
        assert card.text(DIALOGUES[3]) == READ[replica.name]
    else:  # holds the date of today
        assert card.text(DIALOGUES[3]).endswith(_LLAMA_3.removeprefix("<|begin_of_text|>"))
    scores = [card(messages) for messages in replica.dialogues]
    assert all(math.isfinite(score) for row in scores for score in row)
    assert abs(scores[0][0] - scores[1][0]) > 0.01
    assert abs(scores[3][0] - scores[4][0]) > 0.01
