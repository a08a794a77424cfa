// A stand-in for TensorRT around a plugin: logger, size expressions, and the plugin library opened as the registry
// opens it.
#pragma once

#include <NvInferRuntime.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace harness {

// Keeps what was logged.
class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity, const char* message) noexcept override { text += std::string(message) + "\n"; }
    std::string take() { return std::exchange(text, std::string()); }

    std::string text;
};

class LoggerFinder final : public nvinfer1::ILoggerFinder {
public:
    explicit LoggerFinder(nvinfer1::ILogger& logger) : logger_(logger) {}
    ~LoggerFinder() override = default;
    nvinfer1::ILogger* findLogger() override { return &logger_; }

private:
    nvinfer1::ILogger& logger_;
};

using Values = std::map<std::string, int64_t>;

// A size: a constant, a named symbol, or an operation on two sizes.
class Expression final : public nvinfer1::IDimensionExpr {
public:
    explicit Expression(int64_t value);
    explicit Expression(std::string symbol);
    Expression(nvinfer1::DimensionOperation operation, const Expression& first, const Expression& second);
    ~Expression() override = default;
    int64_t evaluate(const Values& values) const { return node_->evaluate(values); }

private:
    struct Node : nvinfer1::apiv::VDimensionExpr {
        bool isConstant() const override { return symbol.empty() && !first; }
        int64_t getConstantValue() const override { return value; }
        bool isSizeTensor() const override { return false; }
        int64_t evaluate(const Values& values) const;

        int64_t value = 0;
        std::string symbol;
        nvinfer1::DimensionOperation operation{};
        const Expression* first = nullptr;
        const Expression* second = nullptr;
    };
    std::unique_ptr<Node> node_;
};

class ExpressionBuilder final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
public:
    ExpressionBuilder() { mImpl = this; }
    ~ExpressionBuilder() override = default;
    // A digit makes a constant, anything else a symbol.
    nvinfer1::DimsExprs shape(const std::vector<std::string>& sizes);

private:
    const nvinfer1::IDimensionExpr* constant(int64_t value) override;
    const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation operation,
                                              const nvinfer1::IDimensionExpr& first,
                                              const nvinfer1::IDimensionExpr& second) override;
    const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                      const nvinfer1::IDimensionExpr&) override {
        return nullptr;
    }
    std::vector<std::unique_ptr<Expression>> owned_;
};

std::vector<int64_t> evaluate(const nvinfer1::DimsExprs& shape, const Values& values);

nvinfer1::Dims dims(const std::vector<int64_t>& sizes);

// A plugin library; the process ends with a message when it cannot be opened.
class Library {
public:
    explicit Library(const char* path);
    const std::vector<nvinfer1::IPluginCreatorV3One*>& creators() const { return creators_; }
    nvinfer1::IPluginCreatorV3One& creator(const std::string& name) const;
    void set_logger_finder(nvinfer1::ILoggerFinder* finder) const { set_logger_finder_(finder); }

private:
    std::vector<nvinfer1::IPluginCreatorV3One*> creators_;
    void (*set_logger_finder_)(nvinfer1::ILoggerFinder*);
};

// A plugin with its three capabilities.
struct Plugin {
    explicit Plugin(nvinfer1::IPluginV3* created);
    explicit operator bool() const { return object != nullptr; }
    std::map<std::string, double> serialized() const;

    std::unique_ptr<nvinfer1::IPluginV3> object;
    nvinfer1::IPluginV3OneCore* core = nullptr;
    nvinfer1::IPluginV3OneBuild* build = nullptr;
    nvinfer1::IPluginV3OneRuntime* runtime = nullptr;
};

// Counts and reports checks, one line each.
class Report {
public:
    void check(const std::string& name, bool passed, const std::string& detail = "");
    // `text` must contain `part`: what a logged error says.
    void says(const std::string& name, bool refused, const std::string& text, const std::string& part);
    int failures() const { return failures_; }

private:
    int failures_ = 0;
};

// What the program is made of: checks.cpp without, enqueue.cpp with the kernels.
void describe(const Library& library);
void check_creators(const Library& library, Logger& logger, Report& report);
void check_build(const Library& library, Logger& logger, Report& report);
void check_enqueue(const Library& library, Logger& logger, Report& report);

}  // namespace harness
