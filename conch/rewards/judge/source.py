"""A judge as a reward source: samples become questions, answers become votes, votes become results."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from conch.access.secrets import key_from
from conch.access.tls import client_context
from conch.addresses import parse_urls, secret_headers
from conch.config import JudgeConfig, OnModelChange, load
from conch.errors import ConfigError, DataError, missing_path, yaml_problem
from conch.log import get_logger
from conch.rewards.base import ClientStats, RewardSource
from conch.rewards.client.event_loop import LoopThread
from conch.rewards.client.transport import Failure
from conch.rewards.function import group_problem
from conch.rewards.judge.client import JudgeClient
from conch.rewards.judge.endpoint import Answer, JudgeEndpoint
from conch.rewards.judge.parsers import (
    Reading,
    UnreadableError,
    combined,
    final_text,
    mirrored,
    reader_of,
    weighted,
)
from conch.rewards.judge.ranking import read_group, shuffled
from conch.rewards.judge.template import JudgeTemplate, trial_messages
from conch.rewards.results import name_row
from conch.types import DEFAULT_OBJECTIVE, Metrics, RewardResult, RewardStatus, Rollout

_log = get_logger(__name__)

_OF_SCORES = {
    *("model", "parser", "template", "system", "pattern", "number_range", "scaled_to", "choices", "min_mass"),
    *("top_logprobs", "against", "rubric", "ask", "items", "votes", "combine", "min_votes", "temperature"),
    *("seed", "max_tokens", "body", "thinking"),
}


@dataclass(frozen=True, slots=True)
class _Question:
    """One request of a vote.

    read: makes a reading of its answer; raises UnreadableError.
    """

    messages: list[dict[str, str]]
    read: Callable[[Answer], Reading]


class JudgeReward(RewardSource):
    """Scores completions by asking a language model; docs/judges.md.

    config: whose file, if it names one, was read; see `read_judge`.
    metadata_keys: the columns of the prompts' rows; None where they are not known yet.

    Raises:
        ConfigError: an address, a key or a template is missing or not what it should be.
    """

    def __init__(
        self,
        config: JudgeConfig,
        *,
        metadata_keys: Iterable[str] | None = None,
        on_model_change: OnModelChange = "raise",
    ) -> None:
        if not config.url or not config.model:
            raise ConfigError("a judge needs `judge.url` = http://host:port/v1 and `judge.model`")
        urls = parse_urls(config.url, "judge.url", "judge.headers_env")
        headers = secret_headers(config.headers_env, "judge.headers_env")
        if config.key_env is not None:
            headers["authorization"] = f"Bearer {key_from(config.key_env, 'judge.key_env')}"
        context = client_context(config.tls, "judge.tls")
        self.name = f"judge {config.model} at {', '.join(urls)}"
        self.measures_facts = config.parser == "rubric" and config.items == "facts"
        self.needs_groups = config.is_group
        self.deadline_s = config.deadline_s
        self._config = config
        self._metadata_keys = None if metadata_keys is None else tuple(metadata_keys)
        self._template = JudgeTemplate(config)
        endpoints = [JudgeEndpoint(url, config, headers, context) for url in urls]
        self._client = JudgeClient(self.name, endpoints, config, on_model_change)
        self._thread = LoopThread(f"judge-{config.model}")

    @property
    def digest(self) -> str:
        return _digest_of(self._config)

    def check(self) -> None:
        """See that the templates name nothing that is not there, and ask every server once.

        Raises:
            ConfigError: a name of a template is no column, or a server lacks the model or log-probabilities.
            RewardUnavailableError: no server answers.
        """
        if self._metadata_keys is not None:
            self._template.check_columns(self._metadata_keys)
        body = self._body(trial_messages(self._template, self._config), vote=0)
        for answer in self._thread.submit(self._client.check(body)).result():
            try:
                if not self.needs_groups:
                    reader_of(self._config, (self._config.rubric or [None])[0] if self._each else None)(
                        answer
                    )
            except UnreadableError as error:
                _log.warning("%s: its answer to a trial question %s", self.name, error)

    def check_row(self, row: Mapping[str, Any]) -> None:
        missing = [name for name in self._template.columns if row.get(name) is None]
        if missing:
            raise DataError(f"has no `{missing[0]}`, which the judge's template shows")

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        return self._thread.submit(self._score(list(rollouts)))

    def stats(self) -> ClientStats:
        return self._client.stats()

    def metrics(self) -> Metrics:
        """Tokens, costs and known answers of this process since the last call; docs/metrics.md."""
        return self._client.metrics()

    def costs(self) -> tuple[float, ...]:
        spent = self._client.spending
        return (spent.earlier + spent.cost,)

    def take_up_costs(self, costs: Sequence[float]) -> None:
        (self._client.spending.earlier,) = costs

    def close(self) -> None:
        """Cancel what is under way, close connections and tell what was spent. A second call does nothing."""
        self._thread.close(self._client.close)

    @property
    def _each(self) -> bool:
        """Whether each item of a rubric is asked for by itself."""
        return self._config.parser == "rubric" and self._config.ask == "each"

    async def _score(self, rollouts: list[Rollout]) -> list[RewardResult]:
        if self.needs_groups:
            return await self._score_group(rollouts)
        scores = (self._score_one(position, rollout) for position, rollout in enumerate(rollouts))
        return list(await asyncio.gather(*scores))

    async def _score_one(self, position: int, rollout: Rollout) -> RewardResult:
        started, where = time.monotonic(), name_row(position, rollout.sample)
        try:
            questions = self._questions(rollout)
        except ValueError as error:
            return self._failed(Failure(RewardStatus.INVALID, str(error)), where, started)
        votes = await asyncio.gather(*(self._vote(questions, vote) for vote in range(self._config.votes)))
        counted = self._counted(votes)
        if isinstance(counted, Failure):
            return self._failed(counted, where, started)
        reading, note = counted
        if self._config.parser != "rubric":
            return self._scored(reading, {}, note, started)
        parts = weighted(reading, self._config.rubric)
        if self._config.items == "objectives":
            return self._scored(parts, {}, note, started)
        return self._scored({DEFAULT_OBJECTIVE: sum(parts.values())}, reading, note, started)

    def _questions(self, rollout: Rollout) -> list[_Question]:
        """What is asked of one sample in each vote.

        Raises:
            ValueError: a template does not fit its row.
        """
        config, template = self._config, self._template
        items = config.rubric if self._each else [None]
        questions: list[_Question] = []
        for item in items:
            read = reader_of(config, item)
            for number, variables in enumerate(template.of_one(rollout, item)):
                reader = (lambda answer, read=read: mirrored(read(answer), config)) if number else read
                questions.append(_Question(template.render(**variables), reader))
        return questions

    async def _vote(self, questions: Sequence[_Question], vote: int) -> Reading | Failure:
        """One vote: the mean over questions of the same thing, side by side where they are of several."""
        outcomes = await asyncio.gather(*(self._ask(question, vote) for question in questions))
        failed = next((outcome for outcome in outcomes if isinstance(outcome, Failure)), None)
        if failed is not None:
            return failed
        readings = [outcome for outcome in outcomes if not isinstance(outcome, Failure)]
        names = dict.fromkeys(name for reading in readings for name in reading)
        columns = {name: [each[name] for each in readings if name in each] for name in names}
        return {name: sum(values) / len(values) for name, values in columns.items()}

    async def _ask(self, question: _Question, vote: int) -> Reading | Failure:
        def is_read(answer: Answer) -> bool:
            try:
                question.read(answer)
            except UnreadableError:
                return False
            return True

        answer = await self._client.ask(self._body(question.messages, vote), is_read, vote=vote)
        if isinstance(answer, Failure):
            return answer
        try:
            return question.read(answer)
        except UnreadableError as error:
            return Failure(RewardStatus.INVALID, f"its answer {error}")

    def _counted(self, votes: Sequence[Reading | Failure]) -> tuple[dict[str, float], str] | Failure:
        """The votes together and a note where some are missing; or the failure where too many are."""
        readings = [vote for vote in votes if not isinstance(vote, Failure)]
        failures = [vote for vote in votes if isinstance(vote, Failure)]
        if len(readings) >= self._config.fewest_votes:
            note = f"by {len(readings)} of {len(votes)} votes" if failures else ""
            return combined(readings, self._config.combine), note
        bad = [failure for failure in failures if not failure.status.is_infrastructure]
        # Asking again helps where the votes that were bad are few enough to be done without.
        is_bad = len(bad) > len(votes) - self._config.fewest_votes
        worst = bad[0] if is_bad else next(each for each in failures if each.status.is_infrastructure)
        if len(votes) == 1:
            return worst
        return replace(
            worst, detail=f"{len(readings)} of {len(votes)} votes could be read; first: {worst.detail}"
        )

    # ----------------------------------------------------------------------------------------------- a group

    async def _score_group(self, rollouts: Sequence[Rollout]) -> list[RewardResult]:
        started = time.monotonic()
        problem = group_problem(rollouts)
        if problem:
            failed = self._failed(Failure(RewardStatus.INVALID, problem), "a group", started)
            return [failed] * len(rollouts)
        texts = [rollout.completion.text for rollout in rollouts]
        distinct = list(dict.fromkeys(texts))
        where = f"the group of {name_row(0, rollouts[0].sample)}"
        low, high = self._config.scaled_to or (0.0, 1.0)
        if len(distinct) == 1:
            return [self._scored({DEFAULT_OBJECTIVE: (low + high) / 2}, {}, "", started)] * len(rollouts)
        votes = await asyncio.gather(
            *(self._group_vote(rollouts[0], distinct, vote) for vote in range(self._config.votes))
        )
        counted = self._counted(votes)
        if isinstance(counted, Failure):
            return [self._failed(counted, where, started)] * len(rollouts)
        reading, note = counted
        scores = {text: low + (high - low) * reading[str(place)] for place, text in enumerate(distinct)}
        return [self._scored({DEFAULT_OBJECTIVE: scores[text]}, {}, note, started) for text in texts]

    async def _group_vote(self, rollout: Rollout, answers: Sequence[str], vote: int) -> Reading | Failure:
        """One vote about a group: place of an answer -> its score in [0, 1]."""
        seed = self._seed_of(vote)
        order = shuffled(answers, rollout.prompt.text, vote if seed is None else seed)
        try:
            shown = self._template.of_group(rollout, [answers[place] for place in order])
            messages = self._template.render(**shown)
        except ValueError as error:
            return Failure(RewardStatus.INVALID, str(error))

        def read(answer: Answer) -> Reading:
            text = final_text(answer, self._config.thinking)
            scores = read_group(text, len(order), self._config)
            return {str(place): score for place, score in zip(order, scores, strict=True)}

        return await self._ask(_Question(messages, read), vote)

    # ----------------------------------------------------------------------------------- requests and results

    def _seed_of(self, vote: int) -> int | None:
        """Votes of judges with seeds that follow each other differ: `seed + vote` would share all but one."""
        config = self._config
        return None if config.seed is None else config.seed * config.votes + vote

    def _body(self, messages: list[dict[str, str]], vote: int) -> dict[str, Any]:
        config = self._config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": messages,
            config.max_tokens_key: config.max_tokens,
        }
        if config.temperature is not None:
            body["temperature"] = config.temperature
        seed = self._seed_of(vote)
        if seed is not None:
            body["seed"] = seed
        if config.parser == "logprobs":
            body |= {"logprobs": True, "top_logprobs": config.top_logprobs}
        return {**body, **config.body}

    def _scored(
        self, scores: Mapping[str, float], facts: Mapping[str, float], note: str, started: float
    ) -> RewardResult:
        return RewardResult(
            RewardStatus.OK,
            scores=dict(scores),
            model=str(self._config.model),
            latency_s=time.monotonic() - started,
            detail=f"scored {note}" if note else "",
            facts=dict(facts),
        )

    def _failed(self, failure: Failure, where: str, started: float) -> RewardResult:
        detail = failure.detail
        prefix = "" if detail.startswith(("judge ", self.name)) else f"{self.name}: "
        return RewardResult(
            failure.status,
            model=str(self._config.model),
            latency_s=time.monotonic() - started,
            detail=f"{prefix}{detail} (for {where})",
        )


def _digest_of(config: JudgeConfig) -> str:
    asked = config.model_dump_json(include=_OF_SCORES)
    return hashlib.sha256(asked.encode()).hexdigest()[:12]


def read_judge(config: JudgeConfig) -> JudgeConfig:
    """Return the section with its files read: keys beside `file` go before what the file says.

    Raises:
        ConfigError: a file cannot be read, or holds something else.
    """
    if config.file is not None:
        given = {name for name in config.model_fields_set if config.differs(name)}
        if len(config.model_fields_set) < len(type(config).model_fields):  # not a saved one, which has all
            given = set(config.model_fields_set)
        over = {name: getattr(config, name) for name in given - {"file"}}
        values = _values_of(config.file)
        if values.get("template_file") is not None:
            values["template_file"] = config.file.parent / str(values["template_file"])
        if {"template", "template_file"} & over.keys():
            values = {name: value for name, value in values.items() if not name.startswith("template")}
        try:
            config = load(JudgeConfig, {**values, **over})
        except ConfigError as error:
            raise ConfigError(f"the judge of {config.file}: {error}") from None
    if config.template_file is not None:
        config = config.model_copy(
            update={"template": _text_of(config.template_file, "judge.template_file"), "template_file": None}
        )
    return config


def _values_of(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(_text_of(file, "judge.file"))
    except yaml.YAMLError as error:
        raise ConfigError(f"`judge.file` = {file} is no YAML: {yaml_problem(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"`judge.file` = {file} is to hold keys and values, as in `model: ...`")
    if "file" in values:
        raise ConfigError(f"`judge.file` = {file} names a further file: write its keys here")
    return {str(name): value for name, value in values.items()}


def _text_of(path: Path, setting: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8"
        near = missing_path(path) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"`{setting}` = {path} cannot be read ({reason}){near}") from error
