"""Settings of a judge: a language model behind an OpenAI-compatible endpoint, its answers read as scores.

A folder of its own, since the one above lists as many files as a reader can take in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from conch.config.auth import TlsConfig
from conch.config.base import Section

JudgeParser = Literal["number", "choice", "logprobs", "rubric", "ranking", "best-worst"]
GROUP_PARSERS = ("ranking", "best-worst")
"""Those that compare the completions of one prompt with each other."""

_SETS = {
    "pattern": ("number", "choice", "logprobs"),
    "number_range": ("number",),
    "choices": ("choice", "logprobs"),
    "min_mass": ("logprobs",),
    "top_logprobs": ("logprobs",),
    "against": ("choice", "logprobs"),
    "rubric": ("rubric",),
    "ask": ("rubric",),
    "items": ("rubric",),
    "scaled_to": ("number", "choice", "logprobs", *GROUP_PARSERS),
}


def _is_range(bounds: tuple[float, float]) -> bool:
    """Whether these are the lowest and the highest of some numbers; what is endless scales nothing."""
    return math.isfinite(bounds[1] - bounds[0]) and bounds[0] < bounds[1]


class RubricItem(Section):
    """One question of a rubric."""

    name: str
    """Of the item: letters, digits and underscores; its value is measured by this name."""

    question: str
    """What the judge is asked about the answer."""

    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share of the reward, against the other items' weights."""

    scores: tuple[float, float] | None = None
    """Lowest and highest number that answers the question, which become 0 and 1. None asks for yes (1) or no
    (0)."""

    @model_validator(mode="after")
    def _is_sound(self) -> RubricItem:
        if re.fullmatch(r"\w+", self.name) is None:
            raise ValueError(f"`name` = {self.name!r} is to be of letters, digits and underscores")
        if self.scores is not None and not _is_range(self.scores):
            raise ValueError(f"`scores` of `{self.name}` is (lowest, highest), not {self.scores}")
        return self


_OWN_KEYS = {
    **{name: f"`{name}`" for name in ("model", "temperature", "seed", "top_logprobs")},
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), "`max_tokens` and `max_tokens_key`"),
    "messages": "`template` and `system`",
    "logprobs": "`parser` = logprobs",
    "n": "`votes`",
    "stream": "nothing: answers are read as a whole",
}
"""Keys of a request -> the settings that they come from."""


class JudgeConfig(Section):
    """A judge: who is asked, what it is shown, how its answers become scores, and what that may cost."""

    file: Path | None = None
    """YAML file with keys of this section; what is given beside it goes before what the file says. As one
    word, where a reward is named: `judge:FILE.yaml`."""

    url: str | None = None
    """`http://host:port/v1` or https, up to but without `/chat/completions`; several servers of the same
    model with commas between."""

    model: str | None = None
    """Name of the model, as the server knows it."""

    key_env: str | None = None
    """Environment variable that holds the key, sent as `Authorization: Bearer`; in no message or log."""

    headers_env: dict[str, str] = Field(default_factory=dict)
    """Header -> environment variable that holds its value, for proxies that ask for more than a key."""

    tls: TlsConfig = Field(default_factory=TlsConfig)
    """Certificates for https; without, the system's authorities."""

    parser: JudgeParser = "number"
    """How an answer is read: a `number`; a `choice` by the text; the expected value over choices by
    `logprobs`; a `rubric` of weighted items; a `ranking` of all answers to one prompt, or the `best-worst` of
    them."""

    template: str | None = None
    """What the judge is shown, in Jinja: `prompt`, `output`, `messages` and the columns of the prompt's row,
    see docs/judges.md. None takes a plain one for the parser."""

    template_file: Path | None = None
    """File that holds the template; beside the YAML file, if its path is not absolute."""

    system: str | None = None
    """System message, a template as well. None sends none."""

    pattern: str | None = None
    """Regular expression for where the answer stands: its first group, else the whole match, of the last
    match. None takes the last number; the whole answer for a choice; its first token for `logprobs`."""

    number_range: tuple[float, float] = (1.0, 10.0)
    """Lowest and highest number that is an answer; another is none."""

    scaled_to: tuple[float, float] | None = (0.0, 1.0)
    """What the lowest and the highest possible answer become. None takes numbers and choices as they are."""

    choices: dict[str, float] = Field(default_factory=dict)
    """Choice -> its value, for `choice` and `logprobs`; capitals do not matter where the choices differ in
    more than them."""

    min_mass: float = Field(default=0.5, gt=0, le=1)
    """Least probability of all choices together; below it the answer is none."""

    top_logprobs: int = Field(default=20, ge=1)
    """Tokens whose log-probabilities are asked for; OpenAI and vLLM give 20 at most."""

    against: str | None = None
    """Column of the row that holds another answer to compare with: the judge is asked twice, with `first` and
    `second` the one way and the other, so that a liking for one place cancels. `choices` are of `first`."""

    rubric: list[RubricItem] = Field(default_factory=list)
    """The items of a rubric."""

    ask: Literal["together", "each"] = "together"
    """All items of a rubric in one request, answered as JSON, or each in one of its own."""

    items: Literal["facts", "objectives"] = "facts"
    """What the items' values are beside the reward, their weighted mean: measured as `facts`, or the
    `objectives` of which it is the sum."""

    votes: int = Field(default=1, ge=1)
    """Answers that are asked for per sample, each with a seed of its own."""

    combine: Literal["mean", "median", "majority"] = "mean"
    """What the votes become."""

    min_votes: int | None = Field(default=None, ge=1)
    """Votes that must be read for a score; None takes more than half of them."""

    temperature: float | None = Field(default=0.0, ge=0)
    """Of the judge's answers; several votes need more than 0. None leaves it to the server."""

    seed: int | None = 0
    """Votes are asked with seeds from `seed * votes` on, those of another seed with none of these; None sends
    none."""

    max_tokens: int = Field(default=1024, ge=1)
    """Longest answer, the thinking included; one that is cut by it is none (but with `logprobs`, where one
    token may be all)."""

    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls it."""

    body: dict[str, Any] = Field(default_factory=dict)
    """Further keys of each request: `response_format`, `chat_template_kwargs`, `reasoning_effort`."""

    thinking: tuple[str, str] | None = ("<think>", "</think>")
    """What thinking stands between; it is removed before the answer is read. None reads all."""

    max_in_flight: int = Field(default=16, ge=1)
    """Requests that a process keeps under way at once, per server."""

    requests_per_minute: float | None = Field(default=None, gt=0)
    """Most requests per minute and server, of all processes together. None takes no limit but what the server
    says."""

    tokens_per_minute: float | None = Field(default=None, gt=0)
    """Most tokens per minute and server, read and written, of all processes together."""

    connect_timeout_s: float = Field(default=5.0, gt=0)
    """Longest wait for a connection, in seconds."""

    request_timeout_s: float = Field(default=60.0, gt=0)
    """Time limit of one request, in seconds."""

    deadline_s: float = Field(default=300.0, gt=0)
    """Time limit of one answer with all its retries, from its first request on, in seconds; pauses that the
    server asks for count."""

    cache_size: int = Field(default=100_000, ge=0)
    """Answers that are kept, so that equal questions cost nothing; the oldest go, and in memory those beyond
    256 MB."""

    cache_file: Path | None = None
    """SQLite file on a local disk in which they are kept, shared by all processes and later runs. None keeps
    them in memory."""

    cache_as: str | None = None
    """Name of the judge in the cache. None takes addresses and model: another server has other answers."""

    price_in: float = Field(default=0.0, ge=0)
    """Price of a million tokens that the judge reads, in any currency."""

    price_out: float = Field(default=0.0, ge=0)
    """Price of a million tokens that it writes."""

    budget: float | None = Field(default=None, gt=0)
    """Most that the requests of all processes may cost; then nothing is asked any more, and samples are
    `skipped`. None sets no bound."""

    @field_validator("choices", mode="before")
    @classmethod
    def _choices_are_words(cls, choices: Any) -> Any:
        if isinstance(choices, Mapping):
            for name in choices:
                if not isinstance(name, str):
                    raise ValueError(
                        f"a choice is {name!r}, no word: YAML wants it in quotes, as in "
                        '`{"yes": 1, "no": 0}` or `{"1": 1, "2": 2}`'
                    )
        return choices

    @model_validator(mode="after")
    def _parser_has_its_keys(self) -> JudgeConfig:
        if self.file is not None:
            return self  # it is looked at once the file is read
        for name, parsers in _SETS.items():
            if self.parser not in parsers and self.differs(name):
                raise ValueError(
                    f"`{name}` acts with `parser` = {' or '.join(parsers)} only, not with {self.parser}"
                )
        if self.parser in ("choice", "logprobs") and len(self.choices) < 2:
            raise ValueError(f"`parser` = {self.parser} needs at least two `choices`, as in `{{A: 1, B: 0}}`")
        if self.parser == "rubric":
            names = [item.name for item in self.rubric]
            if not names or len(set(names)) < len(names):
                raise ValueError("`parser` = rubric needs `rubric`, a list of items with names of their own")
        return self

    @model_validator(mode="after")
    def _numbers_fit(self) -> JudgeConfig:
        for name in ("number_range", "scaled_to"):
            value = getattr(self, name)
            if value is not None and not _is_range(value):
                raise ValueError(f"`{name}` is (lowest, highest), not {value}")
        for name in self.body:
            if name in _OWN_KEYS:
                raise ValueError(f"`body` holds `{name}`, which comes from {_OWN_KEYS[name]}: take it out")
        if self.template is not None and self.template_file is not None:
            raise ValueError("give `template` or `template_file`, not both")
        return self

    @model_validator(mode="after")
    def _numbers_fit_each_other(self) -> JudgeConfig:
        if self.file is not None:
            return self  # it may have the others
        if self.min_votes is not None and self.min_votes > self.votes:
            raise ValueError(f"`min_votes` = {self.min_votes} is more than `votes` = {self.votes}")
        if self.votes > 1 and self.temperature == 0 and not self.is_group:
            raise ValueError(
                f"`votes` = {self.votes} with `temperature` = 0 are one answer {self.votes} times: give a "
                "temperature, as in `temperature: 0.7`"
            )
        if self.budget is not None and self.price_in == 0 and self.price_out == 0:
            raise ValueError("`budget` is never spent without `price_in` and `price_out`: give the prices")
        dearest = self.max_tokens * self.price_out / 1e6
        if self.budget is not None and dearest > self.budget:
            raise ValueError(
                f"`budget` = {self.budget:g} is less than one answer of `max_tokens` = {self.max_tokens} may "
                f"cost, {dearest:g}: nothing would be asked"
            )
        return self

    @model_validator(mode="after")
    def _choices_can_be_told_apart(self) -> JudgeConfig:
        if any(not choice.strip() for choice in self.choices):
            raise ValueError("`choices` holds an empty choice")
        if wrong := next((name for name, value in self.choices.items() if not math.isfinite(value)), None):
            raise ValueError(f"`choices` gives `{wrong}` the value {self.choices[wrong]}, which is no score")
        if self.choices and len(set(self.choices.values())) < 2:
            raise ValueError("`choices` all have the same value, so every answer would score alike")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"`pattern` is no regular expression: {error}") from None
        return self

    def differs(self, name: str) -> bool:
        """Whether a key has another value than its default: a saved configuration holds every key."""
        return getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)

    @property
    def is_set(self) -> bool:
        """Whether a judge is named."""
        return self.file is not None or self.url is not None or self.model is not None

    @property
    def is_group(self) -> bool:
        """Whether it sees all completions of a prompt at once."""
        return self.parser in GROUP_PARSERS

    @property
    def fewest_votes(self) -> int:
        """`min_votes`, or more than half."""
        return self.min_votes or self.votes // 2 + 1
