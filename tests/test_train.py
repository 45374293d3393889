"""Runs can be stopped, killed and resumed anywhere; bad input costs one line and nothing else."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Stopped, die_before, same

import train
import training
import weights

ROOT = Path(train.__file__).parent
TINY = (
    "--config nano --tokenizer bytes --batch-size 4 --steps 8 --warmup 2 --eval-every 4 "
    "--eval-batches 1 --log-every 1 --save-every 3 --dtype float32 --device cpu --k 2"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"the number {i} is followed by {i + 1}.\n" for i in range(400)))
    return file


@pytest.fixture
def go(text, tmp_path, capsys):
    """Run train.py in this process: go("--sm", out="a") -> folder of the run."""

    def call(*flags, out="out"):
        folder = tmp_path / out
        cache = str(text.parent / "cache")
        common = ["--data", str(text), "--cache", cache, "--out", str(folder)]
        given = [] if "--resume" in flags else TINY[4:] if "--init" in flags else TINY
        assert train.main(train.parse([*given, *common, *flags])) == 0
        return folder

    return call


def checkpoint(folder):
    return weights.load_checkpoint(str(folder), "--ckpt")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


TRAINED = ("model", "ema", "updates", "softmask", "optimizer", "step", "generator", "rng")


def assert_same_run(a, b):
    a, b = checkpoint(a), checkpoint(b)
    for key in TRAINED:
        assert same(a[key], b[key]), key


# What a run leaves behind


def test_sm_run_writes_checkpoint_omegas_and_metrics(go, capsys):
    folder = go("--sm", "--sm-start", "3")
    assert sorted(os.listdir(folder)) == ["ckpt.pt", "curves.svg", "metrics.jsonl", "softmask.json"]
    omegas = json.loads((folder / "softmask.json").read_text())
    assert omegas["k"] == 2 and omegas["step"] == 8
    assert 0 < omegas["omega_s"] < 1 and omegas["omega_a"] > 0 > omegas["omega_b"]
    logs = [e for e in lines(folder) if "loss" in e]
    assert [e["step"] for e in logs] == list(range(1, 9))
    wanted = {"step", "loss", "lr", "omega_s", "omega_a", "omega_b", "tokens_per_second"}
    assert wanted | {"lr_sm", "grad_norm", "memory"} == logs[-1].keys()
    assert logs[-1]["omega_s"] == omegas["omega_s"] != logs[0]["omega_s"]
    evaluations = [e for e in lines(folder) if "val_nelbo_1pass" in e]
    assert [e["step"] for e in evaluations] == [4, 8]
    assert all("val_nelbo_2pass" in e for e in evaluations)
    printed = capsys.readouterr().out
    assert "two passes" in printed and "bits per byte" in printed and "--- sample 1" in printed


def test_binary_run_has_no_omegas(go):
    folder = go()
    assert sorted(os.listdir(folder)) == ["ckpt.pt", "curves.svg", "metrics.jsonl"]
    assert checkpoint(folder)["softmask"] is None
    assert all("omega_s" not in e and "val_nelbo_2pass" not in e for e in lines(folder))


def test_training_lowers_the_loss(go):
    folder = go(
        "--sm", "--steps", "150", "--lr", "3e-3", "--batch-size", "16", "--eval-every", "150"
    )
    losses = [e["loss"] for e in lines(folder) if "loss" in e]
    assert sum(losses[-20:]) / 20 < 0.75 * sum(losses[:20]) / 20


def test_binary_and_sm_runs_see_the_same_data_until_sm_starts(go):
    sm, binary = go("--sm", "--sm-start", "4", out="sm"), go(out="binary")
    a, b = ([e["loss"] for e in lines(f) if "loss" in e] for f in (sm, binary))
    assert a[:4] == b[:4] and a[4:] != b[4:]


def test_omegas_start_from_measured_entropies_where_sm_starts(go, monkeypatch):
    monkeypatch.setattr(training, "negative_entropies", lambda *a: torch.tensor([-3.0]))
    state = checkpoint(go("--sm", "--sm-start", "7", "--lr-sm", "1e-9"))
    omegas = weights.build_softmask(state).omegas()
    assert omegas["omega_b"] == pytest.approx(-1.5, abs=1e-4)
    assert omegas["omega_a"] == pytest.approx(10 / 3, abs=1e-4)


def test_accumulated_gradients_equal_one_large_batch(go):
    flags = ("--sm", "--sm-start", "0", "--steps", "3")
    one = checkpoint(go(*flags, "--batch-size", "8", out="one"))
    two = checkpoint(go(*flags, "--batch-size", "2", "--grad-accum", "4", out="two"))
    for name, p in one["model"].items():
        torch.testing.assert_close(p, two["model"][name], atol=2e-5, rtol=1e-3)


def test_ema_follows_its_formula():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    ema = training.EMA([p], decay=0.5)
    shadow = 1.0
    for n, value in enumerate([2.0, 5.0, -1.0], start=1):
        p.data.fill_(value)
        ema.update()
        d = min(0.5, (1 + n) / (10 + n))
        shadow -= (1 - d) * (shadow - value)
        assert ema.shadow[0].item() == pytest.approx(shadow)
    with ema.applied():
        assert p.item() == pytest.approx(shadow)
    assert p.item() == -1.0


def test_learning_rate_rises_stays_and_falls():
    rates = [train.learning_rate(s, 100, warmup=10, decay=0.5) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[30] == rates[49] == 1.0
    assert rates[75] == pytest.approx(0.5) and 0 < rates[99] < 0.05
    assert train.learning_rate(99, 100, warmup=0, decay=0.0) == 1.0


# Starting from weights


def test_init_adds_three_scalars_to_a_binary_model(go):
    base = go(out="base")
    sm = go("--init", str(base / "ckpt.pt"), "--sm", "--steps", "1", "--lr", "1e-9", out="sm")
    a, b = checkpoint(base), checkpoint(sm)
    assert all(torch.allclose(a["model"][n], b["model"][n], atol=1e-7) for n in a["model"])
    assert b["softmask"]["k"] == 2
    first = lines(sm)[0]
    assert first["step"] == 0
    last = [e for e in lines(base) if "val_nelbo_1pass" in e][-1]
    raw_is_not_averaged = abs(first["val_nelbo_1pass"] - last["val_nelbo_1pass"])
    assert raw_is_not_averaged < 0.5


def test_init_from_an_sm_model_keeps_its_omegas_and_can_drop_them(go):
    base = go("--sm", "--sm-start", "0", out="base")
    again = go("--init", str(base), "--sm", "--steps", "1", "--lr-sm", "1e-9", out="again")
    a, b = (weights.build_softmask(checkpoint(f)).omegas() for f in (base, again))
    assert a == pytest.approx(b, abs=1e-6)
    assert checkpoint(go("--init", str(base), "--steps", "1", out="plain"))["softmask"] is None


# Resuming


@pytest.mark.parametrize("flags", [("--sm", "--sm-start", "2"), ("--sm", "--k", "V"), ()])
def test_resume_at_an_odd_step_is_exact_to_the_bit(go, monkeypatch, flags):
    flags = (*flags, "--dropout", "0.1", "--grad-accum", "2")
    whole = go(*flags, out="whole")
    with monkeypatch.context() as m:
        die_before(m, 5)  # the last save was at step 3
        with pytest.raises(Stopped):
            go(*flags, out="parts")
    assert checkpoint(whole.parent / "parts")["step"] == 3
    parts = go("--resume", out="parts")
    assert_same_run(whole, parts)
    of_the_machine = {"tokens_per_second", "memory"}
    a, b = (
        [{k: v for k, v in e.items() if k not in of_the_machine} for e in lines(folder)]
        for folder in (parts, whole)
    )
    assert a == b


def test_resume_of_a_time_conditioned_bfloat16_run_is_exact(go, monkeypatch):
    flags = ("--sm", "--time-conditioning", "--dtype", "bfloat16")
    whole = go(*flags, out="whole")
    with monkeypatch.context() as m:
        die_before(m, 7)
        with pytest.raises(Stopped):
            go(*flags, out="parts")
    assert_same_run(whole, go("--resume", out="parts"))


def test_resume_can_lengthen_a_run(go):
    folder = go("--sm")
    go("--resume", "--steps", "11")
    assert checkpoint(folder)["step"] == 11
    assert [e["step"] for e in lines(folder) if "loss" in e] == list(range(1, 12))


def test_resume_of_a_finished_run_only_reports(go, capsys):
    folder = go()
    before = (folder / "ckpt.pt").read_bytes()
    go("--resume")
    assert (folder / "ckpt.pt").read_bytes() == before
    assert "bits per byte" in capsys.readouterr().out


# Processes that are stopped and killed


def command(text, out, *flags):
    cache = str(text.parent / "cache")
    common = ["--data", str(text), "--cache", cache, "--out", str(out)]
    return [sys.executable, str(ROOT / "train.py"), *TINY, *common, *flags]


ENV = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_finishes_the_step_saves_and_says_how_to_go_on(go, text, tmp_path, signum, status):
    out = tmp_path / "stopped"
    flags = ["--sm", "--steps", "100000", "--save-every", "100000", "--eval-every", "100000"]
    process = subprocess.Popen(
        command(text, out, *flags),
        env=ENV,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 1000:
            break
        time.sleep(0.05)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "--resume" in errors and "Traceback" not in errors
    state = checkpoint(out)
    assert state["step"] >= 1 and str(state["step"]) in errors
    assert lines(out)[-1]["step"] == state["step"]
    go("--resume", "--steps", str(state["step"] + 2), out="stopped")
    assert checkpoint(out)["step"] == state["step"] + 2


KILLER = """
import os, sys
count, deadly = 0, int(sys.argv.pop(1))
def mortal(f):
    def call(*a, **k):
        global count
        count += 1
        if count == deadly:
            os.kill(os.getpid(), 9)
        return f(*a, **k)
    return call
import runtime
os.replace, os.fsync = mortal(os.replace), mortal(os.fsync)
import train
runtime.run(lambda argv: train.main(train.parse(argv)), sys.argv[1:])
"""


def test_run_killed_between_any_two_writes_resumes_to_the_same_end(go, text, tmp_path):
    """Each fsync and each rename of a run is in turn the last thing that happens before kill -9.

    The cache is warm, so that the writes are those of the run: metrics, checkpoints and omegas.
    """
    whole = go("--sm", "--sm-start", "2", out="whole")
    deadly, killed, resumed = 0, True, 0
    while killed:
        deadly += 1
        out = tmp_path / f"killed-{deadly}"
        arguments = command(text, out, "--sm", "--sm-start", "2")[2:]
        result = subprocess.run(
            [sys.executable, "-c", KILLER, str(deadly), *arguments],
            env=ENV | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        killed = result.returncode == -signal.SIGKILL
        if killed and (out / "ckpt.pt").exists():
            assert_same_run(whole, go("--resume", out=out.name))
            assert (out / "softmask.json").read_text() == (whole / "softmask.json").read_text()
            assert not list(out.glob("*.tmp"))
            resumed += 1
        elif killed:
            assert_same_run(whole, go("--sm", "--sm-start", "2", out=out.name))
        else:
            assert result.returncode == 0, result.stderr
    assert resumed >= 6


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(go, monkeypatch, tmp_path):
    real = training.diffusion_loss

    def diffusion_loss(model, x0, *rest):
        return real(model, x0, *rest) * (math.nan if model.training and armed else 1)

    armed = False
    folder = go("--sm")
    before = (folder / "ckpt.pt").read_bytes()
    monkeypatch.setattr(training, "diffusion_loss", diffusion_loss)
    armed = True
    with pytest.raises(ValueError, match=r"loss nan.* step 9.*holds the last save.*--lr"):
        go("--resume", "--steps", "20")
    assert (folder / "ckpt.pt").read_bytes() == before


# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sm", "--k", "259"], "--k 259.*vocabulary's 258"),
        (["--sm", "--k", "0"], "--k 0"),
        (["--sm", "--k", "many"], "--k many"),
        (["--init", "absent.pt"], r"--init absent\.pt: no such file"),
        (["--block-size", "100000"], "a block takes 100000"),
        (["--block-size", "0"], "--block-size 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--p-sm", "1.5"], "--p-sm 1.5"),
        (["--b-l", "0.9", "--b-h", "0.2"], "b_l < b_h"),
        (["--b-l", "0"], "b_l"),
        (["--lr", "-1"], "--lr -1"),
        (["--device", "abacus"], "--device abacus"),
        (["--data", "absent.txt"], r"--data absent\.txt"),
        (["--resume"], "--resume: no run in --out"),
    ],
)
def test_bad_flag_is_named_and_nothing_is_written(text, tmp_path, flags, message):
    out = tmp_path / "out"
    base = ["--data", str(text), "--cache", str(text.parent / "cache"), "--out", str(out)]
    with pytest.raises((ValueError, OSError), match=message):
        train.main(train.parse([*(TINY[4:] if "--init" in flags else TINY), *base, *flags]))
    assert not out.exists()


def test_unknown_size_is_refused_with_the_choices(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse(["--config", "gigantic"])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "small" in message and message.count("\n") == 1


def test_run_is_not_overwritten_unless_asked(go):
    folder = go()
    before = (folder / "ckpt.pt").read_bytes()
    with pytest.raises(ValueError, match=r"holds a run.*--resume.*--overwrite"):
        go("--seed", "2")
    assert (folder / "ckpt.pt").read_bytes() == before
    go("--seed", "2", "--overwrite")
    assert (folder / "ckpt.pt").read_bytes() != before


def test_resume_refuses_what_a_run_cannot_change(go):
    go("--sm")
    with pytest.raises(ValueError, match="--k 3: the run has 2"):
        go("--resume", "--k", "3")


def test_init_refuses_another_vocabulary_and_another_size(go):
    base = go(out="base")
    with pytest.raises(ValueError, match="--tokenizer stdlib: --init was made with bytes"):
        go("--init", str(base), "--tokenizer", "stdlib", out="other")
    with pytest.raises(ValueError, match="--config cpu: for a network from scratch"):
        go("--init", str(base), "--config", "cpu", out="other")
    with pytest.raises(ValueError, match="--block-size 33: the network takes 32"):
        go("--init", str(base), "--block-size", "33", out="other")


def test_a_step_is_saved_before_it_is_validated(go, monkeypatch, tmp_path):
    def report(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "report", report)
    with pytest.raises(KeyboardInterrupt):
        go("--eval-every", "5", "--save-every", "5")
    assert checkpoint(tmp_path / "out")["step"] == 5


def test_overwritten_run_cannot_be_taken_for_the_new_one(go, monkeypatch):
    folder = go("--sm")
    die_before(monkeypatch, 1)
    with pytest.raises(Stopped):
        go("--overwrite")
    assert os.listdir(folder) == ["metrics.jsonl"]


def test_init_goes_on_with_the_text_of_its_checkpoint(go, text):
    base = go(out="base")
    args = train.parse(["--init", str(base), "--out", "x"])
    train.inherit(args, checkpoint(base))
    assert args.data == str(text)


def test_init_refuses_another_k(go):
    base = go("--sm", out="base")
    with pytest.raises(ValueError, match="--k 5: --init was soft-masked with k 2"):
        go("--init", str(base), "--sm", "--k", "5", out="other")


def test_resume_tells_that_the_text_has_changed(go, text, capsys):
    go("--sm", "--steps", "3")
    before = text.read_text()
    text.write_text(before + "and more\n")
    go("--resume", "--steps", "4")
    assert "has changed since" in capsys.readouterr().err
    text.write_text(before)
