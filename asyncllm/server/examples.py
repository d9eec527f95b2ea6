"""Requests and streams as the documentation shows them; tests/server/test_openapi.py sends each to a real server."""

from typing import Any

Examples = dict[str, dict[str, Any]]  # name -> body of a request

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

CHAT: Examples = {
    "a question": {"messages": QUESTION, "max_tokens": 32},
    "greedy, streamed": {
        "messages": [{"role": "system", "content": "Answer in one word."}, *QUESTION],
        "temperature": 0,
        "max_tokens": 8,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "a tool": {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": CITY}}],
        "max_tokens": 32,
    },
    "JSON of a schema": {
        "messages": QUESTION,
        "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}},
        "max_tokens": 32,
    },
    "log-probabilities of two choices": {
        "messages": QUESTION,
        "max_tokens": 4,
        "n": 2,
        "seed": 7,
        "logprobs": True,
        "top_logprobs": 3,
    },
}
CHAT_EVENTS = """\
data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1760000000,"model":"smollm2",\
"system_fingerprint":"asyncllm-0","choices":[{"index":0,"delta":{"role":"assistant","content":"","refusal":null},\
"logprobs":null,"finish_reason":null}]}

data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1760000000,"model":"smollm2",\
"system_fingerprint":"asyncllm-0","choices":[{"index":0,"delta":{"content":"Paris"},\
"logprobs":null,"finish_reason":null}]}

data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1760000000,"model":"smollm2",\
"system_fingerprint":"asyncllm-0","choices":[{"index":0,"delta":{},\
"logprobs":null,"finish_reason":"stop","stop_reason":null}]}

data: [DONE]

"""

COMPLETION: Examples = {
    "a sentence": {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
    "two prompts, streamed": {"prompt": ["One, two,", "Red, green,"], "max_tokens": 4, "stream": True},
    "log-probabilities of the prompt": {"prompt": "Paris is in France", "max_tokens": 0, "echo": True, "logprobs": 1},
}
COMPLETION_EVENTS = """\
data: {"id":"cmpl-1","object":"text_completion","created":1760000000,"model":"smollm2",\
"system_fingerprint":"asyncllm-0","choices":[{"index":0,"text":" Paris","logprobs":null,"finish_reason":null}]}

data: {"id":"cmpl-1","object":"text_completion","created":1760000000,"model":"smollm2",\
"system_fingerprint":"asyncllm-0","choices":[{"index":0,"text":"",\
"logprobs":null,"finish_reason":"length","stop_reason":null}]}

data: [DONE]

"""

RESPONSES: Examples = {
    "a question": {"input": "What is the capital of France?", "max_output_tokens": 32},
    "with instructions, streamed": {
        "instructions": "Answer in one word.",
        "input": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_output_tokens": 8,
        "stream": True,
    },
}
RESPONSES_EVENTS = """\
event: response.output_text.delta
data: {"type":"response.output_text.delta","sequence_number":4,"item_id":"msg_1","output_index":0,"content_index":0,\
"logprobs":[],"delta":"Paris"}

event: response.output_text.done
data: {"type":"response.output_text.done","sequence_number":5,"text":"Paris","logprobs":[],"item_id":"msg_1",\
"output_index":0,"content_index":0}

"""

MESSAGES: Examples = {
    "a question": {"messages": QUESTION, "max_tokens": 32},
    "with a system prompt, streamed": {
        "system": "Answer in one word.",
        "messages": QUESTION,
        "temperature": 0,
        "max_tokens": 8,
        "stream": True,
    },
}
MESSAGES_EVENTS = """\
event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Paris"}}

event: content_block_stop
data: {"type":"content_block_stop","index":0}

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"input_tokens":14,\
"output_tokens":2,"cache_creation_input_tokens":0,"cache_read_input_tokens":0}}

event: message_stop
data: {"type":"message_stop"}

"""
COUNT_TOKENS: Examples = {"a question": {"messages": QUESTION}}

EMBEDDINGS: Examples = {
    "two texts": {"input": ["The capital of France is Paris.", "Paris is in France."]},
    "the mean of all tokens, cut to 64 numbers": {
        "input": "The capital of France is Paris.",
        "pooling": "mean",
        "dimensions": 64,
        "encoding_format": "base64",
    },
}

GENERATE: Examples = {
    "one prompt": {"prompt": "The capital of France is", "max_tokens": 8},
    "two prompts": {"prompts": ["One, two,", "Red, green,"], "max_tokens": 4, "stop_sequences": ["."]},
}
GENERATE_STREAM: Examples = {"one prompt": {"prompt": "The capital of France is", "max_tokens": 8}}
BASIC_GENERATE: Examples = {"two prompts": {"prompts": ["One, two,", "Red, green,"], "max_tokens": 4}}
NATIVE_CHAT: Examples = {"a question": {"messages": QUESTION, "max_tokens": 32, "metadata": {"from": "docs"}}}
NATIVE_EVENTS = """\
data: {"text":" Paris","request_id":"gen-1","tokens_generated":1}

data: {"text":".","request_id":"gen-1","tokens_generated":2,"finish_reason":"length","final":true}

"""

TOKENIZE: Examples = {
    "a text": {"prompt": "The capital of France", "return_token_strs": True},
    "a conversation": {"messages": QUESTION, "add_generation_prompt": True},
}
DETOKENIZE: Examples = {"token ids": {"tokens": [64, 81, 98, 89, 99]}}
APPLY_TEMPLATE: Examples = {"a conversation": {"messages": QUESTION}}

ABORT: Examples = {"an answer's id": {"request_id": "chatcmpl-1"}}
