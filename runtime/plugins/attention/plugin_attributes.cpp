#include "plugin_attributes.h"

#include <cmath>
#include <cstdio>
#include <cstring>

#include "plugin_log.h"

namespace stiv {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

PluginFieldType field_type(const AttributeSpec& attribute) {
    return attribute.integer ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32;
}

template <class Number>
Number load(const void* data) {
    Number number;
    std::memcpy(&number, data, sizeof number);
    return number;
}

int32_t read_integer(const PluginField& field) {
    if (field.type != PluginFieldType::kINT32 && field.type != PluginFieldType::kINT64)
        throw PluginError(std::string(field.name) + " must be an integer, int32 or int64");
    const int64_t value =
        field.type == PluginFieldType::kINT64 ? load<int64_t>(field.data) : load<int32_t>(field.data);
    if (value < 1 || value > INT32_MAX)
        throw PluginError(std::string(field.name) + " is " + std::to_string(value) + ", want 1 to 2^31 - 1");
    return static_cast<int32_t>(value);
}

float read_real(const PluginField& field) {
    if (field.type != PluginFieldType::kFLOAT32 && field.type != PluginFieldType::kFLOAT64)
        throw PluginError(std::string(field.name) + " must be a float, fp32 or fp64");
    const float value = field.type == PluginFieldType::kFLOAT32 ? load<float>(field.data)
                                                                : static_cast<float>(load<double>(field.data));
    if (!std::isfinite(value)) throw PluginError(std::string(field.name) + " must be finite");
    return value;
}

}  // namespace

Attributes::Attributes(const PluginSpec& spec, const nvinfer1::PluginFieldCollection* fields) : spec_(spec), values_{} {
    bool given[kMaximumAttributes] = {};
    for (int32_t i = 0; fields && i < fields->nbFields; ++i) {
        read(fields->fields[i]);
        given[index(fields->fields[i].name)] = true;
    }
    for (int i = 0; i < spec.attribute_count; ++i) {
        if (given[i]) continue;
        if (spec.attributes[i].required)
            throw PluginError(std::string("attribute ") + spec.attributes[i].name + " is missing");
        values_[i].real = spec.attributes[i].fallback;
    }
}

int Attributes::index(const char* name) const {
    std::string known;
    for (int i = 0; i < spec_.attribute_count; ++i) {
        if (!std::strcmp(spec_.attributes[i].name, name)) return i;
        known += (i ? ", " : "") + std::string(spec_.attributes[i].name);
    }
    throw PluginError(std::string("unknown attribute ") + name + ", want " + known);
}

void Attributes::read(const PluginField& field) {
    if (!field.name) throw PluginError("an attribute has no name");
    const int at = index(field.name);
    if (!field.data || field.length != 1)
        throw PluginError(std::string(field.name) + " has " + std::to_string(field.data ? field.length : 0) +
                          " values, want one");
    if (spec_.attributes[at].integer)
        values_[at].integer = read_integer(field);
    else
        values_[at].real = read_real(field);
}

std::array<PluginField, kMaximumAttributes> Attributes::fields() const {
    std::array<PluginField, kMaximumAttributes> fields = field_names(spec_);
    for (int i = 0; i < spec_.attribute_count; ++i) fields[i].data = &values_[i];
    return fields;
}

std::string Attributes::text() const {
    std::string text;
    for (int i = 0; i < spec_.attribute_count; ++i) {
        char value[32];
        if (spec_.attributes[i].integer)
            std::snprintf(value, sizeof value, "%d", values_[i].integer);
        else
            std::snprintf(value, sizeof value, "%.9g", static_cast<double>(values_[i].real));
        text += std::string(i ? "," : "") + spec_.attributes[i].name + "=" + value;
    }
    return text;
}

std::array<PluginField, kMaximumAttributes> field_names(const PluginSpec& spec) {
    std::array<PluginField, kMaximumAttributes> fields;
    for (int i = 0; i < spec.attribute_count; ++i)
        fields[i] = PluginField(spec.attributes[i].name, nullptr, field_type(spec.attributes[i]), 1);
    return fields;
}

}  // namespace stiv
