from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hydra import initialize_config_dir
from pydantic import Field

from conch.cli import (
    CommandParser,
    Option,
    add_options,
    compose,
    default_config_dir,
    describe,
    keywords_of,
    load_run_config,
    run_main,
    save_resolved,
    to_yaml,
)
from conch.config import GenerationConfig, RewardConfig, Section, TrainConfig
from conch.errors import ConfigError, DataError


class ToyConfig(Section):
    """A toy run."""

    name: str
    """What to call it."""

    mode: Literal["fast", "exact"] = "fast"
    """How to go about it."""

    limit: float | None = None
    """Seconds; None for no limit."""

    grade: Literal["a", "b"] | None = None
    """How well it went."""

    generation: GenerationConfig = Field(default_factory=lambda: GenerationConfig(max_new_tokens=9))
    """How to sample."""

    train: TrainConfig = Field(default_factory=TrainConfig)
    """How long."""


class RewardedConfig(Section):
    """A toy run with a reward."""

    seed: int = 0
    reward: RewardConfig = RewardConfig()


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    folder = tmp_path / "configs"
    files = {
        "empty": "{}\n",
        "plain": "name: toy\ntrain:\n  seed: 3\n",
        "walks/small": "defaults:\n  - /generation: greedyish\n  - _self_\nname: walks\ntrain:\n  seed: 5\n",
        "generation/greedyish": "temperature: 0.1\n",
        "generation/wild": "temperature: 2.0\n",
        "linked": "name: run-${train.seed}\ntrain:\n  seed: 4\n",
        "dangling": "name: ${nowhere}\n",
        "broken": "name: [toy\ntrain: 3\n",
    }
    for name, text in files.items():
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_compose_plain_file_gives_its_content(configs: Path) -> None:
    assert compose("plain", [], configs) == {"name": "toy", "train": {"seed": 3}}


def test_compose_file_in_a_folder_is_not_nested_under_it(configs: Path) -> None:
    expected = {"generation": {"temperature": 0.1}, "name": "walks", "train": {"seed": 5}}
    assert compose("walks/small", [], configs) == expected


def test_compose_twice_leaves_no_state_behind(configs: Path) -> None:
    assert compose("plain", ["name=a"], configs)["name"] == "a"
    assert compose("plain", [], configs)["name"] == "toy"


def test_compose_works_where_hydra_is_in_use_already(configs: Path) -> None:
    initialize_config_dir(str(configs / "generation"), version_base="1.3")
    assert compose("plain", [], configs)["name"] == "toy"


def test_compose_suffix_in_the_name_is_fine(configs: Path) -> None:
    assert compose("plain.yaml", [], configs)["name"] == "toy"


def test_compose_relative_folder_works_from_its_parent(
    configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(configs.parent)
    assert compose("walks/small", [], Path("configs"))["train"] == {"seed": 5}


def test_compose_folder_with_odd_name_works(configs: Path, tmp_path: Path) -> None:
    odd = configs.rename(tmp_path / "my configs, v=2 [new]")
    assert compose("walks/small", [], odd)["train"] == {"seed": 5}


@pytest.mark.parametrize(
    ("override", "keys", "value"),
    [
        ("train.seed=7", ("train", "seed"), 7),
        ("train.max_grad_norm=1e-2", ("train", "max_grad_norm"), 0.01),
        ("reward.url=127.0.0.1:8001/walks", ("reward", "url"), "127.0.0.1:8001/walks"),
        ("generation.stop=[a,b]", ("generation", "stop"), ["a", "b"]),
        ("train.run_dir=null", ("train", "run_dir"), None),
        ("name=run-${train.seed}", ("name",), "run-3"),
        ("++name=forced", ("name",), "forced"),
        ("+extra.key=1", ("extra", "key"), 1),
    ],
)
def test_compose_override_sets_the_key_whether_or_not_the_file_has_it(
    configs: Path, override: str, keys: tuple[str, ...], value: object
) -> None:
    found: object = compose("plain", [override], configs)
    for key in keys:
        assert isinstance(found, dict)
        found = found[key]
    assert found == value


@pytest.mark.parametrize("value", ["<|pad|>", "it's", "a,b", "1e5"])
def test_compose_reads_text_that_is_quoted_as_its_message_says(configs: Path, value: str) -> None:
    escaped = value.replace("'", "\\'")
    assert compose("plain", [f"name='{escaped}'"], configs)["name"] == value


def test_compose_tilde_removes_a_key(configs: Path) -> None:
    assert compose("plain", ["~train.seed"], configs) == {"name": "toy", "train": {}}


def test_compose_group_override_takes_the_other_file(configs: Path) -> None:
    assert compose("walks/small", ["generation=wild"], configs)["generation"] == {"temperature": 2.0}


def test_compose_interpolation_is_resolved_after_overrides(configs: Path) -> None:
    assert compose("linked", ["train.seed=9"], configs)["name"] == "run-9"


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("plain", "train.seed", ("override `train.seed`", "write key=value")),
        ("plain", "train.seed={", ("override `train.seed={`", "quote")),
        (
            "plain",
            "name=<|pad|>",
            ("`name=<|pad|>`", "in a shell, \"name='<|pad|>'\" with both kinds of quotes"),
        ),
        ("plain", "name='<|it's|>'", ("\"name='<|it\\'s|>'\"",)),
        ("plain", "train.seed=1,2", ("train.seed=[1,2]", "train.seed='1,2'", "--multirun tries each")),
        ("walks/small", "generation=tame", ("generation/tame", "greedyish", "wild")),
        ("plain", "~nothing", ("nothing",)),
        ("dangling", "train.seed=1", ("nowhere",)),
        ("broken", "train.seed=1", ("broken.yaml", "line 2")),
    ],
)
def test_compose_mistake_is_a_config_error_that_names_it(
    configs: Path, name: str, override: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(name, [override], configs)
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "search path" not in message and "See http" not in message


def test_compose_missing_file_lists_those_that_exist(configs: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration `nope` in .*plain, walks/small"):
        compose("nope", [], configs)


@pytest.mark.parametrize(
    ("name", "said"),
    [("plian", "did you mean `plain`?"), ("nope", "there is: plain")],
)
def test_missing_file_is_told_with_those_of_the_program(configs: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"no configuration `{name}` in .*; {re.escape(said)}$"):
        load_run_config(ToyConfig, ["--config-name", name], default_name="plain", config_dir=configs)


def test_compose_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration folder .*absent.*--config-dir"):
        compose("plain", [], tmp_path / "absent")


def test_load_run_config_gives_a_validated_section(configs: Path) -> None:
    config = load_run_config(
        ToyConfig,
        ["train.seed=8", "--config-name", "walks/small", "limit=2.5"],
        default_name="plain",
        config_dir=configs,
    )
    assert (config.name, config.train.seed, config.limit) == ("walks", 8, 2.5)
    assert config.generation.temperature == 0.1


def test_load_run_config_unknown_key_names_the_nearest(configs: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key `train.sed`; did you mean `train.seed`"):
        load_run_config(ToyConfig, ["train.sed=8"], default_name="plain", config_dir=configs)


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("rewards.py:f", "function", "rewards.py:f"),
        ("it's here.py:f", "function", "it's here.py:f"),
        ("a.b:f", "function", "a.b:f"),
        ("one:8001,two:8001/m", "url", "one:8001,two:8001/m"),
        ("localhost:8001/m", "url", "localhost:8001/m"),
        ("http://host:5000/score", "url", "http://host:5000/score"),
        ("goals:text_length", "url", "goals:text_length"),
        ("verifier:gsm8k", "verifier", "gsm8k"),
    ],
)
def test_reward_option_is_the_key_that_it_stands_for(configs: Path, word: str, key: str, value: str) -> None:
    for words in (["--reward", word], [f"--reward={word}"]):
        config = load_run_config(RewardedConfig, [*words, "seed=3"], default_name="empty", config_dir=configs)
        assert (getattr(config.reward, key), config.seed) == (value, 3)
        assert config.reward.model_fields_set == {key}


def test_reward_option_names_a_judges_file(configs: Path) -> None:
    words = ["--reward", "judge:strict.yaml"]
    config = load_run_config(RewardedConfig, words, default_name="empty", config_dir=configs)
    assert config.reward.judge.file == Path("strict.yaml")


def test_reward_option_is_of_runs_with_a_reward(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_run_config(ToyConfig, ["--reward", "a:f"], default_name="plain", config_dir=configs)
    assert "--reward" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.sed=1", "unknown key `train.sed`; did you mean `train.seed`?"),
        ("+train.sed=1", "unknown key `train.sed`"),
        ("extra=1", "unknown key `extra`"),
        ("limit.most=1", None),
        ("generation=wild", None),
        ("~train.seed", None),
    ],
)
def test_unknown_keys_are_told_before_anything_is_composed(
    configs: Path, word: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compose_nothing(*_: object) -> dict[str, Any]:
        raise ZeroDivisionError

    monkeypatch.setattr("conch.cli.run_config.compose", compose_nothing)
    with pytest.raises(ZeroDivisionError if said is None else ConfigError) as caught:
        load_run_config(ToyConfig, [word, "name=a"], default_name="walks/small", config_dir=configs)
    assert said is None or said in str(caught.value)


def test_load_run_config_config_dir_option_wins(configs: Path, tmp_path: Path) -> None:
    argv = ["--config-dir", str(configs)]
    config = load_run_config(ToyConfig, argv, default_name="plain", config_dir=tmp_path / "absent")
    assert config.name == "toy"


def test_load_run_config_looks_in_the_checkouts_configs_by_default() -> None:
    with pytest.raises(
        ConfigError, match=r"no configuration `nope` in .*configs; there is: .*accelerate/cpu"
    ):
        load_run_config(ToyConfig, [], default_name="nope")


def test_help_shows_every_key_with_type_default_and_meaning(
    configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        load_run_config(ToyConfig, ["--help"], default_name="plain", config_dir=configs)
    shown = capsys.readouterr().out
    assert leaving.value.code == 0
    assert "A toy run." in shown and "--print-config" in shown
    assert "name: str, required\n      What to call it." in shown
    assert "mode: 'fast' | 'exact', default 'fast'" in shown
    assert "limit: float | None, default None" in shown
    assert "grade: 'a' | 'b' | None, default None" in shown
    assert "train.seed: int, default 0" in shown
    assert "train.run_dir: Path | None, default None" in shown


def test_describe_enclosing_default_counts() -> None:
    assert "generation.max_new_tokens: int, default 9" in describe(ToyConfig)


def test_print_config_shows_yaml_that_loads_again(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        load_run_config(ToyConfig, ["--print-config"], default_name="plain", config_dir=configs)
    assert leaving.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["name"] == "toy" and shown["train"]["seed"] == 3


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rft", "ilql", "sft", "reward_model"])
def test_print_config_alone_shows_the_defaults_and_what_is_lacking(
    algorithm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        import_module(f"conch.trainers.{algorithm}").main(["--print-config"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# configuration not valid:\n#   `model`: give exactly one of `path`")
    values = yaml.safe_load(shown)
    assert values["model"]["path"] is None and values["train"]["seed"] == 0
    with pytest.raises(ConfigError, match="`model`: give exactly one of"):
        import_module(f"conch.trainers.{algorithm}").main(["--print-config", "train.seed=1"])


def test_print_config_names_what_is_required(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.yaml").write_text("train: {seed: 5}\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        load_run_config(ToyConfig, ["--print-config"], default_name="empty", config_dir=tmp_path)
    shown = capsys.readouterr().out
    assert "# " in shown and "`name` is missing" in shown
    values = yaml.safe_load(shown)
    assert (values["train"]["seed"], values["generation"]["max_new_tokens"]) == (5, 9)
    (tmp_path / "empty.yaml").write_text(shown, encoding="utf-8")
    with pytest.raises(ConfigError, match="`name` is missing"):
        load_run_config(ToyConfig, [], default_name="empty", config_dir=tmp_path)
    assert load_run_config(ToyConfig, ["name=a"], default_name="empty", config_dir=tmp_path).train.seed == 5


@contextmanager
def reader_that_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace stdout by a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield


@pytest.mark.parametrize("size", [10, 100_000], ids=["a line", "more than a buffer"])
def test_reader_that_leaves_before_the_end_is_no_error(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with reader_that_left(monkeypatch), pytest.raises(SystemExit) as caught:
        run_main(lambda _: print("a" * size))
    assert caught.value.code == 0


def test_exit_code_is_kept_where_the_reader_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def show_and_leave(_: list[str]) -> None:
        print("shown")
        raise SystemExit(3)

    with reader_that_left(monkeypatch), pytest.raises(SystemExit) as caught:
        run_main(show_and_leave)
    assert caught.value.code == 3


def test_pipe_that_broke_elsewhere_keeps_its_traceback() -> None:
    def write_to_nobody(_: list[str]) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "wb", buffering=0) as stream:
            stream.write(b"a")

    with pytest.raises(BrokenPipeError):
        run_main(write_to_nobody)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--confg-name", "--confg-name; did you mean --config-name?"),
        ("--prnt-config", "--prnt-config; did you mean --print-config?"),
        ("--train.seed=3", "--train.seed; settings are written without dashes: train.seed=3"),
        (
            "--train.sed=3",
            "--train.sed; settings are written without dashes, key=value; did you mean `train.",
        ),
    ],
)
def test_unknown_option_names_what_was_meant(
    option: str, said: str, configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load_run_config(ToyConfig, [option, "name=a"], default_name="plain", config_dir=configs)
    assert capsys.readouterr().err.startswith(f"error: unknown option {said}")


def test_unknown_option_leaves_with_2(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        load_run_config(ToyConfig, ["--seed=1"], default_name="plain", config_dir=configs)
    assert leaving.value.code == 2
    said = "settings are written without dashes, key=value; did you mean `train.seed`?"
    assert capsys.readouterr().err == f"error: unknown option --seed; {said}\n"


def test_save_resolved_can_be_composed_into_an_equal_config(tmp_path: Path) -> None:
    config = ToyConfig(
        name="naïve 'quoted'",
        limit=1e-5,
        generation=GenerationConfig(stop=("\n", "a,b")),
        train=TrainConfig(seed=2),
    )
    save_resolved(config, tmp_path / "run" / "config.yaml")
    again = load_run_config(ToyConfig, [], default_name="config", config_dir=tmp_path / "run")
    assert again == config


NUMBERS = ("1e5", "-1E5", "+.5e3", "1_0e3", "0b1", ".nan", "2020-01-01", "1:30")
WORDS = ("???", "yes", "null", "~", "", "$", "=", "#a", "{a}", "- a", "a: b", "<|im_end|>")
REFERENCES = ("${name}", "a${name", r"\${name}", r"\\${name}")
CONTROLS = ("\n", " a\t", "e\x85", "~\u2028[", "\x1b", "\x00", "\N{GRINNING FACE}'\"")


@pytest.mark.parametrize("text", [*NUMBERS, *WORDS, *REFERENCES, *CONTROLS])
def test_a_resolved_text_comes_back_as_it_was(tmp_path: Path, text: str) -> None:
    config = ToyConfig(name=text, generation=GenerationConfig(stop=(text or "a", "b")))
    save_resolved(config, tmp_path / "config.yaml")
    assert load_run_config(ToyConfig, [], default_name="config", config_dir=tmp_path) == config


def test_save_resolved_unwritable_place_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write the resolved configuration to .*config.yaml"):
        save_resolved(ToyConfig(name="toy"), tmp_path / "file" / "config.yaml")


def test_to_yaml_holds_plain_values_only() -> None:
    assert yaml.safe_load(to_yaml(ToyConfig(name="toy")))["train"]["output_dir"] == "outputs"


def test_default_config_dir_is_the_checkouts() -> None:
    assert default_config_dir() == Path(__file__).resolve().parents[2] / "configs"


def _succeed(argv: list[str]) -> None:
    assert argv == ["a=1"]


def _fail(argv: list[str]) -> None:
    raise DataError("no prompts in x.jsonl; give at least one")


def _interrupt(argv: list[str]) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        (_succeed, 0, ""),
        (_fail, 1, "error: no prompts in x.jsonl; give at least one\n"),
        (_interrupt, 130, "interrupted\n"),
    ],
)
def test_run_main_turns_outcomes_into_exit_codes(
    main: Callable[[list[str]], None],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "a=1"])
    with pytest.raises(SystemExit) as leaving:
        run_main(main)
    assert leaving.value.code == code
    assert capsys.readouterr().err == said


def test_run_main_lets_bugs_keep_their_traceback() -> None:
    def broken(argv: list[str]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(broken)


class ToyOptions(Section):
    """Settings of a toy command."""

    name: str
    """What to call it, 100% free."""

    mode: Literal["fast", "exact"] = "fast"
    """How to go about it."""

    limit: float | None = None
    """Seconds; by default no limit."""

    first: int = 0
    """Number of the first round."""

    labels: tuple[str, ...] = ()
    """Names of the rounds."""

    places: Annotated[tuple[str, ...], Option(("-p", "--place"), repeated=True)] = ()
    """Where the rounds take place."""

    dry: bool = False
    """Do nothing."""

    folder: str | Path = "here"
    """Where it goes."""


def toy_parser(**settings: Any) -> CommandParser:
    parser = CommandParser()
    add_options(parser, ToyOptions, **settings)
    return parser


def test_add_options_leaves_out_what_the_command_line_does_not_set() -> None:
    assert vars(toy_parser().parse_args(["--name", "a"])) == {"name": "a"}


def test_add_options_reads_values_by_the_fields_types() -> None:
    line = "--name a --mode exact --limit 2.5 --first 3 --labels x y --place u -p v --dry --folder there"
    assert vars(toy_parser().parse_args(line.split())) == {
        "name": "a",
        "mode": "exact",
        "limit": 2.5,
        "first": 3,
        "labels": ["x", "y"],
        "places": ["u", "v"],
        "dry": True,
        "folder": "there",
    }


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--nmae a", "unknown option --nmae; did you mean --name?"),
        ("--zzzzz", "unknown option --zzzzz; --help lists all"),
        ("name=a", "`name=a` is no option; write --name a"),
        ("--name name=b --dry mode=fast", "`mode=fast` is no option; write --mode fast"),
    ],
)
def test_unknown_option_of_a_command_is_told_in_one_line(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        toy_parser().parse_args(line.split())
    assert (leaving.value.code, capsys.readouterr().err) == (2, f"error: {said}\n")


def test_values_of_options_may_be_written_like_settings() -> None:
    line = "--name mode=a --labels first=1 mode=2 --place name=b --nam c"
    assert vars(toy_parser().parse_args(line.split()))["labels"] == ["first=1", "mode=2"]


@pytest.mark.parametrize("line", ["", "--name a --mode slow", "--name a --first x"])
def test_add_options_refuses_values_of_another_type(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        toy_parser().parse_args(line.split())
    assert "error:" in capsys.readouterr().err


def test_add_options_takes_help_from_docstrings_and_defaults() -> None:
    shown = " ".join(toy_parser().format_help().split())
    assert "What to call it, 100% free." in shown
    assert "How to go about it. Default: fast." in shown
    assert "Number of the first round. Default: 0." in shown
    assert "by default no limit. --first" in shown and "Do nothing. --folder" in shown


def test_add_options_renames_and_leaves_out_fields() -> None:
    parser = toy_parser(without=("dry", "folder"))
    assert vars(parser.parse_args(["--name", "a", "--place", "x"])) == {"name": "a", "places": ["x"]}
    assert "--dry" not in parser.format_help() and "--place PLACE" in parser.format_help()


def test_keywords_of_shows_the_fields_of_a_section() -> None:
    @keywords_of(ToyOptions)
    def run(place: str, **settings: Any) -> dict[str, Any]:
        return {"place": place, **settings}

    parameters = inspect.signature(run).parameters
    assert list(parameters) == ["place", *ToyOptions.model_fields]
    assert parameters["mode"].default == "fast"
    assert run("x", name="a") == {"place": "x", "name": "a"}
