"""What becomes of parameters that are not simply honoured, and what the documentation says of those without a word.

A name stands for every body that has the field, `Struct.name` for one struct and those made from it. Each state is
tried on a server by tests/server/test_reference.py: a parameter that comes to life cannot be forgotten here.
"""

from collections.abc import Mapping

import msgspec

HONOURED = "honoured"
IGNORED = "accepted, without effect"
REFUSED = "refused"

STATES = {
    # There is nothing to do for these here.
    "user": IGNORED,
    "metadata": IGNORED,
    "store": IGNORED,
    "service_tier": IGNORED,
    "prompt_cache_key": IGNORED,
    "prompt_cache_options": IGNORED,
    "prompt_cache_retention": IGNORED,
    "safety_identifier": IGNORED,
    "verbosity": IGNORED,
    "cache_control": IGNORED,
    "inference_geo": IGNORED,
    "ChatCompletionRequest.add_special_tokens": IGNORED,
    "StreamOptions.include_obfuscation": IGNORED,
    "JsonSchemaFormat.description": IGNORED,
    "JsonSchemaFormat.strict": IGNORED,
    "Message.refusal": IGNORED,
    "Message.audio": IGNORED,
    "Message.annotations": IGNORED,
    # A 400 that says so, and what to use instead where there is something.
    "audio": REFUSED,
    "modalities": "refused, but for ['text']",
    "prediction": REFUSED,
    "web_search_options": REFUSED,
    "suffix": REFUSED,
    "functions": REFUSED,
    "function_call": REFUSED,
    "guided_json": REFUSED,
    "guided_regex": REFUSED,
    "guided_choice": REFUSED,
    "guided_grammar": REFUSED,
    "ChatCompletionRequest.reasoning": REFUSED,
    # POST /v1/responses
    "ResponsesRequest.metadata": HONOURED,
    "ResponsesRequest.user": HONOURED,
    "ResponsesRequest.stream_options": IGNORED,
    "ResponsesRequest.include": IGNORED,
    "ResponsesRequest.max_tool_calls": IGNORED,
    "ResponsesRequest.top_logprobs": IGNORED,
    "ResponsesRequest.truncation": IGNORED,
    "ResponsesRequest.previous_response_id": REFUSED,
    "ResponsesRequest.conversation": REFUSED,
    "ResponsesRequest.prompt": REFUSED,
    "ResponsesRequest.background": "refused, but for false",
    "ReasoningConfig.summary": IGNORED,
    "ReasoningConfig.generate_summary": IGNORED,
    "TextFormat.name": IGNORED,
    "TextFormat.description": IGNORED,
    "TextFormat.strict": IGNORED,
    # POST /v1/messages
    "ThinkingConfig.display": IGNORED,
    # The native API
    "NativeRequest.metadata": HONOURED,
    "NativeRequest.n": "refused, but for 1",
    "NativeRequest.stream_options": REFUSED,
    "NativeRequest.prompt_logprobs": REFUSED,
    "NativeRequest.response_format": REFUSED,
    "NativeRequest.structured_outputs": REFUSED,
    "NativeChatRequest.add_special_tokens": IGNORED,
}

# For fields whose type says nothing of them.
NOTES = {
    "functions": "what tools were called before",
    "function_call": "what tool_choice, and a turn's tool_calls, were called before",
    "audio": "this model reads and writes text only",
    "refusal": "how an earlier turn refused",
    "annotations": "of an earlier answer",
    "guided_json": "use structured_outputs.json",
    "guided_regex": "use structured_outputs.regex",
    "guided_choice": "use structured_outputs.choice",
    "guided_grammar": "use structured_outputs.grammar",
    "ChatCompletionRequest.reasoning": "use reasoning_effort",
    "JsonSchemaFormat.description": "what the schema is for",
    "JsonSchemaFormat.strict": "the schema always holds",
    "ResponseFormat.type": "text, json_object or json_schema",
    "ResponseFormat.json_schema": "needed where type is json_schema",
    "StructuredOutputs.regex": "the whole answer matches it",
    "StructuredOutputs.choice": "the answer is one of them",
    "StructuredOutputs.json_object": "any JSON object",
    # What several APIs have
    "stream": "send the answer as Server-Sent Events while it is generated",
    "temperature": "how random the draw is; 0 is greedy",
    "top_p": "draw among the tokens that make up this probability; 1 is off",
    "top_k": "draw among this many most probable tokens; -1 or 0 is off",
    "seed": "draws the same noise, whatever else runs; random unless given",
    "priority": "lower runs first",
    "cache_salt": "only requests with the same salt share cached prefixes",
    "timeout": "seconds, also as header X-Request-Timeout; keeps the text so far",
    "metadata": "the client's notes",
    "user": "the client's name for its user",
    "store": "nothing is stored",
    "service_tier": "there is one tier",
    "tools": "functions that the model may call",
    "cache_control": "every prefix is cached",
    "verbosity": "open models know no such setting",
    # POST /v1/responses
    "safety_identifier": "the client's name for its user",
    "prompt_cache_key": "the prefix cache needs no key",
    "prompt_cache_retention": "cached prefixes stay until their memory is needed",
    "ResponsesRequest.input": "a question, or the items of the conversation so far",
    "ResponsesRequest.instructions": "a system turn in front of it",
    "ResponsesRequest.max_output_tokens": "tokens to generate; all that fit, unless given",
    "ResponsesRequest.tool_choice": "none, auto, required, a named function or allowed_tools",
    "ResponsesRequest.parallel_tool_calls": "whether an answer may hold several calls",
    "ResponsesRequest.text": "the format of the answer",
    "ResponsesRequest.reasoning": "how long to think",
    "ResponsesRequest.previous_response_id": "nothing is stored: send the whole conversation",
    "ResponsesRequest.conversation": "nothing is stored: send the whole conversation",
    "ResponsesRequest.prompt": "no prompts are stored",
    "ResponsesRequest.background": "answers are not kept for later",
    "ResponsesRequest.stream_options": "frames are never padded",
    "ResponsesRequest.include": "there is nothing more to tell",
    "ResponsesRequest.max_tool_calls": "the server calls no tools of its own",
    "ResponsesRequest.top_logprobs": "there are no log-probabilities in this API",
    "ResponsesRequest.truncation": "what does not fit is refused",
    "TextConfig.format": "any text, any JSON object, or JSON of a schema",
    "TextFormat.type": "text, json_object or json_schema",
    "TextFormat.name": "of the schema",
    "TextFormat.schema": "a JSON schema",
    "TextFormat.description": "what the schema is for",
    "TextFormat.strict": "the schema always holds",
    "ReasoningConfig.effort": "handed to the chat template; none turns thinking off",
    "ReasoningConfig.summary": "thinking is shown as it is",
    "ReasoningConfig.generate_summary": "what summary was called before",
    # POST /v1/messages
    "PromptRequest.messages": "the conversation so far; an assistant's turn at the end is continued",
    "PromptRequest.system": "text, or a list of text blocks",
    "PromptRequest.tool_choice": "whether and what to call",
    "PromptRequest.thinking": "whether to think, and how long",
    "MessagesRequest.max_tokens": "tokens to generate",
    "MessagesRequest.stop_sequences": "strings that end the answer; not in its text",
    "inference_geo": "it runs where the server is",
    "Turn.role": "user, assistant or system",
    "Turn.content": "text, or a list of blocks of type text, tool_use, tool_result or thinking",
    "MessagesTool.name": "of the function",
    "MessagesTool.input_schema": "a JSON schema of its arguments",
    "MessagesTool.description": "what it does",
    "MessagesTool.type": "custom, which it also is where nothing is said",
    "MessagesTool.strict": "the schema holds wherever it is called, not only where a call is forced",
    "MessagesToolChoice.type": "auto, any, tool or none",
    "MessagesToolChoice.name": "needed where type is tool",
    "MessagesToolChoice.disable_parallel_tool_use": "one call at most",
    "ThinkingConfig.type": "enabled, disabled or adaptive",
    "ThinkingConfig.budget_tokens": "tokens after which thinking is ended",
    "ThinkingConfig.display": "thinking is shown as it is",
}


def state(struct: type[msgspec.Struct], name: str) -> str:
    """What becomes of a field."""
    return STATES.get(key(STATES, struct, name), HONOURED)


def note(struct: type[msgspec.Struct], name: str) -> str:
    """What there is to say of a field whose type says nothing."""
    return NOTES.get(key(NOTES, struct, name), "")


def key(table: Mapping[str, str], struct: type[msgspec.Struct], name: str) -> str:
    """Under what a table has a field: its struct's word, that of the nearest one it is made from, else its name."""
    keys = (f"{kind.__name__}.{name}" for kind in struct.__mro__)
    return next((found for found in keys if found in table), name)
