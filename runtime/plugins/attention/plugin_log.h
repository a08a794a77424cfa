// Errors of the plugins: thrown inside; at the border of every method caught, logged and turned into a return value.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <stdexcept>
#include <string>

namespace stiv {

// What was given, what is wanted: one line.
struct PluginError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// To TensorRT's logger, or to stderr where TensorRT has given none.
void log_error(const char* plugin, const char* text) noexcept;

// What `body` returns, or `failure` after logging what it threw: TensorRT's methods must not throw.
template <class Result, class Body>
Result guarded(const char* plugin, Result failure, const Body& body) noexcept {
    try {
        return body();
    } catch (const std::exception& error) {
        log_error(plugin, error.what());
    } catch (...) {
        log_error(plugin, "unknown error");
    }
    return failure;
}

}  // namespace stiv
