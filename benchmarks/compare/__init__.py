"""The loss beside what one would use instead."""
