"""Rendered kernels on CPU tensors, by Triton's interpreter, beside compiled ones in one process.

Nothing of Triton is patched. Where its interpreter (3.6 and 3.7) is wrong, templates do without, or
a name in the interpreted module's own namespace stands before the builtin (`NAMESPACE`):

===========================================  ==================================================
the interpreter                              so a template
===========================================  ==================================================
casts float32 to FP8 wrongly, loses NaN      rounds by integer steps (spec field ``cast``)
widens bfloat16 subnormals wrongly           shifts the bits, in compiled kernels as well
truncates float32 to bfloat16                must round by integer steps before it narrows
multiplies bit patterns in bfloat16 dots     must widen the operands first
drops NaN in a float maximum (so do GPUs)    takes the maximum of magnitude bits
reduces element by element in Python when    reduces with ``tl.standard._elementwise_max`` and
given a combine function it does not know    its like, which it maps to numpy
cannot call what Triton itself wrote in      uses builtins (``tl.reduce``, ``tl.full``) and helpers
Triton (``tl.max``, ``tl.zeros``) unless     of its own
TRITON_INTERPRET was set at import
fails on ``range`` over runtime values       gets the ``range`` below (not ``tl.range``)
(3.6 with numpy 2.5)
===========================================  ==================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl

from falqon_fx.errors import warn_once

# The versions that the tests have compared with the CPU reference, bit for bit.
_CHECKED = ((3, 6), (3, 7))


def _range(*bounds: Any) -> range:
    return range(*(b.handle.data.item() if isinstance(b, tl.tensor) else b for b in bounds))


# What an interpreted module sees instead of the builtins.
NAMESPACE = {"range": _range}


def runs_interpreted(x: torch.Tensor) -> bool:
    """Whether kernels on ``x`` are interpreted: on CPU always, elsewhere by TRITON_INTERPRET=1."""
    return x.device.type == "cpu" or bool(triton.knobs.runtime.interpret)


@contextmanager
def decorating(interpret: bool) -> Iterator[None]:
    """Makes ``@triton.jit`` yield interpreted or compiled functions inside the block.

    Triton decides when it decorates, so kernels of both kinds live side by side afterwards. Warns
    where the interpreter's version has not been checked.
    """
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    if interpret and (major, minor) not in _CHECKED:
        warn_once(
            f"Triton {triton.__version__}: its interpreter has not been checked against the CPU "
            "reference; run tests/kernels",
            kind=RuntimeWarning,
        )
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = interpret
        yield
