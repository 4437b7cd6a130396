// The page: shows what the server says, sends what is pressed. It knows what stands first and second, and no more.
"use strict";

const QUESTIONS = {
  fits: ["Which fits the face better?", "What it says of the face, and the emotion it names."],
  coherent: ["Which is more coherent?", "Sentences that follow from each other and lead to the answer."],
};
const SHORT = { first: "1", tie: "neither", second: "2" };
const KEYS = {
  1: "first", ArrowLeft: "first", 2: "second", ArrowRight: "second", 0: "tie", ArrowDown: "tie",
};
const NAME_KEY = "candor-rater";

const element = (id) => document.getElementById(id);
const choices = [...document.querySelectorAll("#choices button")];

let state = null;
let shownToken = null;
let busy = false;

// A browser may keep nothing; then the name is asked for again.
const remembered = {
  get: () => { try { return localStorage.getItem(NAME_KEY); } catch { return null; } },
  set: (name) => {
    try { name === null ? localStorage.removeItem(NAME_KEY) : localStorage.setItem(NAME_KEY, name); } catch { /* as above */ }
  },
};

function say(text) {
  element("message").textContent = text;
  element("message").hidden = !text;
}

async function ask(path, body) {
  const options = body && {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The program does not answer. Start candor-tools rate again, then press the key once more: "
      + "nothing that was saved is lost.");
  }
  const answer = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  if (!response.ok) {
    throw Object.assign(new Error(answer.error), { status: response.status });
  }
  return answer;
}

// One request at a time: a key pressed while a vote is on its way counts for nothing.
async function exchange(request) {
  if (busy) return;
  busy = true;
  choices.forEach((button) => { button.disabled = true; });
  try {
    show(await request());
    say("");
  } catch (error) {
    say(error.message);
    // The page is behind: another window voted, or the server has other pairs now.
    if (error.status === 404 || error.status === 409) {
      await load().then(show, () => {});
    }
  } finally {
    busy = false;
    choices.forEach((button) => { button.disabled = false; button.classList.remove("pressed"); });
  }
}

const load = (name = state?.rater ?? remembered.get()) =>
  ask(`/api/state${name ? `?rater=${encodeURIComponent(name)}` : ""}`);

const named = (body) => ({ ...(state.named_here ? { rater: state.rater } : {}), ...body });

function vote(choice) {
  if (!state?.pair) return;
  const { token, question } = state.pair;
  choices.find((button) => button.dataset.choice === choice).classList.add("pressed");
  exchange(() => ask("/api/vote", named({ pair: token, question, choice })));
}

function undo() {
  if (!state?.last) return;
  const { pair, question } = state.last;
  exchange(() => ask("/api/undo", named({ pair, question })));
}

function show(next) {
  const before = state;
  state = next;
  const known = state.rater !== null;
  element("name-form").hidden = known;
  element("progress-box").hidden = !known;
  element("who").hidden = !known;
  element("other-rater").hidden = !state.named_here;
  element("undo").disabled = !state.last;
  element("pair").hidden = !state.pair;
  element("done").hidden = !known || state.pair !== null;
  if (!known) {
    shownToken = null;
    element("name").focus();
    return;
  }
  element("rater").textContent = state.rater;
  element("progress").max = state.pairs;
  element("progress").value = state.done;
  element("progress-text").textContent = `${state.done} of ${state.pairs}`;
  if (!state.pair) {
    shownToken = null;
    element("clip").replaceChildren();
    element("status").textContent = "That was all. Thank you!";
    return;
  }
  showPair(state.pair);
  const saved = before?.rater === state.rater ? "Saved. " : "";
  element("status").textContent = `${saved}${state.done} of ${state.pairs} done. ${QUESTIONS[state.pair.question][0]}`;
}

function showPair(pair) {
  const [question, hint] = QUESTIONS[pair.question];
  element("question").textContent = question;
  element("hint").textContent = hint;
  for (const step of document.querySelectorAll("#steps li")) {
    const answer = pair.answers[step.dataset.question];
    step.querySelector("b").textContent = answer ? `: ${SHORT[answer]}` : "";
    step.toggleAttribute("aria-current", step.dataset.question === pair.question);
  }
  // Between the two questions of a pair the clip plays on.
  if (pair.token === shownToken) return;
  shownToken = pair.token;
  const hasAnswer = pair.first.answer !== null || pair.second.answer !== null;
  for (const place of ["first", "second"]) {
    element(place).querySelector(".text").textContent = pair[place].text;
    const answer = element(place).querySelector(".answer");
    answer.replaceChildren();
    if (hasAnswer) {
      const emotion = document.createElement("b");
      emotion.textContent = pair[place].answer ?? "none";
      answer.append("Answer: ", emotion);
    }
  }
  showClip(pair.clip);
  scrollTo(0, 0);
}

function showClip({ kind, sources }) {
  const figure = element("clip");
  figure.className = sources.length === 1 ? "one" : "many";
  const parts = sources.map((source, index) => {
    const part = document.createElement(kind === "video" ? "video" : "img");
    if (kind === "video") {
      const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
      Object.assign(part, { controls: true, loop: true, muted: true, autoplay: !still, playsInline: true });
      part.setAttribute("aria-label", "The clip");
    } else {
      part.alt = sources.length === 1 ? "The face" : `Picture ${index + 1} of ${sources.length}`;
    }
    part.addEventListener("error", () => cannotShow(part, source), { once: true });
    part.src = source;
    return part;
  });
  figure.replaceChildren(...parts);
  if (parts.length === 0) figure.append(note("There is no picture in this clip."));
}

function note(text) {
  const paragraph = document.createElement("p");
  paragraph.textContent = text;
  return paragraph;
}

async function cannotShow(part, source) {
  // The server says why where it could not read the clip; otherwise the browser has no decoder for it.
  const answer = await fetch(source, { headers: { range: "bytes=0-0" } }).then((response) => response.json()).catch(() => ({}));
  part.replaceWith(note(answer.error ?? "The browser cannot show this clip. Convert it to MP4 with H.264 to rate it."));
}

function toggleVideo() {
  const video = document.querySelector("#clip video");
  if (video) video.paused ? video.play() : video.pause();
}

// Before the video's own controls, whose arrow keys would seek.
document.addEventListener("keydown", (event) => {
  const typing = event.target instanceof HTMLInputElement;
  if (typing || event.ctrlKey || event.altKey || event.metaKey || element("help-box").open) return;
  const key = event.key;
  const isVote = KEYS[key] && state?.pair;
  const isUndo = key === "Backspace" || key === "u" || key === "U";
  const isPlay = key === " " && !event.target.closest?.("button, video");
  if (!isVote && !isUndo && !isPlay && key !== "?") return;
  event.preventDefault();
  event.stopPropagation();
  // A key that is held down is one vote, not many.
  if (event.repeat) return;
  if (isVote) vote(KEYS[key]);
  else if (isUndo) undo();
  else if (isPlay) toggleVideo();
  else element("help-box").showModal();
}, true);

for (const button of choices) {
  button.addEventListener("click", (event) => {
    vote(button.dataset.choice);
    // After a click with the mouse the space bar belongs to the clip again.
    if (event.detail > 0) button.blur();
  });
}
element("undo").addEventListener("click", undo);
element("help").addEventListener("click", () => element("help-box").showModal());
element("other-rater").addEventListener("click", () => {
  remembered.set(null);
  state = null;
  exchange(() => load(null));
});
element("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = element("name").value.trim();
  if (!name) return;
  exchange(async () => {
    const next = await load(name);
    remembered.set(next.rater);
    return next;
  });
});

exchange(async () => {
  try {
    return await load();
  } catch (error) {
    // A name of another visit that does not serve here.
    if (error.status !== 403 && error.status !== 422) throw error;
    remembered.set(null);
    return load(null);
  }
});
