// Attributes of a plugin: from TensorRT's fields, checked, and back into fields for the engine file.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <string>

#include "plugin_schema.h"

namespace stiv {

class Attributes {
public:
    // Throws PluginError on an unknown, missing or mistyped attribute. Python gives int64 and fp64: they are taken too.
    Attributes(const PluginSpec& spec, const nvinfer1::PluginFieldCollection* fields);

    int32_t integer(const char* name) const { return values_[index(name)].integer; }
    float real(const char* name) const { return values_[index(name)].real; }

    // Fields that point into this object.
    std::array<nvinfer1::PluginField, kMaximumAttributes> fields() const;

    // "heads=18,epsilon=9.99999997e-07": exact, so equal text means equal attributes.
    std::string text() const;

private:
    union Value {
        int32_t integer;
        float real;
    };

    int index(const char* name) const;
    void read(const nvinfer1::PluginField& field);

    const PluginSpec& spec_;
    std::array<Value, kMaximumAttributes> values_;
};

// What a creator says about its plugin's attributes: names and types, no values.
std::array<nvinfer1::PluginField, kMaximumAttributes> field_names(const PluginSpec& spec);

}  // namespace stiv
