"""The request bodies of the OpenAI-compatible API, as structs: what a field may hold is in its type.

msgspec decodes and checks in one pass, strictly: a boolean is no integer, "5" is not 5. Rules between fields and rules
that need the model (vocabulary, context) are in `params`. Every field of OpenAI's own requests is known here, those
too that are accepted and change nothing.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

INT64 = 2**63 - 1


def about(description: str, default: Any = None) -> Meta:
    """What the documentation says of a field; `default` is what it means to leave it out, where that is one value."""
    return Meta(description=description, extra_json_schema=None if default is None else {"x-default": default})


Int64 = Annotated[int, Meta(ge=-INT64 - 1, le=INT64)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=INT64)]
MinP = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Repetition = Annotated[float, Meta(gt=0, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Count = Annotated[int, Meta(ge=0, le=INT64)]
Timeout = Annotated[float, Meta(gt=0, le=86_400)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
Stop = StopString | Annotated[list[StopString], Meta(max_length=16)]
TokenId = Annotated[int, Meta(ge=0, le=INT64)]
TokenIds = Annotated[list[TokenId], Meta(max_length=1024)]
Biases = Annotated[
    dict[TokenId, Bias], Meta(max_length=1024, extra_json_schema={"propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"}})
]
BadWords = Annotated[list[Annotated[str, Meta(min_length=1, max_length=256)]], Meta(max_length=128)]
CacheSalt = Annotated[str, Meta(min_length=1, max_length=128)]
Choices = Annotated[int, Meta(ge=1, le=128)]
Drafts = Annotated[int, Meta(ge=0, le=16)]
Alternatives = Annotated[int, Meta(ge=0, le=20)]
Fewer = Annotated[int, Meta(ge=0, le=5)]
Prompt = str | list[str | int | list[int]]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=False):
    """How a stream reports usage."""

    include_usage: Annotated[bool | None, about("a last chunk with the usage", False)] = None
    continuous_usage_stats: Annotated[bool | None, about("the usage so far in every chunk", False)] = None
    include_obfuscation: Annotated[bool | None, about("frames are never padded", False)] = None


Schema = dict[str, Any]


class JsonSchemaFormat(msgspec.Struct):
    """response_format.json_schema"""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="at most 64 of A-Z a-z 0-9 _ -")]
    schema: Annotated[Schema, Meta(description="a JSON schema")] = {}
    description: str | None = None
    strict: bool | None = None  # accepted: the schema always holds


class ResponseFormat(msgspec.Struct):
    """response_format"""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema: Annotated[Schema, Meta(description="of json_object, as SGLang and llama.cpp take it")] | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """structured_outputs, as vLLM has it: exactly one of its fields."""

    json: Annotated[Schema | str, Meta(description="a JSON schema, or its text")] | None = None
    regex: Annotated[str, Meta(min_length=1, max_length=65_536)] | None = None
    choice: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=4096)] | None = None
    grammar: Annotated[str, Meta(min_length=1, description="in Lark's syntax")] | None = None
    json_object: bool | None = None


class ModelRequest(msgspec.Struct, kw_only=True):
    """What every body that is about the model has."""

    model: Annotated[str | None, about("a served name; left out, the served model")] = None


class GenerationRequest(ModelRequest, kw_only=True):
    """Fields that chat and completions share; bodies of other APIs are turned into them."""

    max_tokens: Annotated[Count | None, about("tokens to generate; chat: all that fit, completions: 16")] = None
    max_new_tokens: Annotated[Count | None, about("synonym of max_tokens; both must agree")] = None
    min_tokens: Annotated[Count | None, about("tokens before the answer may end; at most max_tokens", 0)] = None
    temperature: Annotated[Temperature | None, about("randomness; 0 is greedy; unset: the model's, or 1")] = None
    top_p: Annotated[TopP | None, about("draw among tokens of this probability; unset: the model's, or 1")] = None
    top_k: Annotated[TopK | None, about("draw among so many tokens; -1 or 0 is off; unset: the model's, or off")] = None
    min_p: Annotated[MinP | None, about("drop tokens below this share of the best; unset: the model's, or 0")] = None
    frequency_penalty: Annotated[Penalty | None, about("per time a token was generated, off its logit", 0)] = None
    presence_penalty: Annotated[Penalty | None, about("off the logit of every generated token", 0)] = None
    repetition_penalty: Annotated[Repetition | None, about("divides logits seen; unset: the model's, or 1")] = None
    seed: Annotated[Int64 | None, about("draws the same noise, whatever else runs; random unless given")] = None
    logit_bias: Annotated[Biases | None, about("added to the logits of token ids before the draw")] = None
    prompt_logprobs: Annotated[Alternatives | None, about("of the prompt, with alternatives; not streamed")] = None
    n: Annotated[Choices | None, about("choices per prompt", 1)] = None
    stop: Annotated[Stop | None, about("strings that end the answer; not in its text")] = None
    include_stop_str_in_output: Annotated[bool | None, about("leave the stop string in the text", False)] = None
    stop_token_ids: Annotated[TokenIds | None, about("token ids that end the answer")] = None
    ignore_eos: Annotated[bool | None, about("go on behind the end of sequence", False)] = None
    skip_special_tokens: Annotated[bool | None, about("leave special tokens out of the text", True)] = None
    bad_words: Annotated[BadWords | None, about("strings that are not generated")] = None
    stream: Annotated[bool | None, about("send the answer as Server-Sent Events while it is generated", False)] = None
    stream_options: Annotated[StreamOptions | None, about("needs stream = true")] = None
    priority: Annotated[Int64 | None, about("lower runs first", 0)] = None
    cache_salt: Annotated[CacheSalt | None, about("only requests with the same salt share cached prefixes")] = None
    speculative_tokens: Annotated[
        Drafts | None, about("tokens guessed from prompt and answer per step, 0 is off; unset: as configured")
    ] = None
    timeout: Annotated[Timeout | None, about("seconds, also as header X-Request-Timeout; keeps the text so far")] = None
    add_special_tokens: Annotated[bool | None, about("encode prompts with the model's special tokens", True)] = None
    structured_outputs: Annotated[
        StructuredOutputs | None, about("a grammar that the answer follows; exactly one of its fields")
    ] = None
    response_format: Annotated[ResponseFormat | None, about("any text, any JSON object, or JSON of a schema")] = None
    # vLLM's older names of structured_outputs, refused with the new one: ignored, they would give any text.
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    # Accepted, without effect:
    user: Annotated[str | None, about("the client's name for its user")] = None
    metadata: Annotated[dict[str, Any] | None, about("the client's notes")] = None
    store: Annotated[bool | None, about("nothing is stored")] = None
    service_tier: Annotated[str | None, about("there is one tier")] = None
    prompt_cache_key: Annotated[str | None, about("the prefix cache needs no key")] = None
    prompt_cache_options: Annotated[Any, about("the prefix cache has no options")] = None
    prompt_cache_retention: Annotated[str | None, about("cached prefixes stay until their memory is needed")] = None
    safety_identifier: Annotated[str | None, about("the client's name for its user")] = None


class Message(msgspec.Struct):
    """One turn of a conversation; what a role may hold is checked in `params.chat_messages`."""

    role: Annotated[str, about("system, developer, user, assistant or tool")]
    content: Annotated[str | list[dict[str, Any]] | None, about("text, or a list of parts of type text")] = None
    name: Annotated[str | None, about("who speaks, for templates that print it")] = None
    tool_calls: Annotated[list[dict[str, Any]] | None, about("of an assistant's turn: what it called")] = None
    tool_call_id: Annotated[str | None, about("of a tool's turn: the call it answers")] = None
    function_call: Any = None
    refusal: str | None = None
    audio: Any = None
    annotations: Any = None
    reasoning_content: Annotated[str | None, about("of an assistant's turn: what it thought")] = None
    reasoning: Annotated[str | None, about("synonym of reasoning_content")] = None


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Meta(min_length=1, description="the conversation so far")]
    max_completion_tokens: Annotated[Count | None, about("synonym of max_tokens; both must agree")] = None
    logprobs: Annotated[bool | None, about("of the answer; of the raw model", False)] = None
    top_logprobs: Annotated[Alternatives | None, about("alternatives per position; needs logprobs = true", 0)] = None
    add_generation_prompt: Annotated[bool | None, about("start the assistant's turn", True)] = None
    continue_final_message: Annotated[bool | None, about("the answer continues the last turn", False)] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, about("variables for the chat template")] = None
    tools: Annotated[list[dict[str, Any]] | None, about("functions that the model may call")] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None,
        about("none, auto, required, a named function or allowed_tools; auto where there are tools"),
    ] = None
    functions: Any = None
    function_call: Any = None
    reasoning_effort: Annotated[str | None, about("handed to the chat template; none turns thinking off")] = None
    include_reasoning: Annotated[bool | None, about("show what the model thinks", True)] = None
    thinking_token_budget: Annotated[
        Annotated[int, Meta(ge=-1, le=INT64)] | None, about("tokens after which thinking is ended; -1 is no limit", -1)
    ] = None
    reasoning: Any = None
    modalities: Annotated[list[str] | None, about("only ['text']")] = None
    audio: Any = None
    parallel_tool_calls: Annotated[bool | None, about("whether an answer may hold several calls", True)] = None
    prediction: Annotated[Any, about("predicted text")] = None
    verbosity: Annotated[str | None, about("open models know no such setting")] = None
    web_search_options: Annotated[Any, about("the server searches nothing")] = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions"""

    prompt: Annotated[Prompt, Meta(description="text, a list of texts, token ids or a list of lists of token ids")]
    max_completion_tokens: Annotated[Count | None, about("synonym of max_tokens; both must agree")] = None
    logprobs: Annotated[Fewer | None, about("of the answer, with this many alternatives; of the raw model")] = None
    echo: Annotated[bool | None, about("put the prompt in front of the text", False)] = None
    best_of: Annotated[Choices | None, about("choices to draw the n most probable from; not streamed")] = None
    suffix: Annotated[str | None, about("text behind the gap to fill")] = None


class AbortRequest(msgspec.Struct):
    """POST /abort"""

    request_id: Annotated[str, Meta(min_length=1, max_length=256, description="an answer's id or its x-request-id")]
