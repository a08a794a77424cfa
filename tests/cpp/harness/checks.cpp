// Everything that TensorRT asks a plugin before it runs it: creation, types, shapes, formats, serialization.
#include <cmath>
#include <cstdio>

#include "host.h"
#include "tables.h"

namespace harness {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;

constexpr DataType kEveryType[] = {DataType::kFLOAT, DataType::kHALF, DataType::kINT8,  DataType::kINT32,
                                   DataType::kBOOL,  DataType::kUINT8, DataType::kFP8,  DataType::kBF16,
                                   DataType::kINT64, DataType::kINT4};
constexpr TensorFormat kEveryFormat[] = {TensorFormat::kLINEAR, TensorFormat::kCHW2,  TensorFormat::kHWC8,
                                         TensorFormat::kCHW4,   TensorFormat::kCHW16, TensorFormat::kCHW32};

bool is_input_type(DataType type) {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

DataType type_of(char letter, DataType first, bool quantized) {
    return letter == 'f' ? DataType::kFLOAT : letter == 'o' && quantized ? DataType::kFP8 : first;
}

const Shape kShapes[] = {{{2, 5}, 3, 3, 32}, {{1, 1}, 1, 1, 72}, {{4, 64}, 7, 2, 128}, {{3, 20}, 1024, 18, 64}};

Shape for_table(const Table& table, Shape shape) {
    if (!table.temporal) shape.lead = {shape.lead[0] * shape.lead[1]};
    return shape;
}

Plugin create(const Library& library, const Table& table, int32_t heads,
              TensorRTPhase phase = TensorRTPhase::kBUILD) {
    const Fields fields = std::move(Fields().integer("heads", heads));
    return Plugin(library.creator(table.name).createPlugin(table.name.c_str(), fields.get(), phase));
}

void check_types(const Table& table, const Plugin& plugin, bool quantized, Report& report) {
    const int inputs = 6 + (quantized ? table.scales : 0);
    bool right = plugin.build->getNbOutputs() == table.outputs;
    for (const DataType type : kInputTypes) {
        std::vector<DataType> given(inputs, type), got(table.outputs, DataType::kINT4);
        for (int i = 6; i < inputs; ++i) given[i] = DataType::kFLOAT;
        right = right && !plugin.build->getOutputDataTypes(got.data(), table.outputs, given.data(), inputs);
        for (const DataType output : got) right = right && output == (quantized ? DataType::kFP8 : type);
    }
    report.check(table.name + " output types" + (quantized ? " fp8" : ""), right);
}

// Leading sizes are symbols; the channels once a number, once a symbol too.
void check_shapes(const Table& table, const Library& library, Report& report) {
    for (const Shape& base : kShapes) {
        const Shape shape = for_table(table, base);
        const Plugin plugin = create(library, table, static_cast<int32_t>(shape.heads));
        const std::vector<int64_t> qkv = table.inputs(shape, false)[0];
        Values values;
        std::vector<std::string> symbols;
        for (size_t axis = 0; axis < qkv.size(); ++axis) {
            symbols.push_back("d" + std::to_string(axis));
            values[symbols.back()] = qkv[axis];
        }
        bool right = true;
        for (const bool constant : {false, true}) {
            ExpressionBuilder builder;
            if (constant) symbols.back() = std::to_string(qkv.back());
            const std::vector<nvinfer1::DimsExprs> inputs(6, builder.shape(symbols));
            std::vector<nvinfer1::DimsExprs> outputs(table.outputs);
            right = right && !plugin.build->getOutputShapes(inputs.data(), 6, nullptr, 0, outputs.data(),
                                                            table.outputs, builder);
            for (const nvinfer1::DimsExprs& output : outputs)
                right = right && evaluate(output, values) == table.output(shape);
        }
        report.check(table.name + " output shape of " + std::to_string(shape.heads) + " heads of " +
                         std::to_string(shape.head_dim),
                     right);
    }
}

// Every type and format at every position, for every type of the first input.
void check_formats(const Table& table, const Plugin& plugin, bool quantized, Report& report) {
    const std::string letters = table.types(quantized);
    const int outputs = table.outputs, inputs = static_cast<int>(letters.size()) - outputs;
    int asked = 0, wrong = 0;
    for (const DataType first : kInputTypes) {
        for (int position = 0; position < inputs + outputs; ++position) {
            std::vector<DynamicPluginTensorDesc> tensors(inputs + outputs);
            for (int i = 0; i < inputs + outputs; ++i) {
                tensors[i].desc.type = type_of(letters[i], first, quantized);
                tensors[i].desc.format = TensorFormat::kLINEAR;
            }
            const DataType wanted = tensors[position].desc.type;
            for (const DataType type : kEveryType) {
                for (const TensorFormat format : kEveryFormat) {
                    tensors[position].desc.type = type;
                    tensors[position].desc.format = format;
                    const bool fits = (position ? type == wanted : is_input_type(type)) &&
                                      format == TensorFormat::kLINEAR;
                    wrong += plugin.build->supportsFormatCombination(position, tensors.data(), inputs, outputs) != fits;
                    ++asked;
                }
            }
        }
    }
    report.check(table.name + " " + std::to_string(asked) + " format combinations" + (quantized ? " fp8" : ""),
                 wrong == 0, std::to_string(wrong) + " wrong");
}

void check_copies(const Table& table, const Library& library, Report& report) {
    Fields fields;
    fields.integer("heads", 7).real("epsilon", 3e-5f);
    if (!table.temporal) fields.real("query_scale", 0.25f);
    nvinfer1::IPluginCreatorV3One& creator = library.creator(table.name);
    const char* name = table.name.c_str();
    Plugin first(creator.createPlugin(name, fields.get(), TensorRTPhase::kBUILD));
    const auto wanted = first.serialized();
    const std::string id = first.build->getTimingCacheID();
    report.check(table.name + " keeps its attributes",
                 wanted.at("heads") == 7 && wanted.at("epsilon") == static_cast<double>(3e-5f) &&
                     (table.temporal || wanted.at("query_scale") == 0.25));
    const Plugin again(creator.createPlugin(name, first.runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    const Plugin copy(first.object->clone());
    const Plugin attached(first.runtime->attachToContext(nullptr));
    first.object.reset();  // what the others hold must be their own
    for (const Plugin* plugin : {&again, &copy, &attached})
        report.check(table.name + (plugin == &again ? " serialized and created again"
                                   : plugin == &copy ? " cloned"
                                                     : " attached to a context"),
                     *plugin && plugin->serialized() == wanted && plugin->build->getTimingCacheID() == id &&
                         plugin->core->getPluginName() == table.name);
    const Plugin other = create(library, table, 8);
    report.check(table.name + " timing cache tells attributes apart", other.build->getTimingCacheID() != id);
    report.check(table.name + " defaults", other.serialized().at("epsilon") == static_cast<double>(1e-6f) &&
                                               (table.temporal || other.serialized().at("query_scale") == 1));
    report.check(table.name + " tactics",
                 other.build->getNbTactics() == 0 && !other.runtime->setTactic(0) && other.runtime->setTactic(1));
}

int32_t configure(const Plugin& plugin, const Descs& descs, const Descs& largest) {
    const auto dynamic = [](const std::vector<PluginTensorDesc>& all, const std::vector<PluginTensorDesc>& most) {
        std::vector<DynamicPluginTensorDesc> tensors;
        for (size_t i = 0; i < all.size(); ++i) tensors.push_back({all[i], most[i].dims, most[i].dims, most[i].dims});
        return tensors;
    };
    const auto inputs = dynamic(descs.inputs, largest.inputs), outputs = dynamic(descs.outputs, largest.outputs);
    return plugin.build->configurePlugin(inputs.data(), static_cast<int32_t>(inputs.size()), outputs.data(),
                                         static_cast<int32_t>(outputs.size()));
}

int32_t change_shape(const Plugin& plugin, const Descs& descs) {
    return plugin.runtime->onShapeChange(descs.inputs.data(), static_cast<int32_t>(descs.inputs.size()),
                                         descs.outputs.data(), static_cast<int32_t>(descs.outputs.size()));
}

// The leading sizes unknown in every tensor, as while a network with dynamic shapes is built.
Descs with_unknown_sizes(Descs descs, const Table& table) {
    const int leading = table.temporal ? 3 : 2;
    for (int axis = 0; axis < leading; ++axis) descs.inputs[0].dims.d[axis] = -1;
    descs.inputs[4].dims.d[0] = descs.inputs[5].dims.d[0] = -1;
    for (PluginTensorDesc& output : descs.outputs)
        for (int axis = 0; axis < 3; ++axis)
            if (table.temporal || axis != 1) output.dims.d[axis] = -1;
    return descs;
}

void check_good_shapes(const Table& table, const Library& library, Logger& logger, Report& report) {
    for (const Shape& base : kShapes) {
        for (const bool quantized : {false, true}) {
            const Shape shape = for_table(table, base);
            const Plugin plugin = create(library, table, static_cast<int32_t>(shape.heads));
            const Descs descs = describe_call(table, shape, DataType::kBF16, quantized);
            const bool right = !configure(plugin, descs, descs) &&
                               !configure(plugin, with_unknown_sizes(descs, table), descs) &&
                               !change_shape(plugin, descs);
            report.check(table.name + " takes heads of " + std::to_string(shape.head_dim) + (quantized ? " fp8" : ""),
                         right, logger.text);
        }
    }
}

// One thing wrong at a time; the log must name it.
void check_bad_shapes(const Table& table, const Library& library, Logger& logger, Report& report) {
    const Shape shape = for_table(table, {{2, 5}, 3, 3, 32});
    const Plugin plugin = create(library, table, 3);
    const Descs good = describe_call(table, shape, DataType::kHALF, true);
    const auto refuse = [&](const std::string& name, const Descs& bad, const std::string& part) {
        const bool at_build = configure(plugin, bad, bad) != 0;
        report.says(table.name + " configurePlugin refuses " + name, at_build, logger.take(), part);
        const bool at_run = change_shape(plugin, bad) != 0;
        report.says(table.name + " onShapeChange refuses " + name, at_run, logger.take(), part);
    };
    const auto changed = [&](const auto& change) {
        Descs bad = good;
        change(bad);
        return bad;
    };
    const auto described = [&](const Shape& other) {
        return describe_call(table, for_table(table, other), DataType::kHALF, true);
    };
    refuse("a head size of 40", described({{2, 5}, 3, 3, 40}), "unsupported head size");
    refuse("an empty batch", described({{0, 5}, 3, 3, 32}), "a size is below 1");
    if (table.temporal)
        refuse("65 frames", described({{2, 65}, 3, 3, 32}),
               "unsupported number of frames; give 1 to 64");
    refuse("channels that heads do not divide", described({{2, 5}, 3, 1, 32}), "not divisible by 3 * heads = 9");
    refuse("another rank", changed([](Descs& bad) { --bad.inputs[0].dims.nbDims; }), "qkv has");
    refuse("a short bias", changed([](Descs& bad) { --bad.inputs[1].dims.d[0]; }), "bias is [287], want [288]");
    refuse("a gamma of another size",
           changed([](Descs& bad) { bad.inputs[3].dims.d[0] = 64; }), "k_gamma is [64], want [32]");
    refuse("a long rope table", changed([](Descs& bad) { ++bad.inputs[4].dims.d[0]; }), "cos is [");
    refuse("a rope table of whole heads", changed([](Descs& bad) { bad.inputs[5].dims.d[1] = 32; }), "sin is [");
    refuse("a scale per channel",
           changed([](Descs& bad) { bad.inputs.back().dims = dims({96}); }), "scale has 1 dimensions");
    refuse("a wrong output",
           changed([](Descs& bad) { ++bad.outputs[0].dims.d[2]; }), table.temporal ? "y is [" : "q is [");
    refuse("int32", changed([](Descs& bad) {
               for (PluginTensorDesc& input : bad.inputs)
                   if (input.type == DataType::kHALF) input.type = DataType::kINT32;
           }),
           "must be float32, float16 or bfloat16");
    refuse("gammas of another type",
           changed([](Descs& bad) { bad.inputs[2].type = DataType::kFLOAT; }), "q_gamma has the wrong type");
    refuse("fp16 scales", changed([](Descs& bad) { bad.inputs.back().type = DataType::kHALF; }), "wrong type");
    refuse("fp8 without scales", changed([&](Descs& bad) { bad.inputs.resize(6); }), "wrong type");
    refuse("a missing input", changed([](Descs& bad) { bad.inputs.resize(5); }), "given 5 inputs, want 6");
    refuse("a missing output", changed([](Descs& bad) { bad.outputs.pop_back(); }), "outputs, want");
    const bool late = configure(plugin, with_unknown_sizes(good, table), described({{2, 65}, 3, 3, 32})) != 0;
    if (table.temporal)
        report.says(table.name + " refuses a profile of 65 frames", late, logger.take(),
                    "unsupported number of frames");
}

}  // namespace

Descs describe_call(const Table& table, const Shape& shape, DataType type, bool quantized) {
    Descs descs;
    const std::string letters = table.types(quantized);
    const auto inputs = table.inputs(shape, quantized);
    for (size_t i = 0; i < letters.size(); ++i) {
        const bool input = i < inputs.size();
        (input ? descs.inputs : descs.outputs)
            .push_back({dims(input ? inputs[i] : table.output(shape)), type_of(letters[i], type, quantized),
                        TensorFormat::kLINEAR, 1.0f});
    }
    return descs;
}

// For the comparison with spec.py: one JSON object a line.
void describe(const Library& library) {
    for (nvinfer1::IPluginCreatorV3One* creator : library.creators()) {
        std::printf("{\"name\": \"%s\", \"version\": \"%s\", \"namespace\": \"%s\", \"attributes\": {",
                    creator->getPluginName(), creator->getPluginVersion(), creator->getPluginNamespace());
        const nvinfer1::PluginFieldCollection* fields = creator->getFieldNames();
        for (int32_t i = 0; i < fields->nbFields; ++i)
            std::printf("%s\"%s\": \"%s\"", i ? ", " : "", fields->fields[i].name,
                        fields->fields[i].type == PluginFieldType::kINT32 ? "int" : "float");
        std::printf("}}\n");
    }
}

void check_creators(const Library& library, Logger& logger, Report& report) {
    const int64_t long_heads = 4;
    const double long_epsilon = 1e-5;
    const int32_t two[] = {1, 2};
    for (const Table* table : {&kTemporal, &kSpatial}) {
        const auto refuse = [&](const std::string& name, const Fields& fields, const std::string& part) {
            const Plugin plugin(
                library.creator(table->name).createPlugin("node", fields.get(), TensorRTPhase::kBUILD));
            report.says(table->name + " refuses " + name, !plugin, logger.take(), table->name + ": " + part);
        };
        refuse("no heads", std::move(Fields().real("epsilon", 1e-6f)), "attribute heads is missing");
        refuse("real heads", std::move(Fields().real("heads", 4.0f)), "heads must be an integer");
        refuse("zero heads", std::move(Fields().integer("heads", 0)), "heads is 0, want 1 to 2^31 - 1");
        refuse("two numbers",
               std::move(Fields().add("heads", two, PluginFieldType::kINT32, 2)), "heads has 2 values, want one");
        refuse("no number",
               std::move(Fields().add("heads", nullptr, PluginFieldType::kINT32, 1)), "heads has 0 values, want one");
        refuse("an integer epsilon",
               std::move(Fields().integer("heads", 4).integer("epsilon", 1)), "epsilon must be a float");
        refuse("epsilon NaN", std::move(Fields().integer("heads", 4).real("epsilon", NAN)), "epsilon must be finite");
        refuse("a misspelled attribute", std::move(Fields().integer("heads", 4).real("eps", 1e-5f)),
               "unknown attribute eps, want heads, epsilon");
        const Fields fields = std::move(Fields()
                                            .add("heads", &long_heads, PluginFieldType::kINT64, 1)
                                            .add("epsilon", &long_epsilon, PluginFieldType::kFLOAT64, 1));
        const Plugin plugin(library.creator(table->name).createPlugin("node", fields.get(), TensorRTPhase::kBUILD));
        report.check(table->name + " takes Python's int64 and fp64",
                     plugin && plugin.serialized().at("heads") == 4 &&
                         plugin.serialized().at("epsilon") == static_cast<double>(1e-5f));
        const Fields below = std::move(Fields().integer("heads", 3).real("epsilon", -1.0f));
        const Plugin negative(library.creator(table->name).createPlugin("node", below.get(), TensorRTPhase::kBUILD));
        const Descs descs = describe_call(*table, for_table(*table, kShapes[0]), DataType::kHALF, false);
        const bool refused = change_shape(negative, descs) != 0;
        report.says(table->name + " refuses epsilon -1", refused, logger.take(),
                    "epsilon must be finite and at least 0");
    }
}

void check_build(const Library& library, Logger& logger, Report& report) {
    for (const Table* table : {&kTemporal, &kSpatial}) {
        const Plugin plugin = create(library, *table, 3);
        report.check(table->name + " names", plugin.core->getPluginName() == table->name &&
                                                 plugin.core->getPluginVersion() == std::string("1") &&
                                                 plugin.core->getPluginNamespace() == std::string("stiv"));
        check_shapes(*table, library, report);
        for (const bool quantized : {false, true}) {
            check_types(*table, plugin, quantized, report);
            check_formats(*table, plugin, quantized, report);
        }
        check_copies(*table, library, report);
        logger.take();
        check_good_shapes(*table, library, logger, report);
        check_bad_shapes(*table, library, logger, report);
    }
}

}  // namespace harness
