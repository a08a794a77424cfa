// Rows of one head each in shared memory, and the walk over them that global memory likes.
#pragma once

#include "device.h"

namespace stiv {

// Four neighbouring elements, the unit of the norm's arithmetic: 8 bytes of 16-bit numbers, 16 bytes of fp32.
template <class Number>
struct Unit {
    using Words = Words2;

    static STIV_DEVICE void unpack_words(Words words, float (&x)[4]) {
        unpack(Number{}, words.x, x[0], x[1]);
        unpack(Number{}, words.y, x[2], x[3]);
    }

    static STIV_DEVICE Words pack_words(const float (&x)[4]) {
        return Words{pack(Number{}, x[0], x[1]), pack(Number{}, x[2], x[3])};
    }
};

template <>
struct Unit<float> {
    using Words = Floats4;

    static STIV_DEVICE void unpack_words(Words words, float (&x)[4]) {
        x[0] = words.x;
        x[1] = words.y;
        x[2] = words.z;
        x[3] = words.w;
    }

    static STIV_DEVICE Words pack_words(const float (&x)[4]) { return Words{x[0], x[1], x[2], x[3]}; }
};

template <class Number>
STIV_DEVICE void load_unit(const void* address, float (&x)[4]) {
    Unit<Number>::unpack_words(*static_cast<const typename Unit<Number>::Words*>(address), x);
}

template <class Number>
STIV_DEVICE void load_constant_unit(const void* address, float (&x)[4]) {
    Unit<Number>::unpack_words(load_constant<typename Unit<Number>::Words>(address), x);
}

// Where the 16-byte chunks of a row stand, so that eight consecutive rows at one chunk (an ldmatrix phase, or eight
// lanes with a row each) touch all 32 banks once: an odd number of chunks does so by itself; where it costs nothing
// the chunks are permuted by the row, else a chunk of padding makes the number odd.
template <class Number, int kHeadDim>
struct Tile {
    static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(Number));
    static constexpr int kChunks = kRowBytes / 16;
    static constexpr int kPermuted = kChunks % 16 == 0 ? 8 : kChunks == 4 ? 4 : 0;
    static constexpr int kPitch = kRowBytes + (kPermuted || kChunks % 2 ? 0 : 16);
    static constexpr int kUnitBytes = 4 * static_cast<int>(sizeof(Number));

    static STIV_DEVICE int chunk_offset(int row, int chunk) {
        if constexpr (kPermuted == 8) chunk ^= row & 7;
        if constexpr (kPermuted == 4) chunk ^= row >> 1 & 3;
        return row * kPitch + chunk * 16;
    }

    static STIV_DEVICE int byte_offset(int row, int byte) {
        if constexpr (kPermuted == 0) return row * kPitch + byte;
        return chunk_offset(row, byte >> 4) + (byte & 15);
    }
};

// A thread's way through [planes][rows][columns], `step` apart, without a division per step.
struct Walk {
    int column, row, plane;

    STIV_DEVICE Walk(int start, int step, int columns, int rows) : columns_(columns), rows_(rows) {
        split(start, column, row, plane);
        split(step, step_column_, step_row_, step_plane_);
    }

    STIV_DEVICE void advance() {
        column += step_column_;
        row += step_row_;
        plane += step_plane_;
        if (column >= columns_) {
            column -= columns_;
            ++row;
        }
        if (row >= rows_) {
            row -= rows_;
            ++plane;
        }
    }

private:
    STIV_DEVICE void split(int index, int& c, int& r, int& p) const {
        const int line = index / columns_;
        c = index - line * columns_;
        p = line / rows_;
        r = line - p * rows_;
    }

    int columns_, rows_, step_column_, step_row_, step_plane_;
};

// A thread's share of [rows][columns]: one column, every `step`-th row; with more columns than threads several columns.
struct Columns {
    int row, column, row_step, column_step;

    STIV_DEVICE Columns(int columns, int threads) {
        const bool narrow = columns <= threads;
        row_step = narrow ? threads / columns : 1;
        column_step = narrow ? columns : threads;
        row = narrow ? thread_index() / columns : 0;
        column = thread_index() - row * columns;
        if (row >= row_step) column = columns;  // left over
    }
};

// The rows of q, k, v that a block works on: in shared memory [3][heads][rows] of a head each ("items" are heads, or
// the heads of several positions), in global memory `row_stride`, `plane_stride` elements apart, heads side by side.
struct Block {
    int rows;    // frames, or tokens of a tile
    int planes;  // positions
    int heads;

    STIV_DEVICE int items() const { return planes * heads; }
    STIV_DEVICE int row(int matrix, int item, int t) const { return (matrix * items() + item) * rows + t; }
};

// Issues the copies of the matrices `first`..`last - 1` of packed q, k, v; `source` is the block's first element of q.
template <class Number, int kHeadDim>
STIV_DEVICE void load_block(unsigned char* shared, const Number* source, const Block& block, int64_t row_stride,
                            int64_t plane_stride, int64_t matrix_stride, int threads, int first, int last) {
    using Rows = Tile<Number, kHeadDim>;
    constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Number));
    const int columns = block.heads * Rows::kChunks;
    const Columns at(columns, threads);
#pragma unroll 1
    for (int column = at.column; column < columns; column += at.column_step) {
        const int head = column / Rows::kChunks, chunk = column % Rows::kChunks;
#pragma unroll 1
        for (int plane = 0; plane < block.planes; ++plane) {
            const int item = plane * block.heads + head;
            const Number* from = source + at.row * row_stride + plane * plane_stride + column * kPerChunk;
#pragma unroll 1
            for (int row = at.row; row < block.rows; row += at.row_step) {
#pragma unroll
                for (int matrix = first; matrix < last; ++matrix)
                    copy_async(shared + Rows::chunk_offset(block.row(matrix, item, row), chunk),
                               from + matrix * matrix_stride);
                from += at.row_step * row_stride;
            }
        }
    }
    copy_async_commit();
}

}  // namespace stiv
