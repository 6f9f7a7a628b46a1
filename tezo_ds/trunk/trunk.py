"""A forward that runs once per example up to the first module that trains, and from there on in all branches.

With the first trained module in block ℓ of L a step costs ℓ + 2Q(L - ℓ) blocks of B sequences instead of
2Q·L, and L - ℓ in 2Q copies alone, and their gathers, where the hidden states after the trunk are known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError
from tezo_ds.sharding.base import Sharding
from tezo_ds.trunk.cache import Budget, Cache, MemoryCache, Visit
from tezo_ds.trunk.found import Found, Watch
from tezo_ds.trunk.keys import apart
from tezo_ds.trunk.passes import through_trunk
from tezo_ds.trunk.rest import Entry, Kept, Rest, ways_of
from tezo_ds.trunk.stand_ins import Act, replaced

log = logging.getLogger(__name__)

EXAMPLE_IDS = "example_ids"  # key of a batch: int64 (B,), which examples of a data set its rows are


class Trunk:
    """Split of a model's forward where its first module that trains stands.

    Attributes:
        found: where that is; None before `settle`, and where there is no trunk.
        reason: why there is none, in a phrase.
        settled: whether `settle` was called.
        cache: hidden states kept from step to step; None: none are.
        part: which part of a rank's examples the next forward is of, under `micro_batch`.
        rows: rows of each branch that the last block may be left with in the forward inside `serving`.
        rest: what comes after it.

    Args:
        sharding: the model.
        names: names of all parameters that train.
        needed: whether to refuse a model without a trunk.
    """

    def __init__(self, sharding: Sharding, names: Collection[str], needed: bool) -> None:
        self._sharding, self._names, self._needed = sharding, names, needed
        self.found: Found | None = None
        self.reason = ""
        self.settled = False
        self.cache: Cache | None = None
        self.part = self.rows = 0
        self.rest = Rest()
        self._kept: Kept | None = None

    def __str__(self) -> str:
        if self.found is None:
            return f"no trunk: {self.reason}"
        first, count = self.found.first, len(self.found.blocks)
        others = "the others in every branch"
        if self.rest.way.tail is not None and self.rest.way.tail.alike:
            others = "the last one's attention once a step, the rest in every branch"
        return f"blocks 0 to {first - 1} of {count} run once an example, {others}"

    @property
    def worth_a_forward(self) -> bool:
        """Whether `settle` would run forwards, or has to say that there is no trunk."""
        without = Watch(self._sharding.module, self._names).without_a_forward()
        return not self.settled and (self._needed or not without)

    @torch.no_grad()
    def settle(self, run: Callable[[], Tensor]) -> None:
        """Finds the trunk by a plain forward, and tries whether forwards that are split there give the same
        losses. All ranks of the world must call it.

        Args:
            run: measures losses of a few examples, by forwards under `serving`.

        Raises:
            ConfigError: there is no trunk although the config needs one.
        """
        self.settled = True
        watch = Watch(self._sharding.module, self._names)
        self.reason = watch.without_a_forward()
        if not self.reason:
            with watch.watching(), self._aside():
                plain = run()
            found = watch.result()
            if isinstance(found, str):
                self.reason = found
            else:
                with self._aside():
                    self._try(found, run, plain)
        if self.found is None and self._needed:
            raise ConfigError(
                f"trunk_cache: nothing to keep, as there is no trunk: {self.reason}; train late layers "
                "alone, e.g. include last:6, or set trunk_cache to off"
            )

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Context manager: what is kept for whole batches is not used inside."""
        aside = self.cache, self._kept
        self.cache = self._kept = None
        try:
            yield
        finally:
            self.cache, self._kept = aside

    def _try(self, found: Found, run: Callable[[], Tensor], plain: Tensor) -> None:
        """Takes what was found if split forwards give the plain losses on every rank, and leaves labelled
        positions alone in the last block, and makes the first block's products once, if so they do."""
        self.found, self.rest.trying = found, True
        for self.rest.way in ways_of(found):
            try:
                differs = not self._same(plain, run())
                self.reason = (
                    f"{type(self._sharding.module).__name__}: later blocks read more of the trunk than the "
                    "hidden states that enter them (blocks share state)"
                )
            except Exception as error:  # whatever a model of unknown kind may object to
                differs, self.reason = True, f"{type(error).__name__}: {error}".split("\n")[0]
            if not self._sharding.maxima([differs])[0]:
                self.reason = ""
                break
        else:
            self.found = None
        self.rest.trying = False
        if self.found is None and self._sharding.place == 0 and not self._needed:
            log.warning("shared_trunk: every branch runs all blocks (%s)", self.reason)

    def _same(self, plain: Tensor, ours: Tensor) -> bool:
        dtypes = self._sharding.floating_dtypes()
        close = max(1e-4, *(8 * torch.finfo(dtype).eps for dtype in dtypes))
        return torch.allclose(ours, plain, rtol=close, atol=close, equal_nan=True)

    @contextmanager
    def using(self, cache: Cache | None) -> Iterator[None]:
        """Context manager: forwards inside are of another data set, with a cache of its own or none."""
        before, self.cache = self.cache, cache
        try:
            yield
        finally:
            self.cache = before

    @contextmanager
    def recurring(self) -> Iterator[None]:
        """Context manager: several forwards of the same examples come; the first alone runs the trunk."""
        if self._kept is not None:  # within another
            yield
            return
        self._kept = Kept()
        try:
            yield
        finally:
            self._kept = None

    @contextmanager
    def serving(
        self, batch: Mapping[str, Any], branches: int, positions: Tensor | None
    ) -> Iterator[None]:
        """Context manager: the model's forward inside is split at the trunk, where that saves work.

        Args:
            batch: the examples, B rows, with `EXAMPLE_IDS` where hidden states are to be kept.
            branches: number of copies of the batch in the forward's inputs.
            positions: places with a label, int64 (k,) of the flattened (B * T); None: all may be read.

        Raises:
            ConfigError: a cache, and ids or padding that it cannot go by.
        """
        ids = batch.get(EXAMPLE_IDS) if self.cache is not None else None
        saves = branches > 1 or ids is not None or self._kept is not None or self.rest.trying
        if self.found is None or not saves:
            yield
            return
        visit, compute = None, True
        if ids is not None and self.cache is not None and self._known is None:
            visit = Visit(self.cache, ids, batch)
            compute = visit.missing_anywhere(self._sharding)
        forward, examples = self._sharding.module.forward, _examples(batch)
        self.rows = 0 if positions is None else max(1, len(positions))
        places = None if positions is None else positions.to(self._sharding.device)

        def split(**inputs: Any) -> Any:
            one = _first_copy(inputs, branches)
            if _examples(one) != examples:  # a few of them, to try something out
                hidden = through_trunk(self._found, forward, one)
                entry = Entry(forward, inputs, one, hidden, branches, None, self.part)
                return self.rest(self._found, entry, None)
            hidden = self._hidden(forward, one, visit, compute)
            entry = Entry(forward, inputs, one, hidden, branches, places, self.part)
            with apart(inputs.get("past_key_values"), self._found.first, branches):
                return self.rest(self._found, entry, self._kept)

        with replaced(self._sharding.module, split):
            try:
                yield
            finally:
                self.rows = 0

    @property
    def _found(self) -> Found:
        assert self.found is not None
        return self.found

    @property
    def _known(self) -> Tensor | None:
        return None if self._kept is None else self._kept.hidden.get(self.part)

    def fill(self, batch: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        """Runs the trunk on a batch's examples that the cache lacks, if it lacks any on some rank."""
        assert self.cache is not None
        visit = Visit(self.cache, batch[EXAMPLE_IDS], batch)
        if visit.missing_anywhere(self._sharding):
            forward = self._sharding.module.forward
            with replaced(
                self._sharding.module, lambda **given: self._hidden(forward, given, visit, True)
            ):
                self._sharding.forward(**inputs)

    def _hidden(
        self, forward: Act, inputs: dict[str, Any], visit: Visit | None, compute: bool
    ) -> Tensor:
        """Returns hidden states after the trunk, (B, T, hidden): of this step, cached or computed."""
        if self._known is not None:
            return self._known
        if visit is None:
            hidden = through_trunk(self._found, forward, inputs)
        else:
            new = None
            if compute:
                new = through_trunk(self._found, forward, visit.of_missing(inputs))
            hidden = visit.joined(new, self._sharding.device)
        if self._kept is not None:
            self._kept.hidden[self.part] = hidden
        return hidden


def _examples(tensors: Mapping[str, Any]) -> int:
    """Returns the length of the longest tensors."""
    return max(len(v) for v in tensors.values() if isinstance(v, Tensor) and v.dim())


def _first_copy(inputs: Mapping[str, Any], branches: int) -> dict[str, Any]:
    """Returns the inputs of the first of several copies, which `repeat` put one after another."""
    return {
        key: value[: len(value) // branches] if isinstance(value, Tensor) and value.dim() else value
        for key, value in inputs.items()
    }


def trunk_of(config: TezoConfig, sharding: Sharding, names: Collection[str]) -> Trunk:
    """Returns the trunk of a model of which the named parameters train, with a cache in memory if the config
    wants one there."""
    trunk = Trunk(sharding, names, needed=config.trunk_cache != "off")
    if config.trunk_cache == "memory":
        trunk.cache = MemoryCache(budget_of(config), sharding.device.type != "cpu")
    return trunk


def budget_of(config: TezoConfig) -> Budget:
    """Returns the bytes that a rank's caches may take."""
    most = config.trunk_cache_gib
    return Budget(None if most is None else int(most * 2**30))


def two_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns two examples of a batch, those with the most labels; of a single one twice the same."""
    tensors = [v for v in batch.values() if isinstance(v, Tensor) and v.dim()]
    count, labels = max(map(len, tensors)), batch.get("labels")
    rows = torch.arange(count)
    if isinstance(labels, Tensor) and labels.dim() > 1:
        rows = (labels != -100).flatten(1).sum(dim=1).argsort(descending=True, stable=True).cpu()
    rows = rows[[0, min(1, count - 1)]]
    return {
        key: value[rows.to(value.device)]
        if isinstance(value, Tensor) and value.dim() and len(value) == count
        else value
        for key, value in batch.items()
    }
