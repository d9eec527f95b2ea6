// Vectors of 16 lanes, and the few operations that the kernels are written in: once for AVX-512, once for AVX2.
//
// A `Floats` is one register with AVX-512 and two with AVX2. The instructions for products of bytes (VNNI) and of
// bfloat16 are used where the compiler is told they are there, and spelled out elsewhere.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace simd {

constexpr int LANES = 16;
constexpr float LOG2E = 1.44269504f;

#if defined(__AVX512F__)

constexpr int SUMS = 8;  // rows multiplied at once: as many as registers hold sums of

using Floats = __m512;
using Ints = __m512i;  // 16 int32 or 64 bytes

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Floats load(const float *from) { return _mm512_loadu_ps(from); }
inline void store(float *to, Floats a) { _mm512_storeu_ps(to, a); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats abs(Floats a) { return _mm512_abs_ps(a); }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a); }
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Ints rounded(Floats a) { return _mm512_cvtps_epi32(a); }
inline int32_t sum(Ints a) { return _mm512_reduce_add_epi32(a); }
inline void store_bytes(void *to, Ints a) { _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(a)); }  // lowest of each
inline Floats load_float16(const uint16_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }

// 2^x. Of x's fraction the Taylor series of 2^f = e^(f ln 2), |f| <= 1/2: off by 2e-7 at most.
inline Floats exp2(Floats x) {
    const Floats whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Floats f = sub(x, whole);
    Floats y = fma(all(1.5403530e-4f), f, all(1.3333558e-3f));
    y = fma(fma(fma(fma(fma(y, f, all(9.6181291e-3f)), f, all(5.5504109e-2f)), f, all(0.24022651f)), f, all(0.69314718f)),
            f, all(1.0f));
    return _mm512_scalef_ps(y, whole);
}

// Lanes before `end` of `a`, `other` elsewhere; first_lanes(a, other, 16) is a.
inline Floats first_lanes(Floats a, Floats other, int end) {
    return _mm512_mask_blend_ps((__mmask16)((1u << end) - 1), other, a);
}

// Lanes of `a` where x exceeds y, of `b` elsewhere.
inline Floats where_greater(Floats x, Floats y, Floats a, Floats b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_GT_OQ), b, a);
}

inline Ints load_bytes(const void *from) { return _mm512_loadu_si512(from); }
inline Ints load_first_of_pairs(const void *from) {
    return _mm512_and_si512(load_bytes(from), _mm512_set1_epi32(0xffff));
}
inline Ints low_halves(Ints a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline Ints high_halves(Ints a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }

// Per lane: sums + the four products of a's unsigned bytes below 16 with the four signed ones of x.
inline Ints dot_nibbles(Ints sums, Ints a, int32_t x) { return _mm512_dpbusd_epi32(sums, a, _mm512_set1_epi32(x)); }

// The same for signed bytes, which VNNI wants unsigned: 128 is added to each, and taken off again by where sums begin.
using Bytes = Ints;
inline Bytes load_signed(const void *from) { return _mm512_xor_si512(load_bytes(from), _mm512_set1_epi8(-128)); }
inline int32_t signed_start(int32_t sum_of_x) { return -128 * sum_of_x; }
inline Ints dot_signed(Ints sums, Bytes a, int32_t x) { return _mm512_dpbusd_epi32(sums, a, _mm512_set1_epi32(x)); }

// The same for four unsigned bytes x, each below 2^UNSIGNED_BITS.
constexpr int UNSIGNED_BITS = 8, UNSIGNED_PARTS = 1;
inline Ints dot_unsigned(Ints sums, int32_t x, Ints a) { return _mm512_dpbusd_epi32(sums, _mm512_set1_epi32(x), a); }

inline Ints ints(int32_t value) { return _mm512_set1_epi32(value); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints shifted_left(Ints a, int bits) { return _mm512_slli_epi32(a, bits); }
inline Ints shifted_right(Ints a, int bits) { return _mm512_srai_epi32(a, bits); }
inline Ints bits_of(Ints a, Ints mask) { return _mm512_and_si512(a, mask); }

// Words: 32 of 16 bits, each a small bfloat16 of 12 bits: a sign, four bits of an exponent, seven of a fraction. Three
// vectors of them hold a fourth's bits where an exponent has its others.
inline Ints words(int value) { return _mm512_set1_epi16((short)value); }
inline Ints without_fourth(Ints a) { return _mm512_and_si512(a, words(0x87ff)); }
inline Ints fourth(Ints x, Ints y, Ints z) {
    constexpr int SELECT = 0xca;  // of the second where the first has ones, of the third elsewhere
    const Ints ends = _mm512_ternarylogic_epi32(words(0x8000), _mm512_slli_epi16(x, 1), _mm512_srli_epi16(x, 11), SELECT);
    const Ints between = _mm512_ternarylogic_epi32(words(0x0780), _mm512_srli_epi16(y, 4), _mm512_srli_epi16(z, 8), SELECT);
    return _mm512_ternarylogic_epi32(words(0x07f8), between, ends, SELECT);
}

#if defined(__AVX512BF16__)
inline void store_bfloat16(uint16_t *to, Floats a) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(a)); }
#else
inline void store_bfloat16(uint16_t *to, Floats a) {
    const Ints bits = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const Ints nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest, 16)));
}
#endif
inline Floats first_of_pairs(Ints a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
inline Floats second_of_pairs(Ints a) { return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32((int)0xffff0000))); }

inline Floats load_bfloat16(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

#else  // AVX2, FMA and F16C

constexpr int SUMS = 2;

struct Floats { __m256 low, high; };
struct Ints { __m256i low, high; };

inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Floats load(const float *from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float *to, Floats a) { _mm256_storeu_ps(to, a.low), _mm256_storeu_ps(to + 8, a.high); }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats abs(Floats a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline float sum(Floats a) {
    const __m256 eight = _mm256_add_ps(a.low, a.high);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}
inline float largest(Floats a) {
    const __m256 eight = _mm256_max_ps(a.low, a.high);
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 1)));
}
inline Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
inline Ints rounded(Floats a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
inline int32_t sum(Ints a) {
    const __m256i eight = _mm256_add_epi32(a.low, a.high);
    __m128i b = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    b = _mm_add_epi32(b, _mm_unpackhi_epi64(b, b));
    return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 1)));
}
inline void store_bytes(void *to, Ints a) {  // of each lane, which must be in an int8's range
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.low, a.high), 0xd8);
    _mm_storeu_si128((__m128i *)to, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline Floats load_float16(const uint16_t *from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 8)))};
}

// 2^x; see above. What would be denormal is 0.
inline __m256 exp2_of_eight(__m256 x) {
    const auto c = [](float value) { return _mm256_set1_ps(value); };
    x = _mm256_min_ps(x, c(127.0f));
    const __m256 counts = _mm256_cmp_ps(x, c(-126.0f), _CMP_GE_OQ);
    const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_sub_ps(x, whole);
    __m256 y = _mm256_fmadd_ps(c(1.5403530e-4f), f, c(1.3333558e-3f));
    y = _mm256_fmadd_ps(_mm256_fmadd_ps(y, f, c(9.6181291e-3f)), f, c(5.5504109e-2f));
    y = _mm256_fmadd_ps(_mm256_fmadd_ps(_mm256_fmadd_ps(y, f, c(0.24022651f)), f, c(0.69314718f)), f, c(1.0f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    return _mm256_and_ps(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent)), counts);
}
inline Floats exp2(Floats x) { return {exp2_of_eight(x.low), exp2_of_eight(x.high)}; }

inline Floats first_lanes(Floats a, Floats other, int end) {
    const __m256i ends = _mm256_set1_epi32(end), eight = _mm256_set1_epi32(8);
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 low = _mm256_castsi256_ps(_mm256_cmpgt_epi32(ends, lanes));
    const __m256 high = _mm256_castsi256_ps(_mm256_cmpgt_epi32(ends, _mm256_add_epi32(lanes, eight)));
    return {_mm256_blendv_ps(other.low, a.low, low), _mm256_blendv_ps(other.high, a.high, high)};
}

inline Floats where_greater(Floats x, Floats y, Floats a, Floats b) {
    return {_mm256_blendv_ps(b.low, a.low, _mm256_cmp_ps(x.low, y.low, _CMP_GT_OQ)),
            _mm256_blendv_ps(b.high, a.high, _mm256_cmp_ps(x.high, y.high, _CMP_GT_OQ))};
}

inline Ints load_bytes(const void *from) {
    return {_mm256_loadu_si256((const __m256i *)from), _mm256_loadu_si256((const __m256i *)from + 1)};
}
inline Ints load_first_of_pairs(const void *from) {
    const Ints a = load_bytes(from);
    const __m256i mask = _mm256_set1_epi32(0xffff);
    return {_mm256_and_si256(a.low, mask), _mm256_and_si256(a.high, mask)};
}
inline Ints low_halves(Ints a) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(a.low, mask), _mm256_and_si256(a.high, mask)};
}
inline Ints high_halves(Ints a) { return low_halves({_mm256_srli_epi16(a.low, 4), _mm256_srli_epi16(a.high, 4)}); }
inline Ints ints(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Ints sub(Ints a, Ints b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
inline Ints shifted_left(Ints a, int bits) { return {_mm256_slli_epi32(a.low, bits), _mm256_slli_epi32(a.high, bits)}; }
inline Ints shifted_right(Ints a, int bits) { return {_mm256_srai_epi32(a.low, bits), _mm256_srai_epi32(a.high, bits)}; }
inline Ints bits_of(Ints a, Ints mask) { return {_mm256_and_si256(a.low, mask.low), _mm256_and_si256(a.high, mask.high)}; }

inline Ints words(int value) { return {_mm256_set1_epi16((short)value), _mm256_set1_epi16((short)value)}; }
inline Ints without_fourth(Ints a) { return bits_of(a, words(0x87ff)); }
inline __m256i fourth(__m256i x, __m256i y, __m256i z) {
    const auto bits = [](__m256i a, int mask) { return _mm256_and_si256(a, _mm256_set1_epi16((short)mask)); };
    const __m256i first = _mm256_or_si256(bits(_mm256_slli_epi16(x, 1), 0x8000), bits(_mm256_srli_epi16(x, 11), 0x0007));
    const __m256i second = bits(_mm256_srli_epi16(y, 4), 0x0780), third = bits(_mm256_srli_epi16(z, 8), 0x0078);
    return _mm256_or_si256(first, _mm256_or_si256(second, third));
}
inline Ints fourth(const Ints &x, const Ints &y, const Ints &z) {
    return {fourth(x.low, y.low, z.low), fourth(x.high, y.high, z.high)};
}

// Sums of pairs fit into 16 bits: 2 * 15 * 127, and 2 * 128 * 127 of what follows.
inline __m256i dot_bytes(__m256i sums, __m256i a, __m256i x) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(a, x), _mm256_set1_epi16(1)));
}
inline Ints dot_nibbles(Ints sums, Ints a, int32_t x) {
    const __m256i b = _mm256_set1_epi32(x);
    return {dot_bytes(sums.low, a.low, b), dot_bytes(sums.high, a.high, b)};
}
// a · x = |a| · (x with a's sign)
struct Bytes { Ints value, magnitude; };
inline Bytes load_signed(const void *from) {
    const Ints a = load_bytes(from);
    return {a, {_mm256_abs_epi8(a.low), _mm256_abs_epi8(a.high)}};
}
inline int32_t signed_start(int32_t) { return 0; }
inline Ints dot_signed(Ints sums, const Bytes &a, int32_t x) {
    const __m256i b = _mm256_set1_epi32(x);
    return {dot_bytes(sums.low, a.magnitude.low, _mm256_sign_epi8(b, a.value.low)),
            dot_bytes(sums.high, a.magnitude.high, _mm256_sign_epi8(b, a.value.high))};
}
constexpr int UNSIGNED_BITS = 7, UNSIGNED_PARTS = 2;
inline Ints dot_unsigned(Ints sums, int32_t x, Ints a) {
    const __m256i b = _mm256_set1_epi32(x);
    return {dot_bytes(sums.low, b, a.low), dot_bytes(sums.high, b, a.high)};
}
inline Floats first_of_pairs(Ints a) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(a.low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a.high, 16))};
}
inline Floats second_of_pairs(Ints a) {
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    return {_mm256_castsi256_ps(_mm256_and_si256(a.low, high)), _mm256_castsi256_ps(_mm256_and_si256(a.high, high))};
}
inline __m256i nearest_bfloat16(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
}
inline void store_bfloat16(uint16_t *to, Floats a) {
    const __m256i words = _mm256_packus_epi32(nearest_bfloat16(a.low), nearest_bfloat16(a.high));
    _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(words, 0xd8));
}
inline Floats load_bfloat16(const uint16_t *from) {
    const auto eight = [](const uint16_t *at) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)), 16));
    };
    return {eight(from), eight(from + 8)};
}

#endif

// What meets 16 pairs of bfloat16. Where there is an instruction for two products that is worth it, bfloat16; elsewhere
// float32, and of a pair each by itself.
#if defined(__AVX512BF16__)
using Value = uint16_t;
using Pairs = Ints;
inline Pairs pairs_of(Ints a) { return a; }
inline void store_values(Value *to, Floats a) { store_bfloat16(to, a); }
// Per lane: sums + the two products of a pair with x[0] and x[1].
inline Floats dot_pairs(Floats sums, const Pairs &a, const Value *x) {
    uint32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)_mm512_set1_epi32((int)pair));
}
// The same where there are two sums side by side, as one waits for the one before it.
inline void add_products(Floats &first, Floats &, const Pairs &a, const Value *x) { first = dot_pairs(first, a, x); }
#else
using Value = float;
struct Pairs { Floats first, second; };
inline Pairs pairs_of(Ints a) { return {first_of_pairs(a), second_of_pairs(a)}; }
inline void store_values(Value *to, Floats a) { store(to, a); }
inline Floats dot_pairs(Floats sums, const Pairs &a, const Value *x) {
    return fma(a.second, all(x[1]), fma(a.first, all(x[0]), sums));
}
inline void add_products(Floats &first, Floats &second, const Pairs &a, const Value *x) {
    first = fma(a.first, all(x[0]), first);
    second = fma(a.second, all(x[1]), second);
}
#endif

// What meets matrices of bfloat16: the same, but where tiles do that. Small weights meet it larger by as much as leaves
// their products far from the ends of what a float can be.
#if defined(__AMX_TILE__)
using Input = uint16_t;
inline void store_inputs(Input *to, Floats a) { store_bfloat16(to, a); }
#else
using Input = Value;
constexpr int INPUT_EXPONENT = 64;
inline void store_inputs(Input *to, Floats a) { store_values(to, mul(a, all(0x1p64f))); }
#endif

// Calls body.operator()<count>(); count is 1..MOST, and all else is taken for MOST.
template <int MOST, class Body> inline void with_count(int count, Body &&body) {
    if constexpr (MOST > 1) {
        if (count < MOST) return with_count<MOST - 1>(count, body);
    }
    body.template operator()<MOST>();
}

inline float bfloat16_to_float(uint16_t value) {
    const uint32_t bits = (uint32_t)value << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline float power_of_two(int exponent) { return bfloat16_to_float((uint16_t)((127 + exponent) << 7)); }  // -126 to 127

inline int32_t quad_at(const int8_t *values) {
    int32_t quad;
    std::memcpy(&quad, values, sizeof quad);
    return quad;
}

}  // namespace simd
