"""Errors whose message is one line for the user: what is wrong, where, and what to do."""


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: what is wrong, where, and what to do."""


class ReportedError(UserError):
    """A `UserError` that all ranks have agreed on, so that rank 0 alone prints it."""


class StartError(UserError):
    """A rank's own `UserError` before the ranks have met: each rank prints its own."""
