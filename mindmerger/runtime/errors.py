"""Errors whose message is one line for the user: what is wrong, where, and what to do."""


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: what is wrong, where, and what to do."""


class ReportedError(UserError):
    """A `UserError` that all ranks have agreed on, so that rank 0 alone prints it."""


class StartError(UserError):
    """A rank's own `UserError` before the ranks have met: each rank prints its own."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, at most 160 characters; its type where it has no message."""
    # torch appends its C++ stack to a message, dozens of lines of it, and some libraries raise errors without any.
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
