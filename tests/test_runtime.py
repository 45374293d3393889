"""Files appear whole or not at all; signals wait for the step; errors are one line."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import runtime


def test_atomic_write_replaces_the_file_only_when_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with runtime.atomic_write(path, "w") as f:
        f.write("new")
        f.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "")])
def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), runtime.atomic_write(path, "w") as f:
        f.write("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_another_file_that_cannot_be_read_is_not_taken_for_the_one_written(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        with runtime.atomic_write(tmp_path / "file"):
            open(tmp_path / "absent")
    assert raised.value.filename == str(tmp_path / "absent") or raised.value.filename == (
        tmp_path / "absent"
    )
    assert os.listdir(tmp_path) == []


def test_full_disk_is_named(tmp_path):
    with pytest.raises(OSError, match="No space left"), runtime.atomic_write(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_torch_save_on_a_full_disk_keeps_the_old_file(tmp_path):
    """RLIMIT_FSIZE stands for the full disk: the write fails half-way."""
    program = """
import resource, signal, sys, torch, runtime
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
def main(_):
    with runtime.atomic_write("file") as f:
        torch.save({"x": torch.zeros(2**18)}, f)
runtime.run(main, None)
"""
    (tmp_path / "file").write_text("old")
    env = os.environ | {"PYTHONPATH": os.path.dirname(runtime.__file__)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert (
        result.stderr
        == "-c: file: cannot be written (File too large); what was there is untouched\n"
    )
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_stop_signal_waits_and_the_second_does_not():
    before = signal.getsignal(signal.SIGINT)
    with runtime.StopSignal() as stop:
        assert stop.signum is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("--k 0: too few\nsecond line"), 2, "--k 0: too few second line"),
        (FileNotFoundError(2, "No such file or directory", "x.pt"), 2, "x.pt: No such file"),
        (MemoryError(), 2, "--batch-size"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_one_line_and_a_status(capsys, error, status, line):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stopped:
        runtime.run(main, None)
    assert stopped.value.code == status
    message = capsys.readouterr().err
    assert line in message and message.count("\n") == 1


def test_programming_errors_keep_their_traceback():
    def main(args):
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        runtime.run(main, None)


def test_absent_device_and_unknown_dtype_name_the_choices():
    with pytest.raises(ValueError, match="there is .*cpu"):
        runtime.pick_device("tpu")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        runtime.pick_dtype("float8", torch.device("cpu"))
    assert runtime.pick_dtype("float32", torch.device("cpu")) is torch.float32


def test_unwritable_folder_names_the_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--out .*cannot be written"):
        runtime.writable_folder(str(tmp_path / "file" / "folder"), "--out")


def test_rng_state_round_trips():
    device = torch.device("cpu")
    state = runtime.get_rng(device)
    a = torch.rand(3)
    runtime.set_rng(state, device)
    assert torch.equal(a, torch.rand(3))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator, Linux's /proc")
def test_memory_between_small_blocks_is_given_back_beyond_a_limit():
    program = """if True:
        import torch, runtime
        runtime.keep_freed_memory()
        held = lambda: runtime.memory(torch.device("cpu"), reset=True) >> 20
        start, kept, large = held(), [], []
        for i in range(20):
            large.append(torch.ones(2**22))  # 16 MiB each
            kept.append(torch.ones(2**12))
        large.clear()
        runtime.give_back_memory()
        between = held() - start
        runtime.give_back_memory(unused=2**27)
        print(between, held() - start, all(bool((t == 1).all()) for t in kept))
    """
    root = Path(runtime.__file__).parent
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    before, after, whole = out.stdout.split()
    assert int(before) > 300 > 100 > int(after) and whole == "True"


def test_two_runs_do_not_write_one_file(tmp_path):
    path = tmp_path / "samples.jsonl"
    first, second = (runtime.Samples(path, ["settings"]) for _ in range(2))

    def make(numbers):
        with pytest.raises(ValueError, match="another run is writing it"):
            second.fill(4, 2, lambda numbers: [{"text": "other"} for _ in numbers])
        return [{"text": str(i)} for i in numbers]

    first.fill(4, 2, make)
    with pytest.raises(ValueError, match="another run wrote it just now"):
        second.fill(4, 2, lambda numbers: [{"text": "other"} for _ in numbers])
    third = runtime.Samples(path, ["settings"])
    third.fill(4, 2, make)  # there is nothing left to do
    first.fill(6, 2, lambda numbers: [{"text": str(i)} for i in numbers])
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert texts == ["0", "1", "2", "3", "4", "5"]
