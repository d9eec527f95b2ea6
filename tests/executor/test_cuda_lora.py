"""Adapters on the CUDA executor: inside captured graphs, two steps in flight, with prompts in the step and without."""

from collections import deque
from pathlib import Path

import torch

from asyncllm.attention.triton_attention import TritonAttention
from asyncllm.config import CacheConfig, SchedulerConfig
from asyncllm.engine.scheduler import Scheduler
from asyncllm.executor.cuda_executor import CudaExecutor
from asyncllm.types import Capacity
from asyncllm.weights.checkpoint import open_checkpoint
from asyncllm.weights.loader import load_model
from asyncllm.weights.lora_stacks import install_adapters, plan_adapters
from tests.engine.harness import Harness, submit
from tests.executor.adapted import AdaptedModel
from tests.executor.test_cuda_executor import host
from tests.fakes import greedy
from tests.models.test_decoder import tokens_of

ROWS = 2


class Run(Harness):
    """The step loop over the CUDA executor, which captures before its first step what fits into `graph_tokens`."""

    def __init__(self, model: AdaptedModel, graph_tokens: int) -> None:
        super().__init__()
        checkpoint, device = open_checkpoint(str(model.directory)), host()
        a, on = checkpoint.architecture, device.torch_device
        attention = TritonAttention(ROWS, a.num_heads, a.num_kv_heads, a.head_dim, on, device.num_sms)
        loaded = load_model(checkpoint, attention, torch.float32, on)
        mask = install_adapters(plan_adapters(model.lora, a), loaded, torch.float32, on)
        capacity = Capacity(20, 4, ROWS, 64, a.vocab_size)
        self.cuda = CudaExecutor(
            loaded, attention, a, capacity, device, torch.float32, {},
            graph_rows=ROWS, graph_tokens=graph_tokens, overlap=True, adapters=mask,
        )  # fmt: skip
        while self.cuda.improve():
            pass
        self.executor = self.cuda  # type: ignore[assignment]
        scheduler = SchedulerConfig(max_sequences=ROWS, max_batched_tokens=8)
        self.scheduler = Scheduler(capacity, scheduler, CacheConfig(), clock=lambda: 42.0)
        self.in_flight = deque()
        self.replayed: list[bool] = []
        launch = self.cuda.launch

        def launched(plan):
            step = launch(plan)
            self.replayed.append(step.replayed)
            return step

        self.cuda.launch = launched  # type: ignore[method-assign]


def test_every_row_gets_the_tokens_of_its_merged_model_in_graphs_and_beside_prompts(tmp_path: Path) -> None:
    sizes = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    model = AdaptedModel(tmp_path, num_hidden_layers=1, **sizes)
    run = Run(model, graph_tokens=4)
    prompts = {1: (1, tokens_of(1, 6)), 2: (0, tokens_of(2, 2)), 3: (2, tokens_of(3, 3))}
    run.add(*(submit(i, prompt, greedy(4), adapter=adapter) for i, (adapter, prompt) in prompts.items()))
    run.run()  # two at a time: the third takes the slot of another adapter
    assert True in run.replayed and False in run.replayed
    for request_id, (adapter, prompt) in prompts.items():
        tokens = run.tokens[request_id]
        assert len(tokens) == 4 and tokens == model.chosen(adapter, prompt, tokens), request_id
