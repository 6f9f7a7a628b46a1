"""Flags of the run that a doctor is asked about."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tezo_ds.config import TezoConfig
from tezo_ds.doctor.report import Failed
from tezo_ds.doctor.resources import Model
from tezo_ds.doctor.trunk_cache import Wanted
from tezo_ds.errors import ConfigError
from tezo_ds.models.loading import deepspeed_dtype, load_skeleton
from tezo_ds.plan.needs import GIB, Layout, Needs, PlannedRun, needs, writes
from tezo_ds.plan.output_layer import Fit, fit_of
from tezo_ds.plan.trunk import Kept, hidden_size, trunk_of
from tezo_ds.quantised.forms import FORMS, form_stored
from tezo_ds.quantised.loading import quantised_arguments
from tezo_ds.settings import Settings
from tezo_ds.sharding.world import local_device
from tezo_ds.sources import explained
from tezo_ds.tasks.builtin import BUILTIN_TASKS


@dataclass(frozen=True)
class RunFlags:
    """Flags of a run to come, as `tezo-ds train` would have them.

    Attributes:
        settings, config, deepspeed: as `tezo-ds train` has them; no model: "".
        output: the run's folder.
        hostfile: file that names the hosts.
        snapshots: number of snapshots that the run keeps; 0: it makes none.
        merged: whether the run writes the merged model.
    """

    settings: Settings
    config: TezoConfig
    deepspeed: dict[str, Any] | None = None
    output: Path | None = None
    hostfile: Path | None = None
    snapshots: int = 2
    merged: bool = False

    @property
    def how(self) -> str:
        """The sharding, in words."""
        s, zero = self.settings, (self.deepspeed or {}).get("zero_optimization", {})
        if s.fsdp:
            return f"FSDP2, {s.fsdp_replicas} replicas" if s.fsdp_replicas > 1 else "FSDP2"
        if self.deepspeed is None:
            return "whole weights on each rank"
        hpz = zero.get("zero_hpz_partition_size", 1)
        return f"ZeRO-3, hpZ {hpz}" if hpz > 1 else "ZeRO-3"

    @property
    def dtype(self) -> str:
        """Dtype of the weights; "auto": the checkpoint's."""
        asked = self.settings.dtype
        return asked if self.deepspeed is None else deepspeed_dtype(self.deepspeed, asked)

    @property
    def backend(self) -> str:
        """Backend of the collectives."""
        if self.deepspeed is None:
            return str(dist.get_default_backend_for_device(local_device()))
        from deepspeed.accelerator import get_accelerator

        return str(get_accelerator().communication_backend_name())

    @property
    def writes(self) -> bool:
        """Whether all ranks write their shards into the run's folder."""
        return self.snapshots > 0 and writes(self.config)

    def skeleton(self) -> nn.Module:
        """Returns the model without weights; see `loading.load_skeleton`."""
        s = self.settings
        skeleton = load_skeleton(s.model, self.dtype, s.trust_remote_code)
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        with explained("model", s.model):  # a library that is missing, say
            quantised_arguments(s.load_in, skeleton.config, dtype, local_device())
        return skeleton

    def seen(self, skeleton: nn.Module | Failed | None) -> Model | None:
        """Returns what this rank sees of the model.

        Raises:
            ConfigError: the model could not be built.
        """
        if skeleton is None:
            return None
        if isinstance(skeleton, Failed):
            raise ConfigError(skeleton.why)
        parameters = {n: (tuple(p.shape), str(p.dtype)) for n, p in skeleton.named_parameters()}
        numel = sum(p.numel() for p in skeleton.parameters())
        dtypes = sorted({dtype.removeprefix("torch.") for _, dtype in parameters.values()})
        what = f"{type(skeleton).__name__}, {numel:,} weights, {', '.join(dtypes)}"
        what += f", linear layers in {self.settings.load_in}" if self.settings.load_in else ""
        folder = Path(self.settings.model)
        there = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if folder.is_dir() else None
        digest = hashlib.blake2b(repr(parameters).encode(), digest_size=8).hexdigest()
        return Model(what, digest, None if there is None else bool(there))

    def layout(self, ranks: int) -> Layout:
        """Returns how the weights are spread over `ranks` ranks."""
        return Layout.of(self.settings, self.deepspeed, ranks)

    def needs(self, skeleton: nn.Module, ranks: int) -> Needs:
        """Returns what a rank of `ranks` needs."""
        named = self.settings.load_in
        form = FORMS[named] if named else form_stored(getattr(skeleton, "config", None))
        run = PlannedRun(skeleton, self.config, self.layout(ranks), self._compute, form)
        return needs(run, self.snapshots, self.merged)

    @property
    def _compute(self) -> torch.dtype | None:
        name = self.settings.compute_dtype
        return None if name is None else getattr(torch, name)

    def trunk_cache(self, skeleton: nn.Module, ranks: int) -> Wanted:
        """Returns what a rank of `ranks` would cache, of examples of `max_length` tokens: its part of the
        training and, where their numbers are set, of the test and validation examples."""
        trained = PlannedRun(skeleton, self.config).acting
        itemsize = max((self._compute or p.dtype).itemsize for p in skeleton.parameters())
        examples, bound = self.settings.train_examples, self.config.trunk_cache_gib
        judged = (self.settings.test_examples, self.settings.validation_examples)
        tests = sum(-(-(count or 0) // ranks) for count in judged)
        kept = Kept(
            self.settings.max_length * hidden_size(skeleton) * itemsize,
            None if examples is None else -(-examples // ranks) + tests,
            None if bound is None else int(bound * GIB),
        )
        return Wanted(trunk_of(skeleton, trained).first, kept)

    def output_layer(self, skeleton: nn.Module, ranks: int) -> Fit | None:
        """Returns what a rank of `ranks` would keep for a fit of the output layer, at most: labels all over
        `max_length` tokens, and of choices one; None: not known, or there is no fit."""
        s, examples = self.settings, self.config.output_layer_examples
        count = min(s.train_examples or examples or 0, examples or s.train_examples or 0)
        spec = BUILTIN_TASKS.get(s.task)
        words = spec.verbalizers if spec is not None else s.verbalizers
        choices = len(words or {}) or 2 if s.objective != "lm" else None
        labels = 1 if choices else s.max_length - 1
        if not count:
            return None
        return fit_of(
            skeleton, self.config, ranks, count, labels, choices, s.max_length, self._compute
        )
