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


def answer(body=b"", status="200 OK", length=None, **headers):
    """Bytes of an HTTP answer; headers: Content_Type="..." and so on."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{k.replace('_', '-')}: {v}" for k, v in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunked(body, tail=b"0\r\n\r\n"):
    parts = [body[i:i + 50] for i in range(0, len(body), 50)]
    head = answer().replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + tail


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


def busy_until(n, seen, connection):
    if seen:
        return answer(picture(n))
    return answer(status="429 Too Many Requests", Retry_After=formatdate(time.time() + 2, usegmt=True))


HTML = b"<!DOCTYPE html><html><body>Sorry, this picture is gone.</body></html>"
# name -> what becomes of a row that gets this answer ("" is a pair), and the answer: bytes, or a function of
# (n, how often this path was asked for before, connection), which gives bytes, or None where it sent some
ANSWERS = {
    "png": ("", lambda n, *_: answer(picture(n), Content_Type="image/png")),
    "jpg": ("", lambda n, *_: answer(picture(n, "JPEG"), Content_Type="image/jpeg")),
    "photo": ("", lambda n, *_: answer(photograph(n))),
    "wrong_type": ("", lambda n, *_: answer(picture(n), Content_Type="text/html")),
    "chunked": ("", lambda n, *_: chunked(picture(n))),
    "moved": ("", lambda n, *_: answer(HTML, "302 Found", Location=f"../png/{n}")),
    "other_robot": ("", lambda n, *_: answer(picture(n), X_Robots_Tag="otherbot: noai")),
    "more_than_said": ("", lambda n, *_: answer(picture(n)) + answer(picture(n + 1))),
    # these come right when they are asked again
    "busy_once": ("", lambda n, seen, _: answer(picture(n)) if seen else answer(
        status="503 Service Unavailable", Retry_After="1")),
    "busy_until": ("", busy_until),
    "reset_once": ("", lambda n, seen, _: answer(picture(n)) if seen else b""),
    "cut_once": ("", lambda n, seen, _: answer(picture(n)) if seen else answer(picture(n)[:90], length=900)),
    "none": ("http 404", answer(HTML, "404 Not Found")),
    "robots_404": ("http 404", answer(HTML, "404 Not Found", X_Robots_Tag="noindex")),
    "broken": ("http 500", answer(HTML, "500 Internal Server Error")),
    "busy": ("http 429", answer(status="429 Too Many Requests")),
    "busy_for_long": ("http 429", answer(status="429 Too Many Requests", Retry_After="86400")),
    "no_content": ("http 204", answer(status="204 No Content")),
    "nowhere": ("http 302", answer(status="302 Found")),
    "loop": ("too many redirects", lambda n, seen, _: answer(
        status="301 Moved Permanently", Location=f"/loop/{n}?{seen}")),
    "to_file": ("not http", answer(status="302 Found", Location="file:///etc/passwd")),
    "to_private": ("private address", answer(status="302 Found", Location="http://169.254.169.254/latest")),
    "to_nonsense": ("broken answer", answer(status="302 Found", Location="http://[::1")),
    "opted_out": ("opted out", lambda n, *_: answer(picture(n), X_Robots_Tag="noindex, noai")),
    "reserved": ("opted out", lambda n, *_: answer(picture(n), TDM_Reservation="1")),
    "empty": ("empty", answer(Content_Type="image/jpeg")),
    "html": ("not a picture", answer(HTML, Content_Type="image/jpeg")),
    "gzipped": ("not a picture", lambda n, *_: answer(gzip.compress(picture(n)), Content_Encoding="gzip")),
    "pixel": ("tiny", answer(picture(0, "GIF", (1, 1)), Content_Type="image/gif")),
    "half_jpg": ("damaged", lambda n, *_: answer(photograph(n)[:30_000])),
    "too_long": ("too many bytes", answer(picture(0), length=10 ** 12)),
    "endless": ("too many bytes", endless),
    "cut": ("broken answer", answer(picture(0)[:90], length=900)),
    "bad_chunks": ("broken answer", lambda n, *_: chunked(picture(n), b"zz\r\nxx")),
    "no_http": ("broken answer", b"220 smtp.example.org ready\r\n"),
    "hang_up": ("broken answer", b""),
    "bad_length": ("broken answer", answer(picture(0), length="many")),
    "slow": ("too slow", drip_slowly(answer(picture(0)))),
    "slow_head": ("too slow", drip_slowly(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 9999)),
    "silent": ("time-out", lambda *_: time.sleep(3600))}


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
            data = ANSWERS.get(name, ANSWERS["none"])[1]
            if callable(data):
                data = data(int(number) if number.isdigit() else 0, seen, connection)
            connection.sendall(data or b"")
