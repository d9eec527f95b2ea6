"""The chunks of OpenAI's two completion streams: what chat and text completions have in common.

A chunk is `start + json(text) + end`; nothing else is encoded per token.
"""

from asyncllm.errors import AsyncLLMError
from asyncllm.server.job import Job
from asyncllm.server.replies import Usage, encode_json, error_body

DONE = b"data: [DONE]\n\n"


class ChunkFrames:
    """The constant parts of a stream's chunks: `{head}INDEX,{…}` and what closes them; and how the stream ends."""

    def __init__(self, job: Job, kind: str) -> None:
        """`kind`: the chunks' `object`."""
        head = {
            "id": job.id,
            "object": kind,
            "created": job.created,
            "model": job.model,
            "system_fingerprint": job.fingerprint,
        }
        self.job = job
        self._head = b"data: " + encode_json(head)[:-1] + b',"choices":['
        self._usage_null = b',"usage":null' if job.include_usage else b""

    def closing(self) -> bytes:
        """The chunk without choices that carries the usage, where it was asked for, and OpenAI's last word."""
        if not self.job.include_usage:
            return DONE
        return self._head + b'],"usage":' + encode_json(self.job.usage()) + b"}\n\n" + DONE

    def failing(self, error: AsyncLLMError) -> bytes:
        """An error after the status line."""
        return b"data: " + encode_json(error_body(error)) + b"\n\n" + DONE

    def start(self, index: int, field: bytes) -> bytes:
        """The start of a chunk about one choice, up to the value of `field`."""
        return self._head + b'{"index":%d,"%b":' % (index, field)

    def end(self, logprobs: bytes = b"null", finish: bytes = b"null", usage: Usage | None = None) -> bytes:
        """The end of such a chunk."""
        tail = self._usage_null if usage is None else b',"usage":' + encode_json(usage)
        return b',"logprobs":%b,"finish_reason":%b}]%b}\n\n' % (logprobs, finish, tail)

    def reason(self, finish_reason: str | None, stop_reason: str | int | None) -> bytes:
        """The value of finish_reason, and vLLM's stop_reason behind it."""
        return encode_json(finish_reason) + b',"stop_reason":' + encode_json(stop_reason)
