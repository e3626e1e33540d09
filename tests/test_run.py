"""The run folder: whole files or none, marks only for finished stages, one process at a time."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest

from compressor.errors import UserError
from compressor.run import Run, read_json, staged, write_json, write_text


def test_a_stage_is_marked_with_its_time(tmp_path):
    run = Run(tmp_path / "run")
    with run.locked():
        assert run.done("surgery") is None
        run.note(seeds={"seed": 4})
        run.mark("surgery", started=time.monotonic() - 2, status="ok")
    mark = Run(tmp_path / "run").done("surgery")
    assert mark is not None
    assert mark["status"] == "ok"
    assert 2 <= mark["seconds"] < 4
    assert run.read_facts()["seeds"] == {"seed": 4}


def test_a_second_process_is_refused_and_the_lock_dies_with_its_holder(tmp_path):
    code = f"from compressor.run import Run\nwith Run({str(tmp_path)!r}).locked():\n print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another process is working"), Run(tmp_path).locked():
        pass
    holder.kill()
    holder.wait()
    with Run(tmp_path).locked():
        pass


def test_staged_folders_replace_the_old_one_only_when_whole(tmp_path):
    folder = tmp_path / "student"
    with staged(folder) as new:
        (new / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), staged(folder) as new:
        (new / "a").write_text(str(1 / 0))
    assert (folder / "a").read_text() == "1"
    with staged(folder) as new:
        (new / "b").write_text("3")
    assert [p.name for p in folder.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["student"]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_text(path, "x" * 10)
    with pytest.raises(UserError, match="the disk is full"), staged(tmp_path / "student") as new:
        (new / "a").write_text("1")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_broken_json_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"could not read .*run.json"):
        read_json(tmp_path / "run.json")


def safetensors_file(path):
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(100_000)}, path)


def pickled_state(path):
    import torch

    torch.save({"w": torch.zeros(100_000)}, path)


@pytest.mark.parametrize("write", [safetensors_file, pickled_state])
def test_a_disk_that_takes_no_more_is_one_line_whoever_writes(tmp_path, write):
    """Libraries have exceptions of their own for it; here a real refused write of more than 100 kB."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="could not write") as caught, staged(tmp_path / "student") as new:
            write(new / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
