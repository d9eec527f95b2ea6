"""Random LoRA adapters of tiny models, written by PEFT, and what its merging makes of them."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch


def save_adapter(directory: Path, base: Any, seed: int, **settings: Any) -> Any:
    """Write an adapter of `base` that changes every logit; return `base` with it merged, as PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' deprecations of what PEFT calls; fan_in_fan_out of GPT-2
        from peft import LoraConfig, PeftModel, get_peft_model  # takes seconds

        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(str(directory))
        merged = PeftModel.from_pretrained(copy.deepcopy(base), str(directory)).merge_and_unload()
    return merged.eval()
