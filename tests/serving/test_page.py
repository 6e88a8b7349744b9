"""The playground in headless Chromium, driven over the pipe of its DevTools protocol, against a fake server."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time

import pytest
from serving.fake_server import WEB, FakeServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = """--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync
    --disable-component-update --hide-scrollbars --disable-dev-shm-usage --remote-debugging-pipe"""
FLAGS = _FLAGS.split()
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on PATH")


class Browser:
    """One page. Messages are JSON with a NUL at the end: Chromium reads them from descriptor 3 and writes to 4."""

    def __init__(self, folder):
        ours, theirs = os.pipe(), os.pipe()
        # High numbers first, so that making 3 and 4 overwrites neither.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs[0], ours[1])]

        def place():
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,  # 3 and 4 are made in the child; Python's own are closed on exec
            preexec_fn=place,
            start_new_session=True,
        )
        for end in (theirs[0], ours[1], *ends):
            os.close(end)
        self.reads, self.writes = ours[0], theirs[1]
        self.buffer, self.number, self.session, self.problems = b"", 0, None, []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        os.close(self.writes)
        os.close(self.reads)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _message(self, seconds):
        end = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            if not select.select([self.reads], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("Chromium said nothing")
            more = os.read(self.reads, 1 << 20)
            if not more:
                raise EOFError("Chromium ended")
            self.buffer += more
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **params):
        self.number += 1
        body = {"id": self.number, "method": method, "params": params}
        body |= {"sessionId": self.session} if self.session else {}
        os.write(self.writes, json.dumps(body).encode() + b"\0")
        while True:
            message = self._message(20)
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(message["params"]["exceptionDetails"])
            if message.get("method") == "Log.entryAdded":
                entry = message["params"]["entry"]
                if entry["level"] == "error" and "favicon" not in entry.get("url", ""):
                    self.problems.append(entry["text"])

    def __getitem__(self, expression):
        """The value of a JavaScript expression."""
        out = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in out, out
        return out["result"].get("value")

    def until(self, expression, seconds=10):
        end = time.monotonic() + seconds
        while not self[expression]:
            assert time.monotonic() < end, (
                f"{expression} did not become true; the page says: {self['document.body.innerText']}"
            )
            time.sleep(0.02)

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.until(f"location.href.startsWith('{url}') && !!document.querySelector('#model option')")

    def screen(self, width, height=800, dark=False):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key, code, control=False):
        down = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 2 if control else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", **down)

    def type(self, text, into="#prompt"):
        self[f"document.querySelector('{into}').focus()"]
        self.call("Input.insertText", text=text)

    def ask(self, text):
        self.type(text)
        self.press("Enter", 13, control=True)

    def text(self, selector):
        return self[f"document.querySelector({json.dumps(selector)})?.innerText ?? null"]

    def done(self):
        self.until("document.querySelector('.answer .foot') && !document.querySelector('.busy')")

    def picture(self, name):
        """Kept where NEMO_LITE_PICTURES says, for eyes."""
        if folder := os.environ.get("NEMO_LITE_PICTURES"):
            data = self.call("Page.captureScreenshot", format="png")["data"]
            with open(os.path.join(folder, f"{name}.png"), "wb") as file:
                file.write(base64.b64decode(data))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def server():
    with FakeServer(delay=0.01) as server:
        yield server


@pytest.fixture
def page(browser, server):
    browser.screen(1280)
    browser.open(server.url)
    browser.problems.clear()
    yield browser
    assert browser.problems == []  # neither an exception nor anything the content policy blocked


def test_the_page_is_whole_and_from_here():
    text = "".join((WEB / name).read_text(encoding="utf-8") for name in ("index.html", "app.js", "style.css"))
    assert "http://" not in text and "https://" not in text
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "style=" not in text
    assert len(text.splitlines()) < 900


@needs_chromium
def test_chat_streams_in_colours(page, server):
    page.picture("empty")
    assert page.text("#model") == "tiny"
    page.ask("reason about it")
    page.done()
    assert page.text(".user") == "reason about it"
    assert page.text(".answer > .text") == "The quick brown fox jumps over the dog"
    painted = page["[...document.querySelectorAll('.answer > .text span')].map(x => [x.textContent, x.className])"]
    assert painted == [
        ["The", "d0"], [" quick", "d0"], [" brown", "d1"], [" fox", "d2"],
        [" jumps", "d0"], [" over", "d1"], [" the", "d2"], [" dog", "d3"],
    ]  # fmt: skip
    assert page["document.querySelector('.reasoning').open"] is False
    page["document.querySelector('.reasoning').open = true"]
    assert page.text(".reasoning .text") == "Let me see"
    # 12 tokens; accepted: 5 in the answer, 1 in the thought; so 5 verify steps.
    assert page.text("#gauge-acceptance") == "2.20"
    assert page.text("#gauge-cached") == "1 of 3"
    assert "ms" in page.text("#gauge-first") and float(page.text("#gauge-rate")) > 0
    assert page.text("#legend").split("\n") == ["main model: 6", "draft 1: 3", "draft 2: 2", "draft 3: 1"]
    assert page.text(".foot p") == "12 tokens, 6 of 15 drafts accepted, finished"
    tint = "getComputedStyle(document.querySelector('.d2')).backgroundColor"
    assert page[tint] != "rgba(0, 0, 0, 0)"
    page.picture("desktop-light")
    page.screen(1280, dark=True)
    page.picture("desktop-dark")
    page["document.querySelector('#colours').click()"]
    assert page[tint] == "rgba(0, 0, 0, 0)"
    page.ask("and then?")
    page.until("document.querySelectorAll('.foot').length == 2")
    sent = server.requests[-1]
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "user"]
    assert sent["messages"][1]["content"] == "The quick brown fox jumps over the dog"
    assert sent["token_origins"] and sent["stream_options"] == {"include_usage": True}


@needs_chromium
def test_completion_and_its_parameters(page, server):
    page["document.querySelector('#tab-completion').click()"]
    page["document.querySelector('[name=max_tokens]').value = ''"]
    for name, value in {"temperature": "0.5", "max_tokens": "5", "seed": "7", "stop": "END"}.items():
        page.type(value, f"[name={name}]")
    page.ask("It's a ")
    page.done()
    assert page.text("#panel-completion .text") == "It's a The quick brown fox jumps"
    sent = {name: server.requests[-1].get(name) for name in ("prompt", "temperature", "max_tokens", "seed", "stop")}
    assert sent == {"prompt": "It's a ", "temperature": 0.5, "max_tokens": 5, "seed": 7, "stop": ["END"]}
    assert "cut at the token limit" in page.text("#panel-completion .foot p")
    page["document.querySelector('#panel-completion .foot details').open = true"]
    page.picture("completion")
    command = page["document.querySelector('#panel-completion pre').textContent"]
    if shutil.which("curl"):  # the command is the very request
        out = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=20)
        assert "[DONE]" in out.stdout, out
        assert server.requests[-1] == server.requests[-2]
    page["localStorage.clear()"]


@needs_chromium
def test_settings_of_the_chat(page, server):
    page.type("Be brief.", "[name=system]")
    page["document.querySelector('[name=thinking]').value = 'low'"]
    page.type("20", "[name=budget]")
    page.type('[{"type": "function", "function": {"name": "weather"}}]', "[name=tools]")
    page.ask("call a tool")
    page.done()
    sent = server.requests[-1]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert sent["reasoning_effort"] == "low"
    assert sent["thinking_token_budget"] == 20
    assert sent["tools"][0]["function"]["name"] == "weather"
    assert page.text(".call h3") == "Tool call weather"
    assert json.loads(page.text(".call pre")) == {"city": "Oslo"}
    page.picture("tool-call")
    page.type("rain", ".call input")
    page["document.querySelector('#send').click()"]
    page.until("document.querySelectorAll('.foot').length == 2")
    call, result = server.requests[-1]["messages"][-2:]
    assert call["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
    page["localStorage.clear()"]


@needs_chromium
def test_stop_regenerate_clear(page, server):
    page.ask("slow please")
    page.until("document.querySelectorAll('.answer .text span').length > 3")
    assert page["document.querySelector('.answer').getAttribute('aria-busy')"] == "true"
    assert page["document.querySelector('#send').disabled"]
    page.until("document.querySelector('#gauge-acceptance').innerText != '–'")
    page.press("Escape", 27)
    page.done()
    assert page.text(".foot p").endswith("stopped")
    end = time.monotonic() + 5
    while not server.dropped and time.monotonic() < end:
        time.sleep(0.02)
    assert server.dropped == 1
    page["document.querySelector('#regenerate').focus()"]
    page["document.querySelector('#regenerate').click()"]
    assert page["document.activeElement.id"] == "stop"  # the pressed button is off now; focus is still on the page
    page.until("document.querySelectorAll('.answer .text span').length > 3")
    page["document.querySelector('#stop').click()"]
    page.done()
    assert page["document.querySelectorAll('.answer').length"] == 1
    assert [message["role"] for message in server.requests[-1]["messages"]] == ["user"]
    page["document.querySelector('#clear').click()"]
    assert page["document.querySelectorAll('.answer, .user').length"] == 0
    assert page["document.activeElement.id"] == "prompt"


@needs_chromium
@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("wrong", "The prompt has 600 tokens; this model takes 512."),
        ("busy", "The queue is full. (Try again in 2 s.)"),
        ("break", "The engine ended while it answered."),
        ("cut", "The connection ended before the answer did; the server may have stopped."),
    ],
)
def test_errors_are_the_servers_sentences(page, asked, sentence):
    page.ask(asked)
    page.done()
    assert page.text(".error") == sentence
    if asked == "break":
        assert page.text(".answer > .text") == "The quick brown"
        page.picture("error")
    page.problems.clear()  # Chromium notes failed requests itself


@needs_chromium
def test_model_text_is_never_markup(page):
    page.ask("html")
    page.done()
    assert page.text(".answer > .text") == "<b id=injected><img src=x onerror=alert(1)>"
    assert page["document.querySelector('#injected, .answer img')"] is None


@needs_chromium
def test_runs_of_spaces_wrap(page):
    """What small models like to write must not push the page aside."""
    page.screen(375, 700)
    page.ask("hello")
    page.done()
    page["document.querySelector('.answer .text').append(' '.repeat(500), 'y'.repeat(500))"]
    assert page["document.querySelector('.answer .text').scrollWidth <= document.querySelector('.answer').clientWidth"]


@needs_chromium
def test_the_key_is_asked_for(browser):
    with FakeServer(key="secret") as server:
        browser.screen(1280)
        browser.open(server.url)
        browser.until("!document.querySelector('#key-row').hidden")
        assert browser["document.activeElement.id"] == "key"
        browser.picture("key")
        browser.type("secret", "#key")
        browser["document.querySelector('#key').dispatchEvent(new Event('change'))"]
        browser.until("document.querySelector('#model').value == 'tiny'")
        browser.ask("hello")
        browser.done()
        assert browser.text(".answer > .text").startswith("The quick")
        command = browser["document.querySelector('.foot pre').textContent"]
        assert "$API_KEY" in command and "secret" not in command
    browser.problems.clear()


@needs_chromium
def test_on_a_phone(page):
    page.screen(375, 700)
    page.ask("reason a little")
    page.done()
    assert page["document.documentElement.scrollWidth"] == 375
    small = page[
        """[...document.querySelectorAll('button, select')].filter(x => x.offsetParent)
        .filter(x => x.getBoundingClientRect().right > 375 || x.getBoundingClientRect().height < 24).map(x => x.id)"""
    ]
    assert small == []
    page.picture("phone")
    page["document.querySelector('#show-settings').click()"]
    assert page["getComputedStyle(document.querySelector('#settings')).display"] == "block"
    assert page["document.documentElement.scrollWidth"] == 375
    page.picture("phone-settings")
    page["document.querySelector('#show-settings').click()"]
    page.screen(375, 700, dark=True)
    page.picture("phone-dark")


CONTRAST = """(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = numbers(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
  };
  const low = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some(child => child.nodeType == 3 && child.data.trim());
    if (!own || node.disabled || !node.offsetParent) continue;
    const [a, b] = [light(numbers(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push([node.outerHTML.slice(0, 90), ratio]);
  }
  return low;
})()"""


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_contrast_and_labels(page, dark):
    page.screen(1280, dark=dark)
    page.ask("reason")
    page.done()
    page["document.querySelectorAll('.answer details').forEach(x => { x.open = true; })"]
    page[
        """(() => { const last = document.querySelector('.answer .d3'); last.className = 'd4';
        document.querySelector('.answer').append(Object.assign(document.createElement('p'),
            {className: 'error', textContent: 'An error.'})) })()"""
    ]
    assert page[CONTRAST] == []
    unnamed = page[
        """[...document.querySelectorAll('input, select, textarea')].filter(x => !x.labels.length)
        .map(x => x.outerHTML)"""
    ]
    assert unnamed == []


@needs_chromium
def test_by_keyboard(page):
    page["document.querySelector('#tab-chat').focus()"]
    page.press("ArrowRight", 39)
    assert page["document.activeElement.id"] == "tab-completion"
    assert page.text("#prompt-label") == "Text to continue"
    page.press("ArrowLeft", 37)
    order = []
    for _ in range(8):
        page.press("Tab", 9)
        order.append(page["document.activeElement.id || document.activeElement.name"])
        ring = page["getComputedStyle(document.activeElement).outlineStyle"]
        assert ring != "none", order
    assert order == ["model", "panel-chat", "colours", "prompt", "send", "clear", "system", "thinking"]
