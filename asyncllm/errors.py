"""Every error a user can meet, each with the HTTP status, type and code of the wire (docs: API errors).

Knows no HTTP library and no framework: the server turns these into responses, the cli into one line and an exit code.
"""

MAX_VALUE_CHARS = 200


def show(value: object) -> str:
    """A value as it may appear in an error message: cut at 200 characters, never a page of someone's prompt."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS] + "…"


class AsyncLLMError(Exception):
    """Base of all errors raised on purpose. `status`, `type` and `code` are what the wire says."""

    status = 500
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code


class InvalidRequest(AsyncLLMError):
    """The request is wrong: 400 naming the field, the value and the rule."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    """Prompt, or prompt plus max_tokens, is longer than the model's context."""

    code = "context_length_exceeded"


class NotFound(AsyncLLMError):
    """Unknown path, model or request."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class MethodNotAllowed(InvalidRequest):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_allowed"


class RequestTooLarge(InvalidRequest):
    """The body is over `api.max_body_bytes`."""

    status = 413
    code = "request_too_large"


class UnsupportedMediaType(InvalidRequest):
    """The body's content type or encoding is not one this server reads."""

    status = 415
    code = "unsupported_media_type"


class Overloaded(AsyncLLMError):
    """The queue is full: refused at once with Retry-After."""

    status = 429
    type = "rate_limit_error"
    code = "server_overloaded"


class Unavailable(AsyncLLMError):
    """Not ready, shutting down, or the engine died (`not_ready`, `shutting_down`, `engine_dead`)."""

    status = 503
    code = "not_ready"


class Timeout(AsyncLLMError):
    """The deadline passed before anything was generated."""

    status = 504
    code = "timeout"


class ConfigError(AsyncLLMError):
    """A key of the configuration file or environment is wrong; the message names it and the fix."""

    code = "config"


class StartupError(AsyncLLMError):
    """The process cannot start: missing or broken model file, taken port, too little memory."""

    code = "startup"


class CapacityError(AsyncLLMError):
    """A sequence cannot fit even an empty KV cache."""

    status = 400
    type = "invalid_request_error"
    code = "context_length_exceeded"
