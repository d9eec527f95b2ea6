"""POST /tokenize, /detokenize and /apply-template over real sockets: a token is a byte, or a special token."""

import threading
from typing import Any

import msgspec
import pytest

from asyncllm.server import tokens
from tests.server.harness import (
    BACKEND,
    CAPACITY,
    END,
    FACTS,
    TEMPLATE,
    VOCAB_SIZE,
    Server,
    check_error,
    ids,
    running,
    with_facts,
)

USER, ASSISTANT, SYSTEM = (BACKEND.token_to_id(f"<|{role}|>") for role in ("user", "assistant", "system"))
TURNS = [{"role": "user", "content": "hi"}]
LONG = "é<|end|> " * 300  # more than is worked on without the pool


async def ask(server: Server, path: str, **body: Any) -> Any:
    """An answer that must succeed."""
    status, answer = await server.post(path, body)
    assert status == 200, answer
    return answer


# --- /tokenize -------------------------------------------------------------------------------------------------------


async def test_a_prompt_becomes_tokens_and_their_number() -> None:
    async with running() as server:
        answer = await ask(server, "/tokenize", prompt="a<|end|>")
        assert answer == {"count": 2, "max_model_len": 512, "tokens": [*ids("a"), END], "token_strs": None}
        assert (await ask(server, "/tokenize", prompt=""))["tokens"] == []


async def test_a_bos_is_added_unless_it_is_not_wanted() -> None:
    facts = with_facts(FACTS, bos_token="<|system|>", bos_token_id=SYSTEM, add_bos=True)
    async with running(facts=facts) as server:
        for wanted, expected in ((None, [SYSTEM]), (True, [SYSTEM]), (False, [])):
            answer = await ask(server, "/tokenize", prompt="ab", add_special_tokens=wanted)
            assert answer["tokens"] == [*expected, *ids("ab")]


async def test_token_strings_are_told_where_asked_for() -> None:
    async with running() as server:
        answer = await ask(server, "/tokenize", prompt="a<|end|>é", return_token_strs=True)
        assert answer["token_strs"] == ["a", "<|end|>", "\ufffd", "\ufffd"]
        answer = await ask(server, "/tokenize", messages=TURNS, return_token_strs=True)
        assert answer["token_strs"] == ["<|user|>", "h", "i", "<|end|>", "<|assistant|>"]
        answer = await ask(server, "/tokenize", prompt=LONG, return_token_strs=True)
        assert "".join(answer["token_strs"]) == LONG.replace("é", "\ufffd\ufffd")


async def test_a_conversation_becomes_what_chat_would_compute() -> None:
    async with running() as server:
        messages = [{"role": "system", "content": "<|end|>"}, *TURNS]
        answer = await ask(server, "/tokenize", messages=messages)
        assert answer["tokens"] == [SYSTEM, *ids_of_text("<|end|>"), END, USER, *ids("hi"), END, ASSISTANT]
        status, chat = await server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
        assert status == 200 and chat["usage"]["prompt_tokens"] == answer["count"]


def ids_of_text(text: str) -> list[int]:
    """Ids of text in which nothing is special."""
    return [token for character in text for token in ids(character)]


async def test_the_ways_to_end_a_conversation() -> None:
    async with running() as server:
        start = [USER, *ids("hi")]
        for options, end in (
            ({}, [END, ASSISTANT]),
            ({"add_generation_prompt": True}, [END, ASSISTANT]),
            ({"add_generation_prompt": False}, [END]),
            ({"continue_final_message": True}, []),
            ({"continue_final_message": True, "add_generation_prompt": False}, []),
            ({"add_special_tokens": False}, [END, ASSISTANT]),
        ):
            assert (await ask(server, "/tokenize", messages=TURNS, **options))["tokens"] == [*start, *end], options


async def test_a_text_longer_than_the_context_is_counted_all_the_same() -> None:
    async with running() as server:
        assert (await ask(server, "/tokenize", prompt="a" * 5000))["count"] == 5000
        messages = [{"role": "user", "content": "a" * 5000}]
        answer = await ask(server, "/tokenize", messages=messages)
        assert (answer["count"], answer["max_model_len"]) == (5003, 512)


async def test_what_is_counted_is_bounded() -> None:
    async with running() as server:
        largest = tokens.MAX_TOKENS
        assert (await ask(server, "/tokenize", prompt="a" * largest))["count"] == largest
        for body, param in (
            ({"prompt": "a" * (largest + 1)}, "prompt"),
            ({"messages": [{"role": "user", "content": "a" * largest}]}, "messages"),
        ):
            status, answer = await server.post("/tokenize", body)
            error = check_error(status, answer, 400, param=param, code="context_length_exceeded")
            assert str(largest) in error["message"]


# --- /detokenize -----------------------------------------------------------------------------------------------------


async def test_tokens_become_their_text_special_ones_included() -> None:
    async with running() as server:
        assert await ask(server, "/detokenize", tokens=[*ids("aé"), END]) == {"prompt": "aé<|end|>"}
        assert await ask(server, "/detokenize", tokens=[]) == {"prompt": ""}
        assert await ask(server, "/detokenize", tokens=ids("é")[:1]) == {"prompt": "\ufffd"}
        assert await ask(server, "/detokenize", tokens=[0, VOCAB_SIZE - 1])


async def test_tokens_and_text_are_each_others_inverse() -> None:
    async with running() as server:
        for text in ("", "hello", "\n\t\"\\", "naïve 😀", LONG):  # fmt: skip
            answer = await ask(server, "/tokenize", prompt=text)
            assert (await ask(server, "/detokenize", tokens=answer["tokens"]))["prompt"] == text


async def test_as_many_tokens_as_are_counted_are_turned_back() -> None:
    async with running() as server:
        (a,) = ids("a")
        answer = await ask(server, "/detokenize", tokens=[a] * tokens.MAX_TOKENS)
        assert len(answer["prompt"]) == tokens.MAX_TOKENS and set(answer["prompt"]) == {"a"}
        status, answer = await server.post("/detokenize", {"tokens": [a] * (tokens.MAX_TOKENS + 1)})
        assert status == 400, "too many"
        check_error(status, answer, 400, param="tokens")


# --- /apply-template -------------------------------------------------------------------------------------------------


async def test_a_conversation_is_told_as_the_template_writes_it() -> None:
    async with running() as server:
        for options, end in (
            ({}, "<|end|><|assistant|>"),
            ({"add_generation_prompt": False}, "<|end|>"),
            ({"continue_final_message": True}, ""),
        ):
            answer = await ask(server, "/apply-template", messages=TURNS, **options)
            assert answer == {"prompt": "<|user|>hi" + end}


async def test_templates_see_their_variables_and_tools() -> None:
    template = (
        "{{ mood }}|{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}{{ messages[0].content }}"
        "{# <tool_call> #}"
    )
    async with running(facts=with_facts(FACTS, chat_template=template)) as server:
        body = {
            "messages": [{"role": "user", "content": "x" * 3000}],
            "chat_template_kwargs": {"mood": "calm"},
            "tools": [{"type": "function", "function": {"name": "look"}}],
        }
        text = "calm|look;" + "x" * 3000
        assert await ask(server, "/apply-template", **body) == {"prompt": text}
        assert (await ask(server, "/tokenize", **body))["tokens"] == ids(text)


TOOLS = [{"type": "function", "function": {"name": name}} for name in ("look", "jump")]
CALLED = [
    *TURNS,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_0123456789", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "call_0123456789", "content": "nothing"},
]
MISTRAL = (
    "{% for message in messages %}{{ message.role + '|' + message.content }}{% for call in message.tool_calls or [] %}"
    "{{ call.id + (call.function.arguments | tojson) }}{% endfor %}{{ message.tool_call_id }}{% endfor %}"
    "{{ tools | tojson }}{{ '<|assistant|>' }}{# [TOOL_CALLS] #}"
)


@pytest.mark.parametrize("template", [TEMPLATE, MISTRAL], ids=["knows no tools", "mistral"])
@pytest.mark.parametrize(
    "body",
    [
        {"messages": TURNS},
        {"messages": CALLED},
        {"messages": CALLED, "tools": TOOLS},
        {"messages": TURNS, "tools": TOOLS, "tool_choice": "none"},
        {"messages": TURNS, "tools": TOOLS, "tool_choice": "required"},
        {"messages": TURNS, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "look"}}},
    ],
)
async def test_what_is_told_is_what_generation_sees(template: str, body: dict) -> None:
    room = msgspec.structs.replace(CAPACITY, num_blocks=1025, max_context_length=4096)
    async with running(facts=with_facts(FACTS, chat_template=template), capacity=room) as server:
        counted = (await ask(server, "/tokenize", **body))["tokens"]
        shown = (await ask(server, "/apply-template", **body))["prompt"]
        usage = (await ask(server, "/v1/chat/completions", **body, max_tokens=1))["usage"]
        seen = [
            list(new.token_ids[: new.num_prompt_tokens]) for plan in server.executor.plans for new in plan.new_slots
        ]
        assert seen == [counted] and usage["prompt_tokens"] == len(counted)
        assert BACKEND.encode(shown).ids == counted
    if "tools" in body:
        is_shown = [tool["function"]["name"] in shown for tool in TOOLS]
        assert is_shown == [body.get("tool_choice") != "none", body.get("tool_choice") in (None, "required")]
    assert "call_0123456789" not in shown, "ids are cut to what Mistral's templates take, and not part of the fallback"


async def test_a_model_without_a_template_says_so() -> None:
    async with running(facts=with_facts(FACTS, chat_template=None)) as server:
        for path in ("/tokenize", "/apply-template"):
            status, answer = await server.post(path, {"messages": TURNS})
            check_error(status, answer, 400, param="messages")
        assert (await ask(server, "/tokenize", prompt="a"))["count"] == 1


async def test_text_in_answers_is_bounded() -> None:
    repeats = "{% for i in range(64) %}{{ messages[0].content }}{% endfor %}"
    async with running(facts=with_facts(FACTS, chat_template=repeats)) as server:
        largest = tokens.MAX_ANSWER_CHARS
        messages = [{"role": "user", "content": "a" * (largest // 64)}]
        assert len((await ask(server, "/apply-template", messages=messages))["prompt"]) == largest
        messages[0]["content"] += "a"
        check_error(*await server.post("/apply-template", {"messages": messages}), 400, param="messages")


async def test_text_of_many_long_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_ANSWER_CHARS", 13)
    async with running() as server:
        for path, one, param in (
            ("/detokenize", {"tokens": [END]}, "tokens"),
            ("/tokenize", {"prompt": "<|end|>", "return_token_strs": True}, "prompt"),
        ):
            await ask(server, path, **one)
            status, answer = await server.post(path, one | {param: one[param] * 2})
            check_error(status, answer, 400, param=param)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "body", "param"),
    [
        (["/tokenize"], {}, "prompt"),
        (["/tokenize"], {"prompt": ["a"]}, "prompt"),
        (["/tokenize"], {"prompt": "a", "messages": TURNS}, "messages"),
        (["/tokenize"], {"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
        (["/tokenize"], {"prompt": "a", "continue_final_message": False}, "continue_final_message"),
        (["/tokenize"], {"prompt": "a", "chat_template_kwargs": {}}, "chat_template_kwargs"),
        (["/tokenize"], {"prompt": "a", "tools": []}, "tools"),
        (["/tokenize"], {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        (["/tokenize"], {"prompt": "a", "return_token_strs": "yes"}, "return_token_strs"),
        (["/tokenize"], {"messages": TURNS, "add_special_tokens": True}, "add_special_tokens"),
        (["/apply-template"], {}, "messages"),
        (["/apply-template"], {"messages": None}, "messages"),
        (["/tokenize", "/apply-template"], {"messages": []}, "messages"),
        (["/tokenize", "/apply-template"], {"messages": TURNS * 4097}, "messages"),
        (["/tokenize", "/apply-template"], {"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role"),
        (
            ["/tokenize", "/apply-template"],
            {"messages": TURNS, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        (
            ["/tokenize", "/apply-template"],
            {"messages": TURNS, "chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs",
        ),
        (["/tokenize", "/apply-template"], {"messages": TURNS, "tools": ["look"]}, "tools[0]"),
        (["/detokenize"], {}, "tokens"),
        (["/detokenize"], {"tokens": "a"}, "tokens"),
        (["/detokenize"], {"tokens": [1, True]}, "tokens[1]"),
        (["/detokenize"], {"tokens": [1, -1]}, "tokens[1]"),
        (["/detokenize"], {"tokens": [1, 2.5]}, "tokens[1]"),
        (["/detokenize"], {"tokens": [1, VOCAB_SIZE, 2]}, "tokens[1]"),
        (["/detokenize"], {"tokens": [2**63]}, "tokens[0]"),
    ],
)
async def test_a_wrong_field_is_a_400_that_names_it(paths: list[str], body: dict, param: str) -> None:
    async with running() as server:
        for path in paths:
            check_error(*await server.post(path, body), 400, param=param)


async def test_other_models_are_not_found_and_unknown_fields_are_named() -> None:
    async with running() as server:
        for path, body in (
            ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]}), ("/apply-template", {"messages": TURNS}),
        ):  # fmt: skip
            check_error(*await server.post(path, body | {"model": "gpt-5"}), 404, param="model", code="model_not_found")
            status, _, headers = await server.call("POST", path, body | {"model": "fake", "truncate": 1})
            assert (status, headers["x-ignored-params"]) == (200, "truncate")


async def test_nothing_is_generated_for_them() -> None:
    gate = threading.Semaphore(0)
    async with running(gate=gate) as server:
        await ask(server, "/tokenize", prompt=LONG)
        await ask(server, "/apply-template", messages=TURNS)
        await ask(server, "/detokenize", tokens=[1])
        assert server.serving.metrics.stats.num_steps == 0 and not server.executor.plans
