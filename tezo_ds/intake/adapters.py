"""LoRA adapters where a model is expected: alone in the model's folder, or beside the weights."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from tezo_ds.errors import ConfigError
from tezo_ds.files.text import read_json
from tezo_ds.sharding.world import agreed

MERGE = "merge it first (peft: merge_and_unload, then save_pretrained) and give the merged folder"


def refuse_adapter(model: str) -> None:
    """Raises ConfigError if a model folder or hub name has an adapter, alone or beside the weights.

    With peft transformers would load it and freeze all but its own matrices, without peft leave it out. All
    ranks must call this; rank 0 alone looks, before a model is loaded.
    """
    agreed(lambda: _refuse(model))


def _refuse(model: str) -> None:
    try:
        found = find_adapter_config_file(model)
    except (OSError, ValueError):  # no such model, or no name of one: loading it says so
        return
    if found is None:
        return
    base = read_json(found).get("base_model_name_or_path")
    if (Path(found).parent / CONFIG_NAME).exists():
        raise ConfigError(
            f"{model}: holds an adapter beside the weights ({ADAPTER_CONFIG_NAME}), which does not train and "
            f"would be left out; {MERGE}, or take {ADAPTER_CONFIG_NAME} away to train the weights alone"
        )
    of = f" for {base}" if base else ""
    raise ConfigError(f"{model}: is an adapter{of} ({ADAPTER_CONFIG_NAME}), not a model; {MERGE}")
