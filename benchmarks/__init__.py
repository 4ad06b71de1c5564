"""Benchmarks of the loss, run from the checkout: `python -m benchmarks --help`, and README.md."""
