"""Runs of a service: the trainer in its thread, and where clients and trainer meet."""
