"""Names that a user types, and what is nearest to one that does not exist."""

import difflib
from collections.abc import Iterable, Sequence


class UnknownNameError(ValueError):
    pass


def check(kind: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises if a name is not known.

    Raises:
        UnknownNameError: with the nearest name and all of them.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UnknownNameError(
                f"unknown {kind} {name!r}; did you mean {near[0]!r}? Known: {', '.join(known)}."
            )
