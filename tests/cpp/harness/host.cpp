#include "host.h"

#include <dlfcn.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace harness {

using nvinfer1::DimensionOperation;
using nvinfer1::IDimensionExpr;

Expression::Expression(int64_t value) : node_(std::make_unique<Node>()) {
    node_->value = value;
    mImpl = node_.get();
}

Expression::Expression(std::string symbol) : Expression(int64_t{-1}) { node_->symbol = std::move(symbol); }

Expression::Expression(DimensionOperation operation, const Expression& first, const Expression& second)
    : Expression(int64_t{-1}) {
    node_->operation = operation;
    node_->first = &first;
    node_->second = &second;
}

int64_t Expression::Node::evaluate(const Values& values) const {
    if (!symbol.empty()) return values.at(symbol);
    if (!first) return value;
    const int64_t a = first->evaluate(values), b = second->evaluate(values);
    switch (operation) {
        case DimensionOperation::kSUM: return a + b;
        case DimensionOperation::kPROD: return a * b;
        case DimensionOperation::kSUB: return a - b;
        case DimensionOperation::kMAX: return std::max(a, b);
        case DimensionOperation::kMIN: return std::min(a, b);
        case DimensionOperation::kEQUAL: return a == b;
        case DimensionOperation::kLESS: return a < b;
        case DimensionOperation::kFLOOR_DIV: return a / b;
        case DimensionOperation::kCEIL_DIV: return (a + b - 1) / b;
    }
    return -1;
}

const IDimensionExpr* ExpressionBuilder::constant(int64_t value) {
    owned_.push_back(std::make_unique<Expression>(value));
    return owned_.back().get();
}

const IDimensionExpr* ExpressionBuilder::operation(DimensionOperation operation, const IDimensionExpr& first,
                                                   const IDimensionExpr& second) {
    owned_.push_back(std::make_unique<Expression>(operation, static_cast<const Expression&>(first),
                                                  static_cast<const Expression&>(second)));
    return owned_.back().get();
}

nvinfer1::DimsExprs ExpressionBuilder::shape(const std::vector<std::string>& sizes) {
    nvinfer1::DimsExprs shape{};
    for (const std::string& size : sizes) {
        const bool number = std::isdigit(static_cast<unsigned char>(size[0]));
        owned_.push_back(number ? std::make_unique<Expression>(int64_t{std::stoll(size)})
                                : std::make_unique<Expression>(size));
        shape.d[shape.nbDims++] = owned_.back().get();
    }
    return shape;
}

std::vector<int64_t> evaluate(const nvinfer1::DimsExprs& shape, const Values& values) {
    std::vector<int64_t> sizes;
    for (int i = 0; i < shape.nbDims; ++i)
        sizes.push_back(static_cast<const Expression*>(shape.d[i])->evaluate(values));
    return sizes;
}

nvinfer1::Dims dims(const std::vector<int64_t>& sizes) {
    nvinfer1::Dims dims{};
    for (const int64_t size : sizes) dims.d[dims.nbDims++] = size;
    return dims;
}

namespace {

template <class Function>
Function symbol(void* handle, const char* name) {
    void* address = dlsym(handle, name);
    if (!address) {
        std::fprintf(stderr, "error: the library does not export %s\n", name);
        std::exit(2);
    }
    return reinterpret_cast<Function>(address);
}

}  // namespace

Library::Library(const char* path) {
    void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);  // RTLD_NOW: an undefined symbol shows here
    if (!handle) {
        std::fprintf(stderr, "error: %s\n", dlerror());
        std::exit(2);
    }
    set_logger_finder_ = symbol<void (*)(nvinfer1::ILoggerFinder*)>(handle, "setLoggerFinder");
    const auto get_creators = symbol<nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&)>(handle, "getCreators");
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* creators = get_creators(count);
    for (int32_t i = 0; i < count; ++i)
        if (!std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE"))
            creators_.push_back(static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]));
}

nvinfer1::IPluginCreatorV3One& Library::creator(const std::string& name) const {
    for (nvinfer1::IPluginCreatorV3One* creator : creators_)
        if (name == creator->getPluginName()) return *creator;
    std::fprintf(stderr, "error: the library has no plugin %s\n", name.c_str());
    std::exit(2);
}

Plugin::Plugin(nvinfer1::IPluginV3* created) : object(created) {
    using Type = nvinfer1::PluginCapabilityType;
    if (!created) return;
    core = static_cast<nvinfer1::IPluginV3OneCore*>(created->getCapabilityInterface(Type::kCORE));
    build = static_cast<nvinfer1::IPluginV3OneBuild*>(created->getCapabilityInterface(Type::kBUILD));
    runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(created->getCapabilityInterface(Type::kRUNTIME));
}

std::map<std::string, double> Plugin::serialized() const {
    std::map<std::string, double> values;
    const nvinfer1::PluginFieldCollection* fields = runtime->getFieldsToSerialize();
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        const nvinfer1::PluginField& field = fields->fields[i];
        values[field.name] = field.type == nvinfer1::PluginFieldType::kINT32
                                 ? static_cast<double>(*static_cast<const int32_t*>(field.data))
                                 : static_cast<double>(*static_cast<const float*>(field.data));
    }
    return values;
}

void Report::check(const std::string& name, bool passed, const std::string& detail) {
    std::printf("%s %s%s%s\n", passed ? "ok" : "FAIL", name.c_str(), passed || detail.empty() ? "" : ": ",
                passed ? "" : detail.c_str());
    failures_ += !passed;
}

void Report::says(const std::string& name, bool refused, const std::string& text, const std::string& part) {
    check(name, refused && text.find(part) != std::string::npos && std::count(text.begin(), text.end(), '\n') == 1,
          (refused ? "refused" : "accepted") + std::string(" with '") + text + "', want '" + part + "'");
}

}  // namespace harness

// plugin_harness <plugin library> describe | build | enqueue
int main(int count, char** arguments) {
    const std::string command = count == 3 ? arguments[2] : "";
    if (command != "describe" && command != "build" && command != "enqueue") {
        std::fprintf(stderr, "error: give a plugin library and one of describe, build, enqueue\n");
        return 2;
    }
    harness::Logger logger;
    harness::LoggerFinder finder(logger);
    harness::Report report;
    const harness::Library library(arguments[1]);
    if (command == "describe") {
        harness::describe(library);
        return 0;
    }
    // While TensorRT has given no logger, errors go to stderr.
    harness::Plugin(library.creators().front()->createPlugin("node", nullptr, nvinfer1::TensorRTPhase::kBUILD));
    library.set_logger_finder(&finder);
    if (command == "build") {
        harness::check_creators(library, logger, report);
        harness::check_build(library, logger, report);
    } else {
        harness::check_enqueue(library, logger, report);
    }
    std::printf("%d failed\n", report.failures());
    return report.failures() ? 1 : 0;
}
