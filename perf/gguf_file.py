"""What every GGUF file has that is written here: the sizes of a decoder, a vocabulary, an end.

Knows the writer of the `gguf` package; imports nothing.
"""

from collections.abc import Mapping
from typing import Any

CONTROL, NORMAL = 3, 1  # of tokenizer.ggml.token_type


def add_sizes(writer: Any, config: Mapping[str, Any]) -> None:
    """The sizes that every decoder with RMS norms has, from a config.json."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def add_vocabulary(writer: Any, tokenizer: Any, merged: str = "") -> None:
    """The tokens of a `tokenizers.Tokenizer` over bytes, without merges.

    `merged`: two characters that become the last token's text, and the only merge.
    """
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    if merged:
        tokens[-1] = merged
    control = tokenizer.get_added_tokens_decoder()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if index in control else NORMAL for index in range(len(tokens))])
    writer.add_token_merges([" ".join(merged)] if merged else [])


def write_and_close(writer: Any) -> None:
    """The whole file, of what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
