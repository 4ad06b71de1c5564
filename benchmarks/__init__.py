"""Benchmarks of the loss, run as `python -m benchmarks <command>` from the checkout.

cpu      time, peak memory and accuracy on this CPU, beside the alternatives
model    predicted times of the kernels on A100, H100 and B200: needs no GPU
gpu      checks and times everything on the GPU at hand, and writes a record to `results/`
"""
