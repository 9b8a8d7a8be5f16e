"""Settings of `conch reward-server`."""

from __future__ import annotations

from pydantic import Field, model_validator

from conch.config import RewardClientConfig, RewardConfig, RewardFailureConfig
from conch.servers.settings import ListenSettings


class RewardServerConfig(ListenSettings):
    """Settings of a server that gives rewards to other trainers over HTTP."""

    reward: str | None = None
    """What gives the rewards: `host:8001/model` of a model served by Triton, `http://host/path`,
    `verifier:gsm8k`, `file.py:function`, `goals:...` or `judge:FILE`. None takes what `source`
    names, else one of the environment variables TRITON_HOST and GOAL_DIMENSIONS (`goals:...`)."""

    rewards: dict[str, str] = Field(default_factory=dict)
    """Several rewards instead of one: name -> what `reward` may be. `model` in a request chooses, or the
    address: `/models/NAME/get_reward`."""

    source: RewardConfig = RewardConfig(
        client=RewardClientConfig(max_in_flight=2), failure=RewardFailureConfig(on_model_change="warn")
    )
    """Everything else about the rewards, as the section `reward` of a trainer has it: an ensemble's
    `source.members` and `source.combine`, access to servers in `source.auth`, requests in `source.client`."""

    port: int = Field(default=8300, ge=1, le=65535)
    """Port to listen on."""

    label_key: str | None = None
    """Key of a sample's row under which a request's label stands, for verifiers and functions; name it where
    a function has it as an argument. None takes the one column that the verifier reads, else `label`. A label
    that is an object is the row itself."""

    strip: tuple[str, ...] = ()
    """Taken off the end of texts that clients send with the policy's special tokens in them (OpenRLHF,
    slime): `["<|im_end|>"]`."""

    max_waiting: int = Field(default=8192, ge=1)
    """Most samples under way, of all callers together; more are told to come again (429)."""

    deadline_s: float = Field(default=100.0, gt=0)
    """Longest time for a request, in seconds. Below the 120 s after which slime hangs up."""

    gather_samples: int = Field(default=256, ge=1)
    """Most samples in one call of a reward that is called with many at once, such as a Python function."""

    gather_s: float = Field(default=0.002, ge=0)
    """How long the first sample of such a call waits for others, in seconds. While a call is under way all
    wait for the next one."""

    probe_s: float = Field(default=5.0, gt=0)
    """Seconds between two looks whether the reward still answers."""

    workers: int = Field(default=1, ge=1)
    """Processes that share the port, for rewards that compute in Python. Each has a client of its own, so
    that requests are batched together within a process only: for a served model one is best."""

    @model_validator(mode="after")
    def _one_way_to_name_rewards(self) -> RewardServerConfig:
        ways = [name for name in ("reward", "rewards") if getattr(self, name)]
        ways += [f"source.{name}" for name in self.source.named_by]
        if len(ways) > 1:
            raise ValueError(
                f"`{ways[0]}` and `{ways[1]}` both name what gives the rewards: give one of them"
            )
        if bad := [name for name in self.rewards if not name or "/" in name]:
            raise ValueError(f"`rewards` has the name {bad[0]!r}, which stands in addresses: without /")
        return self

    @model_validator(mode="after")
    def _source_is_for_a_server(self) -> RewardServerConfig:
        for name in ("dense", "delta", "record", "replay"):
            if getattr(self.source, name):
                raise ValueError(f"`source.{name}` is for a trainer, a server gives one number a sample")
        failure = self.source.failure.model_fields_set - {"on_model_change"}
        if failure:
            raise ValueError(
                f"`source.failure.{min(failure)}` is for a trainer: a server tells clients of each failure"
            )
        return self

    def harm(self) -> str:
        """What whoever is let in can do."""
        return "has texts scored"
