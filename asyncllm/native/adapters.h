// Low-rank adapters: what is added to a product for the tokens that have one. See layers/lora.py.
//
// x · down is worked out once for all of a matrix's outputs; of each part of them it lies in a plane of its own.
#pragma once

#include <vector>

#include "buffers.h"
#include "products.h"

class Changes {
  public:
    // All adapters are of one width; most_parts: that one has for a matrix.
    Changes(int width, int most_parts) : width_(width), most_parts_(most_parts) {}

    // Begins a step whose tokens follow one by one.
    void begin(int num_tokens) {
        num_tokens_ = num_tokens;
        adapters_.clear();
        runs_.clear();
        narrow_.of((size_t)most_parts_ * num_tokens * input_stride(width_));
    }

    void add_token(int adapter) {  // from 1; 0 = none
        const int token = (int)adapters_.size();
        adapters_.push_back(adapter);
        if (!adapter) return;
        if (!runs_.empty()) {
            Run &last = runs_.back();
            if (last.adapter == adapter && last.token + last.num_tokens == token && last.num_tokens < ROWS_AT_ONCE) {
                ++last.num_tokens;
                return;
            }
        }
        runs_.push_back({token, 1, adapter});
    }

    bool any() const { return !runs_.empty(); }

    // Pieces of work before a product with a matrix, for `narrow`. None where the step changes nothing of it.
    int num_pieces(const Matrix &matrix) const { return matrix.adapters ? (int)runs_.size() * blocks_a_run() : 0; }

    // 32 outputs of `down` for a few tokens; rows must have been prepared in bfloat16.
    void narrow(const Matrix &matrix, const Rows &rows, int piece) {
        const Run &run = runs_[piece / blocks_a_run()];
        const Matrix &down = matrix.adapters[run.adapter - 1].down;
        const int at = piece % blocks_a_run() * BLOCK;
        if (at >= down.n) return;
        alignas(64) float results[ROWS_AT_ONCE * BLOCK];
        for (int half = 0; half < 2; ++half) {
            const Group weights = {down.kind, down.k, down.group(at / GROUP + half)};
            multiply(weights, rows, run.token, run.num_tokens, results + half * GROUP, BLOCK);
        }
        for (int r = 0; r < run.num_tokens; ++r) {
            const float *x = results + r * BLOCK;
            const simd::Floats first = simd::load(x), second = simd::load(x + GROUP);
            prepare_block(plane(at / width_), BFLOAT16, width_, run.token + r, at % width_, first, second);
        }
    }

    // Adds to a group of outputs of a product what the tokens' adapters change.
    void add(const Matrix &matrix, int token, int num_tokens, int g, float *out, int stride) const {
        if (!matrix.adapters || !any()) return;
        for (int r = 0, end; r < num_tokens; r = end) {
            const int adapter = adapters_[token + r];
            for (end = r + 1; end < num_tokens && adapters_[token + end] == adapter;) ++end;
            if (adapter) add(matrix.adapters[adapter - 1], token + r, end - r, g, out + (size_t)r * stride, stride);
        }
    }

  private:
    struct Run {  // tokens one after the other with the same adapter
        int token, num_tokens, adapter;
    };

    int blocks_a_run() const { return most_parts_ * width_ / BLOCK; }

    Rows plane(int part) const {
        Rows rows = {};
        rows.values = narrow_.data() + (size_t)part * num_tokens_ * input_stride(width_);
        return rows;
    }

    void add(const Adapter &adapter, int token, int num_tokens, int g, float *out, int stride) const {
        for (int p = 0; p < adapter.num_parts; ++p) {
            const AdapterPart &part = adapter.parts[p];
            if (g < part.begin || g >= part.end) continue;
            alignas(64) float results[ROWS_AT_ONCE * GROUP];
            const Group weights = {part.up.kind, part.up.k, part.up.group(g - part.begin)};
            multiply(weights, plane(p), token, num_tokens, results, GROUP);
            for (int r = 0; r < num_tokens; ++r) {
                float *to = out + (size_t)r * stride;
                simd::store(to, simd::add(simd::load(to), simd::load(results + r * GROUP)));
            }
        }
    }

    int width_, most_parts_, num_tokens_ = 0;
    std::vector<int> adapters_;  // of tokens
    std::vector<Run> runs_;
    Buffer<simd::Input> narrow_;  // [parts, tokens, width]
};
