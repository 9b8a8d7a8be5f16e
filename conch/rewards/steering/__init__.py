"""Rewards for steering a text to targets in several goals (Chang et al. 2025, arXiv:2505.23816).

rows       what a row says: `source_<goal>`, `target_<goal>`, `steering_goals`
formulas   distances in goal space
source     the reward source, which stands on one that measures goals
"""

from __future__ import annotations

from conch.rewards.steering.source import SteeringReward as SteeringReward
