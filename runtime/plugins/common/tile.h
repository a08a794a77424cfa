// Rows of one head each in shared memory, and the walk over them that global memory likes.
#pragma once

#include "device.h"

namespace stiv {

// Neighbouring elements, the unit of the norm's arithmetic: four or eight 16-bit numbers, or four of fp32.
template <class Number, int kWidth>
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

template <class Number>
struct Unit<Number, 8> {
    using Words = Words4;

    static STIV_DEVICE void unpack_words(Words words, float (&x)[8]) {
        unpack(Number{}, words.x, x[0], x[1]);
        unpack(Number{}, words.y, x[2], x[3]);
        unpack(Number{}, words.z, x[4], x[5]);
        unpack(Number{}, words.w, x[6], x[7]);
    }

    static STIV_DEVICE Words pack_words(const float (&x)[8]) {
        return Words{pack(Number{}, x[0], x[1]), pack(Number{}, x[2], x[3]), pack(Number{}, x[4], x[5]),
                     pack(Number{}, x[6], x[7])};
    }
};

template <>
struct Unit<float, 4> {
    using Words = Floats4;

    static STIV_DEVICE void unpack_words(Words words, float (&x)[4]) {
        x[0] = words.x;
        x[1] = words.y;
        x[2] = words.z;
        x[3] = words.w;
    }

    static STIV_DEVICE Words pack_words(const float (&x)[4]) { return Words{x[0], x[1], x[2], x[3]}; }
};

template <class Number, int kWidth>
STIV_DEVICE void load_unit(const void* address, float (&x)[kWidth]) {
    using Units = Unit<Number, kWidth>;
    Units::unpack_words(*static_cast<const typename Units::Words*>(address), x);
}

template <class Number, int kWidth>
STIV_DEVICE void load_constant_unit(const void* address, float (&x)[kWidth]) {
    using Units = Unit<Number, kWidth>;
    Units::unpack_words(load_constant<typename Units::Words>(address), x);
}

// Quotients of numbers that are not negative, which a GPU finds in fewer steps than those with a sign.
STIV_DEVICE int divide(int a, int b) { return static_cast<int>(static_cast<unsigned>(a) / static_cast<unsigned>(b)); }
STIV_DEVICE int divide_up(int a, int b) { return divide(a - 1, b) + 1; }

// Quotients of numbers below 2^20 by one divisor: at half a unit above a whole number, the nearest boundary is half a
// divisor away, which the two roundings of fp32 and that of the reciprocal do not reach.
struct Divisor {
    float inverse;

    STIV_DEVICE explicit Divisor(int divisor) : inverse(reciprocal(static_cast<float>(divisor))) {}
    STIV_DEVICE int quotient(int x) const { return static_cast<int>((static_cast<float>(x) + 0.5f) * inverse); }
};

// Where the 16-byte chunks of a row stand, so that eight consecutive rows at one chunk (an ldmatrix phase, or eight
// lanes with a row each) touch all 32 banks once: an odd number of chunks does so by itself; where it costs nothing
// the chunks are permuted by the row, else a chunk of padding makes the number odd. Rows are counted in their item, so
// that all items and matrices have the same offsets.
template <class Number, int kHeadDim>
struct Tile {
    static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(Number));
    static constexpr int kChunks = kRowBytes / 16;
    static constexpr int kPermuted = kChunks % 16 == 0 ? 8 : kChunks == 4 ? 4 : 0;
    static constexpr int kPitch = kRowBytes + (kPermuted || kChunks % 2 ? 0 : 16);

    static STIV_DEVICE int chunk_offset(int row, int chunk) {
        if constexpr (kPermuted == 8) chunk ^= row & 7;
        if constexpr (kPermuted == 4) chunk ^= row >> 1 & 3;
        return row * kPitch + chunk * 16;
    }

    static STIV_DEVICE int byte_offset(int row, int byte) {
        if constexpr (kPermuted == 0) return row * kPitch + byte;
        return chunk_offset(row, byte >> 4) + (byte & 15);
    }

    // From the offset of chunk 0 or 1 to that of the chunk 2 * `pairs` after it; from chunk 0 `chunks` on.
    static STIV_DEVICE int skip_pairs(int offset, int pairs) { return skip_chunks(offset, 2 * pairs); }
    static STIV_DEVICE int skip_chunks(int offset, int chunks) {
        return kPermuted ? offset ^ chunks * 16 : offset + chunks * 16;
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
        const Divisor by_columns(columns);
        row_step = narrow ? by_columns.quotient(threads) : 1;
        column_step = narrow ? columns : threads;
        row = narrow ? by_columns.quotient(thread_index()) : 0;
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
    STIV_DEVICE int first_row(int matrix, int item) const { return (matrix * items() + item) * rows; }
};

// Copies a thread's rows of one column of kMatrices matrices.
template <class Number, int kHeadDim, int kMatrices>
STIV_DEVICE void load_rows(unsigned char* item, const Number* from, const Block& block, const Columns& at, int chunk,
                           int64_t row_stride, int64_t matrix_stride) {
    using Rows = Tile<Number, kHeadDim>;
    const int matrix_bytes = block.first_row(1, 0) * Rows::kPitch;
#pragma unroll 1
    for (int row = at.row; row < block.rows; row += at.row_step) {
#pragma unroll
        for (int matrix = 0; matrix < kMatrices; ++matrix)
            copy_async(item + matrix * matrix_bytes + Rows::chunk_offset(row, chunk), from + matrix * matrix_stride);
        from += at.row_step * row_stride;
    }
    copy_async_commit();
}

// Issues the copies of packed q, k, v, those of the first kFirst matrices before the others: the last group of copies
// has none of them. `source` is the block's first element of q.
template <class Number, int kHeadDim, int kFirst>
STIV_DEVICE void load_block(unsigned char* shared, const Number* source, const Block& block, const Columns& at,
                            int64_t row_stride, int64_t plane_stride, int64_t matrix_stride) {
    using Rows = Tile<Number, kHeadDim>;
    constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Number));
    const int columns = block.heads * Rows::kChunks;
#pragma unroll 1
    for (int column = at.column; column < columns; column += at.column_step) {
        const int head = divide(column, Rows::kChunks), chunk = column - head * Rows::kChunks;
        const Number* from = source + at.row * row_stride + column * kPerChunk;
#pragma unroll 1
        for (int plane = 0; plane < block.planes; ++plane) {
            const int item = plane * block.heads + head;
            load_rows<Number, kHeadDim, kFirst>(shared + block.first_row(0, item) * Rows::kPitch, from, block, at,
                                                chunk, row_stride, matrix_stride);
            if constexpr (kFirst < 3)
                load_rows<Number, kHeadDim, 3 - kFirst>(shared + block.first_row(kFirst, item) * Rows::kPitch,
                                                        from + kFirst * matrix_stride, block, at, chunk, row_stride,
                                                        matrix_stride);
            from += plane_stride;
        }
    }
}

}  // namespace stiv
