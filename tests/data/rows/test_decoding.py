"""Text that is not UTF-8 names what it looks like and the command that converts it, wherever it stands."""

import json
import subprocess
import tarfile
from io import BytesIO

import pytest

from tests.support import png
from vlcpt import DocumentError, read_documents
from vlcpt.data.rows.decoding import looks_like

CHINESE = "图一所示为一个关闭的阀门, 它安装在泵的出口处。"
TEXTS = {
    "GBK": (CHINESE, "gbk"),
    "BIG5": ("圖一所示為一個關閉的閥門, 它安裝在泵的出口處。", "big5"),
    "SHIFT_JIS": ("図1はポンプの出口に取り付けられた閉じたバルブを示しています。", "shift_jis"),
    "EUC-JP": ("図1はポンプの出口に取り付けられた閉じたバルブを示しています。", "euc_jp"),
    "EUC-KR": ("그림 하나는 펌프의 출구에 설치된 닫힌 밸브를 보여 줍니다. 밸브는 안전합니다.", "euc_kr"),
    "ISO-8859-1": ("La première figure montre une vanne fermée à la sortie de la pompe.", "latin-1"),
    "WINDOWS-1252": ("La “première” figure montre une vanne fermée à la sortie.", "cp1252"),
    "UTF-16": (CHINESE, "utf-16"),
    "UTF-16LE": ("Figure 1 shows a valve.", "utf-16-le"),
    "UTF-16BE": (CHINESE, "utf-16-be"),
}


def write_tar(path, name, data):
    with tarfile.open(path, "w") as archive:
        for member, content in (("0.jpg", png(0)), (f"0.{name}", data)):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))


def written(folder, kind, text, encoding):
    """A file of this kind, with the text in it."""
    row = {"text": text, "id": "x"}
    content = {
        "jsonl": json.dumps({"text": "plain"}) + "\n" + json.dumps(row, ensure_ascii=False) + "\n",
        "json": json.dumps([row], ensure_ascii=False, indent=1),
        "csv": f"id,text\n0,plain\n1,{text.replace(',', ' ')}\n",
        "txt": text,
        "tar.txt": text,
        "tar.json": json.dumps({"caption": text}, ensure_ascii=False),
    }[kind]
    path = folder / ("a." + kind.partition(".")[0])
    data = content.encode(encoding)
    if kind.startswith("tar"):
        write_tar(path, kind.partition(".")[2], data)
    else:
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt", "tar.txt", "tar.json"])
@pytest.mark.parametrize("name", TEXTS)
def test_another_encoding_is_named_with_the_command_that_converts_it(tmp_path, kind, name):
    path = written(tmp_path, kind, *TEXTS[name])
    with pytest.raises(DocumentError) as caught:
        list(read_documents(path, format="caption" if "tar" in kind else "auto"))
    message = str(caught.value)
    assert f"looks like {name}: convert to UTF-8, " in message
    assert f"iconv -f {name} -t UTF-8 " in message
    assert caught.value.kind == "encoding"
    assert str(path) in message


@pytest.mark.parametrize("name", TEXTS)
def test_the_command_converts_it(tmp_path, name):
    text, encoding = TEXTS[name]
    path = written(tmp_path, "txt", text, encoding)
    with pytest.raises(DocumentError) as caught:
        list(read_documents(path))
    command = str(caught.value).partition("convert to UTF-8, ")[2].rstrip(".")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    (document,) = read_documents(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]  # one beside it would be read again
    assert document.segments[0].text == text


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt", "tar.txt", "tar.json"])
def test_utf_8_with_a_mark_is_read(tmp_path, kind):
    path = written(tmp_path, kind, CHINESE.replace(",", " "), "utf-8-sig")
    found = [document.segments[-1].text for document in read_documents(path)]
    assert found[-1] == CHINESE.replace(",", " ")


@pytest.mark.parametrize("text", ["描述文本1", "阀门", "第一步：打开阀门。"])
def test_a_few_chinese_characters_are_enough(text):
    assert looks_like(text.encode("gbk")) == "GBK"


@pytest.mark.parametrize("data", [b"", b"plain", b"\xff\xff\xff\xff", b"\0" * 40])
def test_what_looks_like_nothing_is_not_named(data):
    assert looks_like(data) is None


def test_one_bad_row_does_not_stop_those_before_it(tmp_path):
    path = written(tmp_path, "jsonl", *TEXTS["GBK"])
    found = read_documents(path)
    assert next(found).segments[0].text == "plain"
    with pytest.raises(DocumentError, match=rf"{path}:2: byte 14 is not UTF-8, it looks like GBK"):
        next(found)
