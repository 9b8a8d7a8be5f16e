"""What the pages show to be typed is understood: settings of judges, and command lines of programs."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conch.cli import add_options, load_run_config, parse_options, written_with
from conch.cli.run_config import parse_override
from conch.config import JudgeConfig, load
from conch.config.algorithms import run_config_of
from conch.converters import ensemble, to_triton
from conch.evaluation import pictures
from conch.evaluation.sampling.config import BestOfNRunConfig
from conch.reward_server.server_config import RewardServerConfig
from conch.scoring.options import ScoreOptions
from conch.servers.command import pairs_of
from conch.servers.settings import load_settings
from conch.serving import __main__ as serving
from examples.overoptimisation import run_bon_ensembles, run_bon_pipeline
from examples.overoptimisation.laboratory.settings import LaboratoryConfig
from examples.steerability.settings import load_settings as load_steerability

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
READ = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((ROOT / "examples").rglob("README.md"))]
PAGES = (
    *("judges", "scoring", "trl", "reward_server", "steerability", "best_of_n", "ensembles"),
    "overoptimisation",
)
OTHERS = ("cd", "curl", "echo", "pip", "uvicorn", "vllm")
"""Programs that are not ours, or take no settings."""

_ENDS_COMMAND = re.compile(r"[|;&]+")


def blocks_of(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: str) -> Iterator[list[str]]:
    """See `commands_of`."""
    return commands_of((DOCS / f"{page}.md").read_text(encoding="utf-8"))


def commands_of(text: str) -> Iterator[list[str]]:
    """Words of each command in a page's shell blocks: a pipe's are two, variables in front are left out."""
    for block in blocks_of(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&>")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, "|"]:
                if _ENDS_COMMAND.fullmatch(word):
                    if words:
                        yield words
                    words = []
                elif words or not re.match(r"[A-Z_]+=", word):
                    words.append(word)


def is_training(words: list[str]) -> bool:
    return "train" in words[1:] and words[words.index("train") - 1] == "conch"


def settings_of(words: list[str]) -> list[str]:
    """The words as they are typed: `...` stands for what every run needs, a redirection is the shell's."""
    if ">" in words:
        words = words[: words.index(">")]
    if "..." in words:
        named = [word for word in words if word != "..."]
        words = [*named[:1], "model.path=m", "data.train=rows.jsonl", *named[1:]]
    return [f"{word[:-3]}m" if word.endswith("=...") else word for word in words]


def read_train(words: list[str]) -> None:
    algorithm = words[0].replace("-", "_")
    load_run_config(run_config_of(algorithm), words[1:], default_name=algorithm)


def read_serve(words: list[str]) -> None:
    arguments = vars(serving._parser().parse_args(written_with("-", words)))
    parse_options(serving.COMMANDS[arguments.pop("command")], arguments)


def read_score(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, ScoreOptions)
    parse_options(ScoreOptions, vars(parser.parse_args(written_with("-", words))))


def read_convert(words: list[str]) -> None:
    program, rest = (ensemble, words[1:]) if words[0] == "ensemble" else (to_triton, words)
    program._parser().parse_args(written_with("-", rest))


def read_reward_server(words: list[str]) -> None:
    load_settings(RewardServerConfig, pairs_of(words))


def read_steerability(words: list[str]) -> None:
    assert words[0] == "--config"
    load_steerability(words[1], words[2:])


READERS: dict[tuple[str, ...], Callable[[list[str]], Any]] = {
    ("conch", "train"): read_train,
    ("conch", "convert"): read_convert,
    ("conch", "serve"): read_serve,
    ("conch", "score"): read_score,
    ("conch", "reward-server"): read_reward_server,
    ("python", "-m", "conch.reward_server"): read_reward_server,
    ("conch", "best-of-n"): lambda words: load_run_config(BestOfNRunConfig, words, default_name="best_of_n"),
    ("conch", "overoptimisation"): lambda words: pictures._parser().parse_args(words),
    ("python", "-m", "examples.overoptimisation.laboratory"): lambda words: load_run_config(
        LaboratoryConfig, words, default_name="laboratory/laboratory"
    ),
    ("python", "run_bon_pipeline.py"): lambda words: run_bon_pipeline._parser().parse_args(words),
    ("python", "run_bon_ensembles.py"): lambda words: run_bon_ensembles._parser().parse_args(words),
    ("accelerate", "launch", "--num-processes", "2", "rl.py"): read_steerability,
}
"""First words of a command -> what reads the others as the program does."""


@pytest.mark.parametrize("page", PAGES)
def test_each_command_of_a_page_is_understood(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen = 0
    for words in commands(page):
        if words[0] in OTHERS:
            continue
        found = [(begin, read) for begin, read in READERS.items() if tuple(words[: len(begin)]) == begin]
        assert len(found) == 1, f"no reader knows {' '.join(words)}"
        begin, read = found[0]
        try:
            read(settings_of(words[len(begin) :]))
        except SystemExit:
            pytest.fail(f"{' '.join(words)}: {capsys.readouterr().err}")
        seen += 1
    assert seen


@pytest.mark.parametrize("file", READ, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_text_with_commas_is_shown_without_its_quotes(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    shown = [words[words.index("train") + 1 :] for words in commands_of(text) if is_training(words)]
    shown += [shlex.split(span) for span in re.findall(r"`([^`\n]+=[^`\n]+)`", text) if ".url" in span]
    several = [
        word
        for words in shown
        for word in words
        if re.match(r"\+*[a-z_.]+=", word)
        and not {"-m", "--multirun"} & {*words}
        and not word.endswith("=...")
        and parse_override(word).is_sweep_override()
    ]
    assert several == [], "Hydra takes this for several values"


@pytest.mark.parametrize("page", PAGES)
def test_readme_leads_to_the_page(page: str) -> None:
    assert f"(docs/{page}.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_each_judge_of_the_page_is_one() -> None:
    shown = blocks_of((DOCS / "judges.md").read_text(encoding="utf-8"), "yaml")
    assert len(shown) >= 6
    for block in shown:
        values = yaml.safe_load(block)
        # A recipe shows what differs from the page's first judge.
        load(JudgeConfig, {"url": "http://h:8000/v1", "model": "judge", "temperature": 0.7, **values})
