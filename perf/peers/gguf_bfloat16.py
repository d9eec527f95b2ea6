"""A GGUF file written again with every matrix in bfloat16, for llama.cpp where the others read safetensors.

Same tensors, same metadata; the vectors (norms) keep their float32. Knows the `gguf` package.
"""

from pathlib import Path
from typing import Any

from perf.checkpoint import default_directory
from perf.gguf_file import write_and_close


def bfloat16_gguf(source: Path) -> Path:
    """The bfloat16 form of a GGUF file, written once into the user's cache beside its safetensors."""
    directory = default_directory(source)
    target = directory.with_name(directory.name + ".gguf")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        write_bfloat16(source, partial)
        partial.rename(target)  # a conversion that was interrupted must not be taken for a model next time
    return target


def write_bfloat16(source: Path, target: Path) -> None:
    """Expand every quantized tensor to float32 and round it to bfloat16, to nearest even as torch does."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    written = {"general.architecture", "general.file_type"}
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in written:
            is_array = field.types[0] is gguf.GGUFValueType.ARRAY
            sub_type: Any = field.types[-1] if is_array else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    kept, wide = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = wide if len(tensor.shape) > 1 else kept
        data = gguf.quantize(values.reshape([int(n) for n in reversed(tensor.shape)]), kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    write_and_close(writer)
