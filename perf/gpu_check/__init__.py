"""Proof on a GPU in one command: `python -m perf.gpu_check`. See perf/README.md."""
