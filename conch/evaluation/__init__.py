"""Measuring a policy or a reward model, in a run or alone."""
