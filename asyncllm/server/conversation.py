"""A conversation on its way to the engine, whichever API it came in by: template, tools, thinking, grammar.

Chat completions, responses, messages and the native chat each turn their body into a `Conversation`; here it becomes a
job and the reader of its answers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from asyncllm.errors import InvalidRequest
from asyncllm.router.answers import Reader, Thinking
from asyncllm.router.constraint import Grammar, all_but
from asyncllm.router.grammar import GrammarSpec
from asyncllm.router.output.fallback import fallback_system_prompt, render_history, with_system_prompt
from asyncllm.router.output.history import adapt_ids
from asyncllm.router.output.tools import Tool, ToolChoice
from asyncllm.router.router import Router
from asyncllm.router.stream import ChoiceStream
from asyncllm.router.strict_calls import StrictCalls
from asyncllm.router.thinking import ANYTHING, MaybeThinking, ThinkingBudget
from asyncllm.router.tokenizer import ContextLimit
from asyncllm.server.job import Arrived, Asked, Job, admit
from asyncllm.server.serving import SERVING
from asyncllm.server.structured import Wanted, calls_or
from asyncllm.server.wire import GenerationRequest
from asyncllm.types import Constraint


class Conversation(msgspec.Struct, kw_only=True):
    """What a chat-like API asks, in no API's words."""

    parameters: GenerationRequest
    messages: list[dict[str, Any]]  # as chat templates read them
    tools: list[Tool] = []
    tool_choice: ToolChoice = ToolChoice("none")
    parallel_tool_calls: bool = True
    wanted: Wanted | None = None  # the grammar of the answer's text
    template_kwargs: dict[str, Any] = {}
    thinking_budget: int | None = None  # tokens of the thinking part
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    num_choices: int = 1
    max_tokens: int | None = None
    default_max_tokens: int | None = None  # None = what is left of the context
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prefix: str = "chatcmpl-"  # of the public id
    param: str = "messages"  # the field the conversation came in, for errors

    @property
    def callable_tools(self) -> list[Tool]:
        """Tools that the answer may call."""
        if self.tool_choice.mode == "none":
            return []
        return [tool for tool in self.tools if self.tool_choice.allows(tool.name)]


class Ready(msgspec.Struct, frozen=True):
    """A conversation that lacks nothing but the engine."""

    prompt: Sequence[int]
    make_constraint: Callable[[], Constraint] | None  # called once per choice
    visible_tokens: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    reader: Callable[[Sequence[ChoiceStream]], Reader]  # of the answers of these choices


def starts_turn(add_generation_prompt: bool | None, continue_final_message: bool | None) -> bool:
    """Whether the template begins the assistant's turn: by default, unless the last turn is to be continued.

    Raises InvalidRequest where both are asked for.
    """
    if add_generation_prompt and continue_final_message:
        raise InvalidRequest(
            "add_generation_prompt and continue_final_message cannot both be true.", param="continue_final_message"
        )
    return not continue_final_message if add_generation_prompt is None else add_generation_prompt


async def render(
    router: Router, conversation: Conversation, num_bytes: int, limit: ContextLimit | None = None
) -> Sequence[int]:
    """Token ids of the prompt, at most `limit`, or what fits the context. Raises what `Router.render_chat` raises."""
    limit = limit or ContextLimit(router.accepting().max_context_length, conversation.param)
    return await router.render_chat(**_given(router, conversation), num_bytes=num_bytes, limit=limit)


async def render_text(router: Router, conversation: Conversation, num_bytes: int) -> str:
    """The prompt as text. Raises what `Router.render_text` raises."""
    return await router.render_text(**_given(router, conversation), num_bytes=num_bytes)


def _given(router: Router, conversation: Conversation) -> dict[str, Any]:
    """What the chat template is given: messages and tools in its format, or these as text where it knows none."""
    answers, tools, messages = router.answers, conversation.callable_tools, conversation.messages
    sources = None
    if answers.template_takes_tools:
        messages = adapt_ids(messages, answers.tools)
        sources = [tool.source for tool in tools] or None
    else:
        messages = render_history(messages)
        if tools:
            messages = with_system_prompt(messages, fallback_system_prompt(tools, conversation.tool_choice))
    return {
        "messages": messages,
        "tools": sources,
        "add_generation_prompt": conversation.add_generation_prompt,
        "continue_final_message": conversation.continue_final_message,
        "template_kwargs": conversation.template_kwargs,
    }


async def make_ready(router: Router, conversation: Conversation, num_bytes: int) -> Ready:
    """Render and compile. Raises what these raise."""
    answers, tools = router.answers, conversation.callable_tools
    prompt = await render(router, conversation, num_bytes)
    thinking = Thinking.NONE if conversation.continue_final_message else answers.thinking(prompt)
    max_calls = None if conversation.parallel_tool_calls else 1
    return Ready(
        prompt=prompt,
        make_constraint=await _constraint_of(router, conversation, thinking),
        visible_tokens=answers.visible_tokens(bool(tools)),
        stop_token_ids=answers.stop_token_ids if tools else (),
        reader=lambda choices: answers.reader(choices, tools, max_calls, thinking),
    )


async def converse(request: web.Request, arrived: Arrived[Any], conversation: Conversation) -> tuple[Job, Reader]:
    """Render, compile and admit. Raises what these raise: nothing was said to the client yet."""
    ready = await make_ready(request.app[SERVING].router, conversation, arrived.num_bytes)
    job = await admit(
        request,
        arrived,
        Asked(
            parameters=conversation.parameters,
            prefix=conversation.prefix,
            param=conversation.param,
            prompts=[ready.prompt],
            num_choices=conversation.num_choices,
            max_tokens=conversation.max_tokens,
            default_max_tokens=conversation.default_max_tokens,
            logprobs=conversation.logprobs,
            prompt_logprobs=conversation.prompt_logprobs,
            visible_tokens=ready.visible_tokens,
            stop_token_ids=ready.stop_token_ids,
            make_constraint=ready.make_constraint,
        ),
    )
    reader = job.reader = ready.reader(job.stream.choices)
    return job, reader


async def _constraint_of(
    router: Router, conversation: Conversation, thinking: Thinking
) -> Callable[[], Constraint] | None:
    """Makes the constraint of a choice; None where anything may be generated."""
    answers = router.answers
    grammar = await _grammar(router, conversation)
    inner = await _strict_calls(router, conversation) if grammar is None else grammar.constraint
    budget = conversation.thinking_budget
    if answers.reasoning is None or thinking in (Thinking.NONE, Thinking.OFF):
        return inner
    if inner is None and budget is None:
        return None
    start, end, capacity = answers.thinking_start, answers.thinking_end, router.accepting()
    # Behind thoughts that must lead to an answer, the model may not stop.
    thoughts = None if grammar is None else all_but(router.tokenizer.eos_token_ids, capacity.vocab_size)

    def make() -> Constraint:
        answer = None if inner is None else inner()
        thought = ThinkingBudget(answer, end, budget, thoughts)
        if thinking is Thinking.BEGUN:
            return thought
        # Whether it thinks must show in its first token.
        return MaybeThinking(answer, start[0], thought) if len(start) == 1 else answer or ANYTHING

    return make


async def _strict_calls(router: Router, conversation: Conversation) -> Callable[[], Constraint] | None:
    """Makes what binds the calls of an answer that may be anything; None where no function is strict."""
    choice, tools = conversation.tool_choice, conversation.callable_tools
    if not any(tool.strict for tool in tools):
        return None
    sources = router.answers.tools.free_calls(tools, choice, conversation.parallel_tool_calls)

    async def compiled(source: str) -> Grammar:
        return await router.compile_grammar(GrammarSpec("lark", source), "tools")

    calls = {start: await compiled(source) for start, source in sources.behind.items()}
    opening = await compiled(sources.opening) if sources.opening is not None else None
    starts = await router.call_starts()
    return lambda: StrictCalls(starts, calls, opening)


async def _grammar(router: Router, conversation: Conversation) -> Grammar | None:
    """What the text has to follow: a forced call, or what was wanted of the answer, or one of both."""
    wanted, choice, tools = conversation.wanted, conversation.tool_choice, conversation.callable_tools
    if choice.is_forced:
        if wanted is not None:
            raise InvalidRequest(
                f"{wanted.param.partition('.')[0]} excludes a tool_choice that forces a call.", param="tool_choice"
            )
        source = router.answers.tools.grammar(tools, choice, conversation.parallel_tool_calls)
        return await router.compile_grammar(GrammarSpec("lark", source), "tools")
    if wanted is None:
        return None
    if not tools:
        return await router.compile_grammar(wanted.spec, wanted.param)
    anything = ToolChoice("required", choice.names)
    calls = router.answers.tools.grammar(tools, anything, conversation.parallel_tool_calls)
    return await router.compile_grammar(calls_or(wanted, calls), wanted.param)
