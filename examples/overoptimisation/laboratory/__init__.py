"""A laboratory that shows overoptimisation, and ensembles that stop it, on a CPU: `python -m` runs it."""
