"""Adapters through the step loop: mixed batches, chunks, prefix hits and preemption, against PEFT's merged models."""

from collections import deque

import pytest
import torch

from asyncllm.config import Config
from asyncllm.engine.scheduler import Scheduler
from asyncllm.errors import StartupError
from asyncllm.executor import build
from asyncllm.executor.build import build_executor
from asyncllm.executor.torch_executor import TorchExecutor
from asyncllm.weights.checkpoint import open_checkpoint
from tests.engine.harness import Harness, submit
from tests.executor.adapted import AdaptedModel
from tests.fakes import greedy
from tests.models.test_decoder import tokens_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    return AdaptedModel(tmp_path_factory.mktemp("adapted"))


class Run(Harness):
    """The step loop over the real thing."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.phases: list[str] = []
        self.real = build_executor(config, open_checkpoint(config.model.path), self.phases.append)
        self.executor = self.real  # type: ignore[assignment]
        self.scheduler = Scheduler(
            self.real.capacity,
            config.scheduler,
            config.cache,
            clock=lambda: 42.0,
            balance_tokens=self.real.balance_tokens,
        )
        self.in_flight = deque()


def test_alone_each_gives_the_32_greedy_tokens_of_its_merged_model(model: AdaptedModel) -> None:
    for adapter in (0, 1, 2):
        run = Run(model.config())
        run.add(submit(1, tokens_of(7, 13), greedy(32), adapter=adapter))
        [tokens] = run.run().values()
        assert len(tokens) == 32 and tokens == model.chosen(adapter, tokens_of(7, 13), tokens)


@pytest.mark.parametrize("num_blocks", [100, 22], ids=["roomy", "preempting"])
def test_a_mixed_batch_with_shared_prompts_gives_each_its_own_tokens(model: AdaptedModel, num_blocks: int) -> None:
    run = Run(model.config(num_blocks))
    prompts = [tokens_of(7, 13), tokens_of(8, 21)]
    wanted = {}
    for round_ in range(2):  # the second finds the first one's prompts in the cache
        for adapter in (0, 1, 2):
            for prompt in prompts:
                wanted[len(wanted) + 1] = (adapter, prompt)
                run.add(submit(len(wanted), prompt, greedy(32), adapter=adapter))
        run.run()
        if round_ == 0 and num_blocks == 100:
            assert not any(started.num_cached_tokens for started in run.started.values())
    for request_id, (adapter, prompt) in wanted.items():
        tokens = run.tokens[request_id]
        assert len(tokens) == 32 and tokens == model.chosen(adapter, prompt, tokens)
    hits = [run.started[request_id].num_cached_tokens for request_id in range(7, 13)]
    if num_blocks == 100:
        assert hits == [12, 20] * 3
    else:
        assert run.scheduler.stats().num_preemptions > 0


def test_n_choices_of_an_adapter_share_its_prompt(model: AdaptedModel) -> None:
    run = Run(model.config())
    run.add(*(submit(i, tokens_of(8, 21), greedy(8), adapter=2, after=0 if i == 1 else 1) for i in (1, 2, 3)))
    run.run()
    assert run.tokens[1] == run.tokens[2] == run.tokens[3] == model.chosen(2, tokens_of(8, 21), run.tokens[1])
    assert run.started[3].num_cached_tokens == 20


def test_drafts_are_verified_by_the_adapter_of_their_sequence(model: AdaptedModel) -> None:
    run = Run(model.config())
    wanted = greedy(32, speculative_tokens=4)
    run.add(*(submit(1 + adapter, tokens_of(9, 5) * 3, wanted, adapter=adapter) for adapter in (0, 1, 2)))
    run.run()
    assert run.scheduler.stats().num_draft_tokens > 0
    for adapter in (0, 1, 2):
        tokens = run.tokens[1 + adapter]
        assert len(tokens) == 32 and tokens == model.chosen(adapter, tokens_of(9, 5) * 3, tokens)


def test_a_step_without_adapters_leaves_their_products_out(model: AdaptedModel) -> None:
    run = Run(model.config())
    assert isinstance(run.real, TorchExecutor) and run.real._adapters is not None
    mask, seen = run.real._adapters, []
    forward = run.real.model.forward

    def watched(*arguments):
        seen.append(None if mask.columns is None else mask.columns[:, 0].sum(1).tolist())
        return forward(*arguments)

    run.real.model.forward = watched  # type: ignore[method-assign]
    run.add(submit(1, tokens_of(1, 3), greedy(2)))
    run.run()
    run.add(submit(2, tokens_of(1, 2), greedy(2)), submit(3, tokens_of(2, 1), greedy(2), adapter=2))
    run.run()
    assert seen == [None, None, [0.0, 0.0, 6.0], [0.0, 6.0]]


def test_start_up_names_the_adapters_and_counts_their_memory(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(model.config())
    assert run.phases[:3] == ["import torch", "open adapters", "load weights"]
    assert run.real.facts["adapters"].startswith("sql (rank 4), chat (rank 6), 0.00 GiB")
    needed: list[int] = []
    monkeypatch.setattr(build, "check_weights_fit", lambda needed_bytes, available_bytes: needed.append(needed_bytes))
    for config in (model.config(), Config(model=model.config().model, cache=model.config().cache)):
        build_executor(config, open_checkpoint(str(model.directory)), lambda phase: None)
    mlp, attention = 16 * 2 * (48 + 160) + 16 * (48 + 80), 16 * 3 * (48 + 96) + 16 * (48 + 48)
    assert needed[0] - needed[1] == 4 * 2 * (mlp + attention)


def test_an_adapter_that_is_not_served_stops_the_start_before_weights_are_read(model: AdaptedModel) -> None:
    config = model.config()
    phases: list[str] = []
    broken = Config(model=config.model, lora=type(config.lora)(adapters={"x": str(model.directory)}))
    with pytest.raises(StartupError, match=r"lora\.adapters\.x"):
        build_executor(broken, open_checkpoint(str(model.directory)), phases.append)
    assert phases == ["import torch", "open adapters"]


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_adapters_run_in_the_models_precision(model: AdaptedModel, dtype: str) -> None:
    config = model.config()
    settings = Config(
        model=type(config.model)(path=config.model.path, device="cpu", dtype=dtype), cache=config.cache,
        scheduler=config.scheduler, executor=config.executor, lora=config.lora,
    )  # fmt: skip
    run = Run(settings)
    run.add(*(submit(i, tokens_of(7, 13), greedy(6), adapter=i % 3) for i in (1, 2, 3)))
    run.run()
    assert {len(tokens) for tokens in run.tokens.values()} == {6}
    assert all(parameter.dtype is torch.bfloat16 for parameter in run.real.model.parameters())  # type: ignore[attr-defined]
