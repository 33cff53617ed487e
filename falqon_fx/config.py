"""`FalqonConfig`: every option, its values and its default."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from falqon_fx.errors import FalqonConfigError

Update = Literal["adapter", "rows"]
AdapterForm = Literal["bfloat16", "fp8"]
AdapterDtype = Literal["auto", "bfloat16", "fp8"]
BaseDtype = Literal["fp8", "int8", "nvfp4"]
Frozen = Literal["fp8", "leave"]
Init = Literal["svd", "keep"]
Granularity = Literal["tensor", "row"]
Scale = Literal["amax", "pow2"]
GradDtype = Literal["e5m2", "e4m3"]
Dropout = Literal["exact", "ignore", "reject"]
Kernel = Literal["auto", "triton", "scaled_mm", "inductor", "dequantize"]
Accumulation = Literal["fast", "promoted"]
Transpose = Literal["auto", "transient", "store", "kernel"]
Inner = Literal["inductor", "aot_eager", "eager"]
Pending = Literal["hold", "drop", "apply"]
Rounding = Literal["nearest", "stochastic"]

_ROWS_CHOICES = {"pending": get_args(Pending), "rounding": get_args(Rounding)}
# What update="rows" takes where nothing is said; with update="adapter" they must not be given.
_ROWS_DEFAULTS: dict[str, Any] = {"pending": "apply", "rounding": "stochastic"}

# Where none is given.
_SCALES: dict[BaseDtype, Scale] = {"fp8": "pow2", "int8": "amax", "nvfp4": "pow2"}

_ROWS = 10  # written per step where no topk is given


@functools.cache
def literals(kind: type) -> dict[str, tuple[str, ...]]:
    """The values that each field of a class may have whose type is a `Literal`."""
    hints = get_type_hints(kind)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def check_literals(given: Mapping[str, Any], valid: Mapping[str, tuple[str, ...]]) -> None:
    """Raises ValueError where a value is outside its `Literal`."""
    for name, values in valid.items():
        if given[name] not in values:
            raise ValueError(f"{name}={given[name]!r}: expected one of {', '.join(values)}")


@dataclass(frozen=True)
class FalqonConfig:
    """Options of ``torch.compile(model, backend="falqon", options={...})``.

    Args:
        update: how the optimizer's steps reach W' = [[W, s·B], [A, 0]]. "adapter": W is cast once
            and never changes; A and s·B are cast from the parameters whenever the graph runs.
            "rows" is the paper's method: rows of W' are written in place (options below).
        base_dtype: what W, x and A are cast to. "fp8" is E4M3. "int8", for CPUs and for GPUs
            without FP8, has a third of its error where no value is far above its row's others, as
            after a calibration, which leaves the largest channels of x out; dL/dO stays in the
            model's dtype then. "nvfp4" is W alone in four bits
            (`falqon_fx.site.nvfp4`), 0.56 bytes a weight, with x and A in FP8.
        adapter_dtype: how s·B enters the product. "bfloat16" adds s·O_A·Bᵀ to the FP8 product.
            "fp8" makes O_A and s·B further columns of it (`falqon_fx.ops.fp8_adapter`): O and dL/dx
            are one plain FP8 product each, on a GPU of siblings together; on a CPU it is no faster.
            It clamps where an adapter is about a third of its base weight; ``.saturated`` of
            `adapters` counts, and the next compilation gives such a site "bfloat16". "auto" is
            "fp8" on NVIDIA's GPUs from sm_89 on, for ranks up to 128 and results in bfloat16, and
            "bfloat16" elsewhere and where several processes train one model.
        frozen: frozen linear layers without an adapter run in "fp8" too, or "leave" them as they
            are. Output heads, tied weights, routers and small layers are always left.
        init: "keep" leaves lora_A as it is. "svd" overwrites it with the top right singular vectors
            of the FP8 error of W (FALQON, arXiv 2510.24061), only where lora_B is still zero.
        granularity: "row" gives each row of W and of A and each token its own scale, "tensor" each
            matrix one scale.
        scale: "pow2" rounds scales up to powers of two, which dequantize exactly into bf16; the
            default for FP8. "amax" is amax / the largest number (the paper); the default for INT8,
            whose steps grow with the scale.
        grad_dtype: FP8 format of dL/dO in dL/dx.
        siblings: sites that share x (q/k/v, gate/up) become one op with one cast and one GEMM.
        dropout: adapter dropout. "exact": the adapter reads the dropped x, the base layer x itself,
            as in the original. "ignore" leaves it out, "reject" leaves the site as it was.
        kernel: what computes the products on a GPU. "auto" times the candidates once per device and
            keeps the fastest; the others force generated kernels, the library's, Inductor's or
            plain GEMMs. Inductor's, which take long to compile, are among the candidates of "auto"
            where ``mode`` is "max-autotune" or its like.
        accumulation: how FP8 products are summed on a GPU. "promoted" adds up in float32 where
            tensor cores keep fewer bits (sm_90), "fast" leaves it to them.
        transpose: how dL/dx reads W on a GPU. "transient" transposes W's bytes each time, "kernel"
            reads W as it lies, "store" keeps the transpose beside W, which takes as much memory
            again. "auto" keeps it where the tensor cores want it, a step has at most 16384 tokens,
            and the model with all transposes, gradients and AdamW's moments takes at most half of
            the card's memory; else it takes what is faster of the first two. With adapters in FP8
            "store" and "auto" keep another copy of W, with room for them, by the same limits, where
            the library makes O.
        inner: the compiler that gets the rewritten graph.
        include: shell patterns on the module paths of sites; without any, all are rewritten.
        exclude: shell patterns on the module paths of sites that stay as they are. "sensitive:8"
            stands for the eight whose casts cost most, beside what a calibration buys back of
            them; `prepare` finds them where it has one, and names them in its report's ``config``,
            which compiling then takes.
        card: the card that times are predicted for, a name of ``falqon-fx cost --cards``; by
            default the one at hand.
        min_gain: leave a site alone where the cost model predicts time before / time after below
            this; off by default.
        seed: seeds the randomized SVD, and stochastic rounding with update="rows".
        mode: Inductor's mode (torch refuses ``mode=`` beside ``options=``).
        inductor: options handed to Inductor; in ``options=`` they are the keys with a dot.
        pending: with update="rows": what happens to the part of B that is not yet in W'. "apply"
            (default) adds it to the output, "hold" keeps it until its row is written (the paper),
            "drop" zeroes B after each write (the public code).
        topk: with update="rows": rows written per optimizer step: a count >= 1, a fraction in
            (0, 1], or "all". None is 10, or all rows of a layer that has fewer.
        rounding: with update="rows": how written rows are rounded. "stochastic" (default) is
            unbiased and reproducible from ``seed``.

    Raises:
        FalqonConfigError: a value that the option doesn't take, or an option of update="rows" given
            with update="adapter".
    """

    update: Update = "adapter"
    base_dtype: BaseDtype = "fp8"
    adapter_dtype: AdapterDtype = "auto"
    frozen: Frozen = "fp8"
    init: Init = "keep"
    granularity: Granularity = "row"
    scale: Scale | None = None
    grad_dtype: GradDtype = "e5m2"
    siblings: bool = True
    dropout: Dropout = "exact"
    kernel: Kernel = "auto"
    accumulation: Accumulation = "fast"
    transpose: Transpose = "auto"
    inner: Inner = "inductor"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    card: str | None = None
    min_gain: float | None = None
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    pending: Pending | None = None
    topk: int | float | Literal["all"] | None = None
    rounding: Rounding | None = None

    def __new__(cls, *args: Any, **options: Any) -> FalqonConfig:
        """Names an unknown option, where the dataclass's own __init__ would raise a TypeError."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                raise FalqonConfigError(
                    name,
                    f"is unknown: the options are {', '.join(known)}, and Inductor's, with a dot",
                    f"The nearest option is {near[0]!r}",
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, choices in literals(FalqonConfig).items():
            _check_choice(name, getattr(self, name), choices)
        if self.scale is None:
            object.__setattr__(self, "scale", _SCALES[self.base_dtype])
        _check_choice("scale", self.scale, get_args(Scale))
        if not isinstance(self.siblings, bool):
            raise FalqonConfigError(
                "siblings", f"{self.siblings!r} is no bool", "Give True or False"
            )
        self._check_rows()
        if self.base_dtype != "fp8":
            self._check_base_dtype()
        if self.adapter_dtype == "fp8" and self.update == "rows":
            raise FalqonConfigError(
                "adapter_dtype",
                '"fp8" is not there for update="rows", which has the adapter in the FP8 weight',
                'Leave it out, or set update="adapter"',
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise FalqonConfigError("seed", f"{self.seed!r} is not an integer >= 0", "Give one")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        _check_min_gain(self.min_gain)
        if self.card is not None and not isinstance(self.card, str):
            raise FalqonConfigError("card", f"{self.card!r} is not a name", "Give a card's name")
        if self.mode is not None and not isinstance(self.mode, str):
            raise FalqonConfigError(
                "mode", f"{self.mode!r} is not a string", "Give Inductor's mode"
            )
        if not isinstance(self.inductor, Mapping):
            raise FalqonConfigError("inductor", "not a mapping", "Give option names and values")

    def _check_rows(self) -> None:
        """Fill in the defaults of update="rows", and refuse its options elsewhere."""
        if self.update == "adapter":
            for name in (*_ROWS_CHOICES, "topk"):
                if getattr(self, name) is not None:
                    raise FalqonConfigError(
                        name,
                        'belongs to update="rows"; with update="adapter" nothing is written into '
                        "the FP8 weight",
                        f'Leave {name} out, or set update="rows"',
                    )
            return
        for name, choices in _ROWS_CHOICES.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, _ROWS_DEFAULTS[name])
            _check_choice(name, getattr(self, name), choices)
        _check_topk(self.topk)

    def _check_base_dtype(self) -> None:
        """Refuse what is built for FP8 alone."""
        alone = {"update": ("adapter",), "adapter_dtype": ("auto", "bfloat16")}
        if self.base_dtype == "int8":
            alone["grad_dtype"] = ("e5m2",)
        for name, values in alone.items():
            if getattr(self, name) not in values:
                given, form = getattr(self, name), self.base_dtype
                raise FalqonConfigError(
                    name,
                    f'{given!r} is of FP8 weights, and base_dtype="{form}" has none',
                    f'Leave {name} out, or set base_dtype="fp8"',
                )
        stores = self.transpose == "store"
        in_fp8 = stores or self.kernel in ("scaled_mm", "inductor")
        if self.base_dtype != "fp8" and in_fp8:
            name = "transpose" if stores else "kernel"
            raise FalqonConfigError(
                name,
                f"{getattr(self, name)!r} is of FP8 products, and "
                f'base_dtype="{self.base_dtype}" has others',
                'Give kernel="auto", "triton" or "dequantize", and transpose="auto"',
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> FalqonConfig:
        """The config that ``torch.compile(options=...)`` means.

        A whole `FalqonConfig` may stand under "config"; keys with a dot go to Inductor.
        """
        options = dict(options or {})
        base = options.pop("config", None)
        if base is not None and not isinstance(base, cls):
            raise FalqonConfigError("config", f"{base!r} is not a FalqonConfig", "Give one")
        inductor = {name: options.pop(name) for name in list(options) if "." in name}
        values = {f.name: getattr(base, f.name) for f in fields(cls)} if base else {}
        if (
            base and options.get("update", base.update) != base.update
        ):  # these belong to one of them
            values.update(dict.fromkeys((*_ROWS_CHOICES, "topk")))
        if base and options.get("base_dtype", base.base_dtype) != base.base_dtype:
            values["scale"] = None
        values.update(options)
        values["inductor"] = {**values.get("inductor", {}), **inductor}
        return cls(**values)

    def texts(self) -> dict[str, str]:
        """Every option with its value as text, for a report."""
        return {f.name: str(getattr(self, f.name)) for f in fields(self)}

    def rows(self, out: int, site: str = "a site") -> int:
        """Rows written per step at a site with ``out`` rows.

        Raises:
            FalqonConfigError: a count above ``out``.
        """
        if self.topk == "all":
            return out
        if self.topk is None:
            return min(_ROWS, out)
        if isinstance(self.topk, float):
            return max(1, round(self.topk * out))
        if self.topk > out:
            raise FalqonConfigError(
                "topk",
                f"{self.topk} rows are asked, {site} has {out}",
                'Give a smaller count, a fraction in (0, 1], or "all"',
            )
        return int(self.topk)

    def sensitive(self) -> int:
        """How many sites ``exclude`` leaves for the cost of their casts."""
        return max((int(n.partition(":")[2]) for n in self.exclude if _is_count(n)), default=0)

    def leaving(self, paths: Sequence[str]) -> FalqonConfig:
        """This config with ``paths`` in the place of "sensitive:8" in ``exclude``."""
        others = tuple(pattern for pattern in self.exclude if not _is_count(pattern))
        return replace(self, exclude=(*others, *map(glob.escape, paths)))

    def selects(self, *paths: str) -> bool:
        """Whether ``include`` and ``exclude`` admit the site that goes by ``paths``.

        Raises:
            FalqonConfigError: "sensitive:8" is in ``exclude``, of which a config knows no paths.
        """
        if count := self.sensitive():
            raise FalqonConfigError(
                "exclude",
                f"'sensitive:{count}' stands for layers that a calibration names",
                "Give the config of what prepare(model, config, calibration=batches) returns, or "
                f"explain(model, ..., calibration=batches).most_sensitive({count})",
            )
        included, excluded = (
            any(fnmatch.fnmatch(path, pattern) for path in paths for pattern in patterns)
            for patterns in (self.include, self.exclude)
        )
        return (included or not self.include) and not excluded


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
        raise FalqonConfigError(
            name,
            f"{value!r} is none of {', '.join(map(repr, choices))}",
            f"The nearest is {near!r}",
        )


def _check_topk(topk: object) -> None:
    problem = None
    if topk == "all" or topk is None:
        return
    if isinstance(topk, bool) or not isinstance(topk, int | float):
        problem = f"{topk!r} is neither a count, a fraction nor 'all'"
    elif isinstance(topk, int) and topk < 1:
        problem = f"the count {topk} is below 1"
    elif isinstance(topk, float) and not 0 < topk <= 1:
        problem = f"the fraction {topk} is outside (0, 1]"
    if problem:
        raise FalqonConfigError("topk", problem, 'Give an int >= 1, a float in (0, 1], or "all"')


def _check_min_gain(gain: object) -> None:
    if gain is None:
        return
    if isinstance(gain, bool) or not isinstance(gain, int | float) or not gain > 0:
        raise FalqonConfigError("min_gain", f"{gain!r} is not a number > 0", "Give one, or None")


def _patterns(name: str, value: object) -> tuple[str, ...]:
    value = (value,) if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or not all(isinstance(p, str) for p in value):
        raise FalqonConfigError(name, f"{value!r} is not a list of patterns", "Give strings")
    for pattern in value:
        count = pattern.partition(":")[2]
        if _is_count(pattern) and not (name == "exclude" and count.isdecimal() and int(count)):
            raise FalqonConfigError(name, f"{pattern!r} is no pattern", 'exclude="sensitive:8" is')
    return tuple(value)


def _is_count(pattern: str) -> bool:
    """Whether it stands for sites by the cost of their casts."""
    return pattern.startswith("sensitive:")
