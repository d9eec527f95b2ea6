"""Adapter files: where they are looked for, and what is refused, in one line that names the file."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncllm.config import LoRAConfig
from asyncllm.errors import StartupError
from asyncllm.weights.hugging_face import architecture
from asyncllm.weights.lora import CONFIG_FILE, WEIGHTS_FILE, open_adapter
from asyncllm.weights.lora_stacks import AdapterPlan, install_adapters, plan_adapters
from tests.weights.adapters import save_adapter
from tests.weights.test_safetensors import edit_json, load
from tests.weights.tiny import save_llama

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an adapter of rank 4 in `sql` and one of rank 6 in `chat`."""
    directory = tmp_path_factory.mktemp("made")
    base = save_llama(directory)
    save_adapter(directory / "sql", base, 1, r=4, target_modules=TARGETS)
    save_adapter(directory / "chat", base, 2, r=6, target_modules=["k_proj", "down_proj"])
    return directory


@pytest.fixture
def files(made: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def plan(directory: Path, max_total_rank: int = 512, **adapters: str) -> AdapterPlan:
    places = adapters or {"sql": str(directory / "sql")}
    return plan_adapters(LoRAConfig(adapters=places, max_total_rank=max_total_rank), architecture(directory))


def refusal(directory: Path, *named: str, **settings: Any) -> str:
    """The one line a plan fails with; it holds all of `named`."""
    with pytest.raises(StartupError) as caught:
        plan(directory, **settings)
    assert "\n" not in caught.value.message
    for name in named:
        assert name in caught.value.message, caught.value.message
    return caught.value.message


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS_FILE)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS_FILE)


def test_adapters_lie_side_by_side_in_columns_of_their_ranks(made: Path) -> None:
    planned = plan(made, sql=str(made / "sql"), chat=str(made / "chat"))
    assert planned.spans == [(0, 4), (4, 10)] and planned.num_columns == 16
    assert planned.summary == "sql (rank 4), chat (rank 6)"
    both = planned.stacks["model.layers.1.mlp.down_proj"]
    assert both.blocks == [(0, 48)] and [placed.column for placed in both.placed] == [0, 4]
    stacked = planned.stacks["model.layers.0.self_attn.qkv_proj"]
    assert sorted(stacked.blocks) == [(0, 48), (48, 24), (72, 24)]  # q and v of the one, k of the other
    assert len(planned.stacks) == 4
    assert planned.num_values == 2 * 16 * (3 * (96 + 48) + (48 + 80))


def test_what_is_installed_takes_the_memory_that_was_planned(made: Path) -> None:
    planned, model = plan(made), load(made)
    before = sum(parameter.numel() for parameter in model.parameters())
    install_adapters(planned, model, torch.float32, torch.device("cpu"))
    assert sum(parameter.numel() for parameter in model.parameters()) - before == planned.num_values


def test_a_model_without_adapters_is_left_as_it_is(made: Path) -> None:
    model = load(made)
    before = {name: type(module) for name, module in model.named_modules()}
    assert install_adapters(None, model, torch.float32, torch.device("cpu")) is None
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_scales_follow_rank_alpha_and_their_patterns(files: Path) -> None:
    edit_json(files / "sql" / CONFIG_FILE, lora_alpha=6, alpha_pattern={"v_proj": 20, "0.mlp.down_proj": 2})
    scales = {layer.name: layer.scale for layer in open_adapter("sql", str(files / "sql")).layers}
    assert scales["model.layers.1.self_attn.v_proj"] == 5.0
    assert (scales["model.layers.0.mlp.down_proj"], scales["model.layers.1.mlp.down_proj"]) == (0.5, 1.5)
    edit_json(files / "sql" / CONFIG_FILE, use_rslora=True)
    scales = {layer.name: layer.scale for layer in open_adapter("sql", str(files / "sql")).layers}
    assert scales["model.layers.1.mlp.down_proj"] == 6 / math.sqrt(4)


def test_adapters_of_a_model_without_its_output_layer_find_their_places(files: Path) -> None:
    expected = plan(files).stacks
    edit_tensors(files / "sql", lambda tensors: rename(tensors, "base_model.model.model.", "base_model.model."))
    assert plan(files).stacks.keys() == expected.keys()


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in list(tensors):
        tensors[name.replace(old, new)] = tensors.pop(name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True), ("modules_to_save", ["lm_head"]), ("lora_bias", True), ("bias", "all"),
        ("bias", "lora_only"), ("target_parameters", ["mlp.experts.down_proj"]), ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 1]]), ("alora_invocation_tokens", [3]), ("use_qalora", True),
        ("arrow_config", {"top_k": 1}), ("init_lora_weights", "pissa"), ("init_lora_weights", "loftq"),
        ("peft_type", "LOHA"), ("some_new_key", 1), ("r", 0), ("r", "4"), ("rank_pattern", [1]),
    ],
)  # fmt: skip
def test_what_would_change_numbers_otherwise_is_refused_by_its_key(files: Path, key: str, value: Any) -> None:
    edit_json(files / "sql" / CONFIG_FILE, **{key: value})
    refusal(files, f"sql/{CONFIG_FILE}", key)


@pytest.mark.parametrize(("key", "value"), [("lora_dropout", 0.1), ("init_lora_weights", "gaussian"),
                                            ("task_type", None), ("fan_in_fan_out", True), ("use_dora", False),
                                            ("some_new_key", False)])  # fmt: skip
def test_what_changes_no_number_is_served(files: Path, key: str, value: Any) -> None:
    edit_json(files / "sql" / CONFIG_FILE, **{key: value})
    assert plan(files).adapters[0].rank == 4


def drop_half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{LAYER}.lora_B.weight"]


def other_rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.lora_A.weight"] = torch.zeros(5, 48)


def flat(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.lora_B.weight"] = torch.zeros(4)


def other_base(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.lora_A.weight"] = torch.zeros(4, 64)


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.lora_A.weight"] = torch.zeros(4, 48, dtype=torch.int8)


def output_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 48)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.zeros(96, 4)


def embedding(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(4, 96)


def a_third_layer(tensors: dict[str, torch.Tensor]) -> None:
    rename(tensors, "layers.1.", "layers.2.")


def twice(tensors: dict[str, torch.Tensor]) -> None:
    for letter in "AB":
        name = f"{LAYER}.lora_{letter}.weight"
        tensors[name.replace("model.model.model.", "model.model.")] = tensors[name].clone()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_half, [f"{LAYER}.lora_A.weight is there without lora_B"]),
        (other_rank, [f"{LAYER}.lora_A.weight has shape [5, 48]", "rank 4"]),
        (flat, [f"{LAYER}.lora_B.weight has shape [4]"]),
        (other_base, [f"{LAYER}.lora_A.weight has shape [4, 64]", "48 inputs", "another model"]),
        (integers, ["dtype I8", "F32, F16, BF16"]),
        (output_layer, ["no layer lm_head", "not embeddings, the output layer or experts"]),
        (embedding, ["embed_tokens.lora_embedding_A is not served"]),
        (a_third_layer, ["no layer model.layers.2."]),
        (twice, ["model.layers.0.self_attn.q_proj and", "are one layer"]),
        (dict.clear, ["it holds no tensors"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_tensors_that_do_not_fit_are_refused_with_file_and_name(files: Path, damage: Any, words: list[str]) -> None:
    edit_tensors(files / "sql", damage)
    refusal(files, f"sql/{WEIGHTS_FILE}", *words)


def test_layers_to_transform_must_be_the_layers_there_are(files: Path) -> None:
    edit_json(files / "sql" / CONFIG_FILE, layers_to_transform=[1])
    refusal(files, f"sql/{WEIGHTS_FILE}", "layers_to_transform names 1,", "for layers 0, 1")
    edit_json(files / "sql" / CONFIG_FILE, layers_to_transform=[0, 1])
    assert plan(files).stacks


def test_a_truncated_file_is_refused_with_its_name(files: Path) -> None:
    file = files / "sql" / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-10])
    refusal(files, f"sql/{WEIGHTS_FILE}", "truncated")


def test_a_pickle_is_not_loaded(files: Path) -> None:
    (files / "sql" / WEIGHTS_FILE).rename(files / "sql" / "adapter_model.bin")
    refusal(files, f"no {WEIGHTS_FILE}", "pickled .bin files are never loaded")


def test_a_place_without_an_adapter_is_named_with_its_key(files: Path) -> None:
    refusal(files, "lora.adapters.sql: no such directory", "nowhere/to/be/found", sql="nowhere/to/be/found")
    refusal(files, "lora.adapters.sql", f"has no {CONFIG_FILE}", sql=str(files))
    refusal(files, "lora.adapters.sql", "is a file: name the directory", sql=str(files / "sql" / WEIGHTS_FILE))
    (files / "sql" / CONFIG_FILE).write_text("[")
    refusal(files, f"sql/{CONFIG_FILE}: not valid JSON")


def test_ranks_above_the_bound_are_refused_with_their_sum(files: Path) -> None:
    places = {"sql": str(files / "sql"), "chat": str(files / "chat")}
    refusal(files, "4 + 6 = 10", "lora.max_total_rank = 9", max_total_rank=9, **places)
    assert plan(files, max_total_rank=10, **places).spans[-1] == (4, 10)


def test_a_bad_pattern_is_refused(files: Path) -> None:
    edit_json(files / "sql" / CONFIG_FILE, alpha_pattern={"(": 1})
    refusal(files, f"sql/{CONFIG_FILE}: rank_pattern or alpha_pattern")
