// Numbers of the plugins' types, independent of the kernels. Only values that every type holds exactly are encoded.
#pragma once

#include <NvInferRuntime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace harness {

inline int size_of(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT: return 4;
        case nvinfer1::DataType::kFP8: return 1;
        default: return 2;
    }
}

// Unit roundoff, half the distance of 1 to the next number.
inline double roundoff(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT: return 0x1p-24;
        case nvinfer1::DataType::kHALF: return 0x1p-11;
        case nvinfer1::DataType::kBF16: return 0x1p-8;
        default: return 0x1p-4;
    }
}

// `value` is a multiple of 1/64 below 2: seven significant bits.
inline void encode(nvinfer1::DataType type, float value, unsigned char* at) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (type == nvinfer1::DataType::kFLOAT) {
        std::memcpy(at, &bits, 4);
        return;
    }
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (type == nvinfer1::DataType::kHALF)
        half = static_cast<uint16_t>((bits >> 16 & 0x8000u) |
                                     (value == 0 ? 0u : ((bits & 0x7fffffffu) - 0x38000000u) >> 13));
    std::memcpy(at, &half, 2);
}

inline double decode_fields(uint32_t sign, int exponent, double mantissa, int fraction_bits, int bias) {
    const double magnitude = exponent ? std::ldexp(1 + std::ldexp(mantissa, -fraction_bits), exponent - bias)
                                      : std::ldexp(mantissa, 1 - bias - fraction_bits);
    return sign ? -magnitude : magnitude;
}

inline double decode(nvinfer1::DataType type, const unsigned char* at) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    if (type == nvinfer1::DataType::kFP8) {
        const uint32_t bits = *at;
        if ((bits & 0x7fu) == 0x7fu) return nan;
        return decode_fields(bits >> 7, bits >> 3 & 15, bits & 7, 3, 7);
    }
    if (type == nvinfer1::DataType::kFLOAT) {
        float value;
        std::memcpy(&value, at, 4);
        return static_cast<double>(value);
    }
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    if (type == nvinfer1::DataType::kHALF) {
        if ((bits & 0x7c00u) == 0x7c00u) return nan;
        return decode_fields(bits >> 15, bits >> 10 & 31, bits & 1023, 10, 15);
    }
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return static_cast<double>(value);
}

}  // namespace harness
