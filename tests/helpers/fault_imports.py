# ruff: noqa: E402
"""The imports of a rank: `fault_runs` has them made once, in a server that forks."""

import gc

gc.disable()  # until all is imported, as collections would go through it again and again

import datasets  # noqa: F401
import deepspeed.runtime.zero  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
import transformers.integrations.deepspeed
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401

from tezo_ds.cli import accelerate, train  # noqa: F401
from tezo_ds.export import adapter, merged  # noqa: F401
from tezo_ds.models import fsdp  # noqa: F401
from tezo_ds.rng import compiled  # noqa: F401
from tezo_ds.run import curve, resuming  # noqa: F401
from tezo_ds.sharding import fsdp2, zero3  # noqa: F401
from tezo_ds.training import loop, session  # noqa: F401

gc.freeze()  # so that no fork's collections go through what is imported, nor copy its pages
gc.enable()
