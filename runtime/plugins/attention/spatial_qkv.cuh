// Spatial pre-processing: bias, QK-norm, RoPE and the change from [N, S, 3, H, Dh] to q, k, v [N, H, S, Dh].
//
// A block takes a tile of tokens and a few heads through shared memory: reads are long because heads lie side by side,
// writes because tokens do; the arithmetic is that of temporal attention, in place. Every byte moves once.
#pragma once

#include "norm_rope.cuh"

namespace stiv {

template <class Number>
struct SpatialParameters {
    const Number* qkv;
    const Number* bias;
    const Number* q_gamma;
    const Number* k_gamma;
    const Number* cos;
    const Number* sin;
    const float* scale[3];  // not null: FP8
    void* output[3];
    int positions, heads;
    int heads_per_block, positions_per_block, splits;
    float epsilon, query_scale;
};

template <class Number, int kHeadDim>
struct SpatialQkv {
    using Rows = Tile<Number, kHeadDim>;

    const SpatialParameters<Number>& p;
    Block block;
    int64_t row;          // n of [N, ...]
    int position, head;  // the first of each

    STIV_DEVICE explicit SpatialQkv(const SpatialParameters<Number>& parameters) : p(parameters) {
        const int head_groups = divide_up(p.heads, p.heads_per_block);
        const int tiles = divide_up(p.positions, p.positions_per_block);
        const int line = divide(block_index(), head_groups);
        head = (block_index() - line * head_groups) * p.heads_per_block;
        row = divide(line, tiles);
        position = (line - static_cast<int>(row) * tiles) * p.positions_per_block;
        block.rows = p.positions - position < p.positions_per_block ? p.positions - position : p.positions_per_block;
        block.heads = p.heads - head < p.heads_per_block ? p.heads - head : p.heads_per_block;
        block.planes = 1;
    }

    STIV_DEVICE void run(int threads) {
        unsigned char* const shared = shared_memory();
        const int64_t width = static_cast<int64_t>(p.heads) * kHeadDim;
        const Number* source = p.qkv + (row * p.positions + position) * 3 * width + head * kHeadDim;
        const Columns columns(block.heads * Rows::kChunks, threads);
        load_block<Number, kHeadDim, 3>(shared, source, block, columns, 3 * width, 0, width);
        normalize(shared, threads);
        sync_block();
        for (int matrix = 0; matrix < 3; ++matrix) {
            if (fp8())
                store<8, 8>(shared, matrix, threads);
            else
                store<16, 16 / static_cast<int>(sizeof(Number))>(shared, matrix, threads);
        }
    }

    STIV_DEVICE bool fp8() const { return p.scale[0] != nullptr; }

    STIV_DEVICE void normalize(unsigned char* shared, int threads) const {
        constexpr int kHalf = kHeadDim / 2;
        const NormRope<Number> norm{p.bias ? p.bias + head * kHeadDim : nullptr,
                                    p.q_gamma,
                                    p.k_gamma,
                                    p.cos + static_cast<int64_t>(position) * kHalf,
                                    p.sin + static_cast<int64_t>(position) * kHalf,
                                    static_cast<int64_t>(p.heads) * kHeadDim,
                                    p.epsilon};
        RowOutput output{fp8(), {p.query_scale, 1.0f, 1.0f}};
        if (fp8()) {
            for (int matrix = 0; matrix < 3; ++matrix)
                output.factor[matrix] *= 1.0f / load_constant<float>(p.scale[matrix]);
        }
        const int kinds = p.bias || fp8() ? 3 : 2;  // v as it is needs no pass
        const auto wait = [] {
            copy_async_wait<0>();
            sync_block();
        };
        normalize_rows<Number, kHeadDim, false>(shared, block, norm, kinds, p.splits, threads, output, wait);
    }

    // kBytes to a thread: kElements of the output type.
    template <int kBytes, int kElements>
    STIV_DEVICE void store(const unsigned char* shared, int matrix, int threads) const {
        using Words = std::conditional_t<kBytes == 16, Words4, Words2>;
        constexpr int kPieces = kHeadDim / kElements, kRow = kHeadDim * (kBytes / kElements);
        auto* output = static_cast<unsigned char*>(p.output[matrix]) +
                       ((row * p.heads + head) * p.positions + position) * kRow;
#pragma unroll 1
        for (Walk to(thread_index(), threads, kPieces, block.rows); to.plane < block.heads; to.advance()) {
            const int from = block.first_row(matrix, to.plane) * Rows::kPitch +
                             Rows::byte_offset(to.row, to.column * kBytes);
            *reinterpret_cast<Words*>(output + (static_cast<int64_t>(to.plane) * p.positions + to.row) * kRow +
                                      to.column * kBytes) = *reinterpret_cast<const Words*>(shared + from);
        }
    }
};

}  // namespace stiv
