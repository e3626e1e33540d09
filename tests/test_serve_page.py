"""The page itself, on a run made for it: driven by gradio's client, and by Chromium where there is one."""

import json
import os
import shutil
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import compressor
import serve
from compressor.checkpoint import DEMO_FOLDER
from compressor.errors import UserError
from serve import markup, saved
from serve.presets import turns

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
WORDS = "Write in reverse order the words basket and ladder, with hyphens between them, with capital initials."
TEACHER, STUDENT, INT4 = "teacher", "student", "onnx-int4"
TABS = {"instruction": "Instructions", "rag": "Retrieval", "tools": "Functions", "roleplay": "Role play"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run as `make demo` leaves one, pruned so little that its student needs no long distillation."""
    folder = tmp_path_factory.mktemp("serve") / "run"
    small = {
        "importance": {"samples": 32},
        "distill": {"tokens": 2000, "lr": 1e-6, "min_lr": 0.0, "warmup_steps": 1, "heldout_rows": 8},
        "evaluate": {"tokens": 1000, "prompts": 4},
    }
    compressor.distill({"teacher": "demo", "target": "90%", **small}, out=folder)
    return folder


@pytest.fixture(scope="module")
def served(run):
    found = serve.launch([str(run)], port=0, wait=False, threads=1)
    yield found
    found.close()


@pytest.fixture(scope="module")
def client(served):
    return connect(served)


def connect(served):
    from gradio_client import Client

    return Client(served.url, verbose=False, httpx_kwargs={"timeout": 120})


def test_a_run_offers_its_teacher_its_student_and_every_artifact(served, run):
    assert list(served.app.offers) == [TEACHER, STUDENT, INT4]
    assert [offer.teacher for offer in served.app.offers.values()] == [True, False, False]
    assert served.app.offers[INT4].nbytes < served.app.offers[STUDENT].nbytes < served.app.offers[TEACHER].nbytes


def test_programs_compare_and_vote(client, served, run):
    found = client.predict(WORDS, [TEACHER, STUDENT, INT4], api_name="/compare")
    saved.Comparison.model_validate(found)
    assert found["sides"][0]["text"] == "Ladder-Basket"
    assert all(side["figures"]["tokens"] > 1 and not side["error"] for side in found["sides"])
    vote = client.predict("right", TEACHER, STUDENT, WORDS, api_name="/vote")
    assert (vote["winner"], vote["prompt"]) == (STUDENT, WORDS)
    assert served.app.ballot.tally()[0]["wins"] == (1, 0)  # of the student against the teacher
    assert json.loads((run / "votes.jsonl").read_text().splitlines()[-1])["winner"] == STUDENT


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (("/compare", "x" * 200_000, [TEACHER]), "200,000 characters; expected at most 20,000"),
        (("/compare", "  ", [TEACHER]), "the prompt is empty"),
        (("/compare", "hi", [TEACHER, "nobody"]), "model 'nobody' is not on offer; expected one to 3 of"),
        (("/compare", "hi", []), "0 models are chosen; expected one to 3 of"),
        (("/compare", "hi", TEACHER), "argument models: Input should be a valid list"),
        (("/compare", "hi", [TEACHER], 10**9), "max_new_tokens is 1000000000; Input should be less"),
        (("/compare", "hi", [TEACHER], 9, "hot"), "argument temperature: Input should be a valid number"),
        (("/compare", "hi", [TEACHER], 9, -1.0), "temperature is -1.0; Input should be greater"),
        (("/compare", "hi", [TEACHER], 9, 0.0, 2**70), "seed is 1180591620717411303424; Input should be less"),
        (("/vote", "maybe", TEACHER, STUDENT), "vote 'maybe' is not known"),
        (("/vote", "left", TEACHER, TEACHER), "both sides are teacher; expected two models"),
        (("/vote", "left", "/etc/passwd", STUDENT), "model '/etc/passwd' is not on offer"),
    ],
)
def test_what_programs_get_wrong_is_told_in_a_line(client, call, says):
    endpoint, *arguments = call
    with pytest.raises(Exception, match=says):
        client.predict(*arguments, api_name=endpoint)


def test_programs_see_their_two_endpoints_alone(client):
    assert client.view_api(return_format="dict", print_info=False)["named_endpoints"].keys() == {"/compare", "/vote"}


def test_ten_users_get_their_own_answers(served):
    words = ["basket", "ladder", "river", "candle", "window"]
    pairs = [(one, two) for one in words for two in words if one != two][:10]
    clients = [connect(served) for _ in pairs]
    jobs = [
        client.submit(WORDS.replace("basket and ladder", f"{one} and {two}"), [TEACHER], api_name="/compare")
        for client, (one, two) in zip(clients, pairs, strict=True)
    ]
    for job, (one, two) in zip(jobs, pairs, strict=True):
        assert job.result(timeout=120)["sides"][0]["text"] == f"{two}-{one}".title()


def test_no_file_of_the_machine_can_be_had_but_the_report(served, run):
    import httpx

    secret = run.parent / "secret.txt"
    secret.write_text("secret")
    hidden = ["/etc/passwd", DEMO_FOLDER / "config.json", "pyproject.toml", secret, run / "recipe.yaml"]
    hidden += [run / ".." / "secret.txt", f"{run}/report.html/../../secret.txt", run / "student" / "config.json"]
    for path in hidden:
        for route in ("gradio_api/file=", "file="):
            assert httpx.get(f"{served.url}{route}{path}").status_code in (403, 404), path
    assert httpx.get(f"{served.url}gradio_api/file={run / 'report.html'}").status_code == 200


def test_a_conversation_goes_on_from_each_sides_own_answers(served):
    app = served.app
    asked = app.question("Hello!", names=[STUDENT, TEACHER], skill="chat", system="Be kind.")
    assert asked["measure"] == 1  # the teacher, wherever it stands
    sides = [{"text": "Hi."}, {"text": "Good day."}]
    grown = app.follow(asked, sides, "And now?", {"seed": 3})
    assert grown["id"] != asked["id"]
    told = [[turn["content"] for turn in turns(grown, place)] for place in (0, 1)]
    assert told == [["Be kind.", "Hello!", "Hi.", "And now?"], ["Be kind.", "Hello!", "Good day.", "And now?"]]
    again = app.follow(grown, [{"text": "x"}, {"text": "y" * 19_900}], "On?", {})
    assert [turn["content"] for turn in turns(again, 0)][1:] == ["Hello!", "Hi.", "And now?", "x", "On?"]
    with pytest.raises(UserError, match="expected at most 20,000; shorten"):
        app.follow(again, sides, "more" * 20, {})


def test_a_session_has_one_question_and_one_vote(served):
    app = served.app
    first, second = (app.question(words, names=[TEACHER, STUDENT]) for words in ("One?", "Two?"))
    app.begin("me", first)
    stop = app.claim("me", first, 0)
    assert app.claim("me", first, 0) is None  # begun already
    assert app.claim("you", first, 1) is None
    app.begin("me", second)
    assert stop.is_set()
    assert app.claim("me", first, 1) is None
    assert not app.claim("me", second, 0).is_set()
    sides = [app.waiting(second, place) for place in (0, 1)]
    with pytest.raises(UserError, match="you have voted on these answers"):
        app.cast("me", "left", first, sides)
    before = len(app.ballot.votes)
    app.cast("me", "left", second, sides)
    with pytest.raises(UserError, match="you have voted on these answers"):
        app.cast("me", "right", second, sides)
    assert len(app.ballot.votes) == before + 1
    again = app.follow(second, sides, "And?", {})
    app.begin("me", again)
    with pytest.raises(UserError, match="a side has failed"):
        app.cast("me", "left", again, [sides[0] | {"error": "no"}, sides[1]])
    app.cast("me", "left", again, sides)
    files = app.votes("me") + app.votes("you")
    app.forget("me")
    assert [Path(file).exists() for file in files] == [False, False, True, True]
    assert app.claim("me", second, 1) is None


def test_nothing_tells_a_blind_side_before_the_vote(served):
    app = served.app
    tools = '[{"name": "f"}]'
    asked = app.question("Call f.", names=[STUDENT, TEACHER], skill="tools", tools=tools, blind=True)
    figures = {"tokens": 7, "ttft_s": 0.125, "tokens_per_s": 77.5, "peak_rss_bytes": 10**8, "stopped": False}
    one = app.waiting(asked, 0) | {"figures": figures, "state": "", "text": "same"}
    other = app.waiting(asked, 1) | {"error": "the process of teacher was killed", "state": "failed", "text": "same"}
    shown = "".join(markup.answer_cards(asked, [one, other], ["A", "B"])) + markup.ratio_line(asked, [one, other], "AB")
    for telling in ("teacher", "student", "MiB", "125 ms", "77.5", "against", "the same calls"):
        assert telling not in shown
    told = "".join(markup.answer_cards(asked | {"blind": False}, [one, other], ["A: student", "B: teacher"]))
    for telling in ("A: student", "the process of teacher was killed", "MiB", "125 ms", "the same calls as B: teacher"):
        assert telling in told


def test_others_are_let_in_with_a_password_only():
    with pytest.raises(UserError, match=r"0\.0\.0\.0 can be reached by others; expected a password; give --auth"):
        serve.launch([str(DEMO_FOLDER)], host="0.0.0.0", wait=False)
    with pytest.raises(UserError, match=r"--auth is no USER:PASSWORD"):
        serve.launch([str(DEMO_FOLDER)], auth="me", wait=False)
    with pytest.raises(UserError, match="nothing to serve; expected a run folder"):
        serve.launch([], wait=False)


def test_a_port_that_is_taken_is_told(served):
    port = int(served.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be had .*; expected a free one; give --port"):
        serve.launch([str(DEMO_FOLDER)], port=port, wait=False)


def test_words_of_models_and_people_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    question = {
        "messages": [{"role": "user", "content": evil}],
        "histories": [[{"role": evil, "content": evil}]] * 2,
        "check": {"contains": [evil]},
        "tools": [],
        "numbered": 1,
        "measure": 0,
    }
    figures = {"tokens": 1, "ttft_s": 0.1, "tokens_per_s": None, "peak_rss_bytes": None}
    sides = [{"name": evil, "bytes": 1, "text": evil + " [9]", "figures": figures, "error": evil}] * 2
    whole = markup.whole_page(saved.comparison(question, sides, [[], [[evil, 0.5, evil, False]]]))
    assert "<script" not in whole
    assert whole.count("&lt;script&gt;") > 8
    assert '<mark class="nocite" title="no such passage">&lt;script&gt;alert(1)&lt;/script&gt; [9]</mark>' in whole


GOOD = {
    "version": 1,
    "question": {
        "messages": [{"role": "user", "content": "Hi"}],
        "histories": [[]],
        "tools": [],
        "numbered": 0,
        "check": {},
        "measure": 0,
    },
    "sides": [{"name": "a", "bytes": None, "text": "Ho", "figures": None, "error": None}],
    "rated": None,
}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"version": 2}, "version: "),
        ({"sides": []}, "sides: "),
        ({"sides": [GOOD["sides"][0] | {"text": 3}]}, "sides.0.text: "),
        ({"question": GOOD["question"] | {"measure": 1}}, "the file: .* the measure is no side"),
        ({"rated": [[["a", "b", "c", True]]]}, "rated.0.0.1: "),
        ({"question": GOOD["question"] | {"check": {"bogus": 1}}}, "the file: .* check is none of ours"),
        ({"question": GOOD["question"] | {"check": {"list": 1}}}, "the file: .* check is none of ours"),
        ({"question": GOOD["question"] | {"tools": [{"a": 1}]}}, "the file: .* is no function"),
    ],
)
def test_a_file_that_is_no_comparison_is_one_line(tmp_path, changes, where):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(GOOD))
    assert markup.replayed(saved.read(file))
    file.write_text(json.dumps(GOOD | changes))
    with pytest.raises(UserError, match=rf"x\.json is no comparison \({where}"):
        saved.read(file)
    file.write_text("{")
    with pytest.raises(UserError, match=r"x\.json is no comparison \(the file: Invalid JSON"):
        saved.read(file)
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        saved.read(tmp_path / "y.json")


# --- in a browser ---------------------------------------------------------------------------------------------------

SHIFTS = """
window.shifted = 0;
new PerformanceObserver(list => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifted += entry.value;
}).observe({type: 'layout-shift'});
"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser, url: str, **settings):
    tab = browser.new_page(**settings)
    tab.goto(url)
    tab.wait_for_selector("#ask-instruction")
    return tab


def turn_to(tab, title: str) -> None:
    """Choose a tab, through the overflow menu where the page is too narrow for all."""
    button = tab.get_by_role("tab", name=title)
    if not button.first.is_visible():
        tab.locator(".overflow-menu > button").first.click()
        button = tab.locator(".overflow-dropdown button", has_text=title)
    button.first.click()


def ask(tab, skill: str) -> None:
    """Take the first preset of a tab and wait for the answers."""
    tab.click(f"#preset-{skill} input")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    tab.wait_for_function(f"document.querySelector('#prompt-{skill} textarea').value.length > 5")
    press(tab, f"#ask-{skill}")


def press(tab, selector: str) -> None:
    """Press a button that asks, and wait for the answers to the new question."""
    old = tab.evaluate("document.querySelector('.side')?.dataset.question ?? ''")
    tab.click(selector)
    wait_for_answers(tab, old)


def wait_for_answers(tab, old: str) -> None:
    """Until every card belongs to another question than `old` and has ended."""
    done = f"[...document.querySelectorAll('.side')].every(s => s.dataset.question != '{old}' && s.matches('.over'))"
    tab.wait_for_function(f"document.querySelector('.side') && {done}", timeout=60_000)
    tab.wait_for_timeout(300)  # the comparison of the calls comes after the last answer


@needs_chromium
def test_a_person_asks_in_every_tab_votes_keeps_and_replays(served, browser, tmp_path):
    tab = opened(browser, served.url, viewport={"width": 1280, "height": 1000}, accept_downloads=True)
    ask(tab, "instruction")
    assert tab.locator("#side-A .checks .pass").count() >= 1
    assert tab.locator(".sides-row .side").count() == 3
    assert "B: student against A: teacher" in tab.inner_text("#ratio")
    turn_to(tab, "Retrieval")
    ask(tab, "rag")
    assert tab.locator("#side-A mark.cite").count() >= 1
    turn_to(tab, "Functions")
    ask(tab, "tools")
    assert tab.locator("#side-A pre.call").count() >= 1
    tab.locator("#side-B .checks li", has_text="the same calls as A: teacher").locator("visible=true").wait_for()
    turn_to(tab, "Chat")
    tab.fill("#prompt-chat textarea", WORDS)
    press(tab, "#ask-chat")
    assert tab.inner_text("#side-A .text") == "Ladder-Basket"
    tab.fill("#prompt-chat textarea", WORDS.replace("basket", "river"))
    press(tab, "#follow-chat")
    assert tab.locator("#side-A .turn").all_inner_texts() == [WORDS, "Ladder-Basket"]
    turn_to(tab, "Role play")
    tab.get_by_text("Settings").click()
    tab.get_by_label("Blind").check()
    ask(tab, "roleplay")
    assert not {TEACHER, STUDENT, INT4} & set(tab.inner_text(".sides-row").split())
    before = len(served.app.ballot.votes)
    tab.click("#vote-tie")
    tab.locator(".name", has_text=TEACHER).wait_for()
    tab.click("#vote-tie")
    tab.wait_for_selector("text=you have voted on these answers")
    assert len(served.app.ballot.votes) == before + 1
    assert served.app.ballot.votes[-1]["blind"] is True
    tab.locator("#tally td", has_text="blind").wait_for()
    tab.reload()  # votes are still there for who comes back, or comes new
    tab.locator("#tally td", has_text="blind").wait_for()
    turn_to(tab, "Role play")
    ask(tab, "roleplay")
    tab.get_by_text("Difference, and how").click()
    tab.click("#look")
    tab.wait_for_selector("#apart .heat", timeout=60_000)
    assert tab.locator("#apart .heat").count() == 2
    tab.get_by_text("Keep and replay").click()
    for button in ("save-json", "save-html", "votes-json", "votes-csv", "report"):
        with tab.expect_download(timeout=30_000) as download:
            tab.click(f"#{button}")
        download.value.save_as(tmp_path / button)
    assert "choice" in (tmp_path / "votes-csv").read_text()
    assert len(json.loads((tmp_path / "votes-json").read_text())["votes"]) == before + 1
    assert "<script" not in (tmp_path / "save-html").read_text()
    assert "2,9" in (tmp_path / "report").read_text()  # parameters of the student
    kept = saved.read(tmp_path / "save-json")
    assert [bool(rows) for rows in kept["rated"]].count(True) == 2
    tab.close()
    replayed = serve.launch([], replay=tmp_path / "save-json", port=0, wait=False)
    try:
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        tab.goto(replayed.url)
        tab.wait_for_selector("#replay .side .text")
        assert tab.locator("#replay .side").count() == 3
        assert tab.locator("#replay .text").all_inner_texts() == [side["text"].strip() for side in kept["sides"]]
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    finally:
        replayed.close()


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_moves_while_answers_stream_in(served, browser, width):
    tab = browser.new_page(viewport={"width": width, "height": 1600})
    tab.add_init_script(SHIFTS)
    tab.goto(served.url)
    tab.wait_for_selector("#ask-instruction")
    for skill, title in TABS.items():
        turn_to(tab, title)
        ask(tab, skill)
        tab.evaluate("window.shifted = 0")  # tabs and their inputs may move things, answers may not
        press(tab, f"#ask-{skill}")
        assert tab.evaluate("window.shifted") < 0.005, skill
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab.close()


@needs_chromium
def test_the_page_can_be_used_with_the_keyboard_alone(served, browser):
    tab = opened(browser, served.url)

    def reach(selector: str, key: str = "Tab") -> None:
        for _ in range(60):
            if tab.evaluate(f"document.activeElement.matches('{selector}')"):
                return
            tab.keyboard.press(key)
        raise AssertionError(f"{selector} cannot be reached")

    reach("#prompt-instruction textarea")
    tab.keyboard.type(WORDS)
    reach("#ask-instruction")
    tab.keyboard.press("Enter")
    wait_for_answers(tab, "")
    reach("#side-A .body")  # a long answer can be scrolled
    reach("#vote-left")
    before = len(served.app.ballot.votes)
    tab.keyboard.press("Space")
    for _ in range(200):  # the tally may tell of other votes already
        if len(served.app.ballot.votes) > before:
            break
        tab.wait_for_timeout(50)
    assert len(served.app.ballot.votes) == before + 1
    tab.wait_for_function("document.querySelector('#tally').innerText.includes('against')")
    tab.close()


@contextmanager
def held(served):
    """Every model loaded, and its process standing still in the block, as in the middle of a long answer."""
    for name in served.app.offers:
        served.app.compare("Hello!", [name], max_new_tokens=1)
    pids = [served.app.models[name].pid for name in served.app.offers]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def asked(tab, words: str) -> str:
    """Ask and wait for the cards of the new question alone; returns the old one's id."""
    old = tab.evaluate("document.querySelector('.side')?.dataset.question ?? ''")
    tab.fill("#prompt-instruction textarea", words)
    tab.click("#ask-instruction")
    tab.wait_for_function(f"!['', '{old}', undefined].includes(document.querySelector('.side')?.dataset.question)")
    return old


@needs_chromium
def test_the_stop_button_ends_every_side_and_frees_the_models(served, browser):
    tab = opened(browser, served.url)
    with held(served):
        asked(tab, WORDS)
        tab.wait_for_timeout(500)
        tab.click("#stop")
        tab.wait_for_timeout(500)
    for side in "ABC":
        tab.wait_for_selector(f"#side-{side} .state:has-text('stopped')", timeout=20_000)
        assert tab.inner_text(f"#side-{side} .text").strip() == ""
    press(tab, "#ask-instruction")  # the models are free again
    assert tab.inner_text("#side-A .text") == "Ladder-Basket"
    tab.close()


@needs_chromium
def test_two_people_stream_side_by_side(served, browser):
    wanted = {"river": "Ladder-River", "candle": "Ladder-Candle"}
    tabs = {word: opened(browser, served.url) for word in wanted}
    with held(served):
        old = {word: asked(tab, WORDS.replace("basket", word)) for word, tab in tabs.items()}
    for word, tab in tabs.items():
        wait_for_answers(tab, old[word])
        assert tab.inner_text("#side-A .text") == wanted[word]
        tab.close()


@needs_chromium
def test_who_asks_again_before_the_end_sees_the_second_answer_alone(served, browser):
    tab = opened(browser, served.url)
    with held(served):
        asked(tab, WORDS)
        old = asked(tab, WORDS.replace("basket", "river"))
    wait_for_answers(tab, old)
    assert tab.inner_text("#side-A .text") == "Ladder-River"
    before = len(served.app.ballot.votes)
    tab.click("#vote-left")
    tab.wait_for_timeout(1000)
    vote = served.app.ballot.votes[before]
    assert ("river" in vote["prompt"], vote["left_answer"]) == (True, "Ladder-River")
    tab.close()


@needs_chromium
def test_a_model_that_is_killed_shows_its_error_beside_the_others(served, browser):
    tab = opened(browser, served.url)
    with held(served):
        old = asked(tab, WORDS)
        os.kill(served.app.models[TEACHER].pid, signal.SIGKILL)
    wait_for_answers(tab, old)
    assert "the process of teacher was killed by signal 9" in tab.inner_text("#side-A .error")
    assert tab.inner_text("#side-B .text").strip()
    press(tab, "#ask-instruction")
    assert tab.inner_text("#side-A .text") == "Ladder-Basket"
    tab.close()


@needs_chromium
def test_mistakes_are_shown_and_harm_nothing(served, browser):
    tab = opened(browser, served.url)
    shown: list[str] = []
    tab.on("dialog", lambda dialog: shown.append(dialog.message) or dialog.dismiss())
    tab.fill("#prompt-instruction textarea", "<script>alert(1)</script><img src=x onerror=alert(2)>")
    press(tab, "#ask-instruction")
    tab.fill("#prompt-instruction textarea", "  ")
    tab.click("#ask-instruction")
    tab.wait_for_selector("text=the prompt is empty")
    turn_to(tab, "Functions")
    tab.click("#functions .cm-content")
    tab.keyboard.type("1")
    tab.fill("#prompt-tools textarea", "Book a seat.")
    tab.click("#ask-tools")
    tab.wait_for_selector("text=the schemas are no list")
    turn_to(tab, "Chat")
    tab.fill("#prompt-chat textarea", "And?")
    tab.click("#follow-chat")
    tab.wait_for_selector("text=the last question was asked under Instructions; ask here first")
    assert not shown
    tab.close()
