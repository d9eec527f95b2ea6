// Tile registers (AMX): one instruction adds the products of 16 rows and 16 outputs, 64 bytes of inputs each, to their sums.
//
// Of the eight, by number: 0 to 3 hold sums, [rows][16] int32 or float32; 4 and 5 rows of inputs; 6 and 7 weights, as int8
// [inputs / 4][16 outputs][4] or as bfloat16 [inputs / 2][16 outputs][2]. A call that asks for other sizes than the one
// before it empties them all. With ASYNCLLM_EMULATED_TILES memory stands in for the registers, so that all that is built on
// them is tested on processors without.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AMX_TILE__)

#include <sys/syscall.h>
#include <unistd.h>

namespace tiles {

constexpr int ROWS = 16, ROW_BYTES = 64, NUM_TILES = 8;
enum Number { SUMS = 0, INPUTS = 4, WEIGHTS = 6 };

// As the processor reads it.
struct alignas(64) Sizes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a tile's rows
    uint8_t rows[16] = {};

    Sizes(int num_rows, int input_bytes) {
        for (int tile = 0; tile < NUM_TILES; ++tile) {
            bytes[tile] = (uint16_t)(tile == INPUTS || tile == INPUTS + 1 ? input_bytes : ROW_BYTES);
            rows[tile] = (uint8_t)(tile < WEIGHTS ? num_rows : input_bytes / 4);
        }
    }
};
static_assert(sizeof(Sizes) == 64);

struct State {  // of a thread
    int num_rows = 0, input_bytes = 0;
};
inline thread_local State state;

#if defined(ASYNCLLM_EMULATED_TILES)

inline bool permitted() { return true; }

inline thread_local Sizes sizes(0, 0);
alignas(64) inline thread_local uint8_t memory[NUM_TILES][ROWS][ROW_BYTES];

inline void set(const Sizes &to) { sizes = to, std::memset(memory, 0, sizeof memory); }
inline void unset() { set(Sizes(0, 0)); }
template <int T> inline void zero() { std::memset(memory[T], 0, sizeof memory[T]); }
template <int T> inline void load(const void *from, size_t stride) {
    zero<T>();
    for (int r = 0; r < sizes.rows[T]; ++r) std::memcpy(memory[T][r], (const uint8_t *)from + r * stride, sizes.bytes[T]);
}
template <int T> inline void store(void *to, size_t stride) {
    for (int r = 0; r < sizes.rows[T]; ++r) std::memcpy((uint8_t *)to + r * stride, memory[T][r], sizes.bytes[T]);
}

// add(a row's inputs, how many times four bytes those are, its sums) for each row
template <int S, int I, class Sum, class Add> inline void add_products(Add &&add) {
    constexpr int OUTPUTS = ROW_BYTES / sizeof(Sum);
    for (int r = 0; r < sizes.rows[S]; ++r) {
        Sum sums[OUTPUTS];
        std::memcpy(sums, memory[S][r], ROW_BYTES);
        add(memory[I][r], sizes.bytes[I] / 4, sums);
        std::memcpy(memory[S][r], sums, ROW_BYTES);
    }
}
template <class Weight, int S, int I, int W> inline void add_bytes() {
    add_products<S, I, int32_t>([](const uint8_t *inputs, int num_quads, int32_t *sums) {
        for (int quad = 0; quad < num_quads; ++quad) {
            for (int i = 0; i < ROW_BYTES; ++i) sums[i / 4] += (int8_t)inputs[4 * quad + i % 4] * (Weight)memory[W][quad][i];
        }
    });
}
template <int S, int I, int W> inline void add_signed() { add_bytes<int8_t, S, I, W>(); }
template <int S, int I, int W> inline void add_unsigned() { add_bytes<uint8_t, S, I, W>(); }

inline float from_bfloat16(const uint8_t *pair, int i) {  // denormals are 0
    uint32_t both, bits;
    std::memcpy(&both, pair, sizeof both);
    bits = i ? both & 0xffff0000 : both << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return bits & 0x7f800000 ? value : 0.0f;
}
template <int S, int I, int W> inline void add_bfloat16() {
    add_products<S, I, float>([](const uint8_t *inputs, int num_pairs, float *sums) {
        float products[ROW_BYTES / 4] = {};
        for (int pair = 0; pair < num_pairs; ++pair) {
            for (int i = 0; i < 2; ++i) {
                const float input = from_bfloat16(inputs + 4 * pair, i);
                for (int output = 0; output < ROW_BYTES / 4; ++output) {
                    const float weight = from_bfloat16(memory[W][pair] + 4 * output, i);
                    products[output] = __builtin_fmaf(input, weight, products[output]);
                }
            }
        }
        for (int output = 0; output < ROW_BYTES / 4; ++output) sums[output] += products[output];
    });
}

#else

// Linux wants to be asked once, as the tiles make what it keeps of a thread 8 KiB larger.
inline bool permitted() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

inline void set(const Sizes &to) { asm volatile("ldtilecfg %0" : : "m"(to)); }
inline void unset() { asm volatile("tilerelease"); }
template <int T> inline void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T> inline void load(const void *from, size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T> inline void store(void *to, size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}
template <int S, int I, int W> inline void add_signed() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(S), "i"(I), "i"(W));
}
template <int S, int I, int W> inline void add_unsigned() {  // weights are
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(S), "i"(I), "i"(W));
}
template <int S, int I, int W> inline void add_bfloat16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(S), "i"(I), "i"(W));
}

#endif

// For sums of num_rows rows with input_bytes of inputs at a time.
inline void configure(int num_rows, int input_bytes) {
    if (state.num_rows == num_rows && state.input_bytes == input_bytes) return;
    set(Sizes(num_rows, input_bytes));
    state = {num_rows, input_bytes};
}

// Lets go of them, or the system would keep them from here on whenever another thread gets the core.
inline void release() {
    if (!state.num_rows) return;
    unset();
    state = {};
}

}  // namespace tiles

#else

namespace tiles {

inline bool permitted() { return true; }
inline void release() {}

}  // namespace tiles

#endif
