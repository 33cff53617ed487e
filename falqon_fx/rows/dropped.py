"""pending="drop": the steps lie in W' alone, since B is zeroed behind each write.

So W' must not be made anew from the base weight and B, and B alone is not worth saving.
"""

from __future__ import annotations

import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from falqon_fx.errors import one_line
from falqon_fx.site.names import model_of_call, modules_of

CHANGED = (
    'with pending="drop" what was trained lies in its FP8 weight alone (lora_B was zeroed), which '
    "would be made anew without it, since its base weight or lora_A was changed, moved or loaded"
)
PREPARED = (
    'with pending="drop" what was trained lies in its FP8 weight alone (lora_B was zeroed), which '
    "prepare() would make anew without it"
)
OTHER = (
    'with pending="drop" what was trained lies in its FP8 weight alone (lora_B was zeroed), and '
    "one made for other options or another scaling would be without it"
)
RESTORED = (
    'with pending="drop" what was trained lies in its FP8 weight alone (lora_B was zeroed), and '
    "would be thrown away"
)
REMEDY = (
    "falqon_fx.merge_and_unload(model) or falqon_fx.save_checkpoint(model, folder) keeps it; to "
    "start over, make the model anew"
)


def lies_in_w(applied: Tensor, lora_b: Tensor | None) -> bool:
    """Whether W' contains steps that B doesn't: what was applied is neither nothing
    nor B itself.
    """
    if not applied.any():
        return False
    return lora_b is None or not torch.equal(applied, lora_b.detach().to(applied.dtype))


class SaveWatch:
    """Warns where someone takes a state dict of an adapter whose steps lie in W' alone, as
    ``save_pretrained`` does. Once for the adapters that one call of a graph announces.
    """

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # `_Known` by B

    def announce(self, sites: Iterable[tuple[Tensor, Tensor]]) -> None:
        """(B, applied) of sites whose model is being called."""
        new = {id(b): (b, applied) for b, applied in sites if not self._knows(b, applied)}
        if not new:
            return
        for b, applied in new.values():
            for hook in self._known[b].hooks if b in self._known else ():
                hook.remove()
            self._known[b] = _Known(weakref.ref(applied), [])
        group = _Group()
        for path, module in modules_of(model_of_call()):
            for name, parameter in vars(module)["_parameters"].items():
                if id(parameter) in new:
                    known, site = self._known[parameter], path.partition(".lora_")[0]
                    hook = _SaveHook(site, name, known.applied, group)
                    known.hooks.append(module.register_state_dict_pre_hook(hook))

    def _knows(self, lora_b: Tensor, applied: Tensor) -> bool:
        return lora_b in self._known and self._known[lora_b].applied() is applied


@dataclass(frozen=True)
class _Known:
    applied: weakref.ref[Tensor]
    hooks: list[RemovableHandle]  # of the modules that hold B


class _Group:
    told = False


class _SaveHook:
    """A hook of the module that holds B under ``name``. In a copy of the module, or a pickled one,
    it does nothing: that module's FP8 weight is another.
    """

    def __init__(
        self, site: str, name: str, applied: Callable[[], Tensor | None], group: _Group
    ) -> None:
        self._site, self._name, self._applied, self._group = site, name, applied, group

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        applied, b = self._applied(), vars(module)["_parameters"].get(self._name)
        if self._group.told or applied is None or b is None or _saves_everything():
            return
        if lies_in_w(applied, b):
            self._group.told = True
            warnings.warn(
                f"falqon: {one_line(self._site)}: a state dict without the FP8 weights holds "
                'nothing of what was trained with pending="drop": it lies in these weights alone, '
                f"and lora_B is zero. {REMEDY}.",
                stacklevel=2,
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing_to_say, ()


def _nothing_to_say() -> _SaveHook:
    return _SaveHook("", "", lambda: None, _Group())


def _saves_everything() -> bool:
    """Whether the library itself asks, as `save_checkpoint` does, which knows of
    the FP8 weights.
    """
    frames = (frame for frame, _ in traceback.walk_stack(sys._getframe()))
    names = (str(frame.f_globals.get("__name__", "")) for frame in frames)
    return any(n.startswith("falqon_fx.") for n in names if n != __name__)


save_watch = SaveWatch()
