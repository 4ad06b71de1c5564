"""`python -m benchmarks gate`: compiles every shipped kernel for every architecture."""
