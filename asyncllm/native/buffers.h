// Memory that lasts from step to step.
#pragma once

#include <cstdlib>
#include <new>

#include "matrix.h"

// Grows and never shrinks; what is in it is lost by growing.
template <class T> class Buffer {
  public:
    ~Buffer() { std::free(data_); }
    T *of(size_t size) {
        if (size > size_) {
            std::free(data_);
            size_ = 0;
            data_ = static_cast<T *>(std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64));
            if (!data_) throw std::bad_alloc();
            size_ = size;
        }
        return data_;
    }
    T *data() const { return data_; }

  private:
    T *data_ = nullptr;
    size_t size_ = 0;
};

struct RowBuffers {
    Buffer<simd::Input> values;
    Buffer<float> floats;
    Buffer<simd::Value> for_keys;
    Buffer<int8_t> quants, fine;
    Buffer<float> scales, sums;
    Buffer<int32_t> starts, fine_starts;
    Buffer<uint8_t> marks;

    Rows of(int num_rows, int k) {
        const size_t some_rows = (size_t)(num_rows + SIDE_ROWS - 1) / SIDE_ROWS * SIDE_ROWS;
        const size_t size = some_rows * k, num_blocks = size / BLOCK;
        return {values.of(some_rows * input_stride(k)),
                floats.of(size),
                for_keys.of(size),
                quants.of(size),
                fine.of(size),
                scales.of(num_blocks),
                sums.of(num_blocks),
                starts.of(num_blocks),
                fine_starts.of(num_blocks),
                marks.of(num_blocks)};
    }
};
