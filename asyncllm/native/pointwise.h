// What is done to one row, or to one value of it: norms and activations.
#pragma once

#include "model.h"

inline simd::Floats sigmoid(simd::Floats x) {
    using namespace simd;
    return div(all(1), add(all(1), exp2(min(mul(x, all(-LOG2E)), all(126.0f)))));
}

inline simd::Floats activate(int activation, simd::Floats x) {
    using namespace simd;
    switch (activation) {
    case SILU: return mul(x, sigmoid(x));
    case GELU_TANH:  // x / 2 · (1 + tanh(u)) = x · sigmoid(2u)
        return mul(x, sigmoid(mul(all(2 * 0.7978845608f), fma(mul(mul(x, x), x), all(0.044715f), x))));
    case RELU: return max(x, zero());
    default: {
        float values[LANES];
        store(values, x);
        for (float &value : values) value *= 0.5f * (1.0f + std::erf(value * 0.70710678f));
        return load(values);
    }
    }
}

inline void apply_norm(const Norm &norm, const float *x, float *to, int k, float eps) {
    using namespace simd;
    float mean = 0;
    if (norm.bias) {
        Floats sums = zero();
        for (int i = 0; i < k; i += LANES) sums = add(sums, load(x + i));
        mean = sum(sums) / (float)k;
    }
    const Floats middle = all(mean);
    Floats squares = zero();
    for (int i = 0; i < k; i += LANES) {
        const Floats away = sub(load(x + i), middle);
        squares = fma(away, away, squares);
    }
    const Floats factor = all(1.0f / std::sqrt(sum(squares) / (float)k + eps));
    for (int i = 0; i < k; i += LANES) {
        const Floats y = mul(mul(sub(load(x + i), middle), factor), load(norm.weight + i));
        store(to + i, norm.bias ? add(y, load(norm.bias + i)) : y);
    }
}
