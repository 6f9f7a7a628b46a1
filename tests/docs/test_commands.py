"""Commands and Python of README.md and docs: run as printed, or at least parsed; no block goes unlooked at.

Commands of `tezo-ds` run in this process, in a folder where the names that the pages use stand for a tiny
model and a few films. What a launcher starts is parsed by the command line's own parser.
"""

from __future__ import annotations

import re
import shlex
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import typer
from command_line import call, flags
from task_files import reviews, write
from tiny import make_batch
from tiny_tokenizer import save_tiny_llama, with_chat_template
from transformers import AutoModelForCausalLM

from tezo_ds.cli import app
from tezo_ds.cli.options import from_flags, settings_from
from tezo_ds.cli.train import read_flags
from tezo_ds.files.text import read_json
from tezo_ds.settings import RunOptions

REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
MODELS = ("my-model", "MODEL")

# How commands begin that are neither run nor parsed, and why.
LEFT_OUT = {
    "./launch/quickstart.sh": "downloads a model and data",
    "./launch/test.sh": "runs this test",
    "launch/setup.sh": "makes an environment, from the network",
    "pip install": "needs the network",
    "tensorboard --logdir": "starts a server",
    "rsync": "needs a second machine",
    "printf": "writes the file `hosts`, which `place` makes",
    "python benchmarks/": "takes minutes; the programs have tests of their own",
    "torchrun --standalone --nproc-per-node $n benchmarks/": "takes minutes, on as many ranks",
    "deepspeed --hostfile hosts benchmarks/": "needs a cluster",
    "python tests/helpers/two_hosts.py --rate 100mbit -- bash": "opens a shell",
    "python -m pytest": "is a test itself",
    "rm -f docs/scaling.csv": "removes a measurement that is kept",
    "for n in": "begins a loop of commands",
    "done": "ends one",
}
LAUNCHER = {"launch/hostfile.sh": "train"}  # scripts whose arguments are a command's


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    text: str


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 2
                found.append(Block(page.name, line, match[2]))
    return found


def commands(text: str) -> Iterator[list[str]]:
    """Yields the words of each command, without comments and the pages' `…`; lines that end in a backslash
    go on."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):  # of its environment
            words = words[1:]
        if words:
            yield words


def to_parse(words: list[str]) -> list[str] | None:
    """Returns the arguments of a `tezo-ds` that a launcher or script starts; None where there is none."""
    given = [word for word in words if word != "…"]
    if given[0] in LAUNCHER:
        return [LAUNCHER[given[0]], *(word for word in given[1:] if word != "--dry-run")]
    for name in ("tezo-ds", "tezo_ds"):
        if name in given:
            return given[given.index(name) + 1 :]
    return None


def is_run(words: list[str]) -> bool:
    return words[0] == "tezo-ds" and "…" not in words


def parse(words: list[str]) -> dict[str, Any]:
    """Returns the values that a command's parser gives, or raises an error of usage."""
    command = typer.main.get_command(app).commands[words[0]]
    context = command.make_context(words[0], words[1:])
    if words[0] == "doctor":
        return {**context.params, **read_flags(context.args, "tezo-ds doctor")}
    return dict(context.params)


BASH = [(b, words) for b in blocks("bash") for words in commands(b.text)]
# Of a session that is shown with its output.
TYPED = [
    (b, words)
    for b in blocks("")
    for line in re.findall(r"^\$ (.*)", b.text, re.MULTILINE)
    for words in commands(line)
]


def cases(found: list[tuple[Block, list[str]]]) -> list[Any]:
    return [
        pytest.param(words, id=f"{b.page}:{b.line}-{' '.join(words)[:40]}") for b, words in found
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder with what the pages' commands name: models, data, a hostfile, a finished run."""
    folder = tmp_path_factory.mktemp("place")
    rows = reviews(40)
    words = ("terrible", "great")
    texts = [f"{row['text']} It was {word}" for row in rows for word in words]
    for name in MODELS:
        save_tiny_llama(folder / name, texts, head_dim=16)
        with_chat_template(folder / name)
    write(folder / "reviews.jsonl", rows)
    asked = [(f"Is film {i} good?", row["text"]) for i, row in enumerate(rows)]
    write(folder / "answers.jsonl", [{"question": one, "answer": other} for one, other in asked])
    chats = [
        [{"role": "user", "content": one}, {"role": "assistant", "content": other}]
        for one, other in asked
    ]
    write(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    said = [{"prompt": one, "completion": f" {other}"} for one, other in asked]
    write(folder / "questions.jsonl", said)
    text = (REPO / "docs/rewards.md").read_text()
    (folder / "my_rewards.py").write_text(text.split("```python\n")[1].split("```")[0])
    (folder / "hosts").write_text(f"{socket.gethostname()} slots=1\n")
    (folder / "ds_configs").symlink_to(REPO / "ds_configs")
    named = {"model": "my-model", "task": "reviews.jsonl", "template": "{text} It was"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        more = {"output": "runs/sst2", "steps": 2, "batch_size": 4, "rank": 4}
        assert call("train", *flags({**named, **more})) == 0
    return folder


@pytest.fixture
def own_place(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a copy of it, and goes there."""
    shutil.copytree(place, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "place"


@pytest.mark.parametrize("words", cases([(b, w) for b, w in BASH if is_run(w)]))
def test_commands_run_as_printed(
    words: list[str], own_place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [word for word in words[1:] if word != "--dry-run"]  # of a plan: minutes
    if "--load-in" in arguments:
        pytest.importorskip("torchao")  # launch/test.sh runs these apart
    if arguments[0] == "train":
        arguments += ["--steps", "3"]
    code = call(*arguments)
    out, err = capfd.readouterr()
    # The doctor's 1 says that it examined this machine, and found it wanting.
    assert code == 0 or (code == 1 and arguments[0] == "doctor"), err
    assert out.strip() and "error:" not in err


@pytest.mark.parametrize("words", cases([(b, w) for b, w in BASH + TYPED if to_parse(w)]))
def test_the_parser_takes_what_is_printed(words: list[str]) -> None:
    arguments = to_parse(words) or []
    given = parse(arguments)
    if arguments[0] == "train" and "…" not in words:
        settings_from(given, {})
        from_flags(RunOptions, given)
    if given.get("deepspeed") is not None:
        assert read_json(REPO / given["deepspeed"])


@pytest.mark.parametrize("flag", ["--stepz", "--learning-rate"])
@pytest.mark.parametrize("command", ["train", "doctor"])
def test_a_flag_that_there_is_not_is_found(command: str, flag: str) -> None:
    text = f"torchrun --nproc-per-node 8 -m -- tezo_ds {command} --fsdp \\\n    {flag} 5  # ranks"
    (words,) = commands(text)
    with pytest.raises(Exception, match=f"No such option: {flag}"):
        parse(to_parse(words) or [])


def test_every_block_is_of_a_language_that_is_looked_at() -> None:
    for page in PAGES:
        fences = re.findall(r"^ *(```+|~~~+)(.*)$", page.read_text(), re.MULTILINE)
        assert {mark for mark, _ in fences} <= {"```"}, page.name
        assert {language for _, language in fences} <= {"", "bash", "python", "toml"}, page.name
        indented = re.findall(r"^ +```", page.read_text(), re.MULTILINE)
        assert not indented, f"{page.name}: `blocks` does not see it"


def how(words: list[str]) -> str | None:
    """Returns why a command is left out; "" where it is run or parsed; None where nobody has said."""
    line = " ".join(words)
    if is_run(words) or to_parse(words):
        return ""
    return next((why for start, why in LEFT_OUT.items() if line.startswith(start)), None)


def test_every_command_is_run_parsed_or_left_out_for_a_reason() -> None:
    unknown = [f"{b.page}:{b.line}: {' '.join(w)}" for b, w in BASH if how(w) is None]
    assert not unknown, "neither run, parsed, nor in LEFT_OUT with a reason"
    lines = [" ".join(words) for _, words in BASH if how(words)]
    for start in LEFT_OUT:
        assert any(line.startswith(start) for line in lines), f"{start} is on no page any more"


def test_a_command_in_none_of_the_lists_is_found() -> None:
    for line in ("python launch/new.py", "make all", "./tezo train"):
        assert [how(words) for words in commands(line)] == [None]


def test_programs_that_pages_name_are_there() -> None:
    for block, words in BASH:
        for word in words:
            if re.fullmatch(r"[\w./]+\.(py|sh|sbatch)", word) and not word.startswith("/"):
                assert (REPO / word).is_file(), f"{block.page}:{block.line}: {word}"


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=f"{b.page}:{b.line}") for b in blocks("python")]
)
def test_python_compiles_and_what_begins_runs(block: Block, own_place: Path) -> None:
    code = compile(block.text, f"{block.page}:{block.line}", "exec")
    if block.page not in ("README.md", "python.md", "training.md"):
        return  # extending.md's method is trained in tests/methods/test_extending.py
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(own_place / "my-model").eval()
    loader = [make_batch(3, seed=i) for i in range(2)]
    names: dict[str, Any] = {
        "peft": peft, "base_model": model, "model": model, "loader": loader
    }  # fmt: skip
    exec(code, names)
    if "engine" in names:
        assert names["engine"].step_index == len(loader) and names["weights"]
