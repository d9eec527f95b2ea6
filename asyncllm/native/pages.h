// Keys and values of a cache, in pages: 16 tokens of one KV head, D values for each, in the order that products read.
//
// A block of B tokens (B a multiple of 16) has B / 16 pages for each KV head; a layer's cache is [blocks, K, B / 16] of
// them, a page's keys before its values, so that reading runs on from one to the other. Two formats:
//
//   Bfloat16Pages  keys    [D / 2][16 tokens][2]                          16 scores at once, a pair of dimensions by turns
//                  values  [8 pairs of tokens][D][2]                      16 dimensions at once, a pair of tokens by turns
//   Int8Pages      keys    [D / 32][16] float32, [D / 4][16 tokens][4]    scales of a token's 32 dimensions, then quants
//                  values  [16] float32, [4 fours of tokens][D][4]        scales of the tokens, then quants
//
// Queries meet 8-bit keys as int8 with a scale per 32 dimensions; the weights of 8-bit values, each times its value's scale,
// have 8 bits (14 in two parts without VNNI, where 7 would be too few), in steps of a chunk's largest.
#pragma once

#include <cfloat>

#include "matrix.h"

constexpr int PAGE = 16;    // tokens
constexpr int CHUNK = 128;  // keys between two updates of the running maximum

// Queries of one KV head that are attended together: some heads of some successive tokens of one sequence.
struct Tile {
    static constexpr int MAX_ROWS = 8;
    Rows queries;              // of all tokens, scaled; by log2(e) too unless there is a soft cap
    size_t places[MAX_ROWS];   // where the D inputs of each query begin in them,
    size_t blocks[MAX_ROWS];   // and the place of the first block of them
    int ends[MAX_ROWS];        // keys before this place are seen,
    int starts[MAX_ROWS];      // and not before this one
    float *outputs[MAX_ROWS];  // [D]
};

struct Bfloat16Pages {
    static constexpr Kind QUERIES = KEYS;

    static size_t key_bytes(int head_dim) { return 2 * (size_t)PAGE * head_dim; }
    static size_t value_bytes(int head_dim) { return 2 * (size_t)PAGE * head_dim; }

    // Stores one token's key in the page's keys; x are floats, `slot` is its place in the page.
    static void store_key(uint8_t *keys, const float *x, int slot, int head_dim) {
        for (int i = 0; i < head_dim; i += GROUP) {
            uint16_t rounded[GROUP];
            simd::store_bfloat16(rounded, simd::load(x + i));
            for (int j = 0; j < GROUP; j += 2) std::memcpy(keys + 2 * ((size_t)(i + j) * PAGE + slot * 2), rounded + j, 4);
        }
    }

    static void store_value(uint8_t *values, const float *x, int slot, int head_dim) {
        for (int i = 0; i < head_dim; i += GROUP) {
            uint16_t rounded[GROUP];
            simd::store_bfloat16(rounded, simd::load(x + i));
            uint8_t *to = values + 4 * ((size_t)(slot / 2) * head_dim + i) + slot % 2 * 2;
            for (int j = 0; j < GROUP; ++j) std::memcpy(to + 4 * j, rounded + j, 2);
        }
    }

    template <int R> static constexpr int PAGES_AT_ONCE = R <= 3 ? 4 : 2;

    // Scores of the keys of P pages, R queries: [R][CHUNK] from `scores` on.
    template <int R, int P>
    static void score(const Tile &tile, const uint8_t *const *keys, int head_dim, float *scores) {
        using namespace simd;
        Floats sums[P][R], others[P][R];
        for (int p = 0; p < P; ++p) for (int r = 0; r < R; ++r) sums[p][r] = others[p][r] = zero();
        for (int i = 0; i < head_dim; i += 2) {
            for (int p = 0; p < P; ++p) {
                const Pairs pairs = pairs_of(load_bytes(keys[p] + 2 * (size_t)i * PAGE));
                for (int r = 0; r < R; ++r) {
                    add_products(sums[p][r], others[p][r], pairs, tile.queries.for_keys + tile.places[r] + i);
                }
            }
        }
        for (int p = 0; p < P; ++p) for (int r = 0; r < R; ++r) store(scores + r * CHUNK + p * PAGE, add(sums[p][r], others[p][r]));
    }

    // outputs = outputs * shrink + the values of `num_keys` keys by their weights, [R][CHUNK], which may be overwritten.
    template <int R>
    static void add_values(const Tile &tile, const uint8_t *const *values, int num_keys, int head_dim, float *weights,
                           const float *shrink) {
        using namespace simd;
        alignas(64) Value rounded[R * CHUNK];
        for (int r = 0; r < R; ++r) {
            for (int key = 0; key < num_keys; key += LANES) {
                store_values(rounded + r * CHUNK + key, load(weights + r * CHUNK + key));
            }
        }
        constexpr int WIDTH = R <= 2 ? 4 : 2;  // independent sums: enough to hide what a product waits for
        for (int d = 0; d < head_dim; d += WIDTH * LANES) {
            const int width = std::min(WIDTH, (head_dim - d) / LANES);
            Floats sums[WIDTH][R];
            for (auto &column : sums) for (Floats &s : column) s = zero();
            const auto add_pair = [&](int key, auto &&pairs_at) {
                const uint8_t *from = values[key / PAGE] + 4 * ((size_t)(key % PAGE / 2) * head_dim + d);
                for (int c = 0; c < WIDTH; ++c) {
                    if (c >= width) break;
                    const Pairs pairs = pairs_of(pairs_at(from + 4 * LANES * c));
                    for (int r = 0; r < R; ++r) {
                        sums[c][r] = dot_pairs(sums[c][r], pairs, rounded + r * CHUNK + key);
                    }
                }
            };
            for (int key = 0; key + 1 < num_keys; key += 2) add_pair(key, load_bytes);
            // Behind the last key lies what another sequence left: a weight of 0 would not undo its NaN.
            if (num_keys % 2) add_pair(num_keys - 1, load_first_of_pairs);
            for (int c = 0; c < width; ++c) {
                for (int r = 0; r < R; ++r) {
                    float *out = tile.outputs[r] + d + c * LANES;
                    store(out, fma(load(out), all(shrink[r]), sums[c][r]));
                }
            }
        }
    }
};

struct Int8Pages {
    static constexpr Kind QUERIES = EIGHT_BIT;

    static size_t key_scale_bytes(int head_dim) { return (size_t)head_dim / BLOCK * PAGE * sizeof(float); }
    static constexpr size_t VALUE_SCALE_BYTES = PAGE * sizeof(float);
    static size_t key_bytes(int head_dim) { return key_scale_bytes(head_dim) + (size_t)PAGE * head_dim; }
    static size_t value_bytes(int head_dim) { return VALUE_SCALE_BYTES + (size_t)PAGE * head_dim; }

    // 16 values in steps of `scale`, as bytes.
    static void quantize(const float *x, float scale, int8_t *to) {
        simd::store_bytes(to, simd::rounded(simd::mul(simd::load(x), simd::all(scale > 0 ? 1 / scale : 0.0f))));
    }

    static float scale_of(const float *x, int n) {
        simd::Floats most = simd::zero();
        for (int i = 0; i < n; i += GROUP) most = simd::max(most, simd::abs(simd::load(x + i)));
        return simd::largest(most) / 127.0f;
    }

    static void store_key(uint8_t *keys, const float *x, int slot, int head_dim) {
        uint8_t *quants = keys + key_scale_bytes(head_dim) + 4 * slot;
        for (int i = 0; i < head_dim; i += BLOCK) {
            const float scale = scale_of(x + i, BLOCK);
            std::memcpy(keys + sizeof(float) * (i / BLOCK * PAGE + slot), &scale, sizeof scale);
            int8_t of_block[BLOCK];
            for (int j = 0; j < BLOCK; j += GROUP) quantize(x + i + j, scale, of_block + j);
            for (int j = 0; j < BLOCK; j += 4) std::memcpy(quants + (size_t)(i + j) * PAGE, of_block + j, 4);
        }
    }

    static void store_value(uint8_t *values, const float *x, int slot, int head_dim) {
        const float scale = scale_of(x, head_dim);
        std::memcpy(values + sizeof(float) * slot, &scale, sizeof scale);
        uint8_t *quants = values + VALUE_SCALE_BYTES + (size_t)(slot / 4) * 4 * head_dim + slot % 4;
        for (int i = 0; i < head_dim; i += GROUP) {
            int8_t of_group[GROUP];
            quantize(x + i, scale, of_group);
            for (int j = 0; j < GROUP; ++j) quants[4 * (size_t)(i + j)] = (uint8_t)of_group[j];
        }
    }

    template <int R> static constexpr int PAGES_AT_ONCE = R <= 4 ? 2 : 1;

    template <int R, int P>
    static void score(const Tile &tile, const uint8_t *const *keys, int head_dim, float *scores) {
        using namespace simd;
        Floats sums[P][R];
        for (auto &page : sums) for (Floats &s : page) s = zero();
        const size_t scale_bytes = key_scale_bytes(head_dim);
        for (int i = 0; i < head_dim; i += BLOCK) {
            Ints products[P][R];
            for (auto &page : products) {
                for (int r = 0; r < R; ++r) page[r] = ints(tile.queries.starts[tile.blocks[r] + i / BLOCK * SIDE_ROWS]);
            }
            for (int j = i; j < i + BLOCK; j += 4) {
                for (int p = 0; p < P; ++p) {
                    const Bytes quants = load_signed(keys[p] + scale_bytes + (size_t)j * PAGE);
                    for (int r = 0; r < R; ++r) {
                        const int32_t inputs = quad_at(tile.queries.quants + tile.places[r] + j);
                        products[p][r] = dot_signed(products[p][r], quants, inputs);
                    }
                }
            }
            for (int p = 0; p < P; ++p) {
                const Floats key_scales = load((const float *)keys[p] + i / BLOCK * PAGE);
                for (int r = 0; r < R; ++r) {
                    const Floats both = mul(key_scales, all(tile.queries.scales[tile.blocks[r] + i / BLOCK * SIDE_ROWS]));
                    sums[p][r] = fma(both, to_floats(products[p][r]), sums[p][r]);
                }
            }
        }
        for (int p = 0; p < P; ++p) for (int r = 0; r < R; ++r) store(scores + r * CHUNK + p * PAGE, sums[p][r]);
    }

    template <int R>
    static void add_values(const Tile &tile, const uint8_t *const *values, int num_keys, int head_dim, float *weights,
                           const float *shrink) {
        using namespace simd;
        constexpr float MOST = (1 << UNSIGNED_BITS * UNSIGNED_PARTS) - 1;
        const int num_pages = (num_keys + PAGE - 1) / PAGE;
        alignas(64) int8_t parts[UNSIGNED_PARTS][R * CHUNK];  // the highest bits first
        float steps[R];
        for (int r = 0; r < R; ++r) {
            Floats tops = zero();
            for (int p = 0; p < num_pages; ++p) {
                float *at = weights + r * CHUNK + p * PAGE;
                // Behind the last key the scales may be anything: of NaN and 0, `max` takes the second.
                const Floats weight = max(mul(load(at), load((const float *)values[p])), zero());
                store(at, weight);
                tops = max(tops, weight);
            }
            const float most = largest(tops);
            const bool counts = most > 1e-30f;  // far below what a sum in float32 would notice
            steps[r] = counts ? most / MOST : 0.0f;
            for (int p = 0; p < num_pages; ++p) {
                const int at = r * CHUNK + p * PAGE;
                Ints bits = rounded(mul(load(weights + at), all(counts ? MOST / most : 0.0f)));
                for (int part = UNSIGNED_PARTS - 1; part > 0; --part) {
                    store_bytes(parts[part] + at, bits_of(bits, ints((1 << UNSIGNED_BITS) - 1)));
                    bits = shifted_right(bits, UNSIGNED_BITS);
                }
                store_bytes(parts[0] + at, bits);
            }
        }
        constexpr int WIDTH = R <= 4 ? 4 : 2;
        for (int d = 0; d < head_dim; d += WIDTH * LANES) {
            const int width = std::min(WIDTH, (head_dim - d) / LANES);
            Ints sums[WIDTH][R];
            for (auto &column : sums) for (Ints &s : column) s = ints(0);
            for (int part = 0; part < UNSIGNED_PARTS; ++part) {
                if (part > 0) {
                    for (auto &column : sums) for (Ints &s : column) s = shifted_left(s, UNSIGNED_BITS);
                }
                for (int key = 0; key < num_pages * PAGE; key += 4) {
                    const uint8_t *from = values[key / PAGE] + VALUE_SCALE_BYTES + (size_t)(key % PAGE) * head_dim + 4 * d;
                    for (int c = 0; c < WIDTH; ++c) {
                        if (c >= width) break;
                        const Ints quants = load_bytes(from + 4 * LANES * c);
                        for (int r = 0; r < R; ++r) {
                            sums[c][r] = dot_unsigned(sums[c][r], quad_at(parts[part] + r * CHUNK + key), quants);
                        }
                    }
                }
            }
            for (int c = 0; c < width; ++c) {
                for (int r = 0; r < R; ++r) {
                    float *out = tile.outputs[r] + d + c * LANES;
                    store(out, fma(to_floats(sums[c][r]), all(steps[r]), mul(load(out), all(shrink[r]))));
                }
            }
        }
    }
};
