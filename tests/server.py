"""
What the tests of data share: files, tars and pictures whose colour says which they are, what of them is in a
prepared set, and a small web server that answers well and badly.

/png/N is a picture whose colour says N; every other first part of a path names an answer of ANSWERS. A
connection ends after its answer.
"""
import contextlib
import csv
import gzip
import io
import json
import os
import pathlib
import random
import socketserver
import tarfile
import threading
import time
from collections import Counter

from PIL import Image

import prepare_pairs
from prepare_imagenet import Pairs, decode


def encoded(image, kind="PNG", **kwargs):
    data = io.BytesIO()
    image.save(data, kind, **kwargs)
    return data.getvalue()


def picture(n, kind="PNG", size=(48, 40)):
    """A picture of noise whose first pixel is (n % 256, n // 256, 7), in a PNG exactly."""
    image = Image.frombytes("RGB", size, random.Random(n).randbytes(3 * size[0] * size[1]))
    image.putpixel((0, 0), (n % 256, n // 256 % 256, 7))
    return encoded(image, kind)


def number(data):
    r, g, b = decode(data).getpixel((0, 0))
    assert b == 7
    return r + 256 * g


def write(path, data):
    """data: bytes, text, or what JSON is to hold."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode() if isinstance(data, str) else
                json.dumps(data).encode())


def write_parquet(path, rows, names=None):
    """names: of the classes, which the hub keeps in the schema."""
    import pyarrow # here, not above: bench.py is for bare machines, too
    from pyarrow import parquet
    table = pyarrow.Table.from_pylist(rows)
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    os.makedirs(os.path.dirname(path), exist_ok=True)
    parquet.write_table(table, path, row_group_size=2)


def tar_bytes(members):
    """{name: bytes or text}, or such pairs -> a tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in dict(members).items():
            info = tarfile.TarInfo(name)
            data = data.encode() if isinstance(data, str) else data
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def files_of(folder):
    """{name: bytes} of what a prepare script leaves."""
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir() if path.name != "lock"}


def prepare_pairs_of(data, source, data_dir, *words):
    flags = [f"--data={data}", f"--source={source}", f"--data_dir={data_dir}", "--threads=4", *words]
    prepare_pairs.main(prepare_pairs.get_args(flags))


def used(data_dir, data):
    """The lines of used.tsv, also of a run that did not end."""
    folder, name, size = pathlib.Path(data_dir, data), "used.tsv", None
    if not (folder / name).exists():
        name, size = "used.tsv.tmp", json.loads((folder / "begun.json").read_bytes())["used"]
    lines = (folder / name).read_bytes()[:size].decode().splitlines()
    return list(csv.DictReader(lines, delimiter="\t"))


def content(data_dir, name):
    """{split: {number of the picture: its captions}}; each picture is there once."""
    found = {}
    for split in json.loads(pathlib.Path(data_dir, name, "meta.json").read_bytes())["splits"]:
        pairs = Pairs(str(data_dir), name, split)
        numbers = [number(pairs.images[i]) for i in range(len(pairs.images))]
        assert len(set(numbers)) == len(numbers)
        found[split] = {n: [] for n in numbers}
        for j, i in enumerate(pairs.text_to_image):
            found[split][numbers[i]].append(pairs.captions[j])
    return found


def answer(body=b"", status="200 OK", length=None, **headers):
    """Bytes of an HTTP answer; headers: Content_Type="..." and so on."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{k.replace('_', '-')}: {v}" for k, v in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def drip_slowly(data):
    def send(n, seen, connection):
        for i in range(len(data)):
            connection.sendall(data[i:i + 1])
            time.sleep(0.1)
    return send


def endless(n, seen, connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True: # until the other side hangs up
        connection.sendall(bytes(1 << 16))


HTML = b"<!DOCTYPE html><html><body>Sorry, this picture is gone.</body></html>"
BUSY = "429 Too Many Requests"
# name -> what becomes of a row that gets this answer ("" is a pair), and the answer: bytes, or a function of
# (n, how often this path was asked for before, connection), which gives bytes, or None where it sent some
ANSWERS = {
    "png": ("", lambda n, *_: answer(picture(n), Content_Type="image/png")),
    "moved": ("", lambda n, *_: answer(HTML, "302 Found", Location=f"../png/{n}")),
    "busy_once": ("", lambda n, seen, _: answer(picture(n), "200 OK" if seen else BUSY, Retry_After="1")),
    "none": ("http 404", answer(HTML, "404 Not Found")),
    "broken": ("http 500", answer(HTML, "500 Internal Server Error")),
    "busy_for_long": ("http 429", answer(status=BUSY, Retry_After="86400")),
    "loop": ("too many redirects", lambda n, seen, _: answer(
        status="301 Moved Permanently", Location=f"/loop/{n}?{seen}")),
    "to_file": ("not http", answer(status="302 Found", Location="file:///etc/passwd")),
    "to_private": ("private address", answer(status="302 Found", Location="http://169.254.169.254/latest")),
    "opted_out": ("opted out", lambda n, *_: answer(picture(n), X_Robots_Tag="noindex, noai")),
    "reserved": ("opted out", lambda n, *_: answer(picture(n), TDM_Reservation="1")),
    "gzipped": ("not a picture", lambda n, *_: answer(gzip.compress(picture(n)), Content_Encoding="gzip")),
    "half_jpg": ("damaged", lambda n, *_: answer(picture(n, "JPEG", (320, 240))[:30_000])),
    "too_long": ("too many bytes", answer(picture(0), length=10 ** 12)),
    "endless": ("too many bytes", endless),
    "cut": ("broken answer", answer(picture(0)[:90], length=900)),
    "no_http": ("broken answer", b"220 smtp.example.org ready\r\n"),
    "slow": ("too slow", drip_slowly(answer(picture(0)))),
    "slow_head": ("too slow", drip_slowly(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 9999)),
    "silent": ("time-out", lambda *_: time.sleep(3600))}


class Server(socketserver.ThreadingTCPServer):
    """with Server() as server: server.url, "http://127.0.0.1:PORT"; server.asked counts the paths."""
    daemon_threads, block_on_close, request_queue_size = True, False, 512

    def __init__(self, delay=0.0):
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked, self.delay, self.port = Counter(), delay, self.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Answer(socketserver.StreamRequestHandler):
    def handle(self):
        with contextlib.suppress(OSError): # the other side hangs up
            if self.rfile.peek(1)[:1] in (b"", b"\x16"): # nothing, or TLS, of which there is none here
                return
            path = self.rfile.readline().split(b" ")[1].decode()
            while self.rfile.readline().strip():
                pass
            time.sleep(self.server.delay)
            name, _, number = path.partition("?")[0].strip("/").partition("/")
            seen, self.server.asked[path] = self.server.asked[path], self.server.asked[path] + 1
            data = ANSWERS.get(name, ANSWERS["none"])[1]
            if callable(data):
                data = data(int(number) if number.isdigit() else 0, seen, self.connection)
            self.connection.sendall(data or b"")
