"""Parametrisation by pairs: in place of all combinations, the few in which every pair of values meets."""

import itertools
from collections.abc import Iterable

import pytest


def _pairs(row: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    """Every two (parameter, value) of a combination."""
    return set(itertools.combinations(enumerate(row), 2))


def pairwise(*, indirect: Iterable[str] = (), **values: Iterable) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over combinations that hold every pair of values of two parameters.

    Greedy, so the combinations are few but not the fewest, and the same in every run.

    Args:
        indirect: parameters that are fixtures, as for `parametrize`.
        values: of each parameter, at least two parameters.
    """
    lists = [list(of_parameter) for of_parameter in values.values()]
    every = list(itertools.product(*(range(len(of_parameter)) for of_parameter in lists)))
    missing = set().union(*map(_pairs, every))
    chosen = []
    while missing:
        chosen.append(max(every, key=lambda row: len(_pairs(row) & missing)))
        missing -= _pairs(chosen[-1])
    rows = [[of_parameter[i] for of_parameter, i in zip(lists, row, strict=True)] for row in chosen]
    return pytest.mark.parametrize(list(values), rows, ids=str, indirect=list(indirect))
