"""The plugins' tables for C++, ``attention/plugin_spec.h``, written from :mod:`~stiv_deploy.runtime.plugins.spec`.

``python -m stiv_deploy.runtime.plugins.spec_header`` rewrites the file; a test fails while it is not up to date.
"""

from pathlib import Path

from stiv_deploy.runtime.plugins.spec import DOMAIN, PLUGINS, VERSION, AttributeSpec, PluginSpec, TensorSpec

HEADER = Path(__file__).resolve().parent / "attention" / "plugin_spec.h"
_PREAMBLE = """\
// Written by `python -m stiv_deploy.runtime.plugins.spec_header` from runtime/plugins/spec.py: change that instead.
#pragma once

#include "plugin_schema.h"

namespace stiv {{

constexpr const char* kPluginNamespace = "{domain}";
constexpr const char* kPluginVersion = "{version}";
"""
_TYPES = {"x": "kInput", "float32": "kFloat32", "x or float8_e4m3": "kInputOrFloat8"}


def extent(text: str) -> str:
    """C++ initializer of one size: ``3*H*Dh`` gives ``{3, 1, true, Symbol::kDh}``."""
    product, _, denominator = text.partition("/")
    factors = product.split("*")
    numerator = next((factor for factor in factors if factor.isdigit()), "1")
    symbols = [factor for factor in factors if not factor.isdigit() and factor != "H"]
    symbol = symbols[0] if symbols else "None"
    return f"{{{numerator}, {denominator or 1}, {str('H' in factors).lower()}, Symbol::k{symbol}}}"


def _tensor(tensor: TensorSpec) -> str:
    shape = ", ".join(extent(size) for size in tensor.shape)
    return f'{{"{tensor.name}", {len(tensor.shape)}, {{{shape}}}, ElementType::{_TYPES[tensor.type]}}}'


def _attribute(attribute: AttributeSpec) -> str:
    integer, required = attribute.kind == "int", attribute.default is None
    fallback = f"{float(attribute.default or 0)!r}f"
    return f'{{"{attribute.name}", {str(integer).lower()}, {str(required).lower()}, {fallback}}}'


def _block(lines: list[str]) -> str:
    return "{" + "".join(f"\n        {line}," for line in lines) + "\n    }"


def _plugin(plugin: PluginSpec) -> str:
    constant = "k" + plugin.name
    required = sum(not tensor.optional for tensor in plugin.inputs)
    counts = f"{required}, {len(plugin.inputs)}, {len(plugin.outputs)}, {len(plugin.attributes)}"
    blocks = (
        _block([_tensor(tensor) for tensor in plugin.inputs]),
        _block([_tensor(tensor) for tensor in plugin.outputs]),
        _block([_attribute(attribute) for attribute in plugin.attributes]),
    )
    return (
        f'\nconstexpr PluginSpec {constant} = {{\n    "{plugin.name}",\n    {counts},\n'
        + "".join(f"    {block},\n" for block in blocks)
        + "};\n"
    )


def header() -> str:
    """Text of ``plugin_spec.h``."""
    preamble = _PREAMBLE.format(domain=DOMAIN, version=VERSION)
    return preamble + "".join(_plugin(plugin) for plugin in PLUGINS) + "\n}  // namespace stiv\n"


if __name__ == "__main__":
    HEADER.write_text(header())
