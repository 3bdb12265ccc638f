"""What a user is told in one line."""

from __future__ import annotations


class Error(Exception):
    """A failure (exit status 1); its text says what, where, and what to do."""


class UsageError(Error):
    """Wrong usage of the command line (exit status 2)."""
