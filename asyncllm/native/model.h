// What Python hands over: a model and its weights, and the rows of a step. Mirrored field by field in library.py.
#pragma once

#include "matrix.h"

enum CacheKind : int32_t { BFLOAT16_PAGES = 0, INT8_PAGES = 1 };

enum Activation : int32_t { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3 };

struct Norm {
    const float *weight;  // [k]; null: no norm
    const float *bias;    // [k]: a layer norm; null: a root-mean-square norm
};

struct FeedForward {
    Matrix up, down;  // `up`: gate above up, where it is gated
};

struct Layer {
    Norm before_attention, after_attention, before_mlp, after_mlp;
    const float *q_norm, *k_norm;  // [D], or null
    Matrix qkv, out;
    const FeedForward *mlps;       // one, or [num_experts]
    Matrix router;                 // BFLOAT16 or FLOAT16, [num_experts, hidden]; without outputs where there are no experts
    float scale, soft_cap;
    int32_t window, rotation;      // keys seen, 0 for all; which of the rotations
};

struct Model {
    int32_t hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, block_size;
    int32_t activation, is_gated, num_rotations, cache_kind;
    int32_t num_experts_per_token, norm_expert_weights;  // whether those of a token are to add up to 1
    int32_t adapter_width, most_adapter_parts;           // a multiple of 32; 0 without adapters
    float norm_eps, embedding_scale;
    const Layer *layers;
    Norm last_norm;
    Matrix embedding, head;
    const float *position_embedding;  // [max_position, hidden], or null
    const float *frequencies;         // [num_rotations, D / 2], of an angle per position
    const float *amplitudes;          // [num_rotations, D / 2]
};

// S rows of query tokens that follow each other in a sequence, N in all. Rows that decode come first: they have one each,
// the last of their slot.
struct Step {
    int32_t num_rows, num_decode_rows, num_tokens;
    const int64_t *slots, *computed, *query_lens;  // [S]; computed: tokens whose keys are in the cache before the step
    const int64_t *last_tokens;                    // [L], by slot; not read where no row decodes
    const int64_t *adapters;                       // [L], by slot, from 1; 0 = none. Null: no row has one
    const int64_t *token_ids;                      // of all other rows
    const int64_t *block_table;                    // [L, columns], by slot
    int64_t num_columns;
    const uint64_t *caches;  // [layers]: addresses of pages, see pages.h
    const int64_t *wanted;   // [num_wanted], ascending: tokens of which rows of `hidden` are written. Null: of all
    int64_t num_wanted;
    float *hidden;           // [N, hidden]
};
