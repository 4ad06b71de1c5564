"""Triton kernels of the operators in `cyclip_loss.ops`, installed as `cyclip_loss.kernels`."""
