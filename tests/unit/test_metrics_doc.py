"""Every metric that a trainer logs is explained in docs/metrics.md."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs import PROMPTS, grpo_trainer, ilql_trainer, ppo_trainer, reward_trainer, sft_trainer, vowels

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs/metrics.md"
PAGES = [*ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md"), ROOT / "README.md"]
STAGES = "async|eval|grpo|judge|kl|policy|reward|rft|rollout|staleness|steering|time|train|value|verifier"
SAMPLES = ["abcd", "bc", "hgf", "aab", "cde", "fgh", "ab", "ed"]
PAIRS = [{"chosen": text, "rejected": "h" * len(text)} for text in SAMPLES]
SCORED = [{"text": text, "score": float(len(text))} for text in SAMPLES]


def explained() -> set[str]:
    """Names in the first column of the table."""
    cells = re.findall(r"^\| (`.+?`) \|", DOCUMENT.read_text(), re.M)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


MAKERS: dict[str, Callable[[Path], Any]] = {
    "ppo": lambda folder: ppo_trainer(folder),
    "grpo": lambda folder: grpo_trainer(folder, grpo={"correction": {"kind": "mask"}}),
    "gold": lambda folder: ppo_trainer(
        folder,
        reward_fn={"a": vowels, "b": lambda outputs, **_: [1.0] * len(outputs)},
        reward={"combine": "mean"},
        gold=lambda outputs, **_: [0.0] * len(outputs),
        train={"eval_every": 1, "total_steps": 1},
    ),
    "sft": lambda folder: sft_trainer(folder, SAMPLES, eval_samples=SAMPLES),
    "regression": lambda folder: reward_trainer(folder, SCORED, eval_samples=SCORED),
    "pairs": lambda folder: reward_trainer(folder, PAIRS, eval_samples=PAIRS),
    "ilql": lambda folder: ilql_trainer(folder, SAMPLES, [1.0] * 8, eval_prompts=PROMPTS),
}


def test_every_metric_of_a_whole_run_is_explained(tmp_path: Path) -> None:
    trainer = MAKERS["gold"](tmp_path / "run")
    trainer.fit()
    trainer.close()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = {name for row in rows for name in row} - {"step"}
    assert {"alarm/gold_falls", "alarm/members_disagree", "alarm/length_drift"} <= logged
    assert logged - explained() == set()


@pytest.mark.parametrize("name", MAKERS)
def test_every_metric_is_explained(tmp_path: Path, name: str) -> None:
    trainer = MAKERS[name](tmp_path / "run")
    logged = trainer.step().keys() | trainer.evaluate().keys()
    assert len(logged) > 3
    assert logged - explained() == set()


NOT_LOGGED = {"train/ratio_squared"}
"""Means that a trainer makes another metric of, and drops."""


def named_in_code() -> dict[str, str]:
    """Name -> file, of the strings in the code that are metrics; what an f-string fills in is `<x>`."""
    names: dict[str, str] = {}
    for folder in ("conch", "trainers"):  # a link of the library's that no walk follows
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = node.value if isinstance(node, ast.Constant) else None
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "<x>" for part in node.values)
                    text = "".join(map(str, parts))
                # A beginning that is joined to other words has `/` or `_` at its end.
                if isinstance(text, str) and re.fullmatch(rf"(?:alarm|{STAGES})/[\w<>/]*[a-z>]", text):
                    names[text] = str(path.relative_to(ROOT))
    return names


def test_every_metric_that_the_code_names_is_explained() -> None:
    named, known = named_in_code(), explained()
    stages = {name.partition("/")[0] for name in named}
    assert {"async", "judge", "rft", "staleness", "verifier", "grpo", "eval"} <= stages
    plain = {name for name in known if "<" not in name}
    # `<name>` of the page is a word of a user's; `<x>` of the code may also be one of several known words.
    patterns = [re.sub(r"<\w+>", "[^/]+", name) for name in known]
    unknown = {
        name: file
        for name, file in named.items()
        if name not in NOT_LOGGED
        and not any(re.fullmatch(pattern, name) for pattern in patterns)
        and not ("<x>" in name and any(re.fullmatch(name.replace("<x>", "[^/]+"), each) for each in plain))
    }
    assert unknown == {}


def test_pages_name_no_metric_that_there_is_not() -> None:
    # `<name>` stands for any word, in the table as on the pages.
    patterns = [re.sub(r"<\w+>", "[^`/]+", re.escape(name)) for name in explained()]
    known = re.compile("|".join(patterns))
    named: dict[str, str] = {}
    for page in PAGES:
        if page.name not in ("renamed.md", "metrics.md"):
            names = re.findall(rf"`((?:{STAGES})/[\w@<>/]+)`", page.read_text(encoding="utf-8"))
            named |= {name: page.name for name in names}
    assert len(named) > 40
    assert {name: page for name, page in named.items() if not known.fullmatch(name)} == {}
