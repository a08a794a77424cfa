// Bias, RMS norm and RoPE of the q and k rows of a block, in place in shared memory; fp32 arithmetic, one rounding.
#pragma once

#include "../common/tile.h"

namespace stiv {

// x^-0.5 by Newton's method, at compile time.
STIV_HOST_DEVICE constexpr double inverse_root(double x) {
    double y = 0.1;
    for (int i = 0; i < 20; ++i) y *= 1.5 - 0.5 * x * y * y;
    return y;
}

// How the lanes of a warp share rows: kLanes lanes take a row, kUnits units of kWidth elements from each half of it (a
// pair of the rotation is in one lane). A unit is 16 bytes where the halves are made of such. 48, 72 = 3 lanes x 3
// units x 2 halves and 96 leave two lanes idle.
template <class Number, int kHeadDim>
struct RowLanes {
    static constexpr int kWidth = sizeof(Number) == 4 || kHeadDim == 32 || kHeadDim == 72 ? 4 : 8;
    static constexpr int kUnitBytes = kWidth * static_cast<int>(sizeof(Number));
    static constexpr int kPairs = kHeadDim / 2 / kWidth;
    static constexpr int kLanes = kHeadDim == 48 || kHeadDim == 72 ? 3 : kHeadDim == 96 ? 6 : kHeadDim == 128 ? 8 : 4;
    static constexpr int kUnits = kPairs / kLanes;
    static constexpr int kGroups = kWarp / kLanes;
    static_assert(kLanes * kUnits == kPairs, "a row is shared evenly");
};

// Sum over the lanes of a row, the same bits in each of them.
template <int kLanes>
STIV_DEVICE float sum_over_row(float x, int first_lane) {
    if constexpr (kLanes % 3 == 0) {
        if constexpr (kLanes == 6) x += shuffle(x, first_lane + (thread_index() % kWarp - first_lane + 3) % 6);
        return shuffle(x, first_lane) + shuffle(x, first_lane + 1) + shuffle(x, first_lane + 2);
    } else {
        for (int mask = 1; mask < kLanes; mask *= 2) x += shuffle_xor(x, mask);
        return x;
    }
}

// What rows become: the tile's own type, or FP8 at the start of the row's bytes.
struct RowOutput {
    bool fp8;
    float factor[3];  // of q, k, v
};

template <class Number, int kHeadDim, int kWidth>
STIV_DEVICE void store_row_unit(unsigned char* item, int row, int unit, const float (&x)[kWidth], bool fp8) {
    using Rows = Tile<Number, kHeadDim>;
    if (fp8) {
        auto* to = reinterpret_cast<uint32_t*>(item + Rows::byte_offset(row, unit * kWidth));
#pragma unroll
        for (int e = 0; e < kWidth; e += 4)
            to[e / 4] = pack_e4m3(x[e], x[e + 1]) | static_cast<uint32_t>(pack_e4m3(x[e + 2], x[e + 3])) << 16;
    } else {
        using Units = Unit<Number, kWidth>;
        constexpr int kBytes = kWidth * static_cast<int>(sizeof(Number));
        *reinterpret_cast<typename Units::Words*>(item + Rows::byte_offset(row, unit * kBytes)) = Units::pack_words(x);
    }
}

template <class Number>
struct NormRope {
    const Number* bias;  // [3, H, Dh] at the block's first head, or null
    const Number* q_gamma;
    const Number* k_gamma;
    const Number* cos;  // [., Dh / 2] at the block's first row
    const Number* sin;
    int64_t bias_stride;  // H * Dh
    float epsilon;
};

// One lane's share of rotation and scale for a row index t: gamma is folded into the table, as both are the same for
// all heads and positions of a block. first' = y1 * a - y2 * b, second' = y1 * c + y2 * d.
template <class Number, int kHeadDim>
struct Rotation {
    using Lanes = RowLanes<Number, kHeadDim>;
    static constexpr int kUnits = Lanes::kUnits, kWidth = Lanes::kWidth;
    float a[kUnits][kWidth], b[kUnits][kWidth], c[kUnits][kWidth], d[kUnits][kWidth];

    STIV_DEVICE void load(const NormRope<Number>& norm, int kind, int t, int sub) {
        constexpr int kHalf = kHeadDim / 2;
#pragma unroll
        for (int j = 0; j < kUnits; ++j) {
            const int at = (sub + j * Lanes::kLanes) * kWidth;
            const Number* gamma = kind == 0 ? norm.q_gamma : norm.k_gamma;
            float g1[kWidth], g2[kWidth], cosine[kWidth], sine[kWidth];
            load_constant_unit<Number>(gamma + at, g1);
            load_constant_unit<Number>(gamma + kHalf + at, g2);
            load_constant_unit<Number>(norm.cos + t * kHalf + at, cosine);
            load_constant_unit<Number>(norm.sin + t * kHalf + at, sine);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                a[j][i] = g1[i] * cosine[i];
                b[j][i] = g2[i] * sine[i];
                c[j][i] = g1[i] * sine[i];
                d[j][i] = g2[i] * cosine[i];
            }
        }
    }

    STIV_DEVICE void apply(int j, float scale, float (&first)[kWidth], float (&second)[kWidth]) const {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const float y1 = first[i] * scale, y2 = second[i] * scale;
            first[i] = fused_multiply_add(y1, a[j][i], -(y2 * b[j][i]));
            second[i] = fused_multiply_add(y1, c[j][i], y2 * d[j][i]);
        }
    }
};

template <class Number, int kWidth>
STIV_DEVICE void add_bias(const Number* bias, float (&x)[kWidth]) {
    float addend[kWidth];
    load_constant_unit<Number>(bias, addend);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] += addend[i];
}

// A group's piece of work: the rows (kind, t) of the items first_item.. in one split.
struct RowTask {
    bool active;
    int kind, t, first_item;

    STIV_DEVICE RowTask(int task, int tasks, bool has_lanes, int kinds, int rows, Divisor by_rows, int per_split) {
        active = has_lanes && task < tasks;
        const int line = active ? by_rows.quotient(task) : 0;
        t = active ? task - line * rows : 0;
        kind = line % kinds;
        first_item = line / kinds * per_split;
    }
};

// Normalizes and rotates the rows of q and k (kinds 0 and 1); kind 2, v, only gets bias and output type. A group of
// lanes takes a (t, kind) and goes through a `splits`-th of the items with the rotation in registers. All warps call;
// `wait` returns when the rows are in shared memory: the first rotation is fetched before.
template <class Number, int kHeadDim, bool kPlainOutput, class Wait>
STIV_DEVICE void normalize_rows(unsigned char* shared, const Block& block, const NormRope<Number>& norm, int kinds,
                                int splits, int threads, const RowOutput& output, const Wait& wait) {
    using Rows = Tile<Number, kHeadDim>;
    using Lanes = RowLanes<Number, kHeadDim>;
    constexpr int kUnits = Lanes::kUnits, kWidth = Lanes::kWidth;
    const int lane = lane_index(), group = lane / Lanes::kLanes, sub = lane % Lanes::kLanes;
    const int first_lane = group < Lanes::kGroups ? lane - sub : 0;
    const int per_split = Divisor(splits).quotient(block.items() + splits - 1), tasks = kinds * block.rows * splits;
    const int step = threads / kWarp * Lanes::kGroups;
    const Divisor by_rows(block.rows), by_heads(block.heads);
    const auto task_at = [&](int start) {
        return RowTask(start + group, tasks, group < Lanes::kGroups, kinds, block.rows, by_rows, per_split);
    };
    int start = warp_index() * Lanes::kGroups;
    RowTask task = task_at(start);
    Rotation<Number, kHeadDim> rotation;
    rotation.load(norm, task.kind, task.t, sub);
    wait();
#pragma unroll 1
    while (start < tasks) {
        const bool active = task.active;
        const int kind = task.kind, t = task.t, first_item = task.first_item;
        int head = first_item - by_heads.quotient(first_item) * block.heads;
        unsigned char* item = shared + block.first_row(kind, first_item) * Rows::kPitch;
#pragma unroll 1
        for (int i = 0; i < per_split; ++i) {
            const bool valid = active && first_item + i < block.items();
            float first[kUnits][kWidth], second[kUnits][kWidth], squares = 0.0f;
            if (valid) {
#pragma unroll
                for (int j = 0; j < kUnits; ++j) {
                    const int unit = sub + j * Lanes::kLanes;
                    load_unit<Number>(item + Rows::byte_offset(t, unit * Lanes::kUnitBytes), first[j]);
                    load_unit<Number>(item + Rows::byte_offset(t, (unit + Lanes::kPairs) * Lanes::kUnitBytes),
                                      second[j]);
                }
                if (norm.bias) {
                    const Number* const bias_of_lane = norm.bias + kind * norm.bias_stride + sub * kWidth;
                    const Number* const bias = bias_of_lane + head * kHeadDim;
#pragma unroll
                    for (int j = 0; j < kUnits; ++j) {
                        add_bias(bias + j * Lanes::kLanes * kWidth, first[j]);
                        add_bias(bias + j * Lanes::kLanes * kWidth + kHeadDim / 2, second[j]);
                    }
                }
#pragma unroll
                for (int j = 0; j < kUnits; ++j) {
#pragma unroll
                    for (int e = 0; e < kWidth; ++e) {
                        squares = fused_multiply_add(first[j][e], first[j][e], squares);
                        squares = fused_multiply_add(second[j][e], second[j][e], squares);
                    }
                }
            }
            squares = sum_over_row<Lanes::kLanes>(squares, first_lane);
            const float scale = reciprocal_root(fused_multiply_add(squares, 1.0f / kHeadDim, norm.epsilon));
            if (!kPlainOutput) sync_warp();  // FP8 rows are written over bytes that other lanes have read
            if (valid) {
#pragma unroll
                for (int j = 0; j < kUnits; ++j) {
                    const int unit = sub + j * Lanes::kLanes;
                    if (kind < 2) rotation.apply(j, scale, first[j], second[j]);
                    if (!kPlainOutput) {
                        const float factor =
                            kind == 0 ? output.factor[0] : kind == 1 ? output.factor[1] : output.factor[2];
#pragma unroll
                        for (int e = 0; e < kWidth; ++e) {
                            first[j][e] *= factor;
                            second[j][e] *= factor;
                        }
                    }
                    store_row_unit<Number, kHeadDim>(item, t, unit, first[j], !kPlainOutput && output.fp8);
                    store_row_unit<Number, kHeadDim>(item, t, unit + Lanes::kPairs, second[j],
                                                     !kPlainOutput && output.fp8);
                }
            }
            if (++head == block.heads) head = 0;
            item += block.rows * Rows::kPitch;
        }
        start += step;
        task = task_at(start);
        if (start < tasks) rotation.load(norm, task.kind, task.t, sub);
    }
}

}  // namespace stiv
