"""Probes, models, load, version and metrics."""

from prometheus_client.parser import text_string_to_metric_families

from asyncllm import __version__
from tests.server.harness import running


async def test_probes_are_green_when_the_engine_is_ready() -> None:
    async with running() as server:
        assert (await server.get("/livez")) == (200, {"status": "alive"})
        assert (await server.get("/readyz")) == (200, {"status": "ready"})
        status, startup = await server.get("/startupz")
        assert status == 200 and startup["status"] == "started" and startup["error"] is None
        status, health = await server.get("/health")
        assert status == 200 and health["status"] == "healthy"
        assert {"timestamp", "backend", "model", "device", "memory"} <= set(health)
        assert health["device"] == "fake" and health["memory"]["process_resident_bytes"] > 0


async def test_models_are_listed_under_all_their_names() -> None:
    async with running(model={"path": "org/fake", "aliases": ("gpt-4", "a/b")}) as server:
        status, listed = await server.get("/v1/models")
        assert status == 200 and listed["object"] == "list"
        assert [model["id"] for model in listed["data"]] == ["fake", "a/b", "gpt-4"]
        assert all(model["max_model_len"] == 512 and model["owned_by"] == "asyncllm" for model in listed["data"])
        assert (await server.get("/v1/models/a/b"))[1]["root"] == "fake"
        answer = await server.complete(prompt="a", model="gpt-4", max_tokens=1)
        assert answer["model"] == "gpt-4"


async def test_version_and_load_are_told() -> None:
    async with running() as server:
        assert (await server.get("/version"))[1]["version"] == __version__
        load = (await server.get("/load"))[1]
        assert load == {"running": 0, "waiting": 0, "waiting_tokens": 0, "kv_cache_usage": 0.0, "streams": 0}


async def metrics_of(server) -> dict[str, float]:
    status, text, headers = await server.call("GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k not in ("model_name", "le"))
            samples[f"{sample.name}{{{labels}}}"] = sample.value
    return samples


async def test_metrics_count_what_happened() -> None:
    async with running() as server:
        await server.complete(prompt="abcdefghi", max_tokens=5)
        await server.complete(prompt="abcdefghi", max_tokens=5)
        await server.post("/v1/completions", {"prompt": ""})
        metrics = await metrics_of(server)
        assert metrics["asyncllm:prompt_tokens_total{}"] == 18
        assert metrics["asyncllm:generation_tokens_total{}"] == 10
        assert metrics["asyncllm:prompt_tokens_cached_total{}"] == 8
        assert metrics["asyncllm:prefix_cache_hits_total{}"] == 8
        assert metrics["asyncllm:request_success_total{finished_reason=length}"] == 2
        assert metrics["asyncllm:time_to_first_token_seconds_count{}"] == 2
        assert metrics["asyncllm:inter_token_latency_seconds_count{}"] == 8
        assert metrics["asyncllm:e2e_request_latency_seconds_count{}"] == 2
        assert metrics["asyncllm:request_queue_time_seconds_count{}"] == 2
        assert metrics["asyncllm:http_requests_total{method=POST,route=/v1/completions,status=200}"] == 2
        assert metrics["asyncllm:http_errors_total{code=invalid_value,status=400}"] == 1
        assert metrics["asyncllm:steps_total{}"] == metrics["asyncllm:step_seconds_count{phase=commit}"] == 10
        assert metrics["asyncllm:num_requests_running{}"] == 0
        assert metrics["process_resident_memory_bytes{}"] > 0


async def test_the_prefix_gives_vllms_names() -> None:
    async with running(metrics={"prefix": "vllm"}) as server:
        metrics = await metrics_of(server)
        assert {"vllm:num_requests_running{}", "vllm:kv_cache_usage_perc{}"} <= set(metrics)


async def test_metrics_can_be_switched_off() -> None:
    async with running(metrics={"enabled": False}) as server:
        assert (await server.get("/metrics"))[0] == 404
