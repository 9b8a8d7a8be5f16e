"""Replicas of value heads: normalised by what config.json or a buffer holds, or beside a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from tests.integration.reward_models import templates
from tests.integration.reward_models.bodies import Body, body, linear
from tests.integration.reward_models.chats import llama_3, qwen, sentencepiece, text_of
from tests.integration.reward_models.classifiers import Card, by_template
from tests.integration.reward_models.parts import (
    config_of,
    named_tensors,
    save_config,
    save_tensors,
    save_tokenizer,
    scattered,
)
from tests.integration.reward_models.replica import Pipeline, Replica

# --------------------------------------------------------------------------------------------- normalised


def _beaver(folder: Path, *, seed: int, keys: dict[str, Any], bias: bool, finish: Any) -> Pipeline:
    tokenizer = sentencepiece(None, "<pad>", pad_token="<pad>", padding_side="left")
    parts = body("llama", tokenizer, linear(bias=bias), seed=seed)
    tensors = parts.tensors("model.", "score_head.")
    tensors |= {"normalizer.mean": torch.tensor([-1.5]), "normalizer.var": torch.tensor([6.25])}
    tensors["normalizer.count"] = torch.tensor([1000])
    common = {"bias": bias, "score_dim": 1, "mean": [-1.5], "var": [6.25], "momentum": 0.9}
    kind = {"normalizer_type": "ExponentialMovingAverage"}
    parts.publish(folder, tensors, "LlamaForScore", keys={**common, **kind, **keys}, pickled=True, shards=2)

    def words(pairs: list[tuple[str, str]]) -> str:
        return "BEGINNING OF CONVERSATION: " + "</s>".join(
            f"USER: {ask} ASSISTANT:{say}" for ask, say in pairs
        )

    return parts.pipeline(folder, text_of(words), finish=finish)


def _beaver_reward(folder: Path) -> Pipeline:
    keys = {"score_type": "reward", "do_normalize": False}
    return _beaver(folder, seed=43, keys=keys, bias=False, finish=lambda score: score)


def _beaver_normalised(folder: Path) -> Pipeline:
    keys = {"score_type": "reward", "do_normalize": True}
    return _beaver(folder, seed=44, keys=keys, bias=True, finish=lambda score: (score + 1.5) / (2.5 + 1e-8))


def _beaver_cost(folder: Path) -> Pipeline:
    keys = {"score_type": "cost", "do_normalize": True}
    return _beaver(folder, seed=145, keys=keys, bias=True, finish=lambda score: score / (2.5 + 1e-8))


def _openrlhf(folder: Path, head: str, *, seed: int, keys: dict[str, Any], finish: Any) -> Pipeline:
    """The config is the language model's: it knows of no labels."""
    parts = body("llama", llama_3(pad_token="<|finetune_right_pad_id|>"), linear(), seed=seed)
    parts.publish(folder, parts.tensors("model.", f"{head}."), "RewardModel", keys=keys, shards=2)
    return parts.pipeline(folder, by_template, finish=finish)


def _openrlhf_normalised(folder: Path) -> Pipeline:
    keys = {"normalize_reward": True, "mean": 0.75, "std": 2.5, "value_head_prefix": "score"}
    return _openrlhf(folder, "score", seed=46, keys=keys, finish=lambda score: (score - 0.75) / 2.5)


def _openrlhf_value_head(folder: Path) -> Pipeline:
    keys = {"normalize_reward": False, "mean": 0.75, "std": 2.5}
    return _openrlhf(folder, "value_head", seed=47, keys=keys, finish=lambda score: score)


def _openrlhf_own_prefix(folder: Path) -> Pipeline:
    keys = {"normalize_reward": False, "value_head_prefix": "judge_of_answers"}
    return _openrlhf(folder, "judge_of_answers", seed=48, keys=keys, finish=lambda score: score)


# ----------------------------------------------------------------------------- beside a language model


def _trl_value_head(folder: Path) -> Pipeline:
    """One file, the head beside the language model's own tensors."""
    parts = body("qwen2", qwen(templates.CHATML), linear(bias=True), seed=49)
    tensors = parts.tensors("model.", "v_head.summary.")
    tensors["lm_head.weight"] = torch.randn(len(parts.tokenizer), 32)
    parts.publish(folder, tensors, "Qwen2ForCausalLM", shards=2)
    return parts.pipeline(folder, by_template)


def _llama_factory(folder: Path) -> Pipeline:
    """A whole language model, and the head in a file of its own; Skywork-VL-Reward has this form too."""
    parts = body("llama", llama_3(pad_token="<|eot_id|>"), linear(bias=True), seed=50)
    tensors = named_tensors("model.", parts.trunk)
    tensors["lm_head.weight"] = torch.randn(len(parts.tokenizer), 32)
    parts.publish(folder, tensors, "LlamaForCausalLM", shards=2)
    head = named_tensors("v_head.summary.", parts.head)
    save_file({name: tensor.clone() for name, tensor in head.items()}, folder / "value_head.safetensors")
    return parts.pipeline(folder, by_template)


def _skywork_vl(folder: Path) -> Pipeline:
    """A model of images too, asked about words alone; names and flat config of before transformers 4.52."""
    images = ("vision_start", "vision_end", "image_pad", "video_pad")
    template = templates.chatml_with_system("You are a helpful assistant.")
    tokenizer = qwen(template, *(f"<|{name}|>" for name in images))
    start, end, image, video = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in images)
    text = config_of("qwen2", tokenizer).to_diff_dict()
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    sight = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    settings = {
        **{key: value for key, value in text.items() if key not in ("model_type", "rope_parameters")},
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "image_token_id": image,
        "video_token_id": video,
        "rope_scaling": rope,
        "vision_config": {**sight, "model_type": "qwen2_5_vl", "fullatt_block_indexes": [0]},
    }
    config = AutoConfig.for_model("qwen2_5_vl", **settings)
    model = scattered(AutoModelForImageTextToText.from_config(config), seed=52)
    keys = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**settings, **keys, "model_type": "qwen2_5_vl"}))
    tensors = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in model.state_dict().items()
    }
    save_tensors(folder, tensors, shards=2)
    save_tokenizer(folder, tokenizer)
    head = scattered(linear(bias=True), seed=53)
    save_file(named_tensors("v_head.summary.", head), folder / "value_head.safetensors")
    return Body(model.model, head, tokenizer).pipeline(folder, by_template)


def _nemotron(folder: Path) -> Pipeline:
    """A language model: the score is the logit of the first token of its vocabulary."""
    tokenizer = llama_3(template=templates.LLAMA_31, pad_token="<|finetune_right_pad_id|>")
    config = config_of("llama", tokenizer)
    model = scattered(AutoModelForCausalLM.from_config(config), seed=51)
    keys = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "dtype": None}
    save_config(folder, config, **keys)
    save_tensors(folder, model.state_dict(), shards=2)
    save_tokenizer(folder, tokenizer)

    def score(inputs: dict[str, list[int]]) -> list[float]:
        with torch.no_grad():
            return [model(torch.tensor([inputs["input_ids"]])).logits[0, -1, 0].item()]

    return Card(AutoTokenizer.from_pretrained(folder), by_template, score)


VALUE_HEADS: tuple[Replica, ...] = (
    Replica(
        "beaver reward",
        _beaver_reward,
        {"recipe": "beaver"},
        source="reward-bench rewardbench/models/beaver.py; card of beaver-7b-v1.0-reward",
    ),
    Replica("beaver reward, normalised", _beaver_normalised, {"recipe": "beaver"}, source="the same"),
    Replica("beaver cost", _beaver_cost, {"recipe": "beaver"}, source="the same; the card does not negate"),
    Replica(
        "OpenRLHF, normalised",
        _openrlhf_normalised,
        source="OpenRLHF openrlhf/models/model.py",
    ),
    Replica("OpenRLHF value_head", _openrlhf_value_head, source="the same"),
    Replica("OpenRLHF, own prefix", _openrlhf_own_prefix, source="the same"),
    Replica(
        "TRL value head",
        _trl_value_head,
        source="trl modeling_value_head.py",
    ),
    Replica(
        "LLaMA-Factory value_head.safetensors",
        _llama_factory,
        source="reward-bench rewardbench/models/skyvl.py",
    ),
    Replica(
        "Skywork-VL-Reward, words alone",
        _skywork_vl,
        source="reward-bench rewardbench/models/skyvl.py",
    ),
    Replica(
        "Nemotron-70B-Reward-HF",
        _nemotron,
        {"recipe": "nemotron-70b-reward"},
        source="card of Llama-3.1-Nemotron-70B-Reward-HF",
    ),
)
