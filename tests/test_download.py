"""
Pairs from lists of urls: what becomes of every kind of answer, kills, second passes, addresses that are
refused.

    pytest tests/test_download.py
"""
import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import prepare_pairs
from prepare_pairs import Pairs, Web, decode
from server import ANSWERS, Server, picture

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# what the server answers (tests/server.py) -> what becomes of the row; "" is a pair
OUTCOMES = {
    "png": "", "jpg": "", "webp": "", "photo": "", "wrong_type": "", "gzipped": "", "chunked": "",
    "moved": "", "busy_once": "", "busy_until": "", "reset_once": "", "cut_once": "", "other_robot": "",
    "more_than_said": "",
    "none": "http 404", "gone": "http 410", "forbidden": "http 403", "broken": "http 500", "busy": "http 429",
    "busy_for_long": "http 429", "no_content": "http 204", "empty": "empty", "loop": "too many redirects",
    "nowhere": "http 302", "to_file": "not http", "to_ftp": "not http", "to_private": "private address",
    "to_nonsense": "bad url", "opted_out": "opted out", "reserved": "opted out", "html": "not a picture",
    "svg": "not a picture", "noise": "not a picture", "pixel": "tiny", "strip": "tiny",
    "bomb": "too many pixels", "large": "too many pixels", "half_jpg": "damaged", "half_png": "damaged",
    "zeros": "damaged", "not_gzip": "damaged", "brotli": "", "scans": "damaged", "wide": "damaged",
    "robots_404": "http 404", "too_long": "too many bytes",
    "gzip_bomb": "too many bytes", "endless": "too many bytes", "cut": "cut off", "bad_chunks": "cut off",
    "no_http": "broken answer", "hang_up": "broken answer", "bad_length": "broken answer", "slow": "too slow",
    "slow_head": "too slow", "silent": "time-out"}
URLS = { # the same of urls that no server answers
    "not a url": "bad url", "http://": "bad url", "http://[::1": "bad url",
    "ftp://example.org/a.png": "not http",
    "file:///etc/passwd": "not http", "http://no-such-host.invalid/a.png": "no such host",
    "http://169.254.169.254/latest": "private address", "http://10.0.0.1/a.png": "private address",
    "http://[::1]/a.png": "private address",
    "http://127.0.0.1:1/a.png": "no connection",
    "http://[::ffff:127.0.0.1]/a.png": "private address"}
FAST = ["--threads=32", "--timeout=0.4", "--tries=2", "--max_mb=1"]


@pytest.fixture
def server(monkeypatch):
    """The server, on an address that counts as public."""
    public = prepare_pairs.is_public
    monkeypatch.setattr(prepare_pairs, "is_public", lambda address: address == "127.0.0.1" or public(address))
    with Server() as server:
        yield server


def prepare(*words):
    return prepare_pairs.main(prepare_pairs.get_args(list(words)))


def write_list(folder, rows):
    """cc12m.tsv: url, caption."""
    with open(os.path.join(folder, "cc12m.tsv"), "w", encoding="utf-8") as f:
        f.writelines(f"{url}\t{caption}\n" for url, caption in rows)


def outcomes(folder):
    """{row: what became of it at last} from rows.jsonl."""
    with open(os.path.join(folder, "cc12m", "rows.jsonl")) as f:
        entries = [json.loads(line) for line in f][1:]
    return {entry[0]: entry[2] for entry in entries}


def used(folder, data="cc12m"):
    with open(os.path.join(folder, data, "used.tsv"), encoding="utf-8") as f:
        return list(csv.DictReader(f, delimiter="\t"))


def check_pictures(folder, rows, data="cc12m"):
    """Every line of used.tsv names a record that is the picture of that url, under its caption; no record is
    without a line. Returns the urls."""
    lines, counts = used(folder, data), Counter()
    sets = {split: Pairs(str(folder), data, split) for split in {line["split"] for line in lines}}
    captions = dict(rows)
    for line in lines:
        pairs, image = sets[line["split"]], int(line["image"])
        n = int(line["where"].rpartition("/")[2].partition("?")[0])
        assert decode(pairs.images[image]).getpixel((0, 0)) == (n % 256, n // 256 % 256, 7), line
        own = [pairs.captions[j] for j in np.flatnonzero(pairs.text_to_image == image)]
        assert own == [captions[line["where"]]], line
        counts[line["split"], image] += 1
    assert set(counts.values()) == {1} and len(counts) == sum(len(p.images) for p in sets.values())
    return [line["where"] for line in lines]


# -----------------------------------------------------------------------------
# answers


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """One run over two urls of every kind between good ones -> {name: set of outcomes}, the rest of the
    module reads it."""
    folder = tmp_path_factory.mktemp("table")
    with pytest.MonkeyPatch.context() as patch, Server() as server:
        public = prepare_pairs.is_public
        patch.setattr(prepare_pairs, "is_public", lambda address: address == "127.0.0.1" or public(address))
        names = [name for name in OUTCOMES for _ in range(2)]
        random.Random(0).shuffle(names)
        rows = [(f"{server.url}/{name}/{n}", f"caption {n}") for n, name in enumerate(names)]
        rows += [(f"{server.url}/png/{n}", f"caption {n}") for n in range(1000, 1040)]
        rows += [(url, "caption") for url in URLS]
        rows += [(f"https{server.url[4:]}/png/1", "TLS to a port that speaks none")]
        write_list(folder, rows)
        result = prepare("--data=cc12m", f"--source={folder}", f"--data_dir={folder}", *FAST)
        of, found = outcomes(folder), {}
        for n, (url, _) in enumerate(rows):
            name = url if url in URLS else "tls" if url.startswith("https") else url.split("/")[-2]
            found.setdefault(name, set()).add(of[n])
    assert result is None
    return folder, rows, found, server


@pytest.mark.parametrize("name, cause", [*OUTCOMES.items(), *URLS.items(), ("tls", "TLS error")])
def test_answer(table, name, cause):
    assert table[2][name] == {cause}


def test_every_answer_is_tested():
    assert set(OUTCOMES) == set(ANSWERS) - {"placeholder"}


def test_none_lost_none_mislabelled(table):
    folder, rows, found, server = table
    with open(folder / "cc12m" / "meta.json") as f:
        meta = json.load(f)
    good = [url for n, (url, _) in enumerate(rows) if outcomes(folder)[n] == ""]
    exact = [(url, c) for url, c in rows
             if "/webp/" not in url and "/jpg/" not in url and "/photo/" not in url]
    urls = [line["where"] for line in used(folder)]
    assert sorted(urls) == sorted(good) and len(good) + sum(meta["failed"].values()) == len(rows)
    # the pictures that tell by their first pixel exactly who they are
    lines = [line for line in used(folder) if line["where"] in dict(exact)]
    for line in lines:
        pairs, n = Pairs(str(folder), "cc12m", line["split"]), int(line["where"].rpartition("/")[2])
        assert pairs.images[int(line["image"])] == picture(n)
        j = np.flatnonzero(pairs.text_to_image == int(line["image"]))
        assert [pairs.captions[k] for k in j] == [dict(rows)[line["where"]]]
    assert len(lines) > 50
    # what may come right later was asked for twice, what will not once
    asked = {path.split("/")[1]: n for path, n in server.asked.items()}
    assert (asked["broken"], asked["cut"], asked["none"], asked["busy_for_long"], asked["opted_out"]) \
        == (2, 2, 1, 1, 1)


def test_a_placeholder_is_kept_once(server, tmp_path):
    """The picture that a host sends for all that are gone; other small pictures stay."""
    rows = [(f"{server.url}/{name}/{n}", f"caption {n}") for n in range(10)
            for name in ("placeholder", "png")]
    write_list(tmp_path, rows)
    prepare("--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}", *FAST)
    assert Counter(outcomes(tmp_path).values()) == {"": 11, "same small picture": 9}


def test_rows_that_are_not_asked_for(server, tmp_path, capsys):
    """Empty captions, missing urls, urls listed before: dropped, counted, never requested."""
    url = f"{server.url}/png/"
    rows = [(url + "1", "one"), (url + "2", "  \x00 "), ("", "no url"), (url + "1", "again"),
            (url + "3", "three")]
    write_list(tmp_path, rows)
    with open(tmp_path / "cc12m.tsv", "a") as f:
        f.write("one column\n")
        f.write(f"{url}4\ttwo\tmore\n")
    prepare("--data=cc12m", f"--source={tmp_path}/cc12m.tsv", f"--data_dir={tmp_path}", *FAST)
    with open(tmp_path / "cc12m" / "meta.json") as f:
        assert json.load(f)["failed"] == {"no url": 1, "no caption": 2, "again in the list": 1}
    assert (set(server.asked) == {"/png/1", "/png/3", "/png/4"}
            and "4 of 7 rows did not become pairs" in capsys.readouterr().out)
    rows = [*reversed(rows), (url + "4", "two more")] # a tab too many is the caption's
    assert sorted(check_pictures(tmp_path, dict(rows).items())) == [url + "1", url + "3", url + "4"]


def test_a_host_that_asks_for_time_gets_it(server, tmp_path):
    """While a host has said Retry-After, its other urls wait too."""
    times = []

    def note(n, seen, w):
        times.append((time.monotonic(), n))
        return ANSWERS["busy_once"](n, seen, w)
    ANSWERS["noted"] = note
    try:
        rows = [(f"{server.url}/noted/{n}", "x") for n in range(1)]
        rows += [(f"{server.url}/png/{n}", f"x {n}") for n in range(100, 140)]
        write_list(tmp_path, rows)
        prepare("--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}", "--threads=1", *FAST[1:])
    finally:
        del ANSWERS["noted"]
    assert set(outcomes(tmp_path).values()) == {""}
    assert len(times) == 2 and times[1][0] - times[0][0] >= 1 and server.asked["/png/100"] == 1


# -----------------------------------------------------------------------------
# addresses


@pytest.mark.parametrize("address, public", [
    ("8.8.8.8", True), ("2606:4700:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False),
    ("192.168.0.1", False), ("172.16.0.1", False), ("169.254.169.254", False), ("0.0.0.0", False),
    ("100.64.0.1", False), ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("::", False),
    ("fe80::1%eth0", False), ("fc00::1", False), ("ff02::1", False), ("::ffff:10.0.0.1", False),
    ("::ffff:8.8.8.8", True), ("2002:7f00:1::", False), ("64:ff9b::7f00:1", False),
    ("64:ff9b::808:808", True), ("fec0::1", False), ("::127.0.0.1", False),
    ("::ffff:0:127.0.0.1", False), ("64:ff9b:1::7f00:1", False)])
def test_public_addresses(address, public):
    assert prepare_pairs.is_public(address) == public


def test_this_machine_is_refused_unless_allowed(tmp_path):
    """By number, by name, and however the name is resolved: nothing is sent."""
    with Server() as server:
        write_list(tmp_path, [(f"{server.url.replace('127.0.0.1', host)}/png/{n}", "x")
                              for n, host in enumerate(["127.0.0.1", "localhost", "2130706433", "0x7f.1"])])
        with pytest.raises(SystemExit, match="no training picture"):
            prepare("--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}", *FAST)
        assert set(outcomes(tmp_path).values()) == {"private address"} and not server.asked
        with pytest.raises(SystemExit, match="no training picture"): # asking again does not help
            prepare("--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}", "--retry", *FAST)
        os.remove(tmp_path / "cc12m" / "rows.jsonl")
        prepare("--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}", "--allow_private", *FAST)
        assert len(used(tmp_path)) == 4


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch, server):
    """A name that stands for a public address when it is looked at and for a private one after."""
    answers = iter([[(2, 1, 6, "", ("127.0.0.1", server.port))], [(2, 1, 6, "", ("10.0.0.1", server.port))]])
    resolve = prepare_pairs.socket.getaddrinfo
    monkeypatch.setattr(prepare_pairs.socket, "getaddrinfo", lambda host, *a, **k: (
        next(answers) if host == "rebound.example" else resolve(host, *a, **k)))
    created, create = [], prepare_pairs.socket.create_connection
    monkeypatch.setattr(prepare_pairs.socket, "create_connection",
                        lambda address, *a: created.append(address[0]) or create(address, *a))
    web = Web(prepare_pairs.get_args(FAST))
    assert web(f"http://rebound.example:{server.port}/png/5") == picture(5)
    web.pool.clear()
    with pytest.raises(prepare_pairs.Bad, match="private address"):
        web(f"http://rebound.example:{server.port}/png/6")
    assert created == ["127.0.0.1"]


def test_connections_are_used_again(server):
    web = Web(prepare_pairs.get_args(FAST))
    for n in range(5):
        assert web(f"{server.url}/moved/{n}") == picture(n)
    assert sum(pool.num_connections for pool in web.pool.pools._container.values()) == 1


@pytest.mark.parametrize("header, seconds", [("3", 3), ("", 0), ("soon", 0), ("-5", 0),
                                             ("Thu, 01 Jan 1970 00:00:00 GMT", 0), ("9" * 5000, 0)])
def test_retry_after(header, seconds):
    assert prepare_pairs.retry_after(header) == seconds


# -----------------------------------------------------------------------------
# passes, limits, kills


def test_a_second_pass_asks_for_what_failed_only(server, tmp_path, capsys):
    rows = [(f"{server.url}/{name}/{n}", f"caption {n}")
            for n, name in enumerate(["png"] * 20 + ["broken", "none", "opted_out", "cut"])]
    write_list(tmp_path, rows)
    words = ["--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}", *FAST]
    prepare(*words)
    first, before = Counter(server.asked), check_pictures(tmp_path, rows)
    prepare(*words) # a set that is there stays as it is
    assert server.asked == first and "already prepared" in capsys.readouterr().out
    broken, cut = ANSWERS["broken"], ANSWERS["cut"]
    try: # the server is mended
        ANSWERS["broken"] = ANSWERS["png"]
        prepare(*words, "--retry")
    finally:
        ANSWERS["broken"], ANSWERS["cut"] = broken, cut
    again = server.asked - first
    assert again == {"/broken/20": 1, "/none/21": 1, "/cut/23": 2}
    assert sorted(check_pictures(tmp_path, rows)) == sorted([*before, rows[20][0]])


def test_limit_counts_pictures_that_came(server, tmp_path):
    """Also when it is raised later; what came stays where it is."""
    rows = [(f"{server.url}/{'png' if n % 3 else 'none'}/{n}", f"caption {n}") for n in range(200)]
    write_list(tmp_path, rows)
    words = ["--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}", "--threads=2", "--tries=1"]
    counts = []
    for limit in (10, 40, 0):
        prepare(*words, f"--limit={limit}")
        urls = check_pictures(tmp_path, rows)
        counts.append(Counter(line["split"] for line in used(tmp_path))["train"])
        assert all("/png/" in url for url in urls)
    assert counts[:2] == [10, 40] and len(urls) == 133
    assert sum(server.asked.values()) <= 200 + 2 * 3 * 2 # what was under way when a limit was reached


def test_held_out_by_hash(server, tmp_path):
    """Validation rows are chosen by their url, in whatever order they stand."""
    rows = [(f"{server.url}/png/{n}", f"caption {n}") for n in range(120)]
    held = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        os.mkdir(tmp_path / name)
        write_list(tmp_path / name, order)
        prepare("--data=cc12m", f"--source={tmp_path / name}", f"--data_dir={tmp_path / name}", *FAST)
        held.append({line["where"] for line in used(tmp_path / name) if line["split"] == "val"})
    assert held[0] == held[1] and 1 <= len(held[0]) <= 15


def test_another_list_is_refused(server, tmp_path):
    rows = [(f"{server.url}/png/{n}", f"caption {n}") for n in range(20)] + [(f"{server.url}/none/1", "x")]
    write_list(tmp_path, rows)
    words = ["--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}", *FAST]
    prepare(*words)
    with pytest.raises(SystemExit, match="--resize=0. Remove it"):
        prepare(*words, "--resize=32")
    write_list(tmp_path, [*rows, (f"{server.url}/png/99", "new")])
    with pytest.raises(SystemExit, match="was begun with rows 21, now 22"):
        prepare(*words, "--retry")
    assert len(Pairs(str(tmp_path), "cc12m", "train").images) > 10 # what was whole is still there
    write_list(tmp_path, rows)
    prepare(*words, "--vocab_size=300") # the tokeniser alone is made again
    with open(tmp_path / "cc12m" / "tokenizer.json") as f:
        assert len(json.load(f)["model"]["vocab"]) <= 300 and server.asked["/png/0"] == 1


def test_without_a_network(tmp_path, monkeypatch):
    """Rows are not spent on a network that is down."""
    write_list(tmp_path, [(f"http://host{n}.invalid/a", f"caption {n}") for n in range(1000)])

    def down(*args, **kwargs):
        raise OSError("unreachable")
    monkeypatch.setattr(prepare_pairs.socket, "getaddrinfo", down)
    with pytest.raises(SystemExit, match="is there a network.*Give the same command again"):
        prepare("--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}", "--threads=32", "--tries=1")
    assert outcomes(tmp_path) == {}


def test_dead_hosts_are_no_dead_network(server, tmp_path):
    """Hundreds of urls in a row that lead nowhere: a host that answered tells that the network is there."""
    rows = [(f"{server.url}/png/{n}", f"caption {n}") for n in range(5)]
    rows += [(f"http://127.0.0.1:1/{n}", f"dead {n}") for n in range(400)]
    rows += [(f"{server.url}/png/{n}", f"caption {n}") for n in range(5, 10)]
    write_list(tmp_path, rows)
    prepare("--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}", "--tries=1", *FAST[:2])
    assert Counter(outcomes(tmp_path).values()) == {"": 10, "no connection": 400}


def test_held_out_rows_beyond_what_is_needed_are_counted(server, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_pairs, "MAX_VAL", 2)
    write_list(tmp_path, [(f"{server.url}/png/{n}", f"caption {n}") for n in range(200)])
    prepare("--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}", "--threads=1", *FAST[1:])
    with open(tmp_path / "cc12m" / "meta.json") as f:
        meta = json.load(f)
    beyond = meta["failed"]["held out beyond 2"]
    kept = {split: counts["images"] for split, counts in meta["splits"].items()}
    assert beyond > 0 and kept["train"] + kept["val"] + beyond == 200
    assert 2 <= kept["val"] <= 6 # some were under way when there were enough


def test_interrupted_while_it_notes(server, tmp_path, monkeypatch):
    """Ctrl-C between the lines of rows.jsonl and their being forgotten: none is written twice."""
    rows = [(f"{server.url}/png/{n}", f"caption {n}") for n in range(40)]
    write_list(tmp_path, rows)
    words = ["--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}", *FAST]
    flush, calls = prepare_pairs.Ledger.flush, []

    class Interrupted(io.BytesIO):
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data)
            self.file.flush()
            raise KeyboardInterrupt

        def __getattr__(self, name):
            return getattr(self.file, name)

    def interrupted(self):
        calls.append(1)
        if len(calls) == 1:
            self.file, file = Interrupted(self.file), self.file
            try:
                return flush(self)
            finally:
                self.file = file
        return flush(self)
    monkeypatch.setattr(prepare_pairs.Ledger, "flush", interrupted)
    with pytest.raises(SystemExit, match="stopped. Give the same command"):
        prepare(*words)
    prepare(*words)
    assert sorted(check_pictures(tmp_path, rows)) == sorted(url for url, _ in rows)


@pytest.mark.parametrize("values, out", [
    (["noai"], True), (["max-snippet: 20, noai"], True), (["max-image-preview:none, noimageai"], True),
    (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], True), (["*: noai"], True), (["none"], True),
    (["distill-pairs: noindex"], True), (["all", "NOAI"], True), (["otherbot: noai, noindex"], False),
    (["noai, otherbot: all"], True), (["max-image-preview: none"], False), (["all"], False), ([], False)])
def test_opting_out(values, out):
    import urllib3
    headers = urllib3.HTTPHeaderDict([("X-Robots-Tag", value) for value in values])
    assert prepare_pairs.opted_out(headers) == out


def test_resized_while_it_comes(server, tmp_path):
    rows = [(f"{server.url}/{name}/{n}", f"caption {n}")
            for n, name in enumerate(["photo"] * 3 + ["png"] * 30)]
    write_list(tmp_path, rows)
    prepare("--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}", "--resize=96", *FAST)
    sizes = {}
    for line in used(tmp_path):
        data = Pairs(str(tmp_path), "cc12m", line["split"]).images[int(line["image"])]
        sizes.setdefault(line["where"].split("/")[-2], set()).add(Image.open(io.BytesIO(data)).size)
    assert sizes == {"photo": {(128, 96)}, "png": {(48, 40)}} # never enlarged


COMMAND = [sys.executable, os.path.join(REPO, "prepare_pairs.py"), "--data=cc12m", "--allow_private",
           "--threads=8", "--timeout=2", "--tries=1"]


def killed_at_random(folder, rows, server, kills, seed):
    """Starts the command, kills it at a random moment, `kills` times, and lets it end."""
    rng, command = random.Random(seed), [*COMMAND, f"--source={folder}", f"--data_dir={folder}"]
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        reached, deadline = sum(server.asked.values()) + rng.randrange(1, len(rows) // 4), time.time() + 60
        while sum(server.asked.values()) < reached and process.poll() is None and time.time() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not os.path.exists(folder / "cc12m" / "meta.json")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_and_restarted(tmp_path, seed, monkeypatch):
    """No duplicate, no gap, every caption under its picture."""
    with Server(delay=0.02) as server:
        rows = [(f"{server.url}/{'none' if n % 5 == 0 else 'png'}/{n}", f"caption {n}") for n in range(2000)]
        write_list(tmp_path, rows)
        killed_at_random(tmp_path, rows, server, 5, seed)
    urls = check_pictures(tmp_path, rows)
    assert sorted(urls) == sorted(url for url, _ in rows if "/png/" in url)
    assert Counter(outcomes(tmp_path).values()) == {"": 1600, "http 404": 400}
    assert {f for f in os.listdir(tmp_path / "cc12m") if ".tmp" in f} == set()


@pytest.mark.slow
def test_killed_once(tmp_path):
    with Server(delay=0.01) as server:
        rows = [(f"{server.url}/{'none' if n % 5 == 0 else 'png'}/{n}", f"caption {n}") for n in range(400)]
        write_list(tmp_path, rows)
        killed_at_random(tmp_path, rows, server, 1, 0)
    assert sorted(check_pictures(tmp_path, rows)) == sorted(url for url, _ in rows if "/png/" in url)


def test_torn_state(server, tmp_path):
    """A power cut: records behind their lines, half a line; all of it is made again."""
    rows = [(f"{server.url}/png/{n}", f"caption {n}") for n in range(60)]
    write_list(tmp_path, rows)
    words = ["--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}", *FAST]
    prepare(*words)
    folder = tmp_path / "cc12m"
    os.remove(folder / "meta.json")
    os.rename(folder / "train_images.bin", folder / "train_images.bin.tmp")
    with open(folder / "train_images.bin.tmp", "r+b") as f:
        f.truncate(os.path.getsize(folder / "train_images.bin.tmp") // 2)
    with open(folder / "rows.jsonl", "a") as f:
        f.write('[3, "tra')
    prepare(*words)
    assert len(check_pictures(tmp_path, rows)) == 60


def test_full_disk(server, tmp_path, monkeypatch):
    """Said, with what to do; then it goes on."""
    rows = [(f"{server.url}/png/{n}", f"caption {n}") for n in range(60)]
    write_list(tmp_path, rows)
    words = ["--data=cc12m", f"--source={tmp_path}", f"--data_dir={tmp_path}", *FAST]
    write = prepare_pairs.RecordWriter.write

    def full(self, record):
        if len(self.offsets) > 20:
            raise OSError(28, "No space left on device")
        return write(self, record)
    monkeypatch.setattr(prepare_pairs.RecordWriter, "write", full)
    with pytest.raises(SystemExit, match="No space left on device. Give the same command again"):
        prepare(*words)
    monkeypatch.setattr(prepare_pairs.RecordWriter, "write", write)
    prepare(*words)
    assert len(check_pictures(tmp_path, rows)) == 60
