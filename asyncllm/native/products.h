// Products of rows with a group of weights: in vectors, or in tiles where the processor has them.
#pragma once

#include <type_traits>

#include "matrix.h"
#include "tile_products.h"

// R rows times one group of outputs: out[row * stride + output], output 0..15.
template <int R>
inline void multiply_four_bit(const Group &w, const Rows &x, int row, float *out, int stride) {
    using namespace simd;
    const int num_blocks = w.k / BLOCK;
    const uint8_t *at = w.data;
    Floats y[R];
    for (int r = 0; r < R; ++r) y[r] = zero();
    for (int b = 0; b < num_blocks; ++b, at += BLOCK_BYTES[FOUR_BIT]) {
        read_ahead(at, BLOCK_BYTES[FOUR_BIT]);
        const size_t place = block_place(row, num_blocks, b);
        Ints products[R];
        for (int r = 0; r < R; ++r) products[r] = ints(0);
        const int8_t *quants = x.quants + (size_t)row * w.k + b * BLOCK;
        for (int eight = 0; eight < 4; ++eight) {
            const Ints both = load_bytes(at + 64 + 64 * eight), low = low_halves(both), high = high_halves(both);
            for (int r = 0; r < R; ++r) {
                const int8_t *inputs = quants + (size_t)r * w.k + 8 * eight;
                products[r] = dot_nibbles(products[r], low, quad_at(inputs));
                products[r] = dot_nibbles(products[r], high, quad_at(inputs + 4));
            }
        }
        if (const uint64_t marks = marked<R>(x, place)) {
            for (int r = 0; r < R; ++r) {
                if (!(marks >> (8 * r) & 1)) continue;
                const int8_t *inputs = x.fine + (size_t)(row + r) * w.k + b * BLOCK;
                products[r] = shifted_left(products[r], FINE_BITS);
                for (int eight = 0; eight < 4; ++eight) {
                    const Ints both = load_bytes(at + 64 + 64 * eight);
                    products[r] = dot_nibbles(products[r], low_halves(both), quad_at(inputs + 8 * eight));
                    products[r] = dot_nibbles(products[r], high_halves(both), quad_at(inputs + 8 * eight + 4));
                }
            }
        }
        const Floats scale = load_float16((const uint16_t *)at), offset = load_float16((const uint16_t *)at + GROUP);
        for (int r = 0; r < R; ++r) {
            const Floats both_scales = mul(scale, all(x.scales[place + r]));
            y[r] = fma(both_scales, to_floats(products[r]), y[r]);
            y[r] = fma(offset, all(x.sums[place + r]), y[r]);
        }
    }
    for (int r = 0; r < R; ++r) store(out + (size_t)r * stride, y[r]);
}

template <int R>
inline void multiply_eight_bit(const Group &w, const Rows &x, int row, float *out, int stride) {
    using namespace simd;
    const int num_blocks = w.k / BLOCK;
    const uint8_t *at = w.data;
    Floats y[R];
    for (int r = 0; r < R; ++r) y[r] = zero();
    for (int b = 0; b < num_blocks; ++b, at += BLOCK_BYTES[EIGHT_BIT]) {
        read_ahead(at, BLOCK_BYTES[EIGHT_BIT]);
        const size_t place = block_place(row, num_blocks, b);
        Ints products[R];
        for (int r = 0; r < R; ++r) products[r] = ints(x.starts[place + r]);
        const int8_t *quants = x.quants + (size_t)row * w.k + b * BLOCK;
        for (int four = 0; four < 8; ++four) {
            const Bytes weights = load_signed(at + 64 + 64 * four);
            for (int r = 0; r < R; ++r) {
                products[r] = dot_signed(products[r], weights, quad_at(quants + (size_t)r * w.k + 4 * four));
            }
        }
        if (const uint64_t marks = marked<R>(x, place)) {
#pragma GCC unroll 8  // or the products do not stay in registers
            for (int r = 0; r < R; ++r) {
                if (!(marks >> (8 * r) & 1)) continue;
                const int8_t *inputs = x.fine + (size_t)(row + r) * w.k + b * BLOCK;
                products[r] = add(shifted_left(products[r], FINE_BITS), ints(x.fine_starts[place + r]));
                for (int four = 0; four < 8; ++four) {
                    const Bytes weights = load_signed(at + 64 + 64 * four);
                    products[r] = dot_signed(products[r], weights, quad_at(inputs + 4 * four));
                }
            }
        }
        const Floats scale = load((const float *)at);
        for (int r = 0; r < R; ++r) {
            y[r] = fma(mul(scale, all(x.scales[place + r])), to_floats(products[r]), y[r]);
        }
    }
    for (int r = 0; r < R; ++r) store(out + (size_t)r * stride, y[r]);
}

#if !defined(__AMX_TILE__)  // whose rows are of bfloat16
// Leaves a group's pairs of bfloat16 in `to`, small ones still small, a vector each.
inline void widen_pairs(Group &group, uint8_t *to) {
    group.wide = to;
    const uint8_t *at = group.data + less_bytes(group.k);
    for (int b = 0; b < group.k / BLOCK; ++b, to += BLOCK_BYTES[BFLOAT16]) {
        read_ahead(at, NARROW_BYTES);
        at = each_pair(at, group.data[b], [&](int pair, const simd::Ints &weights) {
            std::memcpy(to + 64 * pair, &weights, sizeof weights);
        });
    }
}

// Each row has one sum of a block, and meets a weight as soon as it is widened: so as many rows as there are registers.
template <int R>
inline void multiply_bfloat16(const Group &w, const Rows &x, int row, float *out, int stride) {
    using namespace simd;
    const uint8_t *less = w.data, *at = w.wide ? w.wide : w.data + less_bytes(w.k);
    const size_t stride_of_rows = input_stride(w.k);
    const Value *values = x.values + row * stride_of_rows;
    Floats y[R];
    for (int r = 0; r < R; ++r) y[r] = zero();
    for (int b = 0; b < w.k / BLOCK; ++b, values += BLOCK) {
        if (!w.wide) read_ahead(at, NARROW_BYTES);
        Floats sums[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sums[r] = zero();
        at = each_pair(at, less[b] && !w.wide, [&](int pair, const Ints &weights) __attribute__((always_inline)) {
            const Pairs pairs = pairs_of(weights);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) sums[r] = dot_pairs(sums[r], pairs, values + r * stride_of_rows + 2 * pair);
        });
        const Floats scale = all(power_of_two(less[b] - INPUT_EXPONENT));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) y[r] = fma(sums[r], scale, y[r]);
    }
    for (int r = 0; r < R; ++r) store(out + (size_t)r * stride, y[r]);
}
#endif

template <int R>
inline void multiply_float16(const Group &w, const Rows &x, int row, float *out, int stride) {
    using namespace simd;
    const uint16_t *weights = (const uint16_t *)w.data;
    const float *values = x.floats + (size_t)row * w.k;
    Floats y[R], z[R];  // summed up
    for (int r = 0; r < R; ++r) y[r] = z[r] = zero();
    for (int i = 0; i < w.k; i += 2, weights += 2 * GROUP) {
        read_ahead((const uint8_t *)weights, 64);
        const Floats first = load_float16(weights), second = load_float16(weights + GROUP);
        for (int r = 0; r < R; ++r) {
            y[r] = fma(first, all(values[(size_t)r * w.k + i]), y[r]);
            z[r] = fma(second, all(values[(size_t)r * w.k + i + 1]), z[r]);
        }
    }
    for (int r = 0; r < R; ++r) store(out + (size_t)r * stride, add(y[r], z[r]));
}

// Any number of rows times one group of outputs, as many of them at once as leave their sums in registers.
inline void multiply_in_vectors(const Group &w, const Rows &x, int row, int num_rows, float *out, int stride) {
    for (int r = 0; r < num_rows; r += simd::SUMS) {
        simd::with_count<simd::SUMS>(num_rows - r, [&]<int R>() {
            float *to = out + (size_t)r * stride;
            switch (w.kind) {
            case FOUR_BIT: return multiply_four_bit<R>(w, x, row + r, to, stride);
            case EIGHT_BIT: return multiply_eight_bit<R>(w, x, row + r, to, stride);
            case FLOAT16: return multiply_float16<R>(w, x, row + r, to, stride);
#if !defined(__AMX_TILE__)
            default: return multiply_bfloat16<R>(w, x, row + r, to, stride);
#endif
            }
        });
    }
}

#if defined(__AMX_TILE__)

constexpr int ROWS_AT_ONCE = tiles::ROWS;
inline int rows_at_once(int) { return ROWS_AT_ONCE; }
constexpr int LEAST_ROWS = 5;  // of integers that tiles are worth: below it, a vector's products are as fast

// Up to `rows_at_once` times one group of outputs. Of integers, vectors and tiles make the same.
inline void multiply(const Group &w, const Rows &x, int row, int num_rows, float *out, int stride) {
    if (w.kind == BFLOAT16) return tiles::multiply_bfloat16(w, x, row, num_rows, out, stride);
    if (w.kind == FLOAT16 || num_rows < LEAST_ROWS) return multiply_in_vectors(w, x, row, num_rows, out, stride);
    tiles::multiply_integers(w, x, row, num_rows, out, stride);
}

// A group that is to meet some rows. For more than a few it is widened once, into `scratch`.
inline Group group_for(const Matrix &w, int g, int num_rows, uint8_t *scratch) {
    Group group = {w.kind, w.k, w.group(g)};
    if (num_rows < LEAST_ROWS || w.kind == EIGHT_BIT || w.kind == FLOAT16) return group;
    if (w.kind == BFLOAT16) tiles::widen_pairs(group, scratch);
    else tiles::widen_nibbles(group, scratch);
    return group;
}

#else

constexpr int ROWS_AT_ONCE = 2 * simd::SUMS;
inline int rows_at_once(int kind) { return kind == BFLOAT16 ? ROWS_AT_ONCE : simd::SUMS; }

// Whether pairs take so long to widen that it is done once for many rows: two products of float32 with each of 16 rows
// take longer by far, one of bfloat16 does not.
constexpr bool IS_WIDENED_ONCE = simd::SUMS < 8 || std::is_same_v<simd::Value, uint16_t>;

// Up to `rows_at_once` times one group of outputs.
inline void multiply(const Group &w, const Rows &x, int row, int num_rows, float *out, int stride) {
    if (w.kind == BFLOAT16 && num_rows == ROWS_AT_ONCE) return multiply_bfloat16<ROWS_AT_ONCE>(w, x, row, out, stride);
    multiply_in_vectors(w, x, row, num_rows, out, stride);
}

// A group that is to meet some rows: pairs of bfloat16 are widened on their way into products, or before, into `scratch`.
inline Group group_for(const Matrix &w, int g, int num_rows, uint8_t *scratch) {
    Group group = {w.kind, w.k, w.group(g)};
    if (IS_WIDENED_ONCE && w.kind == BFLOAT16 && num_rows > ROWS_AT_ONCE) widen_pairs(group, scratch);
    return group;
}

#endif

// Adds the bias of a group to what `multiply` left.
inline void add_bias(const Matrix &w, int num_rows, int g, float *out, int stride) {
    if (!w.bias) return;
    const int first = g * GROUP, num_outputs = std::min(GROUP, w.n - first);
    for (int r = 0; r < num_rows; ++r) {
        for (int i = 0; i < num_outputs; ++i) out[(size_t)r * stride + i] += w.bias[first + i];
    }
}
