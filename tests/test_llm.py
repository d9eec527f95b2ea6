"""`LLM` and `AsyncLLM`: the real thing from the call to the engine thread, on a fake device; and the example."""

import asyncio
import gc
import json
import math
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import asyncllm
from asyncllm import LLM, AsyncLLM, AsyncLLMError, Config, SamplingParams
from asyncllm.config import ModelConfig, SchedulerConfig
from asyncllm.errors import ConfigError, InvalidRequest, StartupError, Unavailable
from asyncllm.server import lifecycle
from asyncllm.server.wire import GenerationRequest
from asyncllm.types import Pooling
from tests.fakes import expected_sums
from tests.fakes_llm import OPTIONS, Devices, FakeCheckpoint, fake_devices
from tests.server.harness import CAPACITY, VOCAB_SIZE, ids, says, speaks
from tests.server.test_tools import (
    CALL,
    CALLED,
    HERMES,
    LARGER,
    RESPONDED,
    RESPONDS,
    THINKS,
    TIME,
    WEATHER,
    facts,
    responding_tokenizer,
    responds,
)

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    return fake_devices(monkeypatch)


@pytest.fixture
def llm(devices: Devices) -> Iterator[LLM]:
    with LLM(**OPTIONS) as llm:
        yield llm


def streams(llm: LLM) -> int:
    """Requests that run or wait, asked on the loop that knows."""

    async def count() -> int:
        return llm._llm.serving.router.num_streams

    return llm._thread.run(count)


# --- prompts and parameters ------------------------------------------------------------------------------------------


def test_a_prompt_is_text_or_token_ids_one_or_many(llm: LLM) -> None:
    [one] = llm.generate("xa", max_tokens=3)
    assert (one.prompt, one.prompt_token_ids, one.text) == ("xa", ids("xa"), "bcd")
    assert one.choices == [asyncllm.Choice(0, "bcd", ids("bcd"), "length")]
    assert one.timings is not None and one.timings.decode_s > 0
    [by_ids] = llm.generate(ids("xa"), max_tokens=3)
    assert (by_ids.prompt, by_ids.prompt_token_ids, by_ids.text) == (None, ids("xa"), "bcd")
    assert [output.text for output in llm.generate(["a", ids("b"), tuple(ids("c"))], max_tokens=1)] == ["b", "c", "d"]
    assert llm.generate([]) == []


def test_parameters_are_keywords_a_dict_an_object_or_one_for_each_prompt(llm: LLM) -> None:
    assert llm.generate("a", {"max_tokens": 2})[0].text == "bc"
    assert llm.generate("a", SamplingParams(max_tokens=2))[0].text == "bc"
    outputs = llm.generate(["a", "a"], [SamplingParams(max_tokens=1), {"stop": "e"}])
    assert [output.text for output in outputs] == ["b", "bcd"]
    assert outputs[1].choices[0].stop_reason == "e"
    assert len(llm.generate("a")[0].choices[0].token_ids) == 16, "as POST /v1/completions"


def test_logprobs_choices_and_prompt_logprobs_come_as_asked_for(llm: LLM) -> None:
    [output] = llm.generate("abcabc", max_tokens=2, n=3, logprobs=2, prompt_logprobs=1)
    assert [choice.index for choice in output.choices] == [0, 1, 2]
    for choice in output.choices:
        assert choice.logprobs is not None and len(choice.logprobs) == 2
        assert len(choice.logprobs[0].top_token_ids) == 2
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 5
    [scored] = llm.generate("abc", max_tokens=0, prompt_logprobs=0)
    assert scored.text == "" and scored.prompt_logprobs is not None and len(scored.prompt_logprobs) == 2


def test_an_answer_follows_the_grammar_that_was_asked_for(llm: LLM) -> None:
    params = SamplingParams(structured_outputs={"choice": ["yes", "no"]}, max_tokens=8)
    outputs = llm.generate(["a"] * 20, params) + llm.generate("b", params)
    assert all(output.text in ("yes", "no") for output in outputs)
    [chat] = llm.chat([{"role": "user", "content": "hi"}], response_format={"type": "json_object"}, max_tokens=8)
    assert chat.text.startswith("{")


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"temperature": 3}, "temperature", "temperature = 3: expected float <= 2.0."),
        ({"temperature": float("nan")}, "temperature", "temperature = nan: expected float >= 0.0."),
        ({"max_tokens": True}, "max_tokens", "max_tokens = True: expected int | null, got bool."),
        ({"stop": ["a", ""]}, "stop", "stop[1] = ['a', '']: expected str of length >= 1."),
        ({"logprobs": 21}, "logprobs", "logprobs = 21: expected int <= 20."),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "must not exceed"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens = 0 needs prompt_logprobs"),
        ({"temprature": 1}, "temprature", "'temprature' is no generation parameter; did you mean 'temperature'?"),
        ({"stream": True}, "stream", "use the method stream"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", "the vocabulary has ids"),
        ({"structured_outputs": {"json": {"type": "nothing"}}}, "structured_outputs.json.type", "type"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "regex"),
        ({"n": 3}, "n", "n = 3: at most 2 (scheduler.max_queued)"),
        ({"params": SamplingParams(), "n": 1}, "params", "params and n = … say the same"),
        ({"params": [{}]}, "params", "params holds 1 items for 2 prompts"),
        ({"params": 5}, "params", "params = 5"),
        ({"params": [5, 5]}, "params", "params = 5"),
        ({"timeout": 7200}, "timeout", "at most 3600 s"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(
    devices: Devices, fields: dict[str, Any], param: str, said: str
) -> None:
    with LLM(**OPTIONS, max_queued=2) as llm:
        with pytest.raises(InvalidRequest) as refused:
            llm.generate(["a", "b"], **fields)
        assert refused.value.param == param and said in refused.value.message
        assert llm._llm.serving.metrics.stats.num_steps == 0


def test_sampling_params_are_checked_where_they_are_made_and_again_where_they_are_used(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"top_p = 0: expected float > 0\.0"):
        SamplingParams(top_p=0)
    params = SamplingParams(top_p=1)
    params.top_p = 7.0
    with pytest.raises(InvalidRequest, match=r"top_p = 7\.0"):
        llm.generate("a", params)


def test_every_parameter_of_the_wire_is_a_parameter_here() -> None:
    assert set(GenerationRequest.__struct_fields__) < set(SamplingParams.__struct_fields__)


def test_the_prompts_that_cannot_run_say_why_and_the_others_run(llm: LLM) -> None:
    bad = ["", "x" * 600, [VOCAB_SIZE], ["a"], [], "\ud800"]
    outputs = llm.generate(["a", *bad, "b"], max_tokens=1)
    assert (outputs[0].text, outputs[-1].text) == ("b", "c")
    errors = [str(output.error) for output in outputs[1:-1]]
    for said, error in zip(
        ("empty", "context length", "token id", "expected a string or", "empty", "surrogate"), errors, strict=True
    ):
        assert said in error
    assert all(output.choices == [] for output in outputs[1:-1])
    with pytest.raises(InvalidRequest, match="empty"):
        _ = outputs[1].text


@pytest.mark.parametrize("prompts", [5, b"abc", {"a": 1}, None, ["a", 5], [b"abc"]])
def test_what_is_no_prompt_at_all_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        llm.generate(prompts)
    assert refused.value.param == "prompts"


# --- adapters --------------------------------------------------------------------------------------------------------


def entered(devices: Devices) -> list[int]:
    """The adapter of each sequence that ran."""
    return [new.adapter for plan in devices.executors[-1].plans for new in plan.new_slots]


def test_a_call_may_name_an_adapter_of_the_configuration(devices: Devices) -> None:
    with LLM(**OPTIONS, adapters={"sql": "nowhere/sql", "chat": "nowhere/chat"}) as llm:
        llm.generate(["a", "b"], adapter="chat", max_tokens=1)
        llm.generate("c", max_tokens=1)
        llm.chat([{"role": "user", "content": "hi"}], adapter="sql", max_tokens=1)
        list(llm.stream("d", adapter="chat", max_tokens=1))
        list(llm.stream_chat([{"role": "user", "content": "ho"}], adapter="sql", max_tokens=1))
        llm.embed("e", adapter="chat")
        assert entered(devices) == [2, 2, 0, 1, 2, 1, 2]
        for call in (llm.generate, llm.embed, lambda *a, **k: list(llm.stream(*a, **k))):
            with pytest.raises(InvalidRequest, match=r"adapter = sq: not in lora\.adapters, which has sql, chat"):
                call("a", adapter="sq")


# --- conversations and streams ---------------------------------------------------------------------------------------


def test_chat_takes_one_conversation_or_many(devices: Devices) -> None:
    devices.next_token = says("hello")
    user = [{"role": "user", "content": "hi"}]
    with LLM(**OPTIONS) as llm:
        [answer] = llm.chat(user)
        assert answer.text == "hello" and answer.choices[0].finish_reason == "stop"
        assert answer.prompt == "<|user|>hi<|end|><|assistant|>"
        assert [output.text for output in llm.chat([user, user], max_tokens=2)] == ["he", "he"]
        begun = [*user, {"role": "assistant", "content": "he"}]
        assert llm.chat(begun, continue_final_message=True)[0].text == "llo"
        wrong, empty = llm.chat([[{"role": "robot", "content": "hi"}], []])
        assert "robot" in str(wrong.error) and "empty" in str(empty.error)
        with pytest.raises(InvalidRequest, match="cannot both be true"):
            llm.chat(user, add_generation_prompt=True, continue_final_message=True)
        for no_messages in ("hi", 5, ["hi"]):
            with pytest.raises(InvalidRequest) as refused:
                llm.chat(no_messages)  # type: ignore[arg-type]
            assert refused.value.param == "messages"


def test_calls_of_tools_are_found_in_the_answers(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCheckpoint, "text", facts(HERMES))
    devices.next_token = speaks(f"Let me see.\n{CALL}")
    user = [{"role": "user", "content": "How is it?"}]
    with LLM(**OPTIONS) as llm:
        outputs = llm.chat([user, user], tools=[WEATHER, TIME], n=2)
        for choice in (choice for output in outputs for choice in output.choices):
            [call] = choice.tool_calls
            assert (choice.finish_reason, choice.content.strip()) == ("tool_calls", "Let me see.")
            assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Paris"})
            assert choice.text == f"Let me see.\n{CALL}", "the text stays as the model wrote it"
        [forced] = llm.chat(user, tools=[WEATHER, TIME], tool_choice="required", parallel_tool_calls=False)
        assert len(forced.choices[0].tool_calls) == 1 and not forced.choices[0].content
        [silent] = llm.chat(user, tools=[WEATHER], tool_choice="none")
        assert silent.choices[0].content == silent.text and not silent.choices[0].tool_calls
        for wrong, param in (({"tools": [{}]}, "tools[0].type"), ({"tool_choice": "auto"}, "tool_choice")):
            with pytest.raises(InvalidRequest) as refused:
                llm.chat(user, **wrong)
            assert refused.value.param == param


@pytest.mark.parametrize("tools", [None, [TIME]])
def test_where_tools_may_answer_next_the_turn_ends(
    devices: Devices, monkeypatch: pytest.MonkeyPatch, tools: list[Any] | None
) -> None:
    monkeypatch.setattr(FakeCheckpoint, "text", RESPONDS)
    monkeypatch.setattr(FakeCheckpoint, "tokenizer", lambda self: responding_tokenizer())
    devices.next_token, devices.capacity = responds, LARGER
    with LLM(**OPTIONS) as llm:
        [output] = llm.chat([{"role": "user", "content": "How is it?"}], tools=tools)
    [choice] = output.choices
    if tools is None:
        assert (choice.finish_reason, choice.content, choice.tool_calls) == ("stop", CALLED + RESPONDED, [])
    else:
        assert (choice.finish_reason, choice.content, choice.stop_reason) == ("tool_calls", "", None)
        assert [call.name for call in choice.tool_calls] == ["time"]
        assert len(choice.token_ids) == len(CALLED) + 1 and choice.text == CALLED


def test_thoughts_are_told_from_the_answer(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCheckpoint, "text", facts(THINKS))
    devices.next_token = speaks("Hm.\n</think>\n\nYes.", behind="<think>\n")
    with LLM(**OPTIONS) as llm:
        [output] = llm.chat([{"role": "user", "content": "Is it?"}])
    [choice] = output.choices
    assert (choice.reasoning, choice.content, choice.text) == ("Hm.", "Yes.", "Hm.\n</think>\n\nYes.")


def test_a_stream_gives_what_generate_gives_and_says_how_it_ended(llm: LLM) -> None:
    deltas = list(llm.stream("a", max_tokens=6))
    assert "".join(delta.text for delta in deltas) == "bcdefg"
    assert [token_id for delta in deltas for token_id in delta.token_ids] == ids("bcdefg")
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]
    chat = llm.stream_chat([{"role": "user", "content": "hi"}], max_tokens=2)
    assert "".join(delta.text for delta in chat) == "ab"


def test_a_stream_is_refused_where_it_is_asked_for_or_where_it_is_read(llm: LLM) -> None:
    for call in (
        lambda: llm.stream("a", temperature=5),
        lambda: llm.stream("a", prompt_logprobs=1),
        lambda: llm.stream(["a", "b"]),
        lambda: llm.stream_chat("hi"),
    ):
        with pytest.raises(InvalidRequest):
            call()
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        next(llm.stream(""))


def test_who_stops_reading_a_stream_ends_its_request(devices: Devices) -> None:
    devices.gate = threading.Semaphore(5)
    with LLM(**OPTIONS) as llm:
        stream = llm.stream("a", max_tokens=400)
        assert next(stream).text.startswith("b")
        assert streams(llm) == 1
        stream.close()
        assert streams(llm) == 0
        devices.gate.release(1_000_000)


# --- many prompts ----------------------------------------------------------------------------------------------------


def test_thousands_of_prompts_go_through_a_small_queue_in_order_and_keep_the_engine_full(devices: Devices) -> None:
    prompts = [chr(ord("a") + index % 20) * (1 + index % 3) for index in range(3000)]
    seen: list[tuple[int, int]] = []
    with LLM(**OPTIONS, max_queued=12, max_queued_tokens=40) as llm:
        outputs = llm.generate(prompts, max_tokens=2, progress=lambda done, count: seen.append((done, count)))
        rejected = llm._llm.serving.metrics.rejected.values
    assert [output.prompt for output in outputs] == prompts
    for prompt, output in zip(prompts, outputs, strict=True):
        first = ord(prompt[-1]) + 1
        assert output.text == chr(first) + chr(first + 1)
    assert seen == [(done, 3000) for done in range(1, 3001)]
    assert not rejected, "whoever waits for room is not refused"
    assert max(len(plan.slots) for plan in devices.executors[0].plans) == 8


def test_many_choices_of_many_prompts_fit_the_queue_too(devices: Devices) -> None:
    with LLM(**OPTIONS, max_queued=5) as llm:
        outputs = llm.generate(["a"] * 40, n=4, max_tokens=3)
    assert [[choice.text for choice in output.choices] for output in outputs] == [["bcd"] * 4] * 40


def test_an_output_that_was_cut_says_so(devices: Devices) -> None:
    devices.gate = threading.Semaphore(3)
    with LLM(**OPTIONS) as llm:
        [output] = llm.generate("a", max_tokens=100, timeout=0.2)
        assert output.choices[0].finish_reason == "timeout"
        assert output.text == "bcd"[: len(output.text)]
        devices.gate.release(1_000_000)


def test_a_device_that_breaks_leaves_what_was_done_and_says_so_for_the_rest(devices: Devices) -> None:
    devices.options = {"fail_launch_at": 20}
    with LLM(**OPTIONS, max_queued=8) as llm:
        outputs = llm.generate(["a"] * 200, max_tokens=2)
        done = [output for output in outputs if output.error is None]
        lost = [output for output in outputs if output.error is not None]
        assert done and lost and all(output.text == "bc" for output in done)
        assert {output.error.code for output in lost if output.error} == {"engine_dead"}
        with pytest.raises(Unavailable):
            llm.generate("a")


def test_ctrl_c_ends_the_call_and_frees_what_it_had_running(devices: Devices) -> None:
    devices.gate = threading.Semaphore(3)
    with LLM(**OPTIONS) as llm:

        def interrupt(done: int, count: int) -> None:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a"] * 50, [{"max_tokens": 1}, *[{"max_tokens": 400}] * 49], progress=interrupt)
        assert streams(llm) == 0
        devices.gate.release(1_000_000)
        assert llm.generate("a", max_tokens=1)[0].text == "b"


# --- life ------------------------------------------------------------------------------------------------------------


def test_several_threads_and_a_thread_with_a_running_loop_may_call_at_once(llm: LLM) -> None:
    texts: list[str] = []

    async def in_a_notebook() -> None:
        texts.append(llm.generate("a", max_tokens=2)[0].text)

    threads = [threading.Thread(target=lambda: asyncio.run(in_a_notebook())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["bc"] * 4


def test_closing_ends_what_runs_and_the_threads_and_can_be_done_twice(devices: Devices) -> None:
    before, interval_s = set(threading.enumerate()), sys.getswitchinterval()
    llm = LLM(**OPTIONS, switch_interval_us=300)
    assert sys.getswitchinterval() == pytest.approx(300e-6)
    stream = llm.stream("a", max_tokens=400)
    next(stream)
    llm.close()
    llm.close()
    assert sys.getswitchinterval() == interval_s and devices.executors[0].closed
    assert {thread for thread in set(threading.enumerate()) - before if thread.name != "tokenizer_0"} == set()
    with pytest.raises(Unavailable, match="closed"):
        llm.generate("a")
    with pytest.raises(Unavailable, match="closed"):
        list(stream)


def test_an_llm_that_nobody_has_any_more_is_closed(devices: Devices) -> None:
    llm = LLM(**OPTIONS)
    llm.generate("a", max_tokens=1)
    del llm
    gc.collect()
    assert devices.executors[0].closed


def test_an_llm_cannot_be_called_from_its_own_thread(llm: LLM) -> None:
    with pytest.raises(AsyncLLMError, match="own thread"):
        llm.generate("a", progress=lambda done, count: llm.generate("a"))


def test_progress_can_be_a_line(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], max_tokens=1, progress=True)
    assert capsys.readouterr().err.rpartition("\r")[2].startswith("2/2 prompts, ")


def test_a_start_that_fails_raises_and_leaves_nothing_behind(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())

    def no_model(*_: object) -> None:
        raise StartupError("no such model")

    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "open_checkpoint", no_model)
        with pytest.raises(StartupError, match="no such model"):
            LLM(**OPTIONS)

    def no_memory(*_: object) -> None:
        raise StartupError("too little memory")

    monkeypatch.setattr(devices, "build", no_memory)
    monkeypatch.setattr("asyncllm.executor.build.build_executor", no_memory)
    with pytest.raises(StartupError, match="too little memory"):
        LLM(**OPTIONS)
    assert {thread for thread in set(threading.enumerate()) - before if thread.name != "tokenizer_0"} == set()


async def test_async_llm_does_the_same_on_the_callers_loop_and_starts_again_on_another(devices: Devices) -> None:
    engine = AsyncLLM(**OPTIONS)
    with pytest.raises(Unavailable, match=r"await start\(\)"):
        await engine.generate("a")

    async def use() -> str:
        async with engine:
            with pytest.raises(AsyncLLMError, match="started already"):
                await engine.start()
            first = [delta.text async for delta in engine.stream("a", max_tokens=2)]
            [output] = await engine.chat([{"role": "user", "content": "hi"}], max_tokens=1)
            return "".join(first) + (await engine.generate("a", max_tokens=1))[0].text + output.text

    assert await use() == "bcba"
    assert await asyncio.to_thread(lambda: asyncio.run(use())) == "bcba"
    async with engine:
        with pytest.raises(AsyncLLMError, match="another event loop"):
            await asyncio.to_thread(lambda: asyncio.run(engine.generate("a")))
    assert [executor.closed for executor in devices.executors] == [True] * 3


async def test_cancelling_a_call_frees_what_it_had_running(devices: Devices) -> None:
    devices.gate = threading.Semaphore(0)
    async with AsyncLLM(**OPTIONS) as engine:
        call = asyncio.create_task(engine.generate(["a"] * 100, max_tokens=50))
        while engine.serving.router.num_streams < 16:  # noqa: ASYNC110 (there is no event for it)
            await asyncio.sleep(0)
        assert engine.serving.router.num_streams == 16, "twice what can run, and the others not begun"
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert engine.serving.router.num_streams == 0
        devices.gate.release(1_000_000)


# --- configuration ---------------------------------------------------------------------------------------------------


def test_options_are_keys_of_the_configuration_by_their_bare_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCLLM_SCHEDULER__MAX_QUEUED", "77")
    config = AsyncLLM("some/model", dtype="float32", max_sequences=3, aliases=["x"]).config
    assert (config.model.path, config.model.dtype, config.model.aliases) == ("some/model", "float32", ("x",))
    assert (config.scheduler.max_sequences, config.scheduler.max_queued) == (3, 77)
    given = Config(model=ModelConfig(path="p", dtype="float16"), scheduler=SchedulerConfig(max_queued=5))
    assert AsyncLLM(config=given).config == given, "the environment is not asked"
    assert AsyncLLM("q", config=given).config.model == ModelConfig(path="q", dtype="float16")


def test_an_option_that_does_not_exist_or_does_not_fit_names_itself(tmp_path: Path) -> None:
    for options, said in (
        ({"max_sequence": 3}, "unknown key max_sequence; did you mean 'max_sequences'?"),
        ({"dtype": "int4"}, "model.dtype = int4"),
        ({"max_sequences": "3"}, "scheduler.max_sequences = 3: Expected `int`"),
        ({"max_sequences": 5000}, "scheduler.max_batched_tokens = 2048 is below"),
    ):
        with pytest.raises(ConfigError) as wrong:
            LLM(**options)
        assert said in wrong.value.message
    file = tmp_path / "config.toml"
    file.write_text("[model]\npath = 'there'\n")
    assert AsyncLLM(config=file).config.model.path == "there"


def test_no_two_tables_have_a_key_of_the_same_name() -> None:
    tables = [field.type.__struct_fields__ for field in msgspec.structs.fields(Config)]
    assert [key for key, count in Counter(key for table in tables for key in table).items() if count > 1] == []


# --- as people meet it -----------------------------------------------------------------------------------------------


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_and_importing_llm_no_torch() -> None:
    program = """
import sys
before = set(sys.modules)
import asyncllm
print({name.partition('.')[0] for name in set(sys.modules) - before} & {'msgspec', 'aiohttp', 'asyncio', 'torch'})
asyncllm.LLM, asyncllm.create_app
print('torch' in sys.modules, hasattr(asyncllm, 'nothing'), set(asyncllm.__all__) <= set(dir(asyncllm)))
"""
    assert run("-c", program) == "set()\nFalse False True\n"


def test_the_offline_example_does_what_it_says() -> None:
    printed = run(str(EXAMPLES / "offline.py"))
    assert "The capital of France is  Paris" in printed and "The capital of Italy is  Rome" in printed
    assert "The capital of France is Paris." in printed


def test_a_script_that_closes_nothing_ends_all_the_same() -> None:
    program = """
import asyncllm
llm = asyncllm.LLM(num_blocks=64, max_context_length=512)
stream = llm.stream("Once", max_tokens=400, ignore_eos=True)
print(len(next(stream).token_ids) > 0)
"""
    assert run("-c", program) == "True\n"


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_prompts_become_vectors_in_their_order(llm: LLM) -> None:
    texts = [f"text {number}" for number in range(40)]
    outputs = llm.embed([*texts, ids("ids")])
    assert [(output.prompt, output.prompt_token_ids) for output in outputs] == [
        *((text, ids(text)) for text in texts),
        (None, ids("ids")),
    ]
    for output in outputs:
        sums = expected_sums(output.prompt_token_ids, Pooling.LAST, CAPACITY.hidden_size)
        assert output.vector.tolist() == pytest.approx([value / math.hypot(*sums) for value in sums], rel=1e-6)
    assert llm.embed([]) == []


def test_vectors_are_made_as_asked_for(llm: LLM) -> None:
    sums = expected_sums(ids("abcd"), Pooling.MEAN, CAPACITY.hidden_size)
    [mean] = llm.embed("abcd", pooling="mean", normalize=False, dimensions=3)
    assert mean.vector.tolist() == [value / 4 for value in sums[:3]]
    assert str(mean.vector.dtype) == "float32"
    for wrong, param in (
        ({"pooling": "cls"}, "pooling"),
        ({"dimensions": CAPACITY.hidden_size + 1}, "dimensions"),
        ({"normalise": True}, "normalise"),
        ({"temperature": 0.0}, "temperature"),
        ({"timeout": 1e5}, "timeout"),
    ):
        with pytest.raises(InvalidRequest) as raised:
            llm.embed("a", **wrong)
        assert raised.value.param == param


def test_a_prompt_without_a_vector_says_why_and_the_others_have_one(llm: LLM) -> None:
    outputs = llm.embed(["fine", "a" * 513, ids("a" * 513), "", [10**6]])
    assert len(outputs[0].vector) == CAPACITY.hidden_size
    for output in outputs[1:]:
        assert isinstance(output.error, InvalidRequest)
        with pytest.raises(InvalidRequest):
            _ = output.vector
    assert [output.error.code for output in outputs[1:3] if output.error] == ["context_length_exceeded"] * 2
