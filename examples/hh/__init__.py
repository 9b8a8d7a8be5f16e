"""Helpful & Harmless: an assistant trained from preferences, with a reward model that Triton serves."""
