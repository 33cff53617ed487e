"""Everything of falqon-fx that writes files or reads them, as `faults` attacks it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import save_file
from torch import nn

import falqon_fx
from falqon_fx import FalqonConfig
from tests.attack import harness
from tests.attack.faults import Writer, files_in
from tests.models import fill_b


class Layers(nn.Module):
    """Parameters that all hold the number of their generation: a mixture would show."""

    def __init__(self, generation: int = 0) -> None:
        super().__init__()
        self.layers = nn.ParameterList(
            nn.Parameter(torch.full((16, 64), float(generation))) for _ in range(3)
        )

    def generation(self) -> int:
        found = {value for layer in self.layers for value in layer.unique().tolist()}
        assert len(found) == 1, f"a mixture of {found}"
        return int(found.pop())


class Save(Writer):
    """A second checkpoint over a first."""

    folder = "work/out"

    def prepare(self, folder: Path) -> None:
        self.save(folder, 1)
        (folder / self.folder / "link").symlink_to("../../victim")

    def act(self, folder: Path) -> None:
        self.save(folder, 2)

    def save(self, folder: Path, generation: int) -> None:
        model = Layers(generation)
        optimizer = torch.optim.AdamW(model.parameters())
        extra = {"generation": generation}
        falqon_fx.save_checkpoint(model, folder / self.folder, optimizer=optimizer, extra=extra)

    def state(self, folder: Path) -> str:
        loaded = Layers(-1)
        stated = falqon_fx.load_checkpoint(loaded, folder / self.folder)["generation"]
        assert loaded.generation() == stated
        return {1: "old", 2: "new"}[stated]


class SaveNew(Save):
    """A first checkpoint, in folders that are not there yet."""

    own = ("work/deep",)
    folder = "work/deep/out"

    def prepare(self, folder: Path) -> None:
        """There is nothing before."""

    def state(self, folder: Path) -> str:
        if (folder / self.folder / "checkpoint.json").exists():
            return super().state(folder)
        assert not (folder / self.folder).exists() or not files_in(folder / self.folder, _counts)
        return "old"


def _counts(name: str) -> bool:
    """What is no file of tensors that a killed save left."""
    return not name.startswith("tensors-")


class Stray(Save):
    """One that also writes where it shouldn't, in each way that there is, and takes it away again:
    whoever watches must see it.
    """

    def __init__(self) -> None:
        self.elsewhere = Path(tempfile.mkdtemp())

    def act(self, folder: Path) -> None:
        one = torch.ones(1)
        (self.elsewhere / "python").write_text("")
        torch.save(one, self.elsewhere / "torch")
        save_file({"one": one}, self.elsewhere / "rust")
        (self.elsewhere / "rust").rename(self.elsewhere / "renamed")
        (self.elsewhere / "symlink").symlink_to("rust")
        (self.elsewhere / "folder").mkdir()
        shutil.rmtree(self.elsewhere)
        self.elsewhere.mkdir()
        super().act(folder)


class Load(Save):
    """A checkpoint read into a model."""

    own = ("nothing",)

    def act(self, folder: Path) -> None:
        model = Layers(-1)
        try:
            falqon_fx.load_checkpoint(model, folder / self.folder)
        except falqon_fx.FalqonError:
            assert model.generation() == -1
            raise
        assert model.generation() == 1

    def state(self, folder: Path) -> str:
        assert super().state(folder) == "old"
        return "new"  # nothing is written: it is what it should be afterwards, too


class Distributed(Writer):
    """A second checkpoint of torch's own, in a folder of its own beside the first."""

    own = ("work/2",)
    raw = ("torch.distributed.checkpoint.api.CheckpointException",)

    def prepare(self, folder: Path) -> None:
        self.save(folder, 1)

    def act(self, folder: Path) -> None:
        self.save(folder, 2)

    def save(self, folder: Path, number: int) -> None:
        state = falqon_fx.CheckpointState(Layers(number))
        dcp.save({"falqon": state}, checkpoint_id=folder / "work" / str(number))

    def state(self, folder: Path) -> str:
        assert self._generation(folder, 1) == 1
        if not (folder / "work/2/.metadata").exists():
            return "old"
        assert self._generation(folder, 2) == 2
        return "new"

    def _generation(self, folder: Path, number: int) -> int:
        loaded = Layers(-1)
        state = falqon_fx.CheckpointState(loaded)
        dcp.load({"falqon": state}, checkpoint_id=folder / "work" / str(number))
        return loaded.generation()


def dense_llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).bfloat16()


def lora() -> Any:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])


class Whole(Writer):
    """A folder that must be absent or bit for bit what it is without an attack."""

    expected: dict[str, bytes]

    def state(self, folder: Path) -> str:
        if not (folder / "work/out").exists():
            return "old"
        found = files_in(folder / "work/out", self.keep)
        if not hasattr(self, "expected"):
            self.expected = found
        assert found.keys() == self.expected.keys()
        assert found == self.expected
        return "new"

    def keep(self, name: str) -> bool:
        return True

    def is_there(self, out: Path) -> bool:
        """Whether the call is a repeated one. A fault of this look is none of the library's."""
        try:
            return out.exists()
        except OSError:
            return False


class Export(Whole):
    """`save_fp8`."""

    def __init__(self) -> None:
        self.model = peft.get_peft_model(dense_llama(), lora())
        fill_b(self.model, 0.1)
        falqon_fx.prepare(self.model, FalqonConfig(), progress=False)

    def act(self, folder: Path) -> None:
        out = folder / "work/out"
        if self.is_there(out):
            return
        falqon_fx.save_fp8(self.model, out, max_shard_size=20000, progress=False)


class Prequantize(Whole):
    """`prequantize`."""

    own: tuple[str, ...] = ("work/out", "work/out.partial")

    def prepare(self, folder: Path) -> None:
        dense_llama().save_pretrained(folder / "source", max_shard_size="20KB")

    def act(self, folder: Path) -> None:
        out = folder / "work/out"
        if self.is_there(out):
            return
        falqon_fx.prequantize(
            folder / "source", out, lora(), FalqonConfig(init="keep"), progress=False
        )

    def keep(self, name: str) -> bool:
        return not name.startswith("records/") and name != "plan.json"  # after a kill at the end


class PrequantizeResumed(Prequantize):
    """`prequantize` that goes on with half of the work."""

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)

        with harness.interrupted():
            self.act(folder)
        for file in sorted((folder / "work/out.partial/records").iterdir())[::2]:
            file.unlink()


class Undisturbed:
    """What was loaded the first time, which nothing disturbs: later it is that or nothing."""

    contents: str | None = None

    def check(self, folder: Path, *arguments: Any) -> None:
        torch.manual_seed(0)
        found = harness.contents(falqon_fx.load(folder / "work/out", *arguments))
        self.contents = self.contents or found
        assert found == self.contents, "it loaded another model"


class LoadPrequantized(Undisturbed, Prequantize):
    """`load`."""

    own: tuple[str, ...] = ("nothing",)

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        super().act(folder)
        shutil.rmtree(folder / "source")

    def act(self, folder: Path) -> None:
        self.check(folder)


class LoadExport(Undisturbed, Export):
    """`load` of an export."""

    own = ("nothing",)

    def prepare(self, folder: Path) -> None:
        super().act(folder)

    def act(self, folder: Path) -> None:
        self.check(folder, lora())


WRITERS: dict[str, type[Writer]] = {
    "save": Save,
    "save new": SaveNew,
    "load checkpoint": Load,
    "export": Export,
    "prequantize": Prequantize,
    "prequantize resumed": PrequantizeResumed,
    "load": LoadPrequantized,
    "load export": LoadExport,
    "DCP": Distributed,
    "stray": Stray,
}
