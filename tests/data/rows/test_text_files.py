"""Rows of JSON and text files by number: byte offsets and line numbers."""

import numpy as np
import orjson
import pytest

from tests.support import opened
from vlcpt import DocumentError
from vlcpt.data.rows import text_files
from vlcpt.data.rows.text_files import JsonRows, TextRows

BOM = b"\xef\xbb\xbf"


def jsonl(tmp_path, content: bytes) -> JsonRows:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    return JsonRows(path)


def lines_of(rows) -> list[tuple[int, object]]:
    return [(rows.source(number).line, rows.row(number)) for number in range(len(rows))]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"a": 1}\n{"a": 2}\n', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'{"a": 1}\n{"a": 2}', [(1, {"a": 1}), (2, {"a": 2})]),  # no newline at the end
        (b'{"a": 1}\r\n{"a": 2}\r\n', [(1, {"a": 1}), (2, {"a": 2})]),
        (BOM + b'{"a": 1}\n{"a": 2}\n', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'\n\n{"a": 1}\n\r\n \t \n{"a": 2}\n\n\n', [(3, {"a": 1}), (6, {"a": 2})]),  # blank lines count
        (BOM + b'\n{"a": 1}', [(2, {"a": 1})]),
        (BOM + b'\r\n{"a": 1}', [(2, {"a": 1})]),
        (b'{"a": 1}\n{}', [(1, {"a": 1}), (2, {})]),
        (b"{}", [(1, {})]),
        (b'{"a": "\\n"}\n{"a": "\xe4\xb8\xad"}\n', [(1, {"a": "\n"}), (2, {"a": "中"})]),
        ('{"a": "\u2028\x85"}\n'.encode(), [(1, {"a": "\u2028\x85"})]),  # lines end with \n alone
        (b"", []),
        (b"\n\r\n", []),
        (BOM, []),
    ],
)
def test_every_line_of_jsonl_is_found_with_its_number(tmp_path, content, found):
    assert lines_of(jsonl(tmp_path, content)) == found


def test_rows_are_read_in_any_order_and_over_the_edges_of_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_CHUNK", 7)
    rows = jsonl(tmp_path, b"".join(orjson.dumps({"n": n, "pad": "x" * (n % 11)}) + b"\n" for n in range(50)))
    order = np.random.default_rng(0).permutation(50).tolist()
    assert [rows.row(number)["n"] for number in order] == order


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'a': 1}", "not JSON: "),
        (b'{"a": 1} {"a": 2}', "not JSON: "),
        (b'{"a": NaN}', "not JSON: "),
        (b"[1, 2]", r"expected an object in {}, found list\."),
        (b'"text"', r"expected an object in {}, found str\."),
        (b"null", r"expected an object in {}, found NoneType\."),
    ],
)
def test_a_line_that_is_no_object_is_an_error(tmp_path, line, message):
    rows = jsonl(tmp_path, b"{}\n" + line + b"\n{}\n")
    assert rows.row(2) == {}
    with pytest.raises(DocumentError, match=message) as caught:
        rows.row(1)
    assert caught.value.kind == "json"


def test_text_files_are_a_row_each_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.md").write_text("# one", encoding="utf-8")
    (tmp_path / "a.TXT").write_bytes(BOM + b"zwei\r\n")
    (tmp_path / "c.html").write_text("no")
    rows = opened(tmp_path).rows
    assert [str(rows.source(number)) for number in range(len(rows))] == [
        f"{tmp_path}/a.TXT:1",
        f"{tmp_path}/b/1.md:1",
    ]
    assert rows.row(0)["text"].rstrip() == "zwei"
    assert rows.row(1) == {"text": "# one"}


def test_a_text_file_that_is_not_utf_8_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(
        DocumentError, match=r"byte 3 is not UTF-8, it looks like ISO-8859-1: convert to UTF-8"
    ):
        TextRows(tmp_path, [tmp_path / "a.txt"]).row(0)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b'[{"a": 1}, {"a": "]"}]', [{"a": 1}, {"a": "]"}]),
        (BOM + b' [\n{"a": "\\"[,"} \t,\r\n {"a": [1, {}]}\n]\n', [{"a": '"[,'}, {"a": [1, {}]}]),
        ('[{"a": "中\U0001f600"}, {"阀": 1}, {"a": "é"}]'.encode(), [{"a": "中😀"}, {"阀": 1}, {"a": "é"}]),
        (b"[]", []),
        (b" [ ] ", []),
    ],
)
def test_every_entry_of_a_json_list_is_found_with_its_number(tmp_path, content, rows):
    (tmp_path / "a.json").write_bytes(content)
    assert lines_of(JsonRows(tmp_path / "a.json")) == [*enumerate(rows, 1)]


@pytest.mark.parametrize("content", [b"[{}", b"[{},]", b"[{} {}]", b"[{}] x", b"[{}]]", b"[,]", b"[{", b""])
def test_a_list_that_is_not_json_is_an_error_of_the_file(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DocumentError, match=r"a\.json: not JSON: "):
        JsonRows(tmp_path / "a.json")


def test_a_key_that_stands_twice_is_an_error_of_its_row(tmp_path):
    (tmp_path / "a.json").write_bytes(
        b'[{"a": 1, "a" : 2}, {"a": {"b": 1, "b": 2}}, {"a": "\\"b\\": b\\":"}]'
    )
    rows = JsonRows(tmp_path / "a.json")
    for number, key in enumerate("ab"):
        with pytest.raises(DocumentError, match=f"the key '{key}' stands twice in one object"):
            rows.row(number)
    assert rows.row(2) == {"a": '"b": b":'}
