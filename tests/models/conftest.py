"""One torch thread for this folder."""

from tests.one_thread import one_thread

__all__ = ["one_thread"]
