"""config.json of each family: what published files say and leave out, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest

from asyncllm.errors import StartupError
from asyncllm.models.config import LayerKind, LinearScaling, LongRopeScaling, ModelArchitecture, YarnScaling
from asyncllm.weights.families import FAMILIES, read_architecture
from tests.weights.tiny import TINY

FILE = Path("some/config.json")
GPT2 = {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4}
# What turns the tiny configuration into one with everything that its family knows.
EVERYTHING: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64},
        "head_dim": 12, "attention_bias": True, "mlp_bias": True, "dtype": "bfloat16"},
    "MistralForCausalLM": {"sliding_window": 6, "rope_theta": 1e6},
    "SmolLM3ForCausalLM": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 4,
                           "no_rope_layers": [1, 0], "layer_types": ["full_attention", "sliding_attention"]},
    "Qwen2ForCausalLM": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
                         "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "Qwen3ForCausalLM": {"head_dim": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "Qwen3MoeForCausalLM": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                            "mlp_only_layers": [0], "decoder_sparse_step": 1, "norm_topk_prob": True},
    "Phi3ForCausalLM": {
        "sliding_window": 9, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}},
    "Starcoder2ForCausalLM": {"sliding_window": 9, "use_bias": True, "norm_epsilon": 1e-5, "rope_theta": 1e6},
    "GemmaForCausalLM": {"head_dim": 12, "hidden_act": "gelu", "hidden_activation": None},
    "Gemma2ForCausalLM": {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 24,
                          "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                          "use_bidirectional_attention": None},
    "Gemma3ForCausalLM": {
        "head_dim": 12, "sliding_window": 6, "sliding_window_pattern": 2, "rope_local_base_freq": 1e4,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "Gemma3ForConditionalGeneration": {"text_config": {"hidden_size": 64, "intermediate_size": 96,
                                                       "num_hidden_layers": 6, "head_dim": 8}},
    "OPTForCausalLM": {"ffn_dim": 80, "word_embed_proj_dim": 48, "do_layer_norm_before": True},
    "GPT2LMHeadModel": GPT2 | {"n_inner": 64, "activation_function": "gelu_new", "n_positions": 128},
}  # fmt: skip


def read(name: str, **changes: Any) -> ModelArchitecture:
    """The tiny configuration, changed."""
    return read_architecture(FILE, TINY | {"architectures": [name]} | changes)


def refusal(name: str, **changes: Any) -> str:
    with pytest.raises(StartupError) as caught:
        read(name, **changes)
    assert caught.value.message.startswith(f"{FILE}: ") and "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("name", FAMILIES)
def test_whatever_stands_in_a_key_is_served_or_refused_in_one_line(name: str) -> None:
    config = TINY | EVERYTHING[name]
    read(name, **config)
    tables = {key for key, value in config.items() if isinstance(value, dict)}
    num_refused = 0
    for value in (None, 0, -3, 10**9, 0.5, "", "nonsense", [], [-1], ["x"], {}, {"x": {}}, True, math.nan):
        changes = [{key: value} for key in config]
        for table in tables:
            changes += [{table: config[table] | {key: value}} for key in config[table]]
        for change in changes:
            try:
                read(name, **{**config, **change}).num_parameters  # noqa: B018
            except StartupError as error:
                num_refused += 1
                assert error.message.startswith(f"{FILE}: ") and "\n" not in error.message
    assert num_refused > 50


def test_an_architecture_of_no_family_is_refused_with_those_served() -> None:
    message = refusal("MambaForCausalLM")
    assert message == f"{FILE}: architecture MambaForCausalLM is not served; served: {', '.join(FAMILIES)}"
    assert "architecture None is not served" in refusal("x", architectures=3)
    assert "architecture mamba is not served" in refusal("x", architectures=[], model_type="mamba")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("LlamaForCausalLM", {"hidden_act": "mish"}, "hidden_act mish is not served; served: silu"),
        ("LlamaForCausalLM", {"dtype": "int8"}, "dtype int8 is not served; served: float32, bfloat16, float16"),
        ("LlamaForCausalLM", {"num_key_value_heads": 3}, "4 query heads cannot share 3 key-value heads"),
        ("LlamaForCausalLM", {"head_dim": 7}, "rope over 7 of 7 dimensions is not served: both must be even"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "xpos"}}, "rope scaling xpos is not served; served: default,"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "linear"}}, "the factor of rope scaling linear = None"),
        ("LlamaForCausalLM", {"rope_parameters": {"full_attention": {}}}, "for each layer type are not served"),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "layer_types": ["full_attention", "chunked_attention"]},
         "layer_types: chunked_attention is not served; served: full_attention, sliding_attention"),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "layer_types": []}, "layer_types has 0 entries for 2 layers"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 2 layers"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 6}},
         "short_factor has 1 entries for 6 frequencies"),
        ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention = true is not served"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not served"),
        ("Gemma3ForConditionalGeneration", {}, "text_config is missing"),
        ("OPTForCausalLM", {"ffn_dim": 80, "do_layer_norm_before": False}, "layer norms behind the branches"),
        ("OPTForCausalLM", {"ffn_dim": 80, "word_embed_proj_dim": 8}, "word_embed_proj_dim = 8 is not served"),
        ("GPT2LMHeadModel", {**GPT2, "n_head": 5}, "a hidden size of 48 cannot be cut into 5 heads"),
        ("GPT2LMHeadModel", {**GPT2, "add_cross_attention": True}, "add_cross_attention = true is not served"),
        ("Qwen3MoeForCausalLM", {"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok = 3 of 2 experts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_would_change_the_answers_is_refused_by_name(name: str, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(name, **changes)


def test_gemma_3_files_that_name_few_sizes_get_those_of_transformers() -> None:
    # The text part of the 4B model, as published.
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "torch_dtype": "bfloat16"}
    a = read_architecture(FILE, raw)
    assert (a.vocab_size, a.num_heads, a.num_kv_heads, a.head_dim) == (262208, 8, 4, 256)
    assert (a.max_position, a.dtype, a.tie_word_embeddings, a.activation) == (131072, "bfloat16", True, "gelu_tanh")
    assert (a.rope_theta, a.rope_scaling, a.attention_scale) == (1e6, LinearScaling(factor=8.0), 1 / 16)
    local, whole = LayerKind(window=1024, rope_theta=1e4), LayerKind()
    assert a.layers[:7] == [local] * 5 + [whole, local] and len(a.layers) == 34
    assert a.num_parameters == 3_880_263_168  # 3.88 billion, without the 0.42 of the part that sees


def test_gemma_2_has_its_caps_and_a_window_in_every_other_layer_by_default() -> None:
    a = read("Gemma2ForCausalLM", num_hidden_layers=3)
    assert [kind.window for kind in a.layers] == [4096, 0, 4096]
    assert (a.attention_soft_cap, a.logit_soft_cap, a.attention_scale) == (50.0, 30.0, 1 / 16)
    assert read("Gemma2ForCausalLM", attn_logit_softcapping=None).attention_soft_cap == 0.0


@pytest.mark.parametrize(
    ("said", "meant"),
    [({"hidden_act": "gelu"}, "gelu_tanh"), ({}, "gelu_tanh"), ({"hidden_act": "silu"}, "silu"),
     ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "gelu_tanh")],
)  # fmt: skip
def test_the_first_gemma_means_the_tanh_form_when_it_says_gelu(said: dict[str, str], meant: str) -> None:
    assert read("GemmaForCausalLM", **said).activation == meant


def test_a_window_that_is_not_named_is_mistrals_default_and_null_is_none() -> None:
    assert read("MistralForCausalLM").layers[0].window == 4096
    assert read("MistralForCausalLM", sliding_window=None).layers[0].window == 0


def test_qwen_has_windows_only_where_they_are_switched_on() -> None:
    settings = {"num_hidden_layers": 4, "sliding_window": 7, "max_window_layers": 3}
    assert {kind.window for kind in read("Qwen2ForCausalLM", **settings).layers} == {0}
    layers = read("Qwen2ForCausalLM", use_sliding_window=True, **settings).layers
    assert [kind.window for kind in layers] == [0, 0, 0, 7]


def test_yarn_lengthens_the_context_by_its_factor() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    a = read("Qwen3ForCausalLM", max_position_embeddings=40960, rope_scaling=scaling)
    assert a.max_position == 131072 and isinstance(a.rope_scaling, YarnScaling)


def test_early_phi_3_files_name_longrope_su_and_give_no_factor() -> None:
    a = read(
        "Phi3ForCausalLM",
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={"type": "su", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
    )
    assert isinstance(a.rope_scaling, LongRopeScaling)
    assert (a.rope_scaling.factor, a.rope_scaling.original_max_position_embeddings) == (32.0, 4096)


def test_rope_of_part_of_a_head_is_read_from_its_old_and_its_new_place() -> None:
    assert read("Phi3ForCausalLM", head_dim=16, partial_rotary_factor=0.75).rotary_dim == 12
    assert read("Phi3ForCausalLM", head_dim=16, rope_parameters={"partial_rotary_factor": 0.25}).rotary_dim == 4
    assert read("Phi3ForCausalLM", head_dim=16).rotary_dim == 0
