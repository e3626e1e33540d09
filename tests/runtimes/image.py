"""Runs the Dockerfile's steps in a clean root made with debootstrap, then the image's commands: `make image`.

For where no base image can be had. It wants root and Debian's debootstrap. pip's own variables (PIP_*) are handed to
the steps, and IMAGE_MOUNTS names what else of this machine they may read, joined by colons: a local package index, a
certificate.

It holds the image to what its comments promise: the CLI answers as a user who is not root, `distill --teacher demo`
leaves a run, the app refuses to start without a password, and with one it serves that run and gets healthy.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[2]
SUITES = {"12": "bookworm", "13": "trixie"}
AUTH = "me:secret"


class Image:
    """A root folder, and what the Dockerfile said of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder, self.user = "/", "root"
        self.env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.arguments = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        self.entry: list[str] = []
        self.command: list[str] = []
        self.health = ""

    def build(self, dockerfile: Path) -> None:
        """Take every instruction in order. Raises ValueError for one that is not known here."""
        text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.M)
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            if line.strip():
                print(f"--- {line}", flush=True)
                name, _, rest = line.partition(" ")
                method = getattr(self, f"_{name.lower()}", None)
                if method is None:
                    raise ValueError(f"{name} is not known here")
                method(rest.strip())

    def run(self, command: list[str], **settings: Any) -> subprocess.Popen[str]:
        """A command inside, as the image's user."""
        spec = ["chroot", f"--userspec={self.user}", str(self.root), "/usr/bin/env", "-i", "-C", self.folder]
        home = "/root" if self.user == "root" else f"/home/{self.user}"
        variables = [f"{key}={value}" for key, value in ({"HOME": home} | self.env | self.arguments).items()]
        return subprocess.Popen([*spec, *variables, *command], text=True, **settings)

    def _from(self, base: str) -> None:
        release = re.fullmatch(r"debian:(\d+)\.\d+-slim", base)
        if not release:
            raise ValueError(f"{base} is no slim Debian")
        subprocess.run(["debootstrap", "--variant=minbase", SUITES[release[1]], str(self.root)], check=True)
        for path in ("/etc/resolv.conf", "/etc/hosts"):
            shutil.copy(path, self.root / path[1:])
        for path, kind in (("proc", "proc"), ("sys", "sysfs")):
            subprocess.run(["mount", "-t", kind, kind, str(self.root / path)], check=True)
        self.mount("/dev", "/dev")
        for path in filter(None, os.environ.get("IMAGE_MOUNTS", "").split(":")):
            self.mount(path, path, "ro")

    def mount(self, path: str, at: str, mode: str = "rw") -> None:
        """Make a folder or a file of this machine seen inside."""
        target = self.root / at[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir(exist_ok=True) if Path(path).is_dir() else target.touch()
        subprocess.run(["mount", "--bind", path, str(target)], check=True)
        subprocess.run(["mount", "-o", f"remount,bind,{mode}", str(target)], check=True)

    def _run(self, command: str) -> None:
        if self.run(["/bin/sh", "-c", command]).wait() != 0:
            raise SystemExit(f"failed: {command}")

    def _copy(self, words: str) -> None:
        *sources, target = words.split()
        tracked = subprocess.check_output(["git", "ls-files", "--", *sources], cwd=HERE, text=True).splitlines()
        home = self.root / Path(self.folder, target).as_posix()[1:]
        for source in sources:
            for file in (f for f in tracked if f == source or f.startswith(f"{source}/")):
                to = home / (file if (HERE / source).is_file() else os.path.relpath(file, source))
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(HERE / file, to)

    def _workdir(self, folder: str) -> None:
        self.folder = folder
        (self.root / folder[1:]).mkdir(parents=True, exist_ok=True)

    def _arg(self, name: str) -> None:
        if not name.startswith("PIP_"):
            raise ValueError(f"ARG {name} is not known here")

    def _env(self, words: str) -> None:
        self.env |= dict(word.split("=", 1) for word in shlex.split(words))

    def _user(self, name: str) -> None:
        self.user = name

    def _expose(self, port: str) -> None:
        pass

    def _healthcheck(self, words: str) -> None:
        self.health = words.partition("CMD ")[2]

    def _entrypoint(self, words: str) -> None:
        self.entry = json.loads(words)

    def _cmd(self, words: str) -> None:
        self.command = json.loads(words)


def main() -> None:
    """Build, then hold the image to its promises."""
    if os.environ.get("IN_NAMESPACE") != "1":  # mounts of its own, which end with it
        os.environ["IN_NAMESPACE"] = "1"
        os.execvp("unshare", ["unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable, *sys.argv])
    root = Path(sys.argv[1])
    image = Image(root)
    image.build(HERE / "Dockerfile")
    image.arguments.clear()  # an ARG is gone when the image runs

    data = root.with_name(f"{root.name}-data")
    data.mkdir(exist_ok=True)
    shutil.chown(data, 1000)
    image.mount(str(data), "/data")
    small = ["--set", "distill.tokens=20000", "--set", "distill.heldout_rows=16", "--set", "evaluate.prompts=8"]
    for command in (["--help"], ["distill", "--teacher", "demo", "--target", "50%", "--out", "/data", *small]):
        code = image.run([*image.entry, *command]).wait()
        print(f"--- {' '.join(command)}: {code}", flush=True)
        assert code == 0
    assert (data / "student" / "config.json").stat().st_uid == 1000

    refused = image.run([*image.entry, *image.command], stderr=subprocess.PIPE)
    words = refused.communicate()[1].strip()
    print(f"--- without a password: {refused.returncode}: {words}", flush=True)
    assert refused.returncode == 2
    assert "expected a password" in words

    image.env["COMPRESSOR_AUTH"] = AUTH
    app = image.run([*image.entry, *image.command])
    try:
        for _ in range(60):
            if image.run(["/bin/sh", "-c", image.health], stderr=subprocess.DEVNULL).wait() == 0:
                break
            time.sleep(1)
        else:
            raise SystemExit("never healthy")
        print("--- healthy", flush=True)
        from gradio_client import Client

        client = Client("http://127.0.0.1:7860/", auth=tuple(AUTH.split(":")), verbose=False)
        found = client.predict("Hello!", ["teacher", "student", "onnx-int4"], api_name="/compare")
        print([side["text"] for side in found["sides"]])
        assert all(side["figures"]["tokens"] > 0 for side in found["sides"])
    finally:
        app.send_signal(signal.SIGTERM)
        app.wait(timeout=30)
    parts = subprocess.check_output(
        ["du", "-sch", *(str(root / part) for part in ("usr", "var", "opt/venv"))], text=True
    )
    print(f"the image's steps and commands ran; {parts.split()[-2]} on disk")


if __name__ == "__main__":
    main()
