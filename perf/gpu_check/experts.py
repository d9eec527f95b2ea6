"""A layer of experts alone, in the sizes of Qwen3-30B-A3B: are the kernels right, and how near to the memory's speed?

Of 128 experts a token reads 8, so what a small step costs is the weights of those that its tokens chose. Knows one
layer; no engine.
"""

from typing import Any

import torch
from torch import Tensor

from asyncllm.layers.experts import SparseMLP
from asyncllm.models.config import Experts
from perf.gpu_check.ceilings import GIGA
from perf.gpu_check.device import Device
from perf.gpu_check.findings import Findings, Found
from perf.gpu_check.lab import Lab
from perf.gpu_check.models import experts
from perf.gpu_check.roofline import Ceilings
from perf.gpu_check.setup import Box, Setup
from perf.stats import ratio

NUM_INPUTS = 8  # of one graph: the experts of one input fit in an L2, and would be found there by the next replay
FLOAT32_ERROR = 1e-5  # of the largest value: the same sums in another order
NOISE_FACTOR = 1.5  # of the error that the plain layer has in the same precision

Input = tuple[Tensor, Tensor]  # x [N, hidden], logits [N, E]


class Layer:
    """One mixture of random weights, computed by kernels and plainly."""

    def __init__(self, hidden: int, sizes: Experts, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.plain = SparseMLP(hidden, sizes, "silu").to(dtype)
        for parameter in self.plain.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        self.plain.experts.prepare(fused=False)  # which keeps the stacks, but for bfloat16 on a CPU
        self.hidden, self.sizes, self.dtype, self.device = hidden, sizes, dtype, device

    def inputs(self, num_tokens: int, count: int) -> list[Input]:
        """Random tokens, and logits of their own, which have no ties."""
        tokens = torch.randn(count, num_tokens, self.hidden, device=self.device).to(self.dtype)
        return list(zip(tokens, torch.randn(count, num_tokens, self.sizes.num_experts, device=self.device)))

    def fused(self, x: Tensor, logits: Tensor, tile_rows: int = 0) -> Tensor:
        """The kernels; with tiles of so many rows, if not 0."""
        # Imported here: where Triton is missing, the rest of the part still runs.
        from asyncllm.layers.triton_experts import CONFIGS, mix_experts

        configs = {config.tile_rows: config for _, config in CONFIGS[self.dtype.itemsize]}
        gate_up, down = self.plain.experts.gate_up_proj, self.plain.experts.down_proj
        assert gate_up is not None and down is not None
        sizes = (self.sizes.num_experts_per_token, self.sizes.norm_topk_prob)
        return mix_experts(x, logits, gate_up, down, *sizes, "silu", configs.get(tile_rows))

    def chosen(self, x: Tensor, logits: Tensor) -> Tensor:
        """Plainly, in this precision."""
        return self.plain.chosen_experts(x, *self.plain.choose(logits))

    def dense(self, x: Tensor, logits: Tensor) -> Tensor:
        """What ran in a graph before there were kernels: every expert computes every token."""
        weights, chosen = self.plain.choose(logits)
        return self.plain.all_experts(x, weights.to(x.dtype), chosen)


@torch.inference_mode()
def experts_agree(lab: Lab, findings: Findings, found: Found) -> None:
    """Kernels against the plain layer in float32, beside the plain layer's own error; again, and in a graph."""
    device, passed = Device(lab.scale.device), []
    hidden, sizes = experts(lab.setup.rehearse)
    for name in lab.scale.check_dtypes:
        layer = Layer(hidden, sizes, getattr(torch, name), device.torch)
        exact = layer if name == "float32" else widened(layer)
        for num_tokens in lab.scale.experts_check_rows:
            if findings.late("experts"):
                found["passed"] = False
                return
            cell = found[f"{name}_n{num_tokens}"] = _compare(layer, exact, num_tokens, device)
            passed.append(cell["passed"])
    found["passed"] = bool(passed) and all(passed)


def _compare(layer: Layer, exact: Layer, num_tokens: int, device: Device) -> dict[str, Any]:
    (x, logits), *_ = layer.inputs(num_tokens, 1)
    expected = exact.chosen(x.float(), logits)
    ours, noise = layer.fused(x, logits), _error(layer.chosen(x, logits), expected)
    error, outputs = _error(ours, expected), []
    replay = device.graphed(lambda: outputs.append(layer.fused(x, logits)))
    replay()
    device.synchronize()
    is_same = torch.equal(outputs[-1], ours)
    is_near = error <= max(NOISE_FACTOR * noise, FLOAT32_ERROR)
    return {"passed": is_same and is_near, "error": error, "noise": noise, "same_in_a_graph": is_same}


def widened(layer: Layer) -> Layer:
    """The same weights in float32."""
    wide = Layer(layer.hidden, layer.sizes, torch.float32, layer.device)
    for target, source in zip(wide.plain.parameters(), layer.plain.parameters(), strict=True):
        target.copy_(source)
    return wide


def _error(ours: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, of that of the values."""
    return float((ours.float() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@torch.inference_mode()
def experts_speed(device: Device, setup: Setup, ceilings: Ceilings, box: Box, found: Found) -> None:
    """Microseconds by number of tokens: as chosen, with each size of tile, and densely where that ends soon."""
    from asyncllm.layers.triton_experts import CONFIGS

    hidden, sizes = experts(setup.rehearse)
    scale = setup.scale
    count, repeats = (1, 1) if setup.rehearse else (NUM_INPUTS, 10)
    layer = Layer(hidden, sizes, getattr(torch, scale.dtype), device.torch)
    for num_tokens in scale.experts_rows:
        if box.is_over:
            return
        inputs = layer.inputs(num_tokens, count)

        def run(tile_rows: int = 0, inputs: list[Input] = inputs) -> None:
            for x, logits in inputs:
                layer.fused(x, logits, tile_rows)

        seconds = device.seconds(device.graphed(run), repeats) / count
        num_bytes, ideal_s = _floor(layer, inputs, ceilings)
        cell = found[f"n{num_tokens}"] = {
            "us": round(seconds * 1e6, 2),
            "gb_per_s": round(num_bytes / seconds / GIGA, 1),
            "of_roofline": ratio(ideal_s, seconds) if ceilings.bandwidth > 1.0 else None,
        }
        for _, config in CONFIGS[layer.dtype.itemsize]:
            tiled = device.graphed(lambda rows=config.tile_rows: run(rows))  # type: ignore[misc]
            cell[f"us_tiles_of_{config.tile_rows}"] = round(device.seconds(tiled, repeats) / count * 1e6, 2)
        if num_tokens <= scale.experts_dense_rows:
            dense_s = device.seconds(device.graphed(lambda: layer.dense(*inputs[0])), repeats)  # noqa: B023
            cell["dense_us"], cell["times_dense"] = round(dense_s * 1e6, 2), ratio(dense_s, seconds)
        if num_tokens == scale.experts_rows[0]:
            found["profile"] = device.top_kernels(run, count)
        device.free_memory()


def _floor(layer: Layer, inputs: list[Input], ceilings: Ceilings) -> tuple[int, float]:
    """Bytes of the experts that the tokens of one input chose, on average; the least time to read or multiply them."""
    chosen = [layer.plain.choose(logits)[1] for _, logits in inputs]
    num_read = sum(len(experts.unique()) for experts in chosen) / len(chosen)
    expert = 3 * layer.hidden * layer.sizes.intermediate_size
    num_bytes = int(num_read * expert * layer.dtype.itemsize)
    operations = 2 * expert * chosen[0].numel()
    return num_bytes, max(num_bytes / ceilings.bandwidth, operations / ceilings.gemm_flops_per_s)
