// Temporal attention in fp32, for checks and small models: one head at one position per block, plain multiply-adds.
//
// k is normalized into shared memory, each warp goes through its rows of q with one logit or two in each lane, then v
// takes the place of k. Accurate exp and division: this path is what the 16-bit one is compared with on a GPU.
#pragma once

#include "norm_rope.cuh"
#include "temporal_attention.cuh"

namespace stiv {

template <int kHeadDim, int kWarps>
struct ScalarTemporalAttention {
    using Rows = Tile<float, kHeadDim>;
    static constexpr int kHalf = kHeadDim / 2;
    static constexpr int kColumns = (kHeadDim + kWarp - 1) / kWarp;
    static constexpr int kRowsPerWarp = 64 / kWarps;

    const TemporalParameters<float>& p;
    const int lane, warp;
    int head, position, batch;
    unsigned char* const keys;
    float* const query;  // of this warp

    STIV_DEVICE explicit ScalarTemporalAttention(const TemporalParameters<float>& parameters)
        : p(parameters),
          lane(thread_index() % kWarp),
          warp(thread_index() / kWarp),
          keys(shared_memory()),
          query(reinterpret_cast<float*>(shared_memory() + parameters.frames * Rows::kPitch) + warp * kHeadDim) {
        const int line = block_index() / p.heads;
        head = block_index() - line * p.heads;
        batch = line / p.positions;
        position = line - batch * p.positions;
    }

    // Of a row: the lane's weights of the frames `lane` and `lane + 32`, and the factor that makes all sum to one.
    struct Weights {
        float first, second, scale;
    };

    STIV_DEVICE void run() {
        for (int t = warp; t < p.frames; t += kWarps) normalize(1, t, [&](int i, float x) { *key(t, i) = x; });
        sync_block();
        Weights all[kRowsPerWarp] = {};
#pragma unroll 1
        for (int r = 0; warp + r * kWarps < p.frames; ++r) {
            const Weights weights = attend(warp + r * kWarps);
#pragma unroll
            for (int i = 0; i < kRowsPerWarp; ++i)  // an array in registers has no index but constants
                if (i == r) all[i] = weights;
        }
        sync_block();
        for (int t = warp; t < p.frames; t += kWarps) {
            for (int i = lane; i < kHeadDim; i += kWarp) *key(t, i) = element(2, t, i);
        }
        sync_block();
#pragma unroll 1
        for (int r = 0; warp + r * kWarps < p.frames; ++r) {
            Weights weights = all[0];
#pragma unroll
            for (int i = 1; i < kRowsPerWarp; ++i)
                if (i == r) weights = all[i];
            write(warp + r * kWarps, weights);
        }
    }

    STIV_DEVICE float* key(int t, int i) const {
        return reinterpret_cast<float*>(keys + Rows::byte_offset(t, i * 4));
    }

    // Frame t's row of (batch, position), in rows of `width` elements.
    STIV_DEVICE int64_t row(int t) const {
        return (static_cast<int64_t>(batch) * p.frames + t) * p.positions + position;
    }

    STIV_DEVICE float element(int matrix, int t, int i) const {
        const int64_t at = (static_cast<int64_t>(matrix) * p.heads + head) * kHeadDim + i;
        const float x = load_constant<float>(p.qkv + row(t) * 3 * p.heads * kHeadDim + at);
        return p.bias ? x + load_constant<float>(p.bias + at) : x;
    }

    template <class Store>
    STIV_DEVICE void normalize(int matrix, int t, const Store& store) const {
        const float* gamma = matrix ? p.k_gamma : p.q_gamma;
        float first[(kHalf + kWarp - 1) / kWarp], second[(kHalf + kWarp - 1) / kWarp], squares = 0.0f;
#pragma unroll
        for (int j = 0; j * kWarp < kHalf; ++j) {
            const int i = lane + j * kWarp;
            first[j] = i < kHalf ? element(matrix, t, i) : 0.0f;
            second[j] = i < kHalf ? element(matrix, t, i + kHalf) : 0.0f;
            squares = fused_multiply_add(first[j], first[j], squares);
            squares = fused_multiply_add(second[j], second[j], squares);
        }
        squares = sum_over_row<kWarp>(squares, 0);
        const float scale = reciprocal_root(fused_multiply_add(squares, 1.0f / kHeadDim, p.epsilon));
#pragma unroll
        for (int j = 0; j * kWarp < kHalf; ++j) {
            const int i = lane + j * kWarp;
            if (i >= kHalf) continue;
            const float y1 = first[j] * scale * load_constant<float>(gamma + i);
            const float y2 = second[j] * scale * load_constant<float>(gamma + i + kHalf);
            const float cosine = load_constant<float>(p.cos + t * kHalf + i);
            const float sine = load_constant<float>(p.sin + t * kHalf + i);
            store(i, fused_multiply_add(y1, cosine, -(y2 * sine)));
            store(i + kHalf, fused_multiply_add(y1, sine, y2 * cosine));
        }
    }

    STIV_DEVICE float logit(int other) const {
        if (other >= p.frames) return -__builtin_huge_valf();
        float sum = 0.0f;
#pragma unroll 4
        for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
            const auto k = *reinterpret_cast<const Floats4*>(keys + Rows::chunk_offset(other, chunk));
            const auto q = *reinterpret_cast<const Floats4*>(query + chunk * 4);
            sum = fused_multiply_add(q.x, k.x, sum);
            sum = fused_multiply_add(q.y, k.y, sum);
            sum = fused_multiply_add(q.z, k.z, sum);
            sum = fused_multiply_add(q.w, k.w, sum);
        }
        return sum * static_cast<float>(inverse_root(kHeadDim));
    }

    STIV_DEVICE Weights attend(int t) const {
        sync_warp();
        normalize(0, t, [&](int i, float x) { query[i] = x; });
        sync_warp();
        const float logits[2] = {logit(lane), logit(lane + kWarp)};
        float most = maximum(logits[0], logits[1]);
        for (int mask = 1; mask < kWarp; mask *= 2) most = maximum(most, shuffle_xor(most, mask));
        const float first = lane < p.frames ? exponential(logits[0] - most) : 0.0f;
        const float second = lane + kWarp < p.frames ? exponential(logits[1] - most) : 0.0f;
        return {first, second, 1.0f / sum_over_row<kWarp>(first + second, 0)};
    }

    STIV_DEVICE void write(int t, const Weights& weights) const {
        float sums[kColumns] = {};
        for (int other = 0; other < p.frames; ++other) {
            const float weight = shuffle(other < kWarp ? weights.first : weights.second, other % kWarp);
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                const int i = lane + c * kWarp;
                if (i < kHeadDim) sums[c] = fused_multiply_add(weight, *key(other, i), sums[c]);
            }
        }
        const int64_t at = row(t) * p.heads * kHeadDim + static_cast<int64_t>(head) * kHeadDim;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const int i = lane + c * kWarp;
            if (i >= kHeadDim) continue;
            const float x = sums[c] * weights.scale;
            if (p.output_scale) {
                const float scaled = x * (1.0f / load_constant<float>(p.output_scale));
                static_cast<uint8_t*>(p.output)[at + i] = static_cast<uint8_t>(pack_e4m3(scaled, 0.0f));
            } else {
                static_cast<float*>(p.output)[at + i] = x;
            }
        }
    }
};

}  // namespace stiv
