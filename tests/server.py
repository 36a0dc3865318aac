"""
A small web server that answers well and badly, for tests/test_download.py.

/png/N is a picture whose colour says N, /jpg/N a JPEG of it, /photo/N a large one; every other first part of
a path names an answer of ANSWERS. A connection ends after its answer.
"""
import contextlib
import functools
import gzip
import io
import random
import socket
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


@functools.cache
def photograph(n):
    return picture(n, "JPEG", (320, 240)) # about 100 kB


def png_claiming(width, height):
    """A PNG of a few bytes whose header claims so many pixels."""
    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\0\0\0") +
            chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))


def answer(body=b"", status="200 OK", length=None, **headers):
    """Bytes of an HTTP answer; headers: Content_Type="..." and so on."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{k.replace('_', '-')}: {v}" for k, v in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunked(body, tail=b"0\r\n\r\n"):
    parts = [body[i:i + 50] for i in range(0, len(body), 50)]
    head = answer().replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + tail


def drip(connection, data):
    for i in range(len(data)):
        connection.sendall(data[i:i + 1])
        time.sleep(0.1)


def endless(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True: # until the other side hangs up
        connection.sendall(bytes(1 << 16))


HTML = b"<!DOCTYPE html><html><body>Sorry, this picture is gone.</body></html>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="99" height="99"><rect width="9" height="9"/></svg>'
WIDE = io.BytesIO() # no JPEG can be so wide
Image.new("P", (65_535, 40)).save(WIDE, "GIF")
# name -> function of (n, how often this path was asked for, connection): bytes, or None if it sent some
ANSWERS = {
    "png": lambda n, seen, c: answer(picture(n), Content_Type="image/png"),
    "jpg": lambda n, seen, c: answer(picture(n, "JPEG"), Content_Type="image/jpeg"),
    "photo": lambda n, seen, c: answer(photograph(n)),
    "wrong_type": lambda n, seen, c: answer(picture(n), Content_Type="text/html"),
    "gzipped": lambda n, seen, c: answer(gzip.compress(picture(n)), Content_Encoding="gzip"),
    "chunked": lambda n, seen, c: chunked(picture(n)),
    "moved": lambda n, seen, c: answer(HTML, "302 Found", Location=f"../png/{n}"),
    "busy_once": lambda n, seen, c: (answer(picture(n)) if seen else
                                     answer(b"", "503 Service Unavailable", Retry_After="1")),
    "busy_until": lambda n, seen, c: (answer(picture(n)) if seen else answer(
        b"", "429 Too Many Requests", Retry_After=formatdate(time.time() + 2, usegmt=True))),
    "reset_once": lambda n, seen, c: answer(picture(n)) if seen else b"",
    "cut_once": lambda n, seen, c: answer(picture(n)) if seen else answer(picture(n)[:90], length=900),
    "none": lambda n, seen, c: answer(HTML, "404 Not Found"),
    "gone": lambda n, seen, c: answer(HTML, "410 Gone"),
    "forbidden": lambda n, seen, c: answer(HTML, "403 Forbidden"),
    "broken": lambda n, seen, c: answer(HTML, "500 Internal Server Error"),
    "busy": lambda n, seen, c: answer(b"", "429 Too Many Requests"),
    "busy_for_long": lambda n, seen, c: answer(b"", "429 Too Many Requests", Retry_After="86400"),
    "no_content": lambda n, seen, c: answer(b"", "204 No Content"),
    "empty": lambda n, seen, c: answer(b"", Content_Type="image/jpeg"),
    "loop": lambda n, seen, c: answer(b"", "301 Moved Permanently", Location=f"/loop/{n}?{seen}"),
    "nowhere": lambda n, seen, c: answer(b"", "302 Found"),
    "to_file": lambda n, seen, c: answer(b"", "302 Found", Location="file:///etc/passwd"),
    "to_ftp": lambda n, seen, c: answer(b"", "302 Found", Location="ftp://example.org/a.png"),
    "to_private": lambda n, seen, c: answer(b"", "302 Found", Location="http://169.254.169.254/latest"),
    "to_nonsense": lambda n, seen, c: answer(b"", "302 Found", Location="http://[::1"),
    "opted_out": lambda n, seen, c: answer(picture(n), X_Robots_Tag="noindex, noai"),
    "reserved": lambda n, seen, c: answer(picture(n), TDM_Reservation="1"),
    "other_robot": lambda n, seen, c: answer(picture(n), X_Robots_Tag="otherbot: noai"),
    "html": lambda n, seen, c: answer(HTML, Content_Type="image/jpeg"),
    "pixel": lambda n, seen, c: answer(picture(n, "GIF", (1, 1)), Content_Type="image/gif"),
    "bomb": lambda n, seen, c: answer(png_claiming(30_000, 30_000)),
    "wide": lambda n, seen, c: answer(WIDE.getvalue()),
    "robots_404": lambda n, seen, c: answer(HTML, "404 Not Found", X_Robots_Tag="noindex"),
    "half_jpg": lambda n, seen, c: answer(photograph(n)[:30_000]),
    "too_long": lambda n, seen, c: answer(picture(n), length=10 ** 12),
    "cut": lambda n, seen, c: answer(picture(n)[:90], length=900),
    "bad_chunks": lambda n, seen, c: chunked(picture(n), b"zz\r\nxx"),
    "no_http": lambda n, seen, c: b"220 smtp.example.org ready\r\n",
    "hang_up": lambda n, seen, c: b"",
    "bad_length": lambda n, seen, c: answer(picture(n), length="many"),
    "more_than_said": lambda n, seen, c: answer(picture(n)) + answer(picture(n + 1)),
    "endless": lambda n, seen, c: endless(c),
    "slow": lambda n, seen, c: drip(c, answer(picture(n))),
    "slow_head": lambda n, seen, c: drip(c, b"HTTP/1.1 200 OK\r\nX: " + b"x" * 9999),
    "silent": lambda n, seen, c: time.sleep(3600)}


class Server:
    """with Server() as server: server.url, "http://127.0.0.1:PORT"; server.asked counts the paths."""

    def __init__(self, delay=0.0):
        self.asked, self.delay = Counter(), delay

    def __enter__(self):
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.socket.shutdown(socket.SHUT_RDWR) # wakes accept()
        self.socket.close()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.answer, args=self.socket.accept()[:1], daemon=True).start()

    def answer(self, connection):
        with connection, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                part = connection.recv(1 << 16)
                if not part or part[:1] == b"\x16": # TLS, of which there is none here
                    return
                head += part
            path = head.split(b" ", 2)[1].decode()
            time.sleep(self.delay)
            name, _, number = path.partition("?")[0].strip("/").partition("/")
            seen, self.asked[path] = self.asked[path], self.asked[path] + 1
            make = ANSWERS.get(name, ANSWERS["none"])
            data = make(int(number) if number.isdigit() else 0, seen, connection)
            connection.sendall(data or b"")
