// What TensorRT's plugin registry looks for in a library that it loads: getCreators and setLoggerFinder.
#include <NvInferRuntime.h>

#include "attention_plugin.h"
#include "plugin_log.h"
#include "plugin_spec.h"

namespace stiv {
namespace {

class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    explicit Creator(const PluginSpec& spec)
        : spec_(spec), fields_(field_names(spec)), collection_{spec.attribute_count, fields_.data()} {}
    Creator(const Creator&) = delete;
    Creator& operator=(const Creator&) = delete;

    // In both phases the fields are the attributes: what is serialized is what was given.
    nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase) noexcept override {
        return guarded<nvinfer1::IPluginV3*>(spec_.name, nullptr, [&] { return make_plugin(spec_, fields); });
    }

    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    const char* getPluginName() const noexcept override { return spec_.name; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

private:
    const PluginSpec& spec_;
    const std::array<nvinfer1::PluginField, kMaximumAttributes> fields_;
    const nvinfer1::PluginFieldCollection collection_;
};

}  // namespace
}  // namespace stiv

#define STIV_EXPORT extern "C" __attribute__((visibility("default")))

STIV_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static stiv::Creator temporal_attention(stiv::kStivTemporalAttention), spatial_qkv(stiv::kStivSpatialQkv);
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&temporal_attention, &spatial_qkv};
    count = 2;
    return creators;
}

STIV_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { stiv::set_logger_finder(finder); }
