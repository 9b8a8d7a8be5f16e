from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from conch.cli.sweeps.grammar import Axis, Interval, product, read_axes, split_settings
from conch.errors import ConfigError


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    for name in ("shape/line", "shape/steep", "shape/steeper", "shape/below/deep", "main"):
        file = tmp_path / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}\n")
    (tmp_path / "shape" / "notes.txt").write_text("no configuration\n")
    return tmp_path


@contextmanager
def hydra_loader(configs: Path) -> Iterator[Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configs), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def jobs_of_hydra(words: list[str], configs: Path) -> list[tuple[str, ...]]:
    with hydra_loader(configs) as loader:
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(words)
        return [tuple(job) for job in BasicSweeper.split_arguments(overrides, None)[0]]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["a=1"],
        ["a=1,2,3", "b=10,20"],
        ["b=10,20", "fixed=7", "a=1,2"],
        ["a=range(1,4)", "b=range(0,1,0.25)"],
        ["a=range(0,1,0.1)"],
        ["a=range(5,1,-2)"],
        ["a=choice(x,y,z)", "b=choice(1)"],
        ["a=sort(3,1,2)", "b=sort(range(1,4),reverse=true)"],
        ["a=1e-4,1e-5", "b=null,true"],
        ["a='x,y',z", 'b="one two",three'],
        ["a=[1,2],[3]", "b={x:1},{x:2}"],
        ["a=int(1.0,2.0)", "b=float(range(1,3))", "c=str(1,2)"],
        ["shape=glob(*)", "a=1,2"],
        ["shape=glob([s*,l*],exclude=steep)"],
        ["a=1,2", "b=3,4", "a=5"],
        ["+a=1,2", "++b=3,4"],
        ["shape@other=line,steep"],
        ["a.b.c=x y,z"],
    ],
    ids=" ".join,
)
def test_product_is_that_of_hydras_own_sweeper(words: list[str], configs: Path) -> None:
    assert product(read_axes(words, [configs], seed=0)) == jobs_of_hydra(words, configs)


def test_the_last_word_of_a_key_counts_whatever_signs_stand_before_it(configs: Path) -> None:
    assert product(read_axes(["++a=1,2", "b=3,4", "a=5"], [configs], seed=0)) == [
        ("a=5", "b=3"),
        ("a=5", "b=4"),
    ]


def test_shuffle_has_hydras_values_in_an_order_that_the_seed_decides(configs: Path) -> None:
    words = ["a=shuffle(range(0,20))", "b=shuffle(1,2,3,4,5,6,7,8,9)"]
    orders = [product(read_axes(words, [configs], seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(jobs_of_hydra(words, configs))
    assert orders[0] != product(read_axes(["a=range(0,20)", "b=1,2,3,4,5,6,7,8,9"], [configs], seed=0))


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("a=interval(0,1)", Interval(0.0, 1.0, False, False)),
        ("a=interval(1,5)", Interval(1.0, 5.0, False, False)),
        ("a=int(interval(1,5))", Interval(1, 5, False, True)),
        ("a=tag(log,interval(1e-5,1e-3))", Interval(1e-5, 1e-3, True, False)),
        ("a=tag(log,int(interval(1,64)))", Interval(1, 64, True, True)),
    ],
)
def test_interval_keeps_bounds_scale_and_kind(text: str, interval: Interval) -> None:
    (axis,) = read_axes([text], [], seed=0)
    assert axis == Axis("a", (), interval)
    assert axis.is_swept


def test_interval_numbers_are_written_so_that_they_are_read_exactly() -> None:
    (axis,) = read_axes(["+a@b=interval(0,1)"], [], seed=0)
    word = axis.word(1.2345678901234567e-05)
    assert word == "+a@b=1.2345678901234568e-05" and axis.name == "a"
    assert OverridesParser.create().parse_override(word).value() == 1.2345678901234567e-05


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a=interval(2,1)", ("below the second",)),
        ("a=tag(log,interval(0,1))", ("above 0",)),
        ("a=interval(1,5),3", ("cannot stand among other values",)),
        ("shape=glob(x*)", ("matches no file", "line, steep, steeper")),
        ("rate=glob(*)", ("groups of configuration files", "`rate` is none")),
        ("a=sort(glob(*))", ("cannot read the override",)),
        ("a=range(1,4", ("cannot read the override",)),
        ("a=range(4,1)", ("holds no value",)),
    ],
)
def test_mistake_in_a_word_is_a_config_error(text: str, words: tuple[str, ...], configs: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_axes([text], [configs], seed=0)
    assert [word for word in (text, *words) if word not in str(caught.value)] == []


def test_interval_without_an_end_of_trials_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a=interval.*sweep\.trials"):
        product(read_axes(["a=interval(0,1)"], [], seed=0))


def test_settings_are_taken_off_the_command_line() -> None:
    words = [
        "lr=1,2",
        "sweep.jobs=3",
        "hydra.sweep.dir=here/it is",
        "train.seed=1",
        "sweep.devices=[0,GPU-1]",
    ]
    settings, rest = split_settings(words)
    assert rest == ["lr=1,2", "train.seed=1"]
    assert (settings.jobs, settings.dir, settings.devices) == (3, Path("here/it is"), (0, "GPU-1"))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        (
            "sweep.launcher=accelerate launch --main_process_port=0",
            "launcher",
            "accelerate launch --main_process_port=0",
        ),
        ("sweep.launcher='env A=1 python'", "launcher", "env A=1 python"),
        ("sweep.metric=eval/reward@do_sample=false", "metric", "eval/reward@do_sample=false"),
        ("sweep.metric=null", "metric", None),
        ("sweep.dir=12", "dir", Path("12")),
        ("+hydra.sweep.dir=a, b/2026-11-29", "dir", Path("a, b/2026-11-29")),
    ],
)
def test_settings_that_are_text_need_no_quotes_of_hydras(text: str, name: str, value: object) -> None:
    settings, rest = split_settings([text])
    assert getattr(settings, name) == value and rest == []


def test_interpolations_of_the_folder_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "disk")
    settings, _ = split_settings(["hydra.sweep.dir='${oc.env:WHERE}/${now:%Y}'"])
    assert settings.dir is not None and settings.dir.parts[0] == "disk" and int(settings.dir.name) >= 2026
    with pytest.raises(ConfigError, match="cannot resolve"):
        split_settings(["sweep.dir='${nowhere}'"])


def test_names_of_hydras_optuna_sweeper_are_understood() -> None:
    settings, _ = split_settings(
        ["hydra.sweeper.n_trials=9", "hydra.launcher.n_jobs=2", "hydra.sweeper.sampler.seed=4"]
    )
    assert (settings.trials, settings.jobs, settings.seed) == (9, 2, 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sweep.jobs=0", ("sweep.jobs", "greater than or equal to 1")),
        ("sweep.job=2", ("sweep.job", "did you mean `sweep.jobs`")),
        ("sweep.devices=0,1", ("sweep.devices=[...]",)),
        ("hydra/launcher=joblib", ("no plugins of Hydra", "sweep.jobs")),
        ("train.run_dir=here", ("sweep.dir",)),
        ("train.resume=auto", ("sweep.dir",)),
    ],
)
def test_setting_that_a_sweep_cannot_have_is_refused(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        split_settings([text])
    assert [word for word in words if word not in str(caught.value)] == []
