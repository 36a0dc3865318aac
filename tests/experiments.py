"""
The experiments of the README, on OpenMoji: every arm with every seed, each by a command that is printed and
can be typed; then the tables, mean +- sample standard deviation over the seeds, and the figure.

    python tests/experiments.py [--seeds=3] [--arms=both,mse] [--data_dir=data] [--out_dir=out/arms]
    python tests/experiments.py --arms= --figure=curves.png       # of what is there; pip install matplotlib

An arm that is finished is not run again, one that was stopped goes on: the same command continues. Some six
minutes an arm and seed on one core with AMX; all arms train for as many minutes, the teacher's included.
"""
import argparse
import json
import os
import sys

import numpy as np

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)
from model import is_finished, run_script, save_atomic, write_json
from prepare_imagenet import Pairs, RecordWriter

TINY, IMAGE = "distill_multimodal.py --preset=tiny", "distill_image.py --preset=tiny"
HALF = "distill_image.py --preset=tiny_half --teacher={teacher}"
ALONE = "--kd_loss=none --image_init=random --max_steps=580" # the minutes of 450 steps and of the teacher
PAIRS = { # arm -> what it is in the table, its command without --seed and --out_dir
    "both": ("distillation (contrastive), alignment, words", f"{TINY} --teacher={{teacher}}"),
    "words": ("no teacher: alignment, words", f"{TINY} {ALONE}"),
    "contrastive": ("no teacher, no words: alignment", f"{TINY} {ALONE} --word_weight=0"),
    "kd": ("distillation alone", f"{TINY} --align_loss=none --word_weight=0 --kd_weight=1 "
                                 f"--teacher={{teacher}}"),
    "mse": ("distillation by mse", f"{TINY} --kd_loss=mse --kd_weight=1 --teacher={{teacher}}"),
    "queue": ("with a queue of 2,048 targets", f"{TINY} --queue_size=2048 --teacher={{teacher}}"),
    "towers": ("two towers, nothing shared",
               f"{TINY} --shared=projection --depth=5 --text_depth=3 --teacher={{teacher}}"),
    "heavy": ("distillation weighs 0.5, not 0.2", f"{TINY} --teacher={{teacher}} --kd_weight=0.5"),
    "labels": ("the same, of a teacher trained on labels",
               f"{TINY} --teacher={{supervised}} --kd_weight=0.5"),
    "kd_cls": ("0.5, towards the CLS token", f"{TINY} --teacher={{teacher}} --kd_weight=0.5 --kd_target=cls"),
}
IMAGES = {
    "teacher": ("teacher, five blocks", IMAGE),
    "half": ("its first three, distilled", HALF),
    "cut": ("its first three, not distilled", f"{HALF} --max_steps=1 --lr=0"),
    "alternate": ("its blocks 1, 2 and 4, distilled", f"{HALF} --init=alternate"),
    "cls": ("first three, CLS token as target", f"{HALF} --target=cls"),
    "last": ("first three, last block as target", f"{HALF} --target=last"),
    "scratch": ("three blocks from scratch", f"{IMAGE} --depth=3 --max_steps=600"),
    "random": ("five random blocks", f"{IMAGE} --max_steps=1 --lr=0"),
    "supervised": ("five blocks that name the family", # for as many minutes as the teacher
                   "evaluate.py finetune --task=families --ckpt={random} --augment=none --batch_size=256 "
                   "--epochs=26 --lr=1e-3 --layer_decay=1"),
}
PROBES = { # columns of the second table -> subcommand of evaluate.py
    "kNN": "knn --task=digits", # top-1
    "Probe": "finetune --task=digits --linear_probe --augment=none --batch_size=64 --epochs=30 --lr=1e-2",
    "Tuned": "finetune --task=digits --augment=none --batch_size=64 --epochs=10"}


def write_families(data_dir):
    """data_dir/families: OpenMoji's training pictures with their families as classes; of every fourth
    family that has several, one picture for validation."""
    pairs, rng = Pairs(data_dir, "openmoji", "train"), np.random.default_rng(0)
    order = rng.permutation(len(pairs.images))
    _, first, counts = np.unique(pairs.labels[order], return_index=True, return_counts=True)
    val = set(order[first[counts > 1]][::4].tolist())
    splits = {"train": [i for i in range(len(order)) if i not in val], "val": sorted(val)}
    for split, chosen in splits.items():
        writer = RecordWriter(f"{data_dir}/families/{split}_images")
        for i in chosen:
            writer.write(pairs.images[i])
        writer.close()
        save_atomic(f"{data_dir}/families/{split}_labels.npy", lambda f: np.save(f, pairs.labels[chosen]))
    write_json(f"{data_dir}/families/meta.json", {
        "data": "families", "credit": pairs.meta["credit"],
        "splits": {split: {"images": len(chosen)} for split, chosen in splits.items()}})


def train(arm, seed, args):
    """Trains an arm unless it is finished. Those whose checkpoints it reads come before it."""
    folder, words = f"{args.out_dir}/{arm}_{seed}", (PAIRS | IMAGES)[arm][1]
    words = words.format(**{k: f"{args.out_dir}/{k}_{seed}/ckpt.pt" for k in IMAGES}).split()
    data_dir = f"--data_dir={args.data_dir}"
    if not is_finished(f"{folder}/ckpt.pt"):
        run_script(*words, f"--seed={seed}", f"--out_dir={folder}", data_dir,
                   f"--resume={os.path.exists(f'{folder}/ckpt.pt')}")
    for name, command in PROBES.items() if arm in IMAGES else ():
        if not os.path.exists(f"{folder}/{name}.json"):
            command, *flags = command.split()
            out = [f"--out_dir={folder}/{name}"] * (command == "finetune")
            run_script("evaluate.py", command, *flags, f"--ckpt={folder}/ckpt.pt", data_dir, *out,
                       f"--json={folder}/{name}.json")


def read(path):
    if os.path.exists(path):
        with open(path) as f:
            return json.load(f)["metrics"]


def spread(values):
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def tables(args):
    for arms, columns in ((PAIRS, ["i2t_r10", "t2i_r10", "mean"]), (IMAGES, [*PROBES])):
        rows = [["arm", "seeds", *columns]]
        for arm, (title, _) in arms.items():
            folders = [f"{args.out_dir}/{arm}_{seed}" for seed in range(args.seeds)]
            if arms is PAIRS:
                found = [x for x in (read(f"{folder}/retrieval.json") for folder in folders) if x]
                values = [[x[k] for x in found] for k in columns]
            else:
                values = [[x["top1"] for x in (read(f"{folder}/{k}.json") for folder in folders) if x]
                          for k in columns]
            if all(values):
                rows.append([title, str(len(values[0])), *map(spread, values)])
        print()
        for row in rows:
            print(f"{row[0]:48}{row[1]:>6}" + "".join(f"{cell:>16}" for cell in row[2:]))


def figure(args):
    """Validation mean recall over steps: a thin line for each seed, a thick one for their mean."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    fig, ax = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for n, arm in enumerate(a for a in PAIRS if a in args.shown.split(",")):
        lines = []
        for seed in range(args.seeds):
            if os.path.exists(path := f"{args.out_dir}/{arm}_{seed}/log.jsonl"):
                with open(path) as f:
                    records = [r for r in map(json.loads, f) if "val_mean" in r]
                lines.append([(r["step"], r["val_mean"]) for r in records])
                ax.plot(*zip(*lines[-1]), color=f"C{n}", linewidth=0.8, alpha=0.6)
        if lines:
            steps, means = zip(*np.mean([line[:min(map(len, lines))] for line in lines], axis=0))
            ax.plot(steps, means, color=f"C{n}", linewidth=3, label=PAIRS[arm][0])
    ax.set(xlabel="steps of 512 pairs", ylabel="mean recall, 100 validation families, %", ylim=(0, None))
    ax.legend(loc="lower right", frameon=False)
    fig.savefig(args.figure, dpi=110)
    print(f"wrote {args.figure}")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--arms", default=",".join([*IMAGES, *PAIRS]), help="in the order of the tables")
    p.add_argument("--data_dir", default="data")
    p.add_argument("--out_dir", default="out/arms")
    p.add_argument("--figure", help="a PNG file to draw the training curves into")
    p.add_argument("--shown", default="both,words,contrastive,kd", help="arms of the figure")
    args = p.parse_args()
    unknown = {*filter(None, args.arms.split(","))} - {*PAIRS, *IMAGES}
    if unknown:
        p.error(f"no arm is called {', '.join(unknown)}. Arms: {', '.join([*IMAGES, *PAIRS])}")
    for name, script in (("openmoji", "prepare_pairs.py"), ("digits", "prepare_imagenet.py")):
        if args.arms and not os.path.exists(f"{args.data_dir}/{name}/meta.json"):
            run_script(script, f"--data={name}", f"--data_dir={args.data_dir}")
    if args.arms and not os.path.exists(f"{args.data_dir}/families/meta.json"):
        write_families(args.data_dir)
    for seed in range(args.seeds):
        for arm in filter(None, args.arms.split(",")):
            train(arm, seed, args)
    tables(args)
    if args.figure:
        figure(args)
