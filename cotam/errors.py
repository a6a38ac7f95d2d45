"""What an exception says, in one line."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """The message with single spaces for line breaks and the like; the exception's type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def with_type(error: BaseException) -> str:
    """The exception's type and message, in one line of at most 500 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
