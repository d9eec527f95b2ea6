"""Tensors of families that name or lay out things otherwise than Llama -> names and layouts of `models/decoder.py`.

Names that the decoder knows pass unchanged, so that a file may use them already. Knows no file format. Engine thread.
"""

import re
from collections.abc import Callable

from torch import Tensor

OPT_POSITIONS_OFFSET = 2  # rows of the table before that of position 0

# Substitutions, one after another; what becomes empty is no tensor of the text model.
RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "gemma3": (
        (r"^(model\.)?(vision_tower|multi_modal_projector)\..*", ""),
        (r"^(language_model\.model|model\.language_model)\.", "model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ),
    "starcoder2": ((r"\.c_fc\.", ".up_proj."), (r"\.mlp\.c_proj\.", ".mlp.down_proj.")),
    "opt": (
        (r"^(model\.)?decoder\.", "model."),
        (r"^model\.final_layer_norm\.", "model.norm."),
        (r"\.self_attn_layer_norm\.", ".input_layernorm."),
        (r"\.final_layer_norm\.", ".post_attention_layernorm."),
        (r"\.out_proj\.", ".o_proj."),
        (r"\.fc1\.", ".mlp.up_proj."),
        (r"\.fc2\.", ".mlp.down_proj."),
    ),
    "gpt2": (
        (r".*\.attn\.(masked_)?bias$", ""),  # the causal mask, which old exporters wrote
        (r"^(transformer\.)?h\.", "model.layers."),
        (r"^(transformer\.)?wte\.", "model.embed_tokens."),
        (r"^(transformer\.)?wpe\.", "model.embed_positions."),
        (r"^(transformer\.)?ln_f\.", "model.norm."),
        (r"\.ln_1\.", ".input_layernorm."),
        (r"\.ln_2\.", ".post_attention_layernorm."),
        (r"\.attn\.c_attn\.", ".self_attn.qkv_proj."),
        (r"\.attn\.c_proj\.", ".self_attn.o_proj."),
        (r"\.c_fc\.", ".up_proj."),
        (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
    ),
}
# Family -> which of its own names hold something laid out otherwise, and how to bring it into order.
LAYOUTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "opt": (r"decoder\.embed_positions\.", lambda table: table[OPT_POSITIONS_OFFSET:]),
    "gpt2": (r"\.c_\w+\.weight$", lambda weight: weight.t()),  # [in, out]
}


def decoder_tensor(family: str, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    """The tensor as the decoder wants it, by the decoder's name; None for one that no text model needs."""
    if family in LAYOUTS:
        pattern, arrange = LAYOUTS[family]
        if re.search(pattern, name):
            tensor = arrange(tensor)
    name = decoder_name(family, name)
    return (name, tensor) if name else None


def decoder_name(family: str, name: str) -> str:
    """What the decoder calls a tensor; empty for one that no text model needs."""
    for pattern, replacement in RENAMES.get(family, ()):
        name = re.sub(pattern, replacement, name)
    return name
