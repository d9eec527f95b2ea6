"""The cost of text: `python -m perf.frontend` measures the real server over a device that only sleeps."""
