"""`python -m reference_train evaluate` and `report`: a checkpoint's numbers, and their table."""
