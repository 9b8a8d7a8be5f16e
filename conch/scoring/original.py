"""The Hugging Face original of a reward model as a reward: its own scores, computed here, in float32.

Each sample is scored alone, without padding, by the second implementation of the scoring rules that proves
conversions (`conch.converters.parity`): what a served model is held against when it is published.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conch.config import Section
from conch.errors import ConchError, ConversionError
from conch.rewards.base import RewardSource
from conch.types import RewardResult, RewardStatus, Rollout

if TYPE_CHECKING:
    from conch.converters.checkpoints.reader import RewardCheckpoint


class OriginalOptions(Section):
    """How the original of `--against` is read, where its files do not say; as `conch convert` takes it."""

    template: str | None = None
    """Format string over {text} and {eos}, or `chat`."""

    max_length: int | None = None
    """Tokens a sample may have."""

    pooling: str | None = None
    """Which tokens' states become the score."""

    base_model: str | None = None
    """Model that a value head or an adapter builds on."""

    revision: str | None = None
    """Hub revision."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where it computes."""

    trust_remote_code: bool = False
    """Run code that comes with it."""


class OriginalReward(RewardSource):
    """Scores samples with a checkpoint of Hugging Face, one after the other.

    checkpoint: a folder, a file, or a model of the hub.
    options: how it is read.
    """

    batched = True

    def __init__(self, checkpoint: str, options: OriginalOptions | None = None) -> None:
        self.name = f"original {checkpoint}"
        self._path = checkpoint
        self._options = options or OriginalOptions()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="original")
        self._checkpoint: RewardCheckpoint | None = None
        self._inputs: Any = None

    def check(self) -> None:
        """Load the checkpoint.

        Raises:
            ConversionError: it is missing, or no reward model.
            ConfigError: the options contradict it.
        """
        if self._checkpoint is not None:
            return
        from conch.config import load
        from conch.converters.checkpoints.reader import read_checkpoint
        from conch.converters.options import ReadOptions
        from conch.converters.parity.inputs import inputs_of

        options = load(ReadOptions, self._options.model_dump(exclude_none=True))
        self._checkpoint = read_checkpoint(self._path, options)
        self._inputs = inputs_of(self._checkpoint)

    @property
    def reads(self) -> str:
        """What the checkpoint reads, `texts` or `dialogues`, once `check` has loaded it."""
        assert self._checkpoint is not None
        return self._checkpoint.rules.reads

    @property
    def content(self) -> str:
        """Hash of the checkpoint's weights, once `check` has loaded it."""
        return "" if self._checkpoint is None else self._checkpoint.sha256

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        return self._thread.submit(self._score, list(rollouts))

    def close(self) -> None:
        """End the thread, once what is under way has ended."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _score(self, rollouts: Sequence[Rollout]) -> list[RewardResult]:
        return [self._result(rollout) for rollout in rollouts]

    def _result(self, rollout: Rollout) -> RewardResult:
        try:
            scores = self._scores(rollout)
        except Exception as error:  # of a chat template, a tokenizer or code that came with the checkpoint
            detail = str(error) if isinstance(error, ConchError) else f"{type(error).__name__}: {error}"
            return RewardResult(RewardStatus.INVALID, model=self.name, detail=f"{self.name}: {detail}")
        return RewardResult(RewardStatus.OK, scores=scores, model=self.name)

    def _scores(self, rollout: Rollout) -> dict[str, float]:
        from conch.converters.parity.inputs import DialogueInputs, Shape
        from conch.converters.parity.reference import expected_scores
        from conch.converters.parity.samples import ParityCase

        checkpoint, dialogue = self._checkpoint, rollout.dialogue
        assert checkpoint is not None
        if not isinstance(self._inputs, DialogueInputs):
            sample = self._inputs.sample(rollout.sample, Shape())
        elif dialogue is None:
            raise ConversionError("the sample is a text, and the model reads dialogues")
        elif dialogue.tools or dialogue.template_kwargs:
            raise ConversionError("dialogues with tools or template variables cannot be scored here")
        else:
            sample = self._inputs.sample_of([dict(message) for message in dialogue.messages])
        if not sample.ids:
            raise ConversionError("the sample has no tokens, or the chat template refuses it")
        numbers = expected_scores(checkpoint, [ParityCase("", (sample,))]).scores[sample.key]
        return dict(zip(checkpoint.rules.reward_names, numbers, strict=True))


def is_original(word: str) -> bool:
    """Whether a word names a checkpoint, and not an address or another reward."""
    return Path(word).expanduser().exists() or (":" not in word and word.count("/") <= 1)
