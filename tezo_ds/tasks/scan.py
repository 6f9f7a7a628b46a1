"""Splits of rows that stay on disk: one pass with digests of 16 bytes, and arithmetic on arrays of those.

Gives what `splitting` does of examples in memory.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from tezo_ds.errors import DataError
from tezo_ds.tasks.example import Example, Maker
from tezo_ds.tasks.lazy import LazyExamples
from tezo_ds.tasks.splitting import Asked, Parts, Source, rank_of
from tezo_ds.tasks.table import Table

Index = np.ndarray  # numbers of rows from 0, int64, ascending
WIDTH = 16  # bytes of a digest


@dataclass(frozen=True)
class Scan:
    """What one pass keeps of a table's rows.

    Attributes:
        table, make: the rows, and what makes an example of one.
        keys, prompts: digests of `Example.key` and of the prompt; the same array where no prompt has a
            completion.
        contents: digests of the whole example, uint64.
        ranks: by purpose, see `splitting.rank_of`.
        labels: of each row the place of its label among `names`; None without labels.
        names: the labels.
    """

    table: Table
    make: Maker
    keys: np.ndarray
    prompts: np.ndarray
    contents: np.ndarray
    ranks: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    names: list[str]

    def unique(self) -> Index:
        """Returns the first row of each key."""
        return np.sort(np.unique(self.keys, return_index=True)[1])

    def without(self, index: Index, others: np.ndarray) -> Index:
        """Returns the rows of an index whose prompts are not among other prompts."""
        return index[~np.isin(self.prompts[index], others)]

    def subset(self, index: Index, count: int | None, purpose: str = "subset") -> Index:
        """Returns `count` rows of an index, or all if there are fewer, in their order."""
        if count is None or count >= len(index):
            return index
        order = np.argsort(self.ranks[purpose][index], kind="stable")
        return np.sort(index[order[:count]])

    def examples(self, index: Index) -> LazyExamples:
        """Returns the examples of an index."""
        counts: Counter[str] = Counter()
        if self.labels is not None:
            found = np.bincount(self.labels[index], minlength=len(self.names))
            counts = Counter(dict(zip(self.names, found.tolist(), strict=True)))
        digest = hashlib.blake2b(self.contents[index].tobytes(), digest_size=8).hexdigest()
        return LazyExamples(self.table, index, self.make, +counts, digest)


def scan(table: Table, make: Maker, purposes: Collection[str], seed: int) -> Scan:
    """Looks at all rows of a table once.

    Raises:
        DataError: names the file, the row and the column that is wrong.
    """
    keys, prompts, contents = bytearray(), bytearray(), bytearray()
    ranks = {purpose: array("d") for purpose in purposes}
    labels, names, apart = array("i"), dict[str, int](), False
    for number, row in enumerate(table.rows, 1):
        example = make(number, row)
        keys += _digest(example.key)
        prompts += _digest(example.prompt) if example.key != example.prompt else keys[-WIDTH:]
        apart |= example.key != example.prompt
        contents += _content(example)
        for purpose, found in ranks.items():
            found.append(rank_of(example, purpose, seed))
        if example.label is not None:
            labels.append(names.setdefault(example.label, len(names)))
    digests = np.frombuffer(keys, dtype=f"S{WIDTH}")
    return Scan(
        table, make, digests, np.frombuffer(prompts, dtype=f"S{WIDTH}") if apart else digests,
        np.frombuffer(contents, dtype=np.uint64),
        {purpose: np.frombuffer(found) for purpose, found in ranks.items()},
        np.frombuffer(labels, dtype=np.int32) if len(labels) == len(digests) else None, list(names),
    )  # fmt: skip


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=WIDTH).digest()


def _content(example: Example) -> bytes:
    said = repr((example.prompt, example.answer, example.kind, example.everything))
    return hashlib.blake2b(said.encode(), digest_size=8).digest()


def split(train: Source, test: Source | None, validation: Source | None, asked: Asked) -> Parts:
    """Returns the parts of a task as `splitting.split` does, those to train on lazily.

    Raises:
        DataError: as that does.
    """
    given = [each for each in (train, test, validation) if each is not None]
    bounded = (asked.train_examples, asked.test_examples) != (None, None)
    wanted = {"split": test is None, "subset": bounded, "validation": asked.validation_examples}
    purposes = [purpose for purpose, needed in wanted.items() if needed]
    scans = [scan(table, make, purposes, asked.seed) for table, make in given]
    unique = [each.unique() for each in scans]
    duplicates = sum(len(each.keys) for each in scans) - sum(map(len, unique))
    main, where = scans[0], train[0].where
    judge, judged = main if test is None else scans[1], scans[-1]  # of the test, of the validation
    if test is not None:
        found, tested = unique[0], unique[1]
        kept = main.without(found, judge.prompts[tested])
        if not len(kept):
            raise DataError(f"{where}: every prompt is also in {test[0].where}")
    else:
        found, tested = _held_out(main, unique[0], asked, where)
        kept = found
    leaked, held = len(found) - len(kept), np.empty(0, dtype=np.int64)
    if validation is not None:
        fresh = judged.without(unique[-1], judge.prompts[tested])
        leaked += len(unique[-1]) - len(fresh)
        held = judged.subset(fresh, asked.validation_examples, "validation")
        if not len(held):
            raise DataError(f"{validation[0].where}: every prompt is also in the test examples")
    elif asked.validation_examples is not None:
        judged, held = main, main.subset(kept, asked.validation_examples, "validation")
        leaked -= len(held)
    if len(held):
        before, kept = len(kept), main.without(kept, judged.prompts[held])
        leaked += before - len(kept)
        if not len(kept):
            raise DataError(
                f"{where}: {len(held)} validation examples leave none of {before} to train on; take fewer "
                "(validation_examples)"
            )
    return Parts(
        main.examples(main.subset(kept, asked.train_examples)),
        list(judge.examples(judge.subset(tested, asked.test_examples))),
        list(judged.examples(held)), duplicates, leaked,
    )  # fmt: skip


def _held_out(main: Scan, kept: Index, asked: Asked, where: str) -> tuple[Index, Index]:
    """Returns which rows train and which are tested, of a table without test rows."""
    tests = main.ranks["split"][kept] < asked.test_fraction
    train, test = kept[~tests], kept[tests]
    if not len(train) or (asked.test_fraction > 0 and not len(test)):
        raise DataError(
            f"{where}: {len(kept)} prompts split into {len(train)} for training and {len(test)}"
            f" for test; change test_fraction ({asked.test_fraction}) or pass test_data"
        )
    return train, test
