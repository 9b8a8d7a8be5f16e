"""When to leave a replica alone: a circuit breaker (Nygard, "Release It!", 2nd ed. 2018, section 5.3).

closed: it is asked. open: it is not, until a probe is due. Whoever owns the breaker sends the probe, which is
the half-open state: a score closes the breaker, anything else opens it for longer.
"""

from __future__ import annotations

import random
from collections import deque

from conch.rewards.replica import Failure

IN_A_ROW = 5
WINDOW = 20
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
# While no replica answers and samples wait, little is lost by asking often: a refused connection costs 1 ms.
_FIRST_URGENT_PAUSE_S = 0.1
_LONGEST_URGENT_PAUSE_S = 2.0


class Breaker:
    """The state of one replica.

    Opens at once on a failure that concerns every request (`Failure.is_down`); on others after `IN_A_ROW`, or
    when half of the last `WINDOW` requests failed.

    cause: the latest failure; None if there was none since it closed.
    failures: in a row.
    """

    def __init__(self) -> None:
        self.cause: Failure | None = None
        self.failures = 0
        self._is_closed = True
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self._probes = 0

    @property
    def is_closed(self) -> bool:
        """Whether the replica may be asked."""
        return self._is_closed

    def succeeded(self) -> None:
        """A request was answered."""
        self.failures = 0
        self._recent.append(True)

    def failed(self, failure: Failure) -> None:
        """A request was not."""
        self.cause = failure
        self.failures += 1
        self._recent.append(False)
        if not self._is_closed:
            return
        if failure.is_down or self.failures >= IN_A_ROW or self._half_failed():
            self._is_closed = False

    def probe_failed(self, failure: Failure) -> None:
        """Nor was the probe: left alone for longer."""
        self.cause = failure
        self._is_closed = False
        self._probes += 1

    def close(self) -> None:
        """The probe was scored."""
        self._is_closed = True
        self.cause = None
        self.failures = self._probes = 0
        self._recent.clear()

    def pause_s(self, *, urgent: bool) -> float:
        """Seconds until the next probe: doubling, with a random part so that ranks do not probe together.

        urgent: samples wait and no replica answers.
        """
        first, longest = (
            (_FIRST_URGENT_PAUSE_S, _LONGEST_URGENT_PAUSE_S) if urgent else (_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        )
        return min(longest, first * 2 ** min(self._probes, 10)) * random.uniform(0.5, 1.0)

    def _half_failed(self) -> bool:
        return len(self._recent) == WINDOW and self._recent.count(False) * 2 >= WINDOW


def backoff_s(attempts: int) -> float:
    """Seconds before a request that failed `attempts` times is repeated: anything up to 0.1, 0.2, ... 2 s, so
    that ranks that failed together do not come back together."""
    longest = min(_LONGEST_URGENT_PAUSE_S, _FIRST_URGENT_PAUSE_S * 2 ** min(attempts - 1, 10))
    return random.uniform(0, longest)
