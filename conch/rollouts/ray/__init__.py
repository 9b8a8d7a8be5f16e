"""Samplers that are actors of Ray: a rollout server each, whose transport is Ray."""
