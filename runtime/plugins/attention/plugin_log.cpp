#include "plugin_log.h"

#include <atomic>
#include <cstdio>

namespace stiv {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

nvinfer1::ILogger* find_logger() noexcept {
    try {
        nvinfer1::ILoggerFinder* finder = logger_finder.load();
        return finder ? finder->findLogger() : nullptr;
    } catch (...) {
        return nullptr;
    }
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder.store(finder); }

void log_error(const char* plugin, const char* text) noexcept {
    char line[512];
    std::snprintf(line, sizeof line, "%s: %s", plugin, text);
    if (nvinfer1::ILogger* logger = find_logger())
        logger->log(nvinfer1::ILogger::Severity::kERROR, line);
    else
        std::fprintf(stderr, "[stiv] %s\n", line);
}

}  // namespace stiv
