"""Goals: figures of a text alone, such as its length, and the space that several of them span.

words -> readability, diversity, formality (tagger)     the four measures
named, ranges                                          names -> goals, and the range of each
space -> source                                        all goals of some texts; the same as a reward
cache                                                  values that several processes share
"""

from __future__ import annotations

from conch.rewards.goals.base import Failure as Failure
from conch.rewards.goals.base import Goal as Goal
from conch.rewards.goals.named import DEFAULT_GOALS as DEFAULT_GOALS
from conch.rewards.goals.space import GoalSpace as GoalSpace
