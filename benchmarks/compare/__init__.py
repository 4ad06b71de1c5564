"""`python -m benchmarks`: compares the loss with its alternatives."""
