"""Overoptimisation of reward models: seen, measured and stopped by ensembles."""
