#!/usr/bin/env python3
"""Rates explanations in a real browser, as a person would: `candor-tools rate` is driven through Chromium by the WebDriver
protocol. Called by `make check-browser`; needs the built candor-tools, chromium, chromedriver, and nothing but Python.

    tests/browser/check_rate.py [--screenshots FOLDER] [PATH/TO/candor-tools]
"""

import argparse
import base64
import http.server
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# How long something that is about to happen may take on a busy machine.
PATIENCE_S = 60
ENTER, ESCAPE, BACKSPACE, TAB, LEFT, RIGHT, DOWN = "\ue007", "\ue00c", "\ue003", "\ue004", "\ue012", "\ue014", "\ue015"
DESKTOP, PHONE = (1280, 800), (390, 844)
# What the two models say, by clip. The words must not tell whose they are.
TEXTS = {
    "film-1": ("The corners of the mouth go down at first.\n\nThen they rise, and she looks happy.", "Her eyes are wide. She is afraid."),
    "film-2": ("She begins downcast and ends with a smile, so she is happy.", "The mouth is closed. The face is calm."),
    "film-3": ("Her brows draw together, then relax into a smile.", "She frowns the whole time. She is angry."),
    "strip": ("A broad smile shows her teeth. She looks happy.", "The brows are raised. Surprise is seen."),
    "strip-2": ("The teeth show and the cheeks are lifted. This is joy.", "The eyes are narrow. She doubts something."),
    "still": ("Her smile reaches the eyes. She is happy.", "The face does not move, so she feels nothing. She is happy."),
    "still-2": ("She smiles at the camera. She is happy.", "She wears a suit. It is orange. She is happy."),
    "x.faces.safetensors#val/0": ("The mouth is open. He looks surprised.", "Brows are lowered, which speaks of anger."),
    "x.faces.safetensors#val/1": ("The lips are pressed together. He is angry.", "<b>Bold</b> & \"quoted\" words. He looks sad."),
}
QUESTIONS = ("fits", "coherent")


class Driver:
    """A browser, by the WebDriver protocol."""

    def __init__(self, chromedriver, chromium, profile):
        self.process = subprocess.Popen(
            [chromedriver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.base = None
        for line in self.process.stdout:
            if started := re.search(r"started successfully on port (\d+)", line):
                self.base = f"http://127.0.0.1:{started.group(1)}"
                break
        if self.base is None:
            raise RuntimeError("chromedriver did not start")
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                     f"--user-data-dir={profile}", "--window-size=%d,%d" % DESKTOP]
        if os.geteuid() == 0:
            # Chromium refuses to run as root within its sandbox; what it loads here is made here.
            arguments.append("--no-sandbox")
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"binary": chromium, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }}})
        self.session = f"/session/{session['sessionId']}"
        self.post("/timeouts", {"script": PATIENCE_S * 1000})

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.base + path, data=data, method=method, headers={"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=2 * PATIENCE_S) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {json.load(error)['value']['message'][:300]}") from None

    def post(self, path, body):
        return self.call("POST", self.session + path, body)

    def open(self, url):
        self.post("/url", {"url": url})

    def run(self, script, *arguments):
        """The value of an expression; arguments are `a[0]`, …."""
        return self.post("/execute/sync", {"script": f"const a = arguments; return ({script});", "args": arguments})

    def wait(self, script, *arguments):
        """Waits until the expression is true of the page."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            if value := self.run(script, *arguments):
                return value
            time.sleep(0.05)
        shown = self.run("document.body.innerText")
        raise AssertionError(f"waited in vain for {script} {arguments}; the page shows: {shown!r}")

    def press(self, *keys):
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.post("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def click(self, selector):
        element = self.post("/element", {"using": "css selector", "value": selector})
        self.post(f"/element/{next(iter(element.values()))}/click", {})

    def labels(self, selector):
        """Names that a screen reader reads."""
        elements = self.post("/elements", {"using": "css selector", "value": selector})
        return [self.call("GET", f"{self.session}/element/{next(iter(e.values()))}/computedlabel") for e in elements]

    def log(self):
        """What stands in the console since the last call."""
        return self.post("/se/log", {"type": "browser"})

    def devtools(self, command, **parameters):
        return self.post("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def look(self, size=DESKTOP, dark=False):
        width, height = size
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height,
                      deviceScaleFactor=2 if size == PHONE else 1, mobile=size == PHONE)
        self.devtools("Emulation.setTouchEmulationEnabled", enabled=size == PHONE)
        scheme = "dark" if dark else "light"
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("GET", f"{self.session}/screenshot")))

    def quit(self):
        try:
            self.call("DELETE", self.session)
        finally:
            self.process.terminate()
            self.process.wait()


class Server:
    """`candor-tools rate`, on one port through all restarts."""

    def __init__(self, program, folder):
        self.program, self.folder, self.port, self.process = program, folder, 0, None
        self.votes = folder / "votes.jsonl"

    def start(self, most_bytes=None):
        def limit_files():
            import resource
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

        self.stderr = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [self.program, "rate", "--a", "before.jsonl", "--b", "after.jsonl", "--data", "clips.jsonl",
             "--votes", self.votes, "--address", f"127.0.0.1:{self.port}", "--seed", "11"],
            cwd=self.folder, stdout=subprocess.PIPE, stderr=self.stderr, text=True,
            # A write beyond the limit is then an error, as on a full disk, and no signal.
            restore_signals=most_bytes is None, preexec_fn=limit_files if most_bytes is not None else None,
        )
        line = self.process.stdout.readline()
        address = re.fullmatch(r"listening on (http://127\.0\.0\.1:(\d+))\n", line)
        assert address, f"the program said {line!r} and {self.said()!r}"
        self.address, self.port = address.group(1), int(address.group(2))

    def said(self):
        self.stderr.seek(0)
        return self.stderr.read()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def lines(self):
        return [json.loads(line) for line in self.votes.read_text().splitlines()][1:]

    def standing(self, rater="Anna"):
        standing = {}
        for line in self.lines():
            if line["rater"] == rater:
                standing[line["id"], line["question"]] = line["choice"]
        return {place: choice for place, choice in standing.items() if choice is not None}

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data=data, headers={"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return json.load(response)


def write_faces(path):
    """Two drawn faces as a faces file: safetensors, written by hand."""
    side = 48

    def face(mood):
        pixels = bytearray()
        for y in range(side):
            for x in range(side):
                dx, dy = (x - 23.5) / 20, (y - 23.5) / 23
                value = 60 if dx * dx + dy * dy > 1 else 205 - int(40 * (dx * dx + dy * dy))
                eyes = min((x - 16) ** 2 + (y - 19) ** 2, (x - 31) ** 2 + (y - 19) ** 2)
                mouth = (x - 23.5) ** 2 / 60 + (y - 34) ** 2 / mood
                pixels.append(25 if eyes < 7 or mouth < 1 else value)
        return bytes(pixels)

    cues = ["inner_brow_height", "outer_brow_height", "brow_gap", "eye_opening", "mouth_opening", "mouth_width",
            "mouth_corner_lift", "upper_lip_raise", "lip_thickness"]
    tensors = [
        ("val.images", "U8", [2, side, side], face(30) + face(3)),
        ("val.labels", "U8", [2], bytes([6, 0])),
        ("val.cues", "F32", [2, len(cues)], bytes(8 * len(cues))),
        ("val.cues_valid", "U8", [2], bytes(2)),
    ]
    header = {"__metadata__": {"classes": "angry,disgust,fear,happy,neutral,sad,surprise", "cues": ",".join(cues)}}
    start = 0
    for name, dtype, shape, data in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(data)]}
        start += len(data)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"".join(data for *_, data in tensors))


def write_data(folder):
    shutil.copy(ROOT / "demo" / "sad-to-happy.mp4", folder / "happy.mp4")
    shutil.copy(ROOT / "demo" / "astronaut.png", folder / "happy.png")
    (folder / "strip").mkdir()
    for number in range(1, 5):
        shutil.copy(ROOT / "demo" / "astronaut.png", folder / "strip" / f"{number}.png")
    write_faces(folder / "x.faces.safetensors")
    media = {"film": "happy.mp4", "strip": "strip", "still": "happy.png", "same": "strip"}
    with open(folder / "clips.jsonl", "w") as out:
        for clip in [*TEXTS, "same"]:
            print(json.dumps({"id": clip, "video": media.get(clip.split("-")[0], clip), "solution": "happy"}), file=out)
    for side, name in enumerate(("before", "after")):
        with open(folder / f"{name}.jsonl", "w") as out:
            for clip, texts in TEXTS.items():
                print(json.dumps({"id": clip, "rationale": texts[side], "answer": ("happiness", "fear")[side]}), file=out)
            print(json.dumps({"id": "same", "rationale": "The same.", "answer": None}), file=out)


class Checks:
    """What is checked, in the order in which a person would come to it."""

    def __init__(self, driver, server, screenshots):
        self.driver, self.server, self.screenshots = driver, server, screenshots
        self.rater = "Anna"
        self.kinds = set()
        # What the page was told, and the console's errors that were not called for.
        self.html = ""
        self.console = []

    def state(self):
        return self.server.ask(f"/api/state?rater={self.rater}")

    def shown(self):
        """Text of the explanation that stands first, and the question."""
        return self.driver.run("[document.querySelector('#first .text').textContent, document.querySelector('#question').textContent]")

    def wait_for_state(self, state):
        pair = state["pair"]
        if pair is None:
            self.driver.wait("!document.querySelector('#done').hidden")
            return
        question = {"fits": "Which fits the face better?", "coherent": "Which is more coherent?"}[pair["question"]]
        self.driver.wait(
            "document.querySelector('#question').textContent === a[0] && !document.querySelector('#choices button').disabled"
            " && document.querySelector('#first .text').textContent === a[1]"
            " && document.querySelector('#second .text').textContent === a[2]",
            question, pair["first"]["text"], pair["second"]["text"],
        )

    def vote(self, key):
        """Presses a key and waits until the vote is there; gives the line of the file."""
        before = len(self.server.lines())
        self.driver.press(key)
        end = time.monotonic() + PATIENCE_S
        while len(self.server.lines()) == before and time.monotonic() < end:
            time.sleep(0.02)
        lines = self.server.lines()
        assert len(lines) == before + 1, f"{len(lines) - before} lines for one key"
        self.wait_for_state(self.state())
        return lines[-1]

    def side_of_first(self):
        """Which file the explanation that stands first is of: only the texts can tell."""
        first = self.shown()[0]
        return "a" if first in [before for before, _ in TEXTS.values()] else "b"

    def calm_console(self):
        self.console += [entry["message"] for entry in self.driver.log() if entry["level"] in ("SEVERE", "WARNING")]

    def picture(self, name):
        if self.screenshots:
            self.driver.screenshot(self.screenshots / f"{name}.png")

    def a_name_is_asked_for(self):
        self.driver.look()
        self.driver.open(self.server.address)
        self.driver.wait("!document.querySelector('#name-form').hidden")
        assert self.driver.run("document.activeElement.id") == "name", "the name has no focus"
        self.picture("name")
        # Digits are part of a name here, not votes.
        self.driver.press(*"Anna0", BACKSPACE, ENTER)
        self.wait_for_state(self.state())
        assert self.driver.run("document.querySelector('#rater').textContent") == "Anna"
        assert self.server.lines() == []

    def the_pair_is_shown_as_text(self):
        self.html += self.driver.run("document.documentElement.outerHTML")
        pair = self.state()["pair"]
        for place in ("first", "second"):
            texts = self.driver.run("[...document.querySelectorAll(`#${a[0]} p`)].map((p) => p.textContent)", place)
            assert texts == [pair[place]["text"], f"Answer: {pair[place]['answer']}"], texts

    def keys_vote_and_each_vote_is_on_disk_at_once(self):
        first = self.side_of_first()
        other = {"a": "b", "b": "a"}[first]
        assert self.vote("1")["choice"] == first
        assert self.vote(RIGHT)["choice"] == other
        first = self.side_of_first()
        other = {"a": "b", "b": "a"}[first]
        assert self.vote("0")["choice"] == "tie"
        self.picture("second-question")
        assert self.vote("2")["choice"] == other
        first = self.side_of_first()
        assert self.vote(LEFT)["choice"] == first
        assert self.vote(DOWN)["choice"] == "tie"
        assert len(self.server.standing()) == 6
        assert self.driver.run("document.querySelector('#progress').value") == 3
        assert self.driver.run("document.querySelector('#progress-text').textContent") == f"3 of {len(TEXTS)}"

    def undo_takes_votes_back_one_by_one(self):
        before = self.server.standing()
        line = self.vote("u")
        assert line["choice"] is None and len(self.server.standing()) == len(before) - 1
        self.vote(BACKSPACE)
        assert len(self.server.standing()) == len(before) - 2
        self.driver.click("#undo")
        self.driver.wait("document.querySelector('#progress').value === 1")
        assert len(self.server.standing()) == len(before) - 3
        self.wait_for_state(self.state())
        for _ in range(3):
            self.vote("0")
        assert set(self.server.standing()) == set(before)

    def a_reload_goes_on_where_it_was(self):
        self.vote("1")
        before = self.shown()
        self.driver.open(self.server.address)
        self.wait_for_state(self.state())
        assert self.shown() == before and before[1] == "Which is more coherent?"
        self.vote("1")

    def held_keys_and_keys_of_the_browser_are_no_votes(self):
        count = len(self.server.lines())
        for init in ({"repeat": True}, {"ctrlKey": True}, {"altKey": True}, {"metaKey": True}):
            self.driver.run("document.body.dispatchEvent(new KeyboardEvent('keydown', {key: '1', bubbles: true, ...a[0]}))", init)
        self.driver.press("?")
        self.driver.wait("document.querySelector('#help-box').open")
        self.picture("help")
        self.driver.press("1", "2", LEFT)
        self.driver.press(ESCAPE)
        self.driver.wait("!document.querySelector('#help-box').open")
        # Whatever came through would have been answered before this vote is.
        self.vote("1")
        assert len(self.server.lines()) == count + 1

    def buttons_have_names_and_can_be_reached(self):
        labels = self.driver.labels("#choices button, #undo, #help, #other-rater")
        assert all(labels), labels
        assert self.driver.labels("#pair") == [self.shown()[1]]
        for _ in range(20):
            self.driver.press(TAB)
            if self.driver.run("document.activeElement.dataset.choice") == "second":
                break
        else:
            raise AssertionError("twenty times Tab, and no button")
        outline = self.driver.run("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", f"the focus is not seen: {outline}"
        first = self.side_of_first()
        assert self.vote(ENTER)["choice"] == {"a": "b", "b": "a"}[first]
        self.driver.run("document.activeElement.blur()")
        status = self.driver.run("document.querySelector('#status').textContent")
        assert status.startswith("Saved.") and "done" in status, status

    def it_fits_a_phone_and_the_dark(self):
        grounds = []
        for size, name in ((DESKTOP, "desktop"), (PHONE, "phone"), ((360, 640), "small")):
            for dark in (False, True):
                self.driver.look(size, dark)
                self.clip_is_seen()
                wide, inner = self.driver.run("[document.documentElement.scrollWidth, innerWidth]")
                assert wide <= inner, f"{name}: {wide} pixels on {inner}"
                box = self.driver.run("document.querySelector('[data-choice=second]').getBoundingClientRect().toJSON()")
                height = self.driver.run("innerHeight")
                assert box["top"] >= 0 and box["bottom"] <= height, f"{name}: the buttons are out of sight, {box}"
                if name == "phone":
                    assert box["height"] >= 44, f"a thumb needs more than {box['height']} pixels"
                grounds.append(self.driver.run("getComputedStyle(document.body).backgroundColor"))
                self.picture(f"{name}-{'dark' if dark else 'light'}")
        assert len(set(grounds)) == 2, grounds
        self.driver.look()

    def clip_is_seen(self):
        """The clip is decoded, not only asked for; a video can be sought in."""
        kind = self.state()["pair"]["clip"]["kind"]
        if kind == "video":
            self.driver.wait("(v => v && v.readyState >= 2 && v.videoWidth > 0)(document.querySelector('#clip video'))")
            moved = self.driver.post("/execute/async", {"script": """
                const done = arguments[0], video = document.querySelector('#clip video');
                video.pause();
                const to = video.duration * 0.8;
                video.addEventListener('seeked', () => done([video.currentTime, to]), { once: true });
                video.currentTime = to;""", "args": []})
            assert abs(moved[0] - moved[1]) < 0.5, f"sought {moved[1]} s, is at {moved[0]} s"
        else:
            self.driver.wait("(all => all.length > 0 && all.every((i) => i.complete && i.naturalWidth > 0))"
                             "([...document.querySelectorAll('#clip img')])")
        self.kinds.add((kind, self.driver.run("document.querySelectorAll('#clip img').length")))

    def other_pages_cannot_vote(self):
        state = self.state()
        body = json.dumps({"rater": "Anna", "pair": state["pair"]["token"], "question": state["pair"]["question"], "choice": "tie"})
        address = self.server.address

        class Elsewhere(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("content-type", "text/html")
                self.end_headers()

            def log_message(self, *_):
                pass

        other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
        threading.Thread(target=other.serve_forever, daemon=True).start()
        count = len(self.server.lines())
        self.calm_console()
        try:
            self.driver.open(f"http://127.0.0.1:{other.server_port}/")
            outcomes = self.driver.post("/execute/async", {"script": """
                const [url, body, done] = arguments;
                const send = (options) => fetch(url, { method: "POST", body, ...options })
                    .then((response) => response.type, (error) => String(error));
                Promise.all([send({ mode: "no-cors" }), send({ headers: { "content-type": "application/json" } }),
                    fetch(url.replace("/api/vote", "/api/state?rater=Anna")).then((r) => r.text(), (error) => String(error))]).then(done);
                """, "args": [f"{address}/api/vote", body]})
        finally:
            other.shutdown()
        assert outcomes[0] == "opaque" or "TypeError" in outcomes[0], outcomes
        assert all("TypeError" in outcome for outcome in outcomes[1:]), outcomes
        assert len(self.server.lines()) == count, "a page of elsewhere has voted"
        self.driver.log()
        self.driver.open(address)
        self.wait_for_state(state)

    def a_killed_server_loses_no_vote(self):
        self.calm_console()
        before = self.server.standing()
        page = self.shown()
        # A key is pressed and the server killed at once: the vote is either there, or the page says that it may not be.
        self.server.kill()
        self.driver.press("0")
        self.driver.wait("document.querySelector('#message').textContent.includes('does not answer')")
        assert self.shown() == page, "the page went on without its vote"
        self.picture("unreachable")
        assert self.server.standing() == before
        # A crash of the machine may leave part of a line.
        with open(self.server.votes, "a") as votes:
            votes.write('{"rater": "Anna", "pair": "12')
        self.server.start()
        assert "cut short" in self.server.said() and f"{len(before)} votes stand" in self.server.said(), self.server.said()
        self.driver.log()
        self.vote("0")
        self.driver.wait("document.querySelector('#message').hidden")
        assert len(self.server.standing()) == len(before) + 1
        assert before.items() <= self.server.standing().items()

    def votes_that_race_with_a_kill_are_whole_or_absent(self):
        for delay_s in (0.0, 0.002, 0.005, 0.02):
            before = len(self.server.standing())
            self.driver.run("document.body.dispatchEvent(new KeyboardEvent('keydown', {key: a[0], bubbles: true}))", "1")
            time.sleep(delay_s)
            self.server.kill()
            self.server.start()
            self.driver.open(self.server.address)
            state = self.state()
            self.wait_for_state(state)
            after = len(self.server.standing())
            assert after in (before, before + 1), (before, after)
            if after > before:
                self.vote("u")
        self.driver.log()

    def a_full_disk_is_said_and_costs_nothing(self):
        self.calm_console()
        before = self.server.votes.read_bytes()
        page = self.shown()
        self.server.kill()
        self.server.start(most_bytes=len(before) + 20)
        self.driver.press("1")
        self.driver.wait("document.querySelector('#message').textContent.includes('could not be saved')")
        assert self.shown() == page
        assert self.server.votes.read_bytes() == before, "part of a vote was left"
        self.server.kill()
        self.server.start()
        self.driver.log()
        self.vote("1")
        assert self.server.votes.read_bytes().startswith(before)

    def to_the_end(self):
        while (state := self.state())["pair"] is not None:
            self.clip_is_seen()
            self.the_pair_is_shown_as_text()
            first = self.side_of_first()
            better = {"a": "2", "b": "1"}[first]
            self.vote(better if state["pair"]["question"] == "fits" else "0")
        self.driver.wait("!document.querySelector('#done').hidden")
        self.picture("done")
        assert len(self.server.standing()) == len(TEXTS) * len(QUESTIONS)
        self.vote("u")
        self.vote("0")
        self.driver.open(self.server.address)
        self.driver.wait("!document.querySelector('#done').hidden")

    def every_kind_of_clip_was_seen(self):
        # Another rater gets to see all, whatever the first has seen.
        self.driver.click("#other-rater")
        self.driver.wait("!document.querySelector('#name-form').hidden")
        self.driver.press(*"Ben", ENTER)
        self.rater = "Ben"
        for _ in TEXTS:
            self.wait_for_state(self.state())
            self.clip_is_seen()
            self.html += self.driver.run("document.documentElement.outerHTML")
            for _ in QUESTIONS:
                self.vote({"a": "2", "b": "1"}[self.side_of_first()])
        assert self.kinds == {("video", 0), ("pictures", 1), ("pictures", 4)}, self.kinds

    def the_page_never_knew_whose_they_were(self):
        told = self.html + json.dumps(self.state())
        header = json.loads(self.server.votes.read_text().splitlines()[0])
        secrets = ["before", "after.jsonl", "happy.mp4", "film-1", "safetensors", str(self.server.folder), header["digest"]]
        secrets += [line["pair"] for line in self.server.lines()]
        for secret in secrets:
            assert secret not in told, f"the page was told {secret!r}"
        firsts = {line["first"] for line in self.server.lines()}
        assert firsts == {"a", "b"}, f"only {firsts} ever stood first"

    def nothing_came_from_elsewhere_and_the_console_is_clean(self):
        self.calm_console()
        assert self.console == [], self.console
        loaded = self.driver.run("performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert loaded and all(name.startswith(self.server.address) for name in loaded), loaded

    def the_report_counts_what_was_voted(self):
        result = subprocess.run([self.server.program, "rate", "report", self.server.votes, "--json"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        standing = {rater: self.server.standing(rater) for rater in ("Anna", "Ben")}
        for question in QUESTIONS:
            votes = [c for choices in standing.values() for (_, q), c in choices.items() if q == question]
            assert report[question]["counts"] == [votes.count(choice) for choice in ("a", "tie", "b")], report[question]
        # Ben preferred "after" every time.
        assert set(standing["Ben"].values()) == {"b"} and len(standing["Ben"]) == len(TEXTS) * len(QUESTIONS)
        assert report["identical"] == 1 and set(report["raters"]) == {"Anna", "Ben"}
        assert report["fits"]["alpha_nominal"]["alpha"] is not None, report["fits"]
        print(subprocess.run([self.server.program, "rate", "report", self.server.votes], capture_output=True, text=True).stdout)


CHECKS = [
    Checks.a_name_is_asked_for, Checks.the_pair_is_shown_as_text, Checks.keys_vote_and_each_vote_is_on_disk_at_once,
    Checks.undo_takes_votes_back_one_by_one, Checks.a_reload_goes_on_where_it_was,
    Checks.held_keys_and_keys_of_the_browser_are_no_votes, Checks.buttons_have_names_and_can_be_reached,
    Checks.it_fits_a_phone_and_the_dark, Checks.other_pages_cannot_vote, Checks.a_killed_server_loses_no_vote,
    Checks.votes_that_race_with_a_kill_are_whole_or_absent, Checks.a_full_disk_is_said_and_costs_nothing, Checks.to_the_end,
    Checks.every_kind_of_clip_was_seen, Checks.the_page_never_knew_whose_they_were,
    Checks.nothing_came_from_elsewhere_and_the_console_is_clean, Checks.the_report_counts_what_was_voted,
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?", type=Path, default=ROOT / "target" / "debug" / "candor-tools")
    parser.add_argument("--screenshots", type=Path, help="write pictures of the page to this folder")
    arguments = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        sys.exit("check_rate: chromium and chromedriver are needed; scripts/setup.sh browser says how to get them")
    if arguments.screenshots:
        arguments.screenshots.mkdir(parents=True, exist_ok=True)

    passed = failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        folder.mkdir()
        write_data(folder)
        server = Server(arguments.program.resolve(), folder)
        server.start()
        driver = Driver(chromedriver, chromium, Path(scratch) / "profile")
        try:
            checks = Checks(driver, server, arguments.screenshots)
            for check in CHECKS:
                name = check.__name__.replace("_", " ")
                try:
                    check(checks)
                except (AssertionError, RuntimeError, OSError) as error:
                    # What follows stands on what went before.
                    failed += 1
                    print(f"FAILED  {name}: {error}")
                    checks.picture("failed")
                    break
                passed += 1
                print(f"ok      {name}", flush=True)
        finally:
            driver.quit()
            server.kill()
    left = len(CHECKS) - passed - failed
    if left:
        print(f"{left} checks were not reached")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
