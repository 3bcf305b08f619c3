"""CSV and TSV: cells exactly as they were written, by row, with the line that each row begins at."""

import csv
import gzip
import json
import pickle
import re

import datasets
import pytest
from torch.utils.data import DataLoader

from tests.support import opened, png
from vlcpt import CPTDataset, DocumentError, Image, Text, read_documents
from vlcpt.data.rows.delimited import DelimitedRows


@pytest.fixture
def table(tmp_path):
    def write(content, name="a.csv"):
        (tmp_path / "a.png").write_bytes(png(0))
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    return write


NASTY = [
    "a,b",
    'say "hi"',
    "two\nlines",
    "two\r\nlines",
    "  spaces ",
    "阀门,",
    "tab\there",
    '"',
    "\\n",
    "x" * 200_000,
]


TURNS = json.dumps([{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A."}]).replace('"', '""')


@pytest.mark.parametrize(("name", "dialect"), [("a.csv", "excel"), ("a.tsv", "excel-tab"), ("a.csv", "unix")])
def test_every_cell_is_what_the_csv_module_wrote(tmp_path, name, dialect):
    with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, dialect=dialect)
        writer.writerow(["text", "id", "empty"])
        for number, text in enumerate(NASTY):
            writer.writerow([text, number, ""])
    rows = DelimitedRows(tmp_path / name)
    assert [rows.row(n) for n in reversed(range(len(rows)))] == [
        {"text": text, "id": str(number)} for number, text in reversed([*enumerate(NASTY)])
    ]
    with (tmp_path / name).open(newline="", encoding="utf-8") as file:
        lines = file.read().split("\n")
    for number in (3, 4, 9):
        assert NASTY[number].split("\n")[0].strip('"')[:5] in lines[rows.source(number).line - 1]
    assert csv.field_size_limit() == 131_072


def test_a_byte_order_mark_blank_lines_and_empty_rows_are_no_data(table):
    rows = DelimitedRows(table(b"\xef\xbb\xbftext,id\r\n\r\nA.,1\r\n,\r\nB.,2"))
    assert [(rows.source(n).line, rows.row(n)) for n in range(len(rows))] == [
        (3, {"text": "A.", "id": "1"}),
        (5, {"text": "B.", "id": "2"}),
    ]


@pytest.mark.parametrize(
    ("content", "segments"),
    [
        ("text\nA <trainable_text>dish</trainable_text>\n", (Text("A "), Text("dish", trainable=True))),
        ('text,images\n<image>A.,"[""a.png""]"\n', (Image("a.png"), Text("A.", trainable=True))),
        ("image,caption\na.png,A.\n", (Image("a.png"), Text("A.", trainable=True))),
        ("image,text\na.png,A.\n", (Image("a.png"), Text("A.", trainable=True))),
        (
            f'conversations,image\n"{TURNS}",a.png\n',
            (Image("a.png"), Text("What?\n"), Text("A.", trainable=True)),
        ),
    ],
)
def test_formats_with_flat_fields_and_lists_as_json_are_read(table, content, segments):
    (document,) = read_documents(table(content))
    assert document.segments == segments


def test_pandas_index_is_a_column_without_a_name(table):
    (document,) = read_documents(table(",text\n0,A.\n"))
    assert document.not_read == ("column 1",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "text,images\n<image>A.,\"['a.png']\"\n",
            r"a\.csv:2: images: expected JSON, .* found",
        ),
        (
            "text,images\n<image>A.,a.png\n",
            r"a\.csv:2: images: expected a list of media refer",
        ),
        (
            'text,id\n"A\n\nB",1\nC,2,3\n',
            r"a\.csv:5: the row has 3 cells and the header 2\. Put a cell",
        ),
        ("text,id\nA\n", r"a\.csv:2: the row has 1 cells and the header 2"),
        (
            'text,id\nA,1\n"B,2\nC,3\n',
            r"a\.csv:3: cannot be read as CSV: unexpected end of data",
        ),
        ('text\n"A" b\n', r"a\.csv:2: cannot be read as CSV"),
        ("text,text\nA,B\n", r"a\.csv: two columns are named 'text'"),
        ("text;image\nA;b\n", r"a\.csv: the header 'text;image' is one column, and is parted by a semicolon"),
        ("A dish.,x\n", r"a\.csv: there is no row in it"),
        ("text,id\rA,1\r", r"a\.csv:1: cannot be read as CSV: lines end in a carriage return alone\."),
        ("A dish.,x\nA fence.,y\n", r"a\.csv:2: no format fits the fields 'A dish\.', 'x'"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(table, content, message):
    with pytest.raises(DocumentError, match=message):
        list(read_documents(table(content)))


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_tabs_part_the_cells_of_a_tsv(table, name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    content = b"image\tcaption\na.png\tA, b.\n"
    (document,) = read_documents(table(gzip.compress(content) if name.endswith("gz") else content, name))
    assert document.segments == (Image("a.png"), Text("A, b.", trainable=True))


def test_a_folder_of_them_is_read_where_nothing_else_is_data(table, tmp_path):
    (tmp_path / "s").mkdir()
    table("text\nA.\n", "s/a.csv")
    table("text\nB.\n", "s/b.csv")
    (tmp_path / "s" / "README.md").write_text("# A card")
    assert [document.segments[0].text for document in read_documents(tmp_path / "s")] == ["A.", "B."]
    (tmp_path / "s" / "c.jsonl").write_text('{"text": "C."}')
    assert [document.segments[0].text for document in read_documents(tmp_path / "s")] == ["C."]


def test_marks_of_bad_answers_are_seen(table):
    turns = json.dumps([{"from": "gpt", "value": "A."}]).replace('"', '""')
    with pytest.raises(DocumentError, match="label: false marks a bad answer"):
        list(read_documents(table(f'conversations,label\n"{turns}",False\n')))


def test_samples_are_the_same_at_any_number_of_workers(table, tiny_processor):
    path = table("image,caption\n" + "".join(f'a.png,"Part\n{n}."\n' for n in range(20)))
    dataset = CPTDataset(path, tiny_processor, max_length=64, packing=False)
    expected = [dataset[number][0].input_ids.tolist() for number in range(len(dataset))]
    for workers in (2, 8):
        loader = DataLoader(dataset, batch_size=None, num_workers=workers)
        assert [item[0].input_ids.tolist() for item in loader] == expected
    source = opened(path)
    assert pickle.loads(pickle.dumps(source.rows)).row(7) == source.rows.row(7)
    assert source.document(7).source.line == 16


def test_a_reference_without_brackets_is_an_error_that_shows_how_lists_are_written(table):
    path = table("text,images\n<image>A valve.,a.png\n")
    with pytest.raises(DocumentError, match=r'brackets, as JSON has lists: \["a\.png"\]\.$') as caught:
        list(read_documents(path))
    told = re.search(r"\[.*\]", caught.value.reason)[0].replace('"', '""')
    (document,) = read_documents(table(f'text,images\n<image>A valve.,"{told}"\n'))
    assert [image.path for image in document.images] == ["a.png"]
