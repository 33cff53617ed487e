"""falqon-fx: LoRA fine-tuning on an FP8 backbone, as a torch.compile backend.

Importing the package registers the ``falqon::`` ops, so that saved graphs that hold them load. What
takes longer to import is imported when its name is first read.
"""

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonConfigError, FalqonError
from falqon_fx.report.data import Audit, CastAudit, GraphReport, Rejected, Site
from falqon_fx.report.report import RewriteReport

if TYPE_CHECKING:  # `_HOMES` says the same at run time
    from falqon_fx.backend import RewriteResult, falqon, rewrite
    from falqon_fx.files.adapter import save_adapter
    from falqon_fx.files.checkpoint import CheckpointReport, load_checkpoint, save_checkpoint
    from falqon_fx.files.compiled import CompiledReport, load_compiled, save_compiled
    from falqon_fx.files.distributed_checkpoint import CheckpointState
    from falqon_fx.files.export import save_fp8
    from falqon_fx.files.export_report import ExportReport
    from falqon_fx.files.loading import load
    from falqon_fx.files.prequantize import PrequantizeReport, prequantize
    from falqon_fx.model.blocks import BlocksReport, compile_blocks
    from falqon_fx.model.explain import explain
    from falqon_fx.model.mesh import MeshPlan
    from falqon_fx.model.prepare import Adapter, adapters, flush, prepare, restore
    from falqon_fx.model.prepare_report import PrepareReport
    from falqon_fx.model.unload import merge_and_unload
    from falqon_fx.model.watching import watch
    from falqon_fx.rows.state import MergedAdapter

__version__ = _version("falqon-fx")  # pyproject.toml's

__all__ = [
    "Adapter",
    "Audit",
    "BlocksReport",
    "CastAudit",
    "CheckpointReport",
    "CheckpointState",
    "CompiledReport",
    "ExportReport",
    "FalqonConfig",
    "FalqonConfigError",
    "FalqonError",
    "GraphReport",
    "MergedAdapter",
    "MeshPlan",
    "PrepareReport",
    "PrequantizeReport",
    "Rejected",
    "RewriteReport",
    "RewriteResult",
    "Site",
    "adapters",
    "compile_blocks",
    "explain",
    "falqon",
    "flush",
    "load",
    "load_checkpoint",
    "load_compiled",
    "merge_and_unload",
    "prepare",
    "prequantize",
    "restore",
    "rewrite",
    "save_adapter",
    "save_checkpoint",
    "save_compiled",
    "save_fp8",
    "watch",
]

_HOMES = {
    "falqon_fx.backend": ("RewriteResult", "falqon", "rewrite"),
    "falqon_fx.files.adapter": ("save_adapter",),
    "falqon_fx.files.checkpoint": ("CheckpointReport", "load_checkpoint", "save_checkpoint"),
    "falqon_fx.files.compiled": ("CompiledReport", "load_compiled", "save_compiled"),
    "falqon_fx.files.distributed_checkpoint": ("CheckpointState",),
    "falqon_fx.files.export": ("save_fp8",),
    "falqon_fx.files.export_report": ("ExportReport",),
    "falqon_fx.files.loading": ("load",),
    "falqon_fx.files.prequantize": ("PrequantizeReport", "prequantize"),
    "falqon_fx.model.blocks": ("BlocksReport", "compile_blocks"),
    "falqon_fx.model.explain": ("explain",),
    "falqon_fx.model.mesh": ("MeshPlan",),
    "falqon_fx.model.prepare": (
        "Adapter", "adapters", "flush", "prepare", "restore",
    ),
    "falqon_fx.model.prepare_report": ("PrepareReport",),
    "falqon_fx.model.unload": ("merge_and_unload",),
    "falqon_fx.rows.state": ("MergedAdapter",),
    "falqon_fx.model.watching": ("watch",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_OPS = (
    "base_linear", "experts", "fp8_adapter", "gather_tokens", "merged_linear", "outliers",
    "products",    "wide_linear",
)  # fmt: skip

for _module in (*(f"falqon_fx.ops.{name}" for name in _OPS), "falqon_fx.rows.ops"):
    import_module(_module)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'falqon_fx' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
