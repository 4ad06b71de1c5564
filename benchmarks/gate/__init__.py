"""Every shipped kernel, compiled for every architecture without a GPU."""
