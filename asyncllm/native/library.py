"""The compiled kernels' functions, and the structures of model.h and matrix.h. A call releases the GIL. Any thread."""

import ctypes
import hashlib
from pathlib import Path

from asyncllm.models.config import ModelArchitecture

BFLOAT16, FOUR_BIT, EIGHT_BIT, FLOAT16 = range(4)  # Matrix.kind
STORED = {
    "BF16": (0, BFLOAT16),
    "Q4_0": (1, FOUR_BIT),
    "Q4_1": (2, FOUR_BIT),
    "Q8_0": (3, EIGHT_BIT),
    "F16": (4, FLOAT16),
}
BFLOAT16_PAGES, INT8_PAGES = range(2)  # Model.cache_kind
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
PARTS = ("embedding", "norms", "products", "rotation", "attention", "mlp", "head")  # whose times are told apart
ROW_MULTIPLE = 32  # of inputs of every matrix, and of a head's dimensions
GROUP = 16  # outputs that lie side by side in a packed matrix
MAX_HEAD_DIM = 512
PAGE = 16  # tokens of a page of the cache, and what a block is a multiple of


class Matrix(ctypes.Structure):
    """Weights of n outputs and k inputs."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("adapters", ctypes.c_void_p),
    ]


class AdapterPart(ctypes.Structure):
    """What an adapter adds to some groups of a matrix's outputs."""

    _fields_ = [("begin", ctypes.c_int32), ("end", ctypes.c_int32), ("up", Matrix)]


class Adapter(ctypes.Structure):
    """What an adapter adds to a matrix."""

    _fields_ = [("down", Matrix), ("num_parts", ctypes.c_int32), ("parts", ctypes.POINTER(AdapterPart))]


class FeedForward(ctypes.Structure):
    """An MLP, or one of a layer's experts."""

    _fields_ = [("up", Matrix), ("down", Matrix)]


class Norm(ctypes.Structure):
    """No weight: no norm; a bias: a layer norm."""

    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class Layer(ctypes.Structure):
    """One layer."""

    _fields_ = [
        *((name, Norm) for name in ("before_attention", "after_attention", "before_mlp", "after_mlp")),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        *((name, Matrix) for name in ("qkv", "out")),
        ("mlps", ctypes.POINTER(FeedForward)),
        ("router", Matrix),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("window", ctypes.c_int32),
        ("rotation", ctypes.c_int32),
    ]


class Model(ctypes.Structure):
    """The whole model."""

    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "block_size",
                "activation",
                "is_gated",
                "num_rotations",
                "cache_kind",
                "num_experts_per_token",
                "norm_expert_weights",
                "adapter_width",
                "most_adapter_parts",
            )
        ),
        ("norm_eps", ctypes.c_float),
        ("embedding_scale", ctypes.c_float),
        ("layers", ctypes.POINTER(Layer)),
        ("last_norm", Norm),
        ("embedding", Matrix),
        ("head", Matrix),
        ("position_embedding", ctypes.c_void_p),
        ("frequencies", ctypes.c_void_p),
        ("amplitudes", ctypes.c_void_p),
    ]


class Step(ctypes.Structure):
    """The rows of a step, and where its hidden states go."""

    _fields_ = [
        ("num_rows", ctypes.c_int32),
        ("num_decode_rows", ctypes.c_int32),
        ("num_tokens", ctypes.c_int32),
        ("slots", ctypes.c_void_p),
        ("computed", ctypes.c_void_p),
        ("query_lens", ctypes.c_void_p),
        ("last_tokens", ctypes.c_void_p),
        ("adapters", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("num_columns", ctypes.c_int64),
        ("caches", ctypes.c_void_p),
        ("wanted", ctypes.c_void_p),
        ("num_wanted", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
    ]


class Library:
    """The functions of one build."""

    def __init__(self, file: Path, description: str) -> None:
        """Raises OSError where the file cannot be loaded, is of other sources than these, or must not be used here."""
        self.description = description
        functions = ctypes.CDLL(str(file))
        sources = getattr(functions, "asyncllm_sources", None)
        if sources is not None:
            sources.restype = ctypes.c_char_p
        if sources is None or sources() != sources_digest().encode():
            raise OSError(f"{file.name} was built from other sources: install the package again")
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        if not functions.asyncllm_permitted():
            raise OSError("the system does not let this process use it")
        self.decoder_new = functions.asyncllm_decoder_new
        self.decoder_new.restype, self.decoder_new.argtypes = pointer, [ctypes.POINTER(Model), integer]
        self.decoder_delete = functions.asyncllm_decoder_delete
        self.decoder_delete.restype, self.decoder_delete.argtypes = None, [pointer]
        self.decoder_forward = functions.asyncllm_decoder_forward
        self.decoder_forward.argtypes = [pointer, ctypes.POINTER(Step)]
        self.decoder_logits = functions.asyncllm_decoder_logits
        self.decoder_logits.argtypes = [pointer, pointer, integer, pointer]
        self.decoder_likeliest = functions.asyncllm_decoder_likeliest
        self.decoder_likeliest.argtypes = [pointer, pointer, integer, pointer]
        self.decoder_spent = functions.asyncllm_decoder_spent
        self.decoder_spent.restype, self.decoder_spent.argtypes = None, [pointer, pointer]
        self.argmax = functions.asyncllm_argmax
        self.argmax.restype, self.argmax.argtypes = None, [pointer, integer, integer, pointer]
        self.page_bytes = functions.asyncllm_page_bytes
        self.page_bytes.restype, self.page_bytes.argtypes = ctypes.c_int64, [integer, integer]
        self.packed_bytes = functions.asyncllm_packed_bytes
        self.packed_bytes.restype, self.packed_bytes.argtypes = ctypes.c_int64, [integer, integer, integer]
        self.pack = functions.asyncllm_pack
        self.pack.restype = ctypes.c_int64
        self.pack.argtypes = [integer, pointer, integer, integer, pointer, pointer]

    def block_bytes(self, architecture: ModelArchitecture, block_size: int, int8_cache: bool) -> int:
        """Bytes of a block in one layer's cache, in 8 bits or in bfloat16."""
        page_bytes = int(self.page_bytes(INT8_PAGES if int8_cache else BFLOAT16_PAGES, architecture.head_dim))
        return architecture.num_kv_heads * block_size // PAGE * page_bytes


def sources_digest() -> str:
    """Of the C++ beside this file; setup.py works out the same."""
    files = sorted(file for file in Path(__file__).parent.iterdir() if file.suffix in (".cpp", ".h"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def why_not(architecture: ModelArchitecture, block_size: int) -> str:
    """What keeps a model from running on these kernels, in a few words; empty where nothing does."""
    a = architecture
    sizes = {"hidden size": a.hidden_size, "head size": a.head_dim}
    if any(not kind.has_experts for kind in a.layers):
        sizes["intermediate size"] = a.intermediate_size
    if a.experts is not None:
        sizes["experts' intermediate size"] = a.experts.intermediate_size
    for name, size in sizes.items():
        if size % ROW_MULTIPLE:
            return f"the {name} {size} is not a multiple of {ROW_MULTIPLE}"
    if a.head_dim > MAX_HEAD_DIM:
        return f"the head size {a.head_dim} is above {MAX_HEAD_DIM}"
    if block_size % PAGE:
        return f"cache.block_size is not a multiple of {PAGE}"
    return ""
