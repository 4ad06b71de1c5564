"""Who shares a batch: groups of ranks, what they must agree on, and how features reach them."""
