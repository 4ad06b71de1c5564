"""Benchmarks of the loss, run from the checkout: `python -m benchmarks --help`, and README.md."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
