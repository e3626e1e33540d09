"""The two ways a command ends early: the user can fix it, or a check failed."""


class UserError(ValueError):
    """Bad input: exit code 2. The message is one line: what happened, what was expected, how to fix it."""


class CheckFailed(RuntimeError):
    """The work ran and its result is not good enough (regression, budget, parity): exit code 1."""
