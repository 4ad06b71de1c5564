"""Which loss for my pairs? `compare.py` has the order of things."""
