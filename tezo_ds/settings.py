"""Options besides the `tezo` block: model and data, sharding, how a run goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from tezo_ds.config.declared import declared
from tezo_ds.config.fields import REWARDS

Dtype = Literal["float32", "bfloat16", "float16"]
LoadIn = Literal["int8", "int4", "8bit", "4bit"]
Stored = Literal[Dtype, "float64"]  # dtypes that a checkpoint may have
DATA, SHARDING = "Model and data", "Sharding and precision"
TIMEOUT = 1800.0  # seconds that collectives wait for the slowest rank


class Settings(BaseModel):
    """Model, data and sharding of a run; kept in its config.json."""

    model_config = ConfigDict(extra="forbid")

    model: str = declared(..., "model folder or hub name", group=DATA, example="./my-model")
    trust_remote_code: bool = declared(
        False,
        "run the Python code that the model folder or hub name brings along; read it before",
        group=DATA, example=True,
    )  # fmt: skip
    task: str = declared(
        ...,
        "built-in task (trec, sst2, sst5, rotten-tomatoes, snli, mnli, qnli, rte, cb, boolq, wic, wsc, "
        "multirc, copa, record, squad, drop), or a file of examples: for a --template, or by its columns "
        "text, prompt and completion, messages, or instruction and output",
        group=DATA, example="reviews.jsonl",
    )  # fmt: skip
    dataset: str | None = declared(
        None,
        "examples of a built-in task, or instead of --task: a .jsonl, .json, .csv, .tsv or .parquet file, "
        "also with .gz, .bz2 or .xz; a pattern of several; a folder with train.* and test.*, or of "
        "save_to_disk; or a data set of the hub",
        group=DATA, example="HuggingFaceH4/no_robots",
    )  # fmt: skip
    dataset_config: str | None = declared(
        None,
        "configuration of a data set of the hub",
        group=DATA,
        used_by="--dataset",
        example="main",
    )
    dataset_revision: str | None = declared(
        None, "branch, tag or commit of a data set of the hub", group=DATA, used_by="--dataset",
        example="v1.0",
    )  # fmt: skip
    train_split: str = declared(
        "train", "split to train on, of a data set with several", group=DATA, used_by="--dataset",
        example="train_sft",
    )  # fmt: skip
    test_split: str | None = declared(
        None, "split to test on; unset: test, where there is one", group=DATA, used_by="--dataset",
        example="validation",
    )  # fmt: skip
    data: str | None = declared(
        None,
        "local folder or file of a built-in task, in place of the hub; as --dataset",
        group=DATA,
        example="./trec",
    )
    test_data: str | None = declared(
        None, "file of test examples", group=DATA, example="test.jsonl"
    )
    validation_data: str | None = declared(
        None,
        "file of examples by which evaluations during training, --keep best and --patience go; the test "
        "examples are then scored before and after training alone",
        group=DATA, example="valid.jsonl",
    )  # fmt: skip
    validation_split: str | None = declared(
        None,
        "split to go by in place of a file, of a data set with several, or of a folder with validation.* "
        "beside train.*",
        group=DATA, example="validation",
    )  # fmt: skip
    template: str | None = declared(
        None,
        'prompt with columns in braces, e.g. "{text} It was"; \\n and \\t on the command line are a newline '
        "and a tab",
        group=DATA,
        example="{text} It was",
    )
    verbalizers: dict[str, str] | None = declared(
        None, 'word of each label, as JSON: {"0": "bad", "1": "good"}', group=DATA,
        example={"0": "bad", "1": "good"},
    )  # fmt: skip
    label_field: str | None = declared(
        None, "column that holds the label", group=DATA, example="sentiment"
    )
    choices_field: str | None = declared(
        None,
        "column of a list of answers, each example's own; the label column has the right one or its index",
        group=DATA, example="choices",
    )  # fmt: skip
    text_field: str | None = declared(
        None,
        "column of a file of texts, without a template; unset: text",
        group=DATA,
        example="body",
    )
    prompt_field: str | None = declared(
        None, "column of prompts that have a completion, as texts or as messages; unset: prompt",
        group=DATA, example="question",
    )  # fmt: skip
    completion_field: str | None = declared(
        None, "column of completions, of a prompt or of a template; unset: completion", group=DATA,
        example="answer",
    )  # fmt: skip
    messages_field: str | None = declared(
        None,
        "column of conversations; unset: messages or conversations",
        group=DATA,
        example="chat",
    )
    loss_on: Literal["completion", "all"] = declared(
        "completion",
        "what trains of prompts with completions and of conversations: the answers (completion), or all",
        group=DATA, example="all",
    )  # fmt: skip
    objective: Literal["lm", "choices", "accuracy", "f1"] = declared(
        "lm",
        "loss of an answer: lm, among all tokens; choices, among the task's words alone; accuracy or f1, no "
        "loss, but the accuracy or the macro F1 of a step's answers, picked from the words",
        group=DATA, example="choices",
    )  # fmt: skip
    test_fraction: float = declared(
        0.2,
        "share of the examples that is held out where there is no test file",
        group=DATA,
        example=0.1,
    )
    train_examples: int | None = declared(
        None, "upper bound on training examples; unset: all", group=DATA, example=1000
    )
    test_examples: int | None = declared(
        None, "upper bound on test examples; unset: all", group=DATA, example=400
    )
    validation_examples: int | None = declared(
        None,
        "upper bound on validation examples; without --validation-data and --validation-split so many "
        "training examples are held out; unset: all of those, or none",
        group=DATA, example=500, ge=1,
    )  # fmt: skip
    shots: int | None = declared(
        None, "training examples of each label, chosen by data_seed; unset: all", group=DATA, example=16,
        ge=1,
    )  # fmt: skip
    data_seed: int = declared(
        0, "seed of the held-out share and of the bounded subsets", group=DATA, example=1
    )
    max_length: int = declared(
        512,
        "tokens of an example; a longer prompt loses its beginning",
        group=DATA,
        example=2048,
        ge=2,
    )
    streaming: bool = declared(
        False,
        "leave the rows in memory-mapped files, for data larger than memory; examples are made and tokenised "
        "when a step takes them",
        group=DATA, example=True,
    )  # fmt: skip
    group_by_length: bool = declared(
        False,
        "make batches of examples of like lengths, for less padding: of 50 batches' examples at a time, "
        "sorted",
        group=DATA, example=True,
    )  # fmt: skip
    padding_free: bool = declared(
        False,
        "put a step's examples one after another into few rows, next to without padding; see "
        "--attn-implementation",
        group=DATA, example=True,
    )  # fmt: skip
    eval_batch_size: int = declared(
        32, "examples of a rank in one forward of an evaluation", group=DATA, example=8, ge=1
    )
    metric: str = declared(
        "none",
        "measure generated answers in evaluations, too: exact or f1 (words, as SQuAD), rouge-l, "
        "regex:PATTERN (the last match), or your own module:function or file.py:function of (predictions, "
        "references)",
        group=DATA, example="f1",
    )  # fmt: skip
    max_new_tokens: int = declared(
        50,
        "tokens of a generated answer, at most",
        group=DATA,
        used_by="--metric, --reward",
        example=200,
        ge=1,
    )
    stop: tuple[str, ...] = declared(
        (), "text that ends a generated answer, besides EOS, such as \\n; may be given several times",
        group=DATA, used_by="--metric, --reward", example=("###",),
    )  # fmt: skip
    reward: tuple[str, ...] = declared(
        (),
        "train on what a function gives the model's own completions in place of a loss: exact, f1, rouge-l, "
        "number, regex:PATTERN, format:PATTERN, length:WORDS, code, or your own module:function or "
        "file.py:function; may be given several times",
        group=REWARDS, example=("number",),
    )  # fmt: skip
    reward_weights: tuple[float, ...] = declared(
        (), "weight of each --reward, in their order; may be given several times; unset: 1 each",
        group=REWARDS, used_by="--reward", example=(1.0, 0.2),
    )  # fmt: skip
    reward_timeout: float = declared(
        60.0, "seconds that a call of a reward function may take", group=REWARDS, used_by="--reward",
        example=300.0, gt=0,
    )  # fmt: skip
    run_code: bool = declared(
        False, "allow --reward code to run what the model writes on this machine, see docs/rewards.md",
        group=REWARDS, used_by="--reward code", example=True,
    )  # fmt: skip
    dtype: Literal["auto", Stored] = declared(
        "auto",
        "dtype of the weights: auto (the checkpoint's), float32, bfloat16, float16 or float64; a "
        "DeepSpeed config's bf16 and fp16 blocks win",
        group=SHARDING, example="bfloat16",
    )  # fmt: skip
    attn_implementation: str | None = declared(
        None,
        "how transformers computes attention: eager, sdpa, flash_attention_2, flex_attention, or a kernel's "
        "name; unset: as the model has it",
        group=SHARDING, example="flash_attention_2",
    )  # fmt: skip
    load_in: LoadIn | None = declared(
        None,
        "quantise the weights as they load: int8 or int4 (torchao), 8bit or 4bit (bitsandbytes, nf4); unset: "
        "as the checkpoint has them",
        group=SHARDING, example="int8",
    )  # fmt: skip
    compute_dtype: Dtype | None = declared(
        None,
        "dtype to which --fsdp casts weights as they are gathered: float32, bfloat16 or float16; unset: "
        "their own",
        group=SHARDING, used_by="--fsdp", example="bfloat16",
    )  # fmt: skip
    factors_dtype: Stored | None = declared(
        None,
        "dtype to which the run rounded U and V; unset: compute_dtype",
        group=SHARDING,
        flag=False,
    )
    fsdp: bool = declared(
        False,
        "shard the weights by FSDP2 over all ranks; each reads only its own shards from disk",
        group=SHARDING, example=True,
    )  # fmt: skip
    fsdp_replicas: int = declared(
        1,
        "whole copies of the weights, e.g. one a node, between which only scalars travel",
        group=SHARDING, used_by="--fsdp", example=2, ge=1,
    )  # fmt: skip
    fsdp_offload_params: bool = declared(
        False, "keep the shards in CPU memory until they are gathered", group=SHARDING,
        used_by="--fsdp", example=True,
    )  # fmt: skip
    fsdp_layers: tuple[str, ...] | None = declared(
        None, "class names of the modules that FSDP2 gathers one at a time; unset: transformer blocks",
        group=SHARDING, used_by="--fsdp", flag=False,
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _dataset_is_a_task(cls, fields: Any) -> Any:
        """Lets a data set stand for the task, whose format its columns tell."""
        if isinstance(fields, dict) and fields.get("task") is None and fields.get("dataset"):
            return {**fields, "task": fields["dataset"]}
        return fields


class RunOptions(BaseModel):
    """Options of `train` alone: the length of a run, and what a run keeps and shows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path = declared(..., "run folder to make or to go on with", example="runs/sst2")
    steps: int = declared(1000, "training steps", example=5000, ge=1)
    batch_size: int = declared(16, "examples of a step, over all ranks together", example=64, ge=1)
    eval_every: int = declared(
        0, "steps between evaluations; 0: before and after training only", example=500, ge=0
    )
    log_every: int = declared(
        10, "steps between lines of progress where stdout is no terminal", example=100, ge=1
    )
    timeout: float = declared(
        TIMEOUT,
        "seconds that a step's collectives wait for the slowest rank before the run ends and names it",
        example=600, ge=1,
    )  # fmt: skip
    resume: bool | None = declared(
        None,
        "go on with the run that --output holds, on any number of ranks; unset: go on where there is one of "
        "the same configuration",
        example=True,
    )  # fmt: skip
    snapshot_every: int = declared(
        500, "steps between snapshots to go on from; 0: none", example=1000, ge=0
    )
    snapshots: int = declared(2, "newest snapshots that are kept", example=3, ge=1)
    keep: Literal["last", "best"] = declared(
        "last",
        "what the result is: coefficients after the last step, or of the evaluation that was best",
        example="best",
    )  # fmt: skip
    best_by: Literal["loss", "accuracy", "metric"] = declared(
        "loss", "what --keep best and --patience go by: loss, accuracy or metric",
        used_by="--keep best, --patience", example="accuracy",
    )  # fmt: skip
    patience: int | None = declared(
        None,
        "evaluations without a better one after which the run ends; unset: none",
        example=5,
        ge=1,
    )
    samples_every: int = declared(
        50,
        "steps between samples of what the model completes, in samples.jsonl and on the terminal; 0: none",
        used_by="--reward", example=10, ge=0,
    )  # fmt: skip
    stop_on_divergence: bool = declared(
        False,
        "end the run when the median loss of 20 steps is above twice that of its first 20; off: warn once",
        example=True,
    )
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow", "none"], ...] = declared(
        (),
        "trackers to report steps and evaluations to, as they come: tensorboard (in the run folder), wandb, "
        "trackio, mlflow, or none; several with commas",
        example="tensorboard",
    )  # fmt: skip
    save_model: bool | None = declared(
        None,
        "write the whole merged model into the run folder at the end; unset: for methods that write weights "
        "(tezo-adam, lozo…, mezo…)",
        example=False,
    )  # fmt: skip

    @field_validator("report_to", mode="before")
    @classmethod
    def _with_commas(cls, names: Any) -> Any:
        """Takes tensorboard,wandb for a list, and none for an empty one."""
        words = [names] if isinstance(names, str) else names
        if isinstance(words, (list, tuple)) and all(isinstance(word, str) for word in words):
            words = list(dict.fromkeys(part for word in words for part in word.split(",")))
        return () if words == ["none"] else words
