"""Log-probabilities as clients get them, against one full forward of the same model by transformers.

Everything between is real: sockets, router, engine thread, `TorchExecutor` in float32. Steps are so small that prompts
are computed in pieces, beside each other and beside those who decode; a first request leaves the beginning of all
prompts in the cache. The tokenizer holds ASCII alone, so a token's text says which one it is.
"""

import asyncio
import contextlib
import json
import string
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import tokenizers
import torch
from aiohttp import web

from asyncllm.server import lifecycle
from asyncllm.server.app import create_app
from asyncllm.server.connections import GuardedRunner
from asyncllm.server.serving import Serving
from tests.server.harness import Server, config
from tests.weights.tiny import llama

ATOL = 1e-4
BATCH, CHUNK, BLOCK = 24, 16, 8  # tokens
MAX_TOKENS = 20
SPECIALS = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SHARED = "The quick brown fox jumps over the lazy dog, " * 3  # what all prompts begin with
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.2, "seed": 1, "n": 3},
    {"temperature": 0.8, "seed": 2, "top_k": 30, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 1, "seed": 3, "frequency_penalty": 1.5, "presence_penalty": 1, "repetition_penalty": 1.7},
    {"temperature": 1, "seed": 4, "logit_bias": {"40": 100, "41": 99.5}, "bad_words": ["e"]},
    {"temperature": 1.5, "seed": 5, "stop": ["a", "b", "c"]},
]


def ascii_tokenizer() -> tokenizers.Tokenizer:
    """Printable ASCII, a few longer tokens, special tokens."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = [*string.ascii_letters, *string.digits, *string.punctuation, "\u0120"]
    merges = [("t", "h"), ("th", "e"), ("o", "x"), ("o", "v"), ("ov", "e"), ("\u0120", "d"), ("u", "m")]
    vocabulary = [*SPECIALS, *letters, *("".join(pair) for pair in merges)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    backend.pre_tokenizer = byte_level
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return backend


class Truth:
    """The model by itself: one forward over prompt and answer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tokenizer = ascii_tokenizer()
        num_tokens = self.tokenizer.get_vocab_size()
        self.model = llama(vocab_size=num_tokens, bos_token_id=0, eos_token_id=1)
        self.model.save_pretrained(directory)
        self.tokenizer.save(str(directory / "tokenizer.json"))
        special = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
        (directory / "tokenizer_config.json").write_text(json.dumps(special))
        self.id_of = {self.tokenizer.decode([i], skip_special_tokens=False): i for i in range(num_tokens)}
        assert len(self.id_of) == num_tokens

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def text(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    @torch.inference_mode()
    def rows(self, token_ids: list[int]) -> torch.Tensor:
        """[len, V]: row i is what the model says about token i + 1."""
        return self.model(torch.tensor([token_ids])).logits[0].double().log_softmax(-1)


def check(row: torch.Tensor, token: int, logprob: float, top: dict[int, float], num_wanted: int) -> None:
    """One position: its token's log-probability, and the most probable ones in their order; near ties may swap."""
    assert logprob == pytest.approx(float(row[token]), abs=ATOL)
    best = dict(list(top.items())[:num_wanted])  # the token itself may stand behind them
    assert list(best.values()) == pytest.approx(row.topk(num_wanted).values.tolist(), abs=ATOL)
    for other, value in top.items():
        assert value == pytest.approx(float(row[other]), abs=ATOL)
    assert set(top) - set(best) <= {token}


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return Truth(tmp_path_factory.mktemp("tiny"))


@contextlib.asynccontextmanager
async def serving(truth: Truth, num_blocks: int = 512) -> AsyncIterator[Server]:
    """The server as `lifecycle` starts it, on a free port; the beginning of all prompts is in its cache."""
    settings = config(
        model={"path": str(truth.directory), "dtype": "float32", "device": "cpu"},
        cache={"num_blocks": num_blocks, "block_size": BLOCK},
        scheduler={"max_sequences": 8, "max_batched_tokens": BATCH, "max_chunk_tokens": CHUNK},
    )
    served, threads = Serving(settings), torch.get_num_threads()
    runner = GuardedRunner(create_app(served), settings.server)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        await lifecycle.load(served, ())
        async with aiohttp.ClientSession() as session:
            server = Server(f"http://127.0.0.1:{runner.addresses[0][1]}", session, served, None)  # type: ignore[arg-type]
            await server.chat(SHARED, max_tokens=1)
            await server.complete(prompt=SHARED, max_tokens=1)
            yield server
    finally:
        assert await lifecycle.close(served)
        await runner.cleanup()
        torch.set_num_threads(threads)  # they belong to the process


async def ask(server: Server, path: str, body: dict[str, Any], streamed: bool) -> tuple[list[Any], dict[str, Any]]:
    """Choices and usage; a stream's choices put together: texts, and lists of log-probabilities."""
    if not streamed:
        status, answer = await server.post(path, body)
        assert status == 200, answer
        return answer["choices"], answer["usage"]
    events = await server.stream(path, body | {"stream_options": {"include_usage": True}})
    choices: list[Any] = [{"text": "", "logprobs": {}} for _ in range(body.get("n", 1))]
    for choice in (choice for event in events for choice in event["choices"]):
        into = choices[choice["index"]]
        into["text"] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        for name, column in (choice["logprobs"] or {}).items():
            into["logprobs"][name] = into["logprobs"].get(name, []) + (column or [])
    return choices, events[-1]["usage"]


def tail(number: int) -> str:
    """What the prompt of one request has for itself: longer than a chunk, and than a step."""
    return string.ascii_letters[number:] + str(number)


def check_text(truth: Truth, text: str, output: list[int], body: dict[str, Any]) -> None:
    """The text is that of the tokens, up to a stop string."""
    whole = truth.text(output)
    assert text == whole if "stop" not in body else whole.startswith(text)


# --- chat ------------------------------------------------------------------------------------------------------------


def check_chat(truth: Truth, prompt: list[int], choice: dict[str, Any], body: dict[str, Any]) -> list[int]:
    """Every generated token of a choice; returns their ids."""
    entries = choice["logprobs"]["content"]
    output = [truth.id_of[bytes(entry["bytes"]).decode()] for entry in entries]
    check_text(truth, choice["text"] if "text" in choice else choice["message"]["content"], output, body)
    for row, token, entry in zip(truth.rows(prompt + output)[len(prompt) - 1 :], output, entries):
        top = {truth.id_of[other["token"]]: other["logprob"] for other in entry["top_logprobs"]}
        assert len(top) == body["top_logprobs"]
        check(row, token, entry["logprob"], top, body["top_logprobs"])
    return output


@pytest.mark.parametrize("num_blocks", [512, 48])
async def test_chat_logprobs_are_those_of_a_full_forward(truth: Truth, num_blocks: int) -> None:
    bodies = [
        {"messages": [{"role": "user", "content": SHARED + tail(number)}], "max_tokens": MAX_TOKENS, "logprobs": True,
         "top_logprobs": num_wanted} | sampling
        for number, (sampling, num_wanted) in enumerate(zip(SAMPLING, (20, 3, 0, 5, 1, 2), strict=True))
    ]  # fmt: skip
    async with serving(truth, num_blocks) as server:
        path = "/v1/chat/completions"
        answers = await asyncio.gather(*(ask(server, path, body, way) for way in (False, True) for body in bodies))
        prompts = [(await server.post("/tokenize", {"messages": body["messages"]}))[1]["tokens"] for body in bodies]
        num_preemptions = server.serving.metrics.stats.num_preemptions
    assert bool(num_preemptions) == (num_blocks < 512)
    outputs = []
    for (choices, usage), body, prompt in zip(answers, bodies * 2, prompts * 2):
        assert len(prompt) > 4 * BATCH and usage["prompt_tokens_details"]["cached_tokens"] > 2 * BATCH
        outputs.append([check_chat(truth, prompt, choice, body) for choice in choices])
        assert usage["completion_tokens"] == sum(map(len, outputs[-1])) and all(outputs[-1])
    assert outputs[: len(bodies)] == outputs[len(bodies) :], "streamed and whole are the same tokens"


# --- completions -----------------------------------------------------------------------------------------------------


def check_completion(truth: Truth, prompt: list[int], choice: dict[str, Any], body: dict[str, Any]) -> list[int]:
    """Every token of a choice, with echo those of the prompt in front; returns the generated ones."""
    columns = choice["logprobs"]
    shown = [truth.id_of[text] for text in columns["tokens"]]
    assert columns["text_offset"] == [sum(map(len, columns["tokens"][:i])) for i in range(len(shown))]
    output = shown
    if body.get("echo"):
        output = shown[len(prompt) :]
        assert shown[: len(prompt)] == prompt
        assert (columns["token_logprobs"].pop(0), columns["top_logprobs"].pop(0)) == (None, None)
        shown = shown[1:]
    check_text(truth, choice["text"], shown if output is shown else prompt + output, body)
    first = len(prompt) + len(output) - len(shown)
    rows = truth.rows(prompt + output)[first - 1 :]
    for row, token, logprob, given in zip(rows, shown, columns["token_logprobs"], columns["top_logprobs"]):
        top = {truth.id_of[text]: value for text, value in given.items()}
        assert token in top and len(top) <= body["logprobs"] + 1
        check(row, token, logprob, top, body["logprobs"])
    return output


async def test_completion_logprobs_are_those_of_a_full_forward(truth: Truth) -> None:
    bodies = [
        {"prompt": SHARED + tail(number), "max_tokens": MAX_TOKENS, "logprobs": num_wanted, "echo": echo} | sampling
        for number, (sampling, num_wanted) in enumerate(zip(SAMPLING, (5, 3, 0, 4, 1, 2), strict=True))
        for echo in (False, True)
    ]
    bodies.append({"prompt": SHARED + tail(9), "max_tokens": 0, "logprobs": 5, "echo": True})
    async with serving(truth) as server:
        path = "/v1/completions"
        answers = await asyncio.gather(*(ask(server, path, body, way) for way in (False, True) for body in bodies))
    outputs = []
    for (choices, usage), body in zip(answers, bodies * 2):
        prompt = truth.ids(body["prompt"])
        # With echo the positions of the prompt are owed, which the cache does not know.
        num_cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert num_cached == 0 if body["echo"] else num_cached > 2 * BATCH
        outputs.append([check_completion(truth, prompt, choice, body) for choice in choices])
        assert usage["completion_tokens"] == sum(map(len, outputs[-1]))
    assert outputs[: len(bodies)] == outputs[len(bodies) :], "streamed and whole are the same tokens"
    assert outputs[0:12:2] == outputs[1:12:2], "with and without echo, too"


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_wanted", [0, 1, 20])
async def test_prompt_logprobs_are_those_of_a_full_forward(truth: Truth, num_wanted: int) -> None:
    texts = [SHARED + tail(number) for number in range(3)]
    options = {"prompt_logprobs": num_wanted, "max_tokens": 2, "temperature": 0}
    async with serving(truth) as server:
        chats = await asyncio.gather(*(server.chat(text, **options) for text in texts))
        completions = await server.complete(prompt=texts, n=2, **options)
        tokenized = [
            await server.post("/tokenize", {"messages": [{"role": "user", "content": text}]}) for text in texts
        ]
    prompts = [answer["tokens"] for _, answer in tokenized] + [truth.ids(text) for text in texts for _ in range(2)]
    found = [chat["prompt_logprobs"] for chat in chats] + [row["prompt_logprobs"] for row in completions["choices"]]
    for prompt, positions in zip(prompts, found, strict=True):
        assert positions[0] is None
        for row, token, position in zip(truth.rows(prompt)[:-1], prompt[1:], positions[1:], strict=True):
            entries = {int(key): entry for key, entry in position.items()}
            check(row, token, entries[token]["logprob"], {k: e["logprob"] for k, e in entries.items()}, num_wanted)
            for key, entry in entries.items():
                above = [int((row > float(row[key]) + sign * ATOL).sum()) for sign in (1, -1)]
                assert above[0] < entry["rank"] <= above[1] + 1 and truth.id_of[entry["decoded_token"]] == key
