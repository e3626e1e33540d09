"""Serve: a teacher and its students side by side.

    launch(["runs/demo"])

`page` is the widgets, `markup` their HTML, `app` what they call; `presets` are the prompts, `marks` what an answer got
right, `difference` where two part, `votes` who is preferred, `saved` what is kept; `models` runs each model in a
process of its own (`worker`). Only compressor's cli imports this package.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
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
        """Stop the models and the page."""
        if self.app is not None:
            self.app.close()
        self.blocks.close(verbose=False)


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
    from . import page, saved
    from .app import App
    from .markup import STYLE
    from .models import offers
    from .votes import Ballot

    app, report = None, None
    if replay is not None:
        blocks = page.replay(saved.read(replay))
    else:
        found = offers(list(whats))
        if not found:
            raise UserError("nothing to serve; expected a run folder, or models with --left and --right; name one")
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
        raise UserError(f"port {port} of {host} cannot be had ({error}); expected a free one; give --port") from error
    served = Served(url, app, blocks)
    say(f"serving on {url} (Ctrl-C ends it)")
    if wait:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # a container's first process has no default for it
        try:
            blocks.block_thread()
        finally:
            served.close()
    return served


def _is_demo(what: str) -> bool:
    from compressor.checkpoint import DEMO_FOLDER

    return Path(what).resolve() == DEMO_FOLDER.resolve()


__all__ = ["LOOPBACK", "PORT", "Served", "launch"]
