"""Gold scores that are added to evaluations, by rewards behind real sockets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from conch.config import RewardConfig, load
from conch.errors import ConfigError, DataError, RewardUnavailableError
from conch.evaluation.evaluator import kept_metadata
from conch.evaluation.gold import Gold, add_gold, as_it_stands, gold_source, main, templated
from conch.evaluation.records import (
    EvaluatedSample,
    EvaluationRecord,
    read_record,
    record_path,
    records_of,
    write_record,
)
from conch.rewards.base import RewardSource
from conch.types import Dialogue, Prompt
from tests.fakes.json_rewards import Endpoint, Reply, endpoint

ROOT = Path(__file__).resolve().parents[3]
STEPS = (0, 100, 200)
PER_STEP = 6
TWO: Any = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
FAST = {"client": {"deadline_s": 1.0, "request_timeout_s": 1.0, "connect_timeout_s": 0.5}}


def a_run(folder: Path, steps: Sequence[int] = STEPS, **changed: Any) -> Path:
    """Evaluations of samples with lengths of their own, some outputs twice."""
    for step in steps:
        samples = tuple(
            EvaluatedSample(
                number // 2,
                changed.get("input", f"{step}: question {number // 2} "),
                "ab" * (number % 3),
                4,
                {"reward": float(10 * number + step)},
            )
            for number in range(PER_STEP)
        )
        sources = {"reward": changed.get("proxy", "rm at 127.0.0.1:1")}
        write_record(
            record_path(folder, step), EvaluationRecord(step, samples, {"eval/kl": 0.5}, "", sources)
        )
    return folder


def gold_of(run: Path, name: str = "gold") -> list[list[float | None]]:
    return [[sample.scores.get(name) for sample in read_record(path).samples] for path in records_of(run)]


def lengths(run: Path) -> list[list[float]]:
    """What the fake endpoint gives."""
    return [
        [float(len(str(sample.input) + sample.output)) for sample in read_record(path).samples]
        for path in records_of(run)
    ]


@pytest.fixture
def judge() -> Iterator[Endpoint]:
    with endpoint() as running:
        yield running


def asked_samples(running: Endpoint) -> list[str]:
    return [sample for body in running.asked for sample in body["query"] if sample]


def test_every_sample_gets_the_score_of_its_own_text(tmp_path: Path, judge: Endpoint, capsys: Any) -> None:
    run = a_run(tmp_path)
    assert main([str(run), judge.url, "--batch-size", "4"]) == 0
    assert gold_of(run) == lengths(run)
    assert max(len(body["query"]) for body in judge.asked) <= 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "KL", "(nats)", "proxy", "gold", "failed"]
    assert lines[2].split() == ["100", "0.5", "125", f"{sum(lengths(run)[1]) / 6:.4g}", "0", "of", "6"]
    assert read_record(records_of(run)[0]).sources["gold"] == judge.url


def test_what_has_a_score_is_not_asked_for_again(tmp_path: Path, judge: Endpoint) -> None:
    run = a_run(tmp_path)
    assert main([str(run), judge.url]) == 0
    judge.asked.clear()
    a_run(tmp_path, [300])
    path = records_of(run)[1]
    record = read_record(path)
    write_record(path, record.with_scores("gold", [1.0, None, *[2.0] * 4], judge.url))
    assert main([str(run / "evaluations"), judge.url]) == 0
    asked = asked_samples(judge)
    assert {text[:4] for text in asked if "question" in text} == {"300:", "100:"}
    assert sum(text.startswith("100:") for text in asked) == 1
    assert gold_of(run)[1] == [1.0, lengths(run)[1][1], *[2.0] * 4]
    assert main([str(run), "http://127.0.0.1:9/score", "--force"]) == 1
    whole = [path.read_bytes() for path in records_of(run)]
    judge.asked.clear()
    assert main([str(run), judge.url]) == 0, "where nothing is missing, nobody is asked"
    assert judge.asked == [] and [path.read_bytes() for path in records_of(run)] == whole


def test_force_scores_anew_and_another_name_stands_beside(tmp_path: Path, judge: Endpoint) -> None:
    run = a_run(tmp_path, [0])
    record = read_record(records_of(run)[0])
    write_record(records_of(run)[0], record.with_scores("gold", [9.0] * PER_STEP, "another judge"))
    assert main([str(run), judge.url]) == 1
    assert gold_of(run) == [[9.0] * PER_STEP]
    assert main([str(run), judge.url, "--name", "second"]) == 0
    assert gold_of(run) == [[9.0] * PER_STEP] and gold_of(run, "second") == lengths(run)
    assert main([str(run), judge.url, "--force"]) == 0
    assert gold_of(run) == lengths(run)


def test_a_server_that_goes_away_leaves_what_it_gave(tmp_path: Path, capsys: Any) -> None:
    run = a_run(tmp_path)
    calls: list[int] = []

    def dying(samples: list[str]) -> Reply:
        calls.append(len(samples))
        if sum(calls) > 10:
            return 0, b""
        return 200, json.dumps({"rewards": [float(len(sample)) for sample in samples]}).encode()

    with endpoint(dying) as running:
        argv = [str(run), running.url, "--batch-size", "2", "--deadline-s", "1"]
        assert main(argv) == 1
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert (
            len(error) == 1 and "went away while it scored" in error[0] and "goes on from there" in error[0]
        )
        done = [score for column in gold_of(run) for score in column if score is not None]
        assert PER_STEP < len(done) <= 10 and gold_of(run)[0] == lengths(run)[0]
        running.answer = lambda samples: (
            200,
            json.dumps({"rewards": [float(len(s)) for s in samples]}).encode(),
        )
        running.asked.clear()
        assert main(argv) == 0
        assert gold_of(run) == lengths(run)
        texts = {text for text in asked_samples(running) if "question" in text}
        assert not any(text.startswith("0: ") for text in texts)


def test_a_server_that_is_away_from_the_start_changes_nothing(tmp_path: Path, capsys: Any) -> None:
    run = a_run(tmp_path)
    before = [path.read_bytes() for path in records_of(run)]
    assert main([str(run), "http://127.0.0.1:9/score", "--deadline-s", "1"]) == 1
    assert capsys.readouterr().err.count("error:") == 1
    assert [path.read_bytes() for path in records_of(run)] == before


def test_a_sample_that_gets_no_score_is_counted_and_asked_for_again(tmp_path: Path, capsys: Any) -> None:
    run = a_run(tmp_path, [0])

    def choosy(samples: list[str]) -> Reply:
        return 200, json.dumps(
            {"rewards": [None if sample.endswith("abab") else 1.0 + len(sample) for sample in samples]}
        ).encode()

    with endpoint(choosy) as running:
        assert main([str(run), running.url]) == 2
        assert gold_of(run)[0].count(None) == 2 and "2 of 6" in capsys.readouterr().out
        running.answer = lambda samples: (200, json.dumps({"rewards": [3.0] * len(samples)}).encode())
        assert main([str(run), running.url]) == 0
        assert gold_of(run)[0].count(3.0) == 2


@pytest.mark.parametrize("after", [7, 12], ids=["within a file", "between two files"])
def test_a_killed_evaluation_goes_on_where_it_was(after: int, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    stuck, go_on = threading.Event(), threading.Event()
    seen: list[str] = []

    def slow(samples: list[str]) -> Reply:
        texts = [sample for sample in samples if "question" in sample]
        if len(seen) + len(texts) > after and not go_on.is_set():
            stuck.set()
            go_on.wait(60)
            return 0, b""
        seen.extend(texts)
        return 200, json.dumps({"rewards": [float(len(sample)) for sample in samples]}).encode()

    with endpoint(slow) as running:
        command = [sys.executable, "-m", "conch.evaluation.gold", str(run), running.url, "--batch-size", "1"]
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            assert stuck.wait(60)
            time.sleep(0.3)  # what was scored before is on its way to the disk
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            go_on.set()
        partial = gold_of(run)
        files = after // PER_STEP
        assert partial[:files] == lengths(run)[:files]
        assert partial[files:] == [[None] * PER_STEP] * (len(STEPS) - files), "a file is whole, or as it was"
        before = [path.read_bytes() for path in records_of(run)[:files]]
        seen.clear()
        assert main([str(run), running.url, "--batch-size", "1"]) == 0
        assert gold_of(run) == lengths(run)
        assert [path.read_bytes() for path in records_of(run)[:files]] == before
        done = tuple(f"{step}: " for step in STEPS[:files])
        assert not any(text.startswith(done) for text in seen)


def test_a_long_file_is_written_while_it_is_scored(
    tmp_path: Path, judge: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conch.evaluation.gold._SAVE_EVERY_S", 0.0)
    run, saved = a_run(tmp_path, [0]), list[int]()

    def note(samples: list[str]) -> Reply:
        saved.append(sum(score is not None for score in gold_of(run)[0]))
        return 200, json.dumps({"rewards": [float(len(sample)) for sample in samples]}).encode()

    judge.answer = note
    with gold_source(judge.url, RewardConfig()) as source:
        add_gold(records_of(run), Gold(source, batch_size=1, at_once=1))
    assert 0 < saved[-1] < PER_STEP and gold_of(run) == lengths(run)


def test_the_reward_that_was_learned_from_is_refused_by_name_and_by_its_scores(
    tmp_path: Path, judge: Endpoint, capsys: Any
) -> None:
    run = a_run(tmp_path / "named", proxy=judge.url)
    assert main([str(run), judge.url]) == 1
    assert "is the reward that" in capsys.readouterr().err and judge.asked == []
    for where, scores in (("moved", ("reward",)), ("member", ("rm_seed1",))):
        path = record_path(tmp_path / where, 0)
        texts = [f"{number} {'x' * number}" for number in range(PER_STEP)]
        samples = []
        for text in texts:
            proxy = {name: float(len(text)) for name in scores}
            members = proxy if where == "member" else {}
            samples.append(EvaluatedSample(0, text, "", 4, {"reward": 0.5, **proxy}, members))
        write_record(path, EvaluationRecord(0, tuple(samples)))
        before = path.read_bytes()
        assert main([str(tmp_path / where), judge.url]) == 1
        told = "by its member `rm_seed1`" if where == "member" else "learned from: it is the same"
        assert told in capsys.readouterr().err and path.read_bytes() == before


def test_a_verifier_may_agree_with_the_proxy(tmp_path: Path) -> None:
    sample = EvaluatedSample(0, "2 + 2?", r"\boxed{4}", 4, {"reward": 1.0}, {}, {"answer": "#### 4"})
    wrong = EvaluatedSample(0, "2 + 2?", r"\boxed{5}", 4, {"reward": 0.0}, {}, {"answer": "#### 4"})
    write_record(record_path(tmp_path, 0), EvaluationRecord(0, (sample, wrong, sample, wrong)))
    assert main([str(tmp_path), "verifier:gsm8k", "--name", "correct"]) == 0
    assert gold_of(tmp_path, "correct") == [[1.0, 0.0, 1.0, 0.0]]


def test_a_verifier_needs_what_the_rows_had(tmp_path: Path, capsys: Any) -> None:
    assert main([str(a_run(tmp_path)), "verifier:gsm8k"]) == 1
    assert "prompt 0 has no" in capsys.readouterr().err


def test_a_function_gets_texts_and_the_keys_of_the_rows(tmp_path: Path) -> None:
    (tmp_path / "judging.py").write_text(
        "def judge(samples, prompts, outputs, bonus):\n"
        "    return [len(output) + 10 * b for output, b in zip(outputs, bonus)]\n"
    )
    samples = (EvaluatedSample(0, "a", "bc", 1, {"reward": 0.0}, {}, {"bonus": 3}),)
    write_record(record_path(tmp_path, 0), EvaluationRecord(0, samples, sources={"reward": "judge"}))
    assert main([str(tmp_path), f"{tmp_path}/judging.py:judge"]) == 0, "another function may have its name"
    assert gold_of(tmp_path) == [[32.0]]
    assert main([str(tmp_path), f"{tmp_path}/judging.py:judging"]) == 1


def test_messages_reach_a_reward_as_messages(tmp_path: Path, judge: Endpoint) -> None:
    messages: list[Any] = [{"role": "user", "content": "Who?"}]
    samples = (
        EvaluatedSample(0, messages, "Me.", 2, {}, {}, {"tools": [{"name": "look"}], "id": 1}),
        EvaluatedSample(1, "plain ", "text", 2, {}),
    )
    write_record(record_path(tmp_path, 0), EvaluationRecord(0, samples))
    rollout = as_it_stands(samples[0])
    assert rollout.dialogue is not None and rollout.dialogue.tools == ({"name": "look"},)
    assert rollout.prompt.metadata == {"id": 1}
    assert main([str(tmp_path), judge.url, "--dialect", "messages"]) == 0
    dialogues = [each for body in judge.asked for each in body.get("dialogues", [])]
    answered = [*messages, {"role": "assistant", "content": "Me."}]
    assert any(each and each["messages"] == answered for each in dialogues) and None in dialogues
    assert as_it_stands(EvaluatedSample(0, messages, "", 0, {})).dialogue is not None, "an empty answer"


def test_what_a_run_keeps_of_a_dialogue_is_the_dialogue_again() -> None:
    messages = ({"role": "user", "content": "Who?"},)
    dialogue = Dialogue(messages, ({"name": "look"},), {"thinking": False})
    prompt = Prompt("<user>Who?", (1,), {"answer": "7"}, dialogue)
    kept = EvaluatedSample(0, [*messages], "Me.", 1, {}, {}, kept_metadata(prompt))
    again = as_it_stands(kept)
    assert again.prompt.dialogue == dialogue and again.prompt.metadata == {"answer": "7"}
    assert kept_metadata(Prompt("a", (1,), {"answer": "7"})) == {"answer": "7"}


class _Texts(RewardSource):
    """Reads texts, as served models without a chat template do."""

    name = "texts"
    reads = "texts"

    def check(self) -> None: ...

    def submit(self, rollouts: Any) -> Any:
        raise AssertionError("asked")


def test_dialogues_are_no_texts(tmp_path: Path) -> None:
    run = a_run(tmp_path, [0], input=[{"role": "user", "content": "Who?"}])
    with pytest.raises(ConfigError, match=r"6 of 6 inputs of .* are dialogues: .*--template chat"):
        add_gold(records_of(run), Gold(_Texts()))


def test_a_template_shows_the_prompt_in_another_form(tmp_path: Path, judge: Endpoint) -> None:
    run = a_run(tmp_path, [0], input=[{"role": "user", "content": "Who {prompt}?"}])
    assert main([str(run), judge.url, "--prompt-template", "Q: {prompt}\nA: "]) == 0
    assert "Q: Who {prompt}?\nA: abab" in asked_samples(judge)
    assert main([str(run), judge.url, "--prompt-template", "Q: "]) == 1
    with pytest.raises(ConfigError, match="dialogue of 2 messages"):
        templated("{prompt}")(EvaluatedSample(3, [*TWO], "", 0, {}))


def test_a_run_becomes_the_files_of_the_other_code(tmp_path: Path, judge: Endpoint) -> None:
    run = a_run(tmp_path / "run")
    assert main([str(run), judge.url, "--write-seed-files", str(tmp_path / "eval")]) == 0
    rows = [json.loads((tmp_path / f"eval/eval-{number}.json").read_text()) for number in range(3)]
    assert [score for row in rows[1] for score in row["gold_scores"]] == lengths(run)[1]
    for row in rows[2]:
        del row["gold_scores"]
    (tmp_path / "eval/eval-2.json").write_text(json.dumps(rows[2]))
    judge.asked.clear()
    assert main([str(tmp_path / "eval"), judge.url]) == 0
    again = json.loads((tmp_path / "eval/eval-2.json").read_text())
    assert [score for row in again for score in row["gold_scores"]] == lengths(run)[2]
    assert {text[:3] for text in asked_samples(judge) if "question" in text} == {"200"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["none"], "no folder of evaluations"),
        ([".", "--name", "reward"], "--name reward"),
        ([".", "--batch-size", "0"], "--batch-size 0: at least 1"),
        (["."], "holds no evaluations"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    where, *more = words
    assert main([where, "verifier:gsm8k", *more]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence in line


def test_a_damaged_file_is_told_before_anything_is_asked(tmp_path: Path, judge: Endpoint) -> None:
    run = a_run(tmp_path)
    records_of(run)[2].write_text('{"conch_evaluation": 1')
    with (
        pytest.raises(DataError, match="damaged"),
        gold_source(judge.url, load(RewardConfig, FAST)) as source,
    ):
        add_gold(records_of(run), Gold(source))
    assert judge.asked == []


def test_an_unreachable_server_is_an_error_of_its_own_kind(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    with (
        pytest.raises(RewardUnavailableError),
        gold_source("http://127.0.0.1:9/score", load(RewardConfig, FAST)) as source,
    ):
        add_gold(records_of(run), Gold(source))
