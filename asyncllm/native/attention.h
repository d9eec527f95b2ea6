// Attention over paged keys and values, and what precedes it: norms of heads and rotation.
//
// Keys are taken in chunks at fixed places of the sequence, so a query's result depends neither on which others share its
// step nor on how its prompt was cut.
#pragma once

#include "pages.h"

struct HeadShape {
    int num_heads, num_kv_heads, head_dim, block_size;

    int group() const { return num_heads / num_kv_heads; }
};

// One layer's cache.
template <class Pages> struct Cache {
    uint8_t *memory;
    HeadShape shape;

    static size_t page_bytes(int head_dim) { return Pages::key_bytes(head_dim) + Pages::value_bytes(head_dim); }

    // The keys of the page that has a block's token; its values follow them.
    uint8_t *page(int64_t block, int kv_head, int token) const {
        const size_t pages = (size_t)shape.block_size / PAGE;
        return memory + (((size_t)block * shape.num_kv_heads + kv_head) * pages + token / PAGE) * page_bytes(shape.head_dim);
    }
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

// Turns scores of keys [begin, begin + width) into weights, in place; returns what sums so far are to be multiplied by.
inline float weigh(float *scores, int begin, int width, int start, int end, float soft_cap, float &most, float &total) {
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
        std::memset(scores, 0, sizeof(float) * (size_t)width);
        return 0.0f;
    }
    Floats sums = zero();
    for (int i = 0; i < width; i += LANES) {
        const Floats weight = exp2(max(sub(load(scores + i), all(most)), all(-1000.0f)));
        sums = add(sums, weight);
        store(scores + i, weight);
    }
    const float shrink = before == -FLT_MAX ? 0.0f : std::exp2(before - most);
    total = total * shrink + sum(sums);
    return shrink;
}

// softmax(queries · keys) · values over the pages of a block table.
template <int R, class Pages>
inline void attend_rows(const Tile &tile, const Cache<Pages> &cache, const int64_t *table, int kv_head, float soft_cap) {
    using namespace simd;
    const int head_dim = cache.shape.head_dim, block_size = cache.shape.block_size;
    alignas(64) float scores[R * CHUNK];
    float most[R], total[R], shrink[R];
    int first = tile.starts[0], last = 0;
    for (int r = 0; r < R; ++r) {
        most[r] = -FLT_MAX, total[r] = 0;
        first = std::min(first, tile.starts[r]), last = std::max(last, tile.ends[r]);
        std::memset(tile.outputs[r], 0, sizeof(float) * head_dim);
    }
    for (int begin = first / CHUNK * CHUNK; begin < last; begin += CHUNK) {
        const int num_pages = std::min(CHUNK, last - begin + PAGE - 1) / PAGE;
        const uint8_t *keys[CHUNK / PAGE], *values[CHUNK / PAGE];
        for (int p = 0; p < num_pages; ++p) {
            const int key = begin + p * PAGE;
            keys[p] = cache.page(table[key / block_size], kv_head, key % block_size);
            values[p] = keys[p] + Pages::key_bytes(head_dim);
        }
        constexpr int P = Pages::template PAGES_AT_ONCE<R>;
        int p = 0;
        for (; p + P <= num_pages; p += P) Pages::template score<R, P>(tile, keys + p, head_dim, scores + p * PAGE);
        for (; p < num_pages; ++p) Pages::template score<R, 1>(tile, keys + p, head_dim, scores + p * PAGE);
        for (int r = 0; r < R; ++r) {
            shrink[r] = weigh(scores + r * CHUNK, begin, num_pages * PAGE, tile.starts[r], tile.ends[r], soft_cap, most[r],
                              total[r]);
        }
        Pages::template add_values<R>(tile, values, std::min(CHUNK, last - begin), head_dim, scores, shrink);
    }
    for (int r = 0; r < R; ++r) {
        const Floats factor = all(1.0f / total[r]);
        for (int i = 0; i < head_dim; i += LANES) store(tile.outputs[r] + i, mul(load(tile.outputs[r] + i), factor));
    }
}

template <class Pages>
inline void attend(const Tile &tile, int num_rows, const Cache<Pages> &cache, const int64_t *table, int kv_head,
                   float soft_cap) {
    simd::with_count<Tile::MAX_ROWS>(num_rows, [&]<int R>() { attend_rows<R>(tile, cache, table, kv_head, soft_cap); });
}
