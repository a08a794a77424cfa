#include "oracle.h"

#include <algorithm>
#include <cmath>

namespace harness {
namespace {

using Row = std::vector<double>;

constexpr double kFloat = 0x1p-24;

double norm(const Row& row) {
    double squares = 0;
    for (const double x : row) squares += x * x;
    return std::sqrt(squares);
}

// The row of q, k or v (kinds 0, 1, 2) with its bias.
Row biased(const Inputs& in, int64_t b, int64_t t, int64_t s, int kind, int64_t h) {
    Row row(in.head_dim);
    const int64_t column = (kind * in.heads + h) * in.head_dim;
    const int64_t start = ((b * in.frames + t) * in.positions + s) * 3 * in.heads * in.head_dim + column;
    for (int64_t d = 0; d < in.head_dim; ++d) row[d] = in.qkv[start + d] + in.bias[column + d];
    return row;
}

Row normalized(const Inputs& in, Row row, const Row& gamma, int64_t rope_row) {
    const int64_t half = in.head_dim / 2;
    const double length = norm(row), scale = 1 / std::sqrt(length * length / in.head_dim + in.epsilon);
    for (int64_t d = 0; d < in.head_dim; ++d) row[d] *= scale * gamma[d];
    Row rotated(in.head_dim);
    for (int64_t i = 0; i < half; ++i) {
        const double cosine = in.cos[rope_row * half + i], sine = in.sin[rope_row * half + i];
        rotated[i] = row[i] * cosine - row[i + half] * sine;
        rotated[i + half] = row[i] * sine + row[i + half] * cosine;
    }
    return rotated;
}

// Attention of one (b, s, head). A logit is off by at most |q| |k| Dh^-0.5 (2 u + 4 Dh fp32 roundoffs: rounding of q
// and k, norms and sums), so a probability by a factor of exp(twice that); P, bias and output are rounded once each.
void attend(const Inputs& in, int64_t b, int64_t s, int64_t h, double roundoff, Expected& out) {
    std::vector<Row> q, k, v;
    double q_norm = 0, k_norm = 0, largest = 0;
    for (int64_t t = 0; t < in.frames; ++t) {
        q.push_back(normalized(in, biased(in, b, t, s, 0, h), in.q_gamma, t));
        k.push_back(normalized(in, biased(in, b, t, s, 1, h), in.k_gamma, t));
        v.push_back(biased(in, b, t, s, 2, h));
        q_norm = std::max(q_norm, norm(q.back()));
        k_norm = std::max(k_norm, norm(k.back()));
        for (int64_t d = 0; d < in.head_dim; ++d) {
            const double bias = std::fabs(in.bias[(2 * in.heads + h) * in.head_dim + d]);
            largest = std::max(largest, std::fabs(v.back()[d]) + 2 * bias);  // bias and v - bias may be added apart
        }
    }
    const double root = 1 / std::sqrt(static_cast<double>(in.head_dim));
    const double logit_error = q_norm * k_norm * root * (2 * roundoff + 4 * static_cast<double>(in.head_dim) * kFloat);
    const double sums = 4 * roundoff + 2 * static_cast<double>(in.frames) * kFloat;
    const double bound = largest * (std::expm1(2 * logit_error) + sums);
    for (int64_t t = 0; t < in.frames; ++t) {
        Row weight(in.frames);
        double total = 0, most = -INFINITY;
        for (int64_t u = 0; u < in.frames; ++u) {
            for (int64_t d = 0; d < in.head_dim; ++d) weight[u] += q[t][d] * k[u][d] * root;
            most = std::max(most, weight[u]);
        }
        for (double& x : weight) total += x = std::exp(x - most);
        const int64_t start = (((b * in.frames + t) * in.positions + s) * in.heads + h) * in.head_dim;
        for (int64_t d = 0; d < in.head_dim; ++d) {
            double sum = 0;
            for (int64_t u = 0; u < in.frames; ++u) sum += weight[u] / total * v[u][d];
            out.value[start + d] = sum;
            out.bound[start + d] = bound;
        }
    }
}

}  // namespace

Expected temporal_attention(const Inputs& in, double roundoff) {
    const int64_t count = in.batch * in.frames * in.positions * in.heads * in.head_dim;
    Expected out{Row(count), Row(count)};
    for (int64_t b = 0; b < in.batch; ++b)
        for (int64_t s = 0; s < in.positions; ++s)
            for (int64_t h = 0; h < in.heads; ++h) attend(in, b, s, h, roundoff, out);
    return out;
}

std::vector<Expected> spatial_qkv(const Inputs& in, double roundoff) {
    const int64_t count = in.batch * in.positions * in.heads * in.head_dim;
    std::vector<Expected> out(3, Expected{Row(count), Row(count)});
    for (int kind = 0; kind < 3; ++kind)
        for (int64_t n = 0; n < in.batch; ++n)
            for (int64_t s = 0; s < in.positions; ++s)
                for (int64_t h = 0; h < in.heads; ++h) {
                    Row row = biased(in, n, 0, s, kind, h);
                    if (kind < 2) row = normalized(in, row, kind ? in.k_gamma : in.q_gamma, s);
                    if (kind == 0)
                        for (double& x : row) x *= in.query_scale;
                    // One rounding to the type; in fp32 sums of Dh numbers, relative to the whole row as the rotation
                    // subtracts.
                    const double row_error = norm(row) * (static_cast<double>(in.head_dim) + 16) * kFloat;
                    const int64_t start = ((n * in.heads + h) * in.positions + s) * in.head_dim;
                    for (int64_t d = 0; d < in.head_dim; ++d) {
                        out[kind].value[start + d] = row[d];
                        out[kind].bound[start + d] = std::fabs(row[d]) * roundoff + row_error;
                    }
                }
    return out;
}

void quantize(Expected& expected, double scale) {
    for (size_t i = 0; i < expected.value.size(); ++i) {
        expected.value[i] = std::clamp(expected.value[i], -448 * scale, 448 * scale);
        const double most = std::fabs(expected.value[i]) + expected.bound[i];
        expected.bound[i] += std::max(most * 0x1p-4, scale * 0x1p-10);
    }
}

}  // namespace harness
