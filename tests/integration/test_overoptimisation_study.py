"""The study's programs as their users run them: PPO against served reward models, then gold scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from conch.evaluation.records import read_record, records_of
from conch.evaluation.seed_files import read_seed_file, seed_files_of
from examples.overoptimisation.prompts import alpaca
from tests.fakes.json_rewards import Endpoint, endpoint
from tests.integration.overoptimisation_models import instructions, policy, reward_model

PROGRAMS = Path(__file__).resolve().parents[2] / "examples/overoptimisation"
LONGEST_S = 400
EVALUATIONS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a study needs, where its user works: models, instructions, and an entry of one's own."""
    folder = tmp_path_factory.mktemp("study")
    policy(folder / "models/sft")
    for seed in (1, 2):
        reward_model(folder / f"models/rm_seed{seed}", seed)
    reward_model(folder / "models/gold", 99)
    instructions(folder / "rows.jsonl")
    (folder / "configs").mkdir()
    for file in (PROGRAMS / "configs").glob("*.yaml"):
        (folder / "configs" / file.name).write_text(file.read_text())
    tiny = {
        "output_dir": "runs/tiny",
        "datasets": ["rows.jsonl"],
        "prompt_template": "Q: {instruction}\nA: ",
        "rank_config": {"model_names": ["models/rm_seed{seed}"]},
        "sft_config": {"model_name": "models/sft", "num_layers_unfrozen": 1},
        "ppo_config": {
            "train": {"total_steps": 4, "eval_interval": 4},
            "method": {"ppo_epochs": 2, "gen_kwargs": {"max_new_tokens": 6}},
        },
    }
    (folder / "configs/config_rl_tiny.yaml").write_text(yaml.safe_dump({"tiny": tiny}))
    return folder


def run(folder: Path, *words: str) -> str:
    """Run a program in the study's folder; returns what it prints."""
    result = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
    return result.stdout


def trained(folder: Path, *words: str, processes: int = 1) -> str:
    """The command of the paper's code, with the study's own files."""
    launch = ["--config_file", "configs/accelerate_config.yaml", "--cpu", "--num_processes", str(processes)]
    launch += ["--main_process_port", "0"] if processes > 1 else []
    program = [str(PROGRAMS / "trainer_rl.py"), "--config_dir", "configs"]
    entries = ["--configs", "defaults", "defaults_rlhf", "tiny"]
    return run(folder, "-m", "accelerate.commands.launch", *launch, *program, *entries, *words)


def of_gold(running: Endpoint) -> list[str]:
    return [text for body in running.asked for text in body["query"] if "fruits" in text]


@pytest.mark.slow
def test_a_policy_is_trained_and_measured_by_both_of_the_papers_commands(folder: Path) -> None:
    with endpoint() as running:
        gold = [f"gold_config.model_name={running.url}", "gold_config.is_alpacafarm_rm=true"]
        table = trained(folder, "--rm_seed", "2", *gold, "gold_config.batch_size=1")
        texts = of_gold(running)
    run_dir = folder / "runs/tiny/seed2"
    assert (run_dir / "rm_model_names.txt").read_text() == "models/rm_seed2"
    assert (run_dir / "model/config.json").is_file()
    assert len(table.splitlines()) >= 1 + EVALUATIONS and "KL (nats)" in table
    assert texts and all(text.startswith("Below is an instruction") and "Q: " not in text for text in texts)
    assert any(
        "### Instruction:\nName 23 fruits.\n\n### Input:\nOnly red ones.\n\n### Response:" in text
        for text in texts
    )
    files = seed_files_of(run_dir / "eval")
    assert [path.name for path in files] == ["eval-0.json", "eval-1.json"]
    head = json.loads(files[-1].read_text())[0]
    assert len(head["kl_list"]) == EVALUATIONS and head["kl"] == head["kl_list"][-1] and head["step"] == 2
    for sample in read_seed_file(files[-1]).samples:
        assert sample.scores["gold"] == len(alpaca(sample).sample) and sample.scores["reward"] is not None

    # The proxy's scores are those of the seed that was asked for.
    samples = read_record(records_of(run_dir)[-1]).samples
    proxies = direct(
        folder / "models/rm_seed2", [f"{sample.input}{sample.output}<eos>" for sample in samples]
    )
    for sample, expected in zip(samples, proxies, strict=True):
        assert sample.scores["reward"] == pytest.approx(expected, abs=1e-4)

    # The evaluations alone, as somebody else has them, with a checkpoint for the gold model.
    foreign = folder / "copied/eval"
    foreign.mkdir(parents=True)
    for path in files:
        rows = json.loads(path.read_text())
        for row in rows:
            del row["gold_scores"]
        rows[0].pop("sources")
        (foreign / path.name).write_text(json.dumps(rows))
    run(
        folder,
        str(PROGRAMS / "run_ppo_gold_eval.py"),
        "copied/eval",
        "models/gold",
        "--is-alpacafarm-rm",
        "--batch-size",
        "2",
    )
    samples = read_seed_file(foreign / "eval-1.json").samples
    golds = direct(folder / "models/gold", [alpaca(sample).sample for sample in samples])
    for sample, expected in zip(samples, golds, strict=True):
        assert sample.scores["gold"] == pytest.approx(expected, abs=1e-4)


def direct(checkpoint: Path, texts: list[str]) -> list[float]:
    """Scores of the checkpoint itself."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with torch.no_grad():
        return [float(model(**tokenizer(text, return_tensors="pt")).logits[0, 0]) for text in texts]


ENSEMBLE = ["rank_config.model_names=[models/rm_seed1, models/rm_seed2]", "rank_config.uwo_weight=0.5"]


@pytest.mark.slow
@pytest.mark.parametrize(("serve_as", "processes"), [("members", 2), ("ensemble", 1), ("stacked", 1)])
def test_an_ensemble_is_served_once_for_all_processes(serve_as: str, processes: int, folder: Path) -> None:
    words = [*ENSEMBLE, "rank_config.objective_name=UWO", f"rank_config.serve_as={serve_as}"]
    with endpoint() as running:
        gold = f"gold_config.model_name={running.url}"
        trained(folder, *words, gold, f"output_dir=runs/{serve_as}", processes=processes)
        assert all(text.startswith("Q: ") for text in of_gold(running))
    run_dir = folder / f"runs/{serve_as}/ensemble_UWO-0.5"
    samples = read_record(records_of(run_dir)[-1]).samples
    texts = [f"{sample.input}{sample.output}<eos>" for sample in samples]
    for sample, one, two in zip(
        samples, *(direct(folder / f"models/rm_seed{seed}", texts) for seed in (1, 2)), strict=True
    ):
        mean, variance = (one + two) / 2, (one - two) ** 2 / 4
        assert sample.scores["reward"] == pytest.approx(mean - 0.5 * variance, abs=1e-4)
        if serve_as == "members":
            assert sample.variance == pytest.approx(variance, abs=1e-4)
    if serve_as == "stacked":
        assert len([*folder.glob("model_store/stacked-uwo-*/1/members/[01]")]) == 2
    again = trained(folder, *words, gold, f"output_dir=runs/{serve_as}", processes=processes)
    assert "KL (nats)" in again, "the same command finds all done"
