// Attention over paged keys and values, and what precedes it: norms of heads, rotation, storing.
//
// A page is the B tokens (B a multiple of 16) of a block for one KV head: D values for each of them, in bfloat16, in the
// order in which products of pairs read them:
//
//   keys    [B / 16][D / 2][16 tokens][2]   16 scores at once, a pair of dimensions after the other
//   values  [B / 2][D][2 tokens]            16 dimensions at once, a pair of tokens after the other
//
// A layer's cache is [blocks, K heads, 2] of them, keys before values, so that reading runs on from one to the other.
// Keys are taken in chunks at fixed places of the sequence, so a query's result depends neither on which others share
// its step nor on how its prompt was cut.
#pragma once

#include <cfloat>

#include "matrix.h"

constexpr int CHUNK = 128;  // keys between two updates of the running maximum
constexpr int PAGE = 16;    // keys scored at once

struct HeadShape {
    int num_heads, num_kv_heads, head_dim, block_size;

    int group() const { return num_heads / num_kv_heads; }
    size_t page_values() const { return (size_t)block_size * head_dim; }
    // Where a head's keys of a block begin in a layer's cache; its values follow them.
    size_t place(int64_t block, int kv_head) const { return ((size_t)block * num_kv_heads + kv_head) * 2 * page_values(); }
};

// x / sqrt(mean(x²) + eps) * weight over one head, in place.
inline void norm_head(float *x, const float *weight, int head_dim, float eps) {
    using namespace simd;
    Floats squares = zero();
    for (int i = 0; i < head_dim; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    const Floats factor = all(1.0f / std::sqrt(sum(squares) / (float)head_dim + eps));
    for (int i = 0; i < head_dim; i += LANES) store(x + i, mul(mul(load(x + i), factor), load(weight + i)));
}

// Turns each dimension with the one half a head further; cos, sin [D / 2].
inline void rotate_head(float *x, const float *cos, const float *sin, int head_dim) {
    using namespace simd;
    const int half = head_dim / 2;
    for (int i = 0; i < half; i += LANES) {
        const Floats first = load(x + i), second = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, sub(mul(first, c), mul(second, s)));
        store(x + half + i, fma(second, c, mul(first, s)));
    }
}

// Stores one token's key and value of one head in its page; x are floats, `slot` is its place in the page.
inline void store_key(uint16_t *page, const float *x, int slot, int head_dim) {
    uint16_t *to = page + (size_t)(slot / PAGE) * PAGE * head_dim + slot % PAGE * 2;
    for (int i = 0; i < head_dim; i += PAGE) {
        uint16_t rounded[PAGE];
        simd::store_bfloat16(rounded, simd::load(x + i));
        for (int j = 0; j < PAGE; j += 2) std::memcpy(to + (size_t)(i + j) * PAGE, rounded + j, 4);
    }
}

inline void store_value(uint16_t *page, const float *x, int slot, int head_dim) {
    uint16_t *to = page + (size_t)(slot / 2) * 2 * head_dim + slot % 2;
    for (int i = 0; i < head_dim; i += PAGE) {
        uint16_t rounded[PAGE];
        simd::store_bfloat16(rounded, simd::load(x + i));
        for (int j = 0; j < PAGE; ++j) to[(size_t)(i + j) * 2] = rounded[j];
    }
}

// Queries of one KV head that are attended together: some heads of some successive tokens of one sequence.
struct Tile {
    static constexpr int MAX_ROWS = 8;
    const uint16_t *queries[MAX_ROWS];  // [D] bfloat16, scaled; by log2(e) too unless there is a soft cap
    int ends[MAX_ROWS];                 // keys before this place are seen,
    int starts[MAX_ROWS];               // and not before this one
    float *outputs[MAX_ROWS];           // [D]
};

// Scores of P pages of 16 keys, R queries: [R][CHUNK] from `scores` on.
template <int R, int P>
inline void score_pages(const Tile &tile, const uint16_t *const *pages, int head_dim, float *scores) {
    using namespace simd;
    Floats sums[P][R];
    for (auto &page : sums) for (Floats &s : page) s = zero();
    for (int i = 0; i < head_dim; i += 2) {
        for (int p = 0; p < P; ++p) {
            const Ints keys = load_bytes(pages[p] + (size_t)i * PAGE);
            for (int r = 0; r < R; ++r) sums[p][r] = dot_bfloat16(sums[p][r], keys, pair_at(tile.queries[r] + i));
        }
    }
    for (int p = 0; p < P; ++p) for (int r = 0; r < R; ++r) store(scores + r * CHUNK + p * PAGE, sums[p][r]);
}

// Turns scores of keys [begin, begin + width) into weights, bfloat16, and what sums so far are to be multiplied by.
inline float weigh(float *scores, uint16_t *weights, int begin, int width, int start, int end, float soft_cap, float &most,
                   float &total) {
    using namespace simd;
    Floats tops = all(-FLT_MAX);
    for (int i = 0; i < width; i += LANES) {
        Floats s = load(scores + i);
        if (soft_cap > 0) {  // c · tanh(s / c) = c · (1 - 2 / (e^(2s / c) + 1))
            const Floats e = exp2(min(mul(s, all(2 * LOG2E / soft_cap)), all(100.0f)));
            s = mul(sub(all(1), div(all(2), add(e, all(1)))), all(soft_cap * LOG2E));
        }
        const Floats hidden = all(-FLT_MAX);
        s = first_lanes(s, hidden, std::clamp(end - begin - i, 0, LANES));
        if (start > begin + i) s = first_lanes(hidden, s, std::min(start - begin - i, LANES));
        store(scores + i, s);
        tops = max(tops, s);
    }
    const float before = most;
    most = std::max(before, largest(tops));
    if (most == -FLT_MAX) {  // nothing seen yet
        std::memset(weights, 0, 2 * (size_t)width);
        return 0.0f;
    }
    Floats sums = zero();
    for (int i = 0; i < width; i += LANES) {
        const Floats weight = exp2(max(sub(load(scores + i), all(most)), all(-1000.0f)));
        sums = add(sums, weight);
        store_bfloat16(weights + i, weight);
    }
    const float shrink = before == -FLT_MAX ? 0.0f : std::exp2(before - most);
    total = total * shrink + sum(sums);
    return shrink;
}

// Adds weighted values of `num_keys` keys: R queries, 16 dimensions at a time.
template <int R>
inline void add_values(const Tile &tile, const uint16_t *const *pages, int num_keys, int head_dim, const uint16_t *weights,
                       const float *shrink) {
    using namespace simd;
    constexpr int WIDTH = R <= 2 ? 4 : 2;  // independent sums: enough to hide what a product waits for
    for (int d = 0; d < head_dim; d += WIDTH * LANES) {
        const int width = std::min(WIDTH, (head_dim - d) / LANES);
        Floats sums[WIDTH][R];
        for (auto &column : sums) for (Floats &s : column) s = zero();
        const auto add_pair = [&](int key, auto &&pairs_at) {
            const uint16_t *values = pages[key / PAGE] + (size_t)(key % PAGE) * head_dim + 2 * d;
            for (int c = 0; c < WIDTH; ++c) {
                if (c >= width) break;
                const Ints pairs = pairs_at(values + 2 * LANES * c);
                for (int r = 0; r < R; ++r) sums[c][r] = dot_bfloat16(sums[c][r], pairs, pair_at(weights + r * CHUNK + key));
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

// softmax(queries · keys) · values over the pages of a block table.
template <int R>
inline void attend_rows(const Tile &tile, const HeadShape &shape, const uint16_t *cache, const int64_t *table, int kv_head,
                        float soft_cap) {
    using namespace simd;
    alignas(64) float scores[R * CHUNK];
    alignas(64) uint16_t weights[R * CHUNK];
    float most[R], total[R], shrink[R];
    int first = tile.starts[0], last = 0;
    for (int r = 0; r < R; ++r) {
        most[r] = -FLT_MAX, total[r] = 0;
        first = std::min(first, tile.starts[r]), last = std::max(last, tile.ends[r]);
        std::memset(tile.outputs[r], 0, sizeof(float) * shape.head_dim);
    }
    const size_t part = (size_t)PAGE * shape.head_dim;
    for (int begin = first / CHUNK * CHUNK; begin < last; begin += CHUNK) {
        const int num_pages = std::min(CHUNK, last - begin + PAGE - 1) / PAGE;
        const uint16_t *keys[CHUNK / PAGE], *values[CHUNK / PAGE];
        for (int p = 0; p < num_pages; ++p) {
            const int key = begin + p * PAGE;
            keys[p] = cache + shape.place(table[key / shape.block_size], kv_head) + key % shape.block_size / PAGE * part;
            values[p] = keys[p] + shape.page_values();
        }
        constexpr int P = R <= 3 ? 4 : 2;
        int p = 0;
        for (; p + P <= num_pages; p += P) score_pages<R, P>(tile, keys + p, shape.head_dim, scores + p * PAGE);
        for (; p < num_pages; ++p) score_pages<R, 1>(tile, keys + p, shape.head_dim, scores + p * PAGE);
        for (int r = 0; r < R; ++r) {
            shrink[r] = weigh(scores + r * CHUNK, weights + r * CHUNK, begin, num_pages * PAGE, tile.starts[r], tile.ends[r],
                              soft_cap, most[r], total[r]);
        }
        add_values<R>(tile, values, std::min(CHUNK, last - begin), shape.head_dim, weights, shrink);
    }
    for (int r = 0; r < R; ++r) {
        const Floats factor = all(1.0f / total[r]);
        for (int i = 0; i < shape.head_dim; i += LANES) store(tile.outputs[r] + i, mul(load(tile.outputs[r] + i), factor));
    }
}

inline void attend(const Tile &tile, int num_rows, const HeadShape &shape, const uint16_t *cache, const int64_t *table,
                   int kv_head, float soft_cap) {
    const auto rows = [&]<int R>() { attend_rows<R>(tile, shape, cache, table, kv_head, soft_cap); };
    switch (num_rows) {
    case 1: return rows.template operator()<1>();
    case 2: return rows.template operator()<2>();
    case 3: return rows.template operator()<3>();
    case 4: return rows.template operator()<4>();
    case 5: return rows.template operator()<5>();
    case 6: return rows.template operator()<6>();
    case 7: return rows.template operator()<7>();
    default: return rows.template operator()<8>();
    }
}
