"""Benchmarks of the loss, for a checkout. README.md and `python -m benchmarks --help` say more."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
