import msgspec
import pytest

from asyncllm.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from asyncllm.errors import StartupError
from asyncllm.executor.memory import (
    GIB,
    check_weights_fit,
    cpu_room,
    gpu_room,
    graph_bytes,
    plan_cache,
    weight_bytes,
)
from asyncllm.models.config import Experts, LayerKind, ModelArchitecture

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


def room_of(gib, on_gpu, settings):
    """All of a CPU's memory; on a GPU what is left of 0.9 of a device that is this much larger than what is in use."""
    if not on_gpu:
        return cpu_room(int(gib * GIB))
    used = 2 * GIB
    return gpu_room(SMOL, settings, 2, int((gib * GIB + used) / 0.9) + 1, used, 0)


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
    plan = plan_cache(SMOL, config(cache), SMOL.kv_bytes_per_token(2), room_of(available_gib, on_gpu, config(cache)))
    assert plan.capacity.num_blocks == expected_blocks
    assert plan.num_bytes == expected_blocks * BLOCK_BYTES <= available_gib * GIB


def test_a_gpu_gives_its_share_less_what_is_in_use_and_what_steps_need():
    settings = config(CacheConfig(memory_fraction=0.8))
    plan = plan_cache(SMOL, settings, SMOL.kv_bytes_per_token(2), gpu_room(SMOL, settings, 2, 40 * GIB, 3 * GIB, GIB))
    budget = 0.8 * 40 * GIB - 4 * GIB
    assert budget - BLOCK_BYTES < plan.num_bytes <= budget
    assert plan.summary.endswith("(0.8 of 40.00 GiB, less 3.00 GiB in use and 1.00 GiB kept for steps)")


def test_a_huge_gpu_gets_no_more_blocks_than_all_sequences_at_full_length_can_fill():
    plan = plan_cache(SMOL, config(), SMOL.kv_bytes_per_token(2), gpu_room(SMOL, config(), 2, 140 * GIB, GIB, GIB))
    assert plan.capacity.num_blocks == 256 * 8192 // 16 + 1


def test_graphs_share_the_memory_of_the_largest():
    one, many = graph_bytes(SMOL, 256, 512, 1, 2), graph_bytes(SMOL, 256, 512, 140, 2)
    assert one > 256 * SMOL.vocab_size * 2
    assert many - one == 139 * 2 * 2**20
    assert graph_bytes(SMOL, 0, 0, 0, 2) == 0


def test_a_step_through_experts_keeps_what_each_choice_computes():
    experts = Experts(num_experts=64, num_experts_per_token=8, intermediate_size=512, norm_topk_prob=True)
    mixture = msgspec.structs.replace(SMOL, layer_kinds=(LayerKind(has_experts=True),), experts=experts)
    more = graph_bytes(mixture, 0, 1000, 1, 2) - graph_bytes(SMOL, 0, 1000, 1, 2)
    assert more == 1000 * 2 * (8 * (512 + SMOL.hidden_size) - 3 * SMOL.intermediate_size)


def test_summary_says_what_fits_in_words():
    plan = plan_cache(SMOL, config(), SMOL.kv_bytes_per_token(2), cpu_room(64 * GIB))
    assert plan.summary == "KV: 46,576 tokens in 1.00 GiB; 256 sequences of 181"
    assert plan.capacity.num_kv_tokens == 46_576
    assert plan.capacity.max_context_length == 8192


def test_context_shrinks_to_what_fits_and_the_summary_says_so():
    plan = plan_cache(SMOL, config(CacheConfig(num_blocks=100)), SMOL.kv_bytes_per_token(2), cpu_room(GIB))
    assert plan.capacity.max_context_length == 1600
    assert plan.summary.endswith("context limited to 1,600 of the model's 8,192 tokens: raise cache.memory_gib")


@pytest.mark.parametrize(
    ("settings", "available_gib", "on_gpu", "words"),
    [
        (config(CacheConfig(memory_gib=8)), 4, False, ["8.00 GiB", "4.00 GiB", "lower cache.memory_gib = 8"]),
        (config(CacheConfig(memory_gib=4.2)), 4, True, ["4.20 GiB", "in use", "lower cache.memory_gib = 4.2"]),
        (config(CacheConfig(num_blocks=10**6)), 4, True, ["4.00 GiB", "lower cache.num_blocks = 1000000"]),
        (config(), 0.0005, False, ["one block", "cache.memory_gib"]),
        (config(), 0.0005, True, ["0.00 GiB are available (0.9 of", "cache.memory_fraction"]),
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
        plan_cache(SMOL, settings, SMOL.kv_bytes_per_token(2), room_of(available_gib, on_gpu, settings))
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
