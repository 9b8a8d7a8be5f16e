"""Where rewards come from: a Python function or a served model, behind one base class. Imports no torch."""

from __future__ import annotations

from conch.rewards.base import RewardSource as RewardSource
from conch.rewards.factory import from_user as from_user
from conch.rewards.function import groupwise as groupwise
from conch.rewards.scorer import RewardScorer as RewardScorer
from conch.rewards.scorer import combine as combine
from conch.rewards.verifiers.base import Verdict as Verdict
from conch.rewards.verifiers.base import Verifier as Verifier
