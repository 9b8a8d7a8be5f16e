"""Best-of-n in two processes: the same completions, scores and results as in one, whoever sampled them."""

from __future__ import annotations

from pathlib import Path

import pytest

from conch.evaluation.sampling.run import main
from tests.best_of_n_runs import Bench
from tests.launches import finish, start, torchrun


def words(bench: Bench, output: str, samples: int) -> list[str]:
    settings = {
        "model.path": bench.folder / "policy",
        "data.eval": bench.folder / "prompts.jsonl",
        "generation.max_new_tokens": 4,
        "generation.chunk_size": 8,
        "reward.function": bench.reward("vowels"),
        "gold": bench.reward("length"),
        "best_of_n.num_samples": samples,
        "best_of_n.save_every": 16,
        "best_of_n.output_dir": bench.folder / output,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*folder.glob("samples/*"), folder / "results.json"]}


@pytest.mark.slow
def test_two_processes_sample_and_score_what_one_does_and_go_on_together(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    program = ["-m", "conch", "best-of-n"]
    for samples in (12, 20):
        finish(start([*torchrun(2), *program, *words(bench, "two", samples)]))
        main(words(bench, "one", samples))

        assert files(tmp_path / "two") == files(tmp_path / "one")
