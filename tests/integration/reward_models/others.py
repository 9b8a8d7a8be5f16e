"""Replicas that no card describes: the forms of public heads, with other names, files and extra tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.integration.reward_models import templates
from tests.integration.reward_models.bodies import WIDTH, Body, base_folder, body, linear
from tests.integration.reward_models.chats import gemma, llama_3, qwen
from tests.integration.reward_models.classifiers import by_template
from tests.integration.reward_models.parts import (
    config_of,
    named_tensors,
    save_config,
    save_tensors,
    save_tokenizer,
    scattered,
)
from tests.integration.reward_models.replica import Pipeline, Replica


def _pickled_head_beside_a_trunk(folder: Path) -> Pipeline:
    """The trunk as `AutoModel` saves it, without a prefix; the head as `torch.save` of a layer's state."""
    parts = body("qwen2", qwen(templates.CHATML), linear(bias=True), seed=61)
    parts.publish(folder, named_tensors("", parts.trunk), "Qwen2Model", shards=5)
    torch.save(parts.head.state_dict(), folder / "reward_head.pt")
    return parts.pipeline(folder, by_template)


_CODE = """
import torch.nn as nn
from transformers import GemmaModel, GemmaPreTrainedModel


class GemmaJudge(GemmaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = GemmaModel(config)
        self.ranker = nn.Sequential(
            nn.Linear(config.hidden_size, config.judge_width), nn.Tanh(), nn.Linear(config.judge_width, 3)
        )
"""


def _three_outputs_of_two_layers(folder: Path) -> Pipeline:
    """Two layers with tanh, as the code beside the weights says; a language model's head left over."""
    head = nn.Sequential(nn.Linear(WIDTH, 20), nn.Tanh(), nn.Linear(20, 3))
    parts = body("gemma", gemma(), head, seed=62)
    tensors = parts.tensors("model.", "ranker.")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    parts.publish(folder, tensors, "GemmaJudge", keys={"judge_width": 20}, shards=3)
    (folder / "modeling_judge.py").write_text(_CODE)
    return parts.pipeline(folder, by_template)


def _saved_by_a_wrapper(folder: Path) -> Pipeline:
    """Of a type that transformers does not know; `module.` before every name, as DDP saves them."""
    parts = body("llama", llama_3(pad_token="<|finetune_right_pad_id|>"), linear(), seed=63)
    tensors = parts.tensors("module.model.", "module.reward_proj.")
    keys = {"model_type": "llama_reward", "reward_head_type": "linear"}
    base_folder(folder, parts, "LlamaForCausalLM")
    parts.publish(folder, tensors, "LlamaRewardWrapper", keys=keys, pickled=True, shards=2)
    return parts.pipeline(folder, by_template)


def _tied_language_model(folder: Path) -> Pipeline:
    """Scores by the logit of a token; the head is the embedding, and so is not in the file."""
    tokenizer = qwen(templates.CHATML, "<|good|>")
    config = config_of("qwen2", tokenizer, tie_word_embeddings=True)
    model = scattered(AutoModelForCausalLM.from_config(config), seed=64)
    save_config(folder, config, architectures=["Qwen2ForCausalLM"], torch_dtype="bfloat16", dtype=None)
    save_tensors(folder, named_tensors("model.", model.model))
    save_tokenizer(folder, tokenizer)
    head = nn.Linear(WIDTH, 1, bias=False)
    row = tokenizer.convert_tokens_to_ids("<|good|>")
    head.weight = nn.Parameter(model.lm_head.weight[row : row + 1])
    return Body(model.model, head, tokenizer).pipeline(folder, by_template)


# --------------------------------------------------------------------------------------------------- refused


class _GatedBins(nn.Module):
    """22 objectives of 10 bins each, whose weighted distribution has an expectation between 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.regression, self.gate = _three_layers(220), _three_layers(22)

    def forward(self, states: Tensor) -> Tensor:
        bins = self.regression(states).view(-1, 10).softmax(-1)
        return (self.gate(states) @ bins @ torch.linspace(0, 1, 10)).view(1)


def _three_layers(outputs: int) -> nn.Sequential:
    layers = (nn.Linear(WIDTH, 24), nn.LeakyReLU(), nn.Linear(24, 24), nn.LeakyReLU())
    return nn.Sequential(*layers, nn.Linear(24, outputs))


def _ldl(folder: Path) -> Pipeline:
    """The trunk, and beside it two networks in pickles of their own."""
    head = _GatedBins()
    parts = body("gemma2", gemma(), head, seed=65)
    parts.publish(folder, named_tensors("", parts.trunk), "Gemma2Model", shards=2)
    torch.save(named_tensors("network.", head.regression), folder / "regression_layer.pt")
    torch.save(named_tensors("network.", head.gate), folder / "gating_layer.pt")
    return parts.pipeline(folder, by_template)


OTHERS: tuple[Replica, ...] = (
    Replica("a pickled head beside a trunk", _pickled_head_beside_a_trunk),
    Replica("three outputs of two layers", _three_outputs_of_two_layers),
    Replica(
        "a head saved by a wrapper",
        _saved_by_a_wrapper,
        {"base_model": "{beside}/base"},
    ),
    Replica("a tied language model", _tied_language_model, {"score_tokens": ("<|good|>",)}),
    Replica(
        "LDL-Reward-Gemma-2-27B",
        _ldl,
        refused="linear layers",
        source="reward-bench rewardbench/models/ldlreward.py",
    ),
)
