"""WebDataset tars: members of a key make a row, whatever schema it has."""

import json
import tarfile
from io import BytesIO

import pytest

from tests.support import opened
from vlcpt import DocumentError, Image, Text, Video
from vlcpt.data.media.open import MediaError, image_size


@pytest.fixture
def tar(tmp_path):
    def write(**members):
        return write_all(members.items())

    def write_all(members):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, BytesIO(data))
        return opened(tmp_path / "a.tar")

    write.all = write_all
    return write


def caption(text):
    return Text(text, trainable=True)


def test_an_image_and_a_text_are_a_caption(tar):
    source = tar.all([("1.jpg", b"x"), ("1.txt", b"A cat."), ("2.txt", b"A dog."), ("2.jpg", b"y")])

    assert [source.document(number).segments for number in range(2)] == [
        (Image("1.jpg", b"x"), caption("A cat.")),
        (Image("2.jpg", b"y"), caption("A dog.")),
    ]
    assert [source.document(number).id for number in range(2)] == ["1", "2"]


def test_img2datasets_shards_have_the_caption_twice(tar):
    fields = json.dumps(
        {"caption": "A cat.", "url": "http://a.org", "key": "1", "status": "success"}
    ).encode()
    source = tar.all([("1.jpg", b"x"), ("1.json", fields), ("1.txt", b"A cat.")])
    assert source.document(0).segments == (Image("1.jpg", b"x"), caption("A cat."))


def test_several_media_of_a_row_keep_the_archives_order(tar):
    source = tar.all([("a/1.0.jpg", b"x"), ("a/1.1.PNG", b"y"), ("a/1.mp4", b"z"), ("a/1.txt", b"All.")])
    assert source.document(0).segments == (
        Image("a/1.0.jpg", b"x"),
        Image("a/1.1.PNG", b"y"),
        Video("a/1.mp4", b"z"),
        caption("All."),
    )


@pytest.mark.parametrize("named", [["1.b.png", "1.a.png"], ["b.png", "a.png"], ["d/1.b.png", "d/1.a.png"]])
def test_a_json_names_members_by_path_name_or_suffix(tar, named):
    fields = {"text": "<IMG1> is not <IMG2>", "images": named}
    source = tar.all([("d/1.a.png", b"a"), ("d/1.b.png", b"b"), ("d/1.json", json.dumps(fields).encode())])
    assert [image.data for image in source.document(0).images] == [b"b", b"a"]


def test_folders_links_hidden_files_and_other_members_are_no_rows(tar, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        link = tarfile.TarInfo("d/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(folder)
        archive.addfile(link)
        for name, data in [
            ("d/._1.jpg", b"?"),
            ("README", b"?"),
            ("1.jpg", b"x"),
            ("1.cls", b"3"),
            ("1.txt", b"A."),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
    source = opened(tmp_path / "a.tar")

    assert len(source) == 1
    assert source.document(0).segments == (Image("1.jpg", b"x"), caption("A."))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("2.txt", b"alone")], "a.tar:2: id 2: image: expected an image or a video."),
        ([("2.jpg", b"x"), ("2.txt", b"\xff")], "a.tar:2: txt: byte 0 is not UTF-8"),
        ([("2.jpg", b"x"), ("2.json", b"[1]")], "a.tar:2: expected an object in {}, found list."),
        ([("2.jpg", b"x")], "a.tar:2: id 2: caption: the field is missing."),
        (
            [("2.jpg", b"x"), ("2.json", b'{"caption": "a", "image": "/etc/passwd"}')],
            """a.tar:2: id 2: image: names "/etc/passwd", but the row's files are 2.jpg.""",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_said(tar, members, message):
    source = tar.all([("1.jpg", b"x"), ("1.txt", b"A cat."), *members])
    with pytest.raises(DocumentError) as caught:
        source.document(1)
    assert message in str(caught.value)


PART = {"type": "image", "image": "NAME"}
ASKED = {"role": "user", "content": [PART, {"type": "text", "text": "What?"}]}
NAMING = {
    "vlcpt": {"text": "<image>a", "images": ["NAME"]},
    "segments": {"segments": [PART, {"type": "text", "text": "a", "trainable": True}]},
    "sharegpt": {"conversations": [{"from": "gpt", "value": "a"}], "image": {"path": "NAME", "bytes": None}},
    "messages": {"messages": [ASKED, {"role": "assistant", "content": "a"}]},
    "messages by url": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "NAME"}}]},
            {"role": "assistant", "content": "a"},
        ]
    },
    "obelics": {"images": ["NAME", None], "texts": [None, "a"]},
    "mmc4": {"text_list": ["a"], "image_info": [{"image_name": "NAME", "matched_text_index": 0}]},
    "mmc4 by url": {
        "text_list": ["a"],
        "image_info": [{"raw_url": "http://example.org/NAME?w=9", "matched_text_index": 0}],
    },
    "caption": {"image": "NAME", "caption": "a"},
}


def naming(form, name):
    return json.dumps(NAMING[form]).replace("NAME", name).encode()


@pytest.mark.parametrize("form", NAMING)
@pytest.mark.parametrize(
    ("member", "name"),
    [
        ("1.jpg", "1.jpg"),
        ("1.jpg", "./1.jpg"),
        ("1.o1.jpg", "o1.jpg"),
        ("1.o1.jpg", "1.o1.jpg"),
        ("d/e/1.o1.jpg", "d/e/1.o1.jpg"),
        ("d/e/1.o1.jpg", "e/1.o1.jpg"),
        ("d/e/1.o1.jpg", "o1.jpg"),
    ],
)
def test_a_row_of_any_format_finds_the_file_of_its_key(tar, form, member, name):
    if form == "mmc4 by url":  # a URL's last part
        name = name.rpartition("/")[2]
    key = member.partition(".")[0]
    source = tar.all([(member, b"x"), (f"{key}.json", naming(form, name))])

    document = source.document(0)
    assert document.images == (Image(member, b"x"),)
    assert document.not_read == ()


@pytest.mark.parametrize("form", NAMING)
def test_a_name_of_no_file_of_the_key_is_a_missing_medium_though_a_file_outside_has_it(tar, tmp_path, form):
    (tmp_path / "a.jpg").write_bytes(b"outside")
    members = [
        ("1.json", naming(form, "a.jpg")),
        ("2.a.jpg", b"of another key"),
        ("2.json", naming(form, "a.jpg")),
    ]
    source = tar.all(members)
    with pytest.raises(DocumentError, match=r'names ".*a\.jpg.*, but the row\'s files are none') as caught:
        source.document(0)
    assert caught.value.kind == "medium"


def test_files_of_a_key_and_members_that_are_not_read_are_named(tar):
    row = {"messages": [ASKED, {"role": "assistant", "content": "a"}], "images": []}
    text = json.dumps(row).replace("NAME", "1.a.jpg").encode()
    source = tar.all([("1.a.jpg", b"a"), ("1.b.jpg", b"b"), ("1.cls", b"3"), ("1.json", text)])
    with pytest.raises(DocumentError, match="there are 0 <image> markers but the row lists 1 image"):
        source.document(0)

    text = json.dumps({"text": "<image>a", "images": ["a.jpg"]}).encode()
    source = tar.all([("1.a.jpg", b"a"), ("1.b.jpg", b"b"), ("1.cls", b"3"), ("1.json", text)])
    assert source.document(0).not_read == (".cls", "files of a tar that their row does not name")


def test_a_picture_that_cannot_be_decoded_here_is_a_medium_of_its_row_all_the_same(tar):
    source = tar.all([("1.heic", b"x"), ("1.txt", b"A.")])
    assert source.document(0).images == (Image("1.heic", b"x"),)


def test_a_text_with_spans_takes_the_one_file_of_its_key(tar):
    text = json.dumps({"text": "<image><trainable_text>a</trainable_text>"}).encode()
    source = tar.all([("1.jpg", b"x"), ("1.json", text)])
    assert source.document(0).segments == (Image("1.jpg", b"x"), caption("a"))


@pytest.mark.parametrize("name", ["a.heic", "a.AVIF"])
def test_heic_and_avif_of_a_tar_are_its_pictures_so_that_reading_one_says_what_it_is(tar, name):
    source = tar.all([(name, b"\0\0\0\x14ftypheic\0\0\0\0mif1"), ("a.json", b'{"text": "A valve."}')])
    (picture,) = source.document(0).images
    with pytest.raises(MediaError, match=f"^{name} is a HEIC picture, which is not read"):
        image_size(picture, media_root=None)
