"""Spec to source: fills a template; the same spec always gives the same text."""

from __future__ import annotations

import struct

import jinja2

from falqon_fx.kernels.spec import KernelSpec

# An undefined name in a template is an error, never an empty string.
_ENVIRONMENT = jinja2.Environment(
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # the output is Python, not HTML
)


def _float32_bits(value: float) -> str:
    """Bit pattern of ``value`` as a hexadecimal literal."""
    return f"0x{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


_ENVIRONMENT.filters["float32_bits"] = _float32_bits


def render(spec: KernelSpec) -> str:
    """Triton source of the kernel that ``spec`` describes: a Python module as text.

    Raises jinja2.UndefinedError where the template asks for a field that the spec lacks.
    """
    template = _ENVIRONMENT.from_string(spec.text)
    return template.render(spec=spec, **spec.fields)
