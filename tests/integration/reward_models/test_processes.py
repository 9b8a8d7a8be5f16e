"""The replicas of process rewards: what they read, literally; and the recipes' templates write the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.reward_models import processes
from tests.integration.reward_models.processes import (
    llama_tokenizer,
    mistral_tokenizer,
    qwen_tokenizer,
    trl_ids,
)
from tests.integration.reward_models.replica import SOLUTIONS, Messages

RECIPES = yaml.safe_load((Path(__file__).parents[3] / "converters" / "recipes.yaml").read_text())["recipes"]
TWO_STEPS = SOLUTIONS[0]
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
RULES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def rendered(tokenizer: Any, recipe: str, messages: Messages) -> str:
    """What the recipe's chat template makes of a dialogue."""
    tokenizer.chat_template = RECIPES[recipe]["options"]["chat_template"]
    return tokenizer.apply_chat_template(messages, tokenize=False)


def test_qwens_steps_are_closed_by_the_extra_token() -> None:
    assert processes.qwen_prm_text(qwen_tokenizer("<extra_0>"), TWO_STEPS) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n"
        "<|im_start|>user\nWhat is two and two?<|im_end|>\n"
        "<|im_start|>assistant\nTwo is one and one.<extra_0>So it is four.<extra_0><|im_end|>\n"
    )


def test_math_shepherds_steps_are_lines_that_end_in_the_tag() -> None:
    text = "What is two and two? Two is one and one. ки\nSo it is four. ки"
    tokenizer = mistral_tokenizer()

    assert processes.shepherd_text(TWO_STEPS) == text
    assert rendered(tokenizer, "math-shepherd", TWO_STEPS) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("+ -")[1:]) == ["▁+", "▁-"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("ки")) == ["<s>", "▁ки"]


@pytest.mark.parametrize("content", ["One.\n\nTwo.", "One. ки\nTwo. ки", "One. ки\nTwo.", "One.\n\nTwo.ки"])
def test_math_shepherds_template_takes_steps_with_and_without_tags(content: str) -> None:
    messages = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": content}]

    assert rendered(mistral_tokenizer(), "math-shepherd", messages) == "How? One. ки\nTwo. ки"


def test_rlhflows_steps_are_turns_of_the_user() -> None:
    user, assistant = HEADER.format("user"), HEADER.format("assistant")
    text = (
        f"<|begin_of_text|>{HEADER.format('system')}{RULES}<|eot_id|>"
        f"{user}What is two and two? Two is one and one.<|eot_id|>{assistant}+<|eot_id|>"
        f"{user}So it is four.<|eot_id|>{assistant}+<|eot_id|>"
    )
    tokenizer = llama_tokenizer()
    turns = processes.rlhflow_turns(TWO_STEPS)

    assert tokenizer.apply_chat_template(turns[-1], tokenize=False) == text
    assert rendered(tokenizer, "rlhflow-prm", TWO_STEPS) == text


def test_rlhflows_outcome_is_read_where_the_sign_would_be() -> None:
    text = (
        f"<|begin_of_text|>{HEADER.format('system')}{RULES}<|eot_id|>{HEADER.format('user')}"
        "What is two and two? Two is one and one.\n\nSo it is four.<|eot_id|>" + HEADER.format("assistant")
    )

    assert rendered(llama_tokenizer(), "rlhflow-orm", TWO_STEPS) == text


@pytest.mark.parametrize("recipe", ["math-shepherd", "rlhflow-prm", "skywork-o1-prm", "trl-prm"])
def test_the_prompt_is_written_alike_with_and_without_the_answer(recipe: str) -> None:
    tokenizer = llama_tokenizer() if recipe == "rlhflow-prm" else qwen_tokenizer()
    earlier = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1.\n\nSo."}]
    whole = rendered(tokenizer, recipe, [*earlier, *TWO_STEPS])
    prompt = rendered(tokenizer, recipe, [*earlier, TWO_STEPS[0]])

    end = prompt.rindex("two?") + len("two?")
    assert whole[:end] == prompt[:end]


def test_skyworks_steps_are_lines_and_are_encoded_by_themselves() -> None:
    tokenizer = qwen_tokenizer(bos_token="<|endoftext|>")
    ids, places = processes.skywork_ids(tokenizer, TWO_STEPS)

    text = "<|endoftext|>What is two and two?\nTwo is one and one.\n\nSo it is four.\n"
    assert tokenizer.decode(ids) == text
    assert rendered(tokenizer, "skywork-o1-prm", TWO_STEPS) + "\n" == text
    assert [tokenizer.decode(ids[:place]) for place in places] == [text[:-17], text[:-16], text[:-1]]
    assert ids != tokenizer.encode(text)  # as a whole, the full stop takes the line ends along


def test_trls_steps_are_encoded_by_themselves() -> None:
    tokenizer = qwen_tokenizer()
    ids, places = trl_ids(tokenizer, TWO_STEPS)

    text = "What is two and two?Two is one and one.\nSo it is four.\n"
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode(ids[: place + 1]) for place in places] == [text[:-15], text]
    assert (
        rendered(tokenizer, "trl-prm", TWO_STEPS)
        == "What is two and two?Two is one and one.\n\nSo it is four."
    )
    assert "?T" in tokenizer.tokenize(text)
    assert ids != tokenizer.encode(text)
