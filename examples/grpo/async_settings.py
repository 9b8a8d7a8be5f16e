"""Settings of `grpo-async.py`: those of `grpo.py`, with other defaults where sampling goes on while the model
is trained, and what bounds how far it runs ahead. `NOT_HERE` is as in `settings.py`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from conch.config import Section
from examples.grpo import settings
from examples.grpo.settings import ExampleConfig, InferenceModelSettings, NotHere, TrainSettings

_WAITS = "this program samples while it trains: run `grpo.py`, which waits"
_ONCE = "each group is trained on in one step, and leaves the buffer with it"

NOT_HERE: NotHere = {
    **{
        name: entry
        for name, entry in settings.NOT_HERE.items()
        if name not in ("train.buffer_size", "train.weight_update_frequency", "ray")
    },
    "train.sync": ((False, None), _WAITS),
    "train.sync_iter": ((False, None), _WAITS),
    "train.empty_replay_buffer": ((True, None), _ONCE),
    "mode": (("async", None), _WAITS),
    "ray.init_config.num_gpus": ((None,), "`inference_model.num_devices` says how many GPUs sample"),
    "ray.collector_config.num_gpus": (
        (None,),
        "each sampler takes one",
    ),
    "ray.train_handler_config.num_gpus": ((None,), "`train_model.num_devices` says how many GPUs train"),
    "ray.replay_buffer_config.num_gpus": ((None,), "the buffer needs no GPU"),
}
"""As `settings.NOT_HERE`, for this program."""


class AsyncTrainSettings(TrainSettings):
    """Length, batches, checkpoints, and how far sampling runs ahead. A dialog turn is one completion."""

    dialog_turns_per_batch: int | None = Field(default=None, ge=1)
    """Completions of a batch (a step): a multiple of `env.repeats`. None takes 16, or the next number that
    training processes share in whole groups of `env.repeats`. Also `steps_per_batch`."""

    optim_batch_size: int | None = Field(default=None, ge=1)
    """Completions of one optimizer step, over all training processes: a divisor of the batch. None takes the
    batch: 16, in parts of 4."""

    kl_coef_in_loss: bool = False
    """Add the KL to the reference to the loss; false takes it off the rewards."""

    buffer_size: int | None = Field(default=None, ge=1)
    """Completions that are there at once: in training, sampled and waiting, or under way. No prompt is begun
    that would be one more. It bounds staleness: b batches of completions are at most b - 1 steps old. None
    takes what `max_staleness` needs."""

    max_staleness: int | None = Field(default=None, ge=0)
    """Updates (steps) that the weights which sampled a token may lie behind those that learn from it, at
    most. 0 waits for each batch, as `grpo.py` does. None takes what `buffer_size` holds, else what
    `weight_update_frequency` needs, which is 1 by default."""

    weight_update_frequency: int | None = Field(default=None, ge=1)
    """Optimizer steps after which samplers get the weights, in whole batches. None takes a batch: sending
    weights takes a small part of a step, and older ones only add staleness."""

    partial_rollouts: bool = False
    """New weights apply to completions under way, from their next token on; each token has the version that
    sampled it. False lets those end with the weights that they began with, and has new ones wait for that."""


class AsyncInferenceSettings(InferenceModelSettings):
    """The model that samples while the other trains."""

    num_devices: int | None = Field(default=None, ge=1)
    """Devices to sample on, apart from training: a copy of the model for each `tensor_parallel_size` of them.
    None takes one; on a machine with a single GPU that is the one which trains."""

    served_by: Literal["ray", "servers"] = "ray"
    """Copies are actors of Ray, or each is a `conch rollout-server`, as in `grpo.py`."""


class RayInitConfig(Section):
    """The cluster."""

    num_cpus: float | None = Field(default=None, gt=0)
    """CPUs that samplers may ask for together: more are refused. None sets no limit."""


class RayCollectorConfig(Section):
    """A sampler."""

    num_cpus: float | None = Field(default=None, gt=0)
    """CPUs that Ray sets aside for each sampler, which computes on no more. None takes 1."""


class RayUnusedConfig(Section):
    """What is no actor of Ray here."""

    num_cpus: float | None = Field(default=None, gt=0)
    """Without effect: training processes are none of Ray's, and the buffer is in them."""


class RaySettings(Section):
    """Ray, for `inference_model.served_by=ray`."""

    init_config: RayInitConfig = RayInitConfig()
    collector_config: RayCollectorConfig = RayCollectorConfig()
    train_handler_config: RayUnusedConfig = RayUnusedConfig()
    replay_buffer_config: RayUnusedConfig = RayUnusedConfig()


class AsyncExampleConfig(ExampleConfig):
    """GRPO on verifiable rewards, GSM8K or IFEval: completions are sampled while the model is trained.

    Names and meanings are those of TorchRL's example; README.md tells where these differ, and why.
    """

    not_here: ClassVar[NotHere] = NOT_HERE

    # Sections are frozen, so that a narrower type is safe.
    train: AsyncTrainSettings = AsyncTrainSettings()  # pyright: ignore[reportIncompatibleVariableOverride]
    inference_model: AsyncInferenceSettings = (  # pyright: ignore[reportIncompatibleVariableOverride]
        AsyncInferenceSettings()
    )
    ray: RaySettings = RaySettings()

    conch: dict[str, Any] = Field(default_factory=dict)
    """Any setting of `conch train async-grpo` that has no name here, by its full name:
    `conch.asynchronous.deadline_s=600`."""


def uses_ray(config: ExampleConfig) -> bool:
    """Whether samplers are actors of Ray."""
    return isinstance(config, AsyncExampleConfig) and config.inference_model.served_by == "ray"
