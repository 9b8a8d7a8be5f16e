"""Rewards of served models, by Triton over gRPC or an HTTP endpoint: they never block the training thread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future

from conch.access.tls import client_context
from conch.addresses import Endpoint, parse_urls, secret_headers
from conch.config import RewardConfig
from conch.errors import ConfigError
from conch.log import get_logger
from conch.rewards.base import ClientStats, RewardSource, ServerTimes
from conch.rewards.client.client import RewardClient, Tokenizer
from conch.rewards.client.event_loop import LoopThread
from conch.rewards.client.http import HttpTransport
from conch.rewards.client.transport import ModelInfo, Transport
from conch.rewards.client.triton import TritonTransport
from conch.rewards.token_rewards import Decode
from conch.triton.channel import configured_access
from conch.types import Prompt, RewardResult, Rollout

_log = get_logger(__name__)


class ServedReward(RewardSource):
    """Scores rollouts with one model on one server or several. Sends nothing before `check` or `submit`.

    name: the model and its servers, as in `RewardSource`.
    who: the same as the client's messages say it.
    transports: one per server.
    """

    def __init__(
        self,
        name: str,
        who: str,
        transports: Sequence[Transport],
        config: RewardConfig,
        tokenizer: Tokenizer | None = None,
        decode: Decode | None = None,
    ) -> None:
        self.name = name
        self._who = who
        self._client = RewardClient(who, transports, config, tokenizer, decode)
        self._thread = LoopThread(f"reward-{name}")

    def check(self) -> None:
        """Ask every server for the model, its configuration and one score, within `client.deadline_s`.

        A server that is away is a warning, as long as there is another.

        Raises:
            RewardUnavailableError: host unknown, nothing listening, model absent or not ready, no answer.
            RewardInvalidError: the model is of neither form, the servers' models differ, or the probe's score
                is not valid.
        """
        self._thread.submit(self._client.check()).result()

    @property
    def reads(self) -> str:
        """What the model takes, once `check` has asked: `tokens`, `texts`, `dialogues` or `both`."""
        info = self._client.info()
        return "tokens" if info.takes_tokens else info.reads

    @property
    def content(self) -> str:
        """Hash of the model's weights, tokenizer and template, once `check` has asked; "" if not known."""
        return self._client.info().content

    def check_prompts(self, prompts: Sequence[Prompt], special_tokens: Iterable[str] = ()) -> None:
        if self._client.has_info:  # of a server that may be away for now, nothing can be said
            check_readable(self._who, self._client.info(), prompts, special_tokens)

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        """Start scoring and return at once: one result per rollout, in order.

        Each request ends within `client.deadline_s` of its first attempt; servers that are gone end all
        requests within `client.deadline_s` of their last sign of life.
        """
        return self._thread.submit(self._client.score(list(rollouts)))

    def stats(self) -> ClientStats:
        return self._client.stats()

    def server_statistics(self) -> Future[ServerTimes]:
        return self._thread.submit(self._client.server_statistics())

    def close(self) -> None:
        """Cancel what is under way, close connections and join the thread. A second call does nothing."""
        self._thread.close(self._client.close)


class TritonReward(ServedReward):
    """Scores rollouts with the model at `url`: `host:port/model`, or `host1:port,host2:port/model` where
    several servers have it; the ports are those of gRPC.

    Form (text or tokens), batch limit, longest sample and dtypes are read from the server. A token-form
    model gets the sampled ids as they are, so it must share the policy's tokenizer; if it does not,
    `tokenizer` must turn a sample into the model's ids.

    With `config.dense` the scores of steps or tokens become `RewardResult.token_scores`, see
    `token_rewards.py`. For a text-form model `decode` must turn the policy's ids into text, as the
    completions' texts were made.

    Raises:
        ConfigError: `url` is not of that form, a certificate cannot be read, a secret's variable is not set,
            or `dense` and `tokenizer` are given together.
    """

    def __init__(
        self,
        url: str,
        config: RewardConfig,
        tokenizer: Tokenizer | None = None,
        decode: Decode | None = None,
    ) -> None:
        if config.dense and tokenizer is not None:
            raise ConfigError(
                "reward.dense and a tokenizer of the reward model's own: its tokens are not the policy's, so "
                "their scores have no place in a response; serve the model in the text form"
            )
        endpoints, auth = Endpoint.parse_all(url), config.auth
        access = configured_access(auth.tls, auth.secret_env, secret_headers(auth.headers_env))
        transports = [
            TritonTransport(endpoint, access, config.client.connect_timeout_s, dense=config.dense)
            for endpoint in endpoints
        ]
        servers, model = ", ".join(endpoint.address for endpoint in endpoints), endpoints[0].model
        super().__init__(
            f"{model} at {servers}",
            f"reward model `{model}` at {servers}",
            transports,
            config,
            tokenizer,
            decode,
        )


class HttpReward(ServedReward):
    """Scores rollouts with what listens at `url`: `http://host:port/path`, or several with a comma between.

    `config.dialect` says what is sent and what comes back; see `HttpTransport`. Everything else (queue,
    retries, deadlines, checks) is as with served reward models.

    Raises:
        ConfigError: `url` is not of that form, a certificate cannot be read, or a secret's variable is not
            set.
    """

    def __init__(self, url: str, config: RewardConfig) -> None:
        if config.auth.secret_env is not None:
            raise ConfigError(
                "`reward.auth.secret_env` is for Triton servers: give an HTTP endpoint its token with "
                "`reward.auth.headers_env.authorization=VARIABLE`"
            )
        urls = parse_urls(url)
        headers = secret_headers(config.auth.headers_env)
        context = client_context(config.auth.tls, "reward.auth.tls")
        transports = [HttpTransport(each, config.client, headers, context, config.dialect) for each in urls]
        servers = ", ".join(urls)
        super().__init__(servers, f"reward endpoint {servers}", transports, config)


def check_readable(
    name: str, info: ModelInfo, prompts: Sequence[Prompt], special_tokens: Iterable[str] = ()
) -> None:
    """Find out before a run whether a model reads these prompts; one warning for markup that it misreads.

    name: the model with its servers.
    special_tokens: the policy's, which its chat template may have written into the prompts.

    Raises:
        ConfigError: it reads dialogues, and a prompt is none.
    """
    if info.reads == "dialogues":
        texts = [index for index, prompt in enumerate(prompts) if prompt.dialogue is None]
        if texts:
            raise ConfigError(
                f"{name} reads dialogues, but {len(texts)} of {len(prompts)} prompts are texts or were "
                f"cut to fit (first: prompt {texts[0]}): give prompts as lists of messages that fit "
                "(`data.apply_chat_template=true` makes messages of texts); a model that learned from texts "
                "is converted with --template '{text}'"
            )
        return
    markup = _unknown_markup(info, prompts, special_tokens)
    if markup:
        _log.warning(
            "%s reads texts, and the policy's chat template writes %s into the prompts, which its tokenizer "
            "takes for plain characters: convert it with --template chat, so that it gets the messages and "
            "renders them by its own template",
            *(name, ", ".join(markup)),
        )


def _unknown_markup(
    info: ModelInfo, prompts: Sequence[Prompt], special_tokens: Iterable[str]
) -> tuple[str, ...]:
    """Return special tokens of the policy in rendered dialogues that the model's tokenizer does not know."""
    if info.takes_tokens or info.reads != "texts" or not info.special_tokens:
        return ()
    foreign = set(special_tokens) - set(info.special_tokens) - {""}
    rendered = [prompt.text for prompt in prompts if prompt.dialogue is not None]
    return tuple(sorted(token for token in foreign if any(token in text for text in rendered)))
