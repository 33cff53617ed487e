"""LLaMA-Factory (0.9.5) with falqon: its own YAML, its own arguments.

    python examples/integrations/llamafactory_train.py llama3_lora_sft.yaml learning_rate=1e-4

Its command `llamafactory-cli train` takes no callbacks, the function behind it does. With several
processes: `torchrun --nproc-per-node 2 examples/integrations/llamafactory_train.py ...`.
"""

from __future__ import annotations

from llamafactory.train.tuner import run_exp

from falqon_fx.integrations.transformers import FalqonCallback

if __name__ == "__main__":
    run_exp(callbacks=[FalqonCallback(prepare=True)])
