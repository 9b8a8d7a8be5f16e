from __future__ import annotations

from pathlib import Path

import pytest

from conch.cli.sweeps.plan import Request, own_words, plan_axes, plan_jobs, print_plan
from conch.cli.sweeps.record import Record
from conch.cli.sweeps.settings import SweepConfig
from conch.errors import ConfigError
from tests.fakes.sweep_program import CONFIGS, ProgramConfig

REQUEST = Request(ProgramConfig, (), (), (), "toy", CONFIGS)


def plan(record: Record, *words: str, **settings: object) -> list[str]:
    """The jobs that a command puts into a record."""
    config = SweepConfig.model_validate(settings)
    plan_jobs(record, REQUEST, config, plan_axes(REQUEST, config, words))
    return [f"{job.number}: {' '.join(job.overrides)}" for job in record.current]


def test_jobs_are_planned_in_the_order_of_the_product(tmp_path: Path) -> None:
    jobs = plan(Record(tmp_path, "Toy"), "rate=0.1,1", "shape=glob(s*)", "width=1,2")
    assert jobs == [
        "0: rate=0.1 shape=steep width=1",
        "1: rate=0.1 shape=steep width=2",
        "2: rate=1 shape=steep width=1",
        "3: rate=1 shape=steep width=2",
    ]


def test_jobs_are_known_by_their_configuration_however_it_is_written(tmp_path: Path) -> None:
    record = Record(tmp_path, "Toy")
    plan(record, "rate=0.1,1")
    assert plan(record, "++rate=1.0,0.10,5") == ["1: ++rate=1.0", "0: ++rate=0.1", "2: ++rate=5"]
    assert plan(record, "train.total_steps=4", "train.output_dir=elsewhere") == [
        "0: train.total_steps=4 train.output_dir=elsewhere"
    ]


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["rate=1", "widht=1,2"], {}, r"job 0 of the sweep \(rate=1 widht=1\).*did you mean `width`"),
        (["width=1,2,wide"], {}, r"job 2 of the sweep \(width=wide\).*`width`"),
        (["width=1,wide"], {"trials": 2}, r"a trial with width=wide of the sweep.*`width`"),
        (["width=interval(1,2)"], {"trials": 2}, r"a trial with width=1\.61.*`width`"),
        (["rate=interval(1,2)"], {}, r"sweep\.trials"),
    ],
)
def test_no_job_starts_where_one_is_not_valid(
    tmp_path: Path, words: list[str], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){message}"):
        plan(Record(tmp_path, "Toy"), *words, **settings)


def test_search_and_product_do_not_share_a_folder(tmp_path: Path) -> None:
    record = Record(tmp_path, "Toy")
    assert plan(record, "rate=interval(1,2)", trials=3) == []
    record.add(["rate=1.5"], "digest")
    with pytest.raises(ConfigError, match="holds a search, this command is none"):
        plan(record, "rate=1,2")
    for changed in ({"seed": 1}, {"prune": "median"}, {"metric_at": "last"}):
        with pytest.raises(ConfigError, match=rf"is another one \({next(iter(changed))} changed\)"):
            plan(record, "rate=interval(1,2)", trials=3, **changed)
    with pytest.raises(ConfigError, match="keys changed"):
        plan(record, "rate=interval(1,3)", trials=3)
    with pytest.raises(ConfigError, match="configuration changed"):
        plan(record, "rate=interval(1,2)", "name=other", trials=3)
    assert plan(record, "rate=interval(1,2)", trials=9, jobs=4) == ["0: rate=1.5"]
    grid = Record(tmp_path / "grid", "Toy")
    plan(grid, "rate=1,2")
    with pytest.raises(ConfigError, match="is another one"):
        plan(grid, "rate=1,2", trials=2)


def test_plan_of_a_search_names_the_space(capsys: pytest.CaptureFixture[str]) -> None:
    settings = SweepConfig(trials=9)
    words = ["rate=tag(log,interval(1e-4,10))", "width=1,2", "name=fixed"]
    print_plan(REQUEST, settings, plan_axes(REQUEST, settings, words))
    assert capsys.readouterr().out == "9 trials of rate=tag(log,interval(0.0001,10.0)) width=1,2\n"


def test_folder_with_odd_letters_reaches_the_job(tmp_path: Path) -> None:
    folder = tmp_path / "it's, a=b {x} [1]"
    values = REQUEST.compose(own_words(folder))
    assert values["train"] == {"run_dir": str(folder), "resume": "auto"}
