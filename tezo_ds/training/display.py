"""Terminal output of a run on rank 0: the parameter summary, progress, scores, the end."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tezo_ds.engine.engine import Engine
from tezo_ds.engine.report import StepReport
from tezo_ds.rollouts.judged import Sample
from tezo_ds.run.folder import COEFFICIENTS, JOURNAL, REPORT
from tezo_ds.tasks import TaskData
from tezo_ds.tasks.encoded import Encoded, losses_of_labels, truncations
from tezo_ds.tasks.evaluation import Score
from tezo_ds.tasks.lazy import LazyEncoded

WINDOW = 20  # steps that shown figures are medians of
REWARD = "reward"  # name of what an evaluation of rewarded completions measures
ANSWER = 80  # characters of a generated answer that are shown


class Display:
    """Output of a run: live on a terminal, plain lines every so often in a log file, none but on rank 0."""

    def __init__(self, rank: int, world_size: int, log_every: int, stderr: bool = False) -> None:
        self._silent = rank != 0
        self._world_size, self._log_every = world_size, log_every
        self.console = Console(
            quiet=self._silent, highlight=False, markup=False, emoji=False, stderr=stderr
        )
        self._bar: Progress | None = None
        self._task: Any = None
        self._total = 0
        self._recent: deque[StepReport] = deque(maxlen=WINDOW)
        self._start = 0.0

    def summary(self, engine: Engine) -> None:
        """Prints what trains, what is frozen and why, and the size of the learnt state."""
        selection, config = engine.selection, engine.config
        table = Table(show_header=False, box=None, padding=(0, 2))
        what = [f"{len(selection.matrices)} matrices"] if selection.matrices else []
        adapters = selection.adapters
        what += [f"{len(adapters.sites)} adapters {config.adapter}"] if adapters.sites else []
        vectors = len(selection.vectors) - len(adapters.vectors)
        what += [f"{vectors} vectors"] if vectors else []
        table.add_row("trains", f"{', '.join(what)}, {selection.trainable_numel:,} weights")
        for reason, count in selection.frozen.items():
            table.add_row("frozen", f"{count} parameters: {reason}")
        table.add_row("frozen weights", f"{selection.frozen_numel:,}")
        table.add_row(
            "method", f"{config.method}, {engine.probe.name} probe, {_directions(engine)}"
        )
        for name, value in _of_method(engine):
            table.add_row(name, value)
        kind = type(engine.sharding).__name__
        table.add_row("weights", f"{kind} on {self._world_size} rank(s), {engine.sharding.device}")
        if packed := engine.sharding.packed.values():
            numel = sum(weight.shape.numel() for weight in packed)
            bits = 8 * sum(weight.nbytes for weight in packed) / numel
            kinds = ", ".join(dict.fromkeys(weight.kind for weight in packed))
            table.add_row("quantised", f"{len(packed)} as {kinds}, {bits:.2f} bits a weight")
        self.console.print(table)
        if _drifts(engine):
            self.note(
                "warning: 16-bit weights train in place with restore: subtract, so rounding drifts the "
                "weights every step; set restore: copy"
            )

    def data(self, task: TaskData, encoded: Sequence[Encoded], max_length: int) -> None:
        """Prints how many examples there are, and how many were left out or cut."""
        apart = f", {len(task.validation)} validation" if task.validation else ""
        self.note(
            f"{task.spec.name}: {len(task.train)} training{apart} and {len(task.test)} test examples"
        )
        if task.note:
            self.note(task.note)
        if task.duplicates or task.leaked:
            what = "test or validation" if task.validation else "test"
            self.note(
                f"left out: {task.duplicates} repeats, {task.leaked} that are {what} prompts too"
            )
        if isinstance(encoded, LazyEncoded):
            self.note(
                "streaming: examples are tokenised when a step takes them; what is cut, or has no embedding, "
                "is found then"
            )
            return
        if truncated := truncations(encoded):
            self.note(f"{truncated} training prompts cut to {max_length} tokens; see --max-length")
        if lost := losses_of_labels(encoded):
            self.note(
                f"warning: {lost} training examples are longer than {max_length} tokens by their answers, "
                "which lose a part; see --max-length"
            )

    def end(self, summary: dict[str, Any], folder: Path, begun_at: int = 0) -> None:
        """Prints the result of a run, in one place; `begun_at` steps were made by earlier processes."""
        table = Table(show_header=False, box=None, padding=(0, 2))
        before, after = summary.get("accuracy_before"), summary.get("accuracy_after")
        rewarded = summary.get("metric") == REWARD
        if (majority := summary.get("accuracy_majority")) is not None and not rewarded:
            table.add_row("most frequent class", f"{majority:.1%} (always that answer)")
        if before is not None and after is not None:
            table.add_row("accuracy before", f"{before:.1%}")
            if (fitted := summary.get("accuracy_output_layer")) is not None:
                table.add_row(
                    "output layer", f"{fitted:.1%} ({100 * (fitted - before):+.1f} points)"
                )
            table.add_row("accuracy after", f"{after:.1%} ({100 * (after - before):+.1f} points)")
            table.add_row("test examples", f"{summary['test_examples']}")
        elif "test_loss_after" in summary and not rewarded:
            losses = f"{summary['test_loss_before']:.4f} → {summary['test_loss_after']:.4f}"
            table.add_row("test loss", losses)
        self._validated(table, summary)
        if None not in (summary.get("metric_before"), summary.get("metric_after")):
            values = f"{summary['metric_before']:.3f} → {summary['metric_after']:.3f}"
            table.add_row(str(summary["metric"]), values)
        steps, seconds = summary["steps"], f"{summary['seconds_training']:.0f} s"
        if begun_at:
            table.add_row("steps", f"{steps}, of them {steps - begun_at} now, in {seconds}")
        else:
            table.add_row("steps", f"{steps} in {seconds}")
        if (share := summary.get("padding_share")) is not None:
            table.add_row("padding", f"{share:.1%} of the tokens of training batches")
        if "cut_prompts" in summary:  # of examples that were not looked at before
            prompts, answers = summary["cut_prompts"], summary["cut_answers"]
            table.add_row("cut", f"{prompts} prompts, {answers} answers; see --max-length")
        if "adapter" in summary:
            table.add_row("no adapter", summary["adapter"])
        if "merged_model" not in summary and not (folder / COEFFICIENTS).exists():
            table.add_row("result", f"in {JOURNAL}, which evaluate and export replay")
        self.console.print(table)
        if "merged_model" in summary:
            self.note(f"  model              {folder / summary['merged_model']}")
        if "adapter_warning" in summary:
            self.note(f"  warning            the adapter: {summary['adapter_warning']}")
        if (folder / REPORT).exists():
            self.note(f"  report             {(folder / REPORT).absolute().as_uri()}")
        self.note(f"  run folder         {folder}")

    def _validated(self, table: Table, summary: dict[str, Any]) -> None:
        """Adds what the validation examples were scored, where there are any."""
        name = "accuracy" if summary.get("validation_accuracy_after") is not None else "loss"
        name = "metric" if summary.get("metric") == REWARD else name
        before, after = (summary.get(f"validation_{name}_{when}") for when in ("before", "after"))
        if before is not None and after is not None:
            form = "{:.1%} → {:.1%}" if name == "accuracy" else "{:.4f} → {:.4f}"
            count = summary["validation_examples"]
            shown = REWARD if name == "metric" else name
            table.add_row(f"validation {shown}", f"{form.format(before, after)}, {count} examples")

    def note(self, text: str) -> None:
        """Prints one line, however long."""
        self.console.print(text, soft_wrap=True)

    @contextmanager
    def steps(self, total: int) -> Iterator[None]:
        """Context manager: shows the progress of the training steps inside."""
        self._total, self._start = total, time.perf_counter()
        if self._silent or not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20),
            TextColumn("{task.fields[line]}"), TextColumn("eta"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as self._bar:
            self._task = self._bar.add_task("", total=total, line="")
            try:
                yield
            finally:
                self._bar = None

    def step(self, report: StepReport) -> None:
        """Shows a step's report; to be called after each step."""
        if self._silent:
            return
        self._recent.append(report)
        if self._bar is not None:
            self._bar.update(self._task, completed=report.step + 1, line=self._line())
        elif (report.step + 1) % self._log_every == 0 or report.step + 1 == self._total:
            left = self._total - report.step - 1
            eta = statistics.median(r.seconds for r in self._recent) * left
            self.note(f"step {report.step + 1}/{self._total}  {self._line()}  eta {eta:.0f} s")

    def sample(self, step: int, sample: Sample) -> None:
        """Prints what the model completes after so many steps, and how a prompt ends."""
        prompt, answer = repr(sample.prompt[-ANSWER // 2 :]), repr(sample.completion[:ANSWER])
        self.note(f"  after {step} steps, reward {sample.reward:.3g}: {prompt} → {answer}")

    def _line(self) -> str:
        recent = self._recent
        loss = statistics.median(r.loss for r in recent)
        slopes = [abs(k) for r in recent for k in r.kappa if not math.isnan(k)]
        kappa = statistics.median(slopes) if slopes else math.nan
        failed = sum(r.dropped for r in recent)
        dropped = f"  {failed} directions failed" if failed else ""
        speed = sum(r.tokens for r in recent) / sum(r.seconds for r in recent)
        what = f"loss {loss:.4f}" if recent[-1].rewards is None else _gained(recent, 0.0 - loss)
        return f"{what}  |κ| {kappa:.2f}  {speed:,.0f} tokens/s/rank{dropped}"

    @contextmanager
    def evaluation(self, label: str) -> Iterator[Callable[[float], None] | None]:
        """Context manager: shows the progress of an evaluation or an export inside. Gives a function that
        takes the fraction done, or None where none is shown."""
        if self._silent or not self.console.is_terminal or self._bar is not None:
            yield None
            return
        with Progress(console=self.console, transient=True) as bar:
            task = bar.add_task(label, total=1.0)
            yield lambda fraction: bar.update(task, completed=fraction)

    def score(
        self, step: int, score: Score, when: str | None = None, metric: str = "", part: str = "test"
    ) -> None:
        """Prints the result of an evaluation of one part's examples, after so many steps or `when`, and how
        answers begin."""
        found = [] if score.accuracy is None else [f"accuracy {score.accuracy:.1%}"]
        if score.metric is not None:
            found.append(f"{metric} {score.metric:.3f}")
        if metric != REWARD:
            found.append(f"loss {score.loss:.4f}")
        self.note(
            f"{when or f'after {step} steps'}: {', '.join(found)} on {score.examples} {part} examples"
        )
        for answer in score.answers:
            self.note(f"  answers, e.g. {answer[:ANSWER]!r}")


def _gained(recent: Sequence[StepReport], mean: float) -> str:
    """Returns what branches of the last steps gained: medians of means, of bests and of spreads; and how many
    steps had no two that differ."""
    of_each = [[r for r in step.rewards or () if math.isfinite(r)] for step in recent]
    known = [rewards for rewards in of_each if rewards]
    best = spread = math.nan  # all were dropped
    if known:
        best = statistics.median(map(max, known))
        spread = statistics.median(map(statistics.pstdev, known))
    ties = sum(step.tied for step in recent)
    tied = f"  {ties} of {len(recent)} steps tied" if ties else ""
    return f"reward {mean:.4f}  best {best:.4f}  spread {spread:.4f}{tied}"


def _directions(engine: Engine) -> str:
    """Returns how many directions a step has, and whose they are, in words."""
    config, ranks = engine.config, engine.sharding.world_size
    growing = config.query_schedule != "constant"
    count = f"{config.query_schedule}, at most {config.queries_max}" if growing else config.queries
    own = {"per_rank": f" on each of {ranks} rank(s)", "per_example": " of each example"}
    return f"Q = {count}{own.get(config.placement, '')}"


def _of_method(engine: Engine) -> Iterator[tuple[str, str]]:
    """Yields rows of the summary that depend on the method and its options."""
    config, ranks = engine.config, sorted(matrix.rank for matrix in engine.space.matrices)
    if ranks and config.rank == "auto":
        found = f"{ranks[0]}-{ranks[-1]}, median {statistics.median_low(ranks)}"
        yield "rank", f"auto: {found} (rank_threshold {config.rank_threshold})"
    elif ranks and engine.method.factors is not None:
        yield "rank", f"{config.rank}"
    if config.facts.fresh_left:
        yield "ν", f"{config.nu} steps until V is new"
    if config.refresh_every:
        kept = f", {config.keep_periods} ended periods beside the weights" * (
            config.keep_periods > 0
        )
        yield "refresh", f"every {config.refresh_every} steps{kept}"
    if engine.probe.writes:
        yield "restore", "copy" if engine.probe.copies else "subtract"
    size = sum(part.data.nbytes for part in engine.method.state.values())
    moments = ("", "one moment", "two moments")[config.facts.dense_moments]
    beside = f", and {moments} of each weight on its rank" if moments else ""
    learnt = f"{engine.space.numel:,} coefficients, " if config.facts.learns_coefficients else ""
    yield "state", f"{learnt}{size:,} bytes{beside}"


def _drifts(engine: Engine) -> bool:
    """Returns whether each step leaves rounding errors of 16 bits in the weights."""
    if not engine.probe.writes or engine.probe.copies:
        return False
    parameters = dict(engine.sharding.module.named_parameters())
    return any(parameters[name].dtype.itemsize < 4 for name in engine.space.slices)
