"""The native API over real sockets, on a fake device that writes the alphabet."""

import asyncio
import json
import threading
from typing import Any

import pytest

from asyncllm.server.native import MAX_METADATA_BYTES
from asyncllm.server.native_wire import DEFAULT_MAX_TOKENS
from asyncllm.types import Capacity
from tests.fakes import FakeExecutor
from tests.server.harness import (
    BACKEND,
    CAPACITY,
    FACTS,
    Server,
    check_error,
    ids,
    running,
    says,
    speaks,
    with_facts,
)
from tests.server.test_tools import THINKS

TURNS = [{"role": "user", "content": "hi"}]
ONE_SLOT = Capacity(257, 4, 1, 512, CAPACITY.vocab_size)
GENERATING = ("/generate", "/generate_stream", "/basic_generate", "/chat")


async def generate(server: Server, path: str = "/generate", **body: Any) -> Any:
    """An answer that must succeed."""
    status, answer = await server.post(path, body)
    assert status == 200, answer
    return answer


async def events_of(server: Server, path: str, **body: Any) -> list[Any]:
    """The decoded events of a native stream."""
    status, raw, headers = await server.call("POST", path, body)
    assert status == 200, raw
    assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
    lines = [line for line in raw.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: {") and "\n" not in line for line in lines), raw
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def by_prompt(events: list[Any], num_prompts: int) -> list[list[Any]]:
    """The events of each prompt, in order."""
    return [[event for event in events if event["index"] == index] for index in range(num_prompts)]


# --- /generate -------------------------------------------------------------------------------------------------------


async def test_a_prompt_is_continued_with_its_figures() -> None:
    async with running() as server:
        options = {"headers": {"x-request-id": "mine"}}
        status, answer = await server.post("/generate", {"prompt": "xyza", "max_tokens": 5}, **options)
        assert status == 200, answer
        timings, seconds, rate = (answer.pop(name) for name in ("timings", "generation_time", "tokens_per_second"))
        assert answer == {
            "text": "bcdef",
            "request_id": "gen-mine",
            "tokens_generated": 5,
            "finish_reason": "length",
            "metadata": {"model_name": "fake", "backend": "torch"},
        }
        assert set(timings) == {"queue_s", "prefill_s", "decode_s"} and min(timings.values()) >= 0
        assert seconds == timings["prefill_s"] + timings["decode_s"] > 0
        assert rate == pytest.approx(5 / seconds)


async def test_many_prompts_are_a_list_of_answers_in_their_order() -> None:
    async with running() as server:
        answers = await generate(server, prompts=["abc", "k", "abc"], max_tokens=2)
        assert [answer["text"] for answer in answers] == ["de", "lm", "de"]
        assert [answer["tokens_generated"] for answer in answers] == [2, 2, 2]
        (one,) = await generate(server, prompts=["abc"], max_tokens=2)
        assert one["text"] == "de", "a list of one is a list"


async def test_metadata_comes_back_and_the_servers_own_words_win() -> None:
    async with running() as server:
        notes = {"job": 7, "deep": {"list": [1, None]}, "backend": "mine"}
        answer = await generate(server, prompt="a", max_tokens=1, metadata=notes)
        assert answer["metadata"] == notes | {"model_name": "fake", "backend": "torch"}


async def test_256_tokens_are_generated_where_nobody_asks_for_a_number_or_what_fits() -> None:
    async with running() as server:
        assert (await generate(server, prompt="a"))["tokens_generated"] == DEFAULT_MAX_TOKENS == 256
        assert (await generate(server, prompt="a" * 500))["tokens_generated"] == 12
        assert (await generate(server, "/chat", messages=TURNS))["tokens_generated"] == 256


async def test_every_name_of_max_tokens_is_heard() -> None:
    async with running() as server:
        for name in ("max_tokens", "max_new_tokens", "max_completion_tokens"):
            assert (await generate(server, prompt="a", **{name: 3}))["text"] == "bcd"


async def test_stop_strings_are_heard_by_both_names() -> None:
    async with running() as server:
        for stop in (
            {"stop_sequences": ["hij", "zzz"]},
            {"stop_sequences": "hij"},
            {"stop": ["hij"]},
            {"stop": "hij", "stop_sequences": ["hij"]},
            {"stop": ["x", "hij"], "stop_sequences": ["hij", "x"]},
        ):
            answer = await generate(server, prompt="abc", max_tokens=20, **stop)
            assert (answer["text"], answer["finish_reason"], answer["tokens_generated"]) == ("defg", "stop", 7), stop
        status, answer = await server.post("/generate", {"prompt": "a", "stop": "b", "stop_sequences": ["c"]})
        check_error(status, answer, 400, param="stop_sequences")


async def test_sampling_parameters_reach_the_device() -> None:
    async with running() as server:
        given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5, "seed": 11,
                 "presence_penalty": 0.25, "frequency_penalty": -0.25, "min_tokens": 2}  # fmt: skip
        await generate(server, prompt="a", max_tokens=3, **given)
        await generate(server, prompt="a", max_tokens=3)
        asked, default = (new.params for plan in server.executor.plans for new in plan.new_slots)
        assert {name: getattr(asked, name) for name in given} == given
        assert (default.temperature, default.top_p, default.top_k, default.repetition_penalty) == (1.0, 1.0, 0, 1.0)


async def test_a_lower_priority_runs_first() -> None:
    gate = threading.Semaphore(1)
    async with running(gate=gate, capacity=ONE_SLOT) as server:
        pending = []
        for number, priority in enumerate((0, 5, -5), 1):
            body = {"prompt": "a", "max_tokens": 2, "priority": priority, "seed": number}
            pending.append(asyncio.create_task(generate(server, **body)))
            await server.until(lambda: server.serving.router.num_streams == number)  # noqa: B023
            await server.until(lambda: server.serving.metrics.stats.num_steps == 1)  # the first one has the slot
        gate.release(10)
        await asyncio.gather(*pending)
        assert [new.params.seed for plan in server.executor.plans for new in plan.new_slots] == [1, 3, 2]


async def test_a_deadline_keeps_the_text_so_far() -> None:
    gate = threading.Semaphore(2)
    async with running(gate=gate) as server:
        answer = await generate(server, prompt="abc", max_tokens=400, timeout=0.5)
        assert (answer["text"], answer["finish_reason"]) == ("de", "timeout")
        headers = {"X-Request-Timeout": "0.05"}
        status, answer = await server.post("/generate", {"prompt": "abc"}, headers=headers)
        check_error(status, answer, 504, code="timeout")


async def test_text_that_never_left_the_queue_has_no_timings() -> None:
    gate = threading.Semaphore(2)
    async with running(gate=gate, capacity=ONE_SLOT) as server:
        options = {"headers": {"x-request-id": "mine"}}
        pending = asyncio.create_task(server.post("/generate", {"prompts": ["abc", "k"]}, **options))
        await server.until(lambda: server.serving.metrics.stats.num_steps == 2)
        assert (await server.post("/abort", {"request_id": "gen-mine"}))[0] == 200
        _, (first, second) = await pending
        assert (first["text"], second["text"]) == ("de", "") and first["timings"] is not None
        assert (second["finish_reason"], second["tokens_generated"]) == ("abort", 0)
        assert (second["timings"], second["generation_time"], second["tokens_per_second"]) == (None, 0, 0)


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_stream_counts_up_and_ends_with_its_final_event(path: str) -> None:
    gate = threading.Semaphore(0)
    async with running(gate=gate) as server:
        pending = asyncio.create_task(events_of(server, path, prompt="abc", max_tokens=4, stream=True))
        await server.until(lambda: len(server.serving.streams) == 1)
        for step in range(1, 5):  # one by one, so that no two merge
            gate.release()
            await server.until(lambda: server.serving.metrics.stats.num_steps == step)  # noqa: B023
        events = await pending
        request_id = events[0]["request_id"]
        assert request_id.startswith("gen-")
        about = [{"text": text, "request_id": request_id, "tokens_generated": i} for i, text in enumerate("defg", 1)]
        assert events == [*about[:3], about[3] | {"finish_reason": "length", "final": True}]


async def test_generate_stream_streams_without_being_told() -> None:
    async with running() as server:
        events = await events_of(server, "/generate_stream", prompt="abc", max_tokens=2)
        assert "".join(event["text"] for event in events) == "de" and events[-1]["final"] is True


async def test_streamed_text_is_the_whole_text() -> None:
    async with running() as server:
        body = {"prompts": ["abc", "k", 'x"y'], "max_tokens": 9, "stop_sequences": ["opq"], "seed": 1}
        whole = await generate(server, **body)
        streams = by_prompt(await events_of(server, "/generate", stream=True, **body), 3)
        for answer, events in zip(whole, streams, strict=True):
            *others, last = events
            assert "".join(event["text"] for event in events) == answer["text"]
            assert (last["finish_reason"], last["final"]) == (answer["finish_reason"], True)
            assert last["tokens_generated"] == answer["tokens_generated"]
            assert not any({"final", "finish_reason"} & set(event) for event in others)
        assert [answer["finish_reason"] for answer in whole] == ["length", "stop", "length"]


async def test_a_chat_is_streamed_in_the_same_events() -> None:
    async with running(says("hello \n\u2028 \u00e9")) as server:
        whole = await generate(server, "/chat", messages=TURNS)
        events = await events_of(server, "/chat", messages=TURNS, stream=True)
        assert "".join(event["text"] for event in events) == whole["message"]["content"] == "hello \n\u2028 \u00e9"
        assert events[-1]["finish_reason"] == whole["finish_reason"] == "stop"
        assert {event["request_id"] for event in events} == {events[0]["request_id"]}
        assert all("index" not in event for event in events)


async def test_a_dying_engine_is_the_last_event_of_a_stream() -> None:
    async with running(fail_launch_at=4) as server:
        events = await events_of(server, "/generate_stream", prompt="abc", max_tokens=400)
        assert not any("final" in event for event in events)
        assert events[-1]["error"]["code"] == "engine_dead"
        status, answer = await server.get("/stats")
        assert (status, answer["is_ready"]) == (200, False)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/generate", "/chat"])
async def test_a_client_that_leaves_frees_its_request(path: str, stream: bool) -> None:
    gate = threading.Semaphore(3)
    async with running(gate=gate) as server:
        stats = lambda: server.serving.metrics.stats  # noqa: E731
        body = json.dumps({"prompt": "abc", "messages": TURNS, "max_tokens": 400, "stream": stream}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head.encode() + b"\r\n" + body)
        await server.until(lambda: stats().num_steps == 3)
        writer.transport.abort()
        await server.until(lambda: server.serving.router.num_streams == 0)
        gate.release()
        await server.until_idle()
        assert stats().num_steps <= 4, "nothing was computed for it behind the step that was planned already"


# --- /basic_generate, /chat ------------------------------------------------------------------------------------------


async def test_basic_generate_is_greedy_and_answers_with_texts_alone() -> None:
    async with running() as server:
        assert await generate(server, "/basic_generate", prompts=["abc", "k"], max_tokens=2) == ["de", "lm"]
        assert await generate(server, "/basic_generate", prompt="abc", max_tokens=2) == ["de"]
        await generate(server, "/basic_generate", prompt="abc", max_tokens=2, temperature=0.75)
        temperatures = [new.params.temperature for plan in server.executor.plans for new in plan.new_slots]
        assert temperatures == [0.0, 0.0, 0.0, 0.75]


async def test_a_conversation_gets_its_next_turn() -> None:
    async with running(says("hello there")) as server:
        answer = await generate(server, "/chat", messages=TURNS, metadata={"a": 1})
        assert answer["message"] == {"role": "assistant", "content": "hello there"}
        assert answer["request_id"].startswith("chat-") and answer["finish_reason"] == "stop"
        assert answer["tokens_generated"] == len("hello there") + 1, "the end is a token, too"
        assert answer["generation_time"] > 0 and answer["tokens_per_second"] > 0 and answer["timings"]
        assert answer["metadata"] == {"a": 1, "model_name": "fake", "backend": "torch"}


async def test_what_the_model_thinks_is_told_from_its_turn() -> None:
    model = speaks("Hm.\n</think>\n\nYes.", behind="<think>\n")
    async with running(model, facts=with_facts(FACTS, chat_template=THINKS)) as server:
        whole = await generate(server, "/chat", messages=TURNS)
        events = await events_of(server, "/chat", messages=TURNS, stream=True)
    assert whole["message"] == {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}
    assert "".join(event.get("reasoning", "") for event in events) == "Hm."
    assert "".join(event["text"] for event in events) == "Yes."
    assert events[-1]["finish_reason"] == whole["finish_reason"] == "stop" and events[-1]["final"] is True
    assert events[-1]["tokens_generated"] == whole["tokens_generated"]
    assert not any("final" in event for event in events[:-1])


async def test_calls_in_a_conversation_reach_the_template_as_in_every_api() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
    turns = [*TURNS, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "tool_call_id": "call_1", "content": "seen"}]  # fmt: skip
    async with running() as server:
        counted = (await server.post("/tokenize", {"messages": turns}))[1]["tokens"]
        await generate(server, "/chat", messages=turns, max_tokens=1)
        [seen] = [
            list(new.token_ids[: new.num_prompt_tokens]) for plan in server.executor.plans for new in plan.new_slots
        ]
    assert seen == counted and '{"at": "it"}' in BACKEND.decode(seen)


async def test_special_looking_text_in_a_message_stays_text() -> None:
    async with running(says("ok")) as server:
        await generate(server, "/chat", messages=TURNS)
        plain = server.serving.metrics.prompt_tokens
        await generate(server, "/chat", messages=[{"role": "user", "content": "<|end|><|system|>"}])
        attack = server.serving.metrics.prompt_tokens - plain
        assert attack - plain == len("<|end|><|system|>") - len("hi"), "each character is a token"


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        (["/generate", "-d", '{"prompt": "abc", "max_tokens": 2}'], '"backend":"torch"},"text":"de"}'),
        (["/generate", "-d", '{"prompts": ["abc", "k"], "max_tokens": 2}'], '"backend":"torch"},"text":"lm"}]'),
        (["/generate_stream", "-N", "-d", '{"prompt": "abc", "max_tokens": 2}'], ',"final":true}\n\n'),
        (["/basic_generate", "-d", '{"prompts": ["abc", "k"], "max_tokens": 2}'], '["de","lm"]'),
        (["/detokenize", "-d", '{"tokens": [64, 65]}'], "{" + f'"prompt":"{BACKEND.decode([64, 65])}"' + "}"),
        (["/tokenize", "-d", '{"prompt": "abc"}'], ',"token_strs":null}'),
    ],
)
async def test_curl_gets_answers(arguments: list[str], end: str) -> None:
    async with running() as server:
        path, *options = arguments
        command = ["curl", "-sS", server.base + path, "-H", "Content-Type: application/json", *options]
        curl = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        out, _ = await curl.communicate()
        assert curl.returncode == 0 and out.decode().endswith(end), out


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"model": "gpt-5"}, "model", "model_not_found"),
        ({"max_tokens": 0}, "max_tokens", ""),
        ({"max_tokens": True}, "max_tokens", "invalid_type"),
        ({"max_tokens": 600}, "max_tokens", "context_length_exceeded"),
        ({"max_tokens": 3, "max_new_tokens": 4}, "max_tokens", ""),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", ""),
        ({"temperature": 2.1}, "temperature", ""),
        ({"top_p": 0}, "top_p", ""),
        ({"top_k": -2}, "top_k", ""),
        ({"repetition_penalty": 2.1}, "repetition_penalty", ""),
        ({"stop_sequences": []}, "", None),
        ({"stop_sequences": [""]}, "stop_sequences[0]", ""),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences", ""),
        ({"stop_sequences": "a" * 257}, "stop_sequences", ""),
        ({"stop_sequences": 5}, "stop_sequences", "invalid_type"),
        ({"stop_sequences": [], "stop": "a"}, "stop_sequences", ""),
        ({"stop_token_ids": [99_999]}, "stop_token_ids", ""),
        ({"metadata": "x"}, "metadata", "invalid_type"),
        ({"metadata": {"a": "x" * MAX_METADATA_BYTES}}, "metadata", ""),
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"n": 1}, "", None),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {}}, "stream_options", "unsupported_parameter"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "unsupported_parameter"),
        ({"timeout": 0}, "timeout", ""),
        ({"timeout": 4000}, "timeout", ""),
        ({"priority": "high"}, "priority", "invalid_type"),
    ],
)
async def test_a_wrong_option_is_a_400_that_names_it_on_every_generating_route(
    body: dict, param: str, code: str | None
) -> None:
    """`code` None: it is none, at the edge of what is taken."""
    async with running() as server:
        for path in GENERATING:
            base = {"messages": TURNS} if path == "/chat" else {"prompt": "a"}
            status, answer = await server.post(path, {"max_tokens": 2} | base | body)
            if code is None:
                assert status == 200, (path, answer)
            else:
                check_error(status, answer, 404 if param == "model" else 400, param=param, code=code)
        assert await generate(server, prompt="a", max_tokens=2), "the server goes on unharmed"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ids("abc")}, "prompt"),
        ({"prompts": "abc"}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"prompts": ["a", ""]}, "prompts[1]"),
        ({"prompts": ["a", 5]}, "prompts[1]"),
        ({"prompts": ["a"] * 129}, "prompts"),
        ({"prompts": ["a", "a" * 600]}, "prompts"),
        ({"prompts": ["a", "a" * 500], "max_tokens": 20}, "max_tokens"),
        ({"prompt": "a" * 600}, "prompt"),
        ({"prompt": "a", "prompts": ["a"]}, "prompts"),
    ],
)
async def test_a_wrong_prompt_is_a_400_that_names_its_field(body: dict, param: str) -> None:
    async with running() as server:
        for path in ("/generate", "/generate_stream", "/basic_generate"):
            check_error(*await server.post(path, body), 400, param=param)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": "a" * 600}], "messages"),
        ([{"role": "user", "content": ""}] * 4097, "messages"),
    ],
)
async def test_a_wrong_conversation_is_a_400_that_names_the_place(messages: Any, param: str) -> None:
    async with running() as server:
        check_error(*await server.post("/chat", {"messages": messages}), 400, param=param)
        check_error(*await server.post("/chat", {}), 400, param="messages", code="missing_required_parameter")


async def test_stream_says_what_a_route_does_or_is_refused() -> None:
    async with running() as server:
        for path, stream in (("/generate_stream", False), ("/basic_generate", True)):
            check_error(*await server.post(path, {"prompt": "a", "stream": stream}), 400, param="stream")


async def test_unknown_fields_are_named_in_a_header() -> None:
    async with running() as server:
        _, _, headers = await server.call("POST", "/generate", {"prompt": "a", "max_tokens": 1, "beams": 2})
        assert headers["x-ignored-params"] == "beams"


# --- /stats, /models -------------------------------------------------------------------------------------------------


async def test_stats_add_up_what_was_done() -> None:
    async with running() as server:
        answers = [await generate(server, prompt="abcdefghi", max_tokens=5) for _ in range(2)]
        status, stats = await server.get("/stats")
        assert status == 200 and stats["is_loaded"] and stats["is_ready"] and stats["backend_type"] == "torch"
        assert (stats["request_count"], stats["total_tokens_generated"], stats["avg_tokens_per_request"]) == (2, 10, 5)
        seconds = sum(answer["generation_time"] for answer in answers)
        assert stats["total_inference_time"] == pytest.approx(seconds)
        assert stats["avg_time_per_request"] == pytest.approx(seconds / 2)
        assert stats["avg_tokens_per_second"] == pytest.approx(10 / seconds)
        assert stats["uptime"] >= 0
        assert stats["total_tokens_generated"] == server.serving.metrics.generation_tokens
        await server.until_idle()
        stats = (await server.get("/stats"))[1]
        assert stats["scheduler"] == {
            "running": 0, "waiting": 0, "waiting_tokens": 0, "max_sequences": 8, "streams_open": 0, "steps": 10,
            "graph_steps": 0, "preemptions": 0,
        }  # fmt: skip
        cache = stats["kv_cache"]
        assert (cache["num_blocks"], cache["block_size"], cache["used_blocks"], cache["usage"]) == (256, 4, 0, 0)
        assert cache["cached_blocks"] > 0 and cache["prefix_hit_tokens"] == 8


async def test_stats_of_a_server_that_did_nothing_are_zeros() -> None:
    async with running() as server:
        stats = (await server.get("/stats"))[1]
        sums = [value for name, value in stats.items() if name.startswith(("total_", "avg_")) or name.endswith("count")]
        assert sums == [0] * 6


async def test_models_are_listed_with_what_is_known_of_them() -> None:
    async with running(model={"path": "org/fake", "aliases": ("gpt-4",)}) as server:
        server.serving.facts["parameters"] = "134,515,008"
        status, listed = await server.get("/models")
        assert status == 200 and listed["default_model"] == "fake"
        assert [model["name"] for model in listed["models"]] == ["fake", "gpt-4"]
        assert listed["models"][0] == {
            "name": "fake", "type": "causal_lm", "parameters": 134_515_008, "context_length": 512, "loaded": True,
            "backend": "torch", "parent": None,
        }  # fmt: skip


async def test_stats_and_models_answer_while_the_model_loads() -> None:
    hold = threading.Event()

    def slow(report: Any) -> FakeExecutor:
        hold.wait()
        return FakeExecutor(CAPACITY)

    async with running(make_executor=slow, wait_ready=False) as server:
        stats = (await server.get("/stats"))[1]
        assert (stats["is_loaded"], stats["is_ready"], stats["kv_cache"]["num_blocks"]) == (False, False, None)
        (model,) = (await server.get("/models"))[1]["models"]
        assert (model["loaded"], model["context_length"], model["parameters"]) == (False, None, None)
        for path in GENERATING:
            check_error(*await server.post(path, {"prompt": "a", "messages": TURNS}), 503, code="not_ready")
        hold.set()
        await server.serving.router.wait_ready()
        assert (await server.get("/stats"))[1]["is_loaded"]
