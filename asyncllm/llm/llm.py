"""`LLM`: the same for programs without an event loop of their own. Scripts, notebooks, tests.

An `AsyncLLM` lives on an event loop in a thread of its own, from construction to `close`, and every method hands it a
coroutine and waits. A thread, rather than a loop that runs during calls only: a notebook's thread has a running loop
already, several threads may call at once, and a stream goes on while its reader works on what it has.
"""

import asyncio
import contextlib
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, Self, TypeVar

from asyncllm.config import Config
from asyncllm.errors import AsyncLLMError, Unavailable
from asyncllm.llm.async_llm import AsyncLLM
from asyncllm.llm.batch import Progress
from asyncllm.llm.inputs import Messages, Prompt
from asyncllm.llm.output import Embedding, Output
from asyncllm.llm.params import Params
from asyncllm.router.stream import Delta

T = TypeVar("T")


class LLM:
    """A model in this process: `with LLM("smollm2-135m-instruct") as llm: [output] = llm.generate("Once upon a time")`.

    Any thread may call it, several at once. Ctrl-C ends the call it interrupts and frees what that had running.
    """

    def __init__(
        self, model: str | Path | None = None, *, config: Config | str | Path | None = None, **options: Any
    ) -> None:
        """Load the model and wait until it takes work; the arguments are those of `AsyncLLM`.

        Raises ConfigError and StartupError.
        """
        self._llm = AsyncLLM(model, config=config, **options)
        self._thread = LoopThread(self._llm)
        # Also for a program that ends without closing it: a device must not be left in the middle of a step.
        self._finalizer = weakref.finalize(self, self._thread.drop)
        try:
            self._thread.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End what runs, stop both threads and free the model. Idempotent."""
        self._finalizer.detach()
        self._thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def facts(self) -> dict[str, str]:
        """Device, precision and memory."""
        return self._llm.facts

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] | None = None,
        *,
        adapter: str | None = None,
        progress: bool | Progress = False,
        **fields: Any,
    ) -> list[Output]:
        """See `AsyncLLM.generate`."""
        return self._thread.run(
            lambda: self._llm.generate(prompts, params, adapter=adapter, progress=progress, **fields)
        )

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: Params | Sequence[Params] | None = None,
        *,
        adapter: str | None = None,
        progress: bool | Progress = False,
        **fields: Any,
    ) -> list[Output]:
        """See `AsyncLLM.chat`."""
        return self._thread.run(lambda: self._llm.chat(messages, params, adapter=adapter, progress=progress, **fields))

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, progress: bool | Progress = False, **fields: Any
    ) -> list[Embedding]:
        """See `AsyncLLM.embed`."""
        return self._thread.run(lambda: self._llm.embed(prompts, progress=progress, **fields))

    def stream(self, prompt: Prompt, params: Params | None = None, **fields: Any) -> Iterator[Delta]:
        """See `AsyncLLM.stream`."""
        return self._iterate(self._llm.stream(prompt, params, **fields))

    def stream_chat(self, messages: Messages, params: Params | None = None, **fields: Any) -> Iterator[Delta]:
        """See `AsyncLLM.stream_chat`."""
        return self._iterate(self._llm.stream_chat(messages, params, **fields))

    def _iterate(self, deltas: AsyncIterator[Delta]) -> Iterator[Delta]:
        async def following() -> Delta | None:
            return await anext(deltas, None)

        async def end() -> None:
            await deltas.aclose()  # type: ignore[attr-defined]  # an async generator

        try:
            while (delta := self._thread.run(following)) is not None:
                yield delta
        finally:
            with contextlib.suppress(Unavailable):  # closed before its stream was: nothing runs any more
                self._thread.run(end)


class LoopThread:
    """An event loop in a thread of its own, on which one `AsyncLLM` lives."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._ready: Future[None] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None  # while it may be given work
        self._stopping: asyncio.Event | None = None
        self._was_told = False  # to stop, perhaps before there was a loop to tell
        self._lock = threading.RLock()  # of the three above; the collector may call `drop` wherever it is held
        # A daemon, since Python joins all others before it runs the exit hooks, `LLM`'s finalizer among them.
        self._thread = threading.Thread(target=self._main, name="asyncllm-loop", daemon=True)

    def start(self) -> None:
        """Start it and wait until the model takes work. Raises what kept it from that."""
        self._thread.start()
        self._ready.result()

    def stop(self) -> None:
        """Close the model and end the thread. Idempotent."""
        self._tell()
        if self._thread.ident is not None:
            self._thread.join()

    def drop(self) -> None:
        """The same for an LLM that nobody has any more: any thread may find that out, those to be waited for too."""
        if threading.current_thread() is threading.main_thread():
            self.stop()
        else:
            self._tell()

    def _tell(self) -> None:
        with self._lock:
            self._was_told = True
            if self._loop is not None and self._stopping is not None:
                self._loop.call_soon_threadsafe(self._stopping.set)

    def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine there and wait for it; whatever interrupts the wait cancels it."""
        if threading.current_thread() is self._thread:
            raise AsyncLLMError("An LLM cannot be called from its own thread, such as from a progress function.")
        with self._lock:
            if self._loop is None:
                raise Unavailable("This LLM is closed.")
            future = asyncio.run_coroutine_threadsafe(make(), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise Unavailable("This LLM was closed.") from None
        finally:
            future.cancel()  # nothing to do where it is done

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(self._live())
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            elif self._ready.exception() is not error:
                raise

    async def _live(self) -> None:
        stopping = asyncio.Event()
        with self._lock:
            self._stopping, self._loop = stopping, asyncio.get_running_loop()
            if self._was_told:
                stopping.set()
        starting, told = asyncio.ensure_future(self._llm.start()), asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait((starting, told), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                self._ready.set_result(None)
            else:
                starting.cancel()  # it closes what it has
                await asyncio.wait((starting,))
                self._ready.set_exception(Unavailable("This LLM was closed while it loaded."))
            await told
        finally:
            told.cancel()
            with self._lock:
                self._loop = None
            await self._llm.close()


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed; None = asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
