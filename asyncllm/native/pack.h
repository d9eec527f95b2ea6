// How weights get from a file's rows into the order that products read.
#pragma once

#include "matrix.h"

// How rows come from a file: a type of ggml's, or plain numbers of 16 bits.
enum Stored : int32_t { PLAIN_BFLOAT16 = 0, Q4_0 = 1, Q4_1 = 2, Q8_0 = 3, PLAIN_FLOAT16 = 4 };

inline Kind kind_of(int stored) {
    constexpr Kind KINDS[] = {BFLOAT16, FOUR_BIT, FOUR_BIT, EIGHT_BIT, FLOAT16};
    return KINDS[stored];
}

inline uint16_t times_minus_eight(uint16_t float16) {
    const float value = _cvtsh_ss(float16);
    return (uint16_t)_cvtss_sh(-8.0f * value, _MM_FROUND_TO_NEAREST_INT);
}

// Writes a block's 16 vectors of words to `to` in 12 bits each, and returns what their exponents are less by; 0 where they
// do not fit.
inline int narrow(const uint16_t (*vectors)[2 * GROUP], uint8_t *to) {
    constexpr int STEPS = 15;       // of exponents that fit into four bits beside zero
    constexpr int MOST_LESS = 191;  // sums are multiplied with 2^(less - 64), a float
    const uint16_t *values = vectors[0];
    int most = 0;
    for (int i = 0; i < BLOCK * GROUP; ++i) most = std::max(most, values[i] & ~SIGN);
    const int less = std::max(1, (most >> FRACTION_BITS) - STEPS), least = (less + 1) << FRACTION_BITS;
    bool fits = less <= MOST_LESS;
    for (int i = 0; i < BLOCK * GROUP; ++i) {
        const int magnitude = values[i] & ~SIGN;
        fits &= magnitude == 0 || magnitude >= least;
    }
    if (!fits) return 0;
    const auto small = [&](int vector, int i) {
        const int value = vectors[vector][i];
        return value & ~SIGN ? value - (less << FRACTION_BITS) : value;
    };
    for (int vector = 0; vector < BLOCK / 2; vector += 4) {
        uint16_t three[3][2 * GROUP];
        for (int i = 0; i < 2 * GROUP; ++i) {
            const int bits = small(vector + 3, i);
            const int parts[] = {bits >> 12 | (bits & 7), bits >> 7 & 15, bits >> 3 & 15};
            for (int j = 0; j < 3; ++j) three[j][i] = (uint16_t)(small(vector + j, i) | parts[j] << 11);
        }
        std::memcpy(to, three, sizeof three);
        to += sizeof three;
    }
    return less;
}

// Fills one group of a matrix [n, k] of bfloat16, and returns where it ends.
inline uint8_t *pack_bfloat16_group(const uint8_t *rows, int n, int k, int g, uint8_t *to) {
    uint8_t *less = to;
    to += less_bytes(k);
    const int num_lanes = std::min(GROUP, n - g * GROUP);
    for (int b = 0; b < k / BLOCK; ++b) {
        uint16_t vectors[BLOCK / 2][2 * GROUP] = {};
        for (int lane = 0; lane < num_lanes; ++lane) {
            const uint8_t *from = rows + 2 * ((size_t)(g * GROUP + lane) * k + b * BLOCK);
            for (int i = 0; i < BLOCK / 2; ++i) std::memcpy(vectors[i] + 2 * lane, from + 4 * i, 4);
        }
        less[b] = (uint8_t)narrow(vectors, to);
        if (!less[b]) std::memcpy(to, vectors, sizeof vectors);
        to += less[b] ? NARROW_BYTES : BLOCK_BYTES[BFLOAT16];
    }
    return to;
}

// Fills one group of a matrix [n, k] of float16. Outputs behind the last are zero.
inline void pack_float16_group(const uint8_t *rows, int n, int k, int g, uint8_t *to) {
    const int num_lanes = std::min(GROUP, n - g * GROUP);
    uint16_t *halves = (uint16_t *)to;
    std::memset(to, 0, (size_t)k * GROUP * sizeof(uint16_t));
    for (int lane = 0; lane < num_lanes; ++lane) {
        const uint8_t *from = rows + sizeof(uint16_t) * (size_t)(g * GROUP + lane) * k;
        for (int i = 0; i < k; ++i) std::memcpy(halves + i * GROUP + lane, from + sizeof(uint16_t) * i, sizeof(uint16_t));
    }
}

// Fills one group of a matrix [n, k] from rows in blocks as stored, one behind the other. Outputs behind the last are zero.
inline void pack_group(int stored, const uint8_t *rows, int n, int k, int g, uint8_t *to) {
    constexpr int STORED_BYTES[] = {64, 18, 20, 34};  // of 32 inputs
    constexpr uint32_t LOW = 0x0f0f0f0f;
    const size_t row_bytes = (size_t)(k / BLOCK) * STORED_BYTES[stored];
    const Kind kind = kind_of(stored);
    const int num_lanes = std::min(GROUP, n - g * GROUP);
    for (int b = 0; b < k / BLOCK; ++b, to += BLOCK_BYTES[kind]) {
        std::memset(to, 0, BLOCK_BYTES[kind]);
        for (int lane = 0; lane < num_lanes; ++lane) {
            const uint8_t *from = rows + (size_t)(g * GROUP + lane) * row_bytes + (size_t)b * STORED_BYTES[stored];
            uint16_t scale;
            std::memcpy(&scale, from, 2);
            if (stored == Q8_0) {
                ((float *)to)[lane] = _cvtsh_ss(scale);
                for (int i = 0; i < BLOCK; i += 4) std::memcpy(to + 64 + 64 * (i / 4) + 4 * lane, from + 2 + i, 4);
            } else {
                uint16_t offset = times_minus_eight(scale);
                if (stored == Q4_1) std::memcpy(&offset, from + 2, 2);
                ((uint16_t *)to)[lane] = scale;
                ((uint16_t *)to)[GROUP + lane] = offset;
                uint32_t halves[4];  // inputs i and i + 16 in byte i
                std::memcpy(halves, from + (stored == Q4_1 ? 4 : 2), sizeof halves);
                for (int half = 0; half < 2; ++half) {
                    const uint32_t x = halves[2 * half], y = halves[2 * half + 1];
                    const uint32_t low = (x & LOW) | (y & LOW) << 4, high = (x & ~LOW) >> 4 | (y & ~LOW);
                    std::memcpy(to + 64 + 64 * half + 4 * lane, &low, 4);
                    std::memcpy(to + 64 + 64 * (half + 2) + 4 * lane, &high, 4);
                }
            }
        }
    }
}
