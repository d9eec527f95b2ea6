"""For every test: Triton's interpreter where no CUDA device is, chosen before anything imports triton."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the other workers have the other cores

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in this session: natively on CUDA, interpreted on a CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
