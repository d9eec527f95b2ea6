"""The sampler's definition written out row by row in plain Python and float64, slow and obvious."""

import math

import numpy as np
import torch

from asyncllm.executor.base import SlotInit
from asyncllm.executor.sampler import Sampler
from asyncllm.executor.sampling_rows import gather_rows
from asyncllm.executor.slots import SlotState
from asyncllm.types import Capacity, SamplingParams

CPU = torch.device("cpu")
M64, M32 = 2**64 - 1, 2**32 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix64(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def noise_bits(seed, position, token_id):
    key = mix64((mix64(seed & M64) + position * GOLDEN) & M64)
    low, high = key & M32, (key >> 32) | 1
    x = (((mix64(((token_id + 1) * GOLDEN) & M64) & M32) ^ low) * high) & M32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & M32
    return ((x ^ (x >> 13)) * 0xC2B2AE35) & M32


def gumbel(seed, position, token_id):
    w = -(2**31 - (noise_bits(seed, position, token_id) & (2**31 - 1))) * (1 - 2.0**-24) / 2**31
    return -math.log(-math.log1p(w))


def allowed_tokens(z, params):
    """Token ids that min_p, top_k and top_p leave of z, a list of floats already divided by the temperature."""
    peak = max(z)
    ids = [i for i in range(len(z)) if z[i] > -math.inf]
    if params.min_p > 0:
        ids = [i for i in ids if z[i] >= peak + math.log(params.min_p)]
    ids.sort(key=lambda i: (-z[i], i))
    if params.top_k > 0:
        ids = ids[: params.top_k]
    if params.top_p < 1:
        total = sum(math.exp(z[i] - peak) for i in ids)
        kept, mass = [], 0.0
        for i in ids:
            if kept and mass >= params.top_p * total:
                break
            kept.append(i)
            mass += math.exp(z[i] - peak)
        ids = kept
    return ids


def processed(logits, params, prompt, output, banned=()):
    """Logits after bans, bias and penalties, as floats."""
    z = [float(x) for x in logits]
    for token_id in banned:
        z[token_id] = -math.inf
    for token_id, bias in params.logit_bias:
        z[token_id] += bias
    for i in range(len(z)):
        count = output.count(i)
        if count or i in prompt:
            z[i] = z[i] / params.repetition_penalty if z[i] > 0 else z[i] * params.repetition_penalty
        z[i] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    return z


def sample(logits, params, prompt, output, position, banned=()):
    z = processed(logits, params, prompt, output, banned)
    if params.temperature == 0:
        return z.index(max(z))
    z = [x / params.temperature for x in z]
    return max(sorted(allowed_tokens(z, params)), key=lambda i: z[i] + gumbel(params.seed, position, i))


def capacity_for(vocab_size, max_sequences=8, num_blocks=64, block_size=4, max_context_length=128):
    return Capacity(num_blocks, block_size, max_sequences, max_context_length, vocab_size)


class Batch:
    """A sampler with one sequence in each slot."""

    def __init__(self, vocab_size, rows):
        """rows: (params, prompt, output) of each slot."""
        self.vocab_size = vocab_size
        self.state = SlotState(capacity_for(vocab_size, max(1, len(rows))), CPU)
        inits = [
            SlotInit(slot, params, [*prompt, *output], len(prompt))
            for slot, (params, prompt, output) in enumerate(rows)
        ]
        self.state.apply(inits, [])
        self.sampler = Sampler(vocab_size, self.state, CPU)

    def sample(self, logits, positions, slots=None, banned=None, masks=None):
        slots = list(range(len(logits))) if slots is None else slots
        rows = gather_rows(self.state, slots, self.vocab_size, CPU)
        positions = np.array(positions, dtype=np.int64)
        with torch.inference_mode():
            return self.sampler.sample(logits.clone(), rows, positions, banned or {}, masks or {}).tolist()


def draws(logits, params, num_draws, first_position=0):
    """Independent draws from one row's logits, at one position each."""
    batch = Batch(len(logits), [(params, [0], [])] * num_draws)
    return batch.sample(logits.expand(num_draws, -1), range(first_position, first_position + num_draws))


def random_params(rng, vocab_size):
    """A mix that leaves each parameter off about half of the time."""

    def maybe(value, off):
        return value if rng.random() < 0.5 else off

    return SamplingParams(
        max_tokens=1,
        temperature=maybe(rng.uniform(0.1, 2.0), rng.choice([0.0, 1.0])),
        top_p=maybe(rng.uniform(0.05, 0.99), 1.0),
        top_k=maybe(rng.randint(1, vocab_size + 3), 0),
        min_p=maybe(rng.uniform(0.0, 0.3), 0.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        seed=rng.randrange(-(2**63), 2**63),
        logit_bias=maybe(tuple((i, rng.uniform(-5, 5)) for i in rng.sample(range(vocab_size), 3)), ()),
    )


def chi_square(drawn, probabilities):
    """How far the counts of drawn tokens are from what these probabilities promise; none may come that has 0."""
    counts = torch.bincount(torch.tensor(drawn), minlength=len(probabilities)).double()
    expected = probabilities * len(drawn)
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    return float(((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum())
