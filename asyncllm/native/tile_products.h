// Products of rows with a group of weights in tiles: the same bits for any number of rows, as those of vectors.
#pragma once

#include "matrix.h"
#include "tiles.h"

#if defined(__AMX_TILE__)

namespace tiles {

static_assert(sizeof(float) * GROUP == ROW_BYTES && 2 * BLOCK == ROW_BYTES);

constexpr int NIBBLE_BYTES = BLOCK * GROUP;  // of a block whose halves of bytes are bytes of their own

// Leaves a group's four-bit weights in `to`, a byte each. Its blocks come from memory: one further on is asked for.
inline void widen_nibbles(Group &group, uint8_t *to) {
    group.wide = to;
    const uint8_t *at = group.data;
    for (int b = 0; b < group.k / BLOCK; ++b, at += BLOCK_BYTES[FOUR_BIT]) {
        read_ahead(at, BLOCK_BYTES[FOUR_BIT]);
        for (int eight = 0; eight < 4; ++eight, to += 2 * ROW_BYTES) {
            const simd::Ints both = simd::load_bytes(at + 64 + 64 * eight);
            const simd::Ints low = simd::low_halves(both), high = simd::high_halves(both);
            std::memcpy(to, &low, ROW_BYTES);
            std::memcpy(to + ROW_BYTES, &high, ROW_BYTES);
        }
    }
}

// Leaves a block of bfloat16 in `to` as it was; returns where it ends.
inline const uint8_t *widen_block(const uint8_t *at, int less, uint8_t *to) {
    using namespace simd;
    const Ints base = words(less << FRACTION_BITS);
    return each_pair(at, less, [&](int pair, Ints weights) {
        weights = _mm512_mask_add_epi16(weights, _mm512_test_epi16_mask(weights, words(~SIGN)), weights, base);
        std::memcpy(to + ROW_BYTES * pair, &weights, sizeof weights);
    });
}

// Leaves a group's pairs of bfloat16 in `to`.
inline void widen_pairs(Group &group, uint8_t *to) {
    group.wide = to;
    const uint8_t *at = group.data + less_bytes(group.k);
    for (int b = 0; b < group.k / BLOCK; ++b, to += BLOCK_BYTES[BFLOAT16]) {
        read_ahead(at, NARROW_BYTES);
        at = widen_block(at, group.data[b], to);
    }
}

template <Kind KIND> inline void multiply_block(const int8_t *inputs, int k, int32_t *sums) {
    zero<SUMS>();
    load<INPUTS>(inputs, k);
    if (KIND == FOUR_BIT) add_unsigned<SUMS, INPUTS, WEIGHTS>();
    else add_signed<SUMS, INPUTS, WEIGHTS>();
    store<SUMS>(sums, ROW_BYTES);
}

// R rows, of which those behind num_rows may be anything: out[row * stride + output], output 0..15.
template <int R, Kind KIND>
inline void multiply_integers(const Group &w, const Rows &x, int row, int num_rows, float *out, int stride) {
    using namespace simd;
    const int num_blocks = w.k / BLOCK;
    alignas(64) int32_t products[2][R * GROUP], fine[2][R * GROUP];  // by turns, as what is stored takes a while
    Floats y[R];
    for (int r = 0; r < R; ++r) y[r] = simd::zero();
    configure(R, BLOCK);
    for (int b = 0; b < num_blocks; ++b) {
        const uint8_t *at = w.data + (size_t)b * BLOCK_BYTES[KIND];
        if (KIND == EIGHT_BIT) read_ahead(at, BLOCK_BYTES[EIGHT_BIT]);
        tiles::load<WEIGHTS>(KIND == FOUR_BIT ? w.wide + (size_t)b * NIBBLE_BYTES : at + 64, ROW_BYTES);
        const size_t inputs = (size_t)row * w.k + b * BLOCK;
        multiply_block<KIND>(x.quants + inputs, w.k, products[b % 2]);
        size_t places[R / SIDE_ROWS];
        uint64_t marks[R / SIDE_ROWS], any = 0;
        for (int i = 0; i < R / SIDE_ROWS; ++i) {
            places[i] = block_place(row + i * SIDE_ROWS, num_blocks, b);
            marks[i] = marked<SIDE_ROWS>(x, places[i]);
            any |= marks[i];
        }
        if (any) multiply_block<KIND>(x.fine + inputs, w.k, fine[b % 2]);
        const Floats scale = KIND == FOUR_BIT ? load_float16((const uint16_t *)at) : simd::load((const float *)at);
        const Floats offset = KIND == FOUR_BIT ? load_float16((const uint16_t *)at + GROUP) : simd::zero();
#pragma GCC unroll 16  // or the sums do not stay in registers
        for (int r = 0; r < R; ++r) {
            const size_t place = places[r / SIDE_ROWS] + r % SIDE_ROWS;
            Ints product = load_bytes(products[b % 2] + r * GROUP);
            if (marks[r / SIDE_ROWS] >> (8 * (r % SIDE_ROWS)) & 1) {
                product = add(shifted_left(product, FINE_BITS), load_bytes(fine[b % 2] + r * GROUP));
            }
            y[r] = fma(mul(scale, all(x.scales[place])), to_floats(product), y[r]);
            if (KIND == FOUR_BIT) y[r] = fma(offset, all(x.sums[place]), y[r]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        if (r < num_rows) simd::store(out + (size_t)r * stride, y[r]);
    }
}

// Up to ROWS rows from a multiple of SIDE_ROWS on, times a group as `group_for` has made it.
inline void multiply_integers(const Group &w, const Rows &x, int row, int num_rows, float *out, int stride) {
    if (w.kind == FOUR_BIT) {
        if (num_rows <= SIDE_ROWS) multiply_integers<SIDE_ROWS, FOUR_BIT>(w, x, row, num_rows, out, stride);
        else multiply_integers<ROWS, FOUR_BIT>(w, x, row, num_rows, out, stride);
    } else {
        if (num_rows <= SIDE_ROWS) multiply_integers<SIDE_ROWS, EIGHT_BIT>(w, x, row, num_rows, out, stride);
        else multiply_integers<ROWS, EIGHT_BIT>(w, x, row, num_rows, out, stride);
    }
}

// Up to ROWS rows. Blocks are summed up by fours, as one sum waits for the one before it.
inline void multiply_bfloat16(const Group &w, const Rows &x, int row, int num_rows, float *out, int stride) {
    using namespace simd;
    constexpr int NUM_SUMS = 4;
    const int num_blocks = w.k / BLOCK;
    const uint8_t *at = w.data + less_bytes(w.k);
    alignas(64) uint8_t widened[NUM_SUMS][BLOCK_BYTES[BFLOAT16]];
    configure(num_rows, ROW_BYTES);
    tiles::zero<SUMS>(), tiles::zero<SUMS + 1>(), tiles::zero<SUMS + 2>(), tiles::zero<SUMS + 3>();
    for (int first = 0; first < num_blocks; first += NUM_SUMS) {
        const auto add_block = [&]<int I>() {
            const int b = first + I;
            if (b >= num_blocks) return;
            const uint8_t *weights = w.wide + (size_t)b * BLOCK_BYTES[BFLOAT16];
            if (!w.wide) {
                weights = widened[I];
                at = widen_block(at, w.data[b], widened[I]);
            }
            tiles::load<INPUTS + I % 2>(x.values + row * input_stride(w.k) + b * BLOCK, sizeof(Input) * input_stride(w.k));
            tiles::load<WEIGHTS + I % 2>(weights, ROW_BYTES);
            add_bfloat16<SUMS + I, INPUTS + I % 2, WEIGHTS + I % 2>();
        };
        add_block.template operator()<0>();
        add_block.template operator()<1>();
        add_block.template operator()<2>();
        add_block.template operator()<3>();
    }
    alignas(64) float sums[NUM_SUMS][ROWS * GROUP];
    tiles::store<SUMS>(sums[0], ROW_BYTES);
    tiles::store<SUMS + 1>(sums[1], ROW_BYTES);
    tiles::store<SUMS + 2>(sums[2], ROW_BYTES);
    tiles::store<SUMS + 3>(sums[3], ROW_BYTES);
    for (int r = 0; r < num_rows; ++r) {
        const auto sum = [&](int i) { return simd::load(sums[i] + r * GROUP); };
        simd::store(out + (size_t)r * stride, add(add(sum(0), sum(1)), add(sum(2), sum(3))));
    }
}

}  // namespace tiles

#endif
