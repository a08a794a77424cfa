// Written by `python -m stiv_deploy.runtime.plugins.spec_header` from runtime/plugins/spec.py: change that instead.
#pragma once

#include "plugin_schema.h"

namespace stiv {

constexpr const char* kPluginNamespace = "stiv";
constexpr const char* kPluginVersion = "1";

constexpr PluginSpec kStivTemporalAttention = {
    "StivTemporalAttention",
    6, 7, 1, 2,
    {
        {"qkv", 4, {{1, 1, false, Symbol::kB}, {1, 1, false, Symbol::kT}, {1, 1, false, Symbol::kS}, {3, 1, true, Symbol::kDh}}, ElementType::kInput},
        {"bias", 1, {{3, 1, true, Symbol::kDh}}, ElementType::kInput},
        {"q_gamma", 1, {{1, 1, false, Symbol::kDh}}, ElementType::kInput},
        {"k_gamma", 1, {{1, 1, false, Symbol::kDh}}, ElementType::kInput},
        {"cos", 2, {{1, 1, false, Symbol::kT}, {1, 2, false, Symbol::kDh}}, ElementType::kInput},
        {"sin", 2, {{1, 1, false, Symbol::kT}, {1, 2, false, Symbol::kDh}}, ElementType::kInput},
        {"output_scale", 0, {}, ElementType::kFloat32},
    },
    {
        {"y", 4, {{1, 1, false, Symbol::kB}, {1, 1, false, Symbol::kT}, {1, 1, false, Symbol::kS}, {1, 1, true, Symbol::kDh}}, ElementType::kInputOrFloat8},
    },
    {
        {"heads", true, true, 0.0f},
        {"epsilon", false, false, 1e-06f},
    },
};

constexpr PluginSpec kStivSpatialQkv = {
    "StivSpatialQkv",
    6, 9, 3, 3,
    {
        {"qkv", 3, {{1, 1, false, Symbol::kN}, {1, 1, false, Symbol::kS}, {3, 1, true, Symbol::kDh}}, ElementType::kInput},
        {"bias", 1, {{3, 1, true, Symbol::kDh}}, ElementType::kInput},
        {"q_gamma", 1, {{1, 1, false, Symbol::kDh}}, ElementType::kInput},
        {"k_gamma", 1, {{1, 1, false, Symbol::kDh}}, ElementType::kInput},
        {"cos", 2, {{1, 1, false, Symbol::kS}, {1, 2, false, Symbol::kDh}}, ElementType::kInput},
        {"sin", 2, {{1, 1, false, Symbol::kS}, {1, 2, false, Symbol::kDh}}, ElementType::kInput},
        {"q_scale", 0, {}, ElementType::kFloat32},
        {"k_scale", 0, {}, ElementType::kFloat32},
        {"v_scale", 0, {}, ElementType::kFloat32},
    },
    {
        {"q", 4, {{1, 1, false, Symbol::kN}, {1, 1, true, Symbol::kNone}, {1, 1, false, Symbol::kS}, {1, 1, false, Symbol::kDh}}, ElementType::kInputOrFloat8},
        {"k", 4, {{1, 1, false, Symbol::kN}, {1, 1, true, Symbol::kNone}, {1, 1, false, Symbol::kS}, {1, 1, false, Symbol::kDh}}, ElementType::kInputOrFloat8},
        {"v", 4, {{1, 1, false, Symbol::kN}, {1, 1, true, Symbol::kNone}, {1, 1, false, Symbol::kS}, {1, 1, false, Symbol::kDh}}, ElementType::kInputOrFloat8},
    },
    {
        {"heads", true, true, 0.0f},
        {"epsilon", false, false, 1e-06f},
        {"query_scale", false, false, 1.0f},
    },
};

}  // namespace stiv
