"""Argument checks that the profiling modules share."""


def check_at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"{name} is {value}, expected at least {minimum}")
