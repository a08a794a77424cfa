// The plugins' real work: enqueue as TensorRT calls it, compared with the oracle.
#include <cmath>
#include <memory>
#include <random>

#include "host.h"
#include "memory.h"
#include "numbers.h"
#include "oracle.h"
#include "tables.h"

namespace harness {
namespace {

using nvinfer1::DataType;

constexpr double kEpsilon = 3e-5, kQueryScale = 0.25;  // not the defaults: attributes must arrive
constexpr float kScales[] = {0.03125f, 0.0625f, 0.015625f};

struct Case {
    const Table& table;
    Shape shape;
    DataType type;
    bool quantized;

    std::string name() const {
        std::string sizes;
        for (const int64_t size : shape.lead) sizes += std::to_string(size) + "x";
        const std::string type_name = type == DataType::kFLOAT ? "fp32" : type == DataType::kHALF ? "fp16" : "bf16";
        return table.name + " " + sizes + std::to_string(shape.positions) + ", " + std::to_string(shape.heads) +
               " heads of " + std::to_string(shape.head_dim) + ", " + type_name + (quantized ? " to fp8" : "");
    }
};

std::vector<double> random_numbers(int64_t count, double centre, double width, std::mt19937& generator) {
    std::vector<double> numbers(count);
    for (double& x : numbers)  // multiples of 1/64, see encode()
        x = std::round((centre + width * (static_cast<double>(generator() % 2001) / 1000 - 1)) * 64) / 64;
    return numbers;
}

Inputs random_inputs(const Case& test) {
    std::mt19937 generator(static_cast<unsigned>(test.shape.head_dim * 1000 + test.shape.positions));
    const auto sizes = test.table.inputs(test.shape, false);
    std::vector<std::vector<double>> all;
    const double centres[] = {0, 0, 1, 1, 0, 0}, widths[] = {1.5, 0.5, 0.5, 0.5, 1, 1};
    for (size_t i = 0; i < sizes.size(); ++i) {
        int64_t count = 1;
        for (const int64_t size : sizes[i]) count *= size;
        all.push_back(random_numbers(count, centres[i], widths[i], generator));
    }
    const bool temporal = test.table.temporal;
    return {all[0], all[1], all[2], all[3], all[4], all[5], test.shape.lead[0], temporal ? test.shape.lead[1] : 1,
            test.shape.positions, test.shape.heads, test.shape.head_dim, kEpsilon, kQueryScale};
}

Bytes encoded(const std::vector<double>& numbers, DataType type) {
    Bytes bytes(numbers.size() * size_of(type));
    for (size_t i = 0; i < numbers.size(); ++i)
        encode(type, static_cast<float>(numbers[i]), bytes.data() + i * size_of(type));
    return bytes;
}

// One call: plugin, tensors in the kernels' memory, addresses for enqueue.
class Execution {
public:
    Execution(const Library& library, const Case& test, const Inputs& in)
        : plugin_(make(library, test)), descs_(describe_call(test.table, test.shape, test.type, test.quantized)) {
        for (const std::vector<double>* tensor : {&in.qkv, &in.bias, &in.q_gamma, &in.k_gamma, &in.cos, &in.sin})
            memory_.push_back(std::make_unique<Memory>(encoded(*tensor, test.type)));
        for (int i = 0; test.quantized && i < test.table.scales; ++i)
            memory_.push_back(std::make_unique<Memory>(encoded({static_cast<double>(kScales[i])}, DataType::kFLOAT)));
        for (const auto& tensor : memory_) inputs.push_back(tensor->get());
        for (const nvinfer1::PluginTensorDesc& output : descs_.outputs) {
            int64_t count = 1;
            for (int axis = 0; axis < output.dims.nbDims; ++axis) count *= output.dims.d[axis];
            memory_.push_back(std::make_unique<Memory>(Bytes(count * size_of(output.type), 0xff)));  // NaN
            outputs.push_back(memory_.back()->get());
        }
    }

    bool prepare() const {
        return !plugin_.runtime->onShapeChange(descs_.inputs.data(), static_cast<int32_t>(descs_.inputs.size()),
                                               descs_.outputs.data(), static_cast<int32_t>(descs_.outputs.size()));
    }
    bool enqueue() const {
        return !plugin_.runtime->enqueue(descs_.inputs.data(), descs_.outputs.data(), inputs.data(), outputs.data(),
                                         nullptr, nullptr);
    }
    std::vector<double> read(size_t output) const {
        const DataType type = descs_.outputs[output].type;
        const Bytes bytes = memory_[inputs.size() + output]->read();
        std::vector<double> numbers(bytes.size() / size_of(type));
        for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = decode(type, bytes.data() + i * size_of(type));
        return numbers;
    }

    std::vector<const void*> inputs;
    std::vector<void*> outputs;

private:
    // As at run time: from serialized fields, attached to a context.
    static Plugin make(const Library& library, const Case& test) {
        Fields fields;
        fields.integer("heads", static_cast<int32_t>(test.shape.heads)).real("epsilon", static_cast<float>(kEpsilon));
        if (!test.table.temporal) fields.real("query_scale", static_cast<float>(kQueryScale));
        const Plugin created(library.creator(test.table.name)
                                 .createPlugin("node", fields.get(), nvinfer1::TensorRTPhase::kRUNTIME));
        return Plugin(created.runtime->attachToContext(nullptr));
    }

    const Plugin plugin_;
    const Descs descs_;
    std::vector<std::unique_ptr<Memory>> memory_;
};

// Largest error as a part of its bound; infinity for NaN.
double worst(const std::vector<double>& got, const Expected& expected, double scale) {
    double worst = got.size() == expected.value.size() ? 0 : INFINITY;
    for (size_t i = 0; i < got.size() && std::isfinite(worst); ++i) {
        const double part = std::fabs(got[i] * scale - expected.value[i]) / expected.bound[i];
        worst = std::isnan(part) ? INFINITY : std::max(worst, part);
    }
    return worst;
}

double scale(const Case& test, size_t output) { return test.quantized ? static_cast<double>(kScales[output]) : 1; }

std::vector<Expected> oracle(const Case& test, const Inputs& in) {
    const double unit = roundoff(test.type);
    std::vector<Expected> expected =
        test.table.temporal ? std::vector<Expected>{temporal_attention(in, unit)} : spatial_qkv(in, unit);
    for (size_t i = 0; test.quantized && i < expected.size(); ++i)
        quantize(expected[i], scale(test, i));
    return expected;
}

void check_numbers(const Library& library, const Case& test, Logger& logger, Report& report) {
    const Inputs in = random_inputs(test);
    const Execution execution(library, test, in);
    const bool ran = execution.prepare() && execution.enqueue();
    double largest = 0;
    const std::vector<Expected> expected = oracle(test, in);
    for (size_t i = 0; ran && i < expected.size(); ++i)
        largest = std::max(largest, worst(execution.read(i), expected[i], scale(test, i)));
    report.check(test.name(), ran && largest <= 1,
                 logger.take() + "error is " + std::to_string(largest) + " of its bound");
}

// The bounds would mean little if wrong numbers were within them.
void check_sensitivity(const Table& table, Report& report) {
    const Case test{table, table.temporal ? Shape{{2, 5}, 3, 2, 32} : Shape{{2}, 9, 2, 32}, DataType::kHALF, false};
    const Inputs in = random_inputs(test);
    const std::vector<Expected> expected = oracle(test, in);
    const auto noticed = [&](const std::string& name, const auto& change) {
        Inputs other = in;
        change(other);
        const std::vector<Expected> wrong = oracle(test, other);
        double largest = 0;
        for (size_t i = 0; i < expected.size(); ++i) largest = std::max(largest, worst(wrong[i].value, expected[i], 1));
        report.check(table.name + " notices " + name, largest > 1, std::to_string(largest));
    };
    noticed("exchanged gammas", [](Inputs& x) { std::swap(x.q_gamma, x.k_gamma); });
    noticed("exchanged rope tables", [](Inputs& x) { std::swap(x.cos, x.sin); });
    noticed("a missing bias", [](Inputs& x) { x.bias.assign(x.bias.size(), 0); });
    noticed("another epsilon", [](Inputs& x) { x.epsilon = 0.1; });
    if (!table.temporal) noticed("another query scale", [](Inputs& x) { x.query_scale = 1; });
}

void check_bad_pointers(const Library& library, const Table& table, Logger& logger, Report& report) {
    const Case test{table, table.temporal ? Shape{{2, 5}, 3, 2, 32} : Shape{{2}, 3, 2, 32}, DataType::kHALF, true};
    const Inputs in = random_inputs(test);
    const auto refuse = [&](const std::string& name, const std::string& part, const auto& change) {
        Execution execution(library, test, in);
        change(execution);
        const bool refused = !execution.enqueue();
        report.says(table.name + " enqueue refuses " + name, refused, logger.take(), part);
    };
    refuse("a null output", "pointer is null", [](Execution& x) { x.outputs[0] = nullptr; });
    refuse("a null gamma", "pointer is null", [](Execution& x) { x.inputs[2] = nullptr; });
    refuse("a null scale", "a scale is missing", [](Execution& x) { x.inputs[6] = nullptr; });
    refuse("a misaligned input", "misaligned",
           [](Execution& x) { x.inputs[0] = static_cast<const char*>(x.inputs[0]) + 2; });
}

}  // namespace

void check_enqueue(const Library& library, Logger& logger, Report& report) {
    const Shape temporal[] = {{{2, 5}, 3, 3, 32}, {{1, 1}, 2, 2, 72}, {{1, 17}, 3, 2, 72}, {{1, 64}, 1, 1, 128}};
    const Shape spatial[] = {{{2}, 3, 3, 32}, {{1}, 1, 2, 72}, {{3}, 37, 2, 72}, {{1}, 16, 1, 128}};
    for (const DataType type : kInputTypes) {
        for (const bool quantized : {false, true}) {
            for (const Shape& shape : temporal)
                check_numbers(library, {kTemporal, shape, type, quantized}, logger, report);
            for (const Shape& shape : spatial)
                check_numbers(library, {kSpatial, shape, type, quantized}, logger, report);
        }
    }
    for (const Table* table : {&kTemporal, &kSpatial}) {
        check_sensitivity(*table, report);
        check_bad_pointers(library, *table, logger, report);
    }
}

}  // namespace harness
