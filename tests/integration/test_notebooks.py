"""Training in cells that a real kernel of Jupyter runs: what is shown below them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from transformers import GPT2LMHeadModel

from tests.launches import LONGEST_S
from tests.terminal import ROOT
from tests.tiny import char_tokenizer, tiny_gpt2_config

TRAIN = """
import conch

def train(steps, resume=None):
    def reward(outputs, **_):
        BEFORE_REWARD()
        return [float(output.count("a")) for output in outputs]

    with_evaluations = {"total_steps": steps, "eval_every": 2, "run_dir": "run", "resume": resume}
    config = {"train": with_evaluations, "grpo": {"group_size": 2}, "generation": {"max_new_tokens": 4}}
    prompts = ["ab", "cd"] * 4
    trainer = conch.train("model", prompts=prompts, reward=reward, algorithm="grpo", config=config)
    trainer.close()

BEFORE_REWARD = lambda: None
"""


def run_cells(folder: Path, *cells: str) -> list[list[dict[str, Any]]]:
    """Run cells in a folder with a small model of four letters; returns the outputs of each."""
    tokenizer = char_tokenizer("abcd")
    GPT2LMHeadModel(tiny_gpt2_config(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    code = [f"import sys; sys.path.insert(0, {str(ROOT)!r})", TRAIN, *cells]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in code])
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=LONGEST_S, kernel_name="python3", resources=place).execute()
    return [cell.outputs for cell in notebook.cells[2:]]


def shown(outputs: list[dict[str, Any]], kind: str) -> list[str]:
    """What was displayed of a MIME type."""
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def printed(outputs: list[dict[str, Any]], stream: str) -> str:
    return "".join(output["text"] for output in outputs if output.get("name") == stream)


def test_cell_shows_progress_and_curves_of_the_run_that_it_trains(tmp_path: Path) -> None:
    trained, loaded = run_cells(tmp_path, "train(4)", "conch.runs.load('run')")
    [board, curves] = [output for output in trained if output["output_type"] == "display_data"]
    page = board["data"]["text/html"]
    assert '<div>grpo 4/4 <progress value="4" max="4"' in page
    assert "<td></td><td>training</td><td>evaluation</td>" in page and "<td>step</td><td>4</td><td>4" in page
    evaluations = page.partition("<pre>")[2].partition("</pre>")[0].splitlines()
    assert [line.split("  ")[0] for line in evaluations] == [f"grpo {k}/4 evaluation" for k in (0, 2, 4)]
    assert board["data"]["text/plain"].startswith("grpo 4/4  ")
    png = base64.b64decode(curves["data"]["image/png"])
    assert png.startswith(b"\x89PNG") and curves["metadata"]["image/png"]["width"] == 816
    [folder_line] = printed(trained, "stderr").splitlines()
    assert "run folder: " in folder_line, "libraries are quiet"
    ending = printed(trained, "stdout")
    assert ending.startswith("grpo: 4 of 4 steps are done\n") and "conch report " in ending

    [summary] = shown(loaded, "text/html")
    assert summary.startswith("<div>grpo 4/4 finished, best eval/reward ")
    assert '<img alt="curves" width="816" src="data:image/png;base64,' in summary


def test_interrupted_cell_saves_the_run_and_the_next_one_goes_on_with_its_curves(tmp_path: Path) -> None:
    # What "interrupt the kernel" does: SIGINT, here in the middle of a reward.
    interrupted = """
import os, signal
calls = []
def BEFORE_REWARD():
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGINT)
try:
    train(200)
except KeyboardInterrupt:
    print("interrupted")
"""
    resumed = """
BEFORE_REWARD = lambda: None
train(conch.runs.load("run").summary.step + 2, resume="auto")
"""
    stopped, resumed = run_cells(tmp_path, interrupted, resumed)
    assert printed(stopped, "stdout").endswith("interrupted\n")
    assert "of 200 steps are done" in printed(stopped, "stdout")
    [first, *_] = shown(stopped, "text/html")
    step = int(first.partition("grpo ")[2].partition("/")[0])
    assert 0 < step < 20
    [page] = shown(resumed, "text/html")
    assert f"grpo {step + 2}/{step + 2} " in page
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [*range(step + 3)]
