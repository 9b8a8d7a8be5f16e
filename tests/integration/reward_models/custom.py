"""Custom classes: replicas whose score only the code that comes with them computes.

The pipelines don't run that code: each computes what it computes by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from tests.integration.reward_models.parts import (
    byte_level,
    config_of,
    named_tensors,
    pieces,
    save_config,
    save_tensors,
    scattered,
)
from tests.integration.reward_models.replica import Messages, Pipeline, Replica
from tests.integration.reward_models.templates import CHATML, GEMMA, LLAMA_3

PUBLISHED = Path(__file__).parent / "published"
LLAMA_HEADER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
GEMMA_HEADER = "<end_of_turn>\n<start_of_turn>model\n"

# What matters of the splits of Qwen 2 and Llama 3: a punctuation mark takes the newlines behind it along, and
# a word the mark before it, so that tokens stand across the ends of steps.
SPLITS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# ------------------------------------------------------------------------------------------------- tokenizers


def split(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer cut texts as those of Qwen 2 and Llama 3 do."""
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = pre_tokenizers.Split(Regex(SPLITS), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splits, as_bytes])
    return tokenizer


def llama_tokenizer(*, template: str = LLAMA_3, words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Like that of Llama 3: the assistant's header is the five tokens that it is there."""
    specials = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "[PAD]",
    )
    tokenizer = byte_level(
        specials,
        frame="<|begin_of_text|> $A",
        words=("\n\n", "assistant", *words),
        chat_template=template,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="[PAD]",
    )
    return split(tokenizer)


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """Like that of Gemma 2."""
    return pieces(
        ("<pad>", "<eos>", "<bos>", "<unk>"),
        more=("<start_of_turn>", "<end_of_turn>"),
        frame="<bos> $A",
        words=("model",),
        opens=False,
        chat_template=GEMMA,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def internlm_tokenizer() -> PreTrainedTokenizerFast:
    """Like that of InternLM2, whose reward token has no name of its own."""
    return pieces(
        more=("<|im_start|>", "<|im_end|>", "[UNUSED_TOKEN_130]"),
        opens=False,
        chat_template="{{ bos_token }}" + CHATML,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )


# ----------------------------------------------------------------------------------------------------- inputs


def template_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """Return the tokens that the chat template wrote, and no others."""
    return tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)


def ziya_text(messages: Messages) -> str:
    """Return the card's input; the card has one turn, more are joined as the two parts of that one are."""
    names = {"user": "Human:", "assistant": "Assistant:"}
    return "\n\n".join(names[message["role"]] + message["content"] for message in messages)


def last_start(ids: list[int], wanted: list[int]) -> int:
    """Return where the last run of the wanted tokens begins."""
    return max(start for start in range(len(ids)) if ids[start : start + len(wanted)] == wanted)


def states_of(trunk: Any, ids: Sequence[int]) -> Tensor:
    """Return the last hidden states of one sample, float [tokens, width]."""
    with torch.no_grad():
        return trunk(input_ids=torch.tensor([list(ids)])).last_hidden_state[0]


# ------------------------------------------------------------------------------------------------------ files


def write_code(folder: Path, source: str, name: str, pattern: list[int] | None = None) -> None:
    """Write a file of code as it is published, with the tiny tokenizer's ids in it."""
    code = (PUBLISHED / source).read_text()
    if pattern is not None:
        code, changed = re.subn(r"(?m)^token_pattern = .*$", f"token_pattern = {pattern}", code)
        assert changed == 1
    (folder / name).write_text(code)


def with_statistics(module: nn.Module, *, seed: int = 7) -> nn.Module:
    """Give batch norms means and variances of a training, exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):
            assert part.running_mean is not None and part.running_var is not None
            mean = torch.randn(part.num_features, generator=generator) * 0.5
            part.running_mean = mean.bfloat16().float()
            spread = torch.rand(part.num_features, generator=generator) + 0.5
            part.running_var = spread.bfloat16().float()
    return module


def gate_layers(width: int, outputs: int, *, norms: bool, dropout: bool = False) -> nn.ModuleList:
    """Return the layers of a gating network under their published numbers."""
    hidden = 24
    layers: list[nn.Module] = []
    for number in range(3):
        layers.append(nn.Linear(width, hidden, bias=not norms))
        if norms:
            layers += [nn.ReLU(), nn.BatchNorm1d(hidden)]
        if dropout and number < 2:
            layers.append(nn.Dropout(0.2))
        width = hidden
    return nn.ModuleList([*layers, nn.Linear(width, outputs)])


def gated(layers: nn.ModuleList, state: Tensor, temperature: float, scale: Tensor) -> Tensor:
    """Return the gate's weights of one state, float [outputs]."""
    x = state
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm1d)]
    for number, layer in enumerate(linear[:-1]):
        x = torch.clamp(x @ layer.weight.T + (0 if layer.bias is None else layer.bias), min=0)
        if norms:
            norm = norms[number]
            assert norm.running_mean is not None and norm.running_var is not None
            x = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    x = x @ linear[-1].weight.T + linear[-1].bias
    return (x / temperature).softmax(dim=-1) * scale


# --------------------------------------------------------------------------------------------------- replicas


def armorm(folder: Path) -> Pipeline:
    """ArmoRM-Llama3-8B-v0.1."""
    tokenizer = llama_tokenizer()
    pattern = tokenizer.encode(LLAMA_HEADER, add_special_tokens=False)
    config = config_of("llama", tokenizer, num_labels=19)
    trunk = scattered(LlamaModel(config))
    regression = scattered(nn.Linear(config.hidden_size, 19, bias=False), seed=1)
    matrix = scattered(nn.ParameterList([nn.Parameter(torch.zeros(19, 19))]), seed=2)[0]
    layers = scattered(gate_layers(config.hidden_size, 19, norms=False), seed=3)
    scale = torch.tensor([1.25])
    heads = {
        **named_tensors("regression_layer.", regression),
        "reward_transform_matrix": matrix,
        **named_tensors("gating.layers.", layers),
        "gating.logit_scale": scale,
    }
    _write(folder, tokenizer, config, "LlamaForRewardModelWithGating", trunk, heads, gating_hidden_dim=24)
    write_code(folder, "modeling_armorm.py", "modeling_custom.py", pattern)

    def pipeline(messages: Messages) -> list[float]:
        ids = template_ids(tokenizer, messages)
        states = states_of(trunk, ids)
        with torch.no_grad():
            gate = gated(layers, states[last_start(ids, pattern)], 10, scale)
            return [(gate * (regression(states[-1]) @ matrix)).sum().item()]

    return pipeline


def _write(
    folder: Path, tokenizer: Any, config: Any, name: str, trunk: Any, heads: dict[str, Tensor], **keys: Any
) -> None:
    """Write a checkpoint whose class stands in `modeling_custom.py`."""
    save_tensors(folder, {**named_tensors("model.", trunk), **heads}, shards=2)
    auto_map = {"AutoModelForSequenceClassification": f"modeling_custom.{name}"}
    save_config(folder, config, architectures=[name], auto_map=auto_map, **keys)
    tokenizer.save_pretrained(folder)


def qrm_llama(folder: Path) -> Pipeline:
    """QRM-Llama3-8B and QRM-Llama3.1-8B: 19 rewards, 19 quantiles each."""
    tokenizer = llama_tokenizer()
    pattern = tokenizer.encode(LLAMA_HEADER, add_special_tokens=False)
    config = config_of("llama", tokenizer, num_labels=19)
    trunk = scattered(LlamaModel(config), seed=4)
    matrix = scattered(nn.ParameterList([nn.Parameter(torch.zeros(19, 19))]), seed=2)[0]
    layers = with_statistics(scattered(gate_layers(config.hidden_size, 19, norms=True), seed=3))
    heads = {"reward_transform_matrix": matrix}
    keys = {"num_objectives": 19, "num_quantiles": 19, "gating_hidden_dim": 24}
    regression, scale = _quantile_heads(config, heads, layers, 19 * 19)
    _write(folder, tokenizer, config, "LlamaForRewardModelWithGating", trunk, heads, **keys)
    write_code(folder, "modeling_qrm.py", "modeling_custom.py", pattern)

    def pipeline(messages: Messages) -> list[float]:
        ids = template_ids(tokenizer, messages)
        states = states_of(trunk, ids)
        with torch.no_grad():
            rewards = regression(states[-1]).reshape(19, 19).mean(dim=1) @ matrix
            gate = gated(layers, states[last_start(ids, pattern)], 10, scale)
            return [(gate * rewards).sum().item()]

    return pipeline


def _quantile_heads(
    config: Any, heads: dict[str, Tensor], layers: nn.Module, outputs: int
) -> tuple[nn.Linear, Tensor]:
    """Add a regression layer and a gate to the tensors; return the layer and the gate's scale."""
    regression = scattered(nn.Linear(config.hidden_size, outputs, bias=False), seed=1)
    with torch.no_grad():
        regression.weight.mul_(8)  # the mean over quantiles makes random rewards small
    scale = torch.tensor([1.25])
    heads |= {
        **named_tensors("regression_layer.", regression),
        **named_tensors("gating.layers.", layers),
        "gating.logit_scale": scale,
    }
    return regression, scale


def qrm_gemma(folder: Path) -> Pipeline:
    """QRM-Gemma-2-27B: five rewards, 19 quantiles each; attention caps its logits, so that it runs eager."""
    tokenizer = gemma_tokenizer()
    pattern = tokenizer.encode(GEMMA_HEADER, add_special_tokens=False)
    config = config_of("gemma2", tokenizer, num_labels=5)
    trunk = scattered(AutoModel.from_config(config, attn_implementation="eager"), seed=5)
    layers = with_statistics(scattered(gate_layers(config.hidden_size, 5, norms=True, dropout=True), seed=3))
    heads: dict[str, Tensor] = {}
    keys = {"num_objectives": 5, "num_quantiles": 19, "gating_hidden_dim": 24, "gating_temperature": 1}
    regression, scale = _quantile_heads(config, heads, layers, 5 * 19)
    _write(folder, tokenizer, config, "Gemma2ForQuantileSequenceClassification", trunk, heads, **keys)
    write_code(folder, "modeling_qrm_gemma.py", "modeling_custom.py", pattern)

    def pipeline(messages: Messages) -> list[float]:
        ids = template_ids(tokenizer, messages)
        states = states_of(trunk, ids)
        with torch.no_grad():
            rewards = regression(states[-1]).reshape(5, 19).mean(dim=1)
            gate = gated(layers, states[last_start(ids, pattern)], 1, scale)
            return [(gate * rewards).sum().item()]

    return pipeline


def urm(folder: Path) -> Pipeline:
    """URM-LLaMa-3-8B and URM-LLaMa-3.1-8B."""
    tokenizer = llama_tokenizer()
    config = config_of("llama", tokenizer, num_labels=10)
    width = config.hidden_size
    trunk = scattered(LlamaModel(config), seed=6)
    score = scattered(nn.Linear(width, 10, bias=False), seed=1)
    fc = [nn.Linear(width, width), nn.SELU(), nn.Linear(width, width), nn.SELU(), nn.Linear(width, 5)]
    weights = scattered(nn.Sequential(*fc), seed=2)
    heads = {**named_tensors("score.", score), **named_tensors("weights.fc.", weights)}
    _write(folder, tokenizer, config, "LlamaForSequenceClassificationWithNormal_Weights", trunk, heads)
    write_code(folder, "modeling_urm.py", "modeling_custom.py")

    def pipeline(messages: Messages) -> list[float]:
        state = states_of(trunk, template_ids(tokenizer, messages))[-1]
        with torch.no_grad():
            return [torch.dot(score(state)[::2], weights(state)).item()]

    return pipeline


def ziya(folder: Path) -> Pipeline:
    """Ziya-LLaMA-7B-Reward: the card asks the tokenizer for an eos at the end (add_eos_token)."""
    tokenizer = pieces(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    config = config_of("llama", tokenizer)
    trunk = scattered(LlamaModel(config), seed=7)
    head = scattered(nn.Linear(config.hidden_size, 1), seed=1)
    save_tensors(
        folder,
        {**named_tensors("model.", trunk), **named_tensors("value_head.", head)},
        pickled=True,
        shards=2,
    )
    auto_map = {"AutoModelForSequenceClassification": "modeling_llama_rm.LlamaRewardModel"}
    save_config(folder, config, architectures=["LlamaRewardModel"], auto_map=auto_map)
    write_code(folder, "modeling_llama_rm.py", "modeling_llama_rm.py")
    tokenizer.save_pretrained(folder)

    def pipeline(messages: Messages) -> list[float]:
        ids = [*tokenizer.encode(ziya_text(messages)), tokenizer.eos_token_id]
        with torch.no_grad():
            return head(states_of(trunk, ids)[-1]).tolist()

    return pipeline


def internlm2_reward(folder: Path) -> Pipeline:
    """InternLM2-1.8B/7B/20B-reward: the trunk is Llama's, its tensors have other names and another order."""
    tokenizer = internlm_tokenizer()
    closing = len(tokenizer) - 1
    config = config_of("llama", tokenizer, num_key_value_heads=2, num_attention_heads=4)
    trunk = scattered(LlamaModel(config), seed=8)
    head = scattered(nn.Linear(config.hidden_size, 1, bias=False), seed=1)
    save_tensors(
        folder, {**_internlm_tensors(trunk), **named_tensors("v_head.", head)}, pickled=True, shards=2
    )
    wanted = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
        *("pad_token_id", "bos_token_id", "eos_token_id"),
    )
    content = {key: getattr(config, key) for key in wanted}
    content |= {
        "model_type": "internlm2",
        "architectures": ["InternLM2ForRewardModel"],
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForRewardModel",
        },
        "bias": False,
        "rope_theta": config.rope_parameters["rope_theta"],
        "reward_token_id": closing,
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2))
    for file in ("configuration_internlm2.py", "modeling_internlm2.py"):
        write_code(folder, file, file)
    tokenizer.save_pretrained(folder)

    def pipeline(messages: Messages) -> list[float]:
        ids = [*template_ids(tokenizer, messages), closing]
        with torch.no_grad():
            return head(states_of(trunk, ids)[-1]).tolist()

    return pipeline


def _internlm_tensors(trunk: LlamaModel) -> dict[str, Tensor]:
    """Return Llama's tensors as InternLM2 has them: queries, keys and values in one matrix, by groups."""
    tensors = {
        "model.tok_embeddings.weight": trunk.embed_tokens.weight,
        "model.norm.weight": trunk.norm.weight,
    }
    groups = trunk.config.num_key_value_heads
    for number, layer in enumerate(trunk.layers):
        attention: Any = layer.self_attn
        parts = [each.weight for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
        grouped = [part.view(groups, -1, attention.head_dim, part.shape[1]) for part in parts]
        names = {
            "attention.wqkv": torch.cat(grouped, dim=1).reshape(-1, parts[0].shape[1]),
            "attention.wo": attention.o_proj.weight,
            "feed_forward.w1": layer.mlp.gate_proj.weight,
            "feed_forward.w3": layer.mlp.up_proj.weight,
            "feed_forward.w2": layer.mlp.down_proj.weight,
            "attention_norm": layer.input_layernorm.weight,
            "ffn_norm": layer.post_attention_layernorm.weight,
        }
        tensors |= {f"model.layers.{number}.{name}.weight": tensor for name, tensor in names.items()}
    return tensors


_REMOTE = {"trust_remote_code": True}
CUSTOM: tuple[Replica, ...] = (
    Replica(
        "ArmoRM",
        armorm,
        _REMOTE,
        source="RLHFlow/ArmoRM-Llama3-8B-v0.1 modeling_custom.py as stored elsewhere; reward-bench armorm.py",
    ),
    Replica("QRM-Llama3", qrm_llama, _REMOTE, source="reward-bench rewardbench/models/qrm.py"),
    Replica("QRM-Gemma-2", qrm_gemma, _REMOTE, source="nicolinho/QRM-Gemma-2-27B as described elsewhere"),
    Replica("URM", urm, _REMOTE, source="sglang llama_reward.py; reward-bench eval_configs.yaml"),
    Replica(
        "Ziya-LLaMA-7B-Reward",
        ziya,
        {**_REMOTE, "recipe": "ziya-reward"},
        source="card of IDEA-CCNL/Ziya-LLaMA-7B-Reward; head's name not verified",
    ),
    Replica(
        "InternLM2-reward",
        internlm2_reward,
        _REMOTE,
        source="reward-bench internlm.py; InternLM model_cards/internlm2_reward.md",
    ),
)
