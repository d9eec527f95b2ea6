// Where values are largest.
#pragma once

#include <cmath>

#include "simd.h"

// The largest value so far, at the first of its places; none is larger than what is not a number, or than -infinity.
struct Best {
    float value = -INFINITY;
    int64_t place = 0;

    void offer(float other, int64_t at) {
        if (other > value || (other == value && at < place)) value = other, place = at;
    }
};

// Where a row is largest, the first place of several; 0 where nothing is a number. Counts in floats: exact to 2^24.
inline int64_t argmax(const float *row, int width) {
    using namespace simd;
    constexpr int SUMS = 4;  // side by side, as a comparison waits for the one before it
    Floats best[SUMS], step[SUMS];
    for (int i = 0; i < SUMS; ++i) best[i] = all(-INFINITY), step[i] = zero();
    const int steps = width / (SUMS * LANES);
    for (int s = 0; s < steps; ++s) {
        for (int i = 0; i < SUMS; ++i) {
            const Floats x = load(row + (s * SUMS + i) * LANES);
            step[i] = where_greater(x, best[i], all((float)s), step[i]);
            best[i] = where_greater(x, best[i], x, best[i]);
        }
    }
    Best of_all;
    for (int i = 0; i < SUMS; ++i) {
        float bests[LANES], its_steps[LANES];
        store(bests, best[i]), store(its_steps, step[i]);
        for (int lane = 0; lane < LANES; ++lane) {
            of_all.offer(bests[lane], ((int64_t)its_steps[lane] * SUMS + i) * LANES + lane);
        }
    }
    for (int at = steps * SUMS * LANES; at < width; ++at) of_all.offer(row[at], at);
    return of_all.place;
}
