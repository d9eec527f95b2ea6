"""Processor time of single threads, in nanoseconds, read from outside. Linux: /proc."""

from pathlib import Path


def thread_ns(pid: int, thread_id: int) -> int:
    """What this thread has used since it began; the tick that runs now may be missing (some ms in a window of s)."""
    return int(Path(f"/proc/{pid}/task/{thread_id}/schedstat").read_text().split()[0])


def reset_peak(pid: int) -> None:
    """Let VmHWM begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
