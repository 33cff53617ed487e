"""PEFT's adapters of stacked experts, as code that compiles into one graph."""

from falqon_fx.model.param_wrappers import (
    TracedParamWrapper,
    trace_param_wrappers,
    untrace_param_wrappers,
)

__all__ = ["TracedParamWrapper", "trace_param_wrappers", "untrace_param_wrappers"]
