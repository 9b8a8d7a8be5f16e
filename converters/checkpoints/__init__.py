"""Reading checkpoints: where the files are, which architecture, what is refused."""
