"""A helper that the second step of the stale-cache toy calls, and a function that nobody does."""


def helper(number: int) -> int:
    return number + 1


def neighbour(number: int) -> int:
    return number - 1
