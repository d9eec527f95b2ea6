import msgspec
import pytest

from asyncllm.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from asyncllm.errors import StartupError
from asyncllm.executor.memory import GIB, activation_bytes, check_weights_fit, plan_cache, weight_bytes
from asyncllm.models.config import ModelArchitecture

SMOL = ModelArchitecture(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    max_position=8192,
    tie_word_embeddings=True,
)
BLOCK_BYTES = 16 * 2 * 30 * 3 * 64 * 2  # of 16 tokens in bfloat16


def config(cache=CacheConfig(), model=ModelConfig(), scheduler=SchedulerConfig()):  # noqa: B008
    return Config(cache=cache, model=model, scheduler=scheduler)


@pytest.mark.parametrize(
    ("cache", "available_gib", "on_gpu", "expected_blocks"),
    [
        (CacheConfig(), 64, False, GIB // BLOCK_BYTES),  # 1 GiB on a CPU
        (CacheConfig(), 2, False, GIB // 2 // BLOCK_BYTES),  # but at most a quarter of what is available
        (CacheConfig(memory_gib=3), 64, False, 3 * GIB // BLOCK_BYTES),
        (CacheConfig(memory_gib=3), 3.5, True, 3 * GIB // BLOCK_BYTES),
        (CacheConfig(num_blocks=100), 64, False, 101),  # and the null block
        (CacheConfig(num_blocks=100, memory_gib=3), 64, False, 101),
    ],
)
def test_cache_size_follows_the_settings_and_the_free_memory(cache, available_gib, on_gpu, expected_blocks):
    plan = plan_cache(SMOL, config(cache), 2, int(available_gib * GIB), on_gpu)
    assert plan.capacity.num_blocks == expected_blocks
    assert plan.num_bytes == expected_blocks * BLOCK_BYTES <= available_gib * GIB


def test_a_gpu_gives_nine_tenths_less_what_a_step_needs():
    plan = plan_cache(SMOL, config(), 2, 80 * GIB, True)
    budget = 0.9 * 80 * GIB - activation_bytes(SMOL, config(), 2)
    assert budget - BLOCK_BYTES < plan.num_bytes <= budget


def test_summary_says_what_fits_in_words():
    plan = plan_cache(SMOL, config(), 2, 64 * GIB, False)
    assert plan.summary == "KV: 46,576 tokens in 1.00 GiB; 256 sequences of 181"
    assert plan.capacity.num_kv_tokens == 46_576
    assert plan.capacity.max_context_length == 8192


def test_context_shrinks_to_what_fits_and_the_summary_says_so():
    plan = plan_cache(SMOL, config(CacheConfig(num_blocks=100)), 2, GIB, False)
    assert plan.capacity.max_context_length == 1600
    assert plan.summary.endswith("context limited to 1,600 of the model's 8,192 tokens: raise cache.memory_gib")


@pytest.mark.parametrize(
    ("settings", "available_gib", "on_gpu", "words"),
    [
        (config(CacheConfig(memory_gib=8)), 4, False, ["8.00 GiB", "4.00 GiB", "lower cache.memory_gib = 8"]),
        (config(CacheConfig(memory_gib=3.8)), 4, True, ["3.80 GiB beside 0.37 GiB", "lower cache.memory_gib = 3.8"]),
        (config(CacheConfig(num_blocks=10**6)), 4, True, ["4.00 GiB", "lower cache.num_blocks = 1000000"]),
        (config(), 0.0005, False, ["one block", "cache.memory_gib"]),
        (config(), 0.25, True, ["0.25 GiB available", "scheduler.max_batched_tokens"]),
        (config(model=ModelConfig(max_context_length=9000)), 4, False, ["model.max_context_length = 9000", "8192"]),
        (
            config(CacheConfig(num_blocks=100), ModelConfig(max_context_length=4096)),
            4,
            False,
            ["model.max_context_length = 4096", "0.09 GiB", "1600 tokens", "cache.memory_gib"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_keys_to_change(settings, available_gib, on_gpu, words):
    with pytest.raises(StartupError) as caught:
        plan_cache(SMOL, settings, 2, int(available_gib * GIB), on_gpu)
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message


def test_weights_that_do_not_fit_are_refused_before_loading():
    big = msgspec.structs.replace(SMOL, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64)
    with pytest.raises(StartupError, match=r"weights need \d+\.\d\d GiB, 16.00 GiB are available"):
        check_weights_fit(weight_bytes(big, 2, on_gpu=True), 16 * GIB)
    check_weights_fit(weight_bytes(SMOL, 2, on_gpu=True), GIB)


def test_a_cpu_holds_a_tied_table_twice():
    assert weight_bytes(SMOL, 2, on_gpu=True) == SMOL.num_parameters * 2
    assert weight_bytes(SMOL, 2, on_gpu=False) == (SMOL.num_parameters + 49152 * 576) * 2
