"""Samples that are out: who has them, what they got, and that on disk."""
