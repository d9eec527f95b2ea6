"""The configuration file: what is accepted, what is refused, and with which words."""

from pathlib import Path

import msgspec
import pytest

from asyncllm import config
from asyncllm.config import Config, load
from asyncllm.errors import ConfigError

DOCS = Path(__file__).parent.parent / "docs" / "configuration.md"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return path

    return write


def test_the_default_file_loads_back_to_the_defaults(write) -> None:
    assert load(write(config.default_toml()), {}) == Config()


def test_no_file_means_the_defaults() -> None:
    assert load(None, {}) == Config()


def test_the_shipped_configuration_is_valid() -> None:
    assert load(Path(__file__).parent.parent / "deploy" / "config.toml", {}).server.port == 8000


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_known_key(write) -> None:
    with pytest.raises(ConfigError, match=r":3: unknown key server\.prot; did you mean 'port'\?"):
        load(write("[server]\nhost = '::1'\nprot = 1\n"), {})


def test_an_unknown_table_is_named_with_its_line_and_the_nearest_known_table(write) -> None:
    with pytest.raises(ConfigError, match=r":1: unknown table \[sever\]; did you mean 'server'\?"):
        load(write("[sever]\nport = 1\n"), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nport = 99999", r":2: server\.port = 99999: .*<= 65535"),
        ("[server]\nport = '80'", r":2: server\.port = 80: .*int.*str"),
        ("[server]\nport = true", r":2: server\.port = True: .*int.*bool"),
        ("[model]\ndtype = 'int8'", r":2: model\.dtype = int8: Invalid enum value"),
        ("[model]\ndevice = 'tpu'", r"model\.device = tpu: expected auto, cpu, cuda or cuda:N"),
        ("[executor]\nengine_cores = '1-x'", r"executor\.engine_cores = 1-x: expected cores such as 2 or 2,4-7"),
        ("[executor]\nloop_cores = '99999'", r"executor\.loop_cores = 99999: this process may not use core 99999"),
        ("[lora]\nadapters = { sql = 5 }", r":2: lora\.adapters.*str.*int"),
        ("[lora]\nadapters = { 'a b' = 'x' }", r"lora\.adapters: 'a b' is no name"),
        ("[lora]\nadapters = { gpt = 'x' }\n[model]\naliases = ['gpt']", r"lora\.adapters\.gpt: the model itself"),
        ("[lora]\nadapters = { m = 'x' }\n[model]\npath = '/models/m/'", r"lora\.adapters\.m: the model itself"),
        ("[speculative]\nmethod = 'eagle'", r":2: speculative\.method = eagle: Invalid enum value"),
        ("[speculative]\nnum_speculative_tokens = 17", r":2: speculative\.num_speculative_tokens = 17: .*<= 16"),
        ("[speculative]\nprompt_lookup_min = 9", r"prompt_lookup_min = 9 is above speculative\.prompt_lookup_max = 8"),
        ("[executor]\nengine_cores = 2", r":2: executor\.engine_cores = 2: .*str.*int"),
        ("[cache]\nmemory_gib = -1", r":2: cache\.memory_gib = -1: .*>= 0"),
        ("[scheduler]\nmax_batched_tokens = 16", r"max_batched_tokens = 16 is below scheduler\.max_sequences = 256"),
        ("server = 5", r":1: server is a table: write \[server\]"),
        ("[server", r"not valid TOML"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_the_rule(write, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(text), {})


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration: No such file"):
        load(tmp_path / "none.toml", {})


def test_a_file_that_is_no_text_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(path, {})


def test_the_environment_overrides_every_kind_of_key(write) -> None:
    loaded = load(
        write("[server]\nport = 1\n"),
        {
            "ASYNCLLM_SERVER__PORT": "9000",
            "ASYNCLLM_API__STRICT": "yes",
            "ASYNCLLM_API__CORS_ORIGINS": "https://a.example, https://b.example",
            "ASYNCLLM_CACHE__MEMORY_GIB": "0.5",
            "ASYNCLLM_MODEL__PATH": "m.gguf",
            "ASYNCLLM_LORA__ADAPTERS": "sql=/adapters/sql, chat=owner/chat",
            "PATH": "untouched",
        },
    )
    assert loaded.server.port == 9000
    assert loaded.api.strict is True
    assert loaded.api.cors_origins == ("https://a.example", "https://b.example")
    assert loaded.cache.memory_gib == 0.5
    assert loaded.model.path == "m.gguf"
    assert loaded.lora.adapters == {"sql": "/adapters/sql", "chat": "owner/chat"}


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ASYNCLLM_SERVER__PORT", "many", r"ASYNCLLM_SERVER__PORT=many: Expected `int`"),
        ("ASYNCLLM_SERVER__PRT", "1", r"unknown key server\.prt; did you mean 'port'\?"),
        ("ASYNCLLM_SEVER__PORT", "1", r"unknown table 'sever'; did you mean 'server'\?"),
        ("ASYNCLLM_LORA__ADAPTERS", "sql", r"ASYNCLLM_LORA__ADAPTERS: sql: expected name=value"),
        ("ASYNCLLM_API__STRICT", "perhaps", r"ASYNCLLM_API__STRICT=perhaps: Expected `bool`"),
    ],
)
def test_a_wrong_environment_variable_is_named(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, {variable: value})


def test_adapters_keep_their_order_and_may_be_a_table_of_their_own(write) -> None:
    inline = load(write("[lora]\nadapters = { b = '/b', a = '/a' }\n"), {})
    table = load(write("[lora.adapters]\nb = '/b'\na = '/a'\n"), {})
    assert inline == table and list(inline.lora.adapters.items()) == [("b", "/b"), ("a", "/a")]


def test_every_key_has_a_comment_which_is_its_documentation() -> None:
    for table in msgspec.structs.fields(Config):
        names = {field.name for field in msgspec.structs.fields(table.type)}
        assert names == set(config.field_comments(table.type)), table.name


def test_the_documented_keys_are_the_keys_of_the_code() -> None:
    assert DOCS.read_text() == config.markdown(), "run make docs"
