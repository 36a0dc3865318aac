"""
The experiments of the README, on OpenMoji: every arm with every seed, each by a command that is printed and
can be typed; then the tables, mean +- sample standard deviation over the seeds, and the figure.

    python tests/experiments.py [--seeds=3] [--arms=both,no_image] [--data_dir=data] [--out_dir=out/arms]
    python tests/experiments.py --arms= --figure=curves.png       # of what is there; pip install matplotlib

The same command goes on: what has its result is not run again, what was stopped is continued. The arms of
pairs train for as many minutes: without the image teacher there are as many more steps as its targets take,
with two towers fewer, since their last blocks compute every token and not the CLS token alone.

How the tiny preset was tuned: on the 100 validation families alone, one seed each, frozen text features of
MiniLM, 20,000 pairs unless said, mean recall. Without teacher 20.2, with mse towards its feature 20.0,
contrastive 22.2, weight 1 instead of 0.5 21.7. Batches of 128 for as many pairs 23.7, then half the learning
rate 26.3 (twice: 16.7). Two blocks instead of four for as many seconds 25.3 instead of 22.2, with both
28.3. No gain: 64 px in as many patches 22.0, whitened target of 128 channels 19.0, blocks that start from
MiniLM's 20.5. Three times as many pairs (four blocks, higher rate) 33.8: steps are what is missing.

With text trained from MiniLM's first three blocks, one block above, 430 steps: mean recall 35.0. For about as
many seconds: the first two text blocks frozen 32.7, the text encoder's rate times 0.3 35.0 and times 0.1
30.3, a fifth of the words left out 33.8, 40 or 20 % of the patches dropped instead of 60 % 35.2, batches of
64 33.8. The words are learnt by heart (distillation loss 0.4 in training, 3.1 on validation families), the
pictures are not (2.6 and 2.7): with weaker augmentation, crops from 85 instead of 60 %, turns of 5 instead of
15 degrees, half the change of colour, they are learnt better (2.5 there) and mean recall is 35.8.

Then: the teacher's targets of 128 px, which take 19 s, instead of 224 px, 49 s: 36.0 and 37.5 (35.8 and 34.8;
seeds 0 and 1); its features themselves, by ridge regression on MiniLM's of the names: 45.3 and 46.5. Of 128
px, seed 0: SigLIP's loss (scale 10, bias -10, both learned) 34.7; words of the caption as a further target,
with 1.4 times as long steps, 31.7 after 144 of 360. Several captions as positives, CLS and mean token
together, a frozen image tower: not tried, since a family comes once in a batch, this teacher has one feature,
and the image encoder starts from nothing.
"""
import argparse
import json
import os
import sys

import numpy as np

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)
from model import run_script

TINY, IMAGE = "distill_multimodal.py --preset=tiny", "distill_image.py --preset=tiny"
HALF = "distill_image.py --preset=tiny_half --teacher={teacher}"
OWN_TEXT = "--text_init=random --freeze_embeddings=False"
PAIRS = { # arm -> what it is in the table, its command without --seed and --out_dir
    "both": ("both teachers: `--preset=tiny`", TINY),
    "no_image": ("no image teacher", f"{TINY} --kd_loss=none --max_steps=480"),
    "no_text": ("no MiniLM: text from scratch", f"{TINY} {OWN_TEXT}"),
    "neither": ("neither", f"{TINY} {OWN_TEXT} --kd_loss=none --max_steps=480"),
    "mse": ("distillation by mse", f"{TINY} --kd_loss=mse --kd_weight=1"),
    "queue": ("a queue of 1,024 targets", f"{TINY} --queue_size=1024"),
    "towers": ("two towers, nothing shared",
               f"{TINY} --shared=projection --depth=2 --text_depth=4 --max_steps=340"),
}
IMAGES = {
    "teacher": ("teacher, five blocks", IMAGE),
    "half": ("its first three, distilled", HALF),
    "cut": ("its first three, not distilled", f"{HALF} --max_steps=1 --lr=0"),
    "alternate": ("its blocks 1, 2 and 4, distilled", f"{HALF} --init=alternate"),
    "cls": ("first three, CLS token as target", f"{HALF} --target=cls"),
    "last": ("first three, last block as target", f"{HALF} --target=last"),
    "scratch": ("three blocks from scratch", f"{IMAGE} --depth=3 --target_layers=3 --max_steps=600"),
}
PROBES = { # columns of the second table -> subcommand of evaluate.py
    "kNN": "knn --task=digits", # top-1
    "Probe": "finetune --task=digits --linear_probe --augment=none --batch_size=64 --epochs=30 --lr=1e-2",
    "Tuned": "finetune --task=digits --augment=none --batch_size=64 --epochs=10"}


def results_of(arm, folder):
    """The files in which an arm's numbers are when it is done."""
    names = ["retrieval"] if arm in PAIRS else PROBES
    return [f"{folder}/{name}.json" for name in names]


def train(arm, seed, args):
    """Trains and judges an arm unless it is done. Those whose checkpoints it reads come before it."""
    folder = f"{args.out_dir}/{arm}_{seed}"
    words = (PAIRS | IMAGES)[arm][1].format(teacher=f"{args.out_dir}/teacher_{seed}/ckpt.pt").split()
    data_dir = f"--data_dir={args.data_dir}"
    if all(map(os.path.exists, results_of(arm, folder))):
        return
    run_script(*words, f"--seed={seed}", f"--out_dir={folder}", data_dir)
    if arm in IMAGES:
        for name, command in PROBES.items():
            words = [*command.split(), f"--ckpt={folder}/ckpt.pt", data_dir, f"--json={folder}/{name}.json"]
            if words[0] == "finetune":
                words.append(f"--out_dir={folder}/{name}")
            run_script("evaluate.py", *words)


def spread(values):
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def tables(args):
    for arms, columns in ((PAIRS, ["i2t_r10", "t2i_r10", "mean"]), (IMAGES, list(PROBES))):
        print(f"\n{'arm':40}{'seeds':>6}" + "".join(f"{column:>16}" for column in columns))
        for arm, (title, _) in arms.items():
            rows = []
            for seed in range(args.seeds):
                paths = results_of(arm, f"{args.out_dir}/{arm}_{seed}")
                if all(map(os.path.exists, paths)):
                    found = []
                    for path in paths:
                        with open(path) as f:
                            found.append(json.load(f)["metrics"])
                    rows.append([found[0][k] for k in columns] if arms is PAIRS else
                                [metrics["top1"] for metrics in found])
            if rows:
                cells = [f"{spread(values):>16}" for values in zip(*rows)]
                print(f"{title:40}{len(rows):>6}" + "".join(cells))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--arms", default=",".join([*IMAGES, *PAIRS]), help="in the order of the tables")
    p.add_argument("--data_dir", default="data")
    p.add_argument("--out_dir", default="out/arms")
    p.add_argument("--figure", help="a PNG file to draw the training curves of pairs into")
    args = p.parse_args()
    chosen = [arm for arm in args.arms.split(",") if arm]
    unknown = {*chosen} - {*PAIRS, *IMAGES}
    if unknown:
        p.error(f"no arm is called {', '.join(unknown)}. Arms: {', '.join([*IMAGES, *PAIRS])}")
    for name, script in (("openmoji", "prepare_pairs.py"), ("digits", "prepare_imagenet.py")):
        is_needed = name == "openmoji" or {*chosen} & {*IMAGES}
        if chosen and is_needed and not os.path.exists(f"{args.data_dir}/{name}/meta.json"):
            run_script(script, f"--data={name}", f"--data_dir={args.data_dir}")
    for seed in range(args.seeds):
        for arm in chosen:
            train(arm, seed, args)
    tables(args)
    if args.figure:
        runs = [f"{args.out_dir}/{arm}_{seed}" for arm in PAIRS for seed in range(args.seeds)]
        runs = ",".join(run for run in runs if os.path.exists(f"{run}/log.jsonl"))
        run_script("evaluate.py", "curves", f"--runs={runs}", f"--picture={args.figure}")
