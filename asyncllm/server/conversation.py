"""A conversation on its way to the engine, whichever API it came in by: template, tools, thinking, grammar.

Chat completions, responses, messages and the native chat each turn their body into a `Conversation`; here it becomes a
job and the reader of its answers.
"""

from collections.abc import Callable
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
from asyncllm.router.thinking import ANYTHING, MaybeThinking, ThinkingBudget
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


async def render(router: Router, conversation: Conversation, num_bytes: int) -> list[int]:
    """Token ids of the prompt. Raises what `Router.render_chat` raises."""
    tools, messages = conversation.callable_tools, conversation.messages
    if router.answers.template_takes_tools:
        messages = adapt_ids(messages, router.answers.tools)
    else:
        messages = render_history(messages)
        if tools:
            messages = with_system_prompt(messages, fallback_system_prompt(tools, conversation.tool_choice))
    return await router.render_chat(
        messages,
        num_bytes=num_bytes,
        tools=[tool.source for tool in tools] or None if router.answers.template_takes_tools else None,
        add_generation_prompt=conversation.add_generation_prompt,
        continue_final_message=conversation.continue_final_message,
        template_kwargs=conversation.template_kwargs,
    )


async def converse(request: web.Request, arrived: Arrived[Any], conversation: Conversation) -> tuple[Job, Reader]:
    """Render, compile and admit. Raises what these raise: nothing was said to the client yet."""
    router = request.app[SERVING].router
    answers, tools = router.answers, conversation.callable_tools
    prompt = await render(router, conversation, arrived.num_bytes)
    thinking = Thinking.NONE if conversation.continue_final_message else answers.thinking(prompt)
    constraint = await constraint_of(router, conversation, thinking)
    job = await admit(
        request,
        arrived,
        Asked(
            parameters=conversation.parameters,
            prefix=conversation.prefix,
            param=conversation.param,
            prompts=[prompt],
            num_choices=conversation.num_choices,
            max_tokens=conversation.max_tokens,
            default_max_tokens=None,
            logprobs=conversation.logprobs,
            prompt_logprobs=conversation.prompt_logprobs,
            visible_tokens=answers.visible_tokens(bool(tools)),
            make_constraint=constraint,
        ),
    )
    max_calls = None if conversation.parallel_tool_calls else 1
    return job, answers.reader(conversation.num_choices, tools, max_calls, thinking)


async def constraint_of(
    router: Router, conversation: Conversation, thinking: Thinking
) -> Callable[[], Constraint] | None:
    """Makes the constraint of a choice; None where anything may be generated."""
    answers = router.answers
    grammar = await _grammar(router, conversation)
    budget = conversation.thinking_budget
    if answers.reasoning is None or thinking in (Thinking.NONE, Thinking.OFF):
        return None if grammar is None else grammar.constraint
    if grammar is None and budget is None:
        return None
    tokenizer, capacity = router.tokenizer, router.accepting()
    start = tokenizer.encode_prompt(answers.reasoning.start, add_special_tokens=False)
    end = tuple(tokenizer.encode_prompt(answers.reasoning.end, add_special_tokens=False))
    # Behind thoughts that must lead to an answer, the model may not stop.
    thoughts = None if grammar is None else all_but(tokenizer.eos_token_ids, capacity.vocab_size)

    def make() -> Constraint:
        inner = None if grammar is None else grammar.constraint()
        thought = ThinkingBudget(inner, end, budget, thoughts)
        if thinking is Thinking.BEGUN:
            return thought
        # Whether it thinks must show in its first token.
        return MaybeThinking(inner, start[0], thought) if len(start) == 1 else inner or ANYTHING

    return make


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
