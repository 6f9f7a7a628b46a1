"""CSV files as pandas, Excel and other languages' spreadsheets write them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from task_files import TEMPLATE

from tezo_ds.errors import DataError
from tezo_ds.tasks import load_task

pytest_plugins = ("offline",)
pytestmark = pytest.mark.usefixtures("no_network")

PLAIN = "text,label\nfine film,pos\nno film,neg\n"
READ = [("fine film It was", "pos"), ("no film It was", "neg")]


def read(path: Path, content: str | bytes) -> list[tuple[str, str | None]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    data = load_task(str(path), template=TEMPLATE, test_fraction=0)
    return [(e.prompt, e.label) for e in data.train]


def failure(path: Path, content: str | bytes) -> str:
    with pytest.raises(DataError) as caught:
        read(path, content)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        ",text,label\n0,fine film,pos\n1,no film,neg\n",  # pandas' to_csv
        '"","text","label"\n"1","fine film","pos"\n"2","no film","neg"\n',  # R's write.csv
        "text,label,\nfine film,pos,\nno film,neg,\n",
        "text,label,,\nfine film,pos,,\nno film,neg, ,\n",
        " ,text,label, ,\t\n0,fine film,pos, ,\n1,no film,neg\n",
        "text,label\nfine film,pos,\nno film,neg,,\n",
        ",text,label,\n0,fine film,pos,\n1,no film,neg\n",
        "sep=,\n" + PLAIN,
        "SEP=,\r\n" + PLAIN.replace("\n", "\r\n"),
        "sep=;\n" + PLAIN.replace(",", ";"),
        "\ufeffsep=;\n" + PLAIN.replace(",", ";"),
        "sep=|\n" + PLAIN.replace(",", "|"),
        '"sep=\t"\n' + PLAIN.replace(",", "\t"),
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        ";text;label\n0;fine film;pos\n1;no film;neg\n",
        "\ufeff" + PLAIN.replace(",", ";"),
        "text;label;\nfine film;pos;\nno film;neg;\n",
        "\n\ntext,label\n\nfine film,pos\n \nno film,neg",
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
    ],
)
def test_tables_of_two_columns(tmp_path: Path, content: str) -> None:
    assert read(tmp_path / "a.csv", content) == READ


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_quotes_and_newlines_within_cells(tmp_path: Path, delimiter: str) -> None:
    texts = ['a, "b"; c\td', "two\nlines", "1,5", "two\r\nlines\n\nmore", "sep=,"]
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(("text", "label"))
        writer.writerows((text, str(i)) for i, text in enumerate(texts))
    expected = [(f"{text} It was", str(i)) for i, text in enumerate(texts)]
    assert read(path, path.read_bytes()) == expected


def test_one_column_is_not_parted_at_semicolons(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\nso; so\n\nand; and; so\n")
    data = load_task(str(path), template="{text}", test_fraction=0)
    assert [e.prompt for e in data.train] == ["so; so", "and; and; so"]
    path.write_text("to;do\nno semicolon\n")
    data = load_task(str(path), template="{to;do}", test_fraction=0)
    assert [e.prompt for e in data.train] == ["no semicolon"]


@pytest.mark.parametrize("place", [0, 1, 40])
def test_a_long_row(tmp_path: Path, place: int) -> None:
    """Hazard: the csv module takes 131,072 characters a field unless it is told otherwise."""
    before = csv.field_size_limit()
    texts = [f"text {i}" for i in range(50)]
    texts[place] = "word " * 60_000 + "end"
    rows = "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts))
    found = read(tmp_path / "a.csv", "text,label\n" + rows)
    assert [prompt for prompt, _ in found] == [f"{text} It was" for text in texts]
    read(tmp_path / "b.csv", f'text,label\n"{"word, " * 60_000}",0\nb,1\n')
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "text,label,\nHello, world,pos\n",
            ", line 2: field 3 is 'pos', and that column has no name in the header; name it, or quote "
            "fields with commas",
        ),
        (
            ',text,label\n0,"a\nb",pos\n1,Hello, world,pos\n',
            ", line 4: the row has 4 fields, the header 3; quote fields with commas",
        ),
        (
            "text;label\na;pos\n\nb;c;neg\n",
            ", line 4: the row has 3 fields, the header 2; quote fields with semicolons",
        ),
        (
            "sep=|\ntext|label\na|b|neg\n",
            ", line 3: the row has 3 fields, the header 2; quote fields with '|'",
        ),
        (
            "sep=,\ntext,text\na,b\n",
            ", line 2: column 'text' is there twice; rename one",
        ),
        (
            'text,label\na,pos\n"b,neg\nc,pos\n',
            ", line 3: a quote is opened and never closed; close it, or write it twice",
        ),
        (
            '"text,label\na,pos\n',
            ", line 1: a quote is opened and never closed; close it, or write it twice",
        ),
        ("sep=,\n", ": the file is empty"),
        ("sep=;\ntext;label\n", ": the file has a header and no rows"),
        ("text;label\n", ": the file has a header and no rows"),
        ("text,label\ncaf\u00e9,pos\n".encode("latin-1"), ", line 2: not UTF-8; save the file as UTF-8"),
        (PLAIN.encode("utf-16"), ", line 1: not UTF-8; save the file as UTF-8"),
    ],
)  # fmt: skip
def test_bad_tables(tmp_path: Path, content: str | bytes, expected: str) -> None:
    assert failure(tmp_path / "a.csv", content) == expected
