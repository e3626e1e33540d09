"""Serve: a teacher and its students side by side.

    launch(["runs/demo"])

`app` is the page and `page` its HTML; `presets` are the prompts, `marks` what an answer got right, `difference` where
two part, `votes` who is preferred, `saved` what is kept; `models` runs each model in a process of its own (`worker`).
Only compressor's cli imports this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compressor.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORT = 7860


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
) -> Any:
    """Open the page on `whats` (a run folder, or models by name), or on a saved comparison with `replay`.

    port: 0 for any that is free. auth: "user:password", asked for on every host but loopback. wait: until interrupted;
    else return the running gradio.Blocks, which has `app_of_models` (None in a replay), `local_url` and `close`.
    Raises UserError for what cannot be offered, a host without auth, and a port that is taken.
    """
    if host not in LOOPBACK and not auth:
        raise UserError(f"{host} can be reached by others; expected a password; give --auth USER:PASSWORD")
    user, _, password = (auth or "").partition(":")
    if auth and not (user and password):
        raise UserError("--auth is no USER:PASSWORD; expected both, with a colon between; write it so")
    from . import app as pages
    from . import saved
    from .models import offers
    from .page import STYLE
    from .votes import Ballot

    app = None
    if replay is not None:
        blocks = pages.replay(saved.read(replay))
    else:
        found = offers(list(whats))
        if not found:
            raise UserError("nothing to serve; expected a run folder, or models with --left and --right; name one")
        run = next((Path(what) for what in whats if (Path(what) / "run.json").exists()), None)
        app = pages.App(found, Ballot(run / "votes.jsonl" if run else None), threads=threads)
        blocks = pages.build(app, demo=_is_demo(found[0].what))
    try:
        _, url, _ = blocks.queue(default_concurrency_limit=pages.CLIENTS).launch(
            server_name=host,
            server_port=port or None,
            auth=(user, password) if auth else None,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=["api"],
            css=STYLE,
            max_threads=4 * pages.CLIENTS,
            max_file_size="1mb",
        )
    except OSError as error:
        raise UserError(f"port {port} of {host} cannot be had ({error}); expected a free one; give --port") from error
    blocks.app_of_models = app
    say(f"serving on {url} (Ctrl-C ends it)")
    if wait:
        try:
            blocks.block_thread()
        finally:
            if app is not None:
                app.close()
    return blocks


def _is_demo(what: str) -> bool:
    from compressor.checkpoint import DEMO_FOLDER

    return Path(what).resolve() == DEMO_FOLDER.resolve()


__all__ = ["LOOPBACK", "PORT", "launch"]
