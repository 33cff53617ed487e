"""`Base`, a base weight in FP8 or INT8, and the registry that finds it again.

A base belongs to W alone and is constant: all adapters, graphs, threads and options that only
change the adapter share it. It lives as long as W does.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from falqon_fx._compat import is_fake, version
from falqon_fx.errors import FalqonError
from falqon_fx.site import nvfp4
from falqon_fx.site.clamped import ClampedCount
from falqon_fx.site.forms import code_of, operand_of, scale_shape, whole_scale
from falqon_fx.site.looks import look, looks_like
from falqon_fx.site.numerics import (
    INT8,
    amax_to_scale,
    decode_fp8,
    encode_fp8,
    odd_factors,
    round_to_fp8,
)
from falqon_fx.site.sharded import added_up, local
from falqon_fx.site.spec import SiteSpec

T = TypeVar("T")
_ByStorage = weakref.WeakKeyDictionary[Any, T]
_CACHED = 1 << 15  # elements that a core casts at a time
_REMEDY = "Repair the checkpoint, or leave the layer out with exclude="


@dataclass(frozen=True)
class Base:
    """W ≈ ``code`` · ``scale``: E4M3 bytes (uint8) or int8 [out, in], float32 [out, 1] or []; or
    NVFP4 (`falqon_fx.site.nvfp4`), uint8 [out, 9, in / 16] and [].
    """

    code: Tensor
    scale: Tensor

    @functools.cached_property
    def weight(self) -> Tensor:
        """W, float8_e4m3fn or int8 [out, in], or packed."""
        with torch.inference_mode(False):  # it outlives the call
            return operand_of(self.code)

    @property
    def nbytes(self) -> int:
        return self.code.nbytes + self.scale.nbytes

    def dequantize(self) -> Tensor:
        """dq(W), float32 [out, in]."""
        if nvfp4.is_packed(self.code):
            return nvfp4.decode(self.code, self.scale, torch.float32)
        return decode_fp8(self.code, self.scale, torch.float32)


def cast_base(weight: Tensor, spec: SiteSpec, amax: Tensor | None = None) -> Base:
    """W [out, in] cast to nearest, with one scale per row or one for all of it. ``amax`` [out, 1]
    or [], what the scales are made for where W is a part of something larger.
    """
    # A base outlives the call: no inference tensors, no autocast, no graph.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(weight.device.type, enabled=False),
    ):
        weight = weight.detach()
        (out, features), device, operand = weight.shape, weight.device, spec.operand
        shape, dtype = code_of(out, features, spec)
        code = torch.empty(shape, dtype=dtype, device=device)
        scale = torch.empty(scale_shape(out, spec), dtype=torch.float32, device=device)
        if amax is not None or not spec.base_per_row:
            amax = weight.abs().amax() if amax is None else amax
            scale.copy_(whole_scale(amax, spec))
        for rows in row_chunks(weight):
            value = weight[rows].to(torch.float32)
            if spec.base == "nvfp4":
                code[rows] = nvfp4.cast(value, scale)
                continue
            of_rows = scale[rows] if spec.per_row else scale
            if spec.per_row and amax is None:
                of_rows = amax_to_scale(value.abs().amax(1, keepdim=True), operand, spec.scale)
                scale[rows] = of_rows
            value = round_to_fp8(value * of_rows.reciprocal(), operand)
            code[rows] = encode_fp8(value, operand)
    return Base(code, scale)


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """The rows of a weight in pieces whose intermediate results stay in a CPU's cache; all rows at
    once elsewhere.
    """
    rows, columns = weight.shape
    step = rows
    if weight.device.type == "cpu":
        step = max(1, _CACHED * torch.get_num_threads() // max(1, columns))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


@torch.no_grad()  # or a checkpoint around the first call would see tensors saved for backward
def check_weight(path: str, weight: Tensor, name: str = "base weight") -> None:
    """Refuse a weight that FP8 can't hold.

    Raises:
        FalqonError: it holds NaN or Inf or nothing (meta), or lies beyond what an FP8 scale can
            carry.
    """
    if weight.is_meta:
        raise FalqonError(
            path, f"its {name} is on the meta device", "Give it values before the first call"
        )
    amax = weight.abs().amax()
    if not torch.isfinite(amax):  # NaN and Inf reach the amax
        raise FalqonError(path, f"its {name} holds NaN or Inf", _REMEDY)
    if amax >= 2.0**16:
        raise FalqonError(
            path,
            f"its {name} exceeds 65536 in magnitude, beyond the FP8 scales in use",
            "Rescale the layer, or leave it out with exclude=",
        )


@torch.no_grad()
def check_scale(path: str, scale: Tensor, where: str) -> None:
    """Refuse scales that came from a file and are no positive numbers; float32, of any shape.

    Raises:
        FalqonError: one that is NaN, Inf, zero or negative.
    """
    own = local(scale)
    bad = torch.stack([own.isnan(), own.isinf(), own == 0, own < 0]).reshape(4, -1).sum(1)
    counts = added_up(bad, scale).tolist()
    for count, kind in zip(counts, ("NaN", "Inf", "zero", "negative"), strict=True):
        if count:
            problem = f"{count} of its {scale.numel()} scales in {where} are {kind}"
            raise FalqonError(path, problem, _REMEDY)


@torch.no_grad()
def check_base(path: str, base: Base, where: str) -> None:
    """Refuse a base that came from a file and holds something else than numbers.

    Raises:
        FalqonError: a byte that is NaN, or a scale that is NaN, Inf, zero or negative.
    """
    check_scale(path, base.scale, where)
    code = local(base.code)
    if code.dtype == INT8:
        return
    if packed := nvfp4.is_packed(code):
        code = nvfp4.block_scales(code)
    magnitude = torch.tensor(0x7F, dtype=torch.uint8, device=code.device)
    nan = torch.zeros((), dtype=torch.int64, device=code.device)
    for rows in row_chunks(code):
        nan += (code[rows] >= magnitude if packed else (code[rows] & magnitude) == magnitude).sum()
    if count := int(added_up(nan, base.code)):
        kind = "block scales in {} are NaN or negative" if packed else "FP8 bytes in {} are NaN"
        raise FalqonError(path, f"{count} of its {kind.format(where)}", _REMEDY)


@dataclass(frozen=True)
class BaseParameter:
    """A base weight ``param`` as a graph reads it, or a stack of them; ``transposed`` where these
    are stored [in, out].
    """

    path: str
    param: Tensor
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """[out, in], of a stack all rows of all experts."""
        weight = self.param.transpose(-2, -1) if self.transposed else self.param
        return weight.flatten(0, -2)


DIGEST_BYTES = 8


def digest(code: Tensor, scale: Tensor) -> Tensor:
    """A 64-bit hash of the bytes [out, in] of a base and the bits of its scale, uint8 [8]: Σ over
    64-bit words of word · p_row · q_column mod 2**64, with odd p and q. Any single change shows.

    As bytes, like the weight's: what averages equal numbers gives them back in 8 bits, but not in
    64.
    """
    code = code.detach().flatten(1)
    bits = scale.detach().contiguous().view(torch.int32).reshape(-1).to(torch.int64)
    total = (bits * odd_factors(len(bits), 0x3F58476D1CE4E5B9, code.device)).sum()
    whole = code.shape[1] % 8 == 0 and code.is_contiguous() and code.storage_offset() % 8 == 0
    of_rows = odd_factors(code.shape[0], 0x1E3779B97F4A7C15, code.device)
    for rows in row_chunks(code):
        part = code[rows]
        words = part.view(torch.int64) if whole else part.to(torch.int64)
        columns = odd_factors(words.shape[1], 0x2545F4914F6CDD1D, code.device)
        total = total + ((words * columns).sum(1) * of_rows[rows]).sum()
    return total.reshape(1).view(torch.uint8)


@dataclass(frozen=True, eq=False)
class Entry:
    """A base, and the W that it was made from: ``stamp`` and ``seen`` tell whether W is still that.
    Of a prepared layer the same of its bytes, and no ``base``, which would keep them alive.
    """

    base: Base | None
    stamp: tuple[Any, ...]
    seen: Tensor

    def is_of(self, tensor: Tensor, stamp: tuple[Any, ...], wait: bool) -> bool:
        return self.stamp == stamp and looks_like(tensor, self.seen, wait)

    @functools.cached_property
    def clamped(self) -> ClampedCount:
        """How much of its adapters in FP8 a GPU has clamped."""
        return ClampedCount(self.seen.device)


Place = tuple[int, int]


def place(tensor: Tensor) -> Place:
    """What tells parameters apart while they live: those of a flat buffer share a storage."""
    return id(tensor.untyped_storage()), int(tensor.storage_offset())


# The memories of A and B, their places, and the scaling.
_Adapter = tuple[weakref.ref[Any], weakref.ref[Any], Place, Place, float]


@dataclass(frozen=True)
class CastOfAdapter:
    """How a graph casts an adapter: by which `SiteSpec`, and whether s·B is kept in float32."""

    spec_text: str
    wide: bool


class Bases:
    """The bases of a process by the memory of W, with which they go."""

    def __init__(self) -> None:
        # By storages, not by tensors: a tensor with weak references can't be swapped, which
        # torch.__future__.set_swap_module_params_on_conversion asks for.
        self._bases: _ByStorage[dict[Any, Entry]] = weakref.WeakKeyDictionary()
        self._adapters: _ByStorage[dict[Any, _Adapter]] = weakref.WeakKeyDictionary()
        self._casts: _ByStorage[dict[int, CastOfAdapter]] = weakref.WeakKeyDictionary()
        self._verified: _ByStorage[dict[int, Entry]] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()
        self.changes = 0  # of what `remember_adapters` was told

    def get(
        self, wanted: Sequence[BaseParameter], spec: SiteSpec, wait: bool = False
    ) -> list[Entry]:
        """The bases of some weights, cast where there is none yet or W was written since; none is
        made unless all can be.

        A write is seen by the version counter, by another address, or by the `sample` of W's
        contents: on a GPU where it may ``wait`` for that.

        Raises:
            FalqonError: a W holds NaN or Inf, or lies beyond what an FP8 scale can carry.
        """
        with self._lock:
            found = [self._find(site, spec, wait) for site in wanted]
            for site, entry in zip(wanted, found):
                if entry is None:
                    check_weight(site.path, site.param)
            return [entry or self._make(site, spec) for site, entry in zip(wanted, found)]

    def _find(self, site: BaseParameter, spec: SiteSpec, wait: bool) -> Entry | None:
        entries = self._bases.get(site.param.untyped_storage(), {})
        entry = entries.get(_key(site, spec))
        found = entry is not None and entry.is_of(site.param, _stamp(site.param), wait)
        return entry if found else None

    def _make(self, site: BaseParameter, spec: SiteSpec) -> Entry:
        base = cast_base(site.weight, spec)
        entry = Entry(base, _stamp(site.param), look(site.param))
        entries = self._bases.setdefault(site.param.untyped_storage(), {})
        entries[_key(site, spec)] = entry
        return entry

    def of(self, weight: Tensor) -> list[Base]:
        """The bases made from a parameter W, one per granularity and kind of scale; none that is
        out of date.
        """
        entries = self._bases.get(weight.untyped_storage(), {}).values()
        return [e.base for e in entries if e.base is not None and e.stamp == _stamp(weight)]

    def forget(self, weight: Tensor) -> None:
        """Drop the bases of a parameter."""
        self._bases.pop(weight.untyped_storage(), None)

    def verify(self, path: str, base: Base, expected: Tensor, wait: bool = False) -> Entry:
        """Look whether the bytes of a prepared base are those that were made; all of them only
        where they were written, which is seen as a write into W is (`get`). FSDP frees the memory
        of a gathered parameter and fills it anew, elsewhere: its address tells nothing.

        Raises:
            FalqonError: they are not.
        """
        if base.code.is_meta or is_fake(base.code):
            return Entry(None, (), base.code)  # no bytes to look at
        verified = self._verified.setdefault(base.code.untyped_storage(), {})
        offset = int(base.code.storage_offset())
        known = verified.get(offset)
        stamp = (_written(base.code), _written(base.scale))
        if known is not None and known.is_of(base.code, stamp, wait):
            return known
        if not torch.equal(digest(base.code, base.scale), expected.detach()):
            raise FalqonError(
                path,
                "the bytes of its FP8 base are not those that prepare() made: something has "
                "averaged or overwritten them, as an EMA of all parameters does",
                "Average the trained parameters alone (those with requires_grad): the base is "
                "constant",
            )
        verified[offset] = entry = Entry(None, stamp, look(base.code))
        return entry

    def remember_adapters(self, given: Iterable[tuple[Tensor, Tensor, Tensor, float]]) -> int:
        """Note that a graph adds scaling · B · A to the weight that ``owner``, W or the bytes of
        a prepared W, stands for, of each (owner, A, B, scaling): `falqon_fx.adapters` asks. As long
        as `changes` is what this returns, no graph has noted anything else since.
        """
        with self._lock:
            for owner, lora_a, lora_b, scaling in given:
                known = self._adapters.setdefault(owner.untyped_storage(), {})
                a, b = (weakref.ref(tensor.untyped_storage()) for tensor in (lora_a, lora_b))
                key = (owner.storage_offset(), place(lora_b))
                noted = (a, b, place(lora_a), place(lora_b), scaling)
                if known.get(key) != noted:
                    for gone in [k for k, (a, b, *_) in known.items() if None in (a(), b())]:
                        del known[gone]
                    known[key] = noted
                    self.changes += 1
            return self.changes

    def adapters_of(self, owner: Tensor) -> list[tuple[Place, Place, float]]:
        """(place of A, place of B, scaling) of the adapters that graphs added to a weight, as far
        as they live.
        """
        known = self._adapters.get(owner.untyped_storage(), {}).items()
        mine = [each for (offset, _), each in known if offset == owner.storage_offset()]
        return [(a, b, s) for of_a, of_b, a, b, s in mine if None not in (of_a(), of_b())]

    def remember_cast(self, lora_b: Tensor, cast: CastOfAdapter) -> None:
        """Note how the graph that ran last casts an adapter: `falqon_fx.watch` asks."""
        self._casts.setdefault(lora_b.untyped_storage(), {})[int(lora_b.storage_offset())] = cast

    def cast_of(self, lora_b: Tensor) -> CastOfAdapter | None:
        """How an adapter is cast; None where no graph has used it yet."""
        return self._casts.get(lora_b.untyped_storage(), {}).get(int(lora_b.storage_offset()))


def _key(site: BaseParameter, spec: SiteSpec) -> tuple[Any, ...]:
    w = site.param
    place = (w.storage_offset(), w.shape, w.stride(), w.dtype)
    return (spec.base, spec.granularity, spec.scale, site.transposed, *place)


def _stamp(weight: Tensor) -> tuple[Any, ...]:
    return (weight.data_ptr(), *_written(weight))


def _written(weight: Tensor) -> tuple[Any, ...]:
    return (version(weight), weight.dtype, weight.device, weight.shape)


bases = Bases()
