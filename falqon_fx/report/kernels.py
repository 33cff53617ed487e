"""Which kernel a site gets on a GPU, as far as it can be said without one; and its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from falqon_fx.cost import cards
from falqon_fx.errors import one_line
from falqon_fx.kernels.hardware import family, fp8_architecture, multiplies_fp8
from falqon_fx.kernels.spec import aligned, sizes_of
from falqon_fx.site.spec import parse_spec

if TYPE_CHECKING:
    from falqon_fx.config import FalqonConfig
    from falqon_fx.kernels.gemm.spec import GemmSpec
    from falqon_fx.kernels.grouped_gemm.spec import GroupedGemmSpec
    from falqon_fx.report.data import Site


def architecture_of(device: torch.device, config: FalqonConfig) -> int:
    """90 for sm_90 and so on, of the named card or the device at hand; 0 without FP8 kernels."""
    if config.kernel == "dequantize":
        return 0
    if config.card is not None:
        card = cards.find(config.card)
        return card.architecture if card.has_fp8 else 0
    return 0 if torch.version.hip is not None else fp8_architecture(device)


def choose(site: Site) -> tuple[str, str]:
    """The name of what is likeliest to run the forward product of a site, and why. What won on a
    GPU is for `falqon_fx.passes.autotune` to say.
    """
    spec = parse_spec(site.spec)
    if spec.base == "int8":
        return "aten", (
            "integers by the library's product, or on a GPU by a generated kernel where that is "
            "faster; dL/dx by decoded ones"
        )
    specs: Sequence[GemmSpec | GroupedGemmSpec] = ()
    asked, library = spec.kernel, "the library's"
    if spec.base == "nvfp4":
        specs = candidates(site) if site.architecture else ()
        if not specs:
            return "aten", "W decoded from NVFP4 and x from FP8, multiplied by the library's GEMMs"
        library = "the library's of decoded weights"
    if not site.architecture:
        return "aten", "no FP8 kernels there: casts and bf16 GEMMs, which the inner compiler fuses"
    if asked in ("scaled_mm", "inductor"):
        return asked, f"kernel={asked!r} asks for it"
    specs = specs or candidates(site)
    if not specs:
        return "scaled_mm", "no generated kernel is compiled ahead for such a product"
    return f"triton:{specs[0].name}", (
        f"the likeliest of {len(specs)} generated kernels for this site alone on "
        f"sm_{site.architecture}; compiling on such a GPU times them and {library}, and takes the "
        "fastest"
    )


LIBRARY = "scaled_grouped_mm"  # torch's product of a stack in FP8


def choose_for_experts(site: Site) -> tuple[str, str]:
    """The same for a stack of experts (see `falqon_fx.ops.experts_lowering`)."""
    from falqon_fx.kernels.grouped_gemm.tiles import is_compiled

    asked = parse_spec(site.spec).kernel
    sizes = site.out_features, site.in_features
    known = multiplies_fp8(site.architecture) and is_compiled(site.rank, sizes, site.out_dtype)
    if not known or asked not in _GROUPED:
        reason = "grouped products of decoded weights, of those experts alone that have tokens"
        return "aten", reason
    if asked != "triton" and _library_takes(site):
        return LIBRARY, (
            "torch's grouped product; generated kernels for O_A, dL/dx and the adapters' gradients"
        )
    (spec,) = candidates(site)
    return f"triton:{spec.name}", "a generated kernel that adds the adapter as it stores O"


_GROUPED = ("auto", "max-autotune", "triton")


def _library_takes(site: Site) -> bool:
    """Whether torch multiplies a stack in FP8 as it is (see `falqon_fx.ops.grouped.takes_fp8`)."""
    in_16 = site.out_features % 16 == 0 and site.in_features % 16 == 0
    return site.architecture in (90, 100) and site.out_dtype == "bfloat16" and in_16


def candidates(site: Site) -> list[GemmSpec] | list[GroupedGemmSpec]:
    """The generated kernels for the forward product of a site alone, the likeliest first; a stack
    of experts has one.
    """
    from falqon_fx.kernels.gemm.forms import specs_for
    from falqon_fx.kernels.gemm.tiles import GemmProblem
    from falqon_fx.kernels.grouped_gemm.tiles import grouped_spec

    if site.experts:
        dtypes: Any = {"dtype": site.out_dtype, "a_dtype": site.out_dtype}
        given = family(site.architecture), site.in_features
        return [grouped_spec(*given, rank=site.rank, gather=site.gathered > 0, **dtypes)]

    spec = parse_spec(site.spec)
    in_k = spec.adapter == "fp8" and site.rank > 0
    bf16_or_wide = "bfloat16" if site.out_dtype == "bfloat16" else "float32"
    problem = GemmProblem(
        n=site.tokens_hint,
        k=aligned(site.in_features),
        rows=(site.out_features,),
        a_pieces=0,
        x="e4m3",
        x_scale=spec.granularity,
        w_scale="row" if spec.base_per_row else "tensor",
        out_dtype=site.out_dtype,  # type: ignore[arg-type]
        a_dtype=site.out_dtype if in_k else bf16_or_wide,  # type: ignore[arg-type]
        bias="none",
        rank=aligned(site.rank) if in_k else site.rank,
        tail=in_k,
        accumulation=spec.accumulation,
        one_tensor=True,
        packed=spec.base == "nvfp4",
    )
    if not multiplies_fp8(site.architecture) and not problem.packed:
        return []
    sizes = sizes_of([problem.rank], problem.rows)
    return specs_for(problem, sizes, family(site.architecture))


def source(site: Site) -> str:
    """The source of the kernel of a site; for "aten" the composition that the compiler gets."""
    if site.kernel == "aten":
        import inspect

        from falqon_fx.ops import experts_lowering, lowering

        parts: tuple[Any, ...] = (lowering.merged_linear, lowering.merged_linear_grad_x)
        if site.experts:
            parts = (experts_lowering.lower_merged_experts, experts_lowering.lower_grad_x)
        return "\n\n".join(inspect.getsource(part) for part in parts)
    kind, _, name = site.kernel.partition(":")
    if kind != "triton":
        return f"# {one_line(site.kernel)}: torch's own product"
    known = _generated(site, name)
    return known or f"# {one_line(site.kernel)}: its source is not on this machine"


def _generated(site: Site, name: str) -> str:
    """The source of a generated kernel: of one for the site alone, or from the folder where kernels
    that have run are kept.
    """
    from falqon_fx.kernels.cache import cache_folder
    from falqon_fx.kernels.render import render

    try:
        specs = candidates(site)
    except ValueError:  # a report of a file may name dtypes that no kernel takes
        specs = []
    for spec in specs:
        if spec.name == name:
            return render(spec)
    if not name.isidentifier():  # a report names it: no pattern, no path
        return ""
    try:
        kept = [file for file in cache_folder().glob(f"{name}-*.py") if file.is_file()]
        last = max(kept, key=lambda file: file.stat().st_mtime, default=None)
        return last.read_text(encoding="utf-8", errors="replace") if last else ""
    except OSError:  # such as of a folder that another user planted
        return ""
