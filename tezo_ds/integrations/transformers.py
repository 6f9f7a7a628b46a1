"""`TezoTrainer`: transformers' Trainer whose steps are an engine's.

The Trainer's own loop is kept, so that epochs, accumulation, callbacks, logging, evaluation and saving come
when they always do. What is replaced is what the loop calls: `training_step` makes a whole step, where there
would be a backward pass, and an optimizer that does nothing stands where one would follow. A loop of our own
would be shorter, and would have to follow every change of theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tezo_ds.config import TezoConfig
from tezo_ds.engine.engine import Engine
from tezo_ds.engine.report import StepReport
from tezo_ds.errors import ConfigError
from tezo_ds.intake.checked_engine import checked_engine
from tezo_ds.integrations.arguments import block_of, refuse_unfit, unscheduled
from tezo_ds.integrations.joined import joined
from tezo_ds.integrations.record import Record, data_of
from tezo_ds.integrations.saved import SavesAdapter
from tezo_ds.integrations.sharded import deepspeed_config_of, engine_of
from tezo_ds.losses.objective import LossFn

log = logging.getLogger(__name__)


class _Done:
    """Stands where a Trainer has an optimizer and its schedule: a step of the engine has done their work."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": [], "lr": 0.0}]

    def step(self, *_: Any, **__: Any) -> None:
        """Does nothing."""

    def get_last_lr(self) -> list[float]:
        """Returns the last step's learning rate."""
        return [self.param_groups[0]["lr"]]


class TezoTrainer(SavesAdapter):
    """Trainer without gradients, whose `output_dir` is a run folder.

    It stands before another Trainer in a class of both, `class Mine(TezoTrainer, SFTTrainer)`, which then
    prepares the data.

    Attributes:
        engine: the engine, once `train`, `evaluate` or `predict` was called; None before.

    Args:
        model: a model of transformers; sharded already, or as the launcher says.
        args: TrainingArguments; see docs/trainer.md for what each sets.
        tezo: the tezo block, a dict of its fields or a TezoConfig.
        loss_fn: as of `tezo_ds.initialize`.
        kwargs: what Trainer takes.

    Raises:
        ConfigError: an argument was set that no forward-only run has; in one line, by name.
    """

    def __init__(
        self, model: Any = None, args: TrainingArguments | None = None, *,
        tezo: Mapping[str, Any] | TezoConfig | None = None, loss_fn: LossFn | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if model is None:
            raise ConfigError("TezoTrainer: give a model")
        unused = "" if args is None else refuse_unfit(args, kwargs)
        self._tezo, self._loss_fn = tezo, loss_fn
        self._makes_steps = False
        self._resume: bool | None = None
        self._done = _Done()
        self._report: StepReport | None = None
        self._waiting: list[Mapping[str, Any]] = []  # batches that are accumulated
        if args is not None and args.n_gpu > 1:
            args._n_gpu = 1  # a model is on one device, or sharded by a launcher
        super().__init__(model, args, **kwargs)
        self.run_folder = Path(str(self.args.output_dir))
        self.args.activation_checkpointing = None  # of backward passes; some classes set it
        config = TezoConfig(**unscheduled(block_of(self.args, tezo, None)))
        if self.args.load_best_model_at_end and (
            not config.facts.learns_coefficients or config.refresh_every
        ):
            raise ConfigError(
                f"load_best_model_at_end: {config.method} writes weights as it goes, so that earlier ones "
                "are gone; leave it off, or take a method that keeps coefficients, without refresh_every"
            )
        if unused and self.is_world_process_zero():
            log.warning(unused)
        own = getattr(self.model, "dtype", None)
        if self.args.bf16 and own == torch.float32 and not self.is_fsdp_enabled:
            log.warning(
                "TrainingArguments: bf16 is not used: weights compute in their own dtype, float32"
            )

    # Engine

    def _make_engine(self, max_steps: int | None, steps_per_epoch: int | None = None) -> Engine:
        """Returns the engine: for steps, or where `max_steps` is None whichever there is."""
        if self.engine is None or (max_steps is not None and not self._makes_steps):
            block = block_of(self.args, self._tezo, max_steps)
            if max_steps is None:
                block = unscheduled(block)
            elif block.get("query_schedule", "constant") != "constant":
                block = {"steps_per_epoch": steps_per_epoch, **block}
            if self.engine is None:
                assert self.model is not None, "checked before"
                self.engine = engine_of(
                    self.model, self.accelerator, self.args, block, self._loss_fn
                )
            else:
                config = TezoConfig(**block)
                self.engine = checked_engine(self.engine.sharding, config, self._loss_fn)
            self._makes_steps = max_steps is not None
        module: Any = self.engine.sharding.module
        self.model = self.model_wrapped = module
        self.accelerator._models = [module]  # which an evaluation would have accelerate prepare
        if self.is_deepspeed_enabled:
            self.deepspeed = module
        return self.engine

    # Training

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:  # fmt: skip
        """Trains, from where `output_dir` has the run.

        Args:
            resume_from_checkpoint: None: from the journal's end, where there is a run of the same
                configuration; True: there must be one; False: there must be none; a path: of `output_dir`.
            trial: not taken.
            ignore_keys_for_eval: as of Trainer.

        Raises:
            ConfigError: the folder holds another run, or the path is elsewhere.
            TezoError: see `Engine.step`.
        """
        if trial is not None:
            self.hyperparameter_search()
        self._resume = self._resumes(resume_from_checkpoint)
        self._waiting = []
        try:
            output = super().train(ignore_keys_for_eval=ignore_keys_for_eval)
            assert self.record is not None
            summary = {
                "steps": self.state.global_step,
                "seconds_training": output.metrics["train_runtime"],
            }
            self.record.leave(
                self.tokenizer_to_save, {**summary, "train_loss": output.training_loss}
            )
            return output
        finally:
            if self.record is not None:
                self.record.__exit__()
            self.record = None

    def hyperparameter_search(self, *_: Any, **__: Any) -> Any:
        """Raises ConfigError: `tezo-ds sweep` searches."""
        raise ConfigError("TezoTrainer: searches are not taken; use tezo-ds sweep")

    def _resumes(self, given: str | bool | None) -> bool | None:
        """Returns what a run in the output folder is to be, see `RunOptions.resume`."""
        if given is None or isinstance(given, bool):
            return given
        path, output = Path(given).resolve(), self.run_folder.resolve()
        if path == output or path.parent == output:
            return True
        raise ConfigError(
            f"resume_from_checkpoint: {given} is not in output_dir {self.args.output_dir}, whose journal a "
            "run goes on from"
        )

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Gives the Trainer's loop the folder to resume from, where the state of callbacks is."""
        return super()._inner_training_loop(
            *args, **{**kwargs, "resume_from_checkpoint": self.args.output_dir}
        )

    def _init_training_state(
        self,
        max_steps: int,
        steps_per_epoch: int,
        epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        """Opens the run's folder, and brings engine and state to where it is."""
        engine = self._make_engine(max_steps, steps_per_epoch)
        about = {
            "steps": max_steps, "batch_size": self.get_total_train_batch_size(self.args),
            "deepspeed": deepspeed_config_of(self.accelerator),
        }  # fmt: skip
        record = Record(self.run_folder, engine, about, data_of(self.train_dataset), self._resume)
        self.record = record.__enter__()
        done = engine.step_index
        super()._init_training_state(
            max_steps, steps_per_epoch, epochs, resume_from_checkpoint if done else None, trial
        )
        self.state.global_step = done
        self.state.epoch = done / steps_per_epoch
        if done >= max_steps:
            return epochs, 0
        begun = 0 if self.args.ignore_data_skip else done % steps_per_epoch
        return done // steps_per_epoch, begun * self.args.gradient_accumulation_steps

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> tuple[nn.Module, Any]:
        """Tells callbacks of the model, which the engine has prepared."""
        module, handler = self.made.sharding.module, self.callback_handler
        for name, part in (("optimizer", self._done), ("lr_scheduler", self._done)):
            setattr(self, name, part)
            setattr(handler, name, part)
        handler.model, handler.train_dataloader = module, train_dataloader
        return module, train_dataloader

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Makes a step, with the last of the batches that are accumulated; returns its loss, () float32, and
        0 for the batches before."""
        self._waiting.append(self._prepare_inputs(inputs))
        if len(self._waiting) < self.current_gradient_accumulation_steps:
            return torch.zeros((), device=self.args.device)
        pad = getattr(self.processing_class, "pad_token_id", None)
        batch, self._waiting = joined(self._waiting, pad or 0), []
        report = self.made.step(batch)
        assert self.record is not None
        self.record.step(report)
        self._report = report
        self._done.param_groups[0]["lr"] = report.lr
        return torch.tensor(report.loss, device=self.args.device)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """There is no gradient to clip; `clip_kappa` bounds slopes."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        return None if self._report is None else self._report.quality.gradient_norm

    def _get_learning_rate(self) -> float:
        return self._done.get_last_lr()[0]

    def floating_point_ops(self, inputs: Any) -> int:
        """Returns the operations of a step's forwards; transformers counts a backward pass as two of them."""
        forward = super().floating_point_ops(inputs) // 3
        return forward * 2 * self.made.config.queries_at(max(self.state.global_step - 1, 0))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds κ and what else a step measures to what the Trainer logs."""
        if "loss" in logs and (report := self._report) is not None:
            found = {"kappa": report.quality.mean, "snr": report.quality.snr, "rho": report.rho}
            logs |= {name: value for name, value in found.items() if value is not None}
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        due = self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if due:
            self.keep_state()

    # Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates or predicts at the present coefficients."""
        with self._make_engine(None).applied():
            return super().evaluation_loop(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluates by plain forwards, whatever other Trainer stands behind: those of trl read the output
        layer's weight, in which nothing is written that is kept aside."""
        return Trainer.compute_loss(self, model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates, as Trainer does; while it trains the run's metrics.jsonl gets a line, too."""
        metrics = super().evaluate(*args, **kwargs)
        if self.record is not None and self.is_in_train:
            count = len(self.eval_dataset) if isinstance(self.eval_dataset, Sized) else 0
            self.record.score(metrics, count)
        return metrics
