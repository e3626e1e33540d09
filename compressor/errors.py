"""The two ways a command ends early: the user can fix it, or a check failed."""

from typing import Any


class UserError(ValueError):
    """Bad input: exit code 2. The message is one line: what happened, what was expected, how to fix it."""


class CheckFailed(RuntimeError):
    """The work ran and its result is not good enough (regression, budget, parity): exit code 1.

    `result` is what there is to show all the same, such as the report.
    """

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result
