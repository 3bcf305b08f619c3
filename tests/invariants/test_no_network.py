"""No document makes vlcpt open a connection, whatever its media name or hold."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import av
import pytest

from tests.support import wait_for
from vlcpt import CPTDataset


class Listener:
    """A server that counts who comes."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.visits = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.visits += 1
            connection.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener()
    yield found
    found.socket.close()


CONTENTS = {
    "playlist": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://{host}/a.ts\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile 'http://{host}/a.mp4'\n",
    "session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\n",
    "manifest": '<?xml version="1.0"?><MPD><Period><BaseURL>http://{host}/a.mp4</BaseURL></Period></MPD>',
    "drawing": '<svg xmlns="http://www.w3.org/2000/svg"><image href="http://{host}/a.png"/></svg>',
    "page": '<html><img src="http://{host}/a.png"/></html>',
}
NAMES = (
    *("http://{host}/a", "HTTPS://{host}/a", "ftp://{host}/a", "rtsp://{host}/a", "//{host}/a"),
    *("hls+http://{host}/a", "async:http://{host}/a", "file://{host}/a", "udp://{host}", "tcp://{host}"),
    "subfile,,start,0,end,9,,:http://{host}/a",
)


def rows(folder: Path, listener: Listener) -> list[dict[str, object]]:
    """Each address, and each file that leads to one, as an image and as a video of every kind."""
    place = {"host": f"127.0.0.1:{listener.port}", "port": listener.port}
    references = [name.format(**place) + suffix for name in NAMES for suffix in (".png", ".mp4")]
    for name, content in CONTENTS.items():
        for suffix in (".png", ".svg", ".mp4", ".mov", ".webm", ".mkv", ".avi", ".m3u8", ".sdp"):
            (folder / f"{name}{suffix}").write_text(content.format(**place))
            references.append(f"{name}{suffix}")
    return [
        {"text": f"<{kind}><trainable_text>a</trainable_text>", f"{kind}s": [reference]}
        for reference in references
        for kind in ("image", "video")
    ]


@pytest.mark.parametrize("check", ["header", "container", "pixels"])
def test_no_medium_leads_to_a_connection(tiny_processor, tmp_path, listener, check):
    found = rows(tmp_path, listener)
    good = json.dumps({"text": "a b"}) + "\n"  # a hundred bad ones in a row would stop the reading
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" + good for row in found))
    dataset = CPTDataset(
        tmp_path / "a.jsonl",
        tiny_processor,
        max_length=64,
        on_bad_data="skip",
        max_bad_fraction=1.0,
        media_check=check,
    )
    total = dataset.ledger.total
    assert total.dropped_documents == {"medium": len(found)}
    assert total.documents["used"] == len(found) > 100
    assert listener.visits == 0
    # What the files ask for would have been seen: here it is allowed.
    with suppress(av.error.FFmpegError):
        av.open(str(tmp_path / "playlist.m3u8"), options={"protocol_whitelist": "file,http,tcp"})
    wait_for(lambda: listener.visits)
