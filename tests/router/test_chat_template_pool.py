"""Short conversations are rendered on the loop, but for templates that take their time."""

import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from asyncllm.errors import InvalidRequest
from asyncllm.router.chat_template import ChatTemplate
from asyncllm.router.text_pool import SHORT_BYTES, TextPool
from asyncllm.router.tokenizer import Tokenizer
from tests.fakes_text import byte_text, byte_tokenizer

LOOP = "{% for i in range(messages[0].content | int) %}{% for j in range(99999) %}{% endfor %}{% endfor %}done"


class Recorded(ChatTemplate):
    """Remembers which thread rendered, and what it was allowed."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        renders.append((threading.current_thread() is threading.main_thread(), kwargs["limit_s"]))
        return super().render(*args, **kwargs)


renders: list[tuple[bool, float]] = []


@pytest.fixture
async def pool(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TextPool]:
    renders.clear()
    monkeypatch.setattr("asyncllm.router.text_pool.SHORT_RENDER_S", 0.0)
    text = byte_text(chat_template=LOOP)
    tokenizer = Tokenizer(byte_tokenizer(), text)
    made = TextPool(tokenizer, Recorded(text, tokenizer), 1, 10)
    yield made
    made.close()


async def render(pool: TextPool, content: str) -> str:
    return await pool.render_text(
        [{"role": "user", "content": content}],
        tools=None,
        add_generation_prompt=True,
        continue_final_message=False,
        template_kwargs={},
        num_bytes=len(content),
    )


async def test_short_conversation_is_rendered_on_the_loop(pool: TextPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncllm.router.text_pool.SHORT_RENDER_S", 1.0)
    assert await render(pool, "0") == "done"
    assert await render(pool, "0" * (SHORT_BYTES + 1)) == "done"
    assert renders == [(True, 1.0), (False, 2.0)]


async def test_template_that_is_slow_once_is_rendered_in_a_thread_from_then_on(pool: TextPool) -> None:
    assert await render(pool, "1") == "done"
    assert await render(pool, "0") == "done"
    assert renders == [(True, 0.0), (False, 2.0), (False, 2.0)]


async def test_template_without_an_end_ends_in_the_thread_too(pool: TextPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncllm.router.text_pool.MAX_RENDER_S", 0.0)
    with pytest.raises(InvalidRequest, match="it runs for more than 0 s"):
        await render(pool, "99999")
    assert renders == [(True, 0.0), (False, 0.0)]
