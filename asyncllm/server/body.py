"""Reading request bodies: size, speed, encoding and JSON, with an error that names the field, the value and the rule.

Runs on the event loop, so the work is bounded before it is done: bytes first, then the number of JSON values.
"""

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError

from asyncllm.errors import InvalidRequest, RequestTooLarge, Timeout, UnsupportedMediaType, show

T = TypeVar("T", bound=msgspec.Struct)

# 8 MiB of `{},{},…` or `1,1,…` would hold the loop for 100 ms; nobody sends that many messages or tokens in earnest.
MAX_OBJECTS = 32_768
MAX_VALUES = 524_288

_ENCODINGS = {"", "identity", "gzip", "deflate", "br", "zstd"}
_decoders: dict[type, msgspec.json.Decoder] = {}
_raw_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


async def read_body(request: web.Request, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body, inflated.

    Raises RequestTooLarge past `max_bytes` and Timeout (408) when it stands still for `timeout_s` seconds.
    """
    if request.headers.get("Content-Encoding", "").lower() not in _ENCODINGS:
        encoding = show(request.headers["Content-Encoding"])
        raise UnsupportedMediaType(f"Content-Encoding {encoding} is not supported; send gzip, deflate or none.")
    if (request.content_length or 0) > max_bytes:
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        while True:
            async with asyncio.timeout(timeout_s or None):
                chunk = await request.content.readany()
            if not chunk:
                return b"".join(chunks)
            size += len(chunk)
            if size > max_bytes:
                raise _too_large(max_bytes)
            chunks.append(chunk)
    except TimeoutError:
        error = Timeout(f"The request body stood still for {timeout_s:g} s.", code="body_timeout")
        error.status = 408
        raise error from None
    except (ContentEncodingError, HttpProcessingError, web.RequestPayloadError) as error:
        raise InvalidRequest(f"The request body could not be read: {show(str(error))}", code="invalid_body") from None


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"The request body is larger than {max_bytes} bytes (api.max_body_bytes).")


def check_content_type(request: web.Request) -> None:
    """JSON, or nothing said (curl -d says form-urlencoded: refused with a hint, as it would hide charset mistakes)."""
    if "Content-Type" not in request.headers:
        return
    kind = request.content_type
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaType(f"Content-Type {show(kind)} is not supported; send application/json.")
    charset = request.charset
    if charset and charset.lower().replace("_", "-") not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType(f"charset {show(charset)} is not supported; send JSON in UTF-8.")


def decode(body: bytes, struct: type[T]) -> tuple[T, list[str]]:
    """The struct, and the names of top-level fields it does not know.

    Raises InvalidRequest: `invalid_json` where it is no JSON, else with the field in `param`.
    """
    if body.count(b"{") > MAX_OBJECTS or body.count(b",") > MAX_VALUES:
        raise InvalidRequest(
            f"The request body holds too many values: at most {MAX_OBJECTS} objects and {MAX_VALUES} list items.",
            code="too_many_values",
        )
    decoder = _decoders.get(struct)
    if decoder is None:
        decoder = _decoders[struct] = msgspec.json.Decoder(struct)
    try:
        names = _raw_decoder.decode(body)
        value = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(error, body) from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The request body is not UTF-8: {error.reason}.", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply.", code="invalid_json") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.", code="invalid_json") from None
    known = struct.__struct_fields__
    return value, [name for name in names if name not in known]


def _explain(error: msgspec.ValidationError, body: bytes) -> InvalidRequest:
    """msgspec's message with the wrong value behind it, and the field's name as `param`."""
    rule, _, location = str(error).partition(" - at ")
    missing = re.search(r"missing required field `(\w+)`", rule)
    path = re.sub(r"^`?(key` in `)?\$\.?|`$", "", location)
    if missing:
        field = f"{path}.{missing[1]}" if path else missing[1]
        return InvalidRequest(f"{field} is required.", param=field, code="missing_required_parameter")
    if not path:
        return InvalidRequest(f"The request body: {_plain(rule)}.", code="invalid_type")
    value = _value_at(body, path)
    code = "invalid_type" if ", got " in rule else "invalid_value"
    return InvalidRequest(f"{path} = {show(value)}: {_plain(rule)}.", param=_param(path), code=code)


def _plain(rule: str) -> str:
    return rule.replace("`", "").replace("Expected ", "expected ").replace("Number out", "number out")


def _param(path: str) -> str:
    return path.replace("[...]", "")


def _value_at(body: bytes, path: str) -> Any:
    """The JSON value at msgspec's path, as compact text; the container's where the path has an unnamed key."""
    try:
        value = msgspec.json.decode(body)
        for part in re.findall(r"[^.\[\]]+", path):
            if part == "...":
                break
            value = value[int(part)] if isinstance(value, list) else value[part]
    except (msgspec.DecodeError, KeyError, IndexError, ValueError, TypeError):
        return "…"
    return msgspec.json.encode(value).decode()
