"""The settings of conversions and ensembles: each is a field, a keyword and an option."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from conch.config.base import describe_field
from conch.converters import ensemble, to_triton
from conch.converters.backends import graph
from conch.converters.options import ConversionOptions, EnsembleOptions, ReadOptions
from conch.converters.parts import plan_parts
from conch.errors import ConfigError, ConversionError


@pytest.mark.parametrize(
    ("command", "section"), [(to_triton.main, ConversionOptions), (ensemble.main, EnsembleOptions)]
)
def test_every_setting_has_an_option_with_its_docstring(command, section, capsys) -> None:
    with pytest.raises(SystemExit):
        command(["--help"])
    shown = " ".join(capsys.readouterr().out.split())

    for name in section.model_fields:
        option = "--reward" if name == "rewards" else "--" + name.replace("_", "-")
        assert f"{option} " in shown or f"{option}]" in shown, name
        assert describe_field(section, name) and describe_field(section, name) in shown, name


def test_functions_take_every_setting_as_a_keyword() -> None:
    assert list(inspect.signature(to_triton.to_triton).parameters) == [
        "checkpoint",
        *ConversionOptions.model_fields,
    ]
    assert list(inspect.signature(ensemble.to_ensemble).parameters) == [
        "members",
        *EnsembleOptions.model_fields,
    ]


def test_command_line_gives_the_settings_of_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record(checkpoint: str, **settings: object) -> None:
        calls.append((checkpoint, settings))
        raise ConfigError("seen")

    monkeypatch.setattr(to_triton, "to_triton", record)
    line = "--checkpoint org/model --reward kind 2 --max-length 8 --dry-run --instance-kind cpu --quiet"
    assert to_triton.main(line.split()) == 1
    settings = {"rewards": ["kind", "2"], "max_length": 8, "dry_run": True, "instance_kind": "cpu"}
    assert calls == [("org/model", settings)]


def test_to_triton_names_the_setting_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key `max_lenght`; did you mean `max_length`"):
        to_triton.to_triton(tmp_path, **{"max_lenght": 8})
    with pytest.raises(ConfigError, match=r"`form`: .*'text' or 'token'"):
        to_triton.to_triton(tmp_path, **{"form": "texts"})


def test_conversion_options_say_how_to_read_too() -> None:
    assert isinstance(ConversionOptions(template="chat"), ReadOptions)


def test_one_model_is_planned_for_every_form_but_texts_through_a_graph() -> None:
    (part,) = plan_parts("walks", ConversionOptions(form="token"))
    assert (part.name, part.form, part.engine, part.route) == ("walks", "token", "python", ("walks",))
    assert [file.name for file in part.runner] == ["reward_model.py", "network.py", "encoding.py"]
    traced = ConversionOptions(form="token", backend="torchscript", instance_kind="cpu")
    assert [part.engine for part in plan_parts("walks", traced)] == ["pytorch"]


def test_texts_through_a_graph_are_planned_as_three_models_the_whole_last() -> None:
    token_form, tokenizer, whole = plan_parts("walks", ConversionOptions(backend="onnx"))
    assert (token_form.name, token_form.form, token_form.runner) == ("walks-onnx", "token", graph.RUNNER)
    assert (tokenizer.name, tokenizer.route) == ("walks-tokenizer", ())
    assert [file.name for file in tokenizer.runner] == ["tokenizer_model.py", "encoding.py"]
    assert (whole.name, whole.form, whole.engine) == ("walks", "text", "ensemble")
    assert whole.route == ("walks-tokenizer", "walks-onnx") and whole.runner == ()


def test_a_folder_with_a_slip_in_its_name_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "reward_model").mkdir()
    with pytest.raises(ConversionError, match=r"rewrad_model does not exist; did you mean .*reward_model\?"):
        to_triton.to_triton(tmp_path / "rewrad_model", model_store=tmp_path / "store")
