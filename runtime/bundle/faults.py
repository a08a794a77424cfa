"""What pydantic finds wrong, in one line: where, what, what was given instead, and how many faults more."""

from pydantic import ValidationError

from stiv_deploy.runtime.errors import briefly, one_line

OURS = "Value error, "
"""What pydantic writes in front of the words of our own validators."""


def fault_text(error: ValidationError) -> str:
    """The first fault in words; a whole object or list that was given is not repeated."""
    fault = error.errors(include_url=False, include_context=False)[0]
    where = one_line(".".join(str(part) for part in fault["loc"]), 200)
    given = fault["input"]
    said = "" if given is None or isinstance(given, dict | list | tuple) else f", got {briefly(given)}"
    more = f" (and {error.error_count() - 1} more faults)" if error.error_count() > 1 else ""
    return f"{f'{where}: ' if where else ''}{one_line(fault['msg'].removeprefix(OURS), 300)}{said}{more}"
