"""Everything about text that may take long, in a small pool of threads beside the loop.

Tokenizing a megabyte takes half a second; on the loop, that would be half a second without an answer for anybody. A
short request takes less than the way to another thread and back, and is worked on at once. Owns the threads; called on
the loop thread.
"""

import asyncio
import functools
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from asyncllm.errors import Overloaded
from asyncllm.router.chat_template import ChatTemplate, RenderingTakesLong
from asyncllm.router.constraint import Grammar
from asyncllm.router.grammar import Grammars, GrammarSpec
from asyncllm.router.output.base import ToolFormat
from asyncllm.router.strict_calls import CallStarts
from asyncllm.router.template_sandbox import MAX_RENDER_S
from asyncllm.router.tokenizer import ContextLimit, Tokenizer

T = TypeVar("T")

SHORT_BYTES = 2048  # of a request whose text takes half a millisecond at most
SHORT_RENDER_S = 0.02  # that its chat template may take on the loop: rather more than any that means well


class TextPool:
    """Tokenizes prompts, renders conversations and compiles grammars off the loop."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, num_threads: int, max_pending: int) -> None:
        """`max_pending`: requests that may wait for a thread; beyond, they are refused with Overloaded."""
        self._tokenizer = tokenizer
        self._template = template
        self._max_pending = max_pending
        self._num_pending = 0
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self._grammars = Grammars(tokenizer)
        self._is_template_slow = False
        self._call_starts: CallStarts | None = None  # once a request has strict functions

    def prepare(self) -> None:
        """Begin what would hold up the first request that needs it."""
        self._threads.submit(self._grammars.prepare)

    async def encode_prompts(
        self, prompts: Sequence[str | Sequence[int]], add_special_tokens: bool, limit: ContextLimit, num_bytes: int
    ) -> list[Sequence[int]]:
        """Ids of raw prompts; those that are ids already pass through. `num_bytes`: of all that is given, at most."""

        def work() -> list[Sequence[int]]:
            texts = [prompt for prompt in prompts if isinstance(prompt, str)]
            encoded = map(packed, self._tokenizer.encode_prompts(texts, add_special_tokens, limit))
            return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]

        return await self._run(work, num_bytes if any(isinstance(prompt, str) for prompt in prompts) else 0)

    async def render_chat(
        self,
        messages: list[dict[str, Any]],
        limit: ContextLimit,
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_kwargs: dict[str, Any],
        num_bytes: int,
    ) -> Sequence[int]:
        """Ids of a conversation. `num_bytes`: of all that is given, at most."""
        return await self._render(
            lambda limit_s: packed(
                self._template.encode(
                    messages,
                    tools=tools,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    template_kwargs=template_kwargs,
                    limit=limit,
                    limit_s=limit_s,
                )
            ),
            num_bytes,
        )

    async def render_text(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_kwargs: dict[str, Any],
        num_bytes: int,
    ) -> str:
        """A conversation as one text. `num_bytes`: of all that is given, at most."""
        return await self._render(
            lambda limit_s: self._template.render(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_kwargs=template_kwargs,
                limit_s=limit_s,
            ),
            num_bytes,
        )

    async def decode(self, token_ids: Sequence[int], num_bytes: int) -> str:
        """The text of these tokens. `num_bytes`: of the request they came in."""

        def work() -> str:
            # Token by token: the library decodes in one call that holds the GIL, 30 ms long for 131,072 tokens. What
            # this thread adds to the table of bytes is what the loop would add.
            detokenizer = self._tokenizer.detokenizer(skip_special_tokens=False)
            return "".join([*map(detokenizer.push, token_ids), detokenizer.finish()])

        return await self._run(work, num_bytes)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token; half a character shows as U+FFFD."""
        token_bytes = self._tokenizer.token_bytes
        return await self._run(lambda: [token_bytes(i).decode("utf-8", "replace") for i in token_ids], len(token_ids))

    async def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences to ban: each word as it begins a text, and as it stands behind a space."""

        def work() -> tuple[tuple[int, ...], ...]:
            bare = self._tokenizer.encode_texts([word.lstrip(" ") for word in words])
            spaced = self._tokenizer.encode_texts([" " + word.lstrip(" ") for word in words])
            banned: dict[tuple[int, ...], None] = {}
            for plain, behind in zip(bare, spaced):
                if plain:
                    banned[tuple(plain)] = None
                if behind and behind[-len(plain) :] != plain:  # otherwise the bare form bans it already
                    banned[tuple(behind)] = None
            return tuple(banned)

        return await self._run(work, sum(map(len, words)) + len(words))

    async def compile_grammar(self, spec: GrammarSpec, param: str) -> Grammar:
        """A grammar, compiled off the loop unless it is still there."""
        grammar = self._grammars.cached(spec)
        if grammar is not None:
            return grammar
        return await self._run(lambda: self._grammars.compile(spec, param), SHORT_BYTES + 1)

    async def call_starts(self, tool_format: ToolFormat, vocab_size: int) -> CallStarts:
        """How the model's tokens lead into calls; made once."""
        if self._call_starts is None:
            # Several requests may come here at once: they make the same.
            work = functools.partial(CallStarts, self._tokenizer, tool_format, vocab_size)
            self._call_starts = await self._run(work, SHORT_BYTES + 1)
        return self._call_starts

    def close(self) -> None:
        """Let the threads end; what waits for them is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _render(self, work: Callable[[float], T], num_bytes: int) -> T:
        """Work with the chat template, given its limit in seconds.

        A short conversation is quick to render, unless the template runs in circles. The first time that one does, it
        begins once more in a thread, and from then on they all go there.
        """
        if num_bytes <= SHORT_BYTES and not self._is_template_slow:
            try:
                return work(SHORT_RENDER_S)
            except RenderingTakesLong:
                self._is_template_slow = True
        return await self._run(lambda: work(MAX_RENDER_S), max(num_bytes, SHORT_BYTES + 1))

    async def _run(self, work: Callable[[], T], num_bytes: int) -> T:
        if num_bytes <= SHORT_BYTES:
            return work()
        if self._num_pending >= self._max_pending:
            raise Overloaded(
                f"The server is overloaded: {self._num_pending} requests wait to be tokenized.", retry_after_s=1.0
            )
        self._num_pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._num_pending -= 1


def packed(token_ids: Sequence[int]) -> Sequence[int]:
    """The same ids in 4 bytes each. The garbage collector looks at every element of a list, and at none of these."""
    return array("I", token_ids)
