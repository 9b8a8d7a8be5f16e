"""Serving reward models: one Triton server (`server/`), and servers deployed under a name (`deployment/`)."""
