"""The one error that users see, words for it, and how command lines print it. Imports nothing of the package."""

import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


class UserError(RuntimeError):
    """Something that only the user can put right.

    Args:
        where: the file, folder, option or variable that is wrong.
        found: what is there.
        expected: what should be there.
        remedy: one sentence, in the imperative: what to do.
    """

    def __init__(self, where: str | Path, found: str, expected: str, remedy: str):
        super().__init__(f"{where}: found {found}; expected {expected}. {remedy}")
        self.parts = (where, found, expected, remedy)

    def __reduce__(self) -> tuple[type["UserError"], tuple[str | Path, str, str, str]]:
        # an exception is pickled with its message alone; it may come out of another process
        return type(self), self.parts


def some_of(names: Iterable[str], limit: int = 10) -> str:
    """Names for a sentence, cut short after `limit`: "a, b, …"."""
    names = list(names)
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def reports_user_errors(command: Callable[[], None]) -> Callable[[], None]:
    """Make a command line end with exit status 1 and the bare sentence of a `UserError`, without a traceback."""

    @functools.wraps(command)
    def wrapped() -> None:
        try:
            command()
        except UserError as error:
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(1)

    return wrapped
