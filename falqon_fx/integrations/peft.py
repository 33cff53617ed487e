"""PEFT's adapters of stacked experts, beside layers that are merged."""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

_forward = torch.compiler.disable(
    ParamWrapper.forward,
    reason="PEFT parametrizes the weight in each forward pass (falqon_fx.integrations.peft)",
)


def run_param_wrappers_eagerly(model: nn.Module) -> list[str]:
    """Run what PEFT's ``ParamWrapper`` adapts, stacked experts above all, outside compiled code.

    A ``ParamWrapper`` registers a parametrization in each forward pass and takes it off again.
    Under any backend this breaks the graph several times a layer and compiles code anew in each
    step, until Dynamo's limit of 8 (https://github.com/huggingface/peft/pull/3304); from then on
    the same modules run eagerly. With this call they do so from the start, and nothing compiles
    again. The numbers are the same, and the linear layers outside of them are merged as ever.

    Call it before the first step. It sets ``forward`` on each wrapper of this model and on nothing
    else; copies of the model keep it.

    Returns:
        The paths of the wrappers; none where PEFT adapts layers only.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            wrapper: Any = module
            wrapper.forward = types.MethodType(_forward, module)
            found.append(path)
    return found
