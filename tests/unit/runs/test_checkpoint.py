"""A checkpoint is whole or not there, and loads with transformers alone."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from conch.config import ModelConfig
from conch.errors import CheckpointError
from conch.models.freezing import freeze_layers, freeze_trunk
from conch.models.loading import load_lm
from conch.models.policy import HEADS_FILE, PolicyWithValue
from conch.runs.checkpoint import check_space, model_bytes, no_model_bars, save_model
from tests.tiny import DECODERS, char_tokenizer, decoder_shape, tiny_decoder

TOKENIZER = char_tokenizer("abcdefghijklmnopqrstu")
IDS = torch.arange(20).view(2, 10)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("family", DECODERS)
def test_checkpoint_loads_with_transformers_to_the_same_logits(family: str, tmp_path: Path) -> None:
    lm = tiny_decoder(family)
    freeze_trunk(lm, 1)
    folder = save_model(tmp_path / "checkpoints" / "step_1", lm, TOKENIZER)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)

    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(model), logits(lm))
    assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"] == [0, 1, 2]


@pytest.mark.parametrize("family", DECODERS)
def test_checkpoint_keeps_bfloat16(family: str, tmp_path: Path) -> None:
    lm = load_lm(ModelConfig(architecture=decoder_shape(family), dtype="bfloat16"))
    save_model(tmp_path / "step_1", lm, TOKENIZER)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "step_1", dtype="auto").state_dict()

    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in lm.state_dict().items())


def test_heads_stand_beside_the_weights_and_do_not_disturb_them(tmp_path: Path) -> None:
    policy = PolicyWithValue(tiny_decoder("gpt2"))
    heads = {f"value_head.{name}": tensor for name, tensor in policy.value_head.state_dict().items()}
    save_model(tmp_path / "step_1", policy.lm, TOKENIZER, heads=heads)
    saved = load_file(tmp_path / "step_1" / HEADS_FILE)

    assert saved.keys() == {
        "value_head.hidden.weight",
        "value_head.hidden.bias",
        "value_head.out.weight",
        "value_head.out.bias",
    }
    assert all(torch.equal(saved[name], tensor) for name, tensor in heads.items())
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "step_1", output_loading_info=True)
    assert not info["unexpected_keys"]


def test_extra_files_are_json(tmp_path: Path) -> None:
    extra = {"reward_model.json": {"mean": 0.5, "names": ["reward"]}}
    folder = save_model(tmp_path / "step_1", tiny_decoder("gpt2"), TOKENIZER, extra=extra)

    assert json.loads((folder / "reward_model.json").read_text()) == extra["reward_model.json"]


def test_new_checkpoint_replaces_an_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    old, new = tiny_decoder("gpt2", seed=0), tiny_decoder("gpt2", seed=1)
    save_model(tmp_path / "step_1", old, TOKENIZER, extra={"only_in_the_old.json": {}})
    save_model(tmp_path / "step_1", new, TOKENIZER)

    assert names(tmp_path) == ["step_1"]
    assert "only_in_the_old.json" not in names(tmp_path / "step_1")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "step_1")), logits(new))


def test_leftovers_of_a_killed_save_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".step_1.partial").mkdir()
    (tmp_path / ".step_1.partial" / "half.safetensors").write_bytes(b"half")
    save_model(tmp_path / "step_1", tiny_decoder("gpt2"), TOKENIZER)

    assert names(tmp_path) == ["step_1"]
    assert "half.safetensors" not in names(tmp_path / "step_1")


# -------------------------------------------------------------------------------------------- failing disks


def test_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file")

    with pytest.raises(
        CheckpointError, match=r"outputs is a file, not a folder: choose another `train.output_dir`"
    ):
        save_model(tmp_path / "outputs" / "checkpoints" / "step_1", tiny_decoder("gpt2"), TOKENIZER)


def test_more_bytes_than_the_disk_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"not enough disk space .* 1,000,000,000,000 MB needed, .* MB free"
    ):
        check_space(tmp_path / "not" / "yet" / "there", 10**18)
    assert names(tmp_path) == []


def test_model_bytes_cover_what_is_written(tmp_path: Path) -> None:
    model = tiny_decoder("gpt2")
    save_model(tmp_path / "step_1", model, TOKENIZER)
    written = sum(path.stat().st_size for path in (tmp_path / "step_1").iterdir())

    assert written <= model_bytes(model) < written + 2e6


@contextmanager
def no_file_above_50_kb() -> Iterator[None]:
    """Writes beyond that fail as on a full disk, for root too.

    Only around the write itself: pytest's own output may be a longer file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_model(tmp_path / "step_1", tiny_decoder("gpt2", seed=0), TOKENIZER)


def assert_former_survives(folder: Path) -> None:
    assert names(folder.parent) == [folder.name], "something half-written stayed"
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(folder)), logits(tiny_decoder("gpt2", seed=0))
    )


def test_failed_write_of_weights_leaves_the_former_checkpoint(
    checkpoint: Path,
) -> None:
    message = rf"the checkpoint {checkpoint} cannot be written: .*File too large"
    with pytest.raises(CheckpointError, match=message), no_file_above_50_kb():
        save_model(checkpoint, tiny_decoder("gpt2", seed=1), TOKENIZER)

    assert_former_survives(checkpoint)


def test_failed_write_of_another_file_leaves_the_former_checkpoint(
    checkpoint: Path,
) -> None:
    small = tiny_decoder("gpt2", n_embd=8, n_layer=1)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*File too large"), no_file_above_50_kb():
        save_model(checkpoint, small, TOKENIZER, extra={"long.json": {"text": "x" * 60_000}})

    assert_former_survives(checkpoint)


def test_failed_rename_leaves_the_former_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace

    def failing(source: Path, target: Path) -> None:
        if source.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*Input/output error"):
        save_model(checkpoint, tiny_decoder("gpt2", seed=1), TOKENIZER)

    assert_former_survives(checkpoint)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no filesystem can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=30)


def test_full_disk_leaves_the_former_checkpoint(small_disk: Path) -> None:
    folder = save_model(small_disk / "step_1", tiny_decoder("gpt2", seed=0), TOKENIZER)
    heads = {"value_head.out.weight": torch.zeros(1_000_000)}  # 4 MB, of which `model_bytes` does not know

    with pytest.raises(
        CheckpointError, match=rf"the checkpoint {folder} cannot be written: .*No space left on device"
    ):
        save_model(folder, tiny_decoder("gpt2", seed=1), TOKENIZER, heads=heads)
    assert_former_survives(folder)


def test_too_small_disk_is_refused_before_writing(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(2_500_000))

    with pytest.raises(
        CheckpointError, match=r"not enough disk space for a checkpoint in .* 1 MB needed, 1 MB free"
    ):
        save_model(small_disk / "step_1", tiny_decoder("gpt2"), TOKENIZER)
    assert names(small_disk) == ["ballast"]


@pytest.mark.parametrize("family", [*DECODERS, "t5"])
@pytest.mark.parametrize("peft_config", [None, {"r": 2}], ids=["whole", "adapter"])
def test_a_saved_config_has_the_dropout_that_the_model_came_with(
    family: str, peft_config: dict[str, int] | None, tmp_path: Path
) -> None:
    """Disabled dropout is a matter of this run: who trains the model further decides anew."""
    plain = AutoConfig.for_model(**decoder_shape(family)).to_dict()
    dropouts = {key: 0.25 for key, value in plain.items() if "drop" in key and isinstance(value, float)}
    config = ModelConfig(
        architecture=decoder_shape(family, **dropouts), peft_config=peft_config, merge_adapter=True
    )
    lm = load_lm(config)
    freeze_layers(lm, config)
    save_model(tmp_path / "step_1", lm, TOKENIZER, merge_adapter=True)
    saved = json.loads((tmp_path / "step_1" / "config.json").read_text())
    assert {key: saved[key] for key in dropouts} == dropouts != {}
    assert {getattr(lm.config, key) for key in dropouts} == {0.0}, "of the model that trains on"


@pytest.mark.parametrize("downloads", [True, False])
def test_bars_of_models_are_hidden_for_a_while_and_those_of_downloads_stay(
    downloads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conch.runs.checkpoint.HF_HUB_DISABLE_PROGRESS_BARS", None)
    was_enabled, had_downloads = is_progress_bar_enabled(), not are_progress_bars_disabled()
    try:
        enable_progress_bar()
        (enable_progress_bars if downloads else disable_progress_bars)()
        with pytest.raises(KeyError), no_model_bars():
            assert not is_progress_bar_enabled() and are_progress_bars_disabled() != downloads
            raise KeyError
        assert is_progress_bar_enabled() and are_progress_bars_disabled() != downloads
        monkeypatch.setattr("conch.runs.checkpoint.HF_HUB_DISABLE_PROGRESS_BARS", False)
        with no_model_bars():
            assert is_progress_bar_enabled(), "the user asks for bars"
        disable_progress_bar()
        monkeypatch.setattr("conch.runs.checkpoint.HF_HUB_DISABLE_PROGRESS_BARS", None)
        with no_model_bars():
            pass
        assert not is_progress_bar_enabled(), "nor are any shown that the user had hidden"
    finally:
        (enable_progress_bar if was_enabled else disable_progress_bar)()
        (enable_progress_bars if had_downloads else disable_progress_bars)()
