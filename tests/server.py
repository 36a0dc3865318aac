"""
A small web server that answers well and badly, for tests/test_download.py and tests/bench.py.

    python tests/server.py 8000 [number of photographs to draw first]  # a process of its own;
                                                                       # prints its address

/png/N is a picture whose colour says N, /jpg/N a JPEG of it, /photo/N a large one; every other first part of
a path names an answer of ANSWERS. Connections stay open unless an answer ends them.
"""
import asyncio
import functools
import gzip
import io
import random
import sys
import threading
import time
import zlib
from collections import Counter
from email.utils import formatdate

from PIL import Image


def picture(n, kind="PNG", size=(48, 40)):
    """A picture of noise whose first pixel is (n % 256, n // 256, 7), in a PNG exactly."""
    image = Image.frombytes("RGB", size, random.Random(n).randbytes(3 * size[0] * size[1]))
    image.putpixel((0, 0), (n % 256, n // 256 % 256, 7))
    data = io.BytesIO()
    image.save(data, kind, quality=95)
    return data.getvalue()


@functools.lru_cache(None)
def photograph(n, size=(640, 480)):
    """About 100 kB of JPEG: noise of several scales."""
    rng, image = random.Random(n), Image.new("RGB", size)
    for scale, weight in ((40, 1.0), (8, 0.4), (2, 0.12)):
        small = [-(-s // scale) for s in size]
        noise = Image.frombytes("RGB", small, rng.randbytes(3 * small[0] * small[1]))
        image = Image.blend(image, noise.resize(size, Image.BICUBIC), weight)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90)
    return data.getvalue()


def png_claiming(width, height):
    """A PNG of a few bytes whose header claims so many pixels."""
    chunk = lambda kind, body: (len(body).to_bytes(4, "big") + kind + body +
                                zlib.crc32(kind + body).to_bytes(4, "big"))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") +
                                         b"\x08\x02\0\0\0") +
            chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))


def answer(body=b"", status="200 OK", length=None, **headers):
    """Bytes of an HTTP answer; headers: Content_Type="..." and so on."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{k.replace('_', '-')}: {v}" for k, v in headers.items() if v is not None]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunked(body, tail=b"0\r\n\r\n", **headers):
    head = answer(**headers).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part)
                           for part in (body[i:i + 50] for i in range(0, len(body), 50))) + tail


async def drip(transport, data, pause):
    for i in range(len(data)):
        transport.write(data[i:i + 1])
        await asyncio.sleep(pause)


async def endless(transport, head):
    transport.write(head)
    while not transport.is_closing():
        if transport.get_write_buffer_size() < 1 << 20:
            transport.write(bytes(1 << 16))
        await asyncio.sleep(0)


HTML = b"<!DOCTYPE html><html><body>Sorry, this picture is gone.</body></html>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="99" height="99"><rect width="9" height="9"/></svg>'
WIDE = io.BytesIO() # no JPEG can be so wide
Image.new("P", (65_535, 40)).save(WIDE, "GIF")
WIDE = WIDE.getvalue()
# name -> function of (n, how often this path was asked for before, transport): bytes, or a coroutine that
# writes them, after which the connection ends; it also ends after those of ENDING
ANSWERS = {
    "png": lambda n, seen, w: answer(picture(n), Content_Type="image/png"),
    "jpg": lambda n, seen, w: answer(picture(n, "JPEG"), Content_Type="image/jpeg"),
    "webp": lambda n, seen, w: answer(picture(n, "WEBP")),
    "photo": lambda n, seen, w: answer(photograph(n)),
    "wrong_type": lambda n, seen, w: answer(picture(n), Content_Type="text/html"),
    "gzipped": lambda n, seen, w: answer(gzip.compress(picture(n)), Content_Encoding="gzip"),
    "chunked": lambda n, seen, w: chunked(picture(n)),
    "moved": lambda n, seen, w: answer(HTML, "302 Found", Location=f"../png/{n}"),
    "busy_once": lambda n, seen, w: (answer(picture(n)) if seen else
                                         answer(b"", "503 Service Unavailable", Retry_After="1")),
    "busy_until": lambda n, seen, w: (answer(picture(n)) if seen else answer(
        b"", "429 Too Many Requests", Retry_After=formatdate(time.time() + 2, usegmt=True))),
    "reset_once": lambda n, seen, w: answer(picture(n)) if seen else b"",
    "cut_once": lambda n, seen, w: answer(picture(n)) if seen else answer(picture(n)[:90], length=900),
    "none": lambda n, seen, w: answer(HTML, "404 Not Found"),
    "gone": lambda n, seen, w: answer(HTML, "410 Gone"),
    "forbidden": lambda n, seen, w: answer(HTML, "403 Forbidden"),
    "broken": lambda n, seen, w: answer(HTML, "500 Internal Server Error"),
    "busy": lambda n, seen, w: answer(b"", "429 Too Many Requests"),
    "busy_for_long": lambda n, seen, w: answer(b"", "429 Too Many Requests", Retry_After="86400"),
    "no_content": lambda n, seen, w: answer(b"", "204 No Content"),
    "empty": lambda n, seen, w: answer(b"", Content_Type="image/jpeg"),
    "loop": lambda n, seen, w: answer(b"", "301 Moved Permanently", Location=f"/loop/{n}?{seen}"),
    "nowhere": lambda n, seen, w: answer(b"", "302 Found"),
    "to_file": lambda n, seen, w: answer(b"", "302 Found", Location="file:///etc/passwd"),
    "to_ftp": lambda n, seen, w: answer(b"", "302 Found", Location="ftp://example.org/a.png"),
    "to_private": lambda n, seen, w: answer(b"", "302 Found", Location="http://169.254.169.254/latest"),
    "to_nonsense": lambda n, seen, w: answer(b"", "302 Found", Location="http://[::1"),
    "opted_out": lambda n, seen, w: answer(picture(n), X_Robots_Tag="noindex, noai"),
    "reserved": lambda n, seen, w: answer(picture(n), TDM_Reservation="1"),
    "other_robot": lambda n, seen, w: answer(picture(n), X_Robots_Tag="otherbot: noai"),
    "html": lambda n, seen, w: answer(HTML, Content_Type="image/jpeg"),
    "svg": lambda n, seen, w: answer(SVG, Content_Type="image/svg+xml"),
    "pixel": lambda n, seen, w: answer(picture(n, "GIF", (1, 1)), Content_Type="image/gif"),
    "strip": lambda n, seen, w: answer(picture(n, "PNG", (3000, 9))),
    "bomb": lambda n, seen, w: answer(png_claiming(30_000, 30_000)),
    "large": lambda n, seen, w: answer(png_claiming(9_000, 9_000)),
    "scans": lambda n, seen, w: answer(photograph(n)[:-2] + b"\xff\xda\0\x08" * 200 + b"\xff\xd9"),
    "wide": lambda n, seen, w: answer(WIDE),
    "robots_404": lambda n, seen, w: answer(HTML, "404 Not Found", X_Robots_Tag="noindex"),
    "half_jpg": lambda n, seen, w: answer(photograph(n)[:30_000]),
    "half_png": lambda n, seen, w: answer(picture(n)[:2000]),
    "zeros": lambda n, seen, w: answer(photograph(n)[:30_000] + bytes(30_000)),
    "noise": lambda n, seen, w: answer(b"\x89PNG\r\n\x1a\n" + random.Random(n).randbytes(500)),
    "placeholder": lambda n, seen, w: answer(picture(9999, "GIF")),
    "too_long": lambda n, seen, w: answer(picture(n), length=10 ** 12),
    "gzip_bomb": lambda n, seen, w: answer(BOMB, Content_Encoding="gzip"),
    "not_gzip": lambda n, seen, w: answer(picture(n), Content_Encoding="gzip"),
    "brotli": lambda n, seen, w: answer(picture(n), Content_Encoding="br"),
    "cut": lambda n, seen, w: answer(picture(n)[:90], length=900),
    "bad_chunks": lambda n, seen, w: chunked(picture(n), b"zz\r\nxx"),
    "no_http": lambda n, seen, w: b"220 smtp.example.org ready\r\n",
    "hang_up": lambda n, seen, w: b"",
    "bad_length": lambda n, seen, w: answer(picture(n), length="many"),
    "more_than_said": lambda n, seen, w: answer(picture(n)) + answer(picture(n + 1)),
    "endless": lambda n, seen, w: endless(w, b"HTTP/1.1 200 OK\r\n\r\n"),
    "slow": lambda n, seen, w: drip(w, answer(picture(n)), 0.1),
    "slow_head": lambda n, seen, w: drip(w, b"HTTP/1.1 200 OK\r\nX: " + b"x" * 9999, 0.1),
    "silent": lambda n, seen, w: asyncio.sleep(3600),
}
ENDING = {"cut", "cut_once", "bad_chunks", "no_http", "hang_up", "reset_once", "too_long", "bad_length"}
BOMB = gzip.compress(bytes(200_000_000), 9)


class Connection(asyncio.Protocol):
    """One connection to a Server. Bare, since it shares the cores with what is measured."""

    def __init__(self, server):
        self.server, self.received, self.task = server, b"", None

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, error):
        if self.task:
            self.task.cancel()

    def data_received(self, data):
        self.received += data
        if self.received[:1] == b"\x16": # TLS, of which there is none here
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            return self.transport.close()
        while b"\r\n\r\n" in self.received:
            head, _, self.received = self.received.partition(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode()
            if self.server.delay:
                asyncio.get_running_loop().call_later(self.server.delay, self.answer, path)
            else:
                self.answer(path)

    def answer(self, path):
        asked, (name, _, number) = self.server.asked, path.strip("/").partition("/")
        seen, asked[path] = asked[path], asked[path] + 1
        number = number.partition("?")[0]
        make = ANSWERS.get(name, ANSWERS["none"])
        data = make(int(number) if number.isdigit() else 0, seen, self.transport)
        if not isinstance(data, bytes):
            self.task = asyncio.ensure_future(self.finish(data))
            return
        self.transport.write(data)
        if name in ENDING and not (name.endswith("_once") and seen):
            self.transport.close()

    async def finish(self, coroutine):
        await coroutine
        self.transport.close()


class Server:
    """with Server() as server: server.url, "http://127.0.0.1:PORT"; server.asked counts the paths."""

    def __init__(self, port=0, delay=0.0):
        self.asked, self.port, self.delay = Counter(), port, delay

    async def serve(self, ready=None):
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        server = await self.loop.create_server(lambda: Connection(self), "127.0.0.1", self.port, backlog=4096)
        self.port = server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        if ready:
            ready.set()
        else:
            print(self.url, flush=True)
        await self.stop.wait()
        server.close()

    def __enter__(self):
        ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve(ready)), daemon=True)
        self.thread.start()
        ready.wait()
        return self

    def __exit__(self, *error):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()


if __name__ == "__main__":
    for n in range(int(sys.argv[2]) if len(sys.argv) > 2 else 0):
        photograph(n)
    asyncio.run(Server(int(sys.argv[1])).serve())
