"""Scores completions with lm-eval's task gsm8k and with verl's function, in an environment that has both.

    python gsm8k_parity_run.py SAMPLES

SAMPLES holds one JSON object a line with `question`, `answer` and `completion`. Prints one JSON object: for
each of "strict", "flexible" and "verl" the scores in order. lm-eval's own task runs, with its YAML, filters
and metric; only the rows come from the file instead of the hub.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import lm_eval
import yaml
from lm_eval.api.task import ConfigurableTask

SAMPLES = Path(sys.argv[1])


def lm_eval_scores(completions: list[str]) -> dict[str, list[float]]:
    config = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
    config |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"train": str(SAMPLES), "test": str(SAMPLES)}},
        "num_fewshot": 0,
    }
    assert config["metadata"]["version"] == 3.0
    task = ConfigurableTask(config=config)
    task.build_all_requests(rank=0, world_size=1)
    assert [instance.doc["completion"] for instance in task.instances] == completions
    for instance in task.instances:
        instance.resps = [instance.doc["completion"]]
    task.apply_filters()
    return {
        name: [
            float(task.process_results(instance.doc, [instance.filtered_resps[key]])["exact_match"])
            for instance in task.instances
        ]
        for name, key in (("strict", "strict-match"), ("flexible", "flexible-extract"))
    }


def verl_scores(rows: list[dict[str, str]]) -> list[float]:
    """verl's file by itself: the package imports ray, and the function needs nothing."""
    package = importlib.util.find_spec("verl")
    assert package is not None and package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "utils/reward_score/gsm8k.py"
    spec = importlib.util.spec_from_file_location("verl_gsm8k", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # As verl's examples make the ground truth of a row.
    golds = [row["answer"].rpartition("#### ")[2].replace(",", "") for row in rows]
    return [
        float(module.compute_score(row["completion"], gold)) for row, gold in zip(rows, golds, strict=True)
    ]


if __name__ == "__main__":
    samples = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]
    scores = lm_eval_scores([sample["completion"] for sample in samples])
    print(json.dumps({**scores, "verl": verl_scores(samples)}))
