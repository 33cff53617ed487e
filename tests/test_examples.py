"""The examples run at a tiny size, on a random model and a tokenizer trained here."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"
TALK = [(f"What is {n} and {n}?", f"It is {2 * n}, my friend.") for n in range(1, 25)]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RUN_KEYS = {
    "nll_before",
    "nll_after",
    "seconds_per_step",
    "first_step_seconds",
    "site_weight_bytes",
    "learning_rate",
}
RUNS = ("lora", "falqon", "lora_frozen_a", "falqon_frozen_a", "falqon_public_code")
SITES = 7  # one layer of q, k, v, o, gate, up, down


@pytest.fixture(scope="module")
def example():
    """Import a module of examples/, whose scripts import each other by plain name."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<unk>", "<|end|>", "<|user|>", "<|assistant|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=128, special_tokens=special)
    tokenizer.train_from_iterator([text for pair in TALK for text in pair], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=fast.eos_token_id,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "talk.jsonl"
    records: list[dict[str, Any]] = [
        {"prompt": question, "response": answer} for question, answer in TALK
    ]
    turns = (
        ("user", "Hello."),
        ("assistant", "Hello, friend."),
        ("user", "Bye."),
        ("assistant", "Bye."),
    )
    records.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    file.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return file


def arguments(model_folder, data_file, out, *more):
    folders = ["--model", str(model_folder), "--data", str(data_file), "--out", str(out)]
    return [*folders, "--steps", "3", "--batch-size", "2", *more]


def finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_finetune_trains_all_runs(example, model_folder, data_file, tmp_path, capsys, compiler):
    more = ("--baseline", compiler, "--inner", compiler)
    assert example("finetune").main(arguments(model_folder, data_file, tmp_path, *more)) == 0

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics) == {"sites", "runs", "adapter_in_peft_nll"}
    assert metrics["sites"] == SITES
    assert tuple(metrics["runs"]) == RUNS
    for run in metrics["runs"].values():
        assert set(run) == RUN_KEYS
        assert all(finite(value) for value in run.values())
    runs = metrics["runs"]
    assert runs["lora"]["nll_before"] == runs["lora_frozen_a"]["nll_before"]
    assert runs["lora"]["nll_after"] < runs["lora"]["nll_before"]
    assert runs["falqon"]["nll_after"] < runs["falqon"]["nll_before"]
    assert runs["falqon"]["site_weight_bytes"] < runs["lora"]["site_weight_bytes"]
    # The adapter that PEFT saved is all of the training: what is left is the FP8 error of a base
    # of random weights, far below the change that even three steps make.
    after = runs["falqon"]["nll_after"]
    gained = runs["falqon"]["nll_before"] - after
    assert abs(metrics["adapter_in_peft_nll"] - after) < 0.5 * gained

    adapter = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= adapter
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "falqon, public code" in printed
    # A log file shows each phase as it begins and while it runs.
    assert "falqon: training ..." in printed
    assert "falqon: training: 3/3" in printed
    details = json.loads((tmp_path / "run.json").read_text())
    assert all(len(run["trained"]["losses"]) == 3 for run in details["runs"])


def test_finetune_runs_a_selection(example, model_folder, data_file, tmp_path):
    more = ("--baseline", "eager", "--runs", "lora", "--learning-rate", "0.01")
    assert example("finetune").main(arguments(model_folder, data_file, tmp_path, *more)) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert tuple(metrics["runs"]) == ("lora",)
    assert metrics["runs"]["lora"]["learning_rate"] == 0.01
    assert metrics["adapter_in_peft_nll"] is None
    assert not (tmp_path / "adapter").exists()


GOOD = json.dumps({"prompt": "Hi?", "response": "Hello."})


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "Hi?", ', "not valid JSON"),
        ('["Hi?", "Hello."]', "expected an object, found list"),
        ('{"question": "Hi?"}', "found 'question'"),
        ('{"prompt": "Hi?", "response": 3}', '"response" must be a text'),
        ('{"prompt": " ", "response": "Hello."}', '"prompt" must be a text'),
        ('{"messages": []}', '"messages" must be a list of two or more'),
        ('{"messages": ["Hi?", "Hello."]}', '"messages"[0] must be an object'),
        (
            json.dumps({"messages": [{"role": "user", "content": text} for text in "ab"]}),
            "must be from \"assistant\", not 'user'",
        ),
    ],
)
def test_bad_line_is_named(example, tmp_path, capsys, line, complaint):
    file = tmp_path / "bad.jsonl"
    file.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    assert example("finetune").main(["--data", str(file), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert f"{file}:3: " in message
    assert complaint in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "nowhere.jsonl"], "--data: nowhere.jsonl is not a file"),
        (["--data", "FILE", "--model", "nowhere"], "--model: nowhere is not a folder"),
    ],
)
def test_missing_input_is_named(example, data_file, capsys, arguments, complaint):
    argv = [str(data_file) if argument == "FILE" else argument for argument in arguments]
    assert example("finetune").main(argv) == 2
    assert complaint in capsys.readouterr().err


def test_no_held_out_question_is_trained_on(example):
    smollm = example("smollm")
    chats = [
        smollm.Chat((("user", question),), answer)
        for question, answer in TALK
        for answer in (answer, "No idea.")
    ]
    parts = smollm.split(chats, held_out=10)
    assert len(parts.train) + len(parts.held_out) == len(chats)
    trained = {chat.question for chat in parts.train}
    assert parts.held_out
    assert not trained & {chat.question for chat in parts.held_out}
    assert smollm.split(chats, held_out=10) == parts


def test_labels_cover_the_answer_alone(example, model_folder):
    smollm = example("smollm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = tokenizer.eos_token
    chat = smollm.Chat((("user", "What is 1 and 1?"),), "It is 2.")
    (batch,) = smollm.batches(tokenizer, [chat], 96, 2, fill=True)
    learned = batch.labels[0][batch.labels[0] != smollm.IGNORED]
    assert tokenizer.decode(learned) == "It is 2.<|end|>"
    assert batch.targets == len(learned)
    assert (batch.labels[1] == smollm.IGNORED).all()
    # cut to fit; left out where the prompt alone does not
    (cut,) = smollm.batches(
        tokenizer, [chat], len(smollm.prompt_ids(tokenizer, chat.messages)) + 1, 1
    )
    assert cut.targets == 1
    assert smollm.batches(tokenizer, [chat], 4, 1) == []


def test_inspect_rewrite_writes_a_page_with_every_site(example, model_folder, tmp_path, capsys):
    page = tmp_path / "report.html"
    words = ["--model", str(model_folder), "--card", "H100", "--rank", "4", "--tokens", "8"]
    report = example("inspect_rewrite").main([*words, "--steps", "3", "--out", str(page)])
    assert len(report.sites) == SITES
    text = capsys.readouterr().out
    assert f"{SITES} sites rewritten ({SITES} with an adapter), 0 rejected" in text
    assert "7 sites stay as they are" in text
    assert "step 2: loss" in text
    assert "base unchanged" in text
    assert "CHANGED" not in text
    assert "alone: right" in text
    assert all(site.path in page.read_text() for site in report.sites)
    assert page.read_text().count('"lost_a":') == 3 * SITES
