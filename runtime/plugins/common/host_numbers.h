// 16-bit and 8-bit floating point on the host, by bits: what cuda_device.h gets from CUDA's conversions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace stiv {

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest >= 0x0400u) return bits_float(sign | ((rest << 13) + 0x38000000u));
    const float subnormal = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -subnormal : subnormal;
}

// x is rounded to nearest, ties to even, at `unit`, a power of two: adding 1.5 * 2^23 units leaves no smaller bit.
inline float round_to(float x, float unit) {
    const float shift = unit * 0x1.8p23f;
    volatile float sum = x + shift;
    return sum - shift;
}

inline uint16_t from_float(BFloat16, float value) {
    const uint32_t bits = float_bits(value);
    if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline uint16_t from_float(Float16, float value) {
    const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffu;
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
    if (magnitude < 0x38800000u)  // subnormal: whole multiples of 2^-24
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(round_to(bits_float(magnitude), 0x1p-24f) * 0x1p24f));
    magnitude += 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | (magnitude - 0x38000000u) >> 13);
}

// Rounded to nearest even; beyond 448 saturated; NaN stays NaN.
inline uint8_t to_e4m3(float value) {
    const uint32_t sign = float_bits(value) >> 24 & 0x80u;
    float magnitude = std::fabs(value);
    if (std::isnan(value)) return 0x7fu;
    if (magnitude >= 448.0f) return static_cast<uint8_t>(sign | 0x7eu);
    if (magnitude < 0x1p-6f)  // subnormal: whole multiples of 2^-9
        return static_cast<uint8_t>(sign | static_cast<uint32_t>(round_to(magnitude, 0x1p-9f) * 512));
    uint32_t bits = float_bits(magnitude);
    bits += 0x7ffffu + (bits >> 20 & 1u);
    return static_cast<uint8_t>(sign | (bits - 0x3c000000u) >> 20);
}

template <class Number>
void unpack(Number, uint32_t word, float& low, float& high) {
    low = to_float(Number{static_cast<uint16_t>(word)});
    high = to_float(Number{static_cast<uint16_t>(word >> 16)});
}

template <class Number>
uint32_t pack(Number number, float low, float high) {
    return from_float(number, low) | static_cast<uint32_t>(from_float(number, high)) << 16;
}

inline uint16_t pack_e4m3(float low, float high) {
    return static_cast<uint16_t>(to_e4m3(low) | to_e4m3(high) << 8);
}

}  // namespace stiv
