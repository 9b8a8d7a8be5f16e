"""A reward model served by Triton, called over gRPC."""

from __future__ import annotations

from conch.config import RewardConfig
from conch.errors import ConfigError
from conch.rewards.dense import Decode
from conch.rewards.endpoint import Endpoint
from conch.rewards.headers import secret_headers
from conch.rewards.rows import Tokenizer
from conch.rewards.served_reward import ServedReward
from conch.rewards.triton_replica import TritonReplica
from conch.serving.triton_channel import configured_access


class TritonReward(ServedReward):
    """Scores rollouts with the model at `url`: `host:port/model`, or `host1:port,host2:port/model` where
    several servers have it; the ports are those of gRPC.

    Form (text or tokens), batch limit, longest sample and dtypes are read from the server. A token-form
    model gets the sampled ids as they are, so it must share the policy's tokenizer; if it does not,
    `tokenizer` must turn a sample into the model's ids.

    With `config.dense` the scores of steps or tokens become `RewardResult.token_scores`, see `dense.py`. For
    a text-form model `decode` must turn the policy's ids into text, as the completions' texts were made.

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
        endpoints = Endpoint.parse_all(url)
        access = configured_access(config.tls, config.secret_env, secret_headers(config.headers_env))
        replicas = [
            TritonReplica(endpoint, access, config.connect_timeout_s, dense=config.dense)
            for endpoint in endpoints
        ]
        servers, model = ", ".join(endpoint.address for endpoint in endpoints), endpoints[0].model
        super().__init__(
            f"{model} at {servers}",
            f"reward model `{model}` at {servers}",
            replicas,
            config,
            tokenizer,
            decode,
        )
