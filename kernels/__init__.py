"""Generated Triton kernels: `KernelSpec` → template → source → loaded kernel.

Specs and `render` import without Triton; `loader`, `interpreter` and host functions need it.
"""

from .spec import ActivationCastSpec, KernelSpec

__all__ = ["ActivationCastSpec", "KernelSpec"]
