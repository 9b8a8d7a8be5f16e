"""What the pages show to be typed is understood: settings of judges, and command lines of programs."""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from conch import __main__ as conch
from conch.cli.run_config import parse_override
from conch.config import JudgeConfig, load
from conch.errors import ConchError
from docs._ext.needs import NEEDS
from tests.pages import DOCS, PAGES, ROOT, blocks_of, commands_in, commands_of

SHELL = {
    *(
        "cd",
        "chmod",
        "curl",
        "echo",
        "export",
        "cat",
        "mkdir",
        "umask",
        "openssl",
        "source",
        "pip",
        "api",
        "jq",
        "do",
    ),
}
"""Programs of everybody's, and of this page, which take no settings of ours."""
MARKED = {
    "singularity": "singularity",
    "singularity/build.sh": "singularity",
    "singularity/serve.sh": "singularity",
    "sbatch": "slurm",
    "ray": "cluster",
    "vllm": "gpu",
    "accelerate launch --config_file configs/accelerate/zero2-bf16.yaml": "gpu",
    "accelerate launch --config_file configs/accelerate/zero2-bf16-multinode.yaml": "gpu",
    "docker": "docker",
    "python -m benchmarks.gpu_suite": "gpu",
    "./smoke.sh": "long",
    "python -m openrlhf.cli.train_ppo_ray": "peer",
}
"""Beginning of a command -> the word that the marker above its block must have."""
LINKED = (
    *("judges", "scoring", "trl", "reward_server", "steerability", "best_of_n", "ensembles"),
    "overoptimisation",
)


class Understood(BaseException):
    """The settings of a command line are valid."""


VERBS = {
    "train": "conch.training",
    "convert": "conch.converters.to_triton",
    "serve": "conch.serving.__main__",
    "score": "conch.scoring.run",
    "gold-eval": "conch.evaluation.gold",
    "rollout-server": "conch.servers.command",
    "reference-server": "conch.servers.command",
    "reward-server": "conch.servers.command",
    "service": "conch.servers.command",
    "size": "conch.sizing.__main__",
    "plot": "conch.runs.plots",
    "runs": "conch.runs.command",
    "report": "conch.report.__main__",
    "best-of-n": "conch.cli",
    "overoptimisation": "conch.evaluation.pictures",
    "doctor": "conch.doctor",
}
"""Verb of `conch` -> the module that reads its settings."""
STOPS = ("read_options", "read_settings", "load_settings", "load_run_config", "parse_options")
"""What turns a command line into settings; where a module has none of them, argparse does all."""


@contextmanager
def stopped(module: ModuleType, argv: list[str]) -> Iterator[None]:
    """Inside, a program raises `Understood` once its settings are valid."""
    logger = logging.getLogger("conch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setattr(sys, "orig_argv", [sys.executable, "-m", *argv])
        patch.setenv("CONCH_SERVICE_KEY", "key")
        for name in ("propagate", "level"):
            patch.setattr(logger, name, getattr(logger, name))
        patch.setattr(logger, "handlers", [*logger.handlers])
        name = next((name for name in STOPS if hasattr(module, name)), None)
        owner, name = (module, name) if name else (argparse.ArgumentParser, "parse_args")
        read = getattr(owner, name)

        def stop(*arguments: Any, **options: Any) -> None:
            options.pop("check", None)  # which asks this machine, for its devices
            read(*arguments, **options)
            raise Understood

        patch.setattr(owner, name, stop)
        yield


def run_stopped(main: Callable[..., Any], module: ModuleType, program: str, words: list[str]) -> None:
    """Run a program until its settings are valid, and no further."""
    if {"-m", "--multirun"} & {*words}:
        words = [*words, "--print-config"]  # which validates every job, and starts none
    with stopped(module, [program, *words]):
        try:
            code = main(*([words] if inspect.signature(main).parameters else []))
        except Understood:
            return
        except SystemExit as left:
            if left.code:
                raise
            return
    raise AssertionError(f"left with {code} before its settings were read")


def read_verb(words: list[str]) -> None:
    """A command of `conch`, read as it reads it."""
    verb = conch._SHORT.get(words[0], (words[0],))[0]
    if verb == "trlx":
        return None  # takes a file and no settings
    if verb == "best-of-n":  # it imports as it runs, and what it imports must not find a function replaced
        importlib.import_module("conch.evaluation.sampling.config")
    return run_stopped(conch.main, importlib.import_module(VERBS[verb]), "conch", words)


MODULES = {
    "conch.service": ("conch.service.__main__", "conch.servers.command"),
    "examples.remote.grpo_server.uvicorn_main": ("conch.service.__main__", "conch.servers.command"),
    "conch.reward_server": ("conch.reward_server.__main__", "conch.servers.command"),
    "examples.grpo.grpo-async": ("examples.grpo.grpo-async", "examples.grpo.grpo"),
    "examples.overoptimisation.laboratory": ("examples.overoptimisation.laboratory.__main__",) * 2,
}
"""Module of a command line -> the module with its `main`, and the one that reads its settings."""


def read_module(module: str, words: list[str]) -> None:
    """A module that is a program, read as it reads its command line."""
    if module == "conch":
        return read_verb(words)
    if module == "conch.interop.trlx":
        return None  # takes a file and no settings
    program, reads = MODULES.get(module, (module, module))
    main = importlib.import_module(program).main
    return run_stopped(main, importlib.import_module(reads), module, words)


def read_launched(words: list[str], folder: Path) -> None:
    """A launcher's command line, with options before what it launches: their files must be there."""
    while words[0].startswith("--"):
        if words[0] == "--config_file":
            assert (folder / words[1]).is_file(), f"no file {words[1]}"
        words = words[2:]
    read(["python", *words], folder)


def module_of(words: list[str], folder: Path) -> tuple[str, list[str]] | None:
    """Name and arguments of a program of ours that Python starts; None for one that is not."""
    if words[1] == "-m":
        place, words = Path(*words[2].split(".")), words[3:]
    else:
        place, words = Path(words[1]).with_suffix(""), words[2:]
    for root in (folder, ROOT, ROOT / "examples/remote"):
        if (root / place).is_dir() or (root / place).with_suffix(".py").is_file():
            return ".".join((root / place).relative_to(ROOT).parts), words
    return None


def read_python(words: list[str], folder: Path) -> None:
    """A program that Python starts."""
    found = module_of(words, folder)
    if found is None or found[0].startswith("benchmarks."):
        raise LookupError
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        read_module(*found)


def read_docker(words: list[str], folder: Path) -> None:
    """An image of ours that is built, or one that is run, or several together."""
    if words[1] == "compose":
        assert words[2] == "-f" and "services" in yaml.safe_load((folder / words[3]).read_text())
    elif words[1] == "build":
        stage, file = words[words.index("--target") + 1], words[words.index("-f") + 1]
        assert re.search(rf"^FROM .* AS {stage}$", (folder / file).read_text(), re.MULTILINE), stage
    else:
        assert words[1] == "run" and any(word.startswith("conch-") for word in words)


def settings_of(words: list[str]) -> list[str]:
    """The words as they are typed: `...` stands for what every run needs."""
    if "..." in words:
        place = words.index("...")
        needed = ["model.path=m", "data.train=rows.jsonl"]
        given = {word.partition("=")[0] for word in words}
        needed = [each for each in needed if each.partition("=")[0] not in given]
        words = [*words[:place], *needed, *words[place + 1 :]]
    return [f"{word[:-3]}m" if word.endswith("=...") else word for word in words]


def read(words: list[str], folder: Path) -> None:
    """Have a command's settings read by the program that would run. folder: where it would run.

    Raises:
        LookupError: nothing here knows the command.
    """
    words = settings_of(words)
    match words:
        case ["conch", *rest]:
            read_verb(rest)
        case ["accelerate", "launch", *rest] | ["torchrun", *rest]:
            read_launched(rest, folder)
        case ["sbatch", "--nodes", _, script, *rest]:
            assert (folder / script).is_file()
            read_launched(rest, folder)
        case ["python", _, *_]:
            read_python(words, folder)
        case ["docker", *_]:
            read_docker(words, folder)
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["uvicorn", application, *_]:
            assert (folder / application.partition(":")[0]).with_suffix(".py").is_file()
        case [program, *_] if program not in SHELL:
            raise LookupError


def needed(words: list[str]) -> str | None:
    """The word that the marker above a command must have."""
    return next(
        (need for start, need in MARKED.items() if words[: len(start.split())] == start.split()), None
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_command_of_a_page_is_understood_or_marked(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conch.yaml").write_text("model: {path: gpt2}\n")  # which a command of from_trlx.md writes
    wrong: list[str] = []
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language != "bash":
            continue
        folder = page.parent if page.is_relative_to(ROOT / "examples") else ROOT
        for words in commands_in(block.text):
            if words[0] == "cd" and (ROOT / words[1]).is_dir():
                folder = ROOT / words[1]
            need = needed(words)
            if need is not None and need not in block.needs:
                wrong.append(f"{' '.join(words)}: the block has no marker `{need}`")
            try:
                read(words, folder)
            except LookupError:
                if need is None:
                    wrong.append(f"{' '.join(words)}: nothing here reads it, and no marker is asked for")
            except (SystemExit, ConchError, AssertionError) as error:
                wrong.append(f"{' '.join(words)}: {error} {capsys.readouterr().err}")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_marker_is_one(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = [re.findall(r"\w+", needs) for needs in re.findall(r"<!-- needs: (.*?) -->", text)]
    above = [sorted(block.needs) for block in blocks_of(text) if block.needs]
    assert sorted(map(sorted, named)) == sorted(above), "a marker stands directly above its block"
    assert {need for needs in named for need in needs} <= {*NEEDS}


def is_training(words: list[str]) -> bool:
    return "train" in words[1:] and words[words.index("train") - 1] == "conch"


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
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


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_machines_of_figures_are_named_in_benchmarks_alone(page: Path) -> None:
    named = re.findall(r"EPYC|Xeon", page.read_text(encoding="utf-8"))
    assert bool(named) == (page.stem == "benchmarks")


@pytest.mark.parametrize("page", LINKED)
def test_readme_leads_to_the_page(page: str) -> None:
    assert f"(docs/{page}.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_each_judge_of_the_page_is_one() -> None:
    page = (DOCS / "judges.md").read_text(encoding="utf-8")
    shown = [block.text for block in blocks_of(page) if block.language == "yaml"]
    assert len(shown) >= 6
    for block in shown:
        values = yaml.safe_load(block)
        # A recipe shows what differs from the page's first judge.
        load(JudgeConfig, {"url": "http://h:8000/v1", "model": "judge", "temperature": 0.7, **values})
