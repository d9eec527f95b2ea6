// A mixture of experts: which of them computes which of a step's tokens. See layers/experts.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "buffers.h"

// Rows that meet the same weights.
struct RowBlock {
    int row, num_rows, expert;
};

class Mixture {
  public:
    Mixture(int num_layers, int num_experts, int per_token, bool normed)
        : num_experts_(num_experts), per_token_(per_token), normed_(normed), blocks_(num_layers) {}

    // Makes room for a step's tokens; returns how many rows they make at most.
    int begin(int num_tokens) {
        const int num_places = num_tokens * per_token_;
        logits_.of((size_t)num_tokens * num_experts_);
        chosen_.resize(num_places), weights_.resize(num_places), rows_.resize(num_places);
        return num_places + std::min(num_experts_, num_places) * (SIDE_ROWS - 1);
    }

    int per_token() const { return per_token_; }
    float *logits() const { return logits_.data(); }                               // of the router, [tokens, experts]
    float weight(int token, int i) const { return weights_[token * per_token_ + i]; }
    int row(int token, int i) const { return rows_[token * per_token_ + i]; }      // of all that experts compute
    const std::vector<RowBlock> &blocks(int layer) const { return blocks_[layer]; }

    // A token's best experts and their weights: the softmax over all, made to add up to 1 if the model wants that.
    void choose(int token) {
        float *shares = logits() + (size_t)token * num_experts_;
        const float most = *std::max_element(shares, shares + num_experts_);
        float total = 0;
        for (int e = 0; e < num_experts_; ++e) total += shares[e] = std::exp(shares[e] - most);
        int *chosen = chosen_.data() + token * per_token_;
        float *weights = weights_.data() + token * per_token_;
        float of_chosen = 0;
        for (int i = 0; i < per_token_; ++i) {
            chosen[i] = (int)(std::max_element(shares, shares + num_experts_) - shares);
            weights[i] = shares[chosen[i]];
            of_chosen += weights[i];
            shares[chosen[i]] = -1.0f;
        }
        for (int i = 0; i < per_token_; ++i) weights[i] /= normed_ ? of_chosen : total;
    }

    // Gives each expert's tokens rows one after the other, the first of them a multiple of SIDE_ROWS. Each layer's
    // blocks last until the step's end: a thread that comes late through a layer's phases must count the same pieces.
    void plan(int layer, int num_tokens, int most_rows_a_block) {
        std::vector<RowBlock> &blocks = blocks_[layer];
        counts_.assign(num_experts_, 0);
        for (int i = 0; i < num_tokens * per_token_; ++i) rows_[i] = counts_[chosen_[i]]++;
        blocks.clear();
        int first = 0;
        for (int e = 0; e < num_experts_; ++e) {
            const int count = counts_[e];
            for (int r = 0; r < count; r += most_rows_a_block) {
                blocks.push_back({first + r, std::min(most_rows_a_block, count - r), e});
            }
            counts_[e] = first;
            first += (count + SIDE_ROWS - 1) / SIDE_ROWS * SIDE_ROWS;
        }
        for (int i = 0; i < num_tokens * per_token_; ++i) rows_[i] += counts_[chosen_[i]];
    }

  private:
    int num_experts_, per_token_;
    bool normed_;
    Buffer<float> logits_;
    std::vector<int> chosen_, rows_, counts_;  // [tokens, per_token], [tokens, per_token], [experts]
    std::vector<float> weights_;               // [tokens, per_token]
    std::vector<std::vector<RowBlock>> blocks_;  // of layers
};
