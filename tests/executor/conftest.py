import pytest
import torch


@pytest.fixture(autouse=True)
def single_thread():
    """Tiny tensors gain nothing from a second thread, and on a busy machine wait for it at every op."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
