"""`python -m reference_train compare`: which loss for my pairs? `compare.py` has the order of things."""
