"""Whole answers as the documentation shows them, made of the structs that real ones are made of.

tests/server/test_openapi.py compares their keys with a real server's.
"""

from asyncllm.server import probe_wire, tokens
from asyncllm.server.embeddings_wire import Embedding, Embeddings, EmbeddingsUsage
from asyncllm.server.messages_wire import MessagesAnswer, MessagesUsage, TextBlock, TokenCount
from asyncllm.server.native_wire import (
    CacheStats,
    GeneratedMessage,
    GeneratedText,
    NativeMessage,
    NativeModel,
    NativeModels,
    SchedulerStats,
    Stats,
    Timings,
)
from asyncllm.server.replies import (
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    Completion,
    CompletionChoice,
    PromptTokensDetails,
    usage,
)
from asyncllm.server.responses_wire import (
    InputDetails,
    OutputDetails,
    OutputMessage,
    OutputText,
    ReasoningConfig,
    Response,
    ResponsesUsage,
    TextConfig,
    TextFormat,
)

MODEL = "smollm2-135m-instruct"
FINGERPRINT = "asyncllm-ec16cc4690"
CREATED = 1760000000
CONTEXT = 8192
DEVICE = "cpu (AMD EPYC)"
PARIS = "The capital of France is Paris."

CHAT = ChatCompletion(
    id="chatcmpl-1",
    created=CREATED,
    model=MODEL,
    system_fingerprint=FINGERPRINT,
    choices=[ChatChoice(0, ChatMessage(content=PARIS), None, "stop")],
    usage=usage(37, 8, 32, 0),
)
COMPLETION = Completion(
    id="cmpl-1",
    created=CREATED,
    model=MODEL,
    system_fingerprint=FINGERPRINT,
    choices=[CompletionChoice(0, " Paris.\n\nThe answer is:", None, "length")],
    usage=usage(5, 8, 0, 0),
)
RESPONSE = Response(
    id="resp_1",
    created_at=CREATED,
    status="completed",
    completed_at=CREATED + 1,
    instructions=None,
    max_output_tokens=32,
    model=MODEL,
    output=[OutputMessage(id="msg_1", status="completed", content=[OutputText(PARIS)])],
    parallel_tool_calls=True,
    reasoning=ReasoningConfig(),
    temperature=1.0,
    text=TextConfig(TextFormat("text")),
    tool_choice="auto",
    tools=[],
    top_p=1.0,
    usage=ResponsesUsage(37, InputDetails(32), 8, OutputDetails(0), 45),
    metadata={},
)
MESSAGE = MessagesAnswer(
    id="msg_1",
    model=MODEL,
    content=[TextBlock(PARIS)],
    stop_reason="end_turn",
    usage=MessagesUsage(5, 8, cache_read_input_tokens=32),
)
TOKEN_COUNT = TokenCount(37)
EMBEDDINGS = Embeddings(
    data=[
        Embedding(index=0, embedding=[-0.0359, -0.0142, 0.0556]),
        Embedding(index=1, embedding=[0.013, -0.0713, 0.1]),
    ],
    model=MODEL,
    usage=EmbeddingsUsage(12, 12, PromptTokensDetails()),
    pooling="last",
)
MODEL_CARD = probe_wire.ModelCard(id=MODEL, created=CREATED, root=MODEL, max_model_len=CONTEXT, context_length=CONTEXT)
MODEL_LIST = probe_wire.ModelList(data=[MODEL_CARD])

TIMINGS = Timings(0.005, 0.03, 0.125)
ABOUT = {"model_name": MODEL, "backend": "torch"}
GENERATED = GeneratedText(
    request_id="gen-1",
    tokens_generated=8,
    generation_time=0.155,
    tokens_per_second=51.6,
    finish_reason="length",
    timings=TIMINGS,
    metadata=ABOUT,
    text=" Paris.\n\nThe answer is:",
)
TEXTS = [" three, four", " blue, yellow"]
NATIVE_CHAT = GeneratedMessage(
    request_id="chat-1",
    tokens_generated=8,
    generation_time=0.155,
    tokens_per_second=51.6,
    finish_reason="stop",
    timings=TIMINGS,
    metadata={"from": "docs"} | ABOUT,
    message=NativeMessage(PARIS),
)
NATIVE_MODELS = NativeModels([NativeModel(MODEL, "causal_lm", 134_515_008, CONTEXT, True, "torch")], MODEL)
STATS = Stats(
    is_loaded=True,
    is_ready=True,
    backend_type="torch",
    request_count=15,
    total_tokens_generated=92,
    total_inference_time=1.4,
    avg_tokens_per_request=6.13,
    avg_time_per_request=0.0933,
    avg_tokens_per_second=65.7,
    uptime=490.7,
    scheduler=SchedulerStats(0, 0, 0, 256, 0, 89, 0, 0),
    kv_cache=CacheStats(2911, 16, 0, 2, 0.0, 363, 256),
)

TOKENIZED = tokens.Tokenized(4, CONTEXT, [504, 3575, 282, 4649], ["The", " capital", " of", " France"])
TEXT = tokens.Prompt("Paris")
RENDERED = tokens.Prompt("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")

ABORTED = probe_wire.Aborted(["chatcmpl-1"])
LOAD = probe_wire.Load(3, 0, 0, 0.0125, 3)
VERSION = probe_wire.Version("0.1.0", "3.11.7", "2.13.0", "5.23.0", "3.14.5")
HEALTH = probe_wire.Health(
    "healthy",
    CREATED + 0.25,
    "torch",
    MODEL,
    DEVICE,
    probe_wire.Memory(892_000_000, 0.0125),
    {"device": DEVICE, "dtype": "bfloat16", "threads": "2", "weights": "0.10 GiB"},
)
ALIVE = probe_wire.Liveness("alive")
READY = probe_wire.Readiness("ready")
STARTED = probe_wire.StartupProgress(
    "started", "done", {"open model": 0.07, "load tokenizer": 0.294, "load weights": 1.002, "warm up": 0.651}, None
)
METRICS = """\
# HELP asyncllm:num_requests_running Sequences in the running batch
# TYPE asyncllm:num_requests_running gauge
asyncllm:num_requests_running{model_name="smollm2-135m-instruct"} 3.0
"""

# With the status that says "not now".
UNHEALTHY = probe_wire.Health(
    "unhealthy", CREATED + 0.25, "torch", MODEL, DEVICE, probe_wire.Memory(892_000_000, 0), {}
)
DEAD = probe_wire.Liveness("dead")
NOT_READY = probe_wire.Readiness("starting", "load weights")
STARTING = probe_wire.StartupProgress(
    "starting", "load weights", {"open model": 0.07, "load tokenizer": 0.294, "load weights": None}, None
)
