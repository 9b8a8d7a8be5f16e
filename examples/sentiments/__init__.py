"""Sentiment: a writer of film reviews that learns to be kind, from a classifier that Triton serves."""
