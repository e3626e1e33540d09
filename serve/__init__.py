"""Serve: a teacher and its students side by side.

    launch(["runs/demo"])

`page` is the widgets, `markup` their HTML, `app` what they call; `presets` are the prompts, `marks` what an answer got
right, `difference` where two part, `votes` who is preferred, `saved` what is kept; `models` runs each model in a
process of its own (`worker`). Only compressor's cli imports this package.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import UserError

if TYPE_CHECKING:
    from .app import App

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORT = 7860


@dataclass(frozen=True)
class Served:
    """A running page. app: None in a replay, which has no models."""

    url: str
    app: App | None
    blocks: Any

    def close(self) -> None:
        """Stop the page, then the models."""
        self.blocks.close(verbose=False)
        if self.app is not None:
            self.app.close()


def launch(
    whats: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    auth: str | None = None,
    replay: Path | str | None = None,
    threads: int | None = None,
    wait: bool = True,
    say: Callable[[str], None] = lambda message: None,
) -> Served:
    """Open the page on `whats` (a run folder, or models by name), or on a saved comparison with `replay`.

    port: 0 for any that is free. auth: "user:password", asked for on every host but loopback. wait: until interrupted;
    else the running page is returned.
    Raises UserError for what cannot be offered, a host without auth, and a port that is taken.
    """
    if host not in LOOPBACK and not auth:
        raise UserError(
            f"{host} can be reached by others; expected a password; give --auth USER:PASSWORD, or COMPRESSOR_AUTH"
        )
    user, _, password = (auth or "").partition(":")
    if auth and not (user and password):
        raise UserError("--auth is no USER:PASSWORD; expected both, with a colon between; write it so")
    from . import saved
    from .markup import STYLE
    from .models import offers
    from .votes import Ballot

    found = [] if replay is not None else offers(list(whats))
    kept = saved.read(replay) if replay is not None else None
    if not (found or kept):
        raise UserError("nothing to serve; expected a run folder, or models with --left and --right; name one")
    if port:
        _check_port(host, port)
    from . import page  # gradio, which takes seconds: what is wrong is told before
    from .app import App

    app, report = None, None
    if kept is not None:
        blocks = page.replay(kept)
    else:
        run = next((Path(what) for what in whats if (Path(what) / "run.json").exists()), None)
        report = run / "report.html" if run and (run / "report.html").is_file() else None
        app = App(found, Ballot(run / "votes.jsonl" if run else None), threads=threads)
        blocks = page.Page(app, demo=_is_demo(found[0].what), report=report).blocks
    try:
        _, url, _ = blocks.queue(default_concurrency_limit=page.CLIENTS).launch(
            server_name=host,
            server_port=port or None,
            auth=(user, password) if auth else None,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=["api"],
            css=STYLE,
            max_threads=4 * page.CLIENTS,
            max_file_size="1mb",
            allowed_paths=[str(report.resolve())] if report else None,
        )
    except OSError as error:
        if app is not None:
            app.close()
        raise UserError(f"{host} cannot be listened on ({error}); expected an address of this machine") from error
    served = Served(url, app, blocks)
    say(f"serving on {url} (Ctrl-C ends it)")
    if wait:
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass  # how a server ends
        finally:
            served.close()
    return served


def _check_port(host: str, port: int) -> None:
    with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} of {host} cannot be had ({error.strerror}); expected a free one; give --port"
            ) from error


def _is_demo(what: str) -> bool:
    from compressor.checkpoint import DEMO_FOLDER

    return Path(what).resolve() == DEMO_FOLDER.resolve()


__all__ = ["LOOPBACK", "PORT", "Served", "launch"]
