"""asyncllm beside the servers one would otherwise start on a CPU: `python -m perf.peers`, `make bench-peers`."""
