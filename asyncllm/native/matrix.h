// Weights, and their products with rows of activations.
//
// A matrix [n, k] lies in groups of 16 outputs, each in blocks of 32 inputs, so that a product reads it from end to end
// and each of a vector's 16 lanes is one output. What a group has of one block of inputs, by kind:
//
//   BFLOAT16  [16 pairs of inputs][16 outputs][2] bfloat16, or the same in 12 bits each: see below      1024 or 768 bytes
//   FOUR_BIT  [16] float16 scales, [16] float16 offsets, [4 eights of inputs][16 outputs][4] bytes:         320 bytes
//             the first four inputs of an eight in the low halves of the bytes, the others in the high ones;
//             w = q * scale + offset, q in 0..15
//   EIGHT_BIT [16] float32 scales, [8 fours of inputs][16 outputs][4] int8; w = q * scale                   576 bytes
//   FLOAT16   [32 inputs][16 outputs] float16                                                              1024 bytes
//
// A step of few rows waits for memory, and of a bfloat16's exponent most bits say the same in a whole block: where all of
// a block's exponents lie within 15 steps, as in 94 of 100 blocks of normal weights, four bits say which. Nothing is lost.
// Before the blocks a group has a byte for each: what its exponents are less by, or 0 for a block as it is; so groups
// differ in size. A small exponent is 1 to 15, or 0 for zero itself: so small weights are numbers as they lie, and what
// they lack is made good in a block's sums. Of four vectors of 16 pairs, three hold the fourth in bits of their own.
//
// Rows meet BFLOAT16 as bfloat16 or float32 (simd.h, tiles.h) and FLOAT16 as float32; the others as int8 with a scale per block,
// so that products are of integers (llama.cpp's way). Most of the error that this brings is in the few blocks with a row's largest values: those of hidden
// states have seven bits more, in a second int8. A row's result depends on that row alone, not on how many are beside it.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

enum Kind : int32_t { BFLOAT16 = 0, FOUR_BIT = 1, EIGHT_BIT = 2, FLOAT16 = 3, KEYS = 4 };  // KEYS: of bfloat16, no weights

constexpr int BLOCK = 32;  // inputs
constexpr int GROUP = 16;  // outputs
constexpr int BLOCK_BYTES[] = {1024, 320, 576, 1024};
constexpr int NARROW_BYTES = 768;  // a block of bfloat16 in 12 bits
constexpr int FRACTION_BITS = 7;  // of bfloat16
constexpr int SIGN = 0x8000;

struct Adapter;

struct Matrix {
    int32_t kind;
    int32_t n, k;             // outputs, inputs; k a multiple of 32
    const uint8_t *data;      // groups; the last one is filled up with zeros
    const int64_t *offsets;   // BFLOAT16: of each group in data
    const float *bias;        // [n], or null
    const Adapter *adapters;  // one for each that the model has, or null

    int num_groups() const { return (n + GROUP - 1) / GROUP; }
    const uint8_t *group(int g) const {
        return data + (kind == BFLOAT16 ? offsets[g] : (int64_t)g * (k / BLOCK) * BLOCK_BYTES[kind]);
    }
};

// What an adapter changes of some groups of a matrix's outputs: what is added is up · down · x.
struct AdapterPart {
    int32_t begin, end;  // groups of the matrix
    Matrix up;           // BFLOAT16, [16 * (end - begin), width]
};

// What an adapter changes of a matrix. All of a model's adapters are as wide as the one with the largest rank.
struct Adapter {
    Matrix down;         // BFLOAT16, [num_parts * width, k]
    int32_t num_parts;   // 0: nothing is changed
    const AdapterPart *parts;
};

// Bytes before the blocks of a group of bfloat16.
inline size_t less_bytes(int k) { return ((size_t)k / BLOCK + 63) / 64 * 64; }

// Rows of k inputs each, as products of a kind take them.
struct Rows {
    simd::Input *values;    // BFLOAT16: [rows, input_stride(k)]
    float *floats;          // FLOAT16: [rows, k]
    simd::Value *for_keys;  // KEYS: [rows, k]
    int8_t *quants;         // the others: [rows, k]
    int8_t *fine;           // [rows, k], in blocks that are marked
    // Of a row's blocks, those of eight rows side by side, at `block_place`: [rows / 8, k / 32, 8].
    float *scales;         // x = quants * scale, or (128 * quants + fine) * scale
    float *sums;           // of x
    int32_t *starts;       // where sums of products of quants with signed weights begin
    int32_t *fine_starts;  // of fine
    uint8_t *marks;        // whether there is `fine`
};

// From one row's values to the next one's: an odd number of cache lines, or those of many rows would share a few places of
// the first cache wherever k is a multiple of 1024.
inline size_t input_stride(int k) {
    constexpr size_t LINE = 64 / sizeof(simd::Input);
    return ((size_t)k / LINE | 1) * LINE;
}

constexpr int SIDE_ROWS = 8;  // rows whose blocks lie side by side
constexpr int FINE_BITS = 7;
constexpr float LARGE = 1.5f;  // times the root mean square of all blocks' largest values: one in twelve is above

inline size_t block_place(int row, int num_blocks, int block) {
    return ((size_t)(row / SIDE_ROWS) * num_blocks + block) * SIDE_ROWS + row % SIDE_ROWS;
}

// Writes values [at, at + 32) of a row of k.
inline void prepare_block(const Rows &rows, int kind, int k, int row, int at, simd::Floats first, simd::Floats second,
                          bool is_fine = false) {
    using namespace simd;
    if (kind == BFLOAT16) {
        store_inputs(rows.values + row * input_stride(k) + at, first);
        store_inputs(rows.values + row * input_stride(k) + at + LANES, second);
        return;
    }
    const size_t place = (size_t)row * k + at;
    if (kind == FLOAT16) {
        store(rows.floats + place, first);
        store(rows.floats + place + LANES, second);
        return;
    }
    if (kind == KEYS) {
        store_values(rows.for_keys + place, first);
        store_values(rows.for_keys + place + LANES, second);
        return;
    }
    const float most = largest(max(abs(first), abs(second)));
    const float steps = is_fine ? 127.0f * (1 << FINE_BITS) : 127.0f;
    const Floats factor = all(most > 0 ? steps / most : 0.0f);
    Ints low = rounded(mul(first, factor)), high = rounded(mul(second, factor));
    const int32_t total = sum(low) + sum(high);
    const size_t block = block_place(row, k / BLOCK, at / BLOCK);
    rows.scales[block] = most / steps;
    rows.sums[block] = most / steps * (float)total;
    rows.starts[block] = signed_start(total);
    rows.marks[block] = is_fine;
    if (is_fine) {
        const Ints half = ints(1 << (FINE_BITS - 1));
        const Ints low_part = shifted_right(add(low, half), FINE_BITS), high_part = shifted_right(add(high, half), FINE_BITS);
        store_bytes(rows.fine + place, sub(low, shifted_left(low_part, FINE_BITS)));
        store_bytes(rows.fine + place + LANES, sub(high, shifted_left(high_part, FINE_BITS)));
        low = low_part, high = high_part;
        const int32_t coarse_total = sum(low) + sum(high);
        rows.starts[block] = signed_start(coarse_total);
        rows.fine_starts[block] = signed_start(total - (1 << FINE_BITS) * coarse_total);
    }
    store_bytes(rows.quants + place, low);
    store_bytes(rows.quants + place + LANES, high);
}

// A whole row, whose largest blocks are made fine.
inline void prepare_row(const Rows &rows, int kind, int k, int row, const float *x) {
    using namespace simd;
    float limit = INFINITY;
    if (kind == FOUR_BIT || kind == EIGHT_BIT) {
        float squares = 0;
        for (int i = 0; i < k; i += BLOCK) {
            const float most = largest(max(abs(load(x + i)), abs(load(x + i + GROUP))));
            squares += most * most;
        }
        limit = LARGE * std::sqrt(squares / (float)(k / BLOCK));
    }
    for (int i = 0; i < k; i += BLOCK) {
        const Floats first = load(x + i), second = load(x + i + GROUP);
        prepare_block(rows, kind, k, row, i, first, second, largest(max(abs(first), abs(second))) > limit);
    }
}

// Copies a prepared row of k.
inline void copy_row(const Rows &from, int row, const Rows &to, int to_row, int kind, int k) {
    if (kind == BFLOAT16) {
        const size_t stride = input_stride(k);
        std::memcpy(to.values + to_row * stride, from.values + row * stride, sizeof(*to.values) * k);
        return;
    }
    const size_t at = (size_t)row * k, to_at = (size_t)to_row * k;
    if (kind == FLOAT16) {
        std::memcpy(to.floats + to_at, from.floats + at, sizeof(*to.floats) * k);
        return;
    }
    std::memcpy(to.quants + to_at, from.quants + at, k);
    std::memcpy(to.fine + to_at, from.fine + at, k);
    for (int b = 0; b < k / BLOCK; ++b) {
        const size_t place = block_place(row, k / BLOCK, b), to_place = block_place(to_row, k / BLOCK, b);
        to.scales[to_place] = from.scales[place];
        to.sums[to_place] = from.sums[place];
        to.starts[to_place] = from.starts[place];
        to.fine_starts[to_place] = from.fine_starts[place];
        to.marks[to_place] = from.marks[place];
    }
}

// Which of R rows, not beyond a multiple of 8, have `fine` in a block, whose place is the first one's: a byte each.
template <int R> inline uint64_t marked(const Rows &x, size_t place) {
    uint64_t marks;
    std::memcpy(&marks, x.marks + place / SIDE_ROWS * SIDE_ROWS, sizeof marks);
    marks >>= 8 * (place % SIDE_ROWS);
    return R == SIDE_ROWS ? marks : marks & ((1ull << (8 * R % 64)) - 1);
}

// One group of a matrix, as a product takes it.
struct Group {
    int32_t kind, k;
    const uint8_t *data;
    const uint8_t *wide = nullptr;  // what `group_for` made of its blocks: pairs of BFLOAT16, or bytes for tiles
};

constexpr int AHEAD = 2048;  // bytes that weights are asked for before they are met

// While a block is computed, one to come gets here from memory: a processor alone does not look that far ahead.
inline void read_ahead(const uint8_t *block, int num_bytes) {
    for (int i = 0; i < num_bytes; i += 64) _mm_prefetch((const char *)block + AHEAD + i, _MM_HINT_T0);
}

// Calls use(pair of inputs, weights) for all of a block of bfloat16, 16 outputs by two inputs at a time, small ones where
// they lie so; returns where the block ends.
template <class Use> [[gnu::always_inline]] inline const uint8_t *each_pair(const uint8_t *at, bool small, Use &&use) {
    using namespace simd;
    if (!small) {
        for (int i = 0; i < BLOCK / 2; ++i, at += 64) use(i, load_bytes(at));
        return at;
    }
    for (int i = 0; i < BLOCK / 2; i += 4, at += 192) {
        const Ints x = load_bytes(at), y = load_bytes(at + 64), z = load_bytes(at + 128);
        use(i, without_fourth(x));
        use(i + 1, without_fourth(y));
        use(i + 2, without_fourth(z));
        use(i + 3, fourth(x, y, z));
    }
    return at;
}

// A weight whose exponent is less by this, as it was.
inline uint16_t grown(uint16_t weight, int less) {
    return weight & ~SIGN ? (uint16_t)(weight + (less << FRACTION_BITS)) : weight;
}

// One row of weights as floats: what an embedding looks up. k values.
inline void read_row(const Matrix &w, int row, float *to) {
    const int lane = row % GROUP;
    const uint8_t *at = w.group(row / GROUP);
    if (w.kind == BFLOAT16) {
        const uint8_t *less = at;
        at += less_bytes(w.k);
        for (int b = 0; b < w.k / BLOCK; ++b, to += BLOCK) {
            at = each_pair(at, less[b], [&](int pair, const simd::Ints &weights) {
                uint16_t values[2 * GROUP];
                std::memcpy(values, &weights, sizeof values);
                for (int i = 0; i < 2; ++i) to[2 * pair + i] = simd::bfloat16_to_float(grown(values[2 * lane + i], less[b]));
            });
        }
        return;
    }
    for (int b = 0; b < w.k / BLOCK; ++b, at += BLOCK_BYTES[w.kind], to += BLOCK) {
        if (w.kind == FLOAT16) {
            for (int i = 0; i < BLOCK; ++i) to[i] = _cvtsh_ss(((const uint16_t *)at)[i * GROUP + lane]);
        } else if (w.kind == FOUR_BIT) {
            float scales[GROUP], offsets[GROUP];
            simd::store(scales, simd::load_float16((const uint16_t *)at));
            simd::store(offsets, simd::load_float16((const uint16_t *)at + GROUP));
            for (int i = 0; i < BLOCK; ++i) {
                const uint8_t both = at[64 + 64 * (i / 8) + 4 * lane + i % 4];
                to[i] = (float)(i % 8 < 4 ? both & 15 : both >> 4) * scales[lane] + offsets[lane];
            }
        } else {
            for (int i = 0; i < BLOCK; ++i) {
                to[i] = (float)(int8_t)at[64 + 64 * (i / 4) + 4 * lane + i % 4] * ((const float *)at)[lane];
            }
        }
    }
}
