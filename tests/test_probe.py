"""`--probe`: what a checkpoint is, without loading it; served, not served, and broken."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncllm.config import CacheConfig, Config, ExecutorConfig, ModelConfig
from asyncllm.executor.host import cpu_flags
from asyncllm.executor.machine import Device, fit
from asyncllm.executor.memory import GIB
from asyncllm.native.builds import find_library
from asyncllm.probe import Probe, probe, report
from asyncllm.weights.checkpoint import open_checkpoint
from tests.weights.hub_server import Hub, hub_server
from tests.weights.test_safetensors import edit_json
from tests.weights.tiny import llama, save_gguf, save_llama


def looked_at(path: Path, config: Config | None = None) -> Probe:
    answer = probe(str(path), config or Config())
    assert "\n" not in answer.reason
    assert answer.name in report(answer)
    return answer


def test_a_served_directory_says_all_there_is_to_know(tmp_path: Path) -> None:
    save_llama(tmp_path, shard_size="30KB")
    edit_json(tmp_path / "tokenizer_config.json", chat_template="{{ messages }} <tool_call> </think>")
    edit_json(tmp_path / "generation_config.json", temperature=0.5)
    answer = looked_at(tmp_path)
    architecture = open_checkpoint(str(tmp_path)).architecture
    assert answer.served and answer.fits and answer.reason == ""
    assert (answer.architecture, answer.family, answer.format) == ("LlamaForCausalLM", "llama", "safetensors")
    assert answer.num_parameters == architecture.num_parameters == sum(answer.stored.values())
    assert answer.stored_bytes == 4 * architecture.num_parameters and answer.stored.keys() == {"F32"}
    assert (answer.num_layers, answer.hidden_size, answer.num_heads, answer.num_kv_heads) == (2, 48, 4, 2)
    assert (answer.context_length, answer.head_dim) == (512, 12)
    assert (answer.tool_format, answer.reasoning_format) == ("hermes", "think")
    assert answer.sampling_defaults["temperature"] == 0.5
    assert answer.memory["bfloat16"].weight_bytes == 2 * architecture.num_parameters
    assert answer.memory["float32"].kv_bytes_per_token == 2 * 2 * 2 * 12 * 4
    [cpu] = [fitted for fitted in answer.devices if fitted.device.name == "cpu"]
    assert cpu.num_sequences == {512: 256}, "as many as scheduler.max_sequences"
    text = report(answer)
    assert text.endswith("  served") and "tools hermes, thinking think" in text and "256 of 512" in text


def test_a_gguf_file_is_described_with_its_types() -> None:
    answer = probe("smollm2-135m-instruct", Config())
    assert answer.served and answer.format == "gguf" and answer.quantization == "Q4_1"
    assert answer.num_parameters == sum(answer.stored.values()) == 134_515_008
    assert list(answer.stored) == ["Q4_1", "Q8_0", "F32"]
    assert "Q4_1 79%, Q8_0 21%, F32 0%; 92.10 MiB" in report(answer)


def test_a_base_model_has_no_chat_template(tmp_path: Path) -> None:
    save_llama(tmp_path)
    answer = looked_at(tmp_path)
    assert answer.served and answer.has_chat_template is False and answer.tool_format is None
    assert "chat         none" in report(answer)


def test_what_is_not_served_is_described_as_far_as_its_files_go(tmp_path: Path) -> None:
    save_llama(tmp_path)
    edit_json(tmp_path / "config.json", architectures=["MambaForCausalLM"])
    answer = looked_at(tmp_path)
    assert not answer.served and not answer.fits and "architecture MambaForCausalLM is not served" in answer.reason
    assert (answer.architecture, answer.family, answer.num_layers) == ("MambaForCausalLM", None, 2)
    assert answer.num_parameters == sum(answer.stored.values()) > 0
    assert answer.memory["float16"].weight_bytes == 2 * answer.num_parameters
    assert answer.memory["float16"].kv_bytes_per_token == 2 * 2 * 2 * 12 * 2
    assert answer.devices == [] and "not served: " in report(answer)


def test_a_quantized_checkpoint_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "model.norm.qweight": torch.ones(48, dtype=torch.int32)}, file)
    answer = looked_at(tmp_path)
    assert answer.quantization == "awq (4 bits)" and answer.num_parameters is None and answer.memory == {}
    assert answer.stored["I32"] == 48 and "quantization awq (4 bits) is not served" in answer.reason


def test_a_gguf_type_that_is_not_served_is_named_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    save_gguf(path, llama(vocab_size=259))
    data = bytearray(path.read_bytes())
    place = data.index(b"blk.1.ffn_up.weight") + len("blk.1.ffn_up.weight") + 20
    data[place : place + 4] = (26).to_bytes(4, "little")
    path.write_bytes(data)
    answer = looked_at(path)
    assert "has type I32, which is not served" in answer.reason and answer.stored["I32"] == 48 * 80


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_broken_file_is_the_reason(tmp_path: Path, name: str) -> None:
    save_llama(tmp_path)
    (tmp_path / name).write_bytes(b"{")
    answer = looked_at(tmp_path)
    assert not answer.served and name in answer.reason


def test_a_model_that_fits_nowhere_is_served_but_does_not_fit(tmp_path: Path) -> None:
    save_llama(tmp_path)
    answer = looked_at(tmp_path, Config(model=ModelConfig(), cache=CacheConfig(memory_gib=100_000)))
    assert answer.served and not answer.fits
    assert "lower cache.memory_gib" in report(answer) and "fits no device" in report(answer)


def test_a_gpu_gets_the_share_that_the_configuration_gives_it(tmp_path: Path) -> None:
    save_llama(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    gpu = Device("cuda:0", "", 2 * GIB, 2 * GIB)
    roomy = fit(checkpoint, Config(), gpu)
    assert roomy.problem == "" and roomy.num_sequences == {512: 256} and roomy.num_kv_tokens >= 256 * 512
    tight = fit(checkpoint, Config(cache=CacheConfig(memory_fraction=0.1)), gpu)
    assert "cache.memory_fraction" in tight.problem and tight.num_kv_tokens == 0
    full = fit(checkpoint, Config(), Device("cuda:0", "", 2 * GIB, 1000))
    assert "weights need" in full.problem
    assert roomy.kernels == tight.kernels == full.kernels == "", "kernels are a choice on a CPU only"


def test_a_cpu_says_which_kernels_would_run_the_model_and_why_not(tmp_path: Path) -> None:
    save_llama(tmp_path)
    cpu = Device("cpu", "", 2 * GIB, 2 * GIB)
    odd = fit(open_checkpoint(str(tmp_path)), Config(model=ModelConfig(dtype="bfloat16")), cpu)
    assert odd.kernels == "torch: the hidden size 48 is not a multiple of 32"
    checkpoint, asked = open_checkpoint("smollm2-135m-instruct"), ExecutorConfig(attention_backend="torch")
    on_torch = fit(checkpoint, Config(executor=asked), cpu)
    assert on_torch.kernels == "torch: executor.attention_backend = torch"
    assert on_torch.weight_bytes > 2 * checkpoint.architecture.num_parameters
    assert f"kernels: {fit(checkpoint, Config(), cpu).kernels}; weights " in report(
        probe("smollm2-135m-instruct", Config())
    )


@pytest.mark.skipif(isinstance(find_library(cpu_flags()), str), reason="no native kernels for this processor")
def test_blocks_that_the_native_kernels_read_are_counted_as_they_lie_in_memory() -> None:
    cpu, checkpoint = Device("cpu", "", 2 * GIB, 2 * GIB), open_checkpoint("smollm2-135m-instruct")
    native = fit(checkpoint, Config(), cpu)
    assert native.kernels.startswith("native, AVX") and native.dtype == "bfloat16"
    in_bfloat16 = fit(checkpoint, Config(model=ModelConfig(quantization="none")), cpu)
    assert checkpoint.num_bytes < native.weight_bytes < 0.6 * in_bfloat16.weight_bytes
    num_parameters = checkpoint.architecture.num_parameters  # a tied embedding is there once
    assert 1.5 * num_parameters < in_bfloat16.weight_bytes < 1.7 * num_parameters


def test_native_kernels_asked_for_by_name_are_a_device_s_problem_where_they_cannot_run(tmp_path: Path) -> None:
    save_llama(tmp_path)
    answer = looked_at(tmp_path, Config(executor=ExecutorConfig(attention_backend="native")))
    [cpu] = [fitted for fitted in answer.devices if fitted.device.name == "cpu"]
    assert answer.served and cpu.kernels == "" and cpu.num_kv_tokens == 0
    assert cpu.problem == (
        "executor.attention_backend = native cannot run this model: the model's dtype is float32; set it to auto"
    )


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as hub:
        yield hub


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-m", "asyncllm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=inherited | environment)


def test_the_command_probes_a_hub_name_without_its_weights(hub: Hub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_llama(model, shard_size="30KB")
    hub.add("owner/tiny", model)
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    done = run("--probe", "owner/tiny", "--json", **environment)
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and answer["served"] and answer["stored"] == {"F32": answer["num_parameters"]}
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / "pytorch_model.bin").touch()
    done = run("--probe", "owner/tiny", **environment)
    assert done.returncode == 1 and "not served: owner/tiny on the hub has no .safetensors file" in done.stdout


def test_the_command_says_in_its_exit_status_whether_a_model_is_served(tmp_path: Path) -> None:
    done = run("--probe", "smollm2-135m-instruct")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.endswith("  served\n")
    done = run("--probe", str(tmp_path / "nothing"))
    assert done.returncode == 1 and done.stdout.endswith("nothing\n") and "Traceback" not in done.stderr
    assert run("--json").returncode == 2
