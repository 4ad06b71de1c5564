"""`python -m benchmarks gpu`: tests, times and tile sizes on a GPU."""
