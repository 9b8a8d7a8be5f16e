"""The steerability example: presets, names of the paper's code, probes, prompts, devices, generated texts."""

from __future__ import annotations

import csv
import json
import os
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from conch.errors import ConfigError, DataError
from conch.rewards.goals import GoalSpace
from conch.rollouts.server_config import ServerConfig
from conch.servers.settings import load_settings as load_settings_of_server
from examples.grpo.launch import SECRET_VARIABLE
from examples.steerability import texts
from examples.steerability.devices import Devices, asked_of_launcher, use_zero
from examples.steerability.prepare import Prepared, _server
from examples.steerability.rl import grpo_config
from examples.steerability.rows import instruction, read_probe
from examples.steerability.settings import CONFIGS, SteerabilityConfig, SteerabilityRunConfig, load_settings


@pytest.mark.parametrize("name", ["tiny", "paper"])
def test_presets_are_settings(name: str) -> None:
    config = load_settings(name, ["train.seed=3"])
    assert config.train.seed == 3 and config.reward.steering.is_on


def test_the_papers_run_is_the_papers() -> None:
    config = load_settings("paper", [])
    assert config.model.path == "meta-llama/Llama-3.1-8B-Instruct" and config.model.gradient_checkpointing
    adapter = config.model.peft_config or {}
    assert (adapter["r"], adapter["use_rslora"], config.optimizer.learning_rate) == (256, True, 2.5e-7)
    assert (config.grpo.group_size, config.grpo.kl.coef) == (64, 0.01)
    assert (config.grpo.clip_low, config.grpo.clip_high) == (0.2, 0.3)
    rows = config.steerability.source_texts * config.steerability.instructions_per_text
    assert rows == 384 * 8 == config.train.total_steps * config.grpo.prompts_per_step
    assert config.scheduler.warmup_updates == round(0.2 * config.train.total_steps)


def test_settings_of_the_papers_code_are_told_by_their_names_here(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yml"
    file.write_text("min_p: 0.2\nlearning_rate: 1.0e-6\nrejection_sample_size: 16\nrewards: [x]\n")
    with pytest.raises(ConfigError) as refused:
        load_settings(str(file), [])
    for part in (
        "`min_p` has no counterpart here",
        "`rejection_sample_size` has no",
        "`learning_rate` is `optimizer.learning_rate` here",
        "`rewards` is `reward.steering.rewards` here",
    ):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["reward.steering.rewards=[]", "reward.steering.eval_rewards=[]", "reward.steering.goals=[]"],
            "name what is learned from",
        ),
        (["rollout.engine=ray"], "starts its own sampler"),
        (["rollout.urls=127.0.0.1:1"], "own_sampler=false"),
    ],
)
def test_settings_that_make_no_run_are_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_settings("tiny", overrides)


@pytest.mark.parametrize("text", ["- a\n", "words\n", "reward:\n", "reward:\n  goals:\n"])
def test_a_file_without_settings_is_told_in_a_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load_settings(str(file), [])


def test_a_preset_that_is_not_there_is_told_from_those_that_are() -> None:
    with pytest.raises(ConfigError, match="presets are paper, tiny"):
        load_settings("teeny", [])


def write_probe(path: Path, number: int = 8, **columns: Any) -> None:
    rng = random.Random(0)
    rows = [
        {
            "original_index": text,
            "text": f"Text {text}.",
            "source_formality": 0.2,
            "target_formality": round(rng.random(), 2),
            "source_joy": 0.4,
            "target_joy": "",
            **columns,
        }
        for text in range(number)
        for _ in range(3)
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_probe_is_halved_by_texts_and_keeps_its_lines(tmp_path: Path) -> None:
    probe = tmp_path / "probe.csv"
    write_probe(probe)
    config = SteerabilityConfig(
        probe=probe, source_texts=3, instructions_per_text=2, held_out_texts=4, held_out_instructions=1
    )
    train, held_out = read_probe(config, ["formality", "joy"])
    assert (len(train), len(held_out)) == (6, 4)
    of = [{row["prompt"][0]["content"].split("\n\n")[1] for row in rows} for rows in (train, held_out)]
    assert len(of[0]) == 3 and len(of[1]) == 4 and not of[0] & of[1]
    assert "target_formality" in train[0] and "text" not in train[0]
    assert "probe.csv row" in train.places[0]  # pyright: ignore[reportAttributeAccessIssue]
    assert read_probe(config, ["formality"])[0] == read_probe(config, ["formality"])[0]


def test_instructions_of_a_probe_are_about_the_goals_of_each_row(tmp_path: Path) -> None:
    probe = tmp_path / "probe.jsonl"
    row = {"source_formality": 0.2, "target_formality": 0.9, "source_joy": 0.4, "target_joy": [0.7, 0.8]}
    rows = [{"text": f"Text {text}.", **row, "steering_goals": ["joy"]} for text in range(4)]
    probe.write_text("".join(json.dumps(each) + "\n" for each in rows))
    config = SteerabilityConfig(
        probe=probe, source_texts=1, instructions_per_text=1, held_out_texts=1, held_out_instructions=1
    )
    for default in ([], ["formality"]):
        (train,), _ = read_probe(config, default)
        assert "so that it is higher in joy. Leave" in train["prompt"][0]["content"]


def test_a_probe_with_too_few_texts_is_refused(tmp_path: Path) -> None:
    write_probe(tmp_path / "probe.csv")
    config = SteerabilityConfig(probe=tmp_path / "probe.csv")
    with pytest.raises(DataError, match=r"has 8 texts, 4 of them .*`steerability.source_texts` asks for 384"):
        read_probe(config, ["formality"])


def test_a_row_without_a_text_is_left_out_and_all_of_them_refused(tmp_path: Path) -> None:
    probe = tmp_path / "probe.jsonl"
    probe.write_text(json.dumps({"target_formality": 0.5}) + "\n")
    with pytest.raises(DataError, match="has no `text`"):
        read_probe(SteerabilityConfig(probe=probe), ["formality"])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"source_formality": 0.2, "target_formality": 0.9}, "it is much more formal. Leave"),
        ({"source_formality": 0.5, "target_formality": 0.4}, "it is slightly more casual. Leave"),
        (
            {"source_formality": 0.1, "target_formality": 0.4, "source_joy": 0.5, "target_joy": 0.1},
            "it is more formal and lower in joy. Leave",
        ),
        ({"source_formality": 0.5, "target_formality": float("nan")}, "Write the text below again"),
        ({"source_formality": 0.5, "target_formality": None}, "Write the text below again"),
    ],
)
def test_instructions_say_which_way_and_how_far(row: dict[str, Any], says: str) -> None:
    assert says in instruction(row, ["formality", "joy"])


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("/usr/bin/python /usr/bin/accelerate launch --num-processes 2 rl.py", 2),
        ("python -m accelerate.commands.launch --num_processes=3 rl.py", 3),
        ("/usr/bin/accelerate launch rl.py --config tiny", 0),
        ("bash --num-processes 2 rl.py", 0),
        ("", 0),
    ],
)
def test_what_accelerate_was_asked_for_is_read_from_its_command(words: str, number: int) -> None:
    assert asked_of_launcher(words.split()) == number


def test_devices_are_told_before_anything_is_loaded() -> None:
    assert Devices(2, 2, False).lines() == [
        "devices",
        "  training      simulated devices 0, 1",
        "  sampling      simulated device 2",
        "  no GPU here: 3 devices are simulated by processes on the CPU",
    ]
    assert Devices(1, None, True).lines()[1:] == [
        "  training      GPU 0",
        "  sampling      where the policy is trained",
    ]


ZERO = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_MIXED_PRECISION")


@pytest.fixture
def accelerate_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ZERO, "ACCELERATE_USE_FSDP"):
        monkeypatch.setenv(name, "")  # so that what the test's code sets is taken back
        monkeypatch.delenv(name)


def zero_environment() -> list[str | None]:
    return [os.environ.get(name) for name in ZERO]


@pytest.mark.usefixtures("accelerate_told_nothing")
def test_processes_on_gpus_train_by_zero_with_the_stage_and_precision_of_the_settings() -> None:
    use_zero(load_settings("paper", []), Devices(2, 2, True))
    assert zero_environment() == ["true", "2", "bf16"]


@pytest.mark.usefixtures("accelerate_told_nothing")
def test_zero_leaves_the_precision_to_the_launcher_where_the_run_names_none() -> None:
    config = load_settings("paper", ["steerability.zero_stage=1", "train.mixed_precision=null"])
    use_zero(config, Devices(3, None, True))
    assert zero_environment() == ["true", "1", None]


@pytest.mark.usefixtures("accelerate_told_nothing")
@pytest.mark.parametrize(
    ("words", "devices", "told"),
    [
        ([], Devices(2, 2, False), {}),
        ([], Devices(1, 1, True), {}),
        (["steerability.zero_stage=0"], Devices(2, 2, True), {}),
        ([], Devices(2, 2, True), {"ACCELERATE_USE_DEEPSPEED": "false"}),
        ([], Devices(2, 2, True), {"ACCELERATE_USE_FSDP": "true"}),
    ],
    ids=["processors", "one process", "stage 0", "DeepSpeed", "FSDP"],
)
def test_zero_is_left_alone_where_it_cannot_be_or_the_launcher_was_told(
    words: list[str], devices: Devices, told: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    use_zero(load_settings("paper", words), devices)
    assert zero_environment() == [told.get(name) for name in ZERO]


def sampler_of(config: SteerabilityRunConfig, policy: str | None) -> ServerConfig:
    """The sampler's settings, as it reads them from its command line."""
    server = _server(config, 2, policy)
    assert server.verb == "rollout-server" and server.devices == (2,)
    words = server.command()
    return load_settings_of_server(ServerConfig, words[words.index(server.verb) + 1 :])


def test_paper_s_sampler_is_vllm_with_room_for_the_adapter() -> None:
    settings = sampler_of(load_settings("paper", ["model.revision=abc", "rollout.enforce_eager=true"]), None)
    assert (settings.engine, settings.model) == ("vllm", "meta-llama/Llama-3.1-8B-Instruct")
    assert (settings.revision, settings.dtype, settings.max_lora_rank) == ("abc", "bfloat16", 256)
    assert settings.gpu_memory_utilization == 0.9, "the device is the sampler's alone"
    assert settings.enforce_eager and settings.secret_env == SECRET_VARIABLE
    words = ["rollout.dtype=float16", "rollout.max_model_len=3072", "rollout.max_num_seqs=17"]
    own = sampler_of(load_settings("paper", words), "outputs/x-sft/step_4")
    assert (own.model, own.dtype) == ("outputs/x-sft/step_4", "float16")
    assert (own.max_model_len, own.max_num_seqs) == (3072, 17)


def test_tiny_sampler_is_of_transformers_and_gets_no_setting_of_vllm() -> None:
    server = _server(load_settings("tiny", []), 2, "outputs/x-sft/step_4")
    assert server.settings["engine"] == "transformers"
    assert not {"gpu_memory_utilization", "enforce_eager", "max_lora_rank"} & server.settings.keys()
    assert sampler_of(load_settings("tiny", []), "outputs/x-sft/step_4").model == "outputs/x-sft/step_4"


def test_a_sampler_of_its_own_takes_the_place_of_the_engine() -> None:
    ready = Prepared("outputs/x", "outputs/x-sft/step_4", "127.0.0.1:5", "secret")
    made = grpo_config(load_settings("tiny", []), Devices(2, 2, False), ready)
    assert made.rollout.urls == "127.0.0.1:5" and made.rollout.auth.secret_env
    assert made.model.path == "outputs/x-sft/step_4" and made.train.num_processes == 2
    assert str(made.train.run_dir) == "outputs/x"


def test_generated_texts_stand_where_their_levels_say() -> None:
    space = GoalSpace([*texts.STEERED, "formality"], CONFIGS / "ranges_tiny.yaml")
    rng = random.Random(0)
    for length in texts.LEVELS:
        for difficulty in texts.LEVELS:
            values = space.measure([texts.text(length, difficulty, rng) for _ in range(30)])
            assert statistics.fmean(values[texts.LENGTH]) == pytest.approx(length, abs=0.01)
            assert statistics.fmean(values[texts.DIFFICULTY]) == pytest.approx(difficulty, abs=0.07)
            assert len(set(values["formality"])) > 1, "a goal that may be moved by side effect"


def test_the_corpus_follows_its_instructions_in_part_and_is_the_same_again() -> None:
    rows = texts.corpus(2000, seed=0)
    assert rows == texts.corpus(2000, seed=0) != texts.corpus(2000, seed=1)
    asked = [int(row["prompt"].split(",")[0].split()[-1]) for row in rows]
    sentences = {1: 1, 3: 3, 5: 5, 7: 7, 9: 9}
    right = [sentences[a] == row["completion"].count(".") for a, row in zip(asked, rows, strict=True)]
    assert statistics.fmean(right) == pytest.approx(0.4 + 0.6 / 5, abs=0.05)
