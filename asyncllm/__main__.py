"""`python -m asyncllm config.toml` is `asyncllm-server config.toml`."""

import sys

from asyncllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
