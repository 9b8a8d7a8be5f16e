"""Parts of `benchmarks/gpu_suite.py`."""
