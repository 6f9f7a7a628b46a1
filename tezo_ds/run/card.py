"""Model card of a run's result: README.md of an adapter or a merged model."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from tezo_ds.config import BLOCK
from tezo_ds.run.about import read_about
from tezo_ds.run.folder import METRICS, read_metrics

_TOLD = (
    "method",
    "rank",
    "rho",
    "lr",
    "schedule",
    "queries",
    "placement",
    "seed",
    "include",
    "exclude",
)
_OF_ADAPTERS = {
    "tt": ("adapter", "adapter_sites", "tt_rank", "tt_modes", "tt_init", "bottleneck"),
    "lora": ("adapter",),
}
_LIBRARIES = {"tt": "tezo_ds", "lora": "peft", "none": "peft"}


def model_card(run: Path, steps: int, adapter: bool, warning: str | None = None) -> str:
    """Returns Markdown with the metadata that hubs read: base model, method, seed, steps, data, accuracy.

    Args:
        run: folder of the run.
        steps: number of steps after which the result is taken.
        adapter: whether the result is a LoRA adapter, and not a whole model.
        warning: what users of the result have to know.

    Raises:
        ConfigError: the folder's config.json is missing or damaged.
    """
    content = read_about(run)
    settings, block = content["settings"], content[BLOCK]
    beside = block["adapter"]
    told = [
        name for name in (*_TOLD, *_OF_ADAPTERS.get(beside, ())) if (name, beside) != ("rank", "tt")
    ]
    kind = "tensor-train" if beside == "tt" else "lora"
    data = ModelCardData(
        base_model=settings["model"],
        library_name=_LIBRARIES[beside] if adapter else "transformers",
        tags=["tezo_ds", "zeroth-order", block["method"], *([kind] if adapter else [])],
    )
    rows = {
        "base model": settings["model"],
        "task": settings["task"],
        "data": settings["data"] or "the task's own",
        "steps": steps,
        "examples a step": content["batch_size"],
        **{name: block[name] for name in told},
        "accuracy": _accuracy(run, steps),
        "made by": ", ".join(f"{name} {at}" for name, at in content["versions"].items()),
    }
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items() if value != "")
    warned = f"**Warning:** {warning}.\n\n" if warning else ""
    what = "model"
    if adapter:
        what = "tensor-train adapter" if beside == "tt" else "LoRA adapter"
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {Path(settings['model']).name}, fine-tuned on "
        f"{Path(settings['task']).name}\n\nA {what} that was trained without backpropagation, by "
        f"zeroth-order steps (`{block['method']}`).\n\n{warned}| | |\n|---|---|\n{table}\n"
    )


def _accuracy(run: Path, steps: int) -> str:
    """Returns the accuracy on the run's test examples, in words; "" if not evaluated after `steps` steps."""
    scores = read_metrics(run / METRICS)[1] if (run / METRICS).exists() else []
    at = {
        line["step"]: line
        for line in scores
        if line["test_accuracy"] is not None and "after" not in line
    }
    if steps not in at:
        return ""
    before = f", {at[0]['test_accuracy']:.1%} before training" if 0 in at and steps else ""
    line = at[steps]
    return f"{line['test_accuracy']:.1%} of {line['test_examples']} test examples{before}"


def _cell(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace("|", "\\|").replace("\n", " ") or "none"
