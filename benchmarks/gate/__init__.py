"""Compiles every shipped kernel for every architecture, without a GPU."""
