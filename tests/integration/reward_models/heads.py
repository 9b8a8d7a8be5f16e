"""Replicas of reward models whose head no class of transformers has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.integration.reward_models import templates
from tests.integration.reward_models.bodies import base_folder, body, first_of, last_of, linear, two_layers
from tests.integration.reward_models.chats import gpt_2, llama_3, qwen, sentencepiece, text_of
from tests.integration.reward_models.classifiers import by_template, doubled
from tests.integration.reward_models.others import OTHERS
from tests.integration.reward_models.parts import (
    as_published,
    byte_level,
    save_config,
    save_tensors,
    save_tokenizer,
)
from tests.integration.reward_models.replica import Messages, Pipeline, Replica
from tests.integration.reward_models.value_heads import VALUE_HEADS

# ----------------------------------------------------------------------------------------- two linear layers


def _inf_orm(folder: Path) -> Pipeline:
    tokenizer = llama_3("[PAD]", template=templates.LLAMA_31, pad_token="[PAD]")
    parts = body("llama", tokenizer, two_layers(), seed=31, num_labels=1)
    parts.publish(folder, parts.tensors("model.", "score."), "INFORMForSequenceClassification", shards=3)
    return parts.pipeline(folder, by_template)


_QWEN_CODE = """
from torch import nn
from transformers import Qwen2Model, Qwen2PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class Qwen2ForRewardModel(Qwen2PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.num_labels = 1
        self.model = Qwen2Model(config)
        self.score = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size), nn.ReLU(), nn.Linear(config.hidden_size, 1)
        )
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        states = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=self.score(states)[:, -1])
"""


def _qwen_math_rm(folder: Path) -> Pipeline:
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    parts = body("qwen2", qwen(templates.chatml_with_system(system)), two_layers(), seed=32)
    keys = {"auto_map": {"AutoModel": "modeling_qwen2_rm.Qwen2ForRewardModel"}, "pad_token_id": None}
    tensors = parts.tensors("model.", "score.")
    parts.publish(folder, tensors, "Qwen2ForRewardModel", keys=keys, shards=2)
    (folder / "modeling_qwen2_rm.py").write_text(_QWEN_CODE)
    return parts.pipeline(folder, by_template)


def _worldpm(folder: Path) -> Pipeline:
    system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    parts = body("qwen2", qwen(templates.chatml_with_system(system)), two_layers(), seed=33)
    keys = {"auto_map": {"AutoModel": "modeling_qwen2_rm.Qwen2ForRewardModel"}}
    parts.publish(folder, parts.tensors("model.", "score."), "Qwen2ForRewardModel", keys=keys)
    (folder / "modeling_qwen2_rm.py").write_text(_QWEN_CODE)
    return parts.pipeline(folder, by_template)


def _grm_sftreg(folder: Path) -> Pipeline:
    tokenizer = llama_3(pad_token="<|end_of_text|>")
    parts = body("llama", tokenizer, two_layers(inner=64), seed=34)
    keys = {"vhead_layer_type": "mlp", "vhead_num_neurons": 64, "vhead_num_layers": 1}
    parts.publish(folder, parts.tensors("model.", "v_head.summary."), "GRewardModel", keys=keys, shards=2)
    return parts.pipeline(folder, doubled)


# ------------------------------------------------------------------------------------------- one linear layer


def _ultrarm(folder: Path) -> Pipeline:
    parts = body("llama", sentencepiece(None, pad_token="<unk>"), linear(), seed=35)
    tensors = parts.tensors("model.", "regression_head.")
    parts.publish(folder, tensors, "LlamaRewardModel", pickled=True, shards=2)
    encode = text_of(lambda pairs: "\n\n".join(f"Human: {ask}\n\nAssistant: {say}" for ask, say in pairs))
    return parts.pipeline(folder, encode)


_EURUS_CODE = """
from torch import nn
from transformers import MistralConfig, MistralModel, PreTrainedModel


class EurusRewardModel(PreTrainedModel):
    config_class = MistralConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = MistralModel(config)
        self.regression_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        rewards = self.regression_head(self.model(input_ids, attention_mask=attention_mask)[0]).squeeze(-1)
        return rewards.gather(1, attention_mask.cumsum(dim=1).argmax(dim=1).view(-1, 1))
"""


def _eurus(folder: Path) -> Pipeline:
    parts = body(
        "mistral", sentencepiece(templates.MISTRAL, legacy=True, pad_token="<unk>"), linear(), seed=36
    )
    keys = {"auto_map": {"AutoModel": "modeling_eurus_rm.EurusRewardModel"}}
    parts.publish(folder, parts.tensors("model.", "regression_head."), "EurusRewardModel", keys=keys)
    (folder / "modeling_eurus_rm.py").write_text(_EURUS_CODE)
    encode = text_of(lambda pairs: "</s>".join(f"[INST] {ask} [/INST] {say}" for ask, say in pairs))
    return parts.pipeline(folder, encode)


def _athene(folder: Path) -> Pipeline:
    closing = "<|reserved_special_token_1|>"
    tokenizer = llama_3(closing, cls_token=closing, pad_token="<|end_of_text|>")
    parts = body("llama", tokenizer, linear(), seed=37)
    tensors = parts.tensors("model.", "v_head.")
    parts.publish(folder, tensors, "CustomAutoModelForSequenceClassification", shards=4)

    def encode(tokenizer: Any, messages: Messages) -> dict[str, list[int]]:
        text = tokenizer.apply_chat_template(messages, tokenize=False) + tokenizer.cls_token
        return {"input_ids": tokenizer(text).input_ids}

    return parts.pipeline(folder, encode, last_of(tokenizer.cls_token_id))


def _starling_7b(folder: Path) -> Pipeline:
    """The published file holds the language model twice: as `model.*`, and its trunk as `transformer.*`."""
    tokenizer = sentencepiece(templates.LLAMA_2, pad_token="<unk>")
    parts = body("llama", tokenizer, linear(), seed=38)
    base = base_folder(folder, parts, "LlamaForCausalLM")
    trunk = {name: tensor.to(torch.bfloat16) for name, tensor in parts.trunk.state_dict().items()}
    tensors = {f"model.model.{name}": tensor for name, tensor in trunk.items()}
    tensors["model.lm_head.weight"] = torch.randn(len(tokenizer), 32).to(torch.bfloat16)
    tensors |= {f"transformer.{name}": tensor for name, tensor in trunk.items()}
    tensors["v_head.weight"] = parts.head.state_dict()["weight"].to(torch.bfloat16)
    torch.save(tensors, folder / "starling_rm_7b_alpha.pt")
    encode = text_of(lambda pairs: "".join(f"<s>[INST] {ask} </s> [/INST] {say}</s>" for ask, say in pairs))
    return parts.pipeline(base, encode)


def _starling_34b(folder: Path) -> Pipeline:
    """Named like a classifier of transformers, which it is not; its tokenizer is the base model's."""
    marks = ("<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    named = {"bos_token": marks[0], "eos_token": marks[1], "pad_token": "<unk>"}
    tokenizer = sentencepiece(templates.CHATML, *marks, legacy=True, adds_bos=False, **named)
    parts = body("llama", tokenizer, linear(), seed=39)
    base = base_folder(folder, parts, "LlamaForCausalLM")
    keys = {"architectures": ["LlamaForSequenceClassification"], "torch_dtype": "bfloat16", "dtype": None}
    save_config(folder, parts.trunk.config, **keys)
    save_tensors(folder, parts.tensors("transformer.", "v_head."), shards=3)
    return parts.pipeline(base, by_template)


def _trlx_gptj(folder: Path) -> Pipeline:
    end = "<|endoftext|>"
    tokenizer = gpt_2((end,), None, bos_token=end, eos_token=end, unk_token=end)
    parts = body("gptj", tokenizer, linear(), seed=40)
    base = base_folder(folder, parts, "GPTJForCausalLM")
    tensors = {
        name: tensor.to(torch.float16) for name, tensor in parts.tensors("transformer.", "v_head.").items()
    }
    torch.save(tensors, folder / "hf_ckpt.pt")

    def words(pairs: list[tuple[str, str]]) -> str:
        said = "".join(f"\n\nHuman: {ask}\n\nAssistant: {say}" for ask, say in pairs)
        return said + "<|endoftext|>"

    return parts.pipeline(base, text_of(words), first_of(tokenizer.eos_token_id))


def _oasst_pythia(folder: Path) -> Pipeline:
    tokenizer = byte_level(
        ("<|endoftext|>", "<|padding|>", "<|prompter|>", "<|assistant|>"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|padding|>",
    )
    tokenizer = as_published(tokenizer, "GPTNeoXTokenizer", add_prefix_space=False)
    parts = body("gpt_neox", tokenizer, linear(bias=True), seed=41)
    tensors = parts.tensors("gpt_neox.", "out_proj.")
    for layer in range(2):  # buffers of the transformers of that time
        name = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{name}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        tensors[f"{name}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{name}.rotary_emb.inv_freq"] = torch.tensor([1.0, 0.01])
    keys = {"model_type": "gpt_neox_reward_model", "pooling": "last"}
    parts.publish(folder, tensors, "GPTNeoXRewardModel", keys=keys, pickled=True)
    turn = "<|prompter|>{}<|endoftext|><|assistant|>{}<|endoftext|>"
    return parts.pipeline(folder, text_of(lambda pairs: "".join(turn.format(*pair) for pair in pairs)))


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n"
)


def _alpaca_farm(folder: Path) -> Pipeline:
    """Its config names no trunk, only where one lay on the disk of its authors."""
    parts = body("llama", sentencepiece(None, "[PAD]", pad_token="[PAD]"), linear(bias=True), seed=42)
    base = base_folder(folder, parts, "LlamaForCausalLM")
    tensors = parts.tensors("backbone_model.model.", "reward_head.")
    tensors["backbone_model.lm_head.weight"] = torch.randn(len(parts.tokenizer), 32)
    save_tensors(folder, tensors, pickled=True, shards=2)
    config = {
        "architectures": ["RewardModel"],
        "backbone_model_name_or_path": "/models/sft10k",
        "model_type": "reward_model",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder, parts.tokenizer)

    def words(pairs: list[tuple[str, str]]) -> str:
        said = "\n\n".join(f"### Instruction:\n{ask}\n\n### Response:{say}" for ask, say in pairs)
        return _ALPACA + said

    return parts.pipeline(base, text_of(words))


_BASE = {"base_model": "{beside}/base"}

HEADS: tuple[Replica, ...] = (
    Replica(
        "INF-ORM-Llama3.1-70B",
        _inf_orm,
        {"recipe": "inf-orm"},
        source="card of INF-ORM-Llama3.1-70B; reward-bench rewardbench/models/inform.py",
    ),
    Replica(
        "Qwen2.5-Math-RM-72B",
        _qwen_math_rm,
        {"recipe": "qwen2.5-math-rm"},
        source="card of Qwen2.5-Math-RM-72B; vllm qwen2_rm.py",
    ),
    Replica(
        "WorldPM-72B",
        _worldpm,
        {"recipe": "worldpm"},
        source="reward-bench rewardbench/models/worldpm.py",
    ),
    Replica(
        "GRM-sftreg",
        _grm_sftreg,
        {"recipe": "grm-sftreg"},
        source="card of GRM-llama3-8B-sftreg; reward-bench rewardbench/models/grm.py",
    ),
    Replica(
        "UltraRM-13b",
        _ultrarm,
        {"recipe": "ultrarm"},
        source="card of UltraRM-13b; reward-bench rewardbench/models/openbmb.py",
    ),
    Replica(
        "Eurus-RM-7b",
        _eurus,
        {"recipe": "eurus-rm"},
        source="card of Eurus-RM-7b; reward-bench eval_configs.yaml",
    ),
    Replica("Athene-RM", _athene, {"recipe": "athene-rm"}, source="card of Athene-RM-8B"),
    Replica(
        "Starling-RM-7B-alpha",
        _starling_7b,
        {"recipe": "starling-rm-7b", **_BASE},
        source="card of Starling-RM-7B-alpha",
    ),
    Replica(
        "Starling-RM-34B",
        _starling_34b,
        {"recipe": "starling-rm-34b", **_BASE},
        source="reward-bench rewardbench/models/starling.py, eval_configs.yaml",
    ),
    Replica(
        "trlX gptj-rm-static",
        _trlx_gptj,
        {"recipe": "gptj-rm-static", **_BASE},
        source="trlx examples/hh/ppo_hh.py",
    ),
    Replica(
        "OASST pythia",
        _oasst_pythia,
        {"recipe": "oasst-pythia"},
        source="card of oasst-rm-2-pythia-6.9b-epoch-1; reward-bench rewardbench/models/openassistant.py",
    ),
    Replica(
        "AlpacaFarm reward-model-human",
        _alpaca_farm,
        {"recipe": "alpaca-farm", **_BASE},
        source="alpaca_farm src/alpaca_farm/models/reward_model.py",
    ),
    *VALUE_HEADS,
    *OTHERS,
)
