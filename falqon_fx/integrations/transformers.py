"""transformers' `Trainer`, and all built on it (trl's `SFTTrainer`), with ``backend="falqon"``.

`TrainingArguments(torch_compile_backend=...)` takes only the names in accelerate's own list, so the
backend comes in through a callback, or through a mixin that turns the argument into the callback.
Both use nothing but public calls: `TrainerCallback`, ``nn.Module.compile``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.integrations.trainer_checkpoints import TrainerCheckpoints
from falqon_fx.model.blocks import compile_blocks
from falqon_fx.model.lora_layers import unwrap
from falqon_fx.model.prepare import prepare
from falqon_fx.model.watching import Watch, summary
from falqon_fx.site.sharded import refuse_old_fsdp2


class FalqonCallback(TrainerCheckpoints):
    """Compiles the trainer's model in place: ``Trainer(..., callbacks=[FalqonCallback()])``.

    The model keeps its class, so that saving, evaluation and PEFT's calls work as without it. The
    FP8 base is constant: the trainer's own checkpoints of a PEFT model, which hold the adapter and
    the optimizer, resume bit for bit and bring the best model back as it was, and trl's reference
    model (the adapter disabled, or a copy of it) gives the same numbers from first to last. The
    base is made from the model that the trainer gets, in a resumed run, too, which is
    warned where that is another base than it was saved on (`TrainerCheckpoints`). PEFT's adapters
    of stacked experts compile into the model's graph
    (`falqon_fx.integrations.peft.trace_param_wrappers`).

    With several processes it compiles block by block, so that gradients are exchanged while the
    backward pass goes on. Under DDP it sets ``torch._dynamo.config.optimize_ddp`` to False while
    the trainer trains: DDP's optimizer would cut through sites. Under FSDP2 it prepares the model
    before it is sharded, whatever ``prepare`` says.

    Args:
        config: options of the backend.
        prepare: call `falqon_fx.prepare`, which casts the base weights to FP8 and frees them, when
            training begins.
        regional: compile the repeated blocks and not the whole in one process, too
            (`falqon_fx.compile_blocks`): the first step takes a fraction of the time.
        generate: compile, in one process and without ``regional``, what ``model.generate`` calls,
            too, so that what a trainer samples is of the policy that it trains: at most six graphs
            more, none of them for a single token. By default where the trainer's arguments say that
            it samples (``num_generations``: trl's GRPO and RLOO). Without it a model that is not
            prepared generates from its own weights.
        checkpoints: add what the trainer's own checkpoints lack with update="rows", and of
            prepared models that are not PEFT's; of PEFT's what tells the base from others (see
            `TrainerCheckpoints`).
        compile_arguments: handed to ``torch.compile`` (``dynamic``, ``fullgraph``).

    Raises:
        FalqonError: the model, or ``TrainingArguments``, is compiled already; or with ``regional``
            there are no repeated blocks.
    """

    def __init__(
        self,
        config: FalqonConfig | None = None,
        *,
        prepare: bool = False,
        regional: bool = False,
        generate: bool | None = None,
        checkpoints: bool = True,
        **compile_arguments: Any,
    ) -> None:
        self.config, self.prepare = config or FalqonConfig(), prepare
        self.regional, self.generate, self.checkpoints = regional, generate, checkpoints
        self.compile_arguments = compile_arguments
        self._compiled: weakref.ref[nn.Module] | None = None
        self._training = contextlib.ExitStack()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compile before anything runs, `Trainer.evaluate` included."""
        self._compile(args, kwargs.get("model"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the model, and compile it where that was not possible yet: it comes from
        ``model_init``, or the trainer had it before it got this callback.
        """
        model = kwargs["model"]
        self._compile(args, model)
        if self.prepare and not _fsdp():
            prepare(model, self.config)
            if self.regional and args.world_size == 1:
                # Layers outside of the blocks are others now.
                compile_blocks(model, self.config, **self.compile_arguments)
        if args.world_size > 1:
            self._training.enter_context(torch._dynamo.config.patch(optimize_ddp=False))
        if self.checkpoints:
            super().on_train_begin(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give Dynamo's setting back."""
        self._training.close()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add what the checkpoint that the trainer just wrote lacks."""
        if self.checkpoints:
            super().on_save(args, state, control, **kwargs)

    def _compile(self, args: TrainingArguments, model: nn.Module | None) -> None:
        if args.torch_compile:
            raise FalqonError(
                "TrainingArguments",
                f"torch_compile compiles the model with {args.torch_compile_backend!r}, around "
                "what FalqonCallback compiles",
                "Leave torch_compile, torch_compile_backend and torch_compile_mode unset",
            )
        if model is not None and unwrap(model) is not model:
            raise FalqonError(
                "the trainer's model",
                "it is what torch.compile returned, of which transformers reads neither the "
                "arguments nor the class",
                "Give the trainer the model itself, which FalqonCallback compiles",
            )
        if model is None or (self._compiled is not None and self._compiled() is model):
            return
        _trace_param_wrappers(model)
        if _fsdp():
            refuse_old_fsdp2("the trainer's model")
            prepare(model, self.config)
        options = {"config": self.config}
        if self.regional and args.world_size == 1:
            compile_blocks(model, self.config, **self.compile_arguments)
        else:
            parts: list[Any] = _blocks(model) if args.world_size > 1 else [model]
            for part in parts:
                part.compile(backend="falqon", options=options, **self.compile_arguments)
        inside: Callable[[], Any] | None = getattr(model, "get_base_model", None)
        whole = args.world_size == 1 and not self.regional
        if whole and self._generates(args) and inside is not None:
            # PEFT trains by the forward of the model inside, and generates by calling it.
            inside().compile(backend="falqon", options=options, **self.compile_arguments)
        self._compiled = weakref.ref(model)

    def _generates(self, args: TrainingArguments) -> bool:
        if self.generate is None:
            return getattr(args, "num_generations", None) is not None
        return self.generate


def _trace_param_wrappers(model: nn.Module) -> None:
    """Let PEFT's adapters of stacked experts compile; where there are any, PEFT is imported."""
    if "peft" in sys.modules:
        from falqon_fx.integrations.peft import trace_param_wrappers

        trace_param_wrappers(model)


def _fsdp() -> bool:
    """Whether accelerate shards the model, as it does when training begins."""
    return bool(AcceleratorState().distributed_type == DistributedType.FSDP)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of the outermost lists of layers; the model itself where it has none."""
    return [*_in_lists(model)] or [model]


def _in_lists(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from [child] if isinstance(module, nn.ModuleList) else _in_lists(child)


class WatchCallback(TrainerCallback):  # type: ignore[misc]
    """Watches the training, and adds what the last step's casts took to what the trainer logs, as
    ``falqon/...`` (`falqon_fx.model.watching.summary`): to its ``log_history`` too.

    The trackers that ``report_to`` names have seen a log before any other callback does. Those that
    shall have these numbers come behind this one:

        args = TrainingArguments(..., report_to="none")
        Trainer(model, args, callbacks=[FalqonCallback(), WatchCallback(), WandbCallback()])

    Args:
        arguments: handed to `falqon_fx.watch` (``jsonl``, ``live``, ``callbacks``, ``keep``).

    Attributes:
        seen: the `falqon_fx.watch` of the last training, with its ``history``.
    """

    def __init__(self, **arguments: Any) -> None:
        self.seen: Watch | None = None
        self._arguments, self._training = arguments, contextlib.ExitStack()
        self._logged: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch from here on."""
        self._training.close()  # of a training that ended by an error
        self._logged = None
        self.seen = self._training.enter_context(Watch(kwargs["model"], **self._arguments))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the last step's numbers."""
        if self.seen is None:
            return
        self.seen.flush()
        if not self.seen.history:
            return
        last = self.seen.history[-1].step
        if last == self._logged:  # the log of an evaluation
            return
        self._logged = last
        numbers = summary([item for item in self.seen.history if item.step == last])
        for log in (kwargs["logs"], state.log_history[-1]):
            log.update({f"falqon/{name}": value for name, value in numbers.items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch no longer; ``seen.history`` stays."""
        self._training.close()


class FalqonTrainerMixin:
    """Makes ``TrainingArguments(torch_compile=True, torch_compile_backend="falqon")`` work.

    ``class MyTrainer(FalqonTrainerMixin, SFTTrainer): ...``: the arguments reach the trainer
    without their torch_compile part, which becomes a `FalqonCallback` with ``falqon_config``.
    torch_compile_mode is Inductor's mode.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *rest: Any,
        callbacks: list[TrainerCallback] | None = None,
        falqon_config: FalqonConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if args is not None and args.torch_compile_backend == "falqon":
            config = falqon_config or FalqonConfig()
            if args.torch_compile_mode is not None:
                config = dataclasses.replace(config, mode=args.torch_compile_mode)
            callbacks = [FalqonCallback(config), *(callbacks or ())]
            args = copy.copy(args)
            args.torch_compile = False
            args.torch_compile_backend = args.torch_compile_mode = None
        super().__init__(model, args, *rest, callbacks=callbacks, **kwargs)  # type: ignore[call-arg]


class FalqonTrainer(FalqonTrainerMixin, Trainer):  # type: ignore[misc]
    """transformers' `Trainer` that takes ``torch_compile_backend="falqon"``."""


__all__ = ["FalqonCallback", "FalqonTrainer", "FalqonTrainerMixin", "WatchCallback"]
