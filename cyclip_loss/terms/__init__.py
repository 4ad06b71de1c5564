"""What is computed, independent of where: contrastive terms, penalties, log-sum-exps."""

from collections.abc import Iterable

from torch import Tensor


def sum_of_terms(terms: Iterable[Tensor]) -> Tensor:
    """The sum of the terms of a loss. (Python's `sum` would add the first one to 0.)"""
    first, *others = terms
    return sum(others, first)
