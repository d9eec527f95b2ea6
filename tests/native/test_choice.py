"""Which models run on the native kernels, and what a server says where they do not."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gguf import GGMLQuantizationType as Kind

from asyncllm import LLM
from asyncllm.config import CacheConfig, Config, ExecutorConfig, ModelConfig, SchedulerConfig
from asyncllm.errors import StartupError
from asyncllm.executor import build_native, host
from asyncllm.executor.build import build_executor
from asyncllm.executor.torch_executor import TorchExecutor
from asyncllm.models.decoder import DecoderForCausalLM
from asyncllm.native import builds
from asyncllm.native import library as c
from asyncllm.native.builds import AVX512, BUILDS, find_library, open_build
from asyncllm.native.decoder import NativeDecoder
from asyncllm.native.library import Library, sources_digest
from asyncllm.native.trial import Trial, why_worse
from asyncllm.weights.checkpoint import open_checkpoint
from tests.weights.tiny import llama, save_gguf, save_llama

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
NOT_BUILT = "the native kernels were not built: install the package where a C++ compiler is"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_llama(directory, vocab_size=259, **SIZES)
    return directory


def config(directory: Path, block_size: int = 16, backend: str = "auto", dtype: str = "bfloat16") -> Config:
    return Config(
        model=ModelConfig(path=str(directory), device="cpu", dtype=dtype),  # type: ignore[arg-type]
        cache=CacheConfig(num_blocks=32, block_size=block_size),
        scheduler=SchedulerConfig(max_sequences=4, max_batched_tokens=64),
        executor=ExecutorConfig(threads=1, attention_backend=backend),  # type: ignore[arg-type]
    )


def built(config: Config) -> TorchExecutor:
    executor = build_executor(config, open_checkpoint(config.model.path), lambda phase: None)
    assert isinstance(executor, TorchExecutor)
    return executor


def test_a_model_that_can_runs_on_them(directory: Path, best_library: Library) -> None:
    for backend in ("auto", "native"):
        executor = built(config(directory, backend=backend))
        assert isinstance(executor.model, NativeDecoder)
        assert executor.facts["kernels"] == f"native, {best_library.description}"


@pytest.mark.parametrize("in_gguf", [False, True])
def test_float16_weights_stay_what_they_are(tmp_path: Path, best_library: Library, in_gguf: bool) -> None:
    model = llama(vocab_size=259, **SIZES)
    if in_gguf:
        save_gguf(tmp_path / "model.gguf", model, Kind.F16)
    else:
        save_llama(tmp_path, vocab_size=259, **SIZES)
        facts = tmp_path / "config.json"
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"dtype": "float16"}))
    executor, checkpoint = built(config(tmp_path, dtype="auto")), open_checkpoint(str(tmp_path))
    assert executor.facts["dtype"] == "float16"
    assert executor.facts["kernels"] == f"native, {best_library.description}"
    assert isinstance(executor.model, NativeDecoder) and executor.model.kinds == {c.FLOAT16}
    assert not build_native.has_int8_cache(config(tmp_path, dtype="auto"), checkpoint)
    said = build_native.native_weight_bytes(config(tmp_path, dtype="auto"), checkpoint)
    assert 0.95 * said < executor.model.num_bytes < 1.1 * said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_size": 8}, "cache.block_size is not a multiple of 16"),
        ({"dtype": "float32"}, "the model's dtype is float32"),
    ],
)
def test_what_they_cannot_runs_on_torch_and_is_refused_by_name(
    directory: Path, best_library: Library, change: dict[str, Any], reason: str
) -> None:
    executor = built(config(directory, **change))
    assert isinstance(executor.model, DecoderForCausalLM)
    assert executor.facts["kernels"] == f"torch: {reason}"
    with pytest.raises(StartupError) as caught:
        built(config(directory, backend="native", **change))
    assert caught.value.message == (
        f"executor.attention_backend = native cannot run this model: {reason}; set it to auto"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_size": 48}, "the hidden size 48 is not a multiple of 32"),
        ({"intermediate_size": 80}, "the intermediate size 80 is not a multiple of 32"),
        ({"head_dim": 48}, "the head size 48 is not a multiple of 32"),
        ({"head_dim": 544}, "the head size 544 is above 512"),
        (
            {"family": "qwen3_moe", "intermediate_size": 80},
            "the experts' intermediate size 24 is not a multiple of 32",
        ),
    ],
)
def test_models_of_other_shapes_are_not_for_them(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    save_llama(tmp_path, **{**SIZES, **change})
    architecture = msgspec.structs.replace(open_checkpoint(str(tmp_path)).architecture, dtype="bfloat16")
    found = build_native.find_native(config(tmp_path), architecture, on_gpu=False)
    assert isinstance(found, str) and reason in found


def with_cache(config: Config, dtype: str) -> Config:
    return msgspec.structs.replace(config, cache=msgspec.structs.replace(config.cache, kv_cache_dtype=dtype))


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        (Kind.Q4_1, "auto", True),
        (Kind.Q8_0, "auto", True),
        (Kind.Q8_0, "model", False),
        (Kind.BF16, "auto", False),
        (Kind.BF16, "int8", True),
    ],
)
def test_quantized_weights_have_keys_and_values_in_8_bits_unless_told_otherwise(
    tmp_path: Path, best_library: Library, kind: Kind, dtype: str, expected: bool
) -> None:
    save_gguf(tmp_path / "model.gguf", llama(**SIZES), kind)
    settings = with_cache(config(tmp_path), dtype)
    executor = built(settings)
    a, capacity = executor.model.architecture, executor.capacity
    wide = 2 * 2 * 16 * a.num_kv_heads * a.head_dim
    assert [cache.nbytes < 0.6 * capacity.num_blocks * wide for cache in executor.kv_caches] == [
        expected
    ] * a.num_layers
    assert ("in 8 bits" in executor.facts["kv"]) == expected
    # What start-up plans with is what there is.
    num_bytes = sum(cache.nbytes for cache in executor.kv_caches) // (capacity.num_blocks * capacity.block_size)
    assert build_native.native_kv_bytes_per_token(settings, open_checkpoint(str(tmp_path)), best_library) == num_bytes


def test_8_bits_without_the_kernels_are_refused_with_the_reason(directory: Path) -> None:
    asked = with_cache(config(directory, backend="torch"), "int8")
    with pytest.raises(StartupError, match=r"cache\.kv_cache_dtype = int8 .*attention_backend = torch"):
        built(asked)


def test_torch_by_name_is_torch(directory: Path) -> None:
    executor = built(config(directory, backend="torch"))
    assert isinstance(executor.model, DecoderForCausalLM)
    assert executor.facts["kernels"] == "torch: executor.attention_backend = torch"


def test_a_gpu_is_not_for_them(directory: Path) -> None:
    architecture = open_checkpoint(str(directory)).architecture
    assert build_native.find_native(config(directory), architecture, on_gpu=True) == "on a GPU"
    with pytest.raises(StartupError, match="native cannot run this model: on a GPU; set it to auto"):
        build_native.find_native(config(directory, backend="native"), architecture, on_gpu=True)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(frozenset(), "no build for this processor"), (frozenset({"avx2", "fma", "f16c", "of a test"}), NOT_BUILT)],
    ids=["no AVX2", "no compiler"],
)
def test_without_a_library_there_is_torch(
    directory: Path, monkeypatch: pytest.MonkeyPatch, flags: frozenset[str], reason: str
) -> None:
    monkeypatch.setattr(host, "cpu_flags", lambda root=None: flags)
    monkeypatch.setattr(builds, "build_file", lambda name: None)
    executor = built(config(directory))
    assert isinstance(executor.model, DecoderForCausalLM)
    assert executor.facts["kernels"] == f"torch: {reason}"
    with pytest.raises(StartupError, match=re.escape(f"native cannot run this model: {reason}; set it to auto")):
        built(config(directory, backend="native"))


def test_the_best_build_for_a_processor_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worse = ""
    monkeypatch.setattr(builds, "open_build", lambda name: name)
    monkeypatch.setattr(builds, "why_worse", lambda name, other: worse)
    for name, needed, _ in BUILDS:
        assert find_library(frozenset(needed | {"of another test"})) == name
        for flag in needed & {"amx_int8", "avx512_bf16", "avx512_vnni", "avx2"}:
            assert find_library(frozenset(needed - {flag} | {"of another test"})) != name
    everything = frozenset.union(*(frozenset(needed) for _, needed, _ in BUILDS))
    assert find_library(everything | {"another test"}) == "amx"
    assert not caplog.messages
    worse = "they differ"
    assert find_library(everything | {"AuthenticAMD", "of another test"}) == "avx512_bf16"
    assert find_library(everything | {"GenuineIntel", "of another test"}) == "avx512"
    assert caplog.messages == ["the kernels for AVX-512 with bfloat16 and AMX are not used: they differ"] * 2


def test_no_build_is_made_of_another_one_s_objects() -> None:
    # They come from one source, compiled at the same time: what is linked from the same objects has the same bytes.
    files = [builds.build_file(name) for name, _, _ in BUILDS]
    assert None not in files, NOT_BUILT
    assert len({file.read_bytes() for file in files if file}) == len(BUILDS)


def test_a_build_that_is_not_there_leaves_the_next_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = {"avx512": None, "avx2": Path("avx2.so")}
    monkeypatch.setattr(builds, "build_file", found.get)
    monkeypatch.setattr(builds, "Library", lambda file, description: file)
    assert find_library(frozenset(AVX512 | {"avx2", "fma", "f16c", "of a fifth test"})) == found["avx2"]
    assert caplog.messages == [f"the kernels for AVX-512 are not used: {NOT_BUILT}"]


def test_a_build_that_the_system_forbids_leaves_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, file = tmp_path / "forbidden.c", tmp_path / "forbidden.so"
    source.write_text(
        f'const char *asyncllm_sources(void) {{ return "{sources_digest()}"; }}\n'
        "int asyncllm_permitted(void) { return 0; }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", file], check=True, timeout=60)
    with pytest.raises(OSError, match="the system does not let this process use it"):
        Library(file, "another one's")
    build_file = builds.build_file
    monkeypatch.setattr(builds, "build_file", lambda name: file if name == "amx" else build_file(name))
    everything = frozenset.union(*(frozenset(needed) for _, needed, _ in BUILDS))
    found = find_library(everything | {"of a sixth test"})
    assert isinstance(found, Library) and found.description == "AVX-512 with bfloat16"


def test_tiles_are_tried_before_they_are_used(emulated_tiles: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    other = open_build("avx512")
    ran: list[Library] = []
    run = Trial.run

    def count(trial: Trial) -> None:
        run(trial)
        ran.append(trial.library)
        trial.least_ns = 10 if trial.library is faster else 20

    monkeypatch.setattr(Trial, "run", count)
    faster = emulated_tiles
    assert why_worse(emulated_tiles, other) == ""
    assert len(ran) == 30 and ran[:2] == [emulated_tiles, other]
    faster = other
    assert why_worse(emulated_tiles, other) == "products with Q4_1 weights take 2.0 times as long"


@pytest.mark.parametrize(
    ("kind", "factor"), [("Q4_1", 1.0 + 1e-6), ("Q8_0", 1.0 + 1e-6), ("BF16", 1.02), ("Q4_1", math.nan)]
)
def test_tiles_with_other_results_are_not_used(
    emulated_tiles: Library, monkeypatch: pytest.MonkeyPatch, kind: str, factor: float
) -> None:
    other = open_build("avx512")
    run = Trial.run

    def change(trial: Trial) -> None:
        run(trial)
        if trial.library is emulated_tiles:
            trial.least_ns = 0
            trial.products.flat[trial.products.argmax()] *= factor if trial.kind == kind else 1.0

    monkeypatch.setattr(Trial, "run", change)
    assert why_worse(emulated_tiles, other).startswith(f"products with {kind} weights differ from those of AVX-512 by ")


@pytest.mark.parametrize(
    "digest", ['const char *asyncllm_sources(void) { return "0123456789abcdef"; }', "int another;"]
)
def test_a_library_of_other_sources_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, file = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(f"{digest}\n")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", file], check=True, timeout=60)
    refusal = "other.so was built from other sources: install the package again"
    with pytest.raises(OSError) as caught:
        Library(file, "another one's")
    assert str(caught.value) == refusal
    monkeypatch.setattr(builds, "build_file", lambda name: file)
    assert find_library(frozenset({"avx2", "fma", "f16c", "of a third test", digest})) == refusal


def test_a_file_that_is_no_library_is_a_reason_for_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.so").write_bytes(b"not one")
    monkeypatch.setattr(builds, "build_file", lambda name: tmp_path / "broken.so")
    found = find_library(frozenset({"avx2", "fma", "f16c", "of a fourth test"}))
    assert isinstance(found, str) and "broken.so" in found and "\n" not in found


def test_memory_of_the_weights_is_about_what_was_said(directory: Path, best_library: Library) -> None:
    checkpoint = open_checkpoint(str(directory))
    asked = config(directory)
    executor = built(asked)
    assert isinstance(executor.model, NativeDecoder)
    # All but the few biases and norms are packed, the head in whole groups of 16 outputs.
    said = build_native.native_weight_bytes(asked, checkpoint)
    assert 0.95 * said < executor.model.num_bytes < 1.05 * said


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.Q5_0])
def test_memory_of_blocks_is_about_what_was_said(tmp_path: Path, best_library: Library, kind: Kind) -> None:
    save_gguf(tmp_path / "model.gguf", llama(vocab_size=259, **SIZES), kind)
    executor, checkpoint = built(config(tmp_path)), open_checkpoint(str(tmp_path))
    assert isinstance(executor.model, NativeDecoder)
    said = build_native.native_weight_bytes(config(tmp_path), checkpoint)
    assert 0.85 * said < executor.model.num_bytes < 1.15 * said


def test_eight_prompts_have_the_greedy_tokens_together_that_they_have_alone(best_library: Library) -> None:
    prompts = [
        "The capital of France is", "Once upon a time", "Water boils at", "def add(a, b):", "One, two, three,",
        "The sea was calm when the boat left the harbour in the morning, and the fishermen hoped that", "My name is",
        "Rome was not built in a day. " * 5,
    ]  # fmt: skip
    options = {"max_context_length": 256, "num_blocks": 64, "max_sequences": 8, "max_batched_tokens": 48, "threads": 2}
    with LLM("smollm2-135m-instruct", **options) as llm:
        assert llm.facts["kernels"] == f"native, {best_library.description}"
        limits = {"max_tokens": 10, "temperature": 0.0, "ignore_eos": True}
        together = [output.choices[0].token_ids for output in llm.generate(prompts, **limits)]
        alone = [llm.generate(prompt, **limits)[0].choices[0].token_ids for prompt in prompts]
        # Only these have their logits written down.
        scored = [output.choices[0].token_ids for output in llm.generate(prompts, logprobs=1, **limits)]
        forbidden = {tokens[0]: -100.0 for tokens in together}
        others = [output.choices[0].token_ids for output in llm.generate(prompts, logit_bias=forbidden, **limits)]
    assert together == alone == scored
    assert not {tokens[0] for tokens in together} & {token for tokens in others for token in tokens}
    assert len({tuple(tokens) for tokens in together}) == 8
    assert all(len(tokens) == 10 for tokens in together)
