"""`grpo-async.py`: each command of the GRPO example's documents, on tiny random models and Ray."""

from __future__ import annotations

import re
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import yaml

from tests.integration.grpo_runs import (
    EACH,
    FOLDER,
    HANDS,
    LIMITS,
    LONGEST_S,
    PROBLEMS,
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

SHORT = (*LIMITS, "train.dialog_turns_per_batch=4")
"""Two steps of two prompts, with two completions each."""

PROGRAM = (str(FOLDER / "grpo-async.py"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are typed: the programs, models under their names on the hub, rows of both tasks."""
    folder = tmp_path_factory.mktemp("grpo")
    write_inputs(folder)
    return folder


@pytest.fixture
def there(folder: Path, tmp_path: Path) -> Path:
    """A folder of its own, to type commands in."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Where Ray and the programs put what they need while they run; sockets want a short path."""
    with tempfile.TemporaryDirectory(prefix="grpo-", dir="/tmp") as folder:
        yield Path(folder)


def typed(there: Path, scratch: Path, *words: str, code: int = 0, program: Sequence[str] = PROGRAM) -> str:
    """Output of a command that leaves no process and no scratch file behind."""
    shown = finish(start(there, *words, program=program, VLLM_USE_V1="0", TMPDIR=str(scratch)), code)
    assert not list(scratch.iterdir())
    return shown


def test_it_trains_on_what_an_actor_of_ray_samples_meanwhile(there: Path, scratch: Path) -> None:
    """A reward that tells random completions apart, so that both steps change the weights."""
    (there / "rewards.py").write_text(
        "def letters(outputs, **_):\n    return [float(sum(map(ord, output))) for output in outputs]\n"
    )
    often = "train.checkpoint_frequency=1"
    shown = typed(there, scratch, "reward.function=rewards.py:letters", PROBLEMS, *SHORT, often)
    assert "sampling      simulated device 1" in shown and "tokens are at most 1 step old" in shown
    run = only_run(there)
    check_outputs(run, (1, 2), overlaps=True)
    lines = metrics_of(run)
    assert all(line["train/grad_norm"] > 0 for line in lines)
    assert lines[0]["staleness/max"] == 0 and lines[1]["staleness/max"] <= 1
    one, two = (
        torch.load(run / f"checkpoints/checkpoint_{step}.pt", weights_only=True)["model"] for step in (1, 2)
    )
    assert any(not torch.equal(one[name], two[name]) for name in two)
    settings = yaml.safe_load((run / "config.yaml").read_text())["rollout"]
    assert (settings["engine"], settings["ray"]["engine"]) == ("ray", "transformers")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "plan"),
    [
        (EACH, ("devices 0, 1", "devices 2, 3", "devices 4, 5")),
        (HANDS, ("devices 0, 1", "devices 4, 5", "devices 2, 3")),
    ],
    ids=["two_each", "by_hand"],
)
def test_the_command_of_the_document(
    there: Path, scratch: Path, words: Sequence[str], plan: Sequence[str]
) -> None:
    shown = typed(there, scratch, *words, PROBLEMS, *SHORT)
    assert f"training      simulated {plan[0]}" in shown
    assert f"sampling      simulated {plan[1]}" in shown
    assert f"the reference simulated {plan[2]}" in shown
    assert "buffer        8 completions: 2 steps, one in training" in shown
    assert shown.index("staleness     tokens are at most 1 step old") < shown.index("starting reference-0")
    run = only_run(there)
    check_outputs(run, overlaps=True)
    lines = metrics_of(run)
    assert lines[0]["policy/kl"] == pytest.approx(0, abs=1e-4)  # the reference is the model it started from
    assert lines[0]["staleness/max"] == 0 and lines[1]["staleness/max"] <= 1
    assert {path.name for path in (run / "servers").iterdir()} == {"reference-0.log", "reference-1.log"}
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["rollout"]["engine"], settings["rollout"]["ray"]["samplers"]) == ("ray", 2)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(there: Path, scratch: Path) -> None:
    """And a run of the other program does not."""
    often = ("train.checkpoint_frequency=1", "train.run_dir=run", "policy.kl_coef=0")
    typed(there, scratch, "--config-name", "grpo_ifeval", "mode=async", TASKS, *SHORT, *often)
    assert settings_of(there / "run")["env"]["dataset"] == "ifeval"
    check_outputs(there / "run", (1, 2), overlaps=True)
    more = ("train.total_dialog_turns=12", "train.resume=auto")
    typed(there, scratch, "--config-name", "grpo_ifeval", TASKS, *SHORT, *often, *more)
    assert [line["step"] for line in metrics_of(there / "run")] == [1, 2, 3]
    told = typed(
        there, scratch, "env.dataset=ifeval", TASKS, *SHORT, *often, *more, code=1, program=["grpo.py"]
    )
    assert re.search(r"(?m)^error: the checkpoint .* is of `grpo-async.py`, this run is `grpo.py`", told)


@pytest.mark.slow
def test_from_its_folder_with_a_checkpoint_of_the_other_program(there: Path, scratch: Path) -> None:
    words = (PROBLEMS, *SHORT, "train.run_dir=run", "policy.kl_coef=0", "train.partial_rollouts=true")
    finish(start(there, *words[:-1], program=["grpo.py"]))
    told = typed(there, scratch, *words, "train.resume=run", code=1, program=["grpo-async.py"])
    assert re.search(r"(?m)^error: the checkpoint .* is of `grpo.py`, this run is `grpo-async.py`", told)


@pytest.mark.slow
def test_rollout_servers_sample_as_well(there: Path, scratch: Path) -> None:
    served = ("inference_model.num_devices=2", "inference_model.served_by=servers", "policy.kl_coef=0")
    typed(there, scratch, *served, PROBLEMS, *SHORT)
    run = only_run(there)
    check_outputs(run, overlaps=True)
    assert {path.name for path in (run / "servers").iterdir()} == {"inference-0.log", "inference-1.log"}


@pytest.mark.slow
def test_a_sweep(there: Path, scratch: Path) -> None:
    typed(there, scratch, "--multirun", "train.max_staleness=0,2", "policy.kl_coef=0", PROBLEMS, *SHORT)
    (sweep,) = there.glob("multirun/*/*")
    runs = [sweep / "0", sweep / "1"]
    assert [settings_of(run)["train"]["max_staleness"] for run in runs] == [0, 2]
    for run in runs:
        check_outputs(run, overlaps=True)
    assert all(line["staleness/max"] == 0 for line in metrics_of(runs[0]))


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_command_that_is_ended_takes_all_along(
    there: Path, scratch: Path, number: signal.Signals, ranks: int
) -> None:
    words = ("ref_model.num_devices=1", f"train_model.num_devices={ranks}", "train.run_dir=run")
    endless = (*SHORT, "train.total_dialog_turns=100000")
    process = start(there, *words, PROBLEMS, *endless, program=PROGRAM, TMPDIR=str(scratch))
    with all_ended(process) as everyone:
        wait_for(lambda: (there / "run/metrics.jsonl").exists() and len(metrics_of(there / "run")) > 1)
        assert len(everyone.note()) >= 5  # guard, server, trainer, Ray's own, sampler
        process.send_signal(number)
        output, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode == SIGNALS[number], output
    wait_for(lambda: not list(scratch.glob("conch-ray-*")))
    if number is signal.SIGKILL:
        return
    step = int(metrics_of(there / "run")[-1]["step"])
    content = torch.load(there / f"run/checkpoints/checkpoint_{step}.pt", weights_only=True)
    assert content["step"] == step  # the step was finished and saved
    more = ("train.resume=auto", f"train.total_dialog_turns={4 * (step + 1)}")
    typed(there, scratch, *words, PROBLEMS, *SHORT, *more)
    assert [line["step"] for line in metrics_of(there / "run")] == list(range(1, step + 2))
