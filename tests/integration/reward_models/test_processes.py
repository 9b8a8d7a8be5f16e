"""Replicas by themselves: what they read, literally, that recipes' templates write the same, and that the
published classes load and compute what the pipelines do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from tests.integration.reward_models import processes
from tests.integration.reward_models.custom import (
    CUSTOM,
    GEMMA_HEADER,
    LLAMA_HEADER,
    gemma_tokenizer,
    internlm2_reward,
    internlm_tokenizer,
    last_start,
    llama_tokenizer,
    template_ids,
    ziya_text,
)
from tests.integration.reward_models.processes import (
    ACROSS,
    PROCESSES,
    mistral_tokenizer,
    qwen_tokenizer,
    trl_ids,
)
from tests.integration.reward_models.replica import DIALOGUES, SOLUTIONS, Messages, Replica
from tests.integration.reward_models.templates import LLAMA_31

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
    tokenizer = llama_tokenizer(template=LLAMA_31, words=ACROSS)
    turns = processes.rlhflow_turns(TWO_STEPS)

    assert tokenizer.apply_chat_template(turns[-1], tokenize=False) == text
    assert rendered(tokenizer, "rlhflow-prm", TWO_STEPS) == text


@pytest.mark.parametrize("content", ["One.\n\n Two. ", "One.\n\n\n\nTwo.", "", "One."])
@pytest.mark.parametrize("closing", ["", HEADER.format("assistant")])
def test_rlhflows_template_takes_steps_closed_or_not(content: str, closing: str) -> None:
    tokenizer = llama_tokenizer(template=LLAMA_31, words=ACROSS)
    answered = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": content}]
    text = tokenizer.apply_chat_template(processes.rlhflow_turns(answered)[-1], tokenize=False)
    closed = [answered[0], {"role": "assistant", "content": content + closing}]

    assert rendered(tokenizer, "rlhflow-prm", closed) == text


def test_rlhflows_outcome_is_read_where_the_sign_would_be() -> None:
    text = (
        f"<|begin_of_text|>{HEADER.format('system')}{RULES}<|eot_id|>{HEADER.format('user')}"
        "What is two and two? Two is one and one.\n\nSo it is four.<|eot_id|>" + HEADER.format("assistant")
    )

    assert rendered(llama_tokenizer(template=LLAMA_31, words=ACROSS), "rlhflow-orm", TWO_STEPS) == text


@pytest.mark.parametrize("recipe", ["math-shepherd", "rlhflow-prm", "skywork-o1-prm", "trl-prm"])
def test_the_prompt_is_written_alike_with_and_without_the_answer(recipe: str) -> None:
    tokenizer = (
        llama_tokenizer(template=LLAMA_31, words=ACROSS) if recipe == "rlhflow-prm" else qwen_tokenizer()
    )
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


def test_the_gates_of_custom_classes_look_for_the_assistants_header() -> None:
    tokenizer, gemma = llama_tokenizer(), gemma_tokenizer()
    pattern = tokenizer.encode(LLAMA_HEADER, add_special_tokens=False)
    tokens = ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "ĊĊ"]
    ids = template_ids(tokenizer, DIALOGUES[0])

    assert tokenizer.convert_ids_to_tokens(pattern) == tokens
    assert tokenizer.decode(ids[: last_start(ids, pattern)]) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is two and two?"
    )
    assert gemma.convert_ids_to_tokens(gemma.encode(GEMMA_HEADER, add_special_tokens=False)) == [
        *("<end_of_turn>", "\n", "<start_of_turn>", "model", "\n")
    ]
    assert gemma.decode(template_ids(gemma, DIALOGUES[0])) == (
        "<bos><start_of_turn>user\nWhat is two and two?<end_of_turn>\n"
        "<start_of_turn>model\nIt is four.<end_of_turn>\n"
    )


def test_internlms_and_ziyas_inputs_are_those_of_their_cards() -> None:
    tokenizer = internlm_tokenizer()

    assert tokenizer.decode(template_ids(tokenizer, DIALOGUES[0])) == (
        "<s><|im_start|>user\nWhat is two and two?<|im_end|>\n<|im_start|>assistant\nIt is four.<|im_end|>\n"
    )
    assert ziya_text(DIALOGUES[0]) == "Human:What is two and two?\n\nAssistant:It is four."
    assert rendered(tokenizer, "ziya-reward", DIALOGUES[3]) == ziya_text(DIALOGUES[3])


@pytest.mark.parametrize(
    "replica", [each for each in PROCESSES if not each.refused], ids=lambda each: each.name
)
def test_a_pipeline_tells_answers_apart(tmp_path: Path, replica: Replica) -> None:
    pipeline = replica.build(tmp_path)
    scores = [tuple(pipeline(messages)) for messages in replica.dialogues]

    assert all(math.isfinite(score) for row in scores for score in row)
    assert len({tuple(round(score, 6) for score in row) for row in scores}) == len(scores)
    assert (tmp_path / "config.json").is_file() and (tmp_path / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["ArmoRM", "QRM-Llama3", "QRM-Gemma-2", "URM", "Ziya-LLaMA-7B-Reward"])
def test_the_published_class_loads_and_computes_what_the_pipeline_does(tmp_path: Path, name: str) -> None:
    (replica,) = (each for each in CUSTOM if each.name == name)
    pipeline = replica.build(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, trust_remote_code=True, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    for messages in replica.dialogues:
        ids = template_ids(tokenizer, messages) if name != "Ziya-LLaMA-7B-Reward" else None
        ids = ids or [*tokenizer.encode(ziya_text(messages)), tokenizer.eos_token_id]
        with torch.no_grad():
            output = model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        scores = output if isinstance(output, torch.Tensor) else output.logits
        assert scores.flatten().tolist() == pytest.approx(pipeline(messages), abs=1e-5)


def test_internlms_class_loads_and_scores_what_the_pipeline_does(tmp_path: Path) -> None:
    pipeline = internlm2_reward(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.float32).eval()

    scores = [model.get_score(tokenizer, messages) for messages in DIALOGUES]
    assert scores == pytest.approx([pipeline(messages)[0] for messages in DIALOGUES], abs=1e-5)


def test_qwens_class_loads_and_scores_every_token(tmp_path: Path) -> None:
    pipeline = processes.qwen_math_prm(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.float32).eval()

    ids = torch.tensor([tokenizer.encode(processes.qwen_prm_text(tokenizer, TWO_STEPS))])
    with torch.no_grad():
        good = model(input_ids=ids)[0].softmax(dim=-1)[..., 1]
    assert good[ids == tokenizer.encode("<extra_0>")[0]].prod().item() == pytest.approx(
        pipeline(TWO_STEPS)[0]
    )
