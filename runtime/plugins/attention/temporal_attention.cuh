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
        const int head_groups = (p.heads + p.heads_per_block - 1) / p.heads_per_block;
        const int position_groups = (p.positions + p.positions_per_block - 1) / p.positions_per_block;
        const int line = block_index() / head_groups;
        head = (block_index() - line * head_groups) * p.heads_per_block;
        batch = line / position_groups;
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
    static constexpr float kNegativeInfinity = -__builtin_huge_valf();

    const TemporalParameters<Number>& p;
    const TemporalBlock at;
    unsigned char* const shared;
    const unsigned char* const zeros;  // a row behind v that stands for frames beyond the last
    const int lane;

    STIV_DEVICE explicit TemporalAttention(const TemporalParameters<Number>& parameters)
        : p(parameters),
          at(parameters),
          shared(shared_memory()),
          zeros(shared + 3 * at.block.items() * p.frames * Rows::kPitch),
          lane(thread_index() % kWarp) {}

    // kTiles is that of `frames`, or 0: any, in one kernel.
    template <int kTiles>
    STIV_DEVICE void run(int threads) {
        load(threads);
        normalize(threads);
        copy_async_wait<0>();
        sync_block();
        if constexpr (kTiles != 0)
            attend_all<kTiles>(threads);
        else
            attend_any(threads);
        sync_block();
        if (p.output_scale)
            store<8>(threads);
        else
            store<16>(threads);
    }

    STIV_DEVICE void attend_any(int threads) const {
        switch ((p.frames + 15) / 16) {
            case 1: return attend_all<1>(threads);
            case 2: return attend_all<2>(threads);
            case 3: return attend_all<3>(threads);
            default: return attend_all<4>(threads);
        }
    }

    template <int kTiles>
    STIV_DEVICE void attend_all(int threads) const {
#pragma unroll 1
        for (int task = thread_index() / kWarp; task < at.block.items() * kTiles; task += threads / kWarp)
            attend<kTiles>(task / kTiles, task % kTiles);
    }

    STIV_DEVICE void load(int threads) {
        const int64_t width = static_cast<int64_t>(p.heads) * kHeadDim, row = 3 * width * p.positions;
        const Number* source = p.qkv + at.batch * (p.frames * row) + at.position * (3 * width) + at.head * kHeadDim;
        load_block<Number, kHeadDim>(shared, source, at.block, row, 3 * width, width, threads, 0, 2);
        load_block<Number, kHeadDim>(shared, source, at.block, row, 3 * width, width, threads, 2, 3);
        if (p.frames % 16 && thread_index() < Rows::kChunks)
            reinterpret_cast<Words4*>(const_cast<unsigned char*>(zeros))[thread_index()] = Words4{0, 0, 0, 0};
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

    STIV_DEVICE const unsigned char* chunk(int matrix, int item, int t, int index) const {
        return shared + Rows::chunk_offset(at.block.row(matrix, item, t < p.frames ? t : p.frames - 1), index);
    }

    // logits[n] is the 16 x 8 piece of q k^T at frames 8 n.
    template <int kTiles>
    STIV_DEVICE void multiply_keys(int item, int tile, float (&logits)[2 * kTiles][4]) const {
#pragma unroll 2
        for (int k = 0; k < kSteps; ++k) {
            uint32_t q[4];
            load_matrix(q, chunk(0, item, tile * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                uint32_t keys[4];
                load_matrix(keys, chunk(1, item, n * 16 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
                multiply_add(Number{}, logits[2 * n], q, keys[0], keys[1]);
                if (n * 16 + 8 < p.frames) multiply_add(Number{}, logits[2 * n + 1], q, keys[2], keys[3]);
            }
        }
        if constexpr (kHalfStep) {
            uint32_t q[2];
            load_matrix(q, chunk(0, item, tile * 16 + lane % 16, 2 * kSteps));
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                uint32_t keys[2];
                load_matrix(keys, chunk(1, item, n * 16 + lane % 16, 2 * kSteps));
                multiply_add(Number{}, logits[2 * n], q, keys[0]);
                if (n * 16 + 8 < p.frames) multiply_add(Number{}, logits[2 * n + 1], q, keys[1]);
            }
        }
    }

    // Logits become exp(logit * Dh^-0.5 - maximum); `total` is the sum, of the rows lane / 4 and lane / 4 + 8.
    template <int kTiles>
    STIV_DEVICE void exponentiate(float (&logits)[2 * kTiles][4], float (&total)[2]) const {
        constexpr float scale = static_cast<float>(1.4426950408889634 * inverse_root(kHeadDim));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float most = kNegativeInfinity, sum = 0.0f;
#pragma unroll
            for (int n = 0; n < 2 * kTiles; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& logit = logits[n][2 * half + i];
                    if (n * 8 + lane % 4 * 2 + i >= p.frames) logit = kNegativeInfinity;
                    most = maximum(most, logit);
                }
            }
            most = maximum(most, shuffle_xor(most, 1));
            most = maximum(most, shuffle_xor(most, 2)) * scale;
#pragma unroll
            for (int n = 0; n < 2 * kTiles; ++n) {
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
        float total[2];
        multiply_keys<kTiles>(item, tile, logits);
        exponentiate<kTiles>(logits, total);
        uint32_t weights[kTiles][4];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                weights[n][i] = pack(Number{}, logits[2 * n + i / 2][i % 2 * 2], logits[2 * n + i / 2][i % 2 * 2 + 1]);
        }
        // NaN, not a division by zero, is what a row without any finite logit has.
        float scale[2] = {1.0f / total[0], 1.0f / total[1]};
        if (p.output_scale) {
            const float inverse = 1.0f / load_constant<float>(p.output_scale);
            multiply_values<kTiles>(item, tile, weights, scale, inverse);
        } else {
            multiply_values<kTiles>(item, tile, weights, scale, 1.0f);
        }
    }

    STIV_DEVICE const unsigned char* value_chunk(int item, int t, int index) const {
        return t < p.frames ? shared + Rows::chunk_offset(at.block.row(2, item, t), index) : zeros + index * 16;
    }

    template <int kTiles>
    STIV_DEVICE void multiply_values(int item, int tile, const uint32_t (&weights)[kTiles][4],
                                     const float (&scale)[2], float inverse) const {
        const Place to = place(item, tile);
        sync_warp();  // all lanes have read the rows of q that are written over now
#pragma unroll 2
        for (int k = 0; k < kSteps; ++k) {
            float sums[2][4] = {};
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                uint32_t values[4];
                load_matrix_transposed(values, value_chunk(item, n * 16 + lane % 16, 2 * k + lane / 16));
                multiply_add(Number{}, sums[0], weights[n], values[0], values[1]);
                multiply_add(Number{}, sums[1], weights[n], values[2], values[3]);
            }
            write(to, 2 * k, sums[0], scale, inverse);
            write(to, 2 * k + 1, sums[1], scale, inverse);
        }
        if constexpr (kHalfStep) {
            float sums[4] = {};
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                uint32_t values[2];
                load_matrix_transposed(values, value_chunk(item, n * 16 + lane % 16, 2 * kSteps));
                multiply_add(Number{}, sums, weights[n], values[0], values[1]);
            }
            write(to, 2 * kSteps, sums, scale, inverse);
        }
    }

    // A lane's place in the output of a task: over the tile's rows of q, which this warp alone has read.
    struct Place {
        const Number* bias;  // of the lane's first two columns, or null
        int row;             // in shared memory, of the first of the lane's two rows
        int rows;            // of the tile from that one on
    };

    STIV_DEVICE Place place(int item, int tile) const {
        const int t = tile * 16 + lane / 4;
        const int64_t head = 2 * static_cast<int64_t>(p.heads) + at.head + item % at.block.heads;
        return {p.bias ? p.bias + head * kHeadDim + lane % 4 * 2 : nullptr, at.block.row(0, item, t),
                p.frames - t};
    }

    STIV_DEVICE void write(const Place& to, int column, const float (&sums)[4], const float (&scale)[2],
                           float inverse) const {
        float bias[2] = {0.0f, 0.0f};
        if (to.bias) unpack(Number{}, load_constant<uint32_t>(to.bias + column * 8), bias[0], bias[1]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (8 * half >= to.rows) continue;
            const float low = fused_multiply_add(sums[2 * half], scale[half], bias[0]);
            const float high = fused_multiply_add(sums[2 * half + 1], scale[half], bias[1]);
            const int row = to.row + 8 * half;
            if (p.output_scale)
                *reinterpret_cast<uint16_t*>(shared + Rows::byte_offset(row, column * 8 + lane % 4 * 2)) =
                    pack_e4m3(low * inverse, high * inverse);
            else
                *reinterpret_cast<uint32_t*>(shared + Rows::chunk_offset(row, column) + lane % 4 * 4) =
                    pack(Number{}, low, high);
        }
    }

    // kBytes to a thread, eight elements: 16 bytes of 16-bit numbers or 8 of FP8.
    template <int kBytes>
    STIV_DEVICE void store(int threads) const {
        using Words = std::conditional_t<kBytes == 16, Words4, Words2>;
        constexpr int kPieces = kHeadDim / 8;
        const int64_t width = static_cast<int64_t>(p.heads) * kHeadDim * kBytes / 8;
        unsigned char* output = static_cast<unsigned char*>(p.output) +
                                (static_cast<int64_t>(at.batch) * p.frames * p.positions + at.position) * width +
                                at.head * (kHeadDim * kBytes / 8);
        const int columns = at.block.heads * kPieces;
        const Columns to(columns, threads);
#pragma unroll 1
        for (int column = to.column; column < columns; column += to.column_step) {
            const int head = column / kPieces, byte = column % kPieces * kBytes;
#pragma unroll 1
            for (int plane = 0; plane < at.block.planes; ++plane) {
                const int item = plane * at.block.heads + head;
                unsigned char* target =
                    output + (static_cast<int64_t>(to.row) * p.positions + plane) * width + column * kBytes;
#pragma unroll 1
                for (int row = to.row; row < p.frames; row += to.row_step) {
                    *reinterpret_cast<Words*>(target) = *reinterpret_cast<const Words*>(
                        shared + Rows::byte_offset(at.block.row(0, item, row), byte));
                    target += to.row_step * static_cast<int64_t>(p.positions) * width;
                }
            }
        }
    }
};

}  // namespace stiv
