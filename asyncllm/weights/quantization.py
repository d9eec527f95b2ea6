"""Recognises quantized safetensors checkpoints, to refuse them by name. Torch-free. Any thread.

Knows how AWQ, GPTQ, FP8, bitsandbytes, compressed-tensors and their like say what they are: in config.json, or in a
file beside it where they are older than that key.
"""

from pathlib import Path
from typing import Any

# Files of tools that say nothing in config.json.
SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
TABLES = ("quantization_config", "compression_config")  # the second is compressed-tensors' first name for it


def quantization_of(directory: Path, config: dict[str, Any]) -> str:
    """The method with its width or format, such as `gptq (4 bits)`; empty where the weights are plain."""
    text = config.get("text_config")
    for table in (config.get(key) for key in TABLES):
        if table:
            return _described(table)
    if isinstance(text, dict) and text.get("quantization_config"):
        return _described(text["quantization_config"])
    return next((method for name, method in SIDE_FILES.items() if (directory / name).is_file()), "")


def _described(table: object) -> str:
    if not isinstance(table, dict):
        return "unknown"
    method = str(table.get("quant_method") or table.get("quant_algo") or "unknown")
    if method == "bitsandbytes":
        width = 8 if table.get("load_in_8bit") else 4
        return f"{method} ({width} bits)"
    detail = table.get("format") or table.get("fmt")
    bits = table.get("bits") or table.get("w_bit")
    return f"{method} ({bits} bits)" if bits else f"{method} ({detail})" if detail else method
