"""Generated Triton kernels: `KernelSpec` → template → source → loaded kernel.

Specs and `render` import without Triton; `loader`, `interpreter` and host functions need it.
"""

from falqon_fx.kernels.activation_cast.spec import ActivationCastSpec
from falqon_fx.kernels.spec import KernelSpec

__all__ = ["ActivationCastSpec", "KernelSpec"]
