"""The loss compared with its alternatives."""
