"""
Pairs from lists of urls: what becomes of every kind of answer, kills, second passes, addresses refused.

    pytest tests/test_download.py             # -m slow: kills at random moments
"""
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import urllib3

import prepare_pairs
from conftest import REPO, refused
from prepare_imagenet import Bad, Pairs, RecordWriter, decode
from prepare_pairs import Web
from server import ANSWERS, Server, picture

URLS = { # urls that no server answers -> what becomes of the row
    "http://": "bad url", "http://[::1": "bad url",
    "file:///etc/passwd": "not http", "http://no-such-host.invalid/a.png": "no such host",
    "http://169.254.169.254/latest": "private address", "http://10.0.0.1/a.png": "private address",
    "http://127.0.0.1:1/a.png": "no connection"}


@pytest.fixture(scope="module", autouse=True)
def fast():
    """Short waits; the address of the server here counts as public."""
    public = prepare_pairs.is_public
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("TIMEOUT", 0.4), ("TRIES", 2), ("MAX_FILE", 10 ** 6)):
            patch.setattr(prepare_pairs, name, value)
        patch.setattr(prepare_pairs, "is_public", lambda address: address == "127.0.0.1" or public(address))
        yield public


@pytest.fixture
def server():
    with Server() as server:
        yield server


def prepare(folder, *words):
    """Pairs of folder/cc12m.tsv."""
    prepare_pairs.main(prepare_pairs.get_args(["--data=cc12m", f"--source={folder}", f"--data_dir={folder}",
                                               "--threads=32", *words]))


def write_list(folder, rows):
    with open(os.path.join(folder, "cc12m.tsv"), "w", encoding="utf-8") as f:
        f.writelines(f"{url}\t{caption}\n" for url, caption in rows)


def lines_of(folder):
    with open(os.path.join(folder, "cc12m", "used.tsv"), encoding="utf-8") as f:
        return list(csv.DictReader(f, delimiter="\t"))


def outcomes(folder):
    """{url: what became of it at last}."""
    return {line["where"]: line["cause"] for line in lines_of(folder)}


def check_pictures(folder, rows):
    """Every pair is the picture of its url under its caption, and no record is without a line. Returns the
    urls."""
    lines, seen, captions = [line for line in lines_of(folder) if not line["cause"]], set(), dict(rows)
    sets = {split: Pairs(str(folder), "cc12m", split) for split in {line["split"] for line in lines}}
    for line in lines:
        pairs, image = sets[line["split"]], int(line["image"])
        n = int(line["where"].rpartition("/")[2])
        if not re.search("/jpg/|/photo/", line["where"]):
            assert decode(pairs.images[image]).getpixel((0, 0)) == (n % 256, n // 256 % 256, 7), line
        assert [pairs.captions[j]
                for j in np.flatnonzero(pairs.text_to_image == image)] == [captions[line["where"]]]
        seen.add((line["split"], image))
    assert len(seen) == len(lines) == sum(len(pairs.images) for pairs in sets.values())
    return sorted(line["where"] for line in lines)


# -----------------------------------------------------------------------------
# answers


@pytest.fixture(scope="module")
def table(tmp_path_factory, fast):
    """One run over two urls of every kind between good ones -> its folder, rows, {name: outcomes}, server."""
    folder, found = tmp_path_factory.mktemp("table"), {}
    with Server() as server:
        names = [name for name in ANSWERS for _ in range(2)]
        random.Random(0).shuffle(names)
        rows = [(f"{server.url}/{name}/{n}", f"caption {n}") for n, name in enumerate(names)]
        rows += [(f"{server.url}/png/{n}", f"caption {n}") for n in range(1000, 1040)]
        rows += [(url, "caption") for url in URLS]
        rows += [(f"https{server.url[4:]}/png/1", "TLS to a port that speaks none")]
        write_list(folder, rows)
        prepare(folder)
        for url, cause in outcomes(folder).items():
            name = url if url in URLS else "tls" if url.startswith("https") else url.split("/")[-2]
            found.setdefault(name, set()).add(cause)
    return folder, rows, found, server


@pytest.mark.parametrize("name, cause", [*((name, cause) for name, (cause, _) in ANSWERS.items()),
                                         *URLS.items(), ("tls", "TLS error")])
def test_answer(table, name, cause):
    assert table[2][name] == {cause}


def test_none_lost_none_mislabelled(table):
    folder, rows, found, server = table
    good = check_pictures(folder, rows)
    with open(folder / "cc12m" / "meta.json") as f:
        assert len(good) + sum(json.load(f)["failed"].values()) == len(rows)
    # what may come right later was asked for twice, what will not once; of a redirect nothing was read
    asked = {path.split("/")[1]: n for path, n in server.asked.items()}
    assert (asked["broken"], asked["cut"], asked["none"], asked["busy_for_long"],
            asked["opted_out"]) == (2, 2, 1, 1, 1)


def test_retry_after_is_obeyed(server, tmp_path):
    """Also by the other urls of the host."""
    web, start = Web(), time.monotonic()
    assert web(f"{server.url}/busy_once/1") == picture(1) and time.monotonic() - start > 0.9
    assert web.busy_until["127.0.0.1"] <= time.monotonic()
    web.busy_until["127.0.0.1"] = time.monotonic() + 2.6 # longer than an answer may take
    assert web(f"{server.url}/png/2") == picture(2) and server.asked["/png/2"] == 1


@pytest.mark.parametrize("header, seconds", [("3", 3), ("", 0), ("soon", 0), ("-5", 0),
                                             ("Thu, 01 Jan 1970 00:00:00 GMT", 0), ("9" * 5000, 0)])
def test_retry_after(header, seconds):
    assert prepare_pairs.retry_after(header) == seconds


@pytest.mark.parametrize("values, out", [
    (["noai"], True), (["max-snippet: 20, noai"], True), (["max-image-preview:none, noimageai"], True),
    (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], True), (["*: noai"], True), (["none"], True),
    (["distill-pairs: noindex"], True), (["all", "NOAI"], True), (["otherbot: noai, noindex"], False),
    (["noai, otherbot: all"], True), (["max-image-preview: none"], False), (["all"], False), ([], False)])
def test_opting_out(values, out):
    assert prepare_pairs.opted_out(urllib3.HTTPHeaderDict([("X-Robots-Tag", value)
                                                           for value in values])) == out


# -----------------------------------------------------------------------------
# addresses


@pytest.mark.parametrize("address, public", [
    ("8.8.8.8", True), ("2606:4700:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False),
    ("172.16.0.1", False), ("169.254.169.254", False), ("0.0.0.0", False), ("100.64.0.1", False),
    ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("::", False), ("fe80::1%eth0", False),
    ("fc00::1", False), ("ff02::1", False), ("::ffff:10.0.0.1", False), ("::ffff:8.8.8.8", True),
    ("2002:7f00:1::", False), ("64:ff9b::7f00:1", False), ("fec0::1", False), ("::127.0.0.1", False),
    ("64:ff9b:1::7f00:1", False)])
def test_public_addresses(address, public, fast):
    assert fast(address) == public


def test_this_machine_is_refused_unless_allowed(server, tmp_path, monkeypatch, fast):
    """By number, by name, and however the name is resolved: nothing is sent."""
    monkeypatch.setattr(prepare_pairs, "is_public", fast)
    write_list(tmp_path, [(f"{server.url.replace('127.0.0.1', host)}/png/{n}", f"caption {n}")
                          for n, host in enumerate(["127.0.0.1", "localhost", "2130706433", "0x7f.1"])])
    for words in ([], ["--retry"]): # asking again does not help
        assert "no picture came of it" in refused(prepare, tmp_path, *words)
        assert set(outcomes_so_far(tmp_path).values()) == {"private address"} and not server.asked
    shutil.rmtree(tmp_path / "cc12m")
    prepare(tmp_path, "--allow_private")
    assert list(outcomes(tmp_path).values()) == [""] * 4


def outcomes_so_far(folder):
    """As outcomes(), of a run that did not end."""
    with open(f"{folder}/cc12m/begun.json") as f:
        size = json.load(f)["used"]
    with open(f"{folder}/cc12m/used.tsv.tmp", "rb") as f:
        lines = csv.DictReader(f.read(size).decode().splitlines(), delimiter="\t")
    return {line["where"]: line["cause"] for line in lines}


def test_the_address_that_is_connected_to_is_the_one_checked(monkeypatch, server, fast):
    """A name may stand for a public address when it is looked up first, and for a private one after."""
    monkeypatch.setattr(prepare_pairs, "is_public", fast)
    monkeypatch.setattr(prepare_pairs.socket, "getaddrinfo", lambda *args: [
        (2, 1, 6, "", ("127.0.0.1", server.port))])
    with pytest.raises(Bad, match="private address"):
        Web()(f"http://rebound.example:{server.port}/png/6")
    assert not server.asked


# -----------------------------------------------------------------------------
# passes, limits, kills


def test_a_second_pass_asks_for_what_failed_only(server, tmp_path, capsys, monkeypatch):
    rows = [(f"{server.url}/{name}/{n}", f"caption {n}")
            for n, name in enumerate(["png"] * 20 + ["broken", "none", "opted_out", "cut"])]
    write_list(tmp_path, rows)
    prepare(tmp_path)
    first, before = Counter(server.asked), check_pictures(tmp_path, rows)
    prepare(tmp_path) # a set that is there stays as it is
    assert server.asked == first and "already prepared" in capsys.readouterr().out
    monkeypatch.setitem(ANSWERS, "broken", ANSWERS["png"]) # the server is mended
    prepare(tmp_path, "--retry")
    assert server.asked - first == {"/broken/20": 1, "/none/21": 1, "/cut/23": 2}
    assert check_pictures(tmp_path, rows) == sorted([*before, rows[20][0]])


def test_limit_counts_pictures_that_came(server, tmp_path):
    """Also when it is raised later; what came stays where it is."""
    rows = [(f"{server.url}/{'png' if n % 3 else 'none'}/{n}", f"caption {n}") for n in range(200)]
    write_list(tmp_path, rows)
    for limit in (10, 40, 0):
        prepare(tmp_path, "--threads=2", f"--limit={limit}")
        urls = check_pictures(tmp_path, rows)
        assert len(Pairs(str(tmp_path), "cc12m", "train").images) == limit or not limit
    assert len(urls) == 133
    assert sum(server.asked.values()) <= 200 + 3 * 5 # those under way when there were enough


def test_held_out_by_hash(server, tmp_path, monkeypatch):
    """Whatever the order, but for the first one; beyond a number they are counted."""
    rows, held = [(f"{server.url}/png/{n}", f"caption {n}") for n in range(200)], []
    for order in (rows, rows[::-1]):
        os.makedirs(folder := tmp_path / str(len(held)))
        write_list(folder, order)
        prepare(folder)
        held.append({line["where"] for line in lines_of(folder) if line["split"] == "val"})
    assert len(held[0] ^ held[1]) <= 2 < len(held[0]) < 30 # one in twenty
    monkeypatch.setattr(prepare_pairs, "MAX_VAL", 2)
    os.makedirs(folder := tmp_path / "few")
    write_list(folder, rows)
    prepare(folder)
    assert Counter(outcomes(folder).values())["held out beyond 2"] in range(len(held[0]) - 3, len(held[0]))
    assert len(Pairs(str(folder), "cc12m", "val").images) == 2


def test_another_list_or_flag_is_refused(server, tmp_path):
    rows = [(f"{server.url}/png/{n}", f"caption {n}") for n in range(20)] + [(f"{server.url}/none/1", "x")]
    write_list(tmp_path, rows)
    prepare(tmp_path)
    assert "--resize=0. Remove it" in refused(prepare, tmp_path, "--resize=32")
    write_list(tmp_path, [*rows, (f"{server.url}/png/99", "new")])
    assert "begun with other list" in refused(prepare, tmp_path, "--retry")
    assert len(Pairs(str(tmp_path), "cc12m", "train").images) > 10 # what was whole is still there


def test_without_a_network(tmp_path, monkeypatch):
    """The run ends before it has spent all rows on a network that is down; the same command asks again for
    those that it spent."""
    write_list(tmp_path, [(f"http://host{n}.invalid/a", f"caption {n}") for n in range(400)])

    def down(*args, **kwargs):
        raise prepare_pairs.socket.gaierror("unreachable")
    monkeypatch.setattr(prepare_pairs.socket, "getaddrinfo", down)
    monkeypatch.setattr(prepare_pairs, "TRIES", 1)
    asked = []
    for _ in range(2):
        assert "is there a network" in refused(prepare, tmp_path)
        asked.append(outcomes_so_far(tmp_path))
    assert list(asked[0].values()) == ["no such host"] * 300 and asked[0].keys() <= asked[1].keys()


COMMAND = [sys.executable, os.path.join(REPO, "prepare_pairs.py"), "--data=cc12m", "--allow_private",
           "--threads=8"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_and_restarted(tmp_path, seed):
    """SIGKILL at five random moments: no duplicate, no gap, every caption under its picture."""
    rng, command = random.Random(seed), [*COMMAND, f"--source={tmp_path}", f"--data_dir={tmp_path}"]
    with Server(delay=0.02) as server:
        rows = [(f"{server.url}/{'none' if n % 5 == 0 else 'png'}/{n}", f"caption {n}") for n in range(2000)]
        write_list(tmp_path, rows)
        for _ in range(5):
            run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            reached, deadline = sum(server.asked.values()) + rng.randrange(1, 500), time.time() + 60
            while sum(server.asked.values()) < reached and run.poll() is None and time.time() < deadline:
                time.sleep(0.002)
            run.send_signal(signal.SIGKILL)
            run.wait()
        assert not os.path.exists(tmp_path / "cc12m" / "meta.json")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert check_pictures(tmp_path, rows) == sorted(url for url, _ in rows if "/png/" in url)
    assert Counter(outcomes(tmp_path).values()) == {"": 1600, "http 404": 400}
    assert not [f for f in os.listdir(tmp_path / "cc12m") if ".tmp" in f]


def test_full_disk(server, tmp_path, monkeypatch):
    """Said, with what to do; then it goes on."""
    rows, write = [(f"{server.url}/png/{n}", f"caption {n}") for n in range(60)], RecordWriter.write
    write_list(tmp_path, rows)

    def full(self, record):
        if self.count > 20:
            raise OSError(28, "No space left on device")
        return write(self, record)
    monkeypatch.setattr(RecordWriter, "write", full)
    assert "No space left on device. Give the same command again" in refused(prepare, tmp_path)
    monkeypatch.setattr(RecordWriter, "write", write)
    prepare(tmp_path)
    assert len(check_pictures(tmp_path, rows)) == 60
