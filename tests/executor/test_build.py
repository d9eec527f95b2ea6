import msgspec
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from asyncllm.config import CacheConfig, Config, ExecutorConfig, ModelConfig, SchedulerConfig
from asyncllm.errors import StartupError
from asyncllm.executor.build import build_executor, choose_dtype
from asyncllm.executor.host import cpu_flags
from asyncllm.models.decoder import DecoderForCausalLM
from asyncllm.native.builds import find_library
from asyncllm.native.decoder import NativeDecoder
from asyncllm.types import SamplingParams
from asyncllm.weights.base import TextFacts
from asyncllm.weights.checkpoint import open_checkpoint
from tests.executor.tiny_model import TINY, Driver, Sequence
from tests.weights.tiny import llama, save_gguf


class TinyCheckpoint:
    """Two random llama layers under their checkpoint names."""

    name = source = "tiny"
    text = TextFacts()
    num_bytes = 0
    architecture = msgspec.structs.replace(TINY, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=32)

    def tokenizer(self):
        raise AssertionError("an executor reads no text")

    def tensors(self):
        a = self.architecture
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(shape, generator=generator) * 0.3

        yield "model.embed_tokens.weight", random(a.vocab_size, a.hidden_size)
        for layer in range(a.num_layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", random(a.hidden_size)
            yield f"{prefix}.post_attention_layernorm.weight", random(a.hidden_size)
            for name, heads in (("q", a.num_heads), ("k", a.num_kv_heads), ("v", a.num_kv_heads)):
                yield f"{prefix}.self_attn.{name}_proj.weight", random(heads * a.head_dim, a.hidden_size)
            yield f"{prefix}.self_attn.o_proj.weight", random(a.hidden_size, a.num_heads * a.head_dim)
            for name in ("gate", "up"):
                yield f"{prefix}.mlp.{name}_proj.weight", random(a.intermediate_size, a.hidden_size)
            yield f"{prefix}.mlp.down_proj.weight", random(a.hidden_size, a.intermediate_size)
        yield "model.norm.weight", random(a.hidden_size)
        yield "lm_head.weight", random(a.vocab_size, a.hidden_size)


def config(**model):
    return Config(
        model=ModelConfig(**{"device": "cpu", "dtype": "float32", **model}),
        cache=CacheConfig(num_blocks=64, block_size=4),
        scheduler=SchedulerConfig(max_sequences=4, max_batched_tokens=64),
        executor=ExecutorConfig(threads=torch.get_num_threads()),
    )


def build(**model):
    return build_executor(config(**model), TinyCheckpoint(), lambda phase: None)


@pytest.mark.parametrize(("quantization", "dtype"), [("auto", "bfloat16"), ("none", "bfloat16"), ("auto", "float32")])
def test_a_cpu_keeps_the_blocks_of_a_file_unless_told_otherwise(tmp_path, quantization, dtype):
    model = llama(vocab_size=96, hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)
    save_gguf(tmp_path / "model.gguf", model, Kind.Q4_1)
    checkpoint = open_checkpoint(str(tmp_path))
    asked = config(quantization=quantization, dtype=dtype)
    asked = msgspec.structs.replace(asked, cache=CacheConfig(num_blocks=16, block_size=16))
    executor = build_executor(asked, checkpoint, lambda phase: None)
    native = find_library(cpu_flags())
    if dtype == "float32":
        assert executor.facts["kernels"] == "torch: the model's dtype is float32"
        assert isinstance(executor.model, DecoderForCausalLM)
    elif isinstance(native, str):
        assert executor.facts["kernels"] == f"torch: {native}"
    else:
        assert executor.facts["kernels"] == f"native, {native.description}"
        assert isinstance(executor.model, NativeDecoder)
        in_bfloat16 = 2 * checkpoint.architecture.num_parameters
        assert (executor.model.num_bytes < 0.4 * in_bfloat16) == (quantization == "auto")
    executor.close()


def test_phases_are_reported_in_order_and_facts_are_words():
    phases = []
    executor = build_executor(config(), TinyCheckpoint(), phases.append)
    assert phases == ["import torch", "load weights", "allocate kv cache", "warm up"]
    assert executor.capacity.num_blocks == 65
    assert executor.capacity.max_context_length == 128
    assert executor.facts["device"].startswith("cpu")
    assert executor.facts["dtype"] == "float32"
    assert executor.facts["kv"].startswith("KV: 256 tokens")
    assert set(executor.facts) == {"device", "dtype", "kernels", "parameters", "weights", "kv", "threads"}
    assert executor.facts["kernels"] == "torch: the model's dtype is float32"
    executor.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_precision_runs(dtype):
    executor = build(dtype=dtype)
    assert executor.kv_caches[0].dtype is getattr(torch, dtype)
    sequence = Sequence([1, 2, 3], SamplingParams(max_tokens=4), logprobs=2)
    assert len(Driver(executor).run([sequence], 4)[0]) == 4


def test_real_layers_give_a_batch_in_chunks_the_tokens_of_sequences_alone():
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10, 11], list(range(20, 53)), [5]]
    sampling = [SamplingParams(max_tokens=9, seed=seed, temperature=seed % 2 * 0.8) for seed in range(4)]
    alone = [Driver(build()).run([Sequence(p, s)], 9)[0] for p, s in zip(prompts, sampling)]
    batch = [Sequence(p, s) for p, s in zip(prompts, sampling)]
    assert Driver(build()).run(batch, 9, chunk=5) == alone


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_one_line(device):
    with pytest.raises(StartupError) as caught:
        build(device=device)
    assert caught.value.message == (
        f"model.device = {device}, but this machine has no CUDA device: set model.device to auto or cpu"
    )


@pytest.mark.parametrize(
    ("asked", "of_checkpoint", "on_gpu", "fast", "expected"),
    [
        ("auto", "bfloat16", False, ["bfloat16"], "bfloat16"),
        ("auto", "bfloat16", False, [], "float32"),
        ("auto", "float16", False, ["bfloat16"], "float32"),
        ("auto", "float16", False, ["bfloat16", "float16"], "float16"),
        ("auto", "float32", False, ["bfloat16", "float16"], "float32"),
        ("auto", "float16", True, [], "float16"),
        ("auto", "bfloat16", True, [], "bfloat16"),
        ("bfloat16", "float32", False, [], "bfloat16"),
    ],
)
def test_auto_precision_is_the_checkpoints_unless_the_cpu_is_slow_at_it(asked, of_checkpoint, on_gpu, fast, expected):
    dtype, fact = choose_dtype(asked, of_checkpoint, on_gpu, fast)
    assert dtype == expected
    assert fact.startswith(expected)
    if asked == "auto" and dtype != of_checkpoint:
        assert of_checkpoint in fact
