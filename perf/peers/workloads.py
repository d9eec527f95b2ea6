"""What the servers are asked to do: the workloads whose ratios the bench reports."""

import re

import msgspec

from perf import load
from perf.client import RequestOptions
from perf.servers import Server

STREAMS = re.compile(r"streams_([1-9]\d*)")


class Workload(msgspec.Struct, frozen=True):
    """One kind of load. Prompts are about `input_tokens` long, answers exactly `output_tokens`."""

    name: str
    concurrency: int
    num_requests: int
    input_tokens: int
    output_tokens: int
    shared_prefix_tokens: int = 0  # of the prompt, equal in all requests of a cell

    def quick(self) -> "Workload":
        """The same in little, to see that everything runs."""
        return msgspec.structs.replace(
            self,
            num_requests=min(self.num_requests, max(2, self.concurrency)),
            output_tokens=min(self.output_tokens, 8),
        )

    def load(self, server: Server, seed: int, timeout_s: float) -> load.LoadParams:
        """This load on one server; the same prompts for the same seed."""
        return load.LoadParams(
            url=server.url,
            request=RequestOptions(
                output_tokens=self.output_tokens,
                fixed_length=server.spec.takes_ignore_eos,
                extra_body=server.spec.extra_body,
            ),
            num_requests=self.num_requests,
            concurrency=self.concurrency,
            num_warmup=0,  # a prompt of this seed would warm the shared prefix
            input_tokens=self.input_tokens,
            shared_prefix_tokens=self.shared_prefix_tokens,
            seed=seed,
            timeout_s=timeout_s,
            new_connections=True,  # llama.cpp closes them behind a stream without a word
        )


def streams(count: int) -> Workload:
    """So many streams at once, distinct prompts of 100 tokens, 64 tokens out.

    Half as many follow as streams end: they arrive one by one among those that run.
    """
    return Workload(f"streams_{count}", count, max(4, count + count // 2), 100, 64)


WARM_UP = Workload("warm_up", 1, 1, 16, 2)
DEFAULT = (
    streams(1),
    streams(8),
    streams(32),
    Workload("tokens_1500", 1, 2, 1500, 8),
    Workload("shared_prefix", 4, 16, 1032, 32, shared_prefix_tokens=1000),
)


def named(name: str) -> Workload:
    """The workload of that name; `streams_N` for any N. Raises ValueError."""
    if match := STREAMS.fullmatch(name):
        return streams(int(match[1]))
    for workload in DEFAULT:
        if workload.name == name:
            return workload
    known = ", ".join(workload.name for workload in DEFAULT)
    raise ValueError(f"unknown workload {name!r}; known: {known}, streams_N")
