"""falqon-fx: LoRA fine-tuning on an FP8 backbone, as a torch.compile backend."""

from falqon_fx.backend import RewriteResult, falqon, rewrite
from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonConfigError, FalqonError
from falqon_fx.files.checkpoint import CheckpointReport, load_checkpoint, save_checkpoint
from falqon_fx.files.distributed_checkpoint import CheckpointState
from falqon_fx.files.export import ExportReport, save_fp8
from falqon_fx.files.loading import load
from falqon_fx.files.prequantize import PrequantizeReport, prequantize
from falqon_fx.model.explain import explain
from falqon_fx.model.prepare import Adapter, PrepareReport, adapters, flush, prepare, restore
from falqon_fx.model.unload import merge_and_unload
from falqon_fx.report.data import Audit, GraphReport, Rejected, Site
from falqon_fx.report.report import RewriteReport
from falqon_fx.rows.state import MergedAdapter
from falqon_fx.rows.watching import watch

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Audit",
    "CheckpointReport",
    "CheckpointState",
    "ExportReport",
    "FalqonConfig",
    "FalqonConfigError",
    "FalqonError",
    "GraphReport",
    "MergedAdapter",
    "PrepareReport",
    "PrequantizeReport",
    "Rejected",
    "RewriteReport",
    "RewriteResult",
    "Site",
    "adapters",
    "explain",
    "falqon",
    "flush",
    "load",
    "load_checkpoint",
    "merge_and_unload",
    "prepare",
    "prequantize",
    "restore",
    "rewrite",
    "save_checkpoint",
    "save_fp8",
    "watch",
]
