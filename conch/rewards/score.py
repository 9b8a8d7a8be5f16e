"""Score texts or dialogues with a served reward model, from the command line or from Python.

    conch score --url 127.0.0.1:8001/walks samples.jsonl > scores.jsonl
    echo '{"text": "The film was fine."}' | conch score --url 127.0.0.1:8001/walks

A row is a text, a JSON string or {"text": "..."}; a dialogue, {"messages": [...]} with "tools" and
"chat_template_kwargs" where there are any, or the list of its messages; or {"prompt", "completion"}, both
texts or the prompt a list of messages. Each row gets one line: {"index", "status", "scores", ...}. A row
without a score has another status than "ok" and says why in "detail"; it never gets a number.

Exit codes: 0 all rows have scores, 1 nothing could be asked, 2 some rows have none.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any

from conch.addresses import SCHEMES
from conch.cli import Option, add_options, parse_options, written_with
from conch.config import HttpDialect, RewardConfig, Section, load
from conch.errors import ConchError, ConfigError, DataError
from conch.log import progress, setup_logging
from conch.triton.contract import MESSAGES, TEMPLATE_KWARGS, TOOLS
from conch.types import ASSISTANT, Completion, Dialogue, Prompt, RewardResult, RewardStatus, Rollout

_ROWS_AT_ONCE = 256
_FORMS = (
    'a text, {"text": ...}, a list of messages, {"messages": [...]}, or {"prompt": ..., "completion": ...}'
)
_NOT_JSON = object()

_TEXT_READERS = ("texts", "outputs")


class AskOptions(Section):
    """How a served reward model is asked."""

    dialect: HttpDialect = "query"
    """What an HTTP endpoint is sent, see `reward.dialect`."""

    deadline_s: float = 60.0
    """Time limit of one request with all its retries, in seconds."""

    secret_env: str | None = None
    """Environment variable that holds the server's secret."""

    tls_ca: Path | None = None
    """Authority that signed the server's certificate, or that certificate itself (PEM)."""

    tls_cert: Path | None = None
    """Our own certificate, for servers that ask for one."""

    tls_key: Path | None = None
    """Its private key, not encrypted."""

    def section(self, url: str | None, batch_rows: int) -> RewardConfig:
        """Return these settings as a trainer's `reward` section.

        url: see `reward.url`.
        batch_rows: most samples in a request.
        """
        tls = {"ca": self.tls_ca, "cert": self.tls_cert, "key": self.tls_key}
        client = {"batch_rows": batch_rows, "deadline_s": self.deadline_s}
        auth = {"secret_env": self.secret_env, "tls": tls}
        settings = {"url": url, "dialect": self.dialect, "client": client, "auth": auth}
        return load(RewardConfig, settings)


class ScoreOptions(AskOptions):
    """Score texts or dialogues with a served reward model: JSON lines in, JSON lines out."""

    path: Annotated[str, Option(positional=True)] = "-"
    """File of JSON lines; of `.txt`, each line is a text. `-` reads JSON lines from standard input."""

    url: str | None = None
    """`host:port/model`, several hosts with commas between, or `http://host:port/path`; without it the
    TRITON_HOST environment variable."""

    batch_rows: int = 64
    """Most samples in a request."""

    def reward(self) -> RewardConfig:
        """Return these settings as a trainer's `reward` section."""
        return self.section(self.url, self.batch_rows)


def score(
    rows: Iterable[Any],
    reward: str | None = None,
    config: RewardConfig | Mapping[str, Any] | None = None,
) -> list[RewardResult]:
    """Score samples with a served reward model; one result per row, in order.

    rows: see this module's docstring.
    reward: "host:port/model" or "http://host:port/path"; None takes `config`'s url, else TRITON_HOST.
    config: keys of a trainer's section `reward`, or the section itself.

    Raises:
        ConfigError, RewardError: the model is not named, cannot be asked, or takes token ids.
    """
    section = config if isinstance(config, RewardConfig) else load(RewardConfig, dict(config or {}))
    return list(score_each(rows, section if reward is None else section.model_copy(update={"url": reward})))


def score_each(rows: Iterable[Any], config: RewardConfig) -> Iterator[RewardResult]:
    """Yield one result per row, in order, while later rows are being scored.

    Raises:
        ConfigError, RewardError: as `score`, before the first result.
    """
    # Only who asks a server needs its client's libraries loaded.
    from conch.rewards.served import HttpReward, ServedReward, TritonReward

    url = config.url or os.environ.get("TRITON_HOST")
    if not url:
        raise ConfigError("no reward model given: name it with --url host:port/model, or set TRITON_HOST")
    source: ServedReward = HttpReward(url, config) if url.startswith(SCHEMES) else TritonReward(url, config)
    with contextlib.closing(source):
        source.check()
        if source.reads == "tokens":
            raise ConfigError(
                f"{source.name} takes token ids of the policy's tokenizer, and here are texts: convert the "
                "model again with --form text"
            )
        yield from _results(iter(rows), source)


def _results(rows: Iterator[Any], source: Any) -> Iterator[RewardResult]:
    """Yield results while one more part of the rows is under way."""
    before: Iterable[RewardResult] | None = None
    while part := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        under_way = _submit(part, source)
        yield from before or ()
        before = under_way
    yield from before or ()


def _submit(part: Sequence[Any], source: Any) -> Iterator[RewardResult]:
    """Request scores; what cannot be sent is INVALID. Only who iterates over the results waits for them."""
    sent: list[Rollout] = []
    problems: list[str] = []
    for row in part:
        try:
            rollout, problem = rollout_of(row), ""
        except DataError as error:
            rollout, problem = None, str(error)
        if rollout is not None and rollout.prompt.dialogue is not None and source.reads in _TEXT_READERS:
            problem = (
                "is a dialogue, and the model reads texts: give it as one text, or convert the model with "
                "--template chat"
            )
        problems.append(problem)
        if rollout is not None and not problem:
            sent.append(rollout)
    return _in_order(problems, source.submit(sent))


def _in_order(problems: Sequence[str], future: Future[list[RewardResult]]) -> Iterator[RewardResult]:
    scored = iter(future.result())
    for problem in problems:
        yield RewardResult(RewardStatus.INVALID, detail=f"the row {problem}") if problem else next(scored)


def rollout_of(row: Any) -> Rollout:
    """Return a row as the sample that a client sends.

    Raises:
        DataError: it is none, in words that follow its name.
    """
    if row is _NOT_JSON:
        raise DataError(f"is no JSON: give {_FORMS}")
    if isinstance(row, str):
        return _sample(Prompt(row, ()))
    if isinstance(row, list):
        return rollout_of({MESSAGES: row})
    if not isinstance(row, Mapping):
        raise DataError(f"is a {type(row).__name__}: give {_FORMS}")
    if MESSAGES in row:
        return _sample(_dialogue_prompt(_messages(row[MESSAGES]), row))
    if isinstance(row.get("text"), str):
        return _sample(Prompt(row["text"], ()))
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _sample(Prompt(prompt, ()), completion)
    if isinstance(prompt, list) and isinstance(completion, str):
        return _sample(_dialogue_prompt(_messages(prompt), row), completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _sample(_dialogue_prompt((*_messages(prompt), *_messages(completion)), row))
    raise DataError(f"has the keys {', '.join(map(str, row)) or 'of an empty object'}: give {_FORMS}")


def _messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError("has no list of messages, or an empty one")
    if not all(isinstance(each, Mapping) and isinstance(each.get("role"), str) for each in messages):
        raise DataError('has a message that is no object with a "role"')
    return tuple({key: value for key, value in each.items() if value is not None} for each in messages)


def _dialogue_prompt(messages: tuple[Mapping[str, Any], ...], row: Mapping[str, Any]) -> Prompt:
    tools, variables = row.get(TOOLS), row.get(TEMPLATE_KWARGS)
    dialogue = Dialogue(messages, None if not tools else tuple(tools), dict(variables or {}))
    # By this text messages name the row, and nothing else is made of it.
    return Prompt(json.dumps(list(map(dict, messages)), default=str), (), dialogue=dialogue)


def _sample(prompt: Prompt, completion: str = "") -> Rollout:
    dialogue = prompt.dialogue
    if dialogue is not None and not completion and dialogue.messages[-1]["role"] != ASSISTANT:
        raise DataError(
            "is a dialogue that does not end with the assistant's message, of which the score would be"
        )
    return Rollout(prompt, Completion(completion, (), (), "eos"), policy_version=0)


def line_of(index: int, result: RewardResult) -> dict[str, Any]:
    """Return the output line of one row; "scores" only where there are any."""
    line: dict[str, Any] = {"index": index, "status": result.status.value}
    if result.ok:
        line |= {"scores": dict(result.scores), "model": result.model, "version": result.version}
    if result.members:
        line["members"] = dict(result.members)
    return line | ({"detail": result.detail} if result.detail else {})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="conch score",
        description=ScoreOptions.__doc__,
        epilog="Underscores will do for dashes. "
        "Exit codes: 0 all rows have scores, 1 nothing could be asked, 2 some rows have none.",
    )
    add_options(parser, ScoreOptions)
    arguments = vars(parser.parse_args(written_with("-", sys.argv[1:] if argv is None else argv)))
    setup_logging()
    counts = {True: 0, False: 0}
    first = ""
    try:
        options = parse_options(ScoreOptions, arguments)
        with _opened(options.path) as lines:
            rows = _rows(lines, is_text=options.path.endswith(".txt"))
            for index, result in enumerate(score_each(rows, options.reward())):
                print(json.dumps(line_of(index, result), ensure_ascii=False), flush=True)
                counts[result.ok] += 1
                first = first or ("" if result.ok else f"row {index}: {result.detail}")
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if counts[False]:
        print(
            f"{counts[False]} of {sum(counts.values())} rows have no score; first: {first}", file=sys.stderr
        )
    return 2 if counts[False] else 0


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Iterable[str]]:
    try:
        # Bytes that are no UTF-8 make one row that cannot be sent, not the end of all.
        descriptor = sys.stdin.fileno() if path == "-" else path
        file = open(descriptor, encoding="utf-8", errors="surrogateescape", closefd=path != "-")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give a file of JSON lines") from error
    with file:
        yield file


def _rows(lines: Iterable[str], *, is_text: bool) -> Iterator[Any]:
    """Yield the rows of lines that are not empty; a line that is no JSON is a row that cannot be scored."""
    for line in progress(lines, desc="scoring"):
        if not line.strip():
            continue
        if is_text:
            yield line.rstrip("\n")
            continue
        try:
            yield json.loads(line)
        except ValueError:
            yield _NOT_JSON


if __name__ == "__main__":
    sys.exit(main())
