"""How a stage tells what it is doing. The runtime has the same for itself."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many pieces of work are done, and how many there are."""


def unheard(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody looks at."""
