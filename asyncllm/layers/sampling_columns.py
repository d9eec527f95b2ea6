"""Sampling parameters on the device: one memory [L, 16], seen as float32 and as int32, a row for each request slot."""

TEMPERATURE, TOP_P, LOG_MIN_P, REPETITION, FREQUENCY, PRESENCE = range(6)  # float32
TOP_K, SEED_LOW, SEED_HIGH = range(6, 9)  # int32
NUM_COLUMNS = 16  # a row is a cache line of 64 bytes

# Off: top_p +inf, since rounded sums may reach 1 before the last token; log(min_p) -inf; top_k 0.
MIN_TEMPERATURE = 1e-5  # rows below are greedy
