"""Rewards that are checked, not learned: the answer to a problem of GSM8K, the instructions of IFEval."""
