"use strict";
// Rows: i id, t truth, p picture (PNG, base64), r one entry for each evaluation. Entries: a answer, f fast answer,
// v and l what verifier and lexicon read, d verdict, w withheld, e readable, n and x tokens, c cues right and stated,
// s sentences as [text, labels, supports].
(() => {
  const rows = JSON.parse(document.getElementById("data").textContent);
  const two = rows.length > 0 && rows[0].r.length > 1;
  const any = (test) => (row) => row.r.some((run) => test(run, row));
  const right = (row, run) => row.r[run].a === row.t;
  const kinds = [
    ["all", () => true],
    ["answer wrong", any((run, row) => run.a !== row.t)],
    ["rationale ≠ answer", any((run) => run.v !== run.a)],
    ["rationale ≠ truth", any((run, row) => run.v !== row.t)],
    ["judges disagree", any((run) => run.v !== run.l)],
    ["fast ≠ after", any((run) => run.f !== run.a)],
    ["not verified", any((run) => run.d !== "verified")],
    ["a cue not borne out", any((run) => run.c && run.c[0] < run.c[1])],
    ["unreadable", any((run) => !run.e)],
  ];
  if (two) {
    kinds.push(
      ["only A right", (row) => right(row, 0) && !right(row, 1)],
      ["only B right", (row) => right(row, 1) && !right(row, 0)],
      ["answers differ", (row) => row.r[0].a !== row.r[1].a],
      ["only A consistent", (row) => row.r[0].v === row.r[0].a && row.r[1].v !== row.r[1].a],
      ["only B consistent", (row) => row.r[1].v === row.r[1].a && row.r[0].v !== row.r[0].a],
    );
  }
  const PAGE = 40;
  const byId = (id) => document.getElementById(id);
  const list = byId("rows"), more = byId("more"), count = byId("count");
  const text = byId("text"), truth = byId("truth"), answer = byId("answer");
  let kind = 0, found = [], shown = 0;

  const make = (tag, className, ...children) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children);
    return element;
  };
  const tag = (words, good) => make("span", "tag" + (good === undefined ? "" : good ? " yes" : " no"), words);

  const entry = (run, row, place) => {
    const head = make("p", "answer");
    if (two) head.append(make("b", "key run" + place, "AB"[place]));
    head.append(make("b", "", row.t), "→", tag((run.a === row.t ? "✓ " : "✗ ") + (run.a || "no answer"), run.a === row.t));
    if (run.f !== run.a) head.append(tag("fast " + (run.f || "none")));
    if (run.v || run.l) {
      head.append(tag("verifier reads " + (run.v || "none"), run.v === run.a));
      if (run.l !== run.v) head.append(tag("lexicon reads " + (run.l || "none"), run.l === run.a));
    }
    head.append(tag(run.d, run.d === "verified" ? true : run.d === "contradicted" ? false : undefined));
    const rationale = make("p", "rationale");
    if (run.w) rationale.append("The rationale is withheld.");
    for (const [words, labels, supports] of run.s) {
      const [className, sign] = supports === true ? ["yes", "✓ "] : supports === false ? ["no", "✗ "] : ["silent", "· "];
      rationale.append(make("mark", className, sign + words + " ", make("small", "", labels)), " ");
    }
    const facts = [run.n + " tokens"];
    if (run.x) facts.push(run.x + " more thrown away");
    if (run.c) facts.push("cues borne out " + run.c[0] + " of " + run.c[1]);
    if (place === row.r.length - 1) facts.push(row.i);
    return make("div", "run", head, rationale, make("p", "facts", facts.join(" · ")));
  };

  const article = (row) => {
    const element = make("article");
    if (row.p) {
      const picture = make("img");
      picture.loading = "lazy";
      picture.alt = "";
      picture.src = "data:image/png;base64," + row.p;
      element.append(picture);
    }
    row.r.forEach((run, place) => {
      const one = entry(run, row, place);
      if (!row.p) one.classList.add("wide");
      element.append(one);
    });
    return element;
  };

  const showMore = () => {
    const next = found.slice(shown, shown + PAGE);
    list.append(...next.map(article));
    shown += next.length;
    more.hidden = shown >= found.length;
  };

  // What the search looks at, put together once.
  const haystack = rows.map((row) => (row.i + "\n" + row.r.map((run) => run.s.map((s) => s[0]).join(" ")).join("\n")).toLowerCase());
  const matches = (row, index) => {
    const words = text.value.trim().toLowerCase();
    return (!words || haystack[index].includes(words)) && (!truth.value || row.t === truth.value)
      && (!answer.value || row.r.some((run) => (run.a || "no answer") === answer.value));
  };
  const buttons = kinds.map(([name], index) => {
    const button = make("button", "", name + " ", make("small"));
    button.type = "button";
    button.addEventListener("click", () => { kind = index; update(); });
    byId("kinds").append(button);
    return button;
  });
  const update = () => {
    const left = rows.filter(matches);
    kinds.forEach(([, test], index) => {
      buttons[index].setAttribute("aria-pressed", index === kind);
      buttons[index].lastChild.textContent = left.filter(test).length;
    });
    found = left.filter(kinds[kind][1]);
    shown = 0;
    list.replaceChildren();
    count.textContent = found.length + " of " + rows.length + " entries";
    showMore();
  };

  const options = (select, values) => {
    for (const value of [...new Set(values)].sort()) select.append(make("option", "", value));
    select.addEventListener("change", update);
  };
  options(truth, rows.map((row) => row.t));
  options(answer, rows.flatMap((row) => row.r.map((run) => run.a || "no answer")));
  let waiting;
  text.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(update, 120); });
  more.addEventListener("click", showMore);
  if ("IntersectionObserver" in window) {
    new IntersectionObserver((seen) => { if (seen.some((one) => one.isIntersecting) && shown < found.length) showMore(); }, { rootMargin: "600px" }).observe(more);
  }
  update();
})();
