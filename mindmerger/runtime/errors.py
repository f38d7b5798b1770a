"""Errors whose message is one line for the user: what is wrong, where, and what to do."""

import re

# How the stack begins that torch appends to a message of its C++ code.
STACK = re.compile(r"^\s*(?:Exception raised from |frame #0|C\+\+ CapturedTraceback)", re.MULTILINE)


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: what is wrong, where, and what to do."""


class ReportedError(UserError):
    """A `UserError` that all ranks have agreed on, so that rank 0 alone prints it."""


class StartError(UserError):
    """A rank's own `UserError` before the ranks have met: each rank prints its own."""


def one_line(error: BaseException) -> str:
    """Returns an error's message in one line of at most 300 characters, its type where it has none or is a bare key."""
    prefix = "KeyError: " if isinstance(error, KeyError) else ""
    # torch appends its C++ stack to a message, dozens of lines of it.
    text = STACK.split(str(error), maxsplit=1)[0]
    message = prefix + (" ".join(text.split()) or type(error).__name__)
    return message if len(message) <= 300 else message[:297] + "..."
