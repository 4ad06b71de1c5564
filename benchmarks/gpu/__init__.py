"""`python -m benchmarks gpu`: tests and times on a GPU."""
