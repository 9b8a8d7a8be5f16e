"""from_user and Endpoint: what a user may give as a reward."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from conch.addresses import Endpoint
from conch.config import RewardConfig, load
from conch.errors import ConfigError
from conch.rewards.base import ClientStats, RewardSource, ServerTimes
from conch.rewards.factory import from_user
from conch.rewards.function import FunctionReward
from conch.rewards.scorer import RewardScorer
from conch.rewards.served import TritonReward
from conch.types import RewardResult, RewardStatus, Rollout
from tests.fakes.rollouts import rollouts


def zero(samples: list[str], prompts: list[str], outputs: list[str], **metadata: Any) -> list[float]:
    return [0.0] * len(samples)


def test_function_becomes_a_source() -> None:
    with from_user(zero, RewardConfig()) as source:
        assert isinstance(source, FunctionReward)


def test_metadata_keys_reach_the_check() -> None:
    def narrow(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        return []

    source = from_user(narrow, RewardConfig(), metadata_keys=["answer"])
    with source, pytest.raises(ConfigError, match="answer"):
        source.check()


def test_source_is_taken_as_it_is() -> None:
    with FunctionReward(zero) as source:
        assert from_user(source, RewardConfig()) is source


@pytest.mark.parametrize("given", ["argument", "config", "environment"])
def test_address_becomes_a_served_reward(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "localhost:8001/walks"
    monkeypatch.setenv("TRITON_HOST", url if given == "environment" else "elsewhere:1/other")
    config = RewardConfig(url=url if given == "config" else None)
    with from_user(url if given == "argument" else None, config) as source:
        assert isinstance(source, TritonReward)
        assert source.name == "walks at localhost:8001"


@pytest.fixture
def rewards_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of a user's, with a module of theirs beside it; the search path is put back afterwards."""
    (tmp_path / "users_parts.py").write_text("HALF = 0.5\n")
    (tmp_path / "users_rewards.py").write_text(
        "from users_parts import HALF\n\n\ndef halves(samples, **_):\n    return [HALF for _ in samples]\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    for name in ("users_rewards", "users_parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "users_rewards.py"


@pytest.mark.parametrize("place", ["{file}", "users_rewards.py", "users_rewards"])
def test_function_of_a_file_or_module_is_found(place: str, rewards_file: Path) -> None:
    config = RewardConfig(function=f"{place.format(file=rewards_file)}:halves")
    with from_user(None, config) as source:
        source.check()
        results = source.submit(rollouts("a", "b")).result(60)
    assert source.name == "halves" and [result.scores for result in results] == [{"reward": 0.5}] * 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("halves", "write file.py:name or module:name"),
        ("users_reward.py:halves", r"there is no such file; did you mean users_rewards\.py\?"),
        ("users_rewards.py:halve", "has no function halve; did you mean halves"),
        ("users_rewards:HALF", "HALF of users_rewards is of type float and no function"),
        ("users_rewards:hlf", "has no function hlf; it has halves"),
        ("nowhere.at.all:f", "there is no module nowhere in .* a file is given as file.py:name"),
    ],
)
def test_function_that_is_not_there_is_refused(function: str, message: str, rewards_file: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        from_user(None, RewardConfig(function=function))


def test_a_function_and_an_address_are_refused_together() -> None:
    with pytest.raises(ConfigError, match="give `function` or `url` or `members`, one of them"):
        load(RewardConfig, {"function": "a.py:f", "url": "localhost:1/a"})


def test_no_reward_names_the_three_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_HOST", raising=False)
    with pytest.raises(ConfigError) as caught:
        from_user(None, RewardConfig())
    assert all(way in str(caught.value) for way in ("function", "reward.url", "TRITON_HOST"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("grpc://host:8001/walks", "with its gRPC port"),
        ("a:8001,b/walks", "`b/walks` is not of the form `host:port/model`"),
        ("a:8001,/walks", "`/walks` is not of the form `host:port/model`"),
        ("a:8001/walks,b:8001/walks", "give the model once, after the last server"),
        ("a:8001,b:8001,a:8001/walks", "names a server twice"),
        ("host/walks", "not of the form `host:port/model`"),
        ("host:8001", "not of the form `host:port/model`"),
        ("host:8001/", "not of the form `host:port/model`"),
        ("host:8001/walks/3", "not of the form `host:port/model`"),
        ("host:0/walks", "not of the form `host:port/model`"),
        ("host:70000/walks", "not of the form `host:port/model`"),
        ("host:grpc/walks", "not of the form `host:port/model`"),
        ("walks", "`walks` names nothing that gives rewards: `file.py:function` or"),
        ("rewards.py", "for a function of this file write `rewards.py:NAME`"),
        ("rewards.short", "for a function of a module write `rewards:short`"),
        ("strict.yaml", "did you mean `judge:strict.yaml`?"),
        ("gsm8k", "did you mean `verifier:gsm8k`?"),
    ],
)
def test_bad_address_is_refused_with_the_reason(url: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_user(url, RewardConfig())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "host"), [("gpu-7.cluster:8001/rm", "gpu-7.cluster"), ("[::1]:8001/rm", "[::1]")]
)
def test_endpoint_reads_host_port_and_model(text: str, host: str) -> None:
    assert Endpoint.parse(text) == Endpoint(host, 8001, "rm")
    assert str(Endpoint.parse(text)) == text


def test_several_servers_share_a_model() -> None:
    parsed = Endpoint.parse_all("a:8001, b:8002,[::1]:8003/rm")
    assert parsed == (Endpoint("a", 8001, "rm"), Endpoint("b", 8002, "rm"), Endpoint("[::1]", 8003, "rm"))
    with from_user("a:8001,b:8002/rm", RewardConfig()) as source:
        assert source.name == "rm at a:8001, b:8002"


def test_other_types_are_refused() -> None:
    # In a process of its own: here the test run's type checks would refuse the 3 first.
    imports = "from conch.config import RewardConfig; from conch.rewards import from_user"
    code = f"{imports}; from_user(3, RewardConfig())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (
        "ConfigError: a reward must be a function, `host:port/model`, `http://host:port/path`, "
        "`judge:FILE.yaml`, a Verifier or a RewardSource, not int" in done.stderr
    )


class Shortest(RewardSource):
    """All that a user has to write."""

    def check(self) -> None: ...

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        future: Future[list[RewardResult]] = Future()
        future.set_result([RewardResult(RewardStatus.OK, scores={"reward": 1.0}) for _ in rollouts])
        return future


def test_a_source_of_two_methods_scores_and_has_defaults_for_the_others() -> None:
    with from_user(Shortest(), RewardConfig()) as source:
        source.check()
        scorer = RewardScorer(source, RewardConfig())
        scorer.submit(rollouts("a", "b"))
        scorer.submit(rollouts("c"))
        assert [result.scores["reward"] for result in scorer.gather()] == [1.0] * 3
        assert not source.batched and source.stats() is None
        assert source.server_statistics().result(0) == ServerTimes()
    metrics = scorer.metrics()
    assert (metrics["reward/requests"], metrics["reward/retries"], metrics["reward/queue_s"]) == (2, 0, 0)


def test_the_source_in_the_documentation_scores() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs/rewards.md").read_text(encoding="utf-8")
    (example,) = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Brevity" in block
    ]
    names: dict[str, Any] = {}
    exec(example, names)
    with from_user(names["Brevity"](), RewardConfig()) as source:
        source.check()
        results = source.submit(rollouts("aa", "b")).result(60)
    assert [result.scores["reward"] for result in results] == [-2.0, -1.0]


@pytest.mark.parametrize("missing", ["check", "submit"])
def test_a_source_without_one_of_the_two_methods_is_refused_by_name(missing: str) -> None:
    methods = {"check": Shortest.check, "submit": Shortest.submit}
    del methods[missing]
    with pytest.raises(TypeError, match=missing):
        type("Half", (RewardSource,), methods)()


def test_an_object_that_only_looks_like_a_source_is_told_what_to_derive_from() -> None:
    class Lookalike:
        name = "lookalike"
        check, submit = Shortest.check, Shortest.submit

        def __call__(self) -> None: ...

    with pytest.raises(ConfigError, match=r"Lookalike .* derive it from `conch\.rewards\.RewardSource`"):
        from_user(Lookalike(), RewardConfig())


def test_stats_of_a_function_are_its_calls() -> None:
    with from_user(zero, RewardConfig()) as source:
        source.submit(rollouts("a", "b")).result(60)
        assert source.batched and source.stats() == ClientStats(requests=1)


def test_rewards_package_loads_neither_torch_nor_tritonclient() -> None:
    code = (
        "import sys, conch.rewards; print([m for m in ('torch', 'tritonclient', 'grpc') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


def test_sources_satisfy_the_protocol() -> None:
    with FunctionReward(zero) as function, TritonReward("localhost:1/m", RewardConfig()) as served:
        assert isinstance(function, RewardSource) and isinstance(served, RewardSource)
