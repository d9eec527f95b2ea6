"""What a request asks for, on the device: one memory [L, 16], seen as float32 and as int32, a row for each slot.

All are sampling parameters but ADAPTER, which the layers' adapters go by.
"""

TEMPERATURE, TOP_P, LOG_MIN_P, REPETITION, FREQUENCY, PRESENCE = range(6)  # float32
TOP_K, SEED_LOW, SEED_HIGH, ADAPTER = range(6, 10)  # int32
NUM_COLUMNS = 16  # a row is a cache line of 64 bytes

# Off: top_p +inf, since rounded sums may reach 1 before the last token; log(min_p) -inf; top_k 0.
MIN_TEMPERATURE = 1e-5  # rows below are greedy
