"""The goal-space server under real uvicorn with two workers, asked over sockets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.goalspace_servers import GoalspaceServer

KEY = {"authorization": "Bearer secret-of-a-test"}
GOALS = "text_length,long={folder}/goals_of_a_test.py:lengths,slow={folder}/goals_of_a_test.py:slow"
RANGES = {"text_length": {"min": 0, "max": 10}, "long": {"min": 0, "max": 20}, "slow": None}
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (\d+) [IWE] [\w.]+: .+")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GoalspaceServer]:
    folder = tmp_path_factory.mktemp("goalspace")
    (folder / "ranges.yaml").write_text(yaml.safe_dump(RANGES))
    environment = {
        "GOAL_DIMENSIONS": GOALS.format(folder=folder),
        "NORMALIZATION_PATH": str(folder / "ranges.yaml"),
        "GOALSPACE_MAX_WAITING": "8",
        "GOALSPACE_MAX_REQUEST_MB": "0.01",
        "GOALSPACE_TIMEOUT_S": "12",
        "GOALSPACE_SECRET_ENV": "MY_SECRET",
        "MY_SECRET": "secret-of-a-test",
    }
    with GoalspaceServer(folder, environment) as running:
        running.wait_until_ready(KEY)
        yield running


def test_both_forms_are_answered_at_both_addresses(server: GoalspaceServer) -> None:
    assert server.ask("/goals", headers=KEY)[1] == {"goals": ["text_length", "long", "slow"]}
    texts = ["ten letter", "why?"]
    normal = {"text_length": [0.2, 0.2], "long": [0.5, None], "slow": [0.0, 0.0]}
    raw = {"text_length": [2.0, 2.0], "long": [10.0, None], "slow": [0.0, 0.0]}
    for path in ("/goalspace", "/goalspace/"):
        assert server.ask(path, texts, KEY)[:2] == (200, normal)
        assert server.ask(path, {"texts": texts}, KEY)[:2] == (200, normal)
        body = {"texts": texts, "normalize": False, "return_pandas": True}
        assert server.ask(path, body, KEY)[:2] == (200, raw)
    chosen = {"texts": texts, "goals": ["long"]}
    assert server.ask("/goalspace", chosen, KEY)[1] == {"long": [0.5, None]}
    assert server.ask("/goalspace", [], KEY)[1] == {"text_length": [], "long": [], "slow": []}


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"[", 400, "is no JSON"),
        (b"[" * 9000, 400, "is no JSON"),
        ("a secret text", 422, "the body is a string"),
        (["a secret text", 3], 422, "entry 1 of the list is a number, not a string"),
        ({"texts": "a secret text"}, 422, "`texts` is a string"),
        ({"texts": [None, "a secret text"]}, 422, "entry 0 of `texts` is null"),
        ({"text": ["a secret text"]}, 422, "an unknown key `text`; its keys are texts, normalize"),
        ({"normalize": True}, 422, "has no `texts`"),
        (
            {"texts": ["a secret text"], "normalize": "yes"},
            422,
            "`normalize` is a string: write true or false",
        ),
        ({"texts": ["a secret text"], "goals": ["lnog"]}, 422, "no goal `lnog`; this server has text_length"),
    ],
)
def test_other_forms_are_refused_in_a_sentence(
    server: GoalspaceServer, body: object, status: int, told: str
) -> None:
    code, reply, _ = server.ask("/goalspace", body, KEY)
    assert code == status
    assert list(reply) == ["detail"]
    assert told in reply["detail"]
    assert "secret" not in reply["detail"]


def test_a_body_that_is_too_large_is_refused(server: GoalspaceServer) -> None:
    code, reply, _ = server.ask("/goalspace", ["x" * 10_001], KEY)
    assert (code, "larger than this server's" in reply["detail"]) == (413, True)


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer another"}])
def test_strangers_learn_nothing_of_the_goals(server: GoalspaceServer, headers: dict[str, str]) -> None:
    for path, body in (("/goals", None), ("/goalspace", ["a text"]), ("/health", None)):
        code, reply, _ = server.ask(path, body, headers)
        assert code == 401
        assert "long" not in reply["detail"]
        assert "goal" not in reply["detail"]


def test_health_is_answered_while_goals_compute(server: GoalspaceServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        busy = [pool.submit(server.ask, "/goalspace", [f"busy 4 {n}"], KEY) for n in range(4)]
        # More than one worker's share, while either computes in Python for at least 4 s.
        answers = [server.ask("/health", headers=KEY)[:2] for _ in range(12)]
        assert not any(each.done() for each in busy)
        assert answers == [(200, {"ready": True})] * 12
        assert [each.result()[0] for each in busy] == [200] * 4


def test_more_texts_than_agreed_are_told_to_come_again(server: GoalspaceServer) -> None:
    with ThreadPoolExecutor(12) as pool:
        asked = [
            pool.submit(server.ask, "/goalspace", [f"busy 0.2 {n} {i}" for i in range(6)], KEY)
            for n in range(12)
        ]
        replies = [each.result() for each in asked]
    codes = [code for code, _, _ in replies]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 2
    late, headers = next((reply, headers) for code, reply, headers in replies if code == 429)
    assert headers["retry-after"] == "1"
    assert "above this server's `max_waiting` = 8" in late["detail"]


def test_workers_share_what_they_measured(server: GoalspaceServer) -> None:
    first = server.ask("/goalspace", ["shared by all workers"], KEY)[1]
    for _ in range(40):
        assert server.ask("/goalspace", ["shared by all workers"], KEY)[1] == first
    seen = [line.partition(" ")[2] for line in server.seen.read_text().splitlines()]
    assert seen.count("shared by all workers") == 1
    answering = {match[1] for match in map(LINE.fullmatch, server.log.read_text().splitlines()) if match}
    assert len(answering) >= 2


def test_a_goal_that_crashes_or_hangs_costs_its_own_request(server: GoalspaceServer) -> None:
    code, reply, headers = server.ask("/goalspace", ["crash"], KEY)
    assert (code, headers["retry-after"]) == (503, "1")
    assert "ended with code 7" in reply["detail"]
    code, reply, _ = server.ask("/goalspace", ["busy 300"], KEY)
    assert (code, "took longer than 12 s" in reply["detail"]) == (500, True)
    assert server.ask("/goalspace", ["all is well"], KEY)[0] == 200


def test_nothing_is_left_and_the_log_is_whole(server: GoalspaceServer) -> None:
    assert [each.name for each in server.temporary.glob("conch-goalspace-*/values.sqlite")]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: server.ask("/goalspace", [f"text {n}"], KEY), range(40)))
    assert server.end() in (0, -15)
    assert list(server.temporary.iterdir()) == []
    log = server.log.read_text()
    assert [line for line in log.splitlines() if not LINE.fullmatch(line)] == []
    assert '"POST /goalspace HTTP/1.1" 200' in log
    assert "shared by all workers" not in log
    assert "secret" not in log


def test_settings_that_will_not_do_end_all_workers_with_a_sentence(tmp_path: Path) -> None:
    with GoalspaceServer(tmp_path, {"GOAL_DIMENSIONS": "text_lenght"}) as server:
        assert server.process.wait(timeout=240) is not None
        assert "GOAL_DIMENSIONS: there is no goal `text_lenght`; did you mean text_length?" in server.output()
        assert list(server.temporary.iterdir()) == []


def test_one_worker_serves_the_four_goals_by_default(tmp_path: Path) -> None:
    with GoalspaceServer(tmp_path, workers=1) as server:
        server.wait_until_ready()
        names = ["reading_difficulty", "formality", "textual_diversity", "text_length"]
        assert server.ask("/goals")[1] == {"goals": names}
        values = server.ask("/goalspace/", ["The committee met on Monday.", ""])[1]
    assert list(values) == names
    assert all(0 <= value <= 1 for column in values.values() for value in column)
    assert list(server.temporary.iterdir()) == []
