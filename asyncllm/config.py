"""The configuration: one TOML file, a frozen struct per table, every key overridable by an environment variable.

`docs/configuration.md` is generated from these structs (`python -m asyncllm.config`): the comment behind a field is its
documentation, so every field has one, with its unit. Knows nothing of what the keys do.
"""

import difflib
import inspect
import os
import re
import tomllib
import typing
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from asyncllm.errors import ConfigError, show
from asyncllm.threads import parse_cores

ENV_PREFIX = "ASYNCLLM_"

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]
DType = Literal["auto", "float32", "bfloat16", "float16"]
MetricName = Annotated[str, Meta(pattern="^[a-zA-Z_][a-zA-Z0-9_]*$")]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One [table] of the file."""


class ServerConfig(Table, frozen=True):
    """Where the server listens and how it goes away."""

    host: str = "127.0.0.1"  # address to bind; 0.0.0.0 or :: for all
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000  # TCP port; 0 takes a free one and logs it
    unix_socket: str = ""  # path of a Unix socket to listen on instead of host and port; empty = none
    drain_timeout_s: Seconds = 30.0  # seconds that running requests get to finish after SIGTERM or Ctrl-C
    keep_alive_s: Seconds = 75.0  # seconds an idle HTTP connection stays open
    max_connections: Positive = 4096  # open connections in all; above it new ones are closed at once
    max_connections_per_client: Positive = 1024  # open connections of one address (proxies: raise it)
    header_timeout_s: Seconds = 30.0  # seconds in which a request's headers must have arrived
    write_timeout_s: Seconds = 300.0  # seconds a client may read nothing of a stream that waits for it; 0 = for ever
    body_timeout_s: Seconds = 30.0  # seconds a request's body may stand still before the connection is given up


class ModelConfig(Table, frozen=True):
    """Which model, in which precision, on which device."""

    path: str = "smollm2-135m-instruct"  # alias of the embedded model, directory of safetensors, .gguf file or hub name
    served_name: str = ""  # name clients use; empty = the last part of the path
    aliases: tuple[str, ...] = ()  # further names clients may use
    revision: str = ""  # branch, tag or commit of a hub name; empty = main
    load_format: Literal["auto", "dummy"] = "auto"  # dummy = random weights in the model's shapes, for load tests
    generation_config: Literal["auto", "ignore"] = "auto"  # auto = its sampling defaults and ends of turns count
    dtype: DType = "auto"  # auto = the checkpoint's, bfloat16 for quantized files; float32 where that is slow on a CPU
    quantization: Literal["auto", "none"] = "auto"  # auto = a CPU reads a file's 4- and 8-bit blocks as they are
    device: str = "auto"  # cpu, cuda, cuda:1; auto = cuda where there is one
    chat_template: str = ""  # Jinja file, or chatml, gemma, generic, llama3, mistral; empty = the checkpoint's
    tool_parser: str = "auto"  # how it writes tool calls: hermes, qwen3_coder, mistral, …; auto = by its template
    reasoning_parser: str = "auto"  # how it thinks aloud: think, magistral, none; auto = by its template
    pooling: Literal["last", "mean"] = "last"  # hidden states of an embedding: last = the last token's, mean = of all
    max_context_length: NonNegative = 0  # tokens of prompt plus output; 0 = the model's own
    rope_scaling: Literal["none", "linear", "dynamic", "yarn"] = "none"  # how to reach a longer context than its own

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.served_name or self.path.rstrip("/").rsplit("/", 1)[-1]


class CacheConfig(Table, frozen=True):
    """The paged KV cache."""

    memory_fraction: Annotated[float, Meta(gt=0, le=1)] = 0.9  # share of a GPU's memory the process may take in all
    memory_gib: Annotated[float, Meta(ge=0)] = 0.0  # GiB for KV; 0 = what memory_fraction leaves, or 1 GiB on a CPU
    num_blocks: NonNegative = 0  # blocks of KV; overrides memory_gib; 0 = from memory_gib
    block_size: Annotated[int, Meta(ge=1, le=256)] = 16  # tokens in a block
    kv_cache_dtype: Literal["auto", "model", "int8"] = "auto"  # auto = int8 for quantized weights on a CPU
    prefix_cache: bool = True  # share the KV of equal prompt beginnings


class SchedulerConfig(Table, frozen=True):
    """How much runs at once and how much may wait."""

    max_sequences: Positive = 256  # sequences running at once
    max_batched_tokens: Positive = 2048  # query tokens in one step
    max_chunk_tokens: Positive = 512  # prompt tokens of one sequence in a step while others decode
    max_queued: Positive = 1024  # sequences waiting; above it the server answers 429
    max_queued_tokens: Positive = 4_000_000  # prompt tokens waiting; above it the server answers 429
    default_timeout_s: Seconds = 0.0  # seconds a request may take where it names no timeout; 0 = no limit
    max_timeout_s: Seconds = 3600.0  # largest timeout a request may name, and the limit of those that name none


class ExecutorConfig(Table, frozen=True):
    """How steps are computed."""

    threads: NonNegative = 0  # CPU threads for tensor work; 0 = one per core
    attention_backend: Literal["auto", "triton", "native", "torch"] = "auto"  # own kernels: GPU, CPU; torch = plain
    disable_cuda_graph: bool = False  # run every step eagerly; for debugging, several times slower at small batches
    cuda_graph_max_bs: Positive = 256  # rows of the largest captured decode batch; larger ones run eagerly
    cuda_graph_max_tokens: NonNegative = 1024  # tokens of the largest captured step with prompts in it; 0 = none
    cuda_graph_capture: Literal["startup", "background"] = "startup"  # before readiness, or in idle gaps after it
    overlap: bool = True  # launch a step before the last one is read (CUDA); false for debugging
    pdl: bool = False  # programmatic dependent launch between kernels (Hopper and later)
    switch_interval_us: Positive = 200  # µs after which a thread that wants the GIL may ask for it
    gc_freeze: bool = True  # exempt what start-up made from garbage collection and collect rarely
    engine_cores: str = ""  # CPU cores of the engine thread and torch's CPU threads, as in "2,4-7"; empty = any
    loop_cores: str = ""  # CPU cores of the event loop and the tokenizer's threads, as in "0-1"; empty = any


class SpeculativeConfig(Table, frozen=True):
    """Speculative decoding by prompt lookup: guessed tokens are verified together; the text is that of none."""

    method: Literal["off", "ngram"] = "off"  # of requests that name no speculative_tokens: ngram = guess, off = do not
    num_speculative_tokens: Annotated[int, Meta(ge=1, le=16)] = 8  # tokens guessed per step of a sequence
    prompt_lookup_min: Annotated[int, Meta(ge=1, le=16)] = 3  # last tokens that must have stood there before
    prompt_lookup_max: Annotated[int, Meta(ge=1, le=64)] = 8  # last tokens compared to choose among such places
    disable_by_batch_size: Positive = 8  # sequences running above which nobody guesses
    auto_off: bool = True  # a sequence stops guessing while that costs it more than it saves


ONLY_ON_REQUEST = SpeculativeConfig()


class ApiConfig(Table, frozen=True):
    """What the HTTP API accepts."""

    cors_origins: tuple[str, ...] = ()  # origins a browser may call from; "*" for any; empty = no CORS headers
    max_body_bytes: Positive = 8 * 1024 * 1024  # bytes of a request body, after decompression
    strict: bool = False  # refuse unknown fields with 400 instead of naming them in x-ignored-params
    sse_keep_alive_s: Seconds = 15.0  # seconds of silence after which a stream gets a comment line; 0 = never
    stream_interval: Positive = 1  # tokens per event of a stream; the first token goes at once
    reasoning_fields: tuple[str, ...] = ("reasoning_content", "reasoning")  # where chat answers show thinking
    max_choices: Annotated[int, Meta(ge=1, le=1024)] = 128  # prompts x n (or best_of) of one request
    tokenizer_threads: Annotated[int, Meta(ge=1, le=16)] = 1  # threads that tokenize beside the event loop


class LoRAConfig(Table, frozen=True):
    """Adapters in PEFT's format, each served beside the model under a name of its own."""

    adapters: dict[str, str] = {}  # name clients use = directory or hub name of the adapter
    max_total_rank: Positive = 512  # largest sum of the adapters' ranks, which every token pays for


class LoggingConfig(Table, frozen=True):
    """What is logged, to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"  # least severe level shown
    json: bool = False  # one JSON object per line instead of text
    access: bool = False  # one line per request; probes and /metrics are left out


class MetricsConfig(Table, frozen=True):
    """The Prometheus endpoint."""

    prefix: MetricName = "asyncllm"  # prefix of the names; "vllm" gives vLLM's names
    enabled: bool = True  # serve /metrics


class Config(Table, frozen=True):
    """The whole file."""

    server: ServerConfig = ServerConfig()
    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    executor: ExecutorConfig = ExecutorConfig()
    speculative: SpeculativeConfig = SpeculativeConfig()
    api: ApiConfig = ApiConfig()
    lora: LoRAConfig = LoRAConfig()
    logging: LoggingConfig = LoggingConfig()
    metrics: MetricsConfig = MetricsConfig()


def load(path: str | Path | None, environ: typing.Mapping[str, str] | None = None) -> Config:
    """Read the file (None: defaults only), lay the environment over it, and check everything.

    Raises ConfigError naming file, line, key and the nearest known key.
    """
    environ = os.environ if environ is None else environ
    text, where = "", "defaults"
    if path is not None:
        where = str(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where}: not UTF-8 text ({error.reason})") from None
        except OSError as error:
            raise ConfigError(f"{where}: cannot read the configuration: {error.strerror}") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not valid TOML: {error}") from None
    _check_names(data, text, where)
    for table, values in data.items():
        _convert(Config.__annotations__[table], values, partial(_place, where, text, table), table)
    _apply_environment(data, environ)
    config = _convert(Config, data, lambda key: where, "")
    _check_sense(config)
    return config


def override(config: Config, options: typing.Mapping[str, Any]) -> Config:
    """The same with some keys changed, each by its bare name, which only one table has; checked as in `load`.

    Raises ConfigError naming the key and the nearest known one.
    """
    tables = {key: table for table in Config.__struct_fields__ for key in getattr(config, table).__struct_fields__}
    changed: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        if name not in tables:
            raise ConfigError(f"option: unknown key {name}{_nearest(name, tables)}")
        changed.setdefault(tables[name], {})[name] = value
    for table, values in changed.items():
        before = getattr(config, table)
        made = _convert(type(before), msgspec.structs.asdict(before) | values, lambda key: "option", table)
        config = msgspec.structs.replace(config, **{table: made})
    _check_sense(config)
    return config


def _check_names(data: dict[str, Any], text: str, where: str) -> None:
    tables = {f.name: f.type for f in msgspec.structs.fields(Config)}
    for table, values in data.items():
        if table not in tables:
            raise ConfigError(f"{where}{_line_of(text, table)}: unknown table [{table}]{_nearest(table, tables)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{where}{_line_of(text, '', table)}: {table} is a table: write [{table}]")
        known = [f.name for f in msgspec.structs.fields(tables[table])]
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"{where}{_line_of(text, table, key)}: unknown key {table}.{key}{_nearest(key, known)}"
                )


def _place(where: str, text: str, table: str, key: str) -> str:
    return f"{where}{_line_of(text, table, key)}"


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _line_of(text: str, table: str, key: str = "") -> str:
    """`:LINE` of a table or of a key in it, or nothing where it is not written plainly."""
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[([^\[\]]+)\]", line)
        if header:
            current = header[1].strip()
            if current == table and not key:
                return f":{number}"
        elif current == table and key and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return f":{number}"
    return ""


def _convert(struct: type, values: Any, where: typing.Callable[[str], str], table: str) -> Any:
    try:
        return msgspec.convert(values, struct)
    except msgspec.ValidationError as error:
        message, _, location = str(error).partition(" - at `$.")
        dotted = location.rstrip("`")
        key = re.split(r"[.\[]", dotted)[0]
        value = values.get(key) if isinstance(values, dict) else values
        name = f"{table}.{dotted}" if table else dotted
        raise ConfigError(f"{where(key)}: {name} = {show(value)}: {message}") from None


def _apply_environment(data: dict[str, Any], environ: typing.Mapping[str, str]) -> None:
    """ASYNCLLM_SERVER__PORT=9000 sets server.port; lists, and pairs name=value, are comma-separated."""
    tables = {f.name: f.type for f in msgspec.structs.fields(Config)}
    for variable, raw in environ.items():
        if not variable.startswith(ENV_PREFIX) or "__" not in variable:
            continue
        table, _, key = variable[len(ENV_PREFIX) :].lower().partition("__")
        if table not in tables:
            raise ConfigError(f"environment: {variable}: unknown table {table!r}{_nearest(table, tables)}")
        known = {f.name: f.type for f in msgspec.structs.fields(tables[table])}
        if key not in known:
            raise ConfigError(f"environment: {variable}: unknown key {table}.{key}{_nearest(key, known)}")
        value: Any = raw
        if _is_list(known[key]) or _is_pairs(known[key]):
            value = [part.strip() for part in raw.split(",") if part.strip()]
        if _is_pairs(known[key]):
            value = dict(_pair(variable, part) for part in value)
        if _base(known[key]) is bool:
            value = {
                "1": True,
                "true": True,
                "yes": True,
                "on": True,
                "0": False,
                "false": False,
                "no": False,
                "off": False,
            }.get(raw.lower(), raw)
        try:
            checked = msgspec.convert(value, known[key], strict=_base(known[key]) is bool)
        except msgspec.ValidationError as error:
            raise ConfigError(f"environment: {variable}={show(raw)}: {error}") from None
        data.setdefault(table, {})[key] = list(checked) if isinstance(checked, tuple) else checked


def _base(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) is tuple


def _is_pairs(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict


def _pair(variable: str, text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"environment: {variable}: {show(text)}: expected name=value")
    return name.strip(), value.strip()


def _check_sense(config: Config) -> None:
    """Rules between keys."""
    scheduler = config.scheduler
    if scheduler.max_batched_tokens < scheduler.max_sequences:
        raise ConfigError(
            f"scheduler.max_batched_tokens = {scheduler.max_batched_tokens} is below scheduler.max_sequences = "
            f"{scheduler.max_sequences}: a step must hold one token of every running sequence; raise it or lower that"
        )
    if scheduler.max_timeout_s and scheduler.default_timeout_s > scheduler.max_timeout_s:
        raise ConfigError(
            f"scheduler.default_timeout_s = {scheduler.default_timeout_s} is above scheduler.max_timeout_s = "
            f"{scheduler.max_timeout_s}"
        )
    speculative = config.speculative
    if speculative.prompt_lookup_min > speculative.prompt_lookup_max:
        raise ConfigError(
            f"speculative.prompt_lookup_min = {speculative.prompt_lookup_min} is above speculative.prompt_lookup_max = "
            f"{speculative.prompt_lookup_max}"
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.model.device):
        raise ConfigError(f"model.device = {show(config.model.device)}: expected auto, cpu, cuda or cuda:N")
    for name in config.lora.adapters:
        if not re.fullmatch(r"[\w./:@+-]+", name):
            raise ConfigError(f"lora.adapters: {show(name)!r} is no name: letters, digits and . _ / : @ + - make one")
        if name in (config.model.name, *config.model.aliases):
            raise ConfigError(
                f"lora.adapters.{name}: the model itself has this name (model.served_name, model.aliases): take another"
            )
    parse_cores(config.executor.engine_cores, "executor.engine_cores")
    parse_cores(config.executor.loop_cores, "executor.loop_cores")


def field_comments(struct: type) -> dict[str, str]:
    """The comment behind each field of a table, read from this module's source."""
    comments = {}
    for line in inspect.getsource(struct).splitlines():
        match = re.match(r"    (\w+): .*?  # (.*)$", line)
        if match:
            comments[match[1]] = match[2]
    return comments


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}" = {_toml(v)}' for k, v in value.items()) + "}"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default_factory() if field.default is msgspec.NODEFAULT else field.default


def default_toml() -> str:
    """The default configuration as a commented file; loads back to `Config()`."""
    lines = ["# asyncllm-server configuration; every key here is at its default.", ""]
    for table in msgspec.structs.fields(Config):
        comments = field_comments(table.type)
        lines += [f"# {inspect.getdoc(table.type)}", f"[{table.name}]"]
        lines += [f"{f.name} = {_toml(_default(f))}  # {comments[f.name]}" for f in msgspec.structs.fields(table.type)]
        lines.append("")
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    base = _base(annotation)
    if typing.get_origin(base) is Literal:
        return " \\| ".join(f'"{v}"' for v in typing.get_args(base))
    if _is_list(base):
        return "list of strings"
    if _is_pairs(base):
        return "table of strings"
    return {int: "integer", float: "number", str: "string", bool: "boolean"}[base]


def markdown() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Generated from `asyncllm/config.py` by `python -m asyncllm.config`; a test holds it to that.",
        "",
        "`asyncllm-server config.toml` reads one TOML file. `asyncllm-server --check config.toml` checks it,",
        "`asyncllm-server --print-default` writes one with every key. Each key can be overridden by an environment",
        "variable named `ASYNCLLM_<TABLE>__<KEY>`, such as `ASYNCLLM_SERVER__PORT=9000`; lists, and the pairs",
        "`name=value` of a table, are comma-separated.",
        "An unknown table or key stops the start, with its line and the nearest known name.",
    ]
    for table in msgspec.structs.fields(Config):
        comments = field_comments(table.type)
        lines += [
            "",
            f"## [{table.name}]",
            "",
            inspect.getdoc(table.type) or "",
            "",
            "| key | type | default | what it is |",
            "|---|---|---|---|",
        ]
        for field in msgspec.structs.fields(table.type):
            lines.append(
                f"| `{field.name}` | {_type_name(field.type)} | `{_toml(_default(field))}` | {comments[field.name]} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
