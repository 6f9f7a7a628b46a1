"""Tasks: prompts and labels, examples from files or the hub, token ids, batches."""

from tezo_ds.tasks.batches import batch_indices, rounds, shard_range
from tezo_ds.tasks.builtin import BUILTIN_TASKS
from tezo_ds.tasks.data import TaskData, load_task
from tezo_ds.tasks.encoded import Encoded, collate, truncations
from tezo_ds.tasks.encoding import answer_tokens, candidates, encode, first_tokens
from tezo_ds.tasks.example import Example
from tezo_ds.tasks.spec import TaskSpec

__all__ = [
    "BUILTIN_TASKS",
    "Encoded",
    "Example",
    "TaskData",
    "TaskSpec",
    "answer_tokens",
    "batch_indices",
    "candidates",
    "collate",
    "encode",
    "first_tokens",
    "load_task",
    "rounds",
    "shard_range",
    "truncations",
]
