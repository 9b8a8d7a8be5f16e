"""Replicas of public reward models: tiny, random, in the exact form in which they are published."""
