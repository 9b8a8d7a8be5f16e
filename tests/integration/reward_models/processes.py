"""Process rewards: replicas whose score is read at the end of every step of an answer.

Each pipeline makes the input as its authors' code does, reads one number a step and joins the steps' numbers
as the paper or the card says. `custom.py` holds the models that bring a class of their own, `pairwise.py`
those that are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
)

from tests.integration.reward_models.custom import CUSTOM, llama_tokenizer, split, states_of, write_code
from tests.integration.reward_models.pairwise import PAIRWISE
from tests.integration.reward_models.parts import (
    byte_level,
    config_of,
    named_tensors,
    pieces,
    save_config,
    save_tensors,
    scattered,
)
from tests.integration.reward_models.replica import SOLUTIONS, Messages, Pipeline, Replica
from tests.integration.reward_models.templates import LLAMA_31, chatml_with_system

# ------------------------------------------------------------------------------------------------- tokenizers

ACROSS = (".\n", ".\n\n", "\n\n", "?T")

MATH_CHATML = chatml_with_system("Please reason step by step, and put your final answer within \\boxed{}.")


def qwen_tokenizer(*more: str, bos_token: str | None = None) -> PreTrainedTokenizerFast:
    """Like that of Qwen2.5-Math; `more` special tokens."""
    named: dict[str, Any] = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if bos_token is not None:
        named["bos_token"] = bos_token
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *more)
    tokenizer = byte_level(specials, words=ACROSS, chat_template=MATH_CHATML, **named)
    return split(tokenizer)


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Like that of Math-Shepherd: a step's tag, "+" and "-" are one token each, with their space."""
    return pieces(words=("▁ки", "▁+", "▁-"), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


STEPS: tuple[Messages, ...] = (
    *SOLUTIONS,
    [
        {"role": "user", "content": "Two and two?\n\nShow\nyour steps."},
        {"role": "assistant", "content": "One and one.\n\nTwice that."},
    ],
)
"""The last has in the question what divides the steps of an answer, and ends none there."""


# ----------------------------------------------------------------------------------------------------- inputs


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Return a text's tokens without any that the tokenizer would add."""
    return tokenizer.encode(text, add_special_tokens=False)


def qwen_prm_text(tokenizer: Any, messages: Messages) -> str:
    """Return the card's input: every step of the answer closed by `<extra_0>`."""
    steps = messages[-1]["content"].split("\n\n")
    answer = {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"}
    return tokenizer.apply_chat_template([*messages[:-1], answer], tokenize=False)


def shepherd_text(messages: Messages) -> str:
    """Return the card's input: the question, a space, and lines that end in a space and the tag."""
    question, answer = messages[-2]["content"], messages[-1]["content"]
    return question + " " + "\n".join(f"{step} ки" for step in answer.split("\n\n"))


def rlhflow_turns(messages: Messages) -> list[Messages]:
    """Return the dialogue after each step: the user's turns are steps, the first behind the question; the
    assistant's are "+"."""
    question, answer = messages[-2]["content"], messages[-1]["content"]
    steps = [step.strip() for step in answer.split("\n\n")]
    steps[0] = f"{question} {steps[0]}"
    turns: Messages = []
    after: list[Messages] = []
    for step in steps:
        turns += [{"role": "user", "content": step}, {"role": "assistant", "content": "+"}]
        after.append(list(turns))
    return after


def skywork_ids(tokenizer: Any, messages: Messages) -> tuple[list[int], list[int]]:
    """Return the tokens, and the places of the line ends that close a step; an empty line is a step, too."""
    line_end = tokenizer.encode("\n")[-1]
    ids = tokenizer.encode(tokenizer.bos_token + messages[-2]["content"] + "\n")
    places = []
    for line in messages[-1]["content"].split("\n"):
        ids = [*ids, *(tokenizer.encode(line) if line else []), line_end]
        places.append(len(ids) - 1)
    return ids, places


def trl_ids(tokenizer: Any, messages: Messages) -> tuple[list[int], list[int]]:
    """Return the tokens of the question and of each step, encoded by itself and closed by a line end; and the
    places of these."""
    ids, places = plain_ids(tokenizer, messages[-2]["content"]), []
    for step in messages[-1]["content"].split("\n\n"):
        ids = [*ids, *plain_ids(tokenizer, step), *plain_ids(tokenizer, "\n")]
        places.append(len(ids) - 1)
    return ids, places


# --------------------------------------------------------------------------------------------------- replicas


def logits_of(model: Any, ids: Sequence[int]) -> Tensor:
    """Return the logits of one sample, float [tokens, outputs]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)])).logits[0]


def qwen_math_prm(folder: Path) -> Pipeline:
    """Qwen2.5-Math-PRM-7B and -72B."""
    tokenizer = qwen_tokenizer("<extra_0>")
    config = config_of("qwen2", tokenizer)
    trunk = scattered(AutoModel.from_config(config))
    width = config.hidden_size
    head = scattered(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)), seed=1)
    save_tensors(folder, {**named_tensors("model.", trunk), **named_tensors("score.", head)}, shards=2)
    save_config(
        folder,
        config,
        architectures=["Qwen2ForProcessRewardModel"],
        auto_map={"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"},
    )
    write_code(folder, "modeling_qwen2_rm.py", "modeling_qwen2_rm.py")
    tokenizer.save_pretrained(folder)

    def pipeline(messages: Messages) -> list[float]:
        ids = tokenizer.encode(qwen_prm_text(tokenizer, messages))
        separator = tokenizer.encode("<extra_0>")[0]
        ends = [place for place, token in enumerate(ids) if token == separator]
        with torch.no_grad():
            good = head(states_of(trunk, ids)[ends]).softmax(dim=-1)[:, 1]
        return [math.prod(good.tolist())]

    return pipeline


def math_shepherd(folder: Path) -> Pipeline:
    """math-shepherd-mistral-7b-prm: the language model's "+" against its "-" at every tag."""
    tokenizer = mistral_tokenizer()
    model = _language_model(folder, "mistral", tokenizer)
    plus, minus = tokenizer.encode("+ -")[1:]
    tag = tokenizer.encode("ки")[-1]

    def pipeline(messages: Messages) -> list[float]:
        ids = tokenizer.encode(shepherd_text(messages))
        ends = [place for place, token in enumerate(ids) if token == tag]
        good = logits_of(model, ids)[ends][:, [plus, minus]].softmax(dim=-1)[:, 0]
        return [min(good.tolist())]

    return pipeline


def rlhflow_prm(folder: Path) -> Pipeline:
    """Llama3.1-8B-PRM-Mistral-Data and -Deepseek-Data: one forward pass after each step, mean over them."""
    tokenizer = llama_tokenizer(template=LLAMA_31, words=ACROSS)
    model = _language_model(folder, "llama", tokenizer)

    def pipeline(messages: Messages) -> list[float]:
        good = [_plus_before_sign(tokenizer, model, turns) for turns in rlhflow_turns(messages)]
        return [sum(good) / len(good)]

    return pipeline


def rlhflow_orm(folder: Path) -> Pipeline:
    """Llama3.1-8B-ORM-Mistral-Data and -Deepseek-Data: question and answer are one turn of the user."""
    tokenizer = llama_tokenizer(template=LLAMA_31, words=ACROSS)
    model = _language_model(folder, "llama", tokenizer, seed=3)

    def pipeline(messages: Messages) -> list[float]:
        content = f"{messages[-2]['content']} {messages[-1]['content']}"
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "+"}]
        return [_plus_before_sign(tokenizer, model, turns)]

    return pipeline


def _plus_before_sign(tokenizer: Any, model: Any, turns: Messages) -> float:
    """Return the probability of "+" against "-" where the model would write the sign of the last turn."""
    ids = plain_ids(tokenizer, tokenizer.apply_chat_template(turns, tokenize=False))
    signs = [tokenizer.encode("+")[-1], tokenizer.encode("-")[-1]]
    return logits_of(model, ids)[-3, signs].softmax(dim=-1)[0].item()


def _language_model(folder: Path, family: str, tokenizer: Any, *, seed: int = 0) -> Any:
    model = scattered(AutoModelForCausalLM.from_config(config_of(family, tokenizer)), seed=seed)
    save_tensors(folder, named_tensors("", model))
    save_config(folder, model.config, architectures=[type(model).__name__])
    tokenizer.save_pretrained(folder)
    return model


def skywork_prm(folder: Path) -> Pipeline:
    """Skywork-o1-Open-PRM-Qwen-2.5-1.5B and -7B: a value head on a language model, a sigmoid at line ends.

    How steps become one score its authors leave to the caller; here their mean.
    """
    tokenizer = qwen_tokenizer(bos_token="<|endoftext|>")
    config = config_of("qwen2", tokenizer)
    model = scattered(AutoModelForCausalLM.from_config(config))
    summary = scattered(nn.Linear(config.hidden_size, 1), seed=1)
    save_tensors(folder, {**named_tensors("", model), **named_tensors("v_head.summary.", summary)})
    save_config(folder, config, architectures=["Qwen2ForPrmModel"])
    tokenizer.save_pretrained(folder)

    def pipeline(messages: Messages) -> list[float]:
        ids, places = skywork_ids(tokenizer, messages)
        with torch.no_grad():
            good = torch.sigmoid(summary(states_of(model.model, ids)[places]))
        return [good.mean().item()]

    return pipeline


def trl_prm(folder: Path) -> Pipeline:
    """What TRL's PRMTrainer saves: a token classifier with two labels; here the mean of the steps."""
    tokenizer = qwen_tokenizer()
    model = _token_classifier(folder, tokenizer)

    def pipeline(messages: Messages) -> list[float]:
        ids, places = trl_ids(tokenizer, messages)
        return [logits_of(model, ids)[places].softmax(dim=-1)[:, 1].mean().item()]

    return pipeline


def pure_prm(folder: Path) -> Pipeline:
    """PURE-PRM-7B, whose card subtracts the probability of a wrong step from that of a right one.

    This is (p - 0.5) / 0.5 of the right one: `reward_model.json`, which a user adds, says so.
    """
    tokenizer = qwen_tokenizer()
    model = _token_classifier(folder, tokenizer, seed=6)
    rules = {"mean": 0.5, "std": 0.5, "normalise": True}
    (folder / "reward_model.json").write_text(json.dumps(rules))

    def pipeline(messages: Messages) -> list[float]:
        ids, places = trl_ids(tokenizer, messages)
        probabilities = logits_of(model, ids)[places].softmax(dim=-1)
        return [min((probabilities[:, 1] - probabilities[:, 0]).tolist())]

    return pipeline


def _token_classifier(folder: Path, tokenizer: Any, *, seed: int = 0) -> Any:
    config = config_of("qwen2", tokenizer, num_labels=2)
    model = scattered(AutoModelForTokenClassification.from_config(config), seed=seed)
    save_tensors(folder, named_tensors("", model))
    save_config(folder, config, architectures=["Qwen2ForTokenClassification"])
    tokenizer.save_pretrained(folder)
    return model


PROCESSES: tuple[Replica, ...] = (
    Replica(
        "Qwen2.5-Math-PRM",
        qwen_math_prm,
        {"recipe": "qwen2.5-math-prm"},
        STEPS,
        source="card of Qwen/Qwen2.5-Math-PRM-7B; vllm qwen2_rm.py; product of steps: arXiv 2501.07301",
    ),
    Replica(
        "Math-Shepherd PRM",
        math_shepherd,
        {"recipe": "math-shepherd"},
        STEPS,
        source="card of peiyi9979/math-shepherd-mistral-7b-prm; lowest step: arXiv 2312.08935",
    ),
    Replica(
        "RLHFlow PRM",
        rlhflow_prm,
        {"recipe": "rlhflow-prm"},
        STEPS,
        source="RLHFlow/RLHF-Reward-Modeling math-rm/prm_evaluate.py",
    ),
    Replica(
        "RLHFlow ORM",
        rlhflow_orm,
        {"recipe": "rlhflow-orm"},
        STEPS,
        source="RLHFlow/RLHF-Reward-Modeling math-rm/README.md",
    ),
    Replica(
        "Skywork-o1-Open-PRM",
        skywork_prm,
        {"recipe": "skywork-o1-prm", "aggregate": "mean"},
        STEPS,
        source="SkyworkAI/skywork-o1-prm-inference model_utils/io_utils.py, prm_model.py",
    ),
    Replica(
        "TRL PRMTrainer",
        trl_prm,
        {"recipe": "trl-prm", "aggregate": "mean"},
        STEPS,
        source="TRL, trl/trainer/prm_trainer.py tokenize_row",
    ),
    Replica(
        "PURE-PRM",
        pure_prm,
        {"recipe": "trl-prm"},
        STEPS,
        source="card of jinachris/PURE-PRM-7B",
    ),
    *CUSTOM,
    *PAIRWISE,
)
