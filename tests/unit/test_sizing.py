from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from conch.errors import ConfigError, ModelError
from conch.models.policy import PolicyWithValue
from conch.sizing.__main__ import main
from conch.sizing.estimate import GIB, advice, fits, kv_cache_bytes, read_config, sizes
from conch.sizing.options import Setup
from tests.tiny import DECODERS, decoder_shape

SMALL: dict[str, Any] = {"rows": 2, "prompt_length": 8, "response_length": 4, "generation_rows": 3}


def config_of(family: str, **overrides: Any) -> PretrainedConfig:
    shape = decoder_shape(family, **overrides)
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


WIDE = {"n_embd": 1024, "n_layer": 2, "n_head": 16, "n_positions": 1024, "vocab_size": 50400}


@pytest.mark.parametrize("family", DECODERS)
def test_parameters_are_those_of_the_real_model(family: str) -> None:
    config = config_of(family)
    real = PolicyWithValue(AutoModelForCausalLM.from_config(config))
    found = sizes(config, Setup(**SMALL))
    assert found.parameters == found.trained == sum(p.numel() for p in real.parameters())
    assert found.activations > 0


def test_parameters_of_gptj_are_as_published() -> None:
    shape = {"n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048, "rotary_dim": 64}
    config = config_of("gptj", **shape, vocab_size=50400)
    assert sizes(config, Setup(reference="none", **SMALL)).parameters == 6_050_882_784


def test_zero_stages_divide_what_their_paper_says() -> None:
    config = config_of("gptj", **WIDE)
    two, three = (sizes(config, Setup(zero_stage=stage, gpus=8, **SMALL)) for stage in (2, 3))
    count = two.parameters
    assert (two.weights, three.weights) == (2 * count, 2 * count // 8)
    assert two.gradients == three.gradients == 2 * count // 8
    assert two.optimizer == three.optimizer == 12 * count // 8
    assert (two.gathered_weights, three.gathered_weights) == (0, 2 * count)
    assert two.reference == three.reference  # a copy of its own on each GPU


def test_offloading_moves_bytes_to_the_host() -> None:
    config = config_of("gpt2")
    kept, moved = (sizes(config, Setup(zero_stage=3, offload=offload, **SMALL)) for offload in (False, True))
    assert moved.optimizer == moved.weights == 0
    assert moved.host == kept.optimizer + kept.weights
    assert kept.host == 0


def test_ddp_in_bf16_keeps_float32_weights() -> None:
    found = sizes(config_of("gpt2"), Setup(zero_stage=0, **SMALL))
    assert found.weights == 4 * found.parameters and found.optimizer == 8 * found.parameters


def test_kv_cache_counts_the_heads_that_share() -> None:
    setup = Setup(**SMALL)
    # 3 layers, 2 heads of 16 (llama: 1 that both share), 12 tokens, 3 rows, 2 bytes, keys and values
    assert kv_cache_bytes(config_of("gpt2"), setup) == 2 * 3 * 2 * 16 * 12 * 3 * 2
    assert kv_cache_bytes(config_of("llama"), setup) == 3 * 2 * 16 * 12 * 3 * 2


def test_frozen_and_adapted_models_train_less_and_share_their_reference() -> None:
    config = config_of("gpt2")
    whole = sizes(config, Setup(**SMALL))
    trunk = sizes(config, Setup(num_layers_unfrozen=1, **SMALL))
    adapter = sizes(config, Setup(lora_rank=2, **SMALL))
    assert trunk.trained < whole.trained and 0 < trunk.reference < whole.reference
    assert adapter.trained < trunk.trained and adapter.reference == 0
    assert trunk.activations < whole.activations


def test_checkpointing_keeps_one_block() -> None:
    config = config_of("gpt2", n_layer=12)
    plain, checkpointed = (
        sizes(config, Setup(gradient_checkpointing=on, **SMALL)).activations for on in (False, True)
    )
    assert checkpointed < plain / 3


def test_advice_is_true_and_the_best_comes_first() -> None:
    config, setup = config_of("gptj", **WIDE), Setup(gpus=7)
    found, tips = sizes(config, setup), advice(config, setup)
    peaks = [other.peak for _, other in tips]
    assert peaks == sorted(peaks) and peaks[-1] < found.peak
    checkpointed = sizes(config, Setup(gpus=7, gradient_checkpointing=True))
    assert dict(tips)["model.gradient_checkpointing=true"] == checkpointed


def test_a_tenth_stays_free() -> None:
    found = sizes(config_of("gpt2"), Setup(**SMALL))
    assert fits(found, found.peak / 0.89 / GIB) and not fits(found, found.peak / 0.91 / GIB)


def test_the_command_line_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_of("gpt2").save_pretrained(tmp_path)
    main(["--model", str(tmp_path), "--gpu-memory", "80", "--rows", "2", "--prompt_length", "8"])
    shown = capsys.readouterr().out
    assert "reference (full)" in shown and "\nfits: " in shown
    main(["--model", str(tmp_path / "config.json"), "--gpu_memory", "0.001", "--reference", "none"])
    shown = capsys.readouterr().out
    assert "does not fit" in shown and "num_layers_unfrozen=2 (not enough alone)" in shown
    main(["--model", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["peak"] == max(found["update_peak"], found["rollout_peak"]) and found["zero_stage"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--offload", "--zero_stage", "0"], "`--offload` is DeepSpeed's"),
        (["--reference", "trunk"], "give `--num-layers-unfrozen`"),
        (["--reference", "adapter"], "give `--lora-rank`"),
        (["--lora_rank", "4", "--num_layers_unfrozen", "1"], "give one of"),
        (["--num_layers_unfrozen", "4"], "the model has 3 layers"),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    config_of("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        main(["--model", str(tmp_path), *options])


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json that can be read"):
        read_config(str(tmp_path))
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        read_config(str(tmp_path))
