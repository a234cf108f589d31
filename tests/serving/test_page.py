import base64
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from serving import serve
from serving.handler import Settings, settings_from
from serving.page import card, policy
from tests import hostile
from tests.conftest import PROJECT, wait_for
from tests.serving.browser import CHROMIUM, Browser

# The variable names another one.
AXE = Path(os.environ.get("AXE", PROJECT / ".venv/npm/node_modules/axe-core/axe.min.js"))
PAGE = (Path(__file__).parents[2] / "serving/page.html").read_bytes()

# Puts a file that was fetched from the page itself through the events of a drop or a paste.
GIVE = """
(async () => {
  const bytes = Uint8Array.from(atob("%s"), character => character.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], "picture.jpg", { type: "image/jpeg" }));
  const event = "%s" === "drop"
    ? new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true })
    : new ClipboardEvent("paste", { clipboardData: files, bubbles: true });
  document.getElementById("drop").dispatchEvent(event);
})()
"""


# A text, as another page's drag or a copied link gives it.
GIVE_TEXT = """
(() => {
  const text = new DataTransfer();
  text.setData("text/plain", "%s");
  const event = "%s" === "drop"
    ? new DragEvent("drop", { dataTransfer: text, bubbles: true, cancelable: true })
    : new ClipboardEvent("paste", { clipboardData: text, bubbles: true });
  document.getElementById("drop").dispatchEvent(event);
})()
"""


STATUS = "document.getElementById('status').textContent"


def test_the_page_brings_all_it_needs():
    assert b"http://" not in PAGE and b"src=" not in PAGE and b"@import" not in PAGE
    assert PAGE.count(b"https://") == 1  # the placeholder of the URL's field
    assert b"style=" not in PAGE and b"onclick" not in PAGE  # the policy would not run them
    assert b"innerHTML" not in PAGE  # class names are text
    assert "'none'" in policy(PAGE) and "unsafe" not in policy(PAGE)


def test_the_card_holds_what_the_page_shows(engine):
    assert card(engine.package, Settings()).keys() == {
        "examples",
        "urls",
        "classes",
        "metrics",
        "created",
        "revision",
        "model",
        "size",
    }


def test_the_page_offers_golden_pictures(server, engine, original):
    paths = server.ask("GET", "/card").json["examples"]
    assert paths == ["examples/0.jpg", "examples/1.png", "examples/2.webp"]
    for path in paths:
        reply = server.ask("GET", f"/{path}")
        assert reply.headers["Content-Type"].startswith("image/")
        assert reply.body == (original / "package/golden" / Path(path).name).read_bytes()
    assert server.ask("GET", "/examples/expected.npz").status == 404
    assert card(engine.package, Settings(examples=False))["examples"] == []


@pytest.mark.parametrize(
    ("words", "variable", "shown"),
    [
        ("", None, True),
        ("--host 0.0.0.0", None, False),
        ("--host 0.0.0.0 --examples on", None, True),
        ("--examples off", None, False),
        ("--host 0.0.0.0", "on", True),
    ],
)
def test_pictures_of_yours_are_shown_to_this_machine_alone(monkeypatch, words, variable, shown):
    monkeypatch.delenv("SERVING_EXAMPLES", raising=False)
    if variable:
        monkeypatch.setenv("SERVING_EXAMPLES", variable)
    defaults = settings_from(os.environ)
    options = serve._parser(defaults).parse_args(words.split())
    assert serve._chosen(options, defaults).examples == shown


@pytest.fixture
def browser(tmp_path, server):
    with Browser(tmp_path / "profile") as browser:
        browser.look(1200, 800, "light")
        browser.open(f"http://127.0.0.1:{server.port}/")
        assert wait_for(
            lambda: "small_cnn" in browser.run("document.getElementById('card').textContent")
        )
        yield browser


def bars(browser: Browser) -> dict[str, float]:
    assert wait_for(lambda: browser.run("document.querySelectorAll('#bars li').length") == 3)
    rows = browser.run(
        "[...document.querySelectorAll('#bars progress')]"
        ".map(bar => [bar.getAttribute('aria-label'), bar.value])"
    )
    return dict(rows)


def check_answer(browser, server, picture) -> None:
    wanted = {
        row["label"]: row["probability"]
        for row in server.invoke(picture, Accept="application/json; output=labels").json[0][
            "labels"
        ]
    }
    shown = bars(browser)
    assert list(shown) == list(wanted) and shown == pytest.approx(wanted, abs=1e-6)
    status = browser.run("document.getElementById('status').textContent")
    first, second = list(wanted)[:2]
    assert status.startswith((f"{first}, ", f"Not sure: {first} or {second}."))
    assert not browser.messages


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
class TestInChromium:
    def test_a_chosen_file(self, browser, server, original, picture):
        browser.choose_file("#file", original / "package/golden/0.jpg")
        check_answer(browser, server, picture)
        assert browser.run("document.querySelector('#drop img').naturalWidth") == 120

    @pytest.mark.parametrize("how", ["drop", "paste"])
    def test_a_dropped_and_a_pasted_picture(self, browser, server, picture, how):
        browser.run(GIVE % (base64.b64encode(picture).decode(), how))
        check_answer(browser, server, picture)

    def test_the_same_file_twice_an_error_and_a_clear_page(
        self, browser, server, original, tmp_path
    ):
        picture = original / "package/golden/0.jpg"
        browser.run(
            "window.calls = 0, window.really = fetch, fetch = (...all) => (calls++, really(...all))"
        )
        for count in (1, 2):
            browser.choose_file("#file", picture)
            assert wait_for(lambda count=count: browser.run("calls") == count)
            bars(browser)
        (tmp_path / "no.jpg").write_text("no picture")
        browser.choose_file("#file", tmp_path / "no.jpg")
        status = "document.getElementById('status').textContent"
        assert wait_for(lambda: "can't be read" in browser.run(status))
        # No picture beside the message, which holds no number of ours.
        assert browser.run("document.querySelectorAll('#drop img').length") == 0
        assert browser.run(f"/[0-9a-f]{{32}}/.test({status})") is False
        browser.choose_file("#file", picture)
        bars(browser)
        browser.run("document.getElementById('clear').click()")
        assert browser.run(status) == "No picture yet."
        assert browser.run("document.querySelectorAll('#drop img, #bars li').length") == 0

    @pytest.mark.parametrize("how", ["drop", "paste"])
    def test_a_url_that_is_dropped_or_pasted_is_asked_about(self, browser, how):
        browser.run(GIVE_TEXT % ("http://127.0.0.1/a.jpg", how))
        assert wait_for(
            lambda: "not allowed" in browser.run("document.getElementById('status').textContent")
        )
        assert browser.run("document.getElementById('url').value") == "http://127.0.0.1/a.jpg"

    def test_a_url_by_keyboard_alone_and_its_refusal_told_to_screen_readers(self, browser):
        for key in ("Tab", "Tab"):  # the file, the URL
            browser.press(key)
        assert browser.run("document.activeElement.id") == "url"
        browser.call("Input.insertText", text="http://127.0.0.1/a.jpg")
        browser.press("Enter", "\r")
        assert wait_for(
            lambda: (
                "the URL is not allowed"
                in browser.run("document.getElementById('status').textContent")
            )
        )
        tree = browser.call("Accessibility.getFullAXTree")["nodes"]
        roles = {
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in tree
            if not node["ignored"]
        }
        assert {
            ("heading", "Try the model"),
            ("textbox", "URL of a picture"),
            ("button", "Classify"),
        } <= roles
        assert any(role == "status" for role, _ in roles)

    @pytest.mark.parametrize("width", [320, 1200])
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_it_fits_and_can_be_read(self, browser, original, width, scheme):
        browser.look(width, 700, scheme)
        browser.choose_file("#file", original / "package/golden/0.jpg")
        bars(browser)
        assert browser.run("document.documentElement.scrollWidth") <= width
        light, dark = contrast(browser, "body"), contrast(browser, "#status")
        assert light > 7 and dark > 4.5  # WCAG 2.2: 4.5 for text


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
class TestMoreInChromium:
    def test_several_pictures_are_answered_in_turn_and_shown_by_choice(
        self, browser, server, original, tmp_path
    ):
        (tmp_path / "no.jpg").write_text("no picture")
        golden = [original / "package/golden" / name for name in ("0.jpg", "1.png")]
        browser.choose_files("#file", [*golden, tmp_path / "no.jpg"])
        texts = "[...document.querySelectorAll('#asked button')].map(each => each.textContent)"
        assert wait_for(lambda: browser.run(texts)[2:] == ["no answer"])
        assert all(text == "Not sure" or text.endswith("%") for text in browser.run(texts)[:2])
        assert [message for message in browser.messages if "400" not in message] == []
        browser.messages.clear()  # Chromium itself tells of a refusal
        check_answer(browser, server, golden[0].read_bytes())  # the first is shown
        browser.run("document.querySelectorAll('#asked button')[1].click()")
        check_answer(browser, server, golden[1].read_bytes())
        pressed = "[...document.querySelectorAll('#asked button')].map(each => each.ariaPressed)"
        assert browser.run(pressed) == ["false", "true", "false"]
        browser.run("document.querySelectorAll('#asked button')[2].click()")
        status = "document.getElementById('status').textContent"
        assert "can't be read" in browser.run(status)
        browser.choose_files("#file", golden[:1])  # one alone needs no list
        check_answer(browser, server, golden[0].read_bytes())
        assert browser.run("document.getElementById('several').hidden")

    def test_an_example_is_asked_about_and_its_json_and_commands_can_be_copied(
        self, browser, server, picture, tmp_path
    ):
        browser.run("document.querySelector('#golden button').click()")
        check_answer(browser, server, picture)
        shown = json.loads(browser.run("document.getElementById('json').textContent"))
        assert len(shown[0]["labels"]) == 3
        copy = "document.querySelector('#raw button')"
        # Browsers give the clipboard to who presses a key, not to a script.
        browser.run(f"document.getElementById('raw').open = true, {copy}.click()")
        assert wait_for(lambda: browser.run(f"{copy}.textContent") == "It is selected: copy it")
        assert json.loads(browser.run("getSelection().toString()")) == shown
        browser.run(f"{copy}.focus()")
        browser.press("Enter", "\r")
        assert wait_for(lambda: browser.run(f"{copy}.textContent") == "Copied")
        # What the page shows to be typed is typed.
        (tmp_path / "picture.jpg").write_bytes(picture)
        curl, program = (
            browser.run(f"document.getElementById('{name}').textContent")
            for name in ("curl", "python")
        )
        for command in (shlex.split(curl), [sys.executable, "-c", program]):
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
            assert "'label'" in done.stdout or json.loads(done.stdout) == shown

    def test_classes_are_searched(self, browser):
        browser.run("document.querySelector('#card summary').click()")
        browser.run("document.getElementById('search').focus()")
        browser.call("Input.insertText", text="O")
        found = "[...document.querySelectorAll('#found li')].map(each => each.textContent)"
        assert browser.run(found) == ["dog"]
        assert "1 of 3" in browser.run("document.getElementById('card').textContent")

    def test_a_server_that_fetches_nothing_offers_no_url(self, browser):
        browser.run("offer({ examples: [], urls: false })")
        assert browser.run("document.getElementById('by-url').hidden")
        browser.run(GIVE_TEXT % ("http://127.0.0.1/a.jpg", "paste"))
        status = browser.run("document.getElementById('status').textContent")
        assert "fetches no pictures" in status

    def test_a_phone_offers_its_camera(self, browser):
        shown = "getComputedStyle(document.querySelector('label[for=camera]')).display"
        assert browser.run(shown) == "none"
        browser.look(390, 800, "light")
        browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
        assert browser.run(shown) == "block"
        assert (
            browser.run("document.getElementById('camera').getAttribute('capture')")
            == "environment"
        )

    def test_a_folder_and_a_text_that_are_dropped_are_told_as_such(
        self, browser, original, picture
    ):
        browser.choose_file("#file", original / "package/golden/0.jpg")
        bars(browser)
        browser.drop(original / "package/golden")
        assert "This is a folder" in browser.run(STATUS)
        assert browser.run("document.querySelectorAll('#drop img, #bars li').length") == 0
        browser.drop(original / "package/golden/0.jpg")
        bars(browser)
        for how in ("drop", "paste"):
            browser.run(GIVE_TEXT % ("a dog", how))
            assert "There is no picture in it" in browser.run(STATUS)
            held = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
            browser.run(GIVE_TEXT % (held, how))
            bars(browser)

    def test_a_file_that_is_gone_is_told_from_a_server_that_is(self, browser, original, tmp_path):
        paths = [tmp_path / "0.jpg", tmp_path / "1.jpg"]
        for path in paths:
            path.write_bytes((original / "package/golden/0.jpg").read_bytes())
        browser.run(
            "window.really = fetch, fetch = (...all) => new Promise(go => { window.go = "
            "() => go(really(...all)) }), 0"
        )
        browser.choose_files("#file", paths)
        assert wait_for(lambda: browser.run("typeof go") == "function")
        paths[1].unlink()
        browser.run("go(), 0")
        texts = "[...document.querySelectorAll('#asked button')].map(each => each.textContent)"
        assert wait_for(lambda: browser.run(texts)[1] == "no answer")
        browser.run("document.querySelectorAll('#asked button')[1].click()")
        assert "This file can't be read" in browser.run(STATUS)

    @pytest.mark.parametrize(
        ("answer", "told"),
        [
            (
                "Promise.reject(new TypeError('Failed to fetch'))",
                "The server does not answer. Check",
            ),
            (
                "Promise.resolve(new Response('<html>', {status: 502, statusText: 'Bad Gateway'}))",
                "The answer is 502 Bad Gateway, without a reason.",
            ),
            ("Promise.resolve(Response.json({error: 'too busy'}, {status: 503}))", "too busy."),
        ],
    )
    def test_what_is_in_between_is_told_also_of_an_example(self, browser, picture, answer, told):
        browser.run(f"fetch = () => {answer}, 0")
        browser.run(GIVE % (base64.b64encode(picture).decode(), "drop"))
        assert wait_for(lambda: browser.run(STATUS).startswith(told))
        browser.run("clear(), document.querySelector('#golden button').click()")
        assert wait_for(lambda: browser.run(STATUS).startswith(told))
        assert not browser.messages

    def test_a_picture_that_is_too_large_is_told_as_such(self, browser, tmp_path):
        (tmp_path / "large.jpg").write_bytes(bytes(50 << 20))
        browser.choose_file("#file", tmp_path / "large.jpg")
        assert wait_for(lambda: "allowed: 1,000,000" in browser.run(STATUS))

    def test_a_model_of_which_nothing_is_told_is_no_empty_place(self, browser, server):
        browser.call("Network.enable")
        browser.call("Network.setBlockedURLs", urls=["*/card"])
        browser.open(f"http://127.0.0.1:{server.port}/?again")
        told = "document.querySelector('[aria-labelledby=card-title]').textContent"
        assert wait_for(lambda: "can't be shown. The server does not answer" in browser.run(told))

    def test_what_this_browser_can_not_show_is_said(self, browser, server):
        """The model may read it all the same, as HEIC and TIFF."""
        tiff = hostile.encoded(Image.new("RGB", (48, 32)), "TIFF")
        browser.run(GIVE % (base64.b64encode(tiff).decode(), "drop"))
        bars(browser)
        drop = "document.getElementById('drop').textContent"
        assert wait_for(lambda: "This browser can't show it" in browser.run(drop))

    @pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: .ci/setup dev")
    @pytest.mark.parametrize("width", [390, 1280])
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_axe_finds_nothing(self, browser, original, width, scheme):
        """Everything is open: the strip of several pictures, the JSON, the classes."""
        browser.look(width, 900, scheme)
        golden = original / "package/golden"
        browser.choose_files("#file", [golden / "0.jpg", golden / "1.png"])
        bars(browser)
        browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
        browser.run(AXE.read_text() + ";0")
        broken = (
            "axe.run().then(told => told.violations.map(each => "
            "[each.id, each.nodes.map(node => node.html)]))"
        )
        assert browser.run(broken) == []


# What the page says of an answer, in a page of its own.
VERDICTS = """
[["labels", [["a"], true, false]], ["not sure", [["a", "b", "c"], false, false]],
 ["many", [["a", "b", "c", "d", "e", "f"], false, false]], ["unlike", [["a"], false, true]],
 ["of old", [null, null, null]]].map(([name, [set, sure, unlike]]) =>
  verdict([{ label: "a", probability: 0.5 }], set, sure, unlike))
"""


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_says_that_it_is_not_sure(browser, server, original):
    assert browser.run(VERDICTS) == [
        "a, 50 %.",
        "Not sure: a, b or c.",
        "Not sure: one of 6 classes, among them a, b, c, d, e.",
        "Not sure: it is unlike anything that the model was trained on. If anything, a.",
        "a, 50 %.",
    ]
    path = original / "package/golden/2.webp"
    [row] = server.invoke(path.read_bytes(), Accept="application/json; output=labels").json
    assert row["unlike"] and not row["sure"]
    browser.choose_file("#file", path)
    bars(browser)
    status = browser.run("document.getElementById('status').textContent")
    assert status.startswith("Not sure: it is unlike anything")


def contrast(browser: Browser, selector: str) -> float:
    """WCAG's contrast of an element's text on the card behind it."""

    def luminance(colour: str) -> float:
        values = [int(value) / 255 for value in colour.removeprefix("rgb(").rstrip(")").split(",")]
        linear = [
            value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
            for value in values
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    text = browser.run(f"getComputedStyle(document.querySelector('{selector}')).color")
    ground = browser.run("getComputedStyle(document.querySelector('.card')).backgroundColor")
    brighter, darker = sorted((luminance(text), luminance(ground)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)
