"""Errors that are the user's to mend: one clear line, exit code 2."""


class UserError(Exception):
    """Says in one line what was wrong, where, and what to do."""
