"""What the passes did and why: data, then text, page, diff."""

from falqon_fx.report.report import json_schema

__all__ = ["json_schema"]
