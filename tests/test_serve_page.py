"""The page itself: driven by gradio's client, and by Chromium where there is one."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

import export
import serve
from compressor.checkpoint import DEMO_FOLDER
from compressor.errors import UserError
from serve import page, saved

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
WORDS = "Write in reverse order the words basket and ladder, with hyphens between them, with capital initials."


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The demo teacher beside its own int4 graph, on a free port."""
    folder = tmp_path_factory.mktemp("serve")
    export.export(DEMO_FOLDER, export.parse("onnx-int4"), folder / "onnx-int4")
    found = serve.launch([str(DEMO_FOLDER), str(folder / "onnx-int4")], port=0, wait=False, threads=1)
    yield found
    found.close()


@pytest.fixture(scope="module")
def client(served):
    from gradio_client import Client

    return Client(served.url, verbose=False, httpx_kwargs={"timeout": 120})


TEACHER, STUDENT = DEMO_FOLDER.name, "onnx-int4"


def test_programs_compare_and_vote(client, served):
    found = client.predict(WORDS, [TEACHER, STUDENT], api_name="/compare")
    saved.check(found, "answer")
    assert [side["text"] for side in found["sides"]] == ["Ladder-Basket"] * 2
    assert all(side["figures"]["tokens"] == 3 and not side["error"] for side in found["sides"])
    vote = client.predict("right", TEACHER, STUDENT, WORDS, api_name="/vote")
    assert (vote["winner"], vote["prompt"]) == (STUDENT, WORDS)
    assert served.app.ballot.tally()[0]["both_bad"] == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (("/compare", "x" * 200_000, [TEACHER]), "200,000 characters; expected at most 20,000"),
        (("/compare", "  ", [TEACHER]), "the prompt is empty"),
        (("/compare", "hi", ["nobody"]), "no model is chosen; expected one or more of"),
        (("/vote", "maybe", TEACHER, STUDENT), "vote 'maybe' is not known"),
        (("/vote", "left", "/etc/passwd", STUDENT), "model '/etc/passwd' is not on offer"),
    ],
)
def test_what_programs_get_wrong_is_told_in_a_line(client, call, says):
    endpoint, *arguments = call
    with pytest.raises(Exception, match=says):
        client.predict(*arguments, api_name=endpoint)


def test_many_clients_get_their_own_answers(client):
    pairs = [("basket", "ladder"), ("river", "candle"), ("ladder", "river"), ("candle", "basket")]
    asked = [WORDS.replace("basket and ladder", f"{one} and {two}") for one, two in pairs]
    alone = [client.predict(prompt, [TEACHER], api_name="/compare")["sides"][0]["text"] for prompt in asked]
    jobs = [client.submit(prompt, [TEACHER], api_name="/compare") for prompt in asked]
    assert [job.result(timeout=120)["sides"][0]["text"] for job in jobs] == alone
    assert len(set(alone)) == 4


def test_a_killed_model_does_not_take_the_page_down(client, served):
    model = served.app.models[TEACHER]
    client.predict(WORDS, [TEACHER], api_name="/compare")
    question = served.app.question(WORDS, names=[TEACHER], settings={"max_new_tokens": 200})
    sides = served.app.answer(question, 0, threading.Event())
    next(sides)
    os.kill(model.pid, signal.SIGKILL)
    last = list(sides)[-1]
    assert last["state"] == "failed" or last["figures"]  # it may have been done already
    assert client.predict(WORDS, [TEACHER], api_name="/compare")["sides"][0]["text"] == "Ladder-Basket"


def test_stopping_ends_an_answer_and_frees_the_model(served):
    app = served.app
    stop = threading.Event()
    question = app.question("Tell me a story.", names=[TEACHER], settings={"max_new_tokens": 400})
    sides = app.answer(question, 0, stop)
    while not next(sides)["text"]:
        pass
    stop.set()
    assert [side["state"] for side in sides][-1] in ("stopped", "")
    free = app.models[TEACHER]._turn.acquire(timeout=30)
    assert free
    app.models[TEACHER]._turn.release()


@pytest.mark.parametrize("path", ["/etc/passwd", str(DEMO_FOLDER / "config.json"), "pyproject.toml"])
def test_no_file_of_the_machine_can_be_had(served, path):
    import httpx

    for route in ("gradio_api/file=", "file="):
        answer = httpx.get(f"{served.url}{route}{path}")
        assert answer.status_code in (403, 404)


def test_others_are_let_in_with_a_password_only():
    with pytest.raises(UserError, match=r"0\.0\.0\.0 can be reached by others; expected a password; give --auth"):
        serve.launch([str(DEMO_FOLDER)], host="0.0.0.0", wait=False)
    with pytest.raises(UserError, match=r"--auth is no USER:PASSWORD"):
        serve.launch([str(DEMO_FOLDER)], auth="me", wait=False)
    with pytest.raises(UserError, match="nothing to serve; expected a run folder"):
        serve.launch([], wait=False)


def test_words_of_models_and_people_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    question = {
        "messages": [{"role": "user", "content": evil}],
        "check": {"contains": [evil]},
        "tools": [],
        "passages": [evil],
        "numbered": 1,
    }
    figures = {"tokens": 1, "ttft_s": 0.1, "tokens_per_s": None, "peak_rss_bytes": None}
    sides = [{"name": evil, "bytes": 1, "text": evil + " [9]", "figures": figures, "error": evil}] * 2
    whole = page.whole_page(saved.comparison(question, sides, [[evil, 0.5, evil, False]]))
    assert "<script" not in whole
    assert whole.count("&lt;script&gt;") > 8
    assert '<mark class="nocite" title="no such passage">[9]</mark>' in whole


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"version": 2}', '{"version": 1, "question": {"messages": [{}]}, "sides": []}']
)
def test_a_file_that_is_no_comparison_is_one_line(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json is (no JSON|no comparison|of version)"):
        saved.read(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        saved.read(tmp_path / "y.json")


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def ask(tab, skill: str) -> None:
    """Take the first preset of a tab and wait for both answers."""
    tab.click(f"#preset-{skill} input")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    tab.wait_for_function(f"document.querySelector('#prompt-{skill} textarea').value.length > 5")
    tab.evaluate("document.querySelectorAll('.figures, #ratio strong').forEach(old => old.remove())")
    tab.click(f"#ask-{skill}")
    for side in "AB":
        tab.wait_for_selector(f"#side-{side} .figures", timeout=60_000)
    tab.wait_for_selector("#ratio strong", timeout=20_000)


@needs_chromium
def test_a_person_asks_in_every_tab_votes_keeps_and_replays(served, browser, tmp_path):
    tab = browser.new_page(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
    tab.goto(served.url)
    tab.wait_for_selector("#ask-instruction")
    ask(tab, "instruction")
    assert tab.locator("#side-A .checks li").count() >= 1
    tab.get_by_role("tab", name="Retrieval").click()
    ask(tab, "rag")
    assert tab.locator("#side-A mark.cite").count() >= 1
    tab.get_by_role("tab", name="Functions").click()
    ask(tab, "tools")
    assert tab.locator("#side-A pre.call, #side-A p.call").count() >= 1
    assert "calls" in tab.inner_text("#side-B .checks")
    tab.get_by_role("tab", name="Role play").click()
    tab.get_by_text("Settings").click()
    tab.get_by_label("Blind").check()
    ask(tab, "roleplay")
    names = tab.inner_text("#side-A .name") + tab.inner_text("#side-B .name")
    assert TEACHER not in names
    assert STUDENT not in names
    before = len(served.app.ballot.votes)
    tab.click("#vote-tie")
    tab.locator(".name", has_text=TEACHER).wait_for()
    assert len(served.app.ballot.votes) == before + 1
    assert served.app.ballot.votes[-1]["blind"] is True
    tab.get_by_text("Difference, and what").click()
    tab.click("#look")
    tab.wait_for_selector("#heat .heat", timeout=60_000)
    tab.get_by_text("Keep and replay").click()
    for button in ("save-json", "save-html", "votes-csv"):
        with tab.expect_download(timeout=30_000) as download:
            tab.click(f"#{button}")
        download.value.save_as(tmp_path / button)
    assert "choice" in (tmp_path / "votes-csv").read_text()
    assert "<script" not in (tmp_path / "save-html").read_text()
    kept = saved.read(tmp_path / "save-json")
    assert len(kept["sides"]) == 2
    tab.close()
    replayed = serve.launch([], replay=tmp_path / "save-json", port=0, wait=False)
    try:
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        tab.goto(replayed.url)
        tab.wait_for_selector("#replay .side .text")
        assert tab.locator("#replay .side").count() == 2
        assert json.dumps(kept["sides"][0]["text"].strip()[:20])[1:-1] in json.dumps(tab.inner_text("#replay"))
    finally:
        replayed.close()


@needs_chromium
def test_mistakes_are_shown_and_harm_nothing(served, browser):
    tab = browser.new_page()
    shown: list[str] = []
    tab.on("dialog", lambda dialog: shown.append(dialog.message) or dialog.dismiss())
    tab.goto(served.url)
    tab.wait_for_selector("#ask-instruction")
    tab.fill("#prompt-instruction textarea", "<script>alert(1)</script><img src=x onerror=alert(2)>")
    tab.click("#ask-instruction")
    tab.wait_for_selector("#side-B .figures", timeout=60_000)
    tab.fill("#prompt-instruction textarea", "  ")
    tab.click("#ask-instruction")
    tab.wait_for_selector("text=the prompt is empty")
    assert not shown
    tab.close()


def test_the_prompts_of_the_library_are_packaged():
    assert (Path(serve.__file__).parent / "style.css").is_file()
