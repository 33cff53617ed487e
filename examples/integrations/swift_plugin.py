r"""ms-swift (4.6): a callback by the name of falqon.

    swift sft --external_plugins examples/integrations/swift_plugin.py --callbacks falqon \
        --tuner_type lora --model MODEL --dataset DATASET

Its own `--torch_compile` stays off.
"""

from __future__ import annotations

from typing import Any

from swift.callbacks import callbacks_map

from falqon_fx.integrations.transformers import FalqonCallback


def falqon(args: Any, trainer: Any) -> FalqonCallback:
    """What ms-swift calls with the arguments and the trainer."""
    return FalqonCallback(prepare=True)


callbacks_map["falqon"] = falqon
