"""Fields of a row: the right type, or an error that names the field and what it held."""

import pytest

from vlcpt import DocumentError
from vlcpt.data.rows.fields import id_field, list_field, text_field


def test_fields_of_the_right_type_are_taken():
    row = {"text": "", "images": ["a"], "videos": None, "id": "x"}
    assert text_field(row, "text") == ""
    assert list_field(row, "images") == ["a"]
    assert list_field(row, "videos") == list_field(row, "absent") == []
    assert id_field(row) == "x"
    assert id_field({"id": 0}) == "0"
    assert id_field({"id": ""}) is id_field({"id": None}) is id_field({}) is None


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (text_field, {}, "text: the field is missing. Fields found: none."),
        (text_field, {"Text": "a", "b": 1}, "did you mean 'text' by 'Text'? Fields found: 'Text', 'b'."),
        (text_field, {"text": None}, "expected a string, found NoneType. Put the"),
        (list_field, {"text": "a.png"}, "text: expected a list of media references, found str. Put"),
        (list_field, {"text": {"path": "a"}}, "text: expected a list of media references, found dict."),
        (list_field, {"text": b"x"}, "found bytes."),
        (list_field, {"text": 7}, "found int."),
    ],
)  # fmt: skip
def test_other_types_are_named(read, row, message):
    with pytest.raises(DocumentError) as caught:
        read(row, "text")
    assert message in str(caught.value)
    assert caught.value.field == "text"
