"""Sampling on rollout servers: requests, weights, and which servers live."""
