"""Score texts or dialogues with any reward, from Python. The command `conch score` is `conch.scoring.run`.

    results = conch.score(["The film was fine."], "127.0.0.1:8001/walks")
    results = conch.score([{"prompt": "6 x 7?", "completion": "#### 42", "answer": "42"}], "verifier:gsm8k")

A row is a text, a string or {"text": "..."}; a dialogue, {"messages": [...]} with "tools" and
"chat_template_kwargs" where there are any, or the list of its messages; or {"prompt", "completion"}, both
texts or the prompt a list of messages. What else a row has is for verifiers and functions.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import runpy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from conch.config import HttpDialect, RewardConfig, Section, load
from conch.errors import ConfigError, DataError
from conch.rewards.base import RewardSource, UserReward, sources_closed_on_failure
from conch.rewards.combined import refuse_groups
from conch.rewards.factory import from_user
from conch.rewards.function import FunctionReward
from conch.triton.contract import MESSAGES, TEMPLATE_KWARGS, TOOLS
from conch.types import ASSISTANT, Completion, Dialogue, Prompt, RewardResult, RewardStatus, Rollout

_ROWS_AT_ONCE = 256
_FORMS = (
    'a text, {"text": ...}, a list of messages, {"messages": [...]}, or {"prompt": ..., "completion": ...}'
)
FORM_KEYS = (MESSAGES, TOOLS, TEMPLATE_KWARGS, "text", "prompt", "completion", "chosen", "rejected")
"""Keys of a row that are what is scored; others are metadata."""

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


def score(
    rows: Iterable[Any],
    reward: UserReward | None = None,
    config: RewardConfig | Mapping[str, Any] | None = None,
) -> list[RewardResult]:
    """Score samples with a reward; one result per row, in order.

    rows: see this module's docstring.
    reward: "host:port/model", "http://host:port/path", "verifier:gsm8k", a function, a source, or what else
        `from_user` takes; None takes what `config` names, else TRITON_HOST.
    config: keys of a trainer's section `reward`, or the section itself.

    Raises:
        ConfigError, RewardError: the reward is not named, cannot be asked, or takes token ids.
    """
    section = config if isinstance(config, RewardConfig) else load(RewardConfig, dict(config or {}))
    return list(score_each(rows, section, reward))


def score_each(
    rows: Iterable[Any], config: RewardConfig, reward: UserReward | None = None
) -> Iterator[RewardResult]:
    """Yield one result per row, in order, while later rows are being scored.

    Raises:
        ConfigError, RewardError: as `score`, before the first result.
    """
    with sources_closed_on_failure():
        source = from_user(reward, config)
        refuse_groups(source, "conch score")
    with contextlib.nullcontext() if source is reward else contextlib.closing(source):
        source.check()
        refuse_token_ids(source)
        yield from _results(iter(rows), source)


def reads_of(source: RewardSource) -> str:
    """What a source that was checked reads: `tokens`, `texts`, `dialogues` or `both`."""
    return getattr(source, "reads", "both")


def refuse_token_ids(source: RewardSource) -> None:
    """Raise ConfigError where the source reads token ids, which rows of texts do not hold."""
    if reads_of(source) == "tokens":
        raise ConfigError(
            f"{source.name} takes token ids of the policy's tokenizer, and here are texts: convert the "
            "model again with --form text"
        )


def _results(rows: Iterator[Any], source: RewardSource) -> Iterator[RewardResult]:
    """Yield results while one more part of the rows is under way."""
    before: Iterable[RewardResult] | None = None
    while part := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        under_way = _submit(part, source)
        yield from before or ()
        before = under_way
    yield from before or ()


def _submit(part: Sequence[Any], source: RewardSource) -> Iterator[RewardResult]:
    """Request scores; what cannot be sent is INVALID. Only who iterates over the results waits for them."""
    sent: list[Rollout] = []
    problems: list[str] = []
    for row in part:
        try:
            rollout = rollout_of(row, metadata_for(source, row))
            problem = unreadable(source, rollout)
        except DataError as error:
            rollout, problem = None, str(error)
        problems.append(problem)
        if rollout is not None and not problem:
            sent.append(rollout)
    return _in_order(problems, source.submit(sent))


def _in_order(problems: Sequence[str], future: Future[list[RewardResult]]) -> Iterator[RewardResult]:
    scored = iter(future.result())
    for problem in problems:
        yield refused_row(problem) if problem else next(scored)


def refused_row(problem: str) -> RewardResult:
    """The result of a row that cannot be sent. problem: why, in words that follow its name."""
    return RewardResult(RewardStatus.INVALID, detail=f"the row {problem}")


def unreadable(source: RewardSource, rollout: Rollout) -> str:
    """Why a source that was checked cannot read a sample, in words that follow a row's name; "" if it can."""
    if rollout.prompt.dialogue is None or reads_of(source) not in _TEXT_READERS:
        return ""
    return (
        "is a dialogue, and the model reads texts: give it as one text, or convert the model with "
        "--template chat"
    )


def metadata_for(source: RewardSource, row: Any) -> dict[str, Any]:
    """What of a row goes to a verifier or a function beside the sample: of a function, what it takes."""
    if not isinstance(row, Mapping):
        return {}
    keys = [key for key in row if isinstance(key, str) and key not in FORM_KEYS]
    if isinstance(source, FunctionReward):
        keys = [key for key in keys if source.takes(key)]
    return {key: row[key] for key in keys}


def rollout_of(row: Any, metadata: Mapping[str, Any] | None = None) -> Rollout:
    """Return a row as the sample that a source is asked for.

    metadata: see `Prompt`.

    Raises:
        DataError: it is none, in words that follow its name.
    """
    more = dict(metadata or {})
    if isinstance(row, str):
        return _whole(row, more)
    if isinstance(row, list):
        return rollout_of({MESSAGES: row}, more)
    if not isinstance(row, Mapping):
        raise DataError(f"is a {type(row).__name__}: give {_FORMS}")
    if row.get(MESSAGES) is not None:
        *before, last = _messages(row[MESSAGES])
        return _answered(tuple(before), (last,), row, more)
    if isinstance(row.get("text"), str):
        return _whole(row["text"], more)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _sample(Prompt(prompt, (), more), completion)
    if isinstance(prompt, list) and isinstance(completion, str):
        return _sample(_dialogue_prompt(_messages(prompt), row, more), completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _answered(_messages(prompt), _messages(completion), row, more)
    raise DataError(f"has the keys {', '.join(map(str, row)) or 'of an empty object'}: give {_FORMS}")


def _answered(
    prompt: tuple[Mapping[str, Any], ...],
    answer: tuple[Mapping[str, Any], ...],
    row: Mapping[str, Any],
    metadata: dict[str, Any],
) -> Rollout:
    """A dialogue and what answers it; the text of the last message is the completion."""
    try:
        begun, text = Dialogue((*prompt, *answer)).begun()
    except ValueError as error:
        raise DataError(f"is a dialogue whose last message {error}") from None
    return _sample(_dialogue_prompt(begun.messages, row, metadata), text)


def _messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError("has no list of messages, or an empty one")
    if not all(isinstance(each, Mapping) and isinstance(each.get("role"), str) for each in messages):
        raise DataError('has a message that is no object with a "role"')
    return tuple({key: value for key, value in each.items() if value is not None} for each in messages)


def _dialogue_prompt(
    messages: tuple[Mapping[str, Any], ...], row: Mapping[str, Any], metadata: dict[str, Any]
) -> Prompt:
    tools, variables = row.get(TOOLS), row.get(TEMPLATE_KWARGS)
    dialogue = Dialogue(messages, None if not tools else tuple(tools), dict(variables or {}))
    # By this text messages name the row, and nothing else is made of it.
    return Prompt(json.dumps(list(map(dict, messages)), default=str), (), metadata, dialogue)


def _whole(text: str, metadata: dict[str, Any]) -> Rollout:
    """A text as the completion of an empty prompt: what looks at completions alone looks at all of it."""
    return _sample(Prompt("", (), metadata), text)


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


if __name__ == "__main__":
    # The command stands above this part, which may not import it.
    runpy.run_module("conch.scoring.run", run_name="__main__", alter_sys=True)
