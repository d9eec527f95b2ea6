"""Hugging Face directories: good, sharded, and broken in every way that downloads break."""

import gc
import json
import struct
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncllm.attention.torch_attention import TorchAttention
from asyncllm.errors import StartupError
from asyncllm.models.registry import build_model
from asyncllm.weights.base import SamplingDefaults
from asyncllm.weights.checkpoint import open_checkpoint
from asyncllm.weights.loader import load_model
from tests.models.paged import PagedRunner
from tests.weights.tiny import save_llama


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys, or remove those set to None."""
    values = json.loads(file.read_text()) if file.is_file() else {}
    values.update(changes)
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def load(directory: Path) -> Any:
    return load_model(open_checkpoint(str(directory)), TorchAttention(), torch.float32, torch.device("cpu"))


def refusal(directory: Path) -> str:
    """The one line with which opening or loading fails."""
    with pytest.raises(StartupError) as caught:
        load(directory)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_sharded_checkpoint_loads_like_a_single_file(tmp_path: Path) -> None:
    for name, shard_size in (("one", "1GB"), ("many", "30KB")):
        (tmp_path / name).mkdir()
        save_llama(tmp_path / name, shard_size=shard_size)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = open_checkpoint(str(tmp_path / "one")), open_checkpoint(str(tmp_path / "many"))
    assert one.num_bytes == many.num_bytes == one.architecture.num_parameters * 4
    ours, theirs = dict(many.tensors()), dict(one.tensors())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_default_name_is_the_directory(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    save_llama(tmp_path / "my-model")
    assert open_checkpoint(str(tmp_path / "my-model") + "/").name == "my-model"


def test_rope_theta_is_read_from_its_old_and_its_new_place(tmp_path: Path) -> None:
    save_llama(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 250000.0})
    assert open_checkpoint(str(tmp_path)).architecture.rope_theta == 250000.0
    edit_json(tmp_path / "config.json", rope_parameters=None, rope_theta=1234.5)
    assert open_checkpoint(str(tmp_path)).architecture.rope_theta == 1234.5
    edit_json(tmp_path / "config.json", rope_theta=None)
    assert open_checkpoint(str(tmp_path)).architecture.rope_theta == 10000.0


def test_every_eos_id_is_collected_once_with_the_tokenizers_own_first(tmp_path: Path) -> None:
    save_llama(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", eos_token="</s>", bos_token={"content": "<s>"})
    edit_json(tmp_path / "generation_config.json", eos_token_id=[7, 2])
    edit_json(tmp_path / "config.json", eos_token_id=9)
    text = open_checkpoint(str(tmp_path)).text
    assert text.eos_token_ids == (2, 7, 9)
    assert (text.bos_token, text.bos_token_id, text.eos_token, text.add_bos) == ("<s>", 1, "</s>", False)
    assert text.special_tokens == ("<unk>", "<s>", "</s>")


def test_the_chat_template_file_wins_over_the_setting(tmp_path: Path) -> None:
    save_llama(tmp_path)
    assert open_checkpoint(str(tmp_path)).text.chat_template is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "named"}]
    edit_json(tmp_path / "tokenizer_config.json", chat_template=named)
    assert open_checkpoint(str(tmp_path)).text.chat_template == "named"
    edit_json(tmp_path / "tokenizer_config.json", chat_template="setting")
    assert open_checkpoint(str(tmp_path)).text.chat_template == "setting"
    (tmp_path / "chat_template.jinja").write_text("file {{ ü }}")
    assert open_checkpoint(str(tmp_path)).text.chat_template == "file {{ ü }}"


def test_a_tokenizer_that_adds_bos_is_noticed(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    save_llama(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(file)
    edit_json(tmp_path / "tokenizer_config.json", bos_token="<s>", add_bos_token=False)
    assert open_checkpoint(str(tmp_path)).text.add_bos


def test_a_tied_weight_stored_twice_and_rotary_tables_are_tolerated(tmp_path: Path) -> None:
    reference = save_llama(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, file)
    with torch.inference_mode():
        expected = reference(torch.tensor([[5, 6, 7]])).logits[0]
    torch.testing.assert_close(PagedRunner(load(tmp_path)).step([("a", [5, 6, 7])])[0], expected, rtol=1e-4, atol=1e-4)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, file)
    assert "missing tensors (1): model.layers.1.self_attn.k_proj.weight" in refusal(tmp_path)


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.self_attn.q_norm.weight": torch.ones(12)}, file)
    assert "unexpected tensors (1): model.layers.0.self_attn.q_norm.weight" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj.weight", "model.norm.weight"])
def test_a_tensor_of_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path, name: str) -> None:
    save_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    shape = list(tensors[name].shape)
    tensors[name] = torch.ones(shape[0] + 1, *shape[1:])
    save_file(tensors, file)
    message = refusal(tmp_path)
    assert f"tensor {name} has shape {[shape[0] + 1, *shape[1:]]}, expected {shape}" in message


def stack_experts(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint of single experts as transformers keeps them in memory, and some of its versions on disk."""
    stacked = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    layers = sorted({name.partition(".experts.")[0] for name in stored if ".experts." in name})
    for layer in (f"{path}.experts" for path in layers):
        indices = range(sum(name.startswith(layer) and name.endswith("up_proj.weight") for name in stored))
        gate, up, down = (
            torch.stack([stored[f"{layer}.{index}.{part}_proj.weight"] for index in indices])
            for part in ("gate", "up", "down")
        )
        stacked |= {f"{layer}.gate_up_proj": torch.cat((gate, up), dim=1), f"{layer}.down_proj": down}
    return stacked


def test_stacked_experts_load_like_single_ones(tmp_path: Path) -> None:
    save_llama(tmp_path, family="qwen3_moe")
    file = tmp_path / "model.safetensors"
    stored, single = load_file(file), load(tmp_path)
    stacked = stack_experts(stored)
    assert len(stacked) < len(stored)
    save_file(stacked, file)
    ours, theirs = load(tmp_path).state_dict(), single.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_experts_that_are_missing_too_many_or_laid_out_otherwise_are_named(tmp_path: Path) -> None:
    save_llama(tmp_path, family="qwen3_moe")
    file = tmp_path / "model.safetensors"
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file is about to be replaced
    experts = "model.layers.1.mlp.experts"
    save_file({name: tensor for name, tensor in stored.items() if name != f"{experts}.3.up_proj.weight"}, file)
    assert f"missing tensors (1): {experts}.3.up_proj.weight" in refusal(tmp_path)
    save_file(stored | {f"{experts}.5.up_proj.weight": torch.ones(24, 48)}, file)
    assert f"unexpected tensors (1): {experts}.5.up_proj.weight" in refusal(tmp_path)
    turned = stack_experts(stored)
    turned[f"{experts}.down_proj"] = turned[f"{experts}.down_proj"].transpose(1, 2).contiguous()
    save_file(turned, file)
    assert f"tensor {experts}.down_proj has shape [5, 24, 48], expected [5, 48, 24]" in refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1, -1000])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    save_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:size])
    assert "model.safetensors: truncated" in refusal(tmp_path)


@pytest.mark.parametrize(
    "header", [b"not json", b"[]", b'{"w": 3}', b'{"w": {"dtype": "F32"}}', b'{"w":{"data_offsets":[0]}}']
)
def test_a_header_of_rubbish_is_refused(tmp_path: Path, header: bytes) -> None:
    save_llama(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "damaged" in refusal(tmp_path)


def test_a_quantized_dtype_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "model.norm.weight": torch.ones(48, dtype=torch.int8)}, file)
    assert "tensor model.norm.weight has dtype I8; served: F32, F16, BF16" in refusal(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path, shard_size="30KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"shard {shard.name} is missing" in refusal(tmp_path)


def test_an_index_may_not_lead_out_of_the_directory(tmp_path: Path) -> None:
    save_llama(tmp_path, shard_size="30KB")
    edit_json(tmp_path / "model.safetensors.index.json", weight_map={"w": "../elsewhere.safetensors"})
    assert "shard ../elsewhere.safetensors is not a plain file name" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "architecture MambaForCausalLM is not served; served: LlamaForCausalLM",
        ),
        ({"architectures": None}, "architecture llama is not served"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "missing required field `low_freq_factor`"),
        (
            {"rope_scaling": {"type": "proportional"}},
            "rope scaling proportional is not served; served: default, linear",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization gptq is not served"),
        ({"hidden_act": "mish"}, "hidden_act mish is not served; served: silu"),
        ({"dtype": "float8_e4m3fn"}, "dtype float8_e4m3fn is not served"),
        ({"hidden_size": None}, "missing required field `hidden_size`"),
        ({"num_hidden_layers": "two"}, "Expected `int`"),
        ({"num_attention_heads": 0}, "Expected `int` >= 1"),
    ],
)
def test_a_configuration_that_is_not_served_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    save_llama(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    assert words in refusal(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_a_damaged_json_file_is_named(tmp_path: Path, file: str, content: str) -> None:
    save_llama(tmp_path)
    (tmp_path / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert file in refusal(tmp_path)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refusal(tmp_path)


def test_a_tokenizer_of_an_older_kind_is_converted(tmp_path: Path) -> None:
    save_llama(tmp_path)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", eos_token="</s>")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.tokenizer().encode("ab").ids == [vocabulary["a"], vocabulary["b"]]
    assert checkpoint.text.eos_token_ids[0] == 2


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_by_name(tmp_path: Path, name: str) -> None:
    save_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    assert f"{tmp_path / name}: pickled weights can run any code and are never loaded" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"quant_method": "awq", "bits": 4}, "quantization awq (4 bits) is"),
        ({"quant_method": "gptq", "bits": 8}, "quantization gptq (8 bits) is"),
        ({"quant_method": "fp8", "fmt": "e4m3"}, "quantization fp8 (e4m3) is"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantization bitsandbytes (4 bits) is"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors (pack-quantized) is"),
        ("int4", "quantization unknown is"),
    ],
)
def test_a_quantized_checkpoint_is_refused_by_its_method(tmp_path: Path, table: object, said: str) -> None:
    save_llama(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=table)
    message = refusal(tmp_path)
    assert said in message and "config.json" in message and "not served in safetensors; use a .gguf file" in message


@pytest.mark.parametrize(("file", "method"), [("quantize_config.json", "gptq"), ("hf_quant_config.json", "modelopt")])
def test_a_quantization_that_only_a_side_file_tells_is_seen(tmp_path: Path, file: str, method: str) -> None:
    save_llama(tmp_path)
    (tmp_path / file).write_text("{}")
    assert f"quantization {method} is not served" in refusal(tmp_path)


def test_an_index_that_contradicts_its_shards_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path, shard_size="30KB")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))[:2]
    moved = next(name for name, shard in weight_map.items() if shard == first)
    edit_json(index, weight_map=weight_map | {moved: second})
    assert f"index.json: tensor {moved} should be in {second}, but it is in {first}" in refusal(tmp_path)
    edit_json(index, weight_map=weight_map | {"ghost": second})
    assert f"tensor ghost should be in {second}, but no shard has it" in refusal(tmp_path)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path, shard_size="30KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    assert f"{second.name}: tensor {name} is in {first.name} as well" in refusal(tmp_path)


def test_a_header_whose_sizes_do_not_add_up_is_refused_on_opening(tmp_path: Path) -> None:
    save_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    assert data.count(b'"shape":[48]') > 1
    file.write_bytes(data.replace(b'"shape":[48]', b'"shape":[49]', 1))
    with pytest.raises(StartupError, match=r"damaged safetensors file: tensor .* is not where it should be"):
        open_checkpoint(str(tmp_path))


def test_a_load_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path, shard_size="30KB")
    checkpoint = open_checkpoint(str(tmp_path))
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    made: list[weakref.ref] = []

    def remembered(*arguments: Any) -> Any:
        made.append(weakref.ref(model := build_model(*arguments)))
        return model

    monkeypatch.setattr("asyncllm.weights.loader.build_model", remembered)
    with pytest.raises(StartupError, match=f"{last.name}: damaged safetensors file"):
        load_model(checkpoint, TorchAttention(), torch.float32, torch.device("cpu"))
    gc.collect()
    assert made and made[0]() is None


def test_generation_config_sets_sampling_defaults_unless_it_is_ignored(tmp_path: Path) -> None:
    save_llama(tmp_path)
    written = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None, "do_sample": False, "eos_token_id": [7]}
    edit_json(tmp_path / "generation_config.json", **written)
    text = open_checkpoint(str(tmp_path)).text
    assert text.sampling == SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20)
    assert str(text.sampling) == "temperature 0.6, top_p 0.95, top_k 20" and 7 in text.eos_token_ids
    ignored = open_checkpoint(str(tmp_path), generation_config="ignore").text
    assert ignored.sampling == SamplingDefaults() and 7 not in ignored.eos_token_ids
    assert str(ignored.sampling) == "neutral"
    edit_json(tmp_path / "generation_config.json", temperature="warm")
    assert "generation_config.json: temperature = warm" in refusal(tmp_path)
    assert open_checkpoint(str(tmp_path), generation_config="ignore").text.sampling == SamplingDefaults()


PEAK_PROGRAM = """
import sys, torch
from asyncllm.attention.torch_attention import TorchAttention
from asyncllm.models.registry import build_model
from asyncllm.weights.base import SamplingDefaults
from asyncllm.weights.checkpoint import open_checkpoint
from asyncllm.weights.loader import load_model

def figure(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

checkpoint = open_checkpoint(sys.argv[1])
import safetensors.torch
before = figure("VmRSS:")
load_model(checkpoint, TorchAttention(), torch.float32, torch.device("cpu"))
print(figure("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_loading_takes_the_weights_and_one_shard_at_its_peak(tmp_path: Path) -> None:
    save_llama(tmp_path, vocab_size=259)
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12}
    edit_json(tmp_path / "config.json", head_dim=64, num_key_value_heads=12, **sizes)
    (tmp_path / "model.safetensors").unlink()
    weights = dict(open_checkpoint(str(tmp_path), load_format="dummy").tensors())
    shards = [{name: weights[name] for name in list(weights)[part::6]} for part in range(6)]
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number}.safetensors"
        save_file(shard, tmp_path / file)
        weight_map |= dict.fromkeys(shard, file)
    edit_json(tmp_path / "model.safetensors.index.json", weight_map=weight_map)
    program = [sys.executable, "-c", PEAK_PROGRAM, str(tmp_path)]
    peak = int(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    largest, total = (
        max(file.stat().st_size for file in tmp_path.glob("*.safetensors")),
        4 * sum(tensor.numel() for tensor in weights.values()),
    )
    print(f"peak {peak / 2**20:.0f} MiB for {total / 2**20:.0f} MiB in shards of {largest / 2**20:.0f} MiB")
    assert largest < total / 4
    assert peak <= total + 1.6 * largest
