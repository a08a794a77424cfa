// How work is cut into thread blocks: pure functions of sizes, no CUDA, tested on the host.
//
// Why these numbers. Temporal attention moves 8 bytes per element of D and does T / 2 flop per byte, far below what a
// GPU can do, so a block only has to keep memory busy. Little's law: 4.8 TB/s times 0.8 us of latency is 29 KB in
// flight on each of 132 SMs. A block asks for all of its q, k, v at once by cp.async (no registers held) and an SM
// has room for four or five blocks of up to 40 KB (A100 four, H100 and B200 five, Ada and RTX 50 two for their lower
// rate), so that some load while others compute. Within 48 KB no opt-in is needed, which the quickly deployable
// plugin cannot make. A segment (the heads of a block in one row) should fill whole 32-byte sectors: two heads of 72
// do, one does not.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace stiv {

constexpr int kBlockThreads = 128;       // of the 16-bit kernels and of pre-processing
constexpr int kScalarThreads = 256;      // of fp32 temporal attention
constexpr int kMaximumFrames = 64;
constexpr int kMaximumItems = 64;        // heads times positions of a block
constexpr int kSharedBudget = 40 << 10;
constexpr int kFewBlocks = 512;          // fewer than this leave SMs idle: smaller blocks then
constexpr int kSpatialTokens = 16;       // rows of a tile in pre-processing

constexpr bool supported_head_dim(int64_t head_dim) {
    return head_dim == 32 || head_dim == 48 || head_dim == 64 || head_dim == 72 || head_dim == 96 || head_dim == 128;
}

// Blocks on an SM that the compiler leaves registers for: as many as do without spills on every GPU. 72 has the largest
// share of a row in a lane.
constexpr int blocks_per_sm(int head_dim, int tiles) {
    if (head_dim == 72) return tiles > 2 ? 3 : 4;
    return (head_dim == 64 || head_dim == 128) && tiles < 3 ? 5 : 4;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes from one row to the next in shared memory; Tile::kPitch at run time.
constexpr int row_pitch(int head_dim, int element_bytes) {
    const int chunks = head_dim * element_bytes / 16;
    return (chunks + (chunks % 16 == 0 || chunks == 4 || chunks % 2 ? 0 : 1)) * 16;
}

// Lanes that share a row in the norm's pass; RowLanes::kLanes at run time.
constexpr int lanes_per_row(int head_dim) {
    return head_dim == 48 || head_dim == 72 ? 3 : head_dim == 96 ? 6 : head_dim == 128 ? 8 : 4;
}

// Useful part of what a row segment of `heads` moves, in sectors, and of what the last group of heads would hold.
constexpr double segment_efficiency(int64_t all_heads, int64_t heads, int head_bytes) {
    const int64_t bytes = heads * head_bytes;
    const int64_t moved = bytes % 32 == 0 ? bytes : bytes + 32;
    return static_cast<double>(bytes) / static_cast<double>(moved) * static_cast<double>(all_heads) /
           static_cast<double>(ceil_div(all_heads, heads) * heads);
}

// Most useful number of heads up to `most`; the largest of equals.
constexpr int choose_heads(int64_t all_heads, int64_t most, int head_bytes) {
    int64_t best = 1;
    for (int64_t heads = 1; heads <= most && heads <= all_heads; ++heads)
        if (segment_efficiency(all_heads, heads, head_bytes) >= segment_efficiency(all_heads, best, head_bytes))
            best = heads;
    return static_cast<int>(best);
}

// Parts of the items for the norm's pass: least rounds of row groups, a part costing half an item of set-up.
constexpr int choose_splits(int rows_of_kinds, int items, int head_dim, int threads) {
    const int groups = threads / 32 * (32 / lanes_per_row(head_dim));
    int best = 1;
    double best_cost = 0;
    for (int splits = 1; splits <= items; splits *= 2) {
        const double cost =
            static_cast<double>(ceil_div(rows_of_kinds * splits, groups)) *
            (static_cast<double>(ceil_div(items, splits)) + 0.5);
        if (splits == 1 || cost < best_cost) {
            best = splits;
            best_cost = cost;
        }
    }
    return best;
}

// 16-bit temporal attention.
constexpr StivPlan plan_tiles(int64_t batch, int frames, int64_t positions, int64_t all_heads, int head_dim) {
    const int pitch = row_pitch(head_dim, 2), item_bytes = 3 * frames * pitch;
    const int64_t fitting = item_bytes > kSharedBudget ? 1 : kSharedBudget / item_bytes;
    const int64_t most = fitting < kMaximumItems ? fitting : kMaximumItems;
    int64_t heads = choose_heads(all_heads, most, head_dim * 2);
    int64_t group = most / heads < positions ? most / heads : positions;
    const auto blocks = [&] { return batch * ceil_div(positions, group) * ceil_div(all_heads, heads); };
    while (group > 1 && blocks() < kFewBlocks) group = (group + 1) / 2;
    StivPlan plan{};
    plan.blocks = blocks();
    plan.threads = kBlockThreads;
    plan.heads_per_block = static_cast<int>(heads);
    plan.positions_per_block = static_cast<int>(group);
    const int items = plan.heads_per_block * plan.positions_per_block;
    plan.shared_bytes = items * item_bytes + (frames % 16 ? head_dim * 2 : 0);  // and a row of zeros behind v
    plan.splits = choose_splits(2 * frames, items, head_dim, kBlockThreads);
    plan.tiles = static_cast<int>(ceil_div(frames, 16));
    return plan;
}

// fp32 temporal attention: a block per (b, s, head); k, then v, and a row of q for each warp in shared memory.
constexpr StivPlan plan_scalar(int64_t batch, int frames, int64_t positions, int64_t all_heads, int head_dim) {
    StivPlan plan{};
    plan.blocks = batch * positions * all_heads;
    plan.threads = kScalarThreads;
    plan.heads_per_block = plan.positions_per_block = plan.splits = 1;
    plan.shared_bytes = frames * row_pitch(head_dim, 4) + kScalarThreads / 32 * head_dim * 4;
    return plan;
}

constexpr StivPlan plan_spatial(int64_t rows, int64_t positions, int64_t all_heads, int head_dim, int element_bytes,
                                bool with_v) {
    StivPlan plan{};
    const int tokens = static_cast<int>(positions < kSpatialTokens ? positions : kSpatialTokens);
    const int head_bytes = 3 * tokens * row_pitch(head_dim, element_bytes);
    const int64_t most = head_bytes > kSharedBudget ? 1 : kSharedBudget / head_bytes;
    plan.heads_per_block =
        choose_heads(all_heads, most < kMaximumItems ? most : kMaximumItems, head_dim * element_bytes);
    plan.positions_per_block = tokens;
    plan.blocks = rows * ceil_div(positions, tokens) * ceil_div(all_heads, plan.heads_per_block);
    plan.threads = kBlockThreads;
    plan.shared_bytes = plan.heads_per_block * head_bytes;
    plan.splits = choose_splits((with_v ? 3 : 2) * tokens, plan.heads_per_block, head_dim, kBlockThreads);
    return plan;
}

}  // namespace stiv
