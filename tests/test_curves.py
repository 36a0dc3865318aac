"""
evaluate.py curves: which number, of which runs, in which colour; logs that are torn, unfinished or empty.
"""
import json
import os
import re

import pytest

import evaluate
from conftest import flags, refused


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(run, seed, *records): a log with these records after its start."""
    monkeypatch.chdir(tmp_path)

    def write(run, *records, seed=0, max_steps=20):
        os.makedirs(run, exist_ok=True)
        start = {"step": 0, "command": ["python", "x.py"], "with": "torch", "settings": {
            "seed": seed, "max_steps": max_steps}}
        with open(f"{run}/log.jsonl", "w") as f:
            f.write("".join(json.dumps(record) + "\n" for record in (start, *records)))
    return write


def records(values, key="val_mean", **rest):
    """Validations at steps 10, 20, .., a minute and a half apart, each between two other records."""
    lines = []
    for i, value in enumerate(values, 1):
        lines.append({"step": 10 * i - 5, "minutes": 1.5 * i - 1, "loss": 1 / i})
        lines.append({"step": 10 * i, "minutes": 1.5 * i, "best": key, key: value, **rest})
    return lines


def curves(*runs, **knobs):
    return evaluate.main(["curves", f"--runs={','.join(runs)}", *flags(knobs)])


@pytest.mark.parametrize("over, points", [("step", [(10, 3), (20, 5), (30, 4)]),
                                          ("minutes", [(1.5, 3), (3.0, 5), (4.5, 4)])])
def test_points(write, over, points):
    """Of what the run itself calls best, or of any other key."""
    write("out/a", *records([3, 5, 4]), max_steps=30)
    result = curves("out/a/", over=over)
    assert result["key"] == "val_mean" and result["runs"] == {"out/a": {"points": points, "best": 5}}
    assert curves("out/a/log.jsonl", key="loss", over=over)["runs"]["out/a/log.jsonl"]["best"] == 1 / 3


def test_seeds_of_an_arm_have_one_colour(write, monkeypatch):
    """Arms are told by the seed at the end of their names, if it is their seed."""
    for seed in range(3):
        write(f"out/both_{seed}", *records([seed, seed + 3]), seed=seed)
    write("out/v1", *records([1, 2]))
    write("out/v2", *records([1, 2]))
    drawn, plain = [], evaluate.draw_curves
    monkeypatch.setattr(evaluate, "draw_curves", lambda *args: drawn.append(args) or plain(*args))
    curves(*(f"out/both_{seed}" for seed in range(3)), "out/v1", "out/v2", picture="new/curves.png")
    (arms, *_), = drawn
    assert {label: len(runs) for label, runs in arms.items()} == {"out/both": 3, "out/v1": 1, "out/v2": 1}
    assert os.path.getsize("new/curves.png") > 1000


def test_a_run_that_goes_on_and_torn_lines(write, capsys):
    """The last may just be written; what is garbled further up is named with its line, too."""
    write("a", *records([1, 2]), max_steps=50)
    with open("a/log.jsonl", "a") as f:
        f.write('null\n{"settings": 5}\n{"best": []}\n\0\xff{\n'
                + "[" * 100_000 + '\n{"step": 25, "val_me')
    assert len(curves("a")["runs"]["a"]["points"]) == 2
    said = capsys.readouterr().out
    assert "a: at step 20 of 50, still going or stopped" in said
    assert re.findall(r"(?m)^a/log.jsonl line (\d+)", said) == ["6", "7", "9", "10", "11"]


def test_runs_without_the_key(write, capsys):
    """Are left out, and what they have is said; NaN is no point."""
    write("a", *records([1, float("nan"), 2]), max_steps=30)
    write("b", *records([1], "val_top1"))
    write("new")
    result = curves("a", "b", "new")
    assert [*result["runs"]] == ["a"] and len(result["runs"]["a"]["points"]) == 2
    assert "b: no val_mean over step; it has loss, minutes, val_top1" in capsys.readouterr().out
    assert "no run has accuracy" in refused(curves, "a", "b", key="accuracy")
    assert "no log at none" in refused(curves, "a", "none")
