"""What is being sampled together, as whoever asked for it sees and changes it between two steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from conch.rollouts.hf.continuous_batching import ContinuousBatcher
from conch.types import Prompt


class ChunkQueue:
    """Prompts that are sampled chunk by chunk; in the interface of `ContinuousBatcher`, as far as they wait.

    seeds: one for each prompt.
    """

    weights_may_change = False
    """A chunk is sampled by one call of `transformers.generate`: new weights wait for its end."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = [*seeds]
        self._waiting = deque(range(len(seeds)))

    def add(self, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int]) -> None:
        """Sample completions for further prompts, which are numbered on, each from its seed."""
        self._waiting.extend(range(len(self.seeds), len(self.seeds) + len(prompts)))
        self.seeds.extend(seeds)

    def withdraw(self, which: Callable[[int], bool]) -> list[int]:
        """Sample nothing for those prompts that have not begun, and give their indices."""
        withdrawn = [index for index in self._waiting if which(index)]
        self._waiting = deque(index for index in self._waiting if not which(index))
        return withdrawn

    def abandon(self, which: Callable[[int], bool]) -> None:
        """Sample nothing for those prompts that have not begun, whose completions nobody waits for."""
        self.withdraw(which)

    def take(self, size: int) -> list[int]:
        """Indices of the next chunk; empty where nothing waits."""
        return [self._waiting.popleft() for _ in range(min(size, len(self._waiting)))]


class UnderWay:
    """Completions that are sampled together.

    prompts: of all of them, those included that joined.
    """

    def __init__(self, prompts: Sequence[Prompt], queue: ContinuousBatcher | ChunkQueue) -> None:
        self.prompts = [*prompts]
        self._queue = queue

    @property
    def weights_may_change(self) -> bool:
        """True where the model may get new weights now: what is under way goes on with them."""
        return self._queue.weights_may_change

    def add(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> None:
        """Have further completions sampled, numbered on, each from its seed."""
        self.prompts += prompts
        self._queue.add([prompt.token_ids for prompt in prompts], seeds)

    def withdraw(self, which: Callable[[int], bool]) -> list[int]:
        """Sample nothing for what has not begun; gives its indices.

        which: True for the index of a completion that is meant.
        """
        return self._queue.withdraw(which)

    def abandon(self, which: Callable[[int], bool]) -> None:
        """Sample no more of what nobody waits for.

        which: True for the index of a completion that is meant.
        """
        self._queue.abandon(which)
