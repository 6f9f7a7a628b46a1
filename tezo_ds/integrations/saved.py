"""Saving of a `TezoTrainer`, on disk and on the hub: an adapter, where a Trainer writes a model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainerState
from transformers.trainer_callback import ExportableState

from tezo_ds.engine.engine import Engine
from tezo_ds.export.adapter import no_adapter_because, save_adapter
from tezo_ds.export.merged import is_complete, save_merged
from tezo_ds.integrations.record import Record, name_of
from tezo_ds.run.card import model_card
from tezo_ds.run.folder import ADAPTER, CONFIG, MODEL

STATE = "trainer_state.json"  # transformers' name


class SavesAdapter(Trainer):
    """Trainer whose model is saved as what its engine has learnt, and whose state is in a run's folder.

    Attributes:
        engine: the engine; None before there is one.
        record: the run, while it trains.
        run_folder: folder of the run, which `output_dir` is.
    """

    engine: Engine | None = None
    record: Record | None = None
    run_folder: Path
    _best: dict[str, Tensor] | None = None

    @property
    def made(self) -> Engine:
        """The engine, where it was made before."""
        assert self.engine is not None, "made before"
        return self.engine

    @property
    def tokenizer_to_save(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, where one was given as `processing_class`."""
        known = self.processing_class
        return known if isinstance(known, PreTrainedTokenizerBase) else None

    @property
    def _result(self) -> Path:
        """Folder in the run's of what is saved: an adapter, or a merged model where there can be none."""
        return self.run_folder / (ADAPTER if no_adapter_because(self.made) is None else MODEL)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter, or the merged model where what was learnt is none. All ranks must call this.

        Args:
            output_dir: folder to write; None: `adapter` or `model` in the run's folder.
        """
        engine, path = self.made, Path(output_dir or self._result)
        if no_adapter_because(engine) is not None:
            if self.args.should_save and is_complete(path):
                shutil.rmtree(path)
            save_merged(engine, path, self.tokenizer_to_save, card=self._card(adapter=False))
        elif self.args.should_save:
            card, model = self._card(adapter=True), name_of(engine)
            save_adapter(engine, path, model, card, self.tokenizer_to_save)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _card(self, adapter: bool) -> str:
        known = (self.run_folder / CONFIG).exists()
        return model_card(self.run_folder, self.made.step_index, adapter) if known else ""

    @contextmanager
    def _result_alone(self) -> Iterator[None]:
        """Context manager: the hub gets what is saved, and not all of the run's folder."""
        output, self.args.output_dir = self.args.output_dir, str(self._result)
        try:
            yield
        finally:
            self.args.output_dir = output

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Uploads the adapter with its card and tokenizer, as `PeftModel.from_pretrained` takes it."""
        if self.hub_model_id is None:  # named by the run's folder
            self.init_hf_repo(token=kwargs.get("token"), private=kwargs.get("private"))
        with self._result_alone():
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with self._result_alone():
            Path(str(self.args.output_dir)).mkdir(exist_ok=True)
            super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Leaves the card that was saved with the adapter."""

    def keep_state(self) -> None:
        """Writes the state of the Trainer and its callbacks into the run's folder, whole or not at all."""
        if not self.args.should_save:
            return
        parts = [*self.callback_handler.callbacks, self.control]
        stateful: list[Any] = [part for part in parts if isinstance(part, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=stateful).stateful_callbacks
        partial = self.run_folder / f".{STATE}"
        self.state.save_to_json(str(partial))
        partial.replace(partial.with_name(STATE))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Saves a snapshot of the run, which is what a step depends on."""
        if self.record is not None:
            self.record.snapshot(self.args.save_total_limit or 2)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restores the random numbers of collators, where a checkpoint was saved right here."""
        at = self.run_folder / f"checkpoint-{self.state.global_step}"
        super()._load_rng_state(str(at) if checkpoint is not None and at.is_dir() else None)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better = super()._determine_best_metric(metrics, trial)
        if better and self.args.load_best_model_at_end:
            self._best = self.made.state()
        return better

    def _load_best_model(self) -> None:
        step = self.state.best_global_step
        if self.record is not None and step is not None and step != self.made.step_index:
            self.record.go_back(step, self._best)
