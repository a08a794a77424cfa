// Temporal attention in 16 bits: one block takes the frames of a few heads at a few positions, every byte moves once.
//
// cp.async brings q, k, v into shared memory in the layout's own order (long segments); q and k are normalized and
// rotated there in place; a warp takes 16 frames of a head, holds their whole rows of logits and probabilities in
// registers (at most 64 frames) and writes its output over its own rows of q; the block stores those rows in long
// segments again. v's bias is added to the output: the probabilities sum to one.
#pragma once

#include "norm_rope.cuh"

namespace stiv {

template <class Number>
struct TemporalParameters {
    const Number* qkv;
    const Number* bias;
    const Number* q_gamma;
    const Number* k_gamma;
    const Number* cos;
    const Number* sin;
    const float* output_scale;  // not null: FP8
    void* output;
    int frames, positions, heads;
    int heads_per_block, positions_per_block, splits;
    float epsilon;
};

// What one block works on.
struct TemporalBlock {
    Block block;
    int batch, position, head;  // the first of each

    template <class Number>
    STIV_DEVICE explicit TemporalBlock(const TemporalParameters<Number>& p) {
        const int head_groups = divide_up(p.heads, p.heads_per_block);
        const int position_groups = divide_up(p.positions, p.positions_per_block);
        const int line = divide(block_index(), head_groups);
        head = (block_index() - line * head_groups) * p.heads_per_block;
        batch = divide(line, position_groups);
        position = (line - batch * position_groups) * p.positions_per_block;
        block.rows = p.frames;
        block.heads = p.heads - head < p.heads_per_block ? p.heads - head : p.heads_per_block;
        block.planes =
            p.positions - position < p.positions_per_block ? p.positions - position : p.positions_per_block;
    }
};

template <class Number, int kHeadDim>
struct TemporalAttention {
    using Rows = Tile<Number, kHeadDim>;
    static constexpr int kSteps = kHeadDim / 16;
    static constexpr bool kHalfStep = kHeadDim % 16 != 0;  // 72 = 4 x 16 + 8
    static constexpr int kUnroll = kSteps % 4 ? 3 : 4;
    static constexpr float kNegativeInfinity = -__builtin_huge_valf();

    const TemporalParameters<Number>& p;
    const TemporalBlock at;
    unsigned char* const shared;
    const int zeros;  // offset of a row behind v that stands for frames beyond the last
    const int lane;
    const Divisor by_heads;
    const Number* const bias;  // of v, at the block's first head and the lane's first two columns; or null

    STIV_DEVICE explicit TemporalAttention(const TemporalParameters<Number>& parameters)
        : p(parameters),
          at(parameters),
          shared(shared_memory()),
          zeros(at.block.first_row(3, 0) * Rows::kPitch),
          lane(lane_index()),
          by_heads(at.block.heads),
          bias(p.bias ? p.bias + (2 * static_cast<int64_t>(p.heads) + at.head) * kHeadDim + lane % 4 * 2 : nullptr) {}

    // For kLeast to kMost tiles of 16 frames.
    template <int kLeast, int kMost>
    STIV_DEVICE void run(int threads) {
        const Columns columns(at.block.heads * Rows::kChunks, threads);
        load(columns);
        normalize(threads);
        copy_async_wait<0>();
        sync_block();
        attend_all<kLeast, kMost>(threads);
        sync_block();
        if (p.output_scale)
            store<8>(columns);
        else
            store<16>(columns);
    }

    template <int kTiles, int kMost>
    STIV_DEVICE void attend_all(int threads) const {
        if constexpr (kTiles < kMost) {
            if (p.frames > 16 * kTiles) return attend_all<kTiles + 1, kMost>(threads);
        }
#pragma unroll 1
        for (int task = warp_index(); task < at.block.items() * kTiles; task += threads / kWarp) {
            const int item = divide(task, kTiles);
            attend<kTiles>(item, task - item * kTiles);
        }
    }

    STIV_DEVICE void load(const Columns& columns) {
        const int64_t width = static_cast<int64_t>(p.heads) * kHeadDim, row = 3 * width * p.positions;
        const Number* source = p.qkv + at.batch * (p.frames * row) + at.position * (3 * width) + at.head * kHeadDim;
        load_block<Number, kHeadDim, 2>(shared, source, at.block, columns, row, 3 * width, width);
        if (p.frames % 16 && thread_index() < Rows::kChunks)
            reinterpret_cast<Words4*>(shared + zeros)[thread_index()] = Words4{0, 0, 0, 0};
    }

    STIV_DEVICE void normalize(int threads) {
        const int64_t width = static_cast<int64_t>(p.heads) * kHeadDim;
        const NormRope<Number> norm{p.bias ? p.bias + at.head * kHeadDim : nullptr,
                                    p.q_gamma,
                                    p.k_gamma,
                                    p.cos,
                                    p.sin,
                                    width,
                                    p.epsilon};
        const auto wait = [] {
            copy_async_wait<1>();
            sync_block();
        };
        normalize_rows<Number, kHeadDim, true>(shared, at.block, norm, 2, p.splits, threads, RowOutput{}, wait);
    }

    STIV_DEVICE int start(int matrix, int item) const { return at.block.first_row(matrix, item) * Rows::kPitch; }

    // Offsets of a chunk of q or k in each lane's row t of the tiles of 16 frames: all but the last lie evenly.
    template <int kTiles>
    struct Places {
        int first, last;

        STIV_DEVICE int of(int n, int k) const {
            return n < kTiles - 1 ? Rows::skip_pairs(first, k) + n * 16 * Rows::kPitch : Rows::skip_pairs(last, k);
        }
    };

    STIV_DEVICE int chunk(int matrix, int item, int t, int index) const {
        return start(matrix, item) + Rows::chunk_offset(t < p.frames ? t : p.frames - 1, index);
    }

    template <int kTiles>
    STIV_DEVICE Places<kTiles> keys_of(int item, int row, int index) const {
        return {settled(start(1, item) + Rows::chunk_offset(row, index)),
                settled(chunk(1, item, kTiles * 16 - 16 + row, index))};
    }

    // Whether the frames 8 .. 15 of tile n exist; only the last tile can lack them.
    template <int kTiles>
    STIV_DEVICE bool has_second_half(int n) const {
        return n < kTiles - 1 || n * 16 + 8 < p.frames;
    }

    // logits[n] is the 16 x 8 piece of q k^T at frames 8 n.
    template <int kTiles>
    STIV_DEVICE void multiply_keys(int item, int tile, float (&logits)[2 * kTiles][4]) const {
        const int rows = chunk(0, item, tile * 16 + lane % 16, lane / 16);
        const auto others = keys_of<kTiles>(item, lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll kUnroll
        for (int k = 0; k < kSteps; ++k) {
            uint32_t q[4];
            load_matrix(q, shared + Rows::skip_pairs(rows, k));
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                uint32_t keys[4];
                load_matrix(keys, shared + others.of(n, k));
                multiply_add(Number{}, logits[2 * n], q, keys[0], keys[1]);
                if (has_second_half<kTiles>(n)) multiply_add(Number{}, logits[2 * n + 1], q, keys[2], keys[3]);
            }
        }
        if constexpr (kHalfStep) {
            uint32_t q[2];
            load_matrix(q, shared + chunk(0, item, tile * 16 + lane % 16, 2 * kSteps));
            const auto ends = keys_of<kTiles>(item, lane % 16, 2 * kSteps);
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                uint32_t keys[2];
                load_matrix(keys, shared + ends.of(n, 0));
                multiply_add(Number{}, logits[2 * n], q, keys[0]);
                if (has_second_half<kTiles>(n)) multiply_add(Number{}, logits[2 * n + 1], q, keys[1]);
            }
        }
    }

    // Logits become exp(logit * Dh^-0.5 - maximum), for the first kPieces pieces, the others being beyond the frames;
    // `total` is the sum, of the rows lane / 4 and, in a tile that has them, lane / 4 + 8.
    template <int kPieces, int kTiles>
    STIV_DEVICE void exponentiate(float (&logits)[2 * kTiles][4], float (&total)[2], bool both) const {
        constexpr float scale = static_cast<float>(1.4426950408889634 * inverse_root(kHeadDim));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (half == 1 && !both) break;
            float most = kNegativeInfinity, sum = 0.0f;
#pragma unroll
            for (int n = 0; n < kPieces; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& logit = logits[n][2 * half + i];
                    if (n == kPieces - 1 && n * 8 + lane % 4 * 2 + i >= p.frames) logit = kNegativeInfinity;
                    most = maximum(most, logit);
                }
            }
            most = maximum(most, shuffle_xor(most, 1));
            most = maximum(most, shuffle_xor(most, 2)) * scale;
#pragma unroll
            for (int n = 0; n < kPieces; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& logit = logits[n][2 * half + i];
                    logit = power_of_two(fused_multiply_add(logit, scale, -most));
                    sum += logit;
                }
            }
            sum += shuffle_xor(sum, 1);
            total[half] = sum + shuffle_xor(sum, 2);
        }
    }

    template <int kTiles>
    STIV_DEVICE void attend(int item, int tile) const {
        float logits[2 * kTiles][4] = {};
        float total[2] = {1.0f, 1.0f};
        multiply_keys<kTiles>(item, tile, logits);
        const bool both = tile * 16 + 8 < p.frames;
        if (has_second_half<kTiles>(kTiles - 1))
            exponentiate<2 * kTiles, kTiles>(logits, total, both);
        else
            exponentiate<2 * kTiles - 1, kTiles>(logits, total, both);
        uint32_t weights[kTiles][4];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                weights[n][i] = pack(Number{}, logits[2 * n + i / 2][i % 2 * 2], logits[2 * n + i / 2][i % 2 * 2 + 1]);
        }
        // NaN, not a division by zero, is what a row without any finite logit has.
        float scale[2] = {reciprocal(total[0]), reciprocal(total[1])};
        if (p.output_scale) {
            const float inverse = 1.0f / load_constant<float>(p.output_scale);
            multiply_values<kTiles, true>(item, tile, weights, scale, inverse);
        } else {
            multiply_values<kTiles, false>(item, tile, weights, scale, 1.0f);
        }
    }

    template <int kTiles>
    STIV_DEVICE Places<kTiles> values_of(int item, int row, int index) const {
        const int first = start(2, item) + Rows::chunk_offset(row, index), t = kTiles * 16 - 16 + row;
        return {first, t < p.frames ? first + (kTiles * 16 - 16) * Rows::kPitch : zeros + index * 16};
    }

    template <int kTiles, bool kFp8>
    STIV_DEVICE void multiply_values(int item, int tile, const uint32_t (&weights)[kTiles][4],
                                     const float (&scale)[2], float inverse) const {
        const Place to = place(item, tile);
        sync_warp();  // all lanes have read the rows of q that are written over now
        const auto rows = values_of<kTiles>(item, lane % 16, lane / 16);
        // FP8 is many instructions where the GPU does not convert to it.
#pragma unroll(kFp8 ? 1 : kUnroll)
        for (int k = 0; k < kSteps; ++k) {
            float sums[2][4] = {};
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                uint32_t values[4];
                load_matrix_transposed(values, shared + rows.of(n, k));
                multiply_add(Number{}, sums[0], weights[n], values[0], values[1]);
                multiply_add(Number{}, sums[1], weights[n], values[2], values[3]);
            }
            write<kFp8>(to, 2 * k, sums[0], scale, inverse);
            write<kFp8>(to, 2 * k + 1, sums[1], scale, inverse);
        }
        if constexpr (kHalfStep) {
            float sums[4] = {};
            const auto ends = values_of<kTiles>(item, lane % 16, 2 * kSteps);
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                uint32_t values[2];
                load_matrix_transposed(values, shared + ends.of(n, 0));
                multiply_add(Number{}, sums, weights[n], values[0], values[1]);
            }
            write<kFp8>(to, 2 * kSteps, sums, scale, inverse);
        }
    }

    // A lane's place in the output of a task: over the tile's rows of q, which this warp alone has read.
    struct Place {
        const Number* bias;  // of the lane's first two columns, or null
        int row;             // offset of the first of the lane's two rows
        int rows;            // of the tile from that one on
    };

    STIV_DEVICE Place place(int item, int tile) const {
        const int t = tile * 16 + lane / 4;
        const int head = item - by_heads.quotient(item) * at.block.heads;
        return {bias ? bias + head * kHeadDim : nullptr, start(0, item) + Rows::chunk_offset(t, 0), p.frames - t};
    }

    template <bool kFp8>
    STIV_DEVICE void write(const Place& to, int column, const float (&sums)[4], const float (&scale)[2],
                           float inverse) const {
        float bias[2] = {0.0f, 0.0f};
        if (to.bias) unpack(Number{}, load_constant<uint32_t>(to.bias + column * 8), bias[0], bias[1]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (8 * half >= to.rows) continue;
            const float low = fused_multiply_add(sums[2 * half], scale[half], bias[0]);
            const float high = fused_multiply_add(sums[2 * half + 1], scale[half], bias[1]);
            unsigned char* const row = shared + 8 * half * Rows::kPitch;
            if constexpr (kFp8)
                *reinterpret_cast<uint16_t*>(row + Rows::skip_chunks(to.row, column / 2) + column % 2 * 8 +
                                             lane % 4 * 2) = pack_e4m3(low * inverse, high * inverse);
            else
                *reinterpret_cast<uint32_t*>(row + Rows::skip_chunks(to.row, column) + lane % 4 * 4) =
                    pack(Number{}, low, high);
        }
    }

    // kBytes to a thread, eight elements: 16 bytes of 16-bit numbers or 8 of FP8.
    template <int kBytes>
    STIV_DEVICE void store(const Columns& to) const {
        using Words = std::conditional_t<kBytes == 16, Words4, Words2>;
        constexpr int kPieces = kHeadDim / 8;
        const int64_t width = static_cast<int64_t>(p.heads) * kHeadDim * kBytes / 8;
        unsigned char* output = static_cast<unsigned char*>(p.output) +
                                (static_cast<int64_t>(at.batch) * p.frames * p.positions + at.position) * width +
                                at.head * (kHeadDim * kBytes / 8);
        const int columns = at.block.heads * kPieces;
#pragma unroll 1
        for (int column = to.column; column < columns; column += to.column_step) {
            const int head = divide(column, kPieces), byte = (column - head * kPieces) * kBytes;
#pragma unroll 1
            for (int plane = 0; plane < at.block.planes; ++plane) {
                const int item = plane * at.block.heads + head;
                unsigned char* target =
                    output + (static_cast<int64_t>(to.row) * p.positions + plane) * width + column * kBytes;
#pragma unroll 1
                for (int row = to.row; row < p.frames; row += to.row_step) {
                    *reinterpret_cast<Words*>(target) = *reinterpret_cast<const Words*>(
                        shared + start(0, item) + Rows::byte_offset(row, byte));
                    target += to.row_step * static_cast<int64_t>(p.positions) * width;
                }
            }
        }
    }
};

}  // namespace stiv
