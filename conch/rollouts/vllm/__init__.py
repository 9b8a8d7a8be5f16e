"""Sampling with vLLM: in this process, in its workers, and in a server of its own."""
