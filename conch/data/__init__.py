"""Datasets: strings, pairs and prompts become token ids; streams know their position."""
