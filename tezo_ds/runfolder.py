"""What a run leaves on disk; rank 0 alone writes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from tezo_ds.engine import StepReport
from tezo_ds.errors import ConfigError

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
COEFFICIENTS, ADAPTER, CURVE = "coefficients.safetensors", "adapter", "curve.png"
MODEL = "model"


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON that any reader takes: numbers that are not finite, which JSON does not have, are null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def refuse_used(path: Path) -> None:
    """Raises ConfigError if a folder holds a run: to be known before a model is loaded."""
    if (path / METRICS).exists():
        raise ConfigError(f"{path} holds a run already; choose another --output, or remove it")


class RunFolder:
    """The files of one run.

    Raises:
        ConfigError: the folder cannot be made, or holds another run.
    """

    def __init__(self, path: Path) -> None:
        refuse_used(path)
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._metrics = (path / METRICS).open("x", buffering=1)  # a line is on its way at once
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON file by way of a temporary name, so that it is never half there."""
        partial = self.path / f".{name}.{os.getpid()}"
        partial.write_text(to_json(content, indent=2) + "\n")
        partial.replace(self.path / name)

    def log_step(self, report: StepReport) -> None:
        """One line of metrics.jsonl for a step."""
        found = report.quality
        self._log({
            "step": report.step, "loss": report.loss, "kappa": list(report.kappa),
            "rho": report.rho, "lr": report.lr, "seconds": round(report.seconds, 4), "tokens": report.tokens,
            "dropped": report.dropped, "kappa_mean": found.mean, "kappa_spread": found.spread,
            "gradient_norm": found.gradient_norm, "snr": found.snr,
        })  # fmt: skip

    def log_score(self, step: int, accuracy: float | None, loss: float, examples: int) -> None:
        """One line for an evaluation after `step` steps."""
        self._log(
            {"step": step, "test_accuracy": accuracy, "test_loss": loss, "test_examples": examples}
        )

    def _log(self, line: dict[str, Any]) -> None:
        print(to_json(line), file=self._metrics)

    def close(self) -> None:
        """No more lines."""
        self._metrics.close()


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The step lines and the evaluation lines of a metrics.jsonl. A last line that is cut short, as a
    run that was killed may leave it, counts as not written.

    Raises:
        ConfigError: it cannot be read, or another line is no JSON.
    """
    try:
        texts = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); has the run begun?"
        ) from None
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise ConfigError(
                    f"{path}: line {number} is no JSON ({error}); take the file from a copy"
                ) from None
    return [x for x in lines if "loss" in x], [x for x in lines if "test_loss" in x]


def draw_curve(metrics: Path, picture: Path) -> None:
    """Training loss by step, its running median, and test accuracy where there is any, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, scores = read_metrics(metrics)
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    finite = [line for line in steps if line["loss"] is not None]
    x, loss = [line["step"] + 1 for line in finite], [line["loss"] for line in finite]
    axis.plot(x, loss, color="tab:blue", alpha=0.3, linewidth=1, label="training loss")
    axis.plot(x, _running_median(loss), color="tab:blue", label="running median")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3)
    accurate = [line for line in scores if line["test_accuracy"] is not None]
    if accurate:
        right = axis.twinx()
        points = (
            [line["step"] for line in accurate],
            [100 * line["test_accuracy"] for line in accurate],
        )
        right.plot(*points, "o-", color="tab:orange", label="test accuracy")
        right.set_ylabel("test accuracy, %")
        right.set_ylim(0, 100)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def _running_median(values: list[float], width: int = 15) -> list[float]:
    windows = (sorted(values[max(0, i - width + 1) : i + 1]) for i in range(len(values)))
    return [window[len(window) // 2] for window in windows]
