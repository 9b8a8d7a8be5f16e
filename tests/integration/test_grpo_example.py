"""The GRPO example: each command of its documents, on tiny random models.

What a command says stands in the test as it is typed, from a folder that has the program and a model where
the hub's would be; `LIMITS` alone is added, and rows of a file.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml

from conch.errors import ConfigError
from examples.grpo import grpo
from tests.fakes.hub import fake_hub
from tests.integration.grpo_runs import (
    EACH,
    FOLDER,
    HANDS,
    LIMITS,
    LONGEST_S,
    ONE_EACH,
    OTHER_MODEL,
    PROBLEMS,
    ROOT,
    SIGNALS,
    TASKS,
    all_ended,
    check_outputs,
    finish,
    metrics_of,
    only_run,
    settings_of,
    start,
    wait_for,
    write_inputs,
)

CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
---
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are typed: the programs, models under their names on the hub, rows of both tasks."""
    folder = tmp_path_factory.mktemp("grpo")
    write_inputs(folder)
    return folder


@pytest.fixture
def here(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None
) -> Callable[..., Path]:
    """Types a command in this process, in a folder of its own; returns the run's folder."""
    for path in folder.iterdir():
        if path.name != "outputs":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def typed(*words: str) -> Path:
        grpo.main([*words, *LIMITS])
        return only_run(tmp_path)

    return typed


# -------------------------------------------------------------------------------- one process, one device


def test_basic_training(here: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = here(PROBLEMS)
    check_outputs(run)
    shown = capsys.readouterr().out
    assert "training      the CPU, in this process" in shown
    assert "verifier/correct" in metrics_of(run)[-1]
    assert yaml.safe_load((run / ".hydra/overrides.yaml").read_text())[0] == PROBLEMS


def test_run_with_the_config_of_ifeval(here: Callable[..., Path]) -> None:
    run = here("--config-name", "grpo_ifeval", TASKS)
    check_outputs(run)
    assert settings_of(run)["env"]["dataset"] == "ifeval"
    assert "verifier/inst_strict" in metrics_of(run)[-1]


def test_change_the_dataset(here: Callable[..., Path]) -> None:
    run = here("env.dataset=ifeval", TASKS)
    check_outputs(run)
    assert "verifier/inst_strict" in metrics_of(run)[-1]


def test_modify_training_parameters(here: Callable[..., Path]) -> None:
    run = here("optimizer.lr=2e-5", "optimizer.weight_decay=0.01", PROBLEMS)
    check_outputs(run)
    assert {line["train/learning_rate"] for line in metrics_of(run)} == {2e-5}
    content = torch.load(run / "checkpoints/checkpoint_2.pt", weights_only=True)
    assert content["optimizer"]["param_groups"][0]["weight_decay"] == 0.01


def test_change_the_model(here: Callable[..., Path]) -> None:
    run = here("model.name=meta-llama/Llama-2-7b-hf", PROBLEMS)
    check_outputs(run)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["path"] == OTHER_MODEL


def test_length_batches_memory_and_checkpoints(here: Callable[..., Path]) -> None:
    """The settings that the document names to end sooner, save more often, and need less memory."""
    grpo.main(
        [
            *(PROBLEMS, "env.max_rows=24", "env.repeats=2", "inference_model.max_tokens=4", "env.num_envs=1"),
            *("train.total_dialog_turns=10", "train.checkpoint_frequency=1", "train.optim_batch_size=2"),
            *(
                "train.steps_per_batch=4",
                "inference_model.gpu_memory_utilization=0.2",
                "train.keep_checkpoints=2",
            ),
            *("train.eval_frequency=2", "env.max_eval_rows=2", "conch.model.trial=false"),
        ]
    )
    run = only_run(Path.cwd())
    lines = metrics_of(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]  # 10 turns in batches of 4
    assert "eval/correct" in lines[-1]
    assert {path.name for path in (run / "checkpoints").glob("*.pt")} >= {
        "checkpoint_2.pt",
        "checkpoint_3.pt",
    }
    assert not (run / "checkpoints/checkpoint_1.pt").exists()


def test_every_metric_of_the_document_is_logged(here: Callable[..., Path]) -> None:
    """The README's table says which metric is which; the names are read from there."""
    logged: set[str] = set()
    for dataset, rows in (("gsm8k", PROBLEMS), ("ifeval", TASKS)):
        grpo.main([f"env.dataset={dataset}", rows, *LIMITS, f"train.run_dir={dataset}"])
        logged |= metrics_of(Path(dataset))[-1].keys()
    table = (FOLDER / "README.md").read_text().partition("## Monitoring")[2].partition("\n## ")[0]
    named = re.findall(r"`((?:reward|grpo|policy|rollout|train|time|verifier)/[a-z_]+)`", table)
    assert len(named) > 8
    assert set(named) <= logged


def test_an_interrupted_run_goes_on(here: Callable[..., Path]) -> None:
    often = "train.checkpoint_frequency=1"
    run = here(PROBLEMS, often, "train.run_dir=outputs/2026-01-01/00-00-00")
    (run / "checkpoints/checkpoint_2.pt").unlink()  # as if it had been killed before it wrote that
    grpo.main([PROBLEMS, *LIMITS, often, "train.total_dialog_turns=12", f"train.resume={run}"])
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3]
    names = {path.name for path in run.glob("checkpoints/*.pt")}
    assert names == {"checkpoint_1.pt", "checkpoint_2.pt", "checkpoint_3.pt"}


def test_print_config_shows_what_becomes_of_it(
    here: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        grpo.main(["--print-config", "optimizer.lr=2e-5", "train_model.num_devices=2"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["optimizer"]["lr"] == 2e-5
    assert re.search(r"^# optimizer.learning_rate = 2e-05 +<- optimizer.lr$", shown, re.M)
    assert "#   training      simulated devices 0, 1" in shown
    assert not Path("outputs").exists()


def test_mistakes_leave_nothing_behind(here: Callable[..., Path]) -> None:
    for words in (
        ["train.steps_per_batch=3"],
        ["train_model.devices=[0,0]"],
        ["train_model.num_devices=3"],
        ["mode=async"],
    ):
        with pytest.raises(ConfigError):
            grpo.main([PROBLEMS, *LIMITS, *words])
    assert not Path("outputs").exists()


# -------------------------------------------------------------------------------- processes of its own


def test_the_program_by_its_names() -> None:
    """From its folder, and as a module; `--help` tells all settings. The tests below start it by its path."""
    for place, program in (
        (FOLDER, ["grpo.py"]),
        (ROOT, ["-m", "examples.grpo.grpo"]),
    ):
        shown = finish(start(place, "--help", program=program))
        assert "grpo_gsm8k" in shown and "train.total_dialog_turns" in shown


def test_the_hub_has_the_prompts(folder: Path, tmp_path: Path) -> None:
    """`python grpo.py`, with nothing but limits, reads openai/gsm8k."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    rows = (folder / "problems.jsonl").read_bytes()
    files = {"README.md": CARD.encode(), "main/train.jsonl": rows, "main/test.jsonl": rows}
    with fake_hub("openai/gsm8k", files) as address:
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        finish(start(tmp_path, *LIMITS, **hub, no_proxy="*"))
    check_outputs(only_run(tmp_path))


@pytest.fixture
def there(folder: Path, tmp_path: Path) -> Path:
    """A folder of its own, to type commands in that start a process."""
    for path in folder.iterdir():
        if path.name not in ("outputs", "multirun"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "plan"),
    [
        (ONE_EACH, ("device 0", "device 1", "device 2", "3 devices")),
        pytest.param(
            EACH, ("devices 0, 1", "devices 2, 3", "devices 4, 5", "6 devices"), marks=pytest.mark.slow
        ),
        pytest.param(
            HANDS, ("devices 0, 1", "devices 4, 5", "devices 2, 3", "6 devices"), marks=pytest.mark.slow
        ),
    ],
    ids=["one_each", "two_each", "by_hand"],
)
def test_devices_are_allotted_and_all_processes_end(
    there: Path, words: Sequence[str], plan: Sequence[str]
) -> None:
    shown = finish(start(there, *words, PROBLEMS, *LIMITS, program=[str(FOLDER / "grpo.py")]))
    assert f"training      simulated {plan[0]}" in shown
    assert f"sampling      simulated {plan[1]}" in shown
    assert f"the reference simulated {plan[2]}" in shown
    assert f"the {plan[3]} are simulated by processes on the CPU" in shown
    assert shown.index("no GPU here") < shown.index("starting inference-0")  # before anything is loaded
    run = only_run(there)
    check_outputs(run)
    first = metrics_of(run)[0]
    assert first["policy/kl"] == pytest.approx(
        0, abs=1e-4
    )  # the reference is the model that training started from
    assert first["rollout/logprob_diff"] == pytest.approx(0, abs=1e-4)
    copies = 1 if words is ONE_EACH else 2
    names = {f"{kind}-{number}.log" for kind in ("inference", "reference") for number in range(copies)}
    assert {path.name for path in (run / "servers").iterdir()} == names


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_command_that_is_ended_takes_all_along(there: Path, number: signal.Signals, ranks: int) -> None:
    words = [*ONE_EACH[1:], f"train_model.num_devices={ranks}", "train.run_dir=run"]
    process = start(there, *words, PROBLEMS, *LIMITS, "train.total_dialog_turns=100000")
    with all_ended(process) as everyone:
        wait_for(lambda: (there / "run/metrics.jsonl").exists() and len(metrics_of(there / "run")) > 1)
        assert len(everyone.note()) >= 5  # two guards, two servers, the training process
        process.send_signal(number)
        output, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode == SIGNALS[number], output
    if number is signal.SIGKILL:
        return
    step = metrics_of(there / "run")[-1]["step"]
    assert (there / f"run/checkpoints/checkpoint_{step}.pt").is_file()  # the step was finished and saved
    more = f"train.total_dialog_turns={4 * (int(step) + 1)}"
    finish(start(there, *words, PROBLEMS, *LIMITS, "train.resume=auto", more))
    assert [line["step"] for line in metrics_of(there / "run")] == list(range(1, int(step) + 2))


@pytest.mark.slow
def test_a_server_that_cannot_start_is_told_with_its_log(there: Path) -> None:
    (there / "empty").mkdir()
    shown = finish(start(there, "ref_model.num_devices=1", "model.name=empty", PROBLEMS, *LIMITS), code=1)
    assert "error: reference-0 ended before it was ready: the end of " in shown
    assert "Traceback" not in shown.partition("error: reference-0")[0]


# ---------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "jobs"),
    [
        (["optimizer.lr=1e-4,1e-5,1e-6"], [(1e-4, 0.01), (1e-5, 0.01), (1e-6, 0.01)]),
        (
            ["optimizer.lr=1e-4,1e-5", "policy.kl_coef=0.01,0.1"],
            [(1e-4, 0.01), (1e-4, 0.1), (1e-5, 0.01), (1e-5, 0.1)],
        ),
    ],
    ids=["one_key", "two_keys"],
)
def test_sweeps(there: Path, words: Sequence[str], jobs: Sequence[tuple[float, float]]) -> None:
    finish(start(there, "--multirun", *words, PROBLEMS, *LIMITS))
    (sweep,) = there.glob("multirun/*/*")
    runs = sorted((path for path in sweep.iterdir() if path.is_dir()), key=lambda path: int(path.name))
    found = [settings_of(run) for run in runs]
    assert [(job["optimizer"]["lr"], job["policy"]["kl_coef"]) for job in found] == list(jobs)
    for run, (rate, coef) in zip(runs, jobs, strict=True):
        check_outputs(run)
        last = metrics_of(run)[-1]
        assert (last["train/learning_rate"], last["policy/kl_coef"]) == (rate, coef)
    assert len((sweep / "sweep.csv").read_text().splitlines()) == len(jobs) + 1
