// A pre-norm decoder's step on a CPU, in one call: the same facts as models/decoder.py, without an operation's dispatch.
//
// Python owns all memory that outlives a step; here are only buffers that grow with the largest step. The residual stream
// and all results of products are float32.
#include <mutex>
#include <vector>

#include "adapters.h"
#include "argmax.h"
#include "attention.h"
#include "buffers.h"
#include "experts.h"
#include "pack.h"
#include "pointwise.h"
#include "products.h"
#include "team.h"

namespace {

constexpr int ROW_BLOCK = 64;          // rows that meet a group of weights while it is in the first cache
constexpr int PIECES_A_THREAD = 8;     // enough for a thread that is held up to be relieved
constexpr int MAX_ITEMS_A_PIECE = 16;  // tokens, or tiles of queries
constexpr int PHASES_A_LAYER = 15;     // at most

// Kinds of phases, whose times are told apart.
enum Part { BEGIN, NORMS, PRODUCTS, ROTATION, ATTENTION, MLP, HEAD, NUM_PARTS };

class Decoder {
  public:
    Decoder(const Model &model, int num_threads)
        : model_(model), layers_(model.layers, model.layers + model.num_layers), team_(num_threads),
          changes_(model.adapter_width, model.most_adapter_parts),
          mixture_(model.num_layers, num_experts(), model.num_experts_per_token, model.norm_expert_weights) {
        shape_ = {model.num_heads, model.num_kv_heads, model.head_dim, model.block_size};
        const int widest_inputs = std::max({4 * model.hidden_size, widest(), model.intermediate_size});
        scratch_bytes_ = (size_t)widest_inputs / BLOCK * BLOCK_BYTES[BFLOAT16];
        scratch_.of(team_.num_threads() * scratch_bytes_);
    }

    void forward(const Step &step) {
        const int n = step.num_tokens, d = model_.head_dim;
        residual_.of((size_t)n * model_.hidden_size);
        branch_.of((size_t)n * model_.hidden_size);
        qkv_.of((size_t)n * num_qkv());
        queries_.of(n, model_.num_heads * d);
        angles_.of((size_t)model_.num_rotations * n * d);
        rows_.of(n, widest());
        const int most_mlp_rows = std::max(n, num_experts() ? mixture_.begin(n) : 0);
        wide_rows_.of(most_mlp_rows, model_.intermediate_size);
        if (num_experts()) {
            expert_rows_.of(most_mlp_rows, model_.hidden_size);
            expert_outputs_.of((size_t)most_mlp_rows * model_.hidden_size);
        }
        place_tokens(step);
        plan_tiles(step);
        if (!is_all_wanted(step)) plan_last_tiles(step);
        run(PHASES_A_LAYER * model_.num_layers + 4, [&](Walk &walk) {
            if (model_.cache_kind == INT8_PAGES) walk_through<Int8Pages>(step, walk);
            else walk_through<Bfloat16Pages>(step, walk);
        });
    }

    void logits(const float *hidden, int num_rows, float *to) {
        const Matrix &head = model_.head;
        rows_.of(num_rows, widest());
        run(2, [&](Walk &walk) {
            const Rows rows = rows_.of(num_rows, widest());
            prepare_for_head(walk, rows, hidden, num_rows);
            product(walk, HEAD, head, rows, num_rows, to, head.n);
        });
    }

    // Where each row's logits are largest, without ever writing them down.
    void likeliest(const float *hidden, int num_rows, int64_t *to) {
        rows_.of(num_rows, widest());
        bests_.assign(num_rows, Best());
        run(2, [&](Walk &walk) {
            const Rows rows = rows_.of(num_rows, widest());
            prepare_for_head(walk, rows, hidden, num_rows);
            find_bests(walk, rows, num_rows);
        });
        for (int r = 0; r < num_rows; ++r) to[r] = bests_[r].place;
    }

    int64_t spent[NUM_PARTS] = {};  // nanoseconds of the caller's, by part

  private:
    struct Token {
        int64_t id, position, block;  // the block of the cache that has its keys
    };

    struct TilePlace {
        int row, token;       // of the step, and its first
        int first, num_rows;  // the tile's first query: a token and a head of it, counted through
        int to;               // where results of the row's first token would go
    };

    // body(walk) on all threads of the team
    template <class Body> void run(int most_phases, Body &&body) {
        team_.run(most_phases, spent, [&](Walk &walk) {
            body(walk);
            tiles::release();
        });
    }

    int num_qkv() const { return (model_.num_heads + 2 * model_.num_kv_heads) * model_.head_dim; }
    int num_experts() const {
        int most = 0;
        for (const Layer &layer : layers_) most = std::max(most, layer.router.n);
        return most;
    }
    int widest() const { return std::max(model_.hidden_size, model_.num_heads * model_.head_dim); }

    const int64_t *blocks_of(const Step &step, int row) const {
        return step.block_table + step.slots[row] * step.num_columns;
    }

    void place_tokens(const Step &step) {
        tokens_.clear();
        changes_.begin(step.num_tokens);
        for (int row = 0; row < step.num_rows; ++row) {
            const int adapter = step.adapters ? (int)step.adapters[step.slots[row]] : 0;
            for (int64_t i = 0; i < step.query_lens[row]; ++i) {
                const int64_t id = row < step.num_decode_rows ? step.last_tokens[step.slots[row]]
                                                              : step.token_ids[tokens_.size() - step.num_decode_rows];
                const int64_t position = step.computed[row] + i;
                tokens_.push_back({id, position, blocks_of(step, row)[position / shape_.block_size]});
                changes_.add_token(adapter);
            }
        }
    }

    void plan_tiles(const Step &step) {
        tiles_.clear();
        for (int row = 0, token = 0; row < step.num_rows; token += (int)step.query_lens[row++]) {
            add_tiles(tiles_, row, token, 0, (int)step.query_lens[row], token);
        }
        // Prompts' last tiles have the most keys: a long piece must not come last.
        std::reverse(tiles_.begin(), tiles_.end());
    }

    // Tiles of those queries of the last layer whose tokens are wanted; their results lie side by side.
    void plan_last_tiles(const Step &step) {
        last_tiles_.clear();
        int64_t next = 0;
        for (int row = 0, token = 0; row < step.num_rows; token += (int)step.query_lens[row++]) {
            const int64_t end = token + step.query_lens[row];
            while (next < step.num_wanted && step.wanted[next] < end) {
                const int64_t begun = next++;
                while (next < step.num_wanted && step.wanted[next] < std::min(end, step.wanted[next - 1] + 2)) ++next;
                const int first = (int)step.wanted[begun] - token;
                add_tiles(last_tiles_, row, token, first, (int)(next - begun), (int)begun - first);
            }
        }
    }

    // The queries of a row's tokens that one KV head serves, in tiles: tokens one after the other, the heads of each side
    // by side.
    void add_tiles(std::vector<TilePlace> &tiles, int row, int token, int first, int num_tokens, int to) const {
        const int end = (first + num_tokens) * shape_.group();
        for (int query = first * shape_.group(); query < end; query += Tile::MAX_ROWS) {
            tiles.push_back({row, token, query, std::min(Tile::MAX_ROWS, end - query), to});
        }
    }

    // Whether the last layer's results are wanted of all tokens; an adapter's changes are counted by tokens.
    bool is_all_wanted(const Step &step) const { return !step.wanted || changes_.any(); }

    template <class Pages> void walk_through(const Step &step, Walk &walk) {
        const int hidden = model_.hidden_size;
        int n = step.num_tokens;
        const int64_t *tokens = nullptr;  // of rows; null: all of them, in order
        float *residual = residual_.of(0), *branch = branch_.of(0);
        const Rows rows = rows_.of(0, widest());
        each_item(walk, BEGIN, n, [&](int t) { begin_token(step, t, residual + (size_t)t * hidden); });
        const Norm *pending = nullptr;  // of the branch that is not yet added
        const auto add_and_norm = [&](bool has_branch, const Norm &next, auto &&use) {
            each_row(walk, NORMS, n, [&, has_branch](int t) {
                float *stream = residual + (tokens ? tokens[t] : t) * (size_t)hidden, *added = branch + (size_t)t * hidden;
                if (has_branch) {
                    if (pending->weight) apply_norm(*pending, added, added, hidden, model_.norm_eps);
                    for (int i = 0; i < hidden; i += GROUP) {
                        simd::store(stream + i, simd::add(simd::load(stream + i), simd::load(added + i)));
                    }
                }
                use(t, next, stream, added);
            });
        };
        const auto prepare_for = [&](const Matrix &matrix, int also) {  // a kind that something beside it reads rows as
            return [&, also](int t, const Norm &norm, const float *stream, float *scratch) {
                apply_norm(norm, stream, scratch, hidden, model_.norm_eps);
                prepare_row(rows, matrix.kind, hidden, t, scratch);
                if (also != matrix.kind) prepare_row(rows, also, hidden, t, scratch);
            };
        };
        for (int l = 0; l < model_.num_layers; ++l) {
            const Layer &layer = layers_[l];
            add_and_norm(l > 0, layer.before_attention, prepare_for(layer.qkv, kind_beside(layer.qkv)));
            product(walk, PRODUCTS, layer.qkv, rows, n, qkv_.of(0), num_qkv());
            const Cache<Pages> cache{(uint8_t *)step.caches[l], shape_};
            each_row(walk, ROTATION, n, [&](int t) { store_token(step, layer, cache, t); });
            const bool is_for_few = l + 1 == model_.num_layers && !is_all_wanted(step);
            const std::vector<TilePlace> &tiles = is_for_few ? last_tiles_ : tiles_;
            each_item(walk, ATTENTION, (int)tiles.size() * shape_.num_kv_heads, [&](int i) {
                attend_tile(step, layer, cache, rows, tiles[i / shape_.num_kv_heads], i % shape_.num_kv_heads);
            });
            if (is_for_few) tokens = step.wanted, n = (int)step.num_wanted;
            product(walk, PRODUCTS, layer.out, rows, n, branch, hidden);
            pending = &layer.after_attention;
            const Matrix &up = layer.mlps[0].up;
            add_and_norm(true, layer.before_mlp, prepare_for(up, layer.router.n ? layer.router.kind : kind_beside(up)));
            if (layer.router.n) mix_experts(walk, l, rows, n, branch);
            else compute_mlp(walk, layer.mlps[0], rows, n, branch);
            pending = &layer.after_mlp;
        }
        add_and_norm(true, model_.last_norm, [&](int t, const Norm &norm, const float *stream, float *) {
            apply_norm(norm, stream, step.hidden + (tokens ? tokens[t] : t) * (size_t)hidden, hidden, model_.norm_eps);
        });
    }

    // The embedding of a token, and the cosines and sines of its position.
    void begin_token(const Step &step, int t, float *residual) {
        const int hidden = model_.hidden_size, half = model_.head_dim / 2;
        const int64_t position = tokens_[t].position;
        read_row(model_.embedding, (int)tokens_[t].id, residual);
        for (int i = 0; i < hidden; ++i) residual[i] *= model_.embedding_scale;
        if (const float *learned = model_.position_embedding) {
            for (int i = 0; i < hidden; ++i) residual[i] += learned[(size_t)position * hidden + i];
        }
        for (int k = 0; k < model_.num_rotations; ++k) {
            float *cos = angles_of(k, t, step.num_tokens);
            for (int i = 0; i < half; ++i) {
                const float angle = (float)position * model_.frequencies[k * half + i];
                const float amplitude = model_.amplitudes[k * half + i];
                cos[i] = std::cos(angle) * amplitude;
                cos[half + i] = std::sin(angle) * amplitude;
            }
        }
    }

    float *angles_of(int rotation, int t, int num_tokens) {
        return angles_.of(0) + ((size_t)rotation * num_tokens + t) * model_.head_dim;
    }

    // Norms and turns a token's queries and keys; stores its keys and values.
    template <class Pages> void store_token(const Step &step, const Layer &layer, const Cache<Pages> &cache, int t) {
        const int d = model_.head_dim, num_heads = model_.num_heads, num_kv_heads = model_.num_kv_heads;
        float *x = qkv_.of(0) + (size_t)t * num_qkv();
        const float *cos = angles_of(layer.rotation, t, step.num_tokens), *sin = cos + d / 2;
        const simd::Floats scale = simd::all(layer.soft_cap > 0 ? layer.scale : layer.scale * simd::LOG2E);
        const Rows queries = queries_.of(0, num_heads * d);
        for (int h = 0; h < num_heads + num_kv_heads; ++h) {
            float *head = x + (size_t)h * d;
            const float *weight = h < num_heads ? layer.q_norm : layer.k_norm;
            if (weight) norm_head(head, weight, d, model_.norm_eps);
            rotate_head(head, cos, sin, d);
            if (h >= num_heads) continue;
            for (int i = 0; i < d; i += BLOCK) {
                const simd::Floats first = simd::mul(simd::load(head + i), scale);
                const simd::Floats second = simd::mul(simd::load(head + i + GROUP), scale);
                prepare_block(queries, Pages::QUERIES, num_heads * d, t, h * d + i, first, second);
            }
        }
        const int offset = (int)(tokens_[t].position % shape_.block_size);
        for (int h = 0; h < num_kv_heads; ++h) {
            uint8_t *keys = cache.page(tokens_[t].block, h, offset);
            Pages::store_key(keys, x + (size_t)(num_heads + h) * d, offset % PAGE, d);
            Pages::store_value(keys + Pages::key_bytes(d), x + (size_t)(num_heads + num_kv_heads + h) * d, offset % PAGE, d);
        }
    }

    // Attends, and leaves the result as the output projection wants it.
    template <class Pages>
    void attend_tile(const Step &step, const Layer &layer, const Cache<Pages> &cache, const Rows &rows,
                     const TilePlace &place, int kv_head) {
        const int d = model_.head_dim, group = shape_.group();
        const int before = (int)step.computed[place.row];
        alignas(64) float outputs[Tile::MAX_ROWS * MAX_HEAD_DIM];
        Tile tile;
        tile.queries = queries_.of(0, model_.num_heads * d);
        for (int r = 0; r < place.num_rows; ++r) {
            const int query = place.first + r, t = query / group, head = kv_head * group + query % group;
            tile.places[r] = ((size_t)(place.token + t) * model_.num_heads + head) * d;
            tile.blocks[r] = block_place(place.token + t, model_.num_heads * d / BLOCK, head * d / BLOCK);
            tile.ends[r] = before + t + 1;
            tile.starts[r] = layer.window ? std::max(0, tile.ends[r] - layer.window) : 0;
            tile.outputs[r] = outputs + r * d;
        }
        attend(tile, place.num_rows, cache, blocks_of(step, place.row), kv_head, layer.soft_cap);
        const int width = model_.num_heads * d;
        for (int r = 0; r < place.num_rows; ++r) {
            const int query = place.first + r, row = place.to + query / group, head = kv_head * group + query % group;
            for (int i = 0; i < d; i += BLOCK) {
                const float *x = tile.outputs[r] + i;
                prepare_for(layer.out, rows, width, row, head * d + i, simd::load(x), simd::load(x + GROUP));
            }
        }
    }

    // body(i) for each of n items, some to a piece.
    template <class Body> void each_item(Walk &walk, Part part, int n, Body &&body) {
        const int some = std::clamp(n / (PIECES_A_THREAD * team_.num_threads()), 1, MAX_ITEMS_A_PIECE);
        walk.each(part, (n + some - 1) / some, [&](int piece) {
            for (int i = piece * some; i < std::min(n, (piece + 1) * some); ++i) body(i);
        });
    }

    // body(row) for each of n rows that are made ready. Of eight rows, what their blocks have lies side by side: two threads
    // would write to the same lines of their caches, unless there are enough rows for each to take eight at a time.
    template <class Body> void each_row(Walk &walk, Part part, int n, Body &&body) {
        if (n < 2 * SIDE_ROWS * team_.num_threads()) return each_item(walk, part, n, body);
        walk.each(part, (n + SIDE_ROWS - 1) / SIDE_ROWS, [&](int piece) {
            for (int row = piece * SIDE_ROWS; row < std::min(n, (piece + 1) * SIDE_ROWS); ++row) body(row);
        });
    }

    // Pieces of a product of blocks of rows and a number of units of outputs: body(block, first unit, last unit + 1).
    template <class Body> void each_piece(Walk &walk, Part part, int num_blocks, int num_units, Body &&body) {
        const int wanted = std::max(1, PIECES_A_THREAD * team_.num_threads() / std::max(1, num_blocks));
        const int units = std::max(1, num_units / wanted), columns = (num_units + units - 1) / units;
        walk.each(part, num_blocks * columns, [&](int i) {
            const int unit = i / num_blocks * units;
            body(i % num_blocks, unit, std::min(unit + units, num_units));
        });
    }

    // The same of n rows: body(first row, rows, first unit, last unit + 1).
    template <class Body> void each_piece_of_rows(Walk &walk, Part part, int n, int num_units, Body &&body) {
        each_piece(walk, part, (n + ROW_BLOCK - 1) / ROW_BLOCK, num_units, [&](int block, int begin, int end) {
            body(block * ROW_BLOCK, std::min(ROW_BLOCK, n - block * ROW_BLOCK), begin, end);
        });
    }

    // A thread's memory for a widened group of any matrix, or for four of `up`.
    uint8_t *scratch_of(const Walk &walk) { return scratch_.of(0) + walk.thread() * scratch_bytes_; }

    // What a matrix's adapters read rows as; without any, what it does.
    static int kind_beside(const Matrix &matrix) { return matrix.adapters ? BFLOAT16 : matrix.kind; }

    // 32 values of a row, as a product with a matrix wants them, and its adapters.
    static void prepare_for(const Matrix &matrix, const Rows &rows, int k, int row, int at, simd::Floats first, simd::Floats second) {
        prepare_block(rows, matrix.kind, k, row, at, first, second);
        const int also = kind_beside(matrix);
        if (also != matrix.kind) prepare_block(rows, also, k, row, at, first, second);
    }

    // What is added to products of rows with a group of weights.
    void add_rest(const Matrix &matrix, int row, int num_rows, int g, float *out, int stride) const {
        add_bias(matrix, num_rows, g, out, stride);
        changes_.add(matrix, row, num_rows, g, out, stride);
    }

    // What adapters change needs this before a product with a matrix.
    void begin_changes(Walk &walk, Part part, const Matrix &matrix, const Rows &rows) {
        const int num_pieces = changes_.num_pieces(matrix);
        if (num_pieces) each_item(walk, part, num_pieces, [&](int i) { changes_.narrow(matrix, rows, i); });
    }

    // to [n, width] = rows · matrix
    void product(Walk &walk, Part part, const Matrix &matrix, const Rows &rows, int n, float *to, int width) {
        begin_changes(walk, part, matrix, rows);
        each_piece_of_rows(walk, part, n, matrix.num_groups(), [&](int row, int num_rows, int begin, int end) {
            multiply_groups(walk, matrix, rows, row, num_rows, begin, end, to, width);
        });
    }

    void multiply_groups(Walk &walk, const Matrix &matrix, const Rows &rows, int row, int num_rows, int begin, int end, float *to,
                         int width) {
        uint8_t *scratch = scratch_of(walk);
        const int most = rows_at_once(matrix.kind);
        for (int g = begin; g < end; ++g) {
            const Group weights = group_for(matrix, g, num_rows, scratch);
            const bool whole = (g + 1) * GROUP <= matrix.n;
            for (int r = 0; r < num_rows; r += most) {
                const int some = std::min(most, num_rows - r);
                float *at = to + (size_t)(row + r) * width + g * GROUP;
                if (whole) {
                    multiply(weights, rows, row + r, some, at, width);
                } else {
                    float results[ROWS_AT_ONCE * GROUP];
                    multiply(weights, rows, row + r, some, results, GROUP);
                    const size_t num_bytes = sizeof(float) * (matrix.n - g * GROUP);
                    for (int i = 0; i < some; ++i) std::memcpy(at + (size_t)i * width, results + i * GROUP, num_bytes);
                }
                add_rest(matrix, row + r, some, g, at, width);
            }
        }
    }

    void prepare_for_head(Walk &walk, const Rows &rows, const float *hidden, int num_rows) {
        const Matrix &head = model_.head;
        each_item(walk, HEAD, num_rows, [&](int r) {
            prepare_row(rows, head.kind, head.k, r, hidden + (size_t)r * head.k);
        });
    }

    void find_bests(Walk &walk, const Rows &rows, int n) {
        const Matrix &head = model_.head;
        each_piece_of_rows(walk, HEAD, n, head.num_groups(), [&](int row, int num_rows, int begin, int end) {
            alignas(64) float values[ROW_BLOCK * GROUP], groups[ROW_BLOCK * GROUP], results[ROWS_AT_ONCE * GROUP];
            std::fill_n(values, num_rows * GROUP, -INFINITY);
            std::fill_n(groups, num_rows * GROUP, 0.0f);
            uint8_t *scratch = scratch_of(walk);
            const int most = rows_at_once(head.kind);
            for (int g = begin; g < end; ++g) {
                const Group weights = group_for(head, g, num_rows, scratch);
                for (int r = 0; r < num_rows; r += most) {
                    const int some = std::min(most, num_rows - r);
                    multiply(weights, rows, row + r, some, results, GROUP);
                    add_bias(head, some, g, results, GROUP);
                    for (int i = 0; i < some; ++i) {
                        float *best = values + (r + i) * GROUP, *its_group = groups + (r + i) * GROUP;
                        const simd::Floats none = simd::all(-INFINITY), y = simd::load(results + i * GROUP);
                        const simd::Floats x = simd::first_lanes(y, none, std::min(head.n - g * GROUP, GROUP));
                        const simd::Floats before = simd::load(best);
                        simd::store(its_group, simd::where_greater(x, before, simd::all((float)g), simd::load(its_group)));
                        simd::store(best, simd::where_greater(x, before, x, before));
                    }
                }
            }
            const std::lock_guard guard(bests_lock_);
            for (int i = 0; i < num_rows * GROUP; ++i) {
                bests_[row + i / GROUP].offer(values[i], (int64_t)groups[i] * GROUP + i % GROUP);
            }
        });
    }

    // to [n, hidden] = the MLP of rows
    void compute_mlp(Walk &walk, const FeedForward &mlp, const Rows &rows, int n, float *to) {
        const Rows wide = wide_rows_.of(0, mlp.down.k);
        begin_changes(walk, MLP, mlp.up, rows);
        each_piece_of_rows(walk, MLP, n, mlp.down.k / BLOCK, [&](int row, int num_rows, int begin, int end) {
            activate_blocks(walk, mlp, rows, wide, row, num_rows, begin, end);
        });
        product(walk, MLP, mlp.down, wide, n, to, model_.hidden_size);
    }

    // to [n, hidden] = what the best experts make of each row, weighed
    void mix_experts(Walk &walk, int l, const Rows &rows, int n, float *to) {
        const Layer &layer = layers_[l];
        const int hidden = model_.hidden_size, each = mixture_.per_token();
        const FeedForward &first = layer.mlps[0];
        const Rows gathered = expert_rows_.of(0, hidden), wide = wide_rows_.of(0, first.down.k);
        product(walk, MLP, layer.router, rows, n, mixture_.logits(), layer.router.n);
        each_item(walk, MLP, n, [&](int t) { mixture_.choose(t); });
        walk.each(MLP, 1, [&](int) { mixture_.plan(l, n, ROW_BLOCK); });
        each_item(walk, MLP, n * each, [&](int i) {
            copy_row(rows, i / each, gathered, mixture_.row(i / each, i % each), first.up.kind, hidden);
        });
        const std::vector<RowBlock> &blocks = mixture_.blocks(l);
        each_piece(walk, MLP, (int)blocks.size(), first.down.k / BLOCK, [&](int i, int begin, int end) {
            activate_blocks(walk, layer.mlps[blocks[i].expert], gathered, wide, blocks[i].row, blocks[i].num_rows, begin, end);
        });
        float *outputs = expert_outputs_.data();
        each_piece(walk, MLP, (int)blocks.size(), first.down.num_groups(), [&](int i, int begin, int end) {
            const Matrix &down = layer.mlps[blocks[i].expert].down;
            multiply_groups(walk, down, wide, blocks[i].row, blocks[i].num_rows, begin, end, outputs, hidden);
        });
        each_item(walk, MLP, n, [&](int t) {
            float *sum = to + (size_t)t * hidden;
            std::fill_n(sum, hidden, 0.0f);
            for (int i = 0; i < each; ++i) {
                const float *one = outputs + (size_t)mixture_.row(t, i) * hidden;
                const simd::Floats weight = simd::all(mixture_.weight(t, i));
                for (int at = 0; at < hidden; at += GROUP) {
                    simd::store(sum + at, simd::fma(weight, simd::load(one + at), simd::load(sum + at)));
                }
            }
        });
    }

    // to = act(rows · gate) * (rows · up), or act(rows · up), as the MLP's `down` wants it; blocks [begin, end) of it.
    void activate_blocks(Walk &walk, const FeedForward &mlp, const Rows &rows, const Rows &to, int row, int num_rows, int begin,
                         int end) {
        const int inner = mlp.down.k, up_groups = inner / GROUP, most = rows_at_once(mlp.up.kind);
        alignas(64) float gate[ROWS_AT_ONCE * BLOCK], up[ROWS_AT_ONCE * BLOCK];
        const size_t group_bytes = (size_t)mlp.up.k / BLOCK * BLOCK_BYTES[BFLOAT16];
        uint8_t *scratch = scratch_of(walk);
        for (int block = begin; block < end; ++block) {
            Group gates[2], ups[2];
            for (int half = 0; half < 2; ++half) {
                const int g = 2 * block + half;
                gates[half] = group_for(mlp.up, g, num_rows, scratch + half * group_bytes);
                if (model_.is_gated) ups[half] = group_for(mlp.up, up_groups + g, num_rows, scratch + (2 + half) * group_bytes);
            }
            for (int r = 0; r < num_rows; r += most) {
                const int some = std::min(most, num_rows - r);
                for (int half = 0; half < 2; ++half) {
                    const int g = 2 * block + half;
                    multiply(gates[half], rows, row + r, some, gate + half * GROUP, BLOCK);
                    add_rest(mlp.up, row + r, some, g, gate + half * GROUP, BLOCK);
                    if (!model_.is_gated) continue;
                    multiply(ups[half], rows, row + r, some, up + half * GROUP, BLOCK);
                    add_rest(mlp.up, row + r, some, up_groups + g, up + half * GROUP, BLOCK);
                }
                for (int i = 0; i < some; ++i) {
                    simd::Floats y[2];
                    for (int half = 0; half < 2; ++half) {
                        y[half] = activate(model_.activation, simd::load(gate + i * BLOCK + half * GROUP));
                        if (model_.is_gated) y[half] = simd::mul(y[half], simd::load(up + i * BLOCK + half * GROUP));
                    }
                    prepare_for(mlp.down, to, inner, row + r + i, block * BLOCK, y[0], y[1]);
                }
            }
        }
    }

    static constexpr int MAX_HEAD_DIM = 512;

    Model model_;
    std::vector<Layer> layers_;
    HeadShape shape_;
    Team team_;
    std::vector<Token> tokens_;
    std::vector<TilePlace> tiles_, last_tiles_;
    std::vector<Best> bests_;  // of rows
    std::mutex bests_lock_;
    Changes changes_;
    Mixture mixture_;
    Buffer<float> residual_, branch_, qkv_, angles_, expert_outputs_;
    Buffer<uint8_t> scratch_;
    size_t scratch_bytes_;  // of each thread
    RowBuffers rows_, wide_rows_, queries_, expert_rows_;
};

// What a caller in Python can make of an exception.
template <class Body> int guarded(Body &&body) noexcept {
    try {
        body();
        return 0;
    } catch (...) {
        return 1;
    }
}

}  // namespace

extern "C" {

// A digest of the sources this was built from, by which Python knows whether the structures are those it mirrors.
const char *asyncllm_sources() { return ASYNCLLM_SOURCES; }

// Whether the system lets this process use what this was built for.
int asyncllm_permitted() { return tiles::permitted(); }

void *asyncllm_decoder_new(const Model *model, int num_threads) {
    void *decoder = nullptr;
    guarded([&] { decoder = new Decoder(*model, num_threads); });
    return decoder;
}

void asyncllm_decoder_delete(void *decoder) { delete static_cast<Decoder *>(decoder); }

int asyncllm_decoder_forward(void *decoder, const Step *step) {
    return guarded([&] { static_cast<Decoder *>(decoder)->forward(*step); });
}

int asyncllm_decoder_logits(void *decoder, const float *hidden, int num_rows, float *logits) {
    return guarded([&] { static_cast<Decoder *>(decoder)->logits(hidden, num_rows, logits); });
}

int asyncllm_decoder_likeliest(void *decoder, const float *hidden, int num_rows, int64_t *places) {
    return guarded([&] { static_cast<Decoder *>(decoder)->likeliest(hidden, num_rows, places); });
}

// Nanoseconds that all calls so far took, by part, in the order of `Part`.
void asyncllm_decoder_spent(void *decoder, int64_t *to) {
    std::memcpy(to, static_cast<Decoder *>(decoder)->spent, sizeof(int64_t) * NUM_PARTS);
}

// Where each of num_rows rows of `width` floats is largest.
void asyncllm_argmax(const float *rows, int num_rows, int width, int64_t *to) {
    for (int r = 0; r < num_rows; ++r) to[r] = argmax(rows + (size_t)r * width, width);
}

// Bytes of a page of a cache: 16 tokens of one KV head.
int64_t asyncllm_page_bytes(int cache_kind, int head_dim) {
    return (int64_t)(cache_kind == INT8_PAGES ? Cache<Int8Pages>::page_bytes(head_dim)
                                              : Cache<Bfloat16Pages>::page_bytes(head_dim));
}

// Bytes that `asyncllm_pack` writes at most for a matrix of a kind.
int64_t asyncllm_packed_bytes(int kind, int n, int k) {
    const size_t group_bytes = (kind == BFLOAT16 ? less_bytes(k) : 0) + (size_t)(k / BLOCK) * BLOCK_BYTES[kind];
    return (int64_t)((n + GROUP - 1) / GROUP) * (int64_t)group_bytes;
}

// Packs a matrix and returns how many bytes that took; of bfloat16 also where each group begins.
int64_t asyncllm_pack(int stored, const uint8_t *rows, int n, int k, uint8_t *to, int64_t *offsets) {
    const uint8_t *begin = to;
    const size_t group_bytes = (size_t)(k / BLOCK) * BLOCK_BYTES[kind_of(stored)];
    for (int g = 0; g * GROUP < n; ++g) {
        if (stored == PLAIN_BFLOAT16) {
            offsets[g] = to - begin;
            to = pack_bfloat16_group(rows, n, k, g, to);
            continue;
        }
        if (stored == PLAIN_FLOAT16) pack_float16_group(rows, n, k, g, to);
        else pack_group(stored, rows, n, k, g, to);
        to += group_bytes;
    }
    return to - begin;
}

}  // extern "C"
