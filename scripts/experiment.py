#!/usr/bin/env python3
"""Puts what scripts/experiment.sh measured together. Called by it; needs nothing but Python.

    scripts/experiment.py RUNS_FOLDER

Writes docs/experiment.json (every run), docs/images/experiment.svg and docs/images/experiment-curves.svg, and the tables of
docs/experiment.md, each between two comment lines that name it.
"""

import json
import re
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("accuracy", "explanation", "guarded", "tempered", "halved")
#: What tempered and halved are made of: the same training at another strength.
TRAINED = ("accuracy", "explanation", "guarded")
COLOURS = {"before": "#777777", "accuracy": "#c0504d", "explanation": "#2e75b6", "guarded": "#3a9a5b",
           "tempered": "#8a5bb5", "halved": "#d08a2e"}
#: What the tables show: heading, and the path of the figure in what `candor-tools eval` prints.
MAIN = (
    ("label accuracy (WAR)", "war"),
    ("UAR", "uar"),
    ("EEA, verifier", "eea"),
    ("EEA, lexicon", "lexicon.eea"),
    ("EPC, verifier", "epc"),
    ("EPC, lexicon", "lexicon.epc"),
    ("FCR, verifier", "fcr"),
    ("cue accuracy", "cue_accuracy"),
    ("readable", "readable"),
)
CONDUCT = (
    ("sentences", "sentences"),
    ("words", "words"),
    ("sentences that name an emotion", "naming_share"),
    ("one sentence only", "one_sentence_share"),
    ("another's, word for word", "repeated_share"),
    ("distinct pairs of words", "distinct_2"),
    ("cue accuracy", "cue_accuracy"),
    ("cue accuracy, shuffled", "cue_accuracy_shuffled"),
)


def figure(measured, path):
    """The value at a dotted path."""
    for key in path.split("."):
        measured = measured[key]
    return measured


def interval(measured, path):
    """Its 95 % interval, where one was computed."""
    found = measured["intervals"].get(path.replace(".", "_"))
    return tuple(found) if found else None


def percent(value):
    return f"{100 * value:.1f}"


def shown(path, value):
    return f"{value:.1f}" if path in ("sentences", "words") else percent(value)


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def main_table(before, runs):
    """One row a figure: before, then for each recipe the median of its seeds and all of them."""
    rows = []
    for heading, path in MAIN:
        low, high = interval(before, path) or (None, None)
        start = percent(figure(before, path)) + (f" [{percent(low)}, {percent(high)}]" if low is not None else "")
        row = [heading, start]
        for recipe in RECIPES:
            values = [figure(run["after"], path) for run in runs if run["recipe"] == recipe]
            row.append(f"**{percent(median(values))}** ({', '.join(map(percent, values))})")
        rows.append(row)
    return table(["%", "before, with 95 % interval", *RECIPES], rows)


def runs_table(before, runs):
    """One row a run, with intervals of what is claimed."""
    paths = ("war", "eea", "epc", "lexicon.epc", "cue_accuracy")
    rows = []
    for name, measured in [("before", before)] + [(f"{run['recipe']}, seed {run['seed']}", run["after"]) for run in runs]:
        cells = []
        for path in paths:
            bounds = interval(measured, path)
            text = percent(figure(measured, path))
            cells.append(f"{text} [{percent(bounds[0])}, {percent(bounds[1])}]" if bounds else text)
        rows.append([name, *cells])
    return table(["run", "WAR", "EEA", "EPC", "EPC, lexicon", "cue accuracy"], rows)


def conduct_table(before, runs):
    rows = []
    for heading, path in CONDUCT:
        row = [heading, shown(path, figure(before, path))]
        for recipe in RECIPES:
            row.append(shown(path, median(figure(run["after"], path) for run in runs if run["recipe"] == recipe)))
        rows.append(row)
    return table(["", "before", *RECIPES], rows)


def policy_table(policies):
    rows = []
    for one in policies:
        measured = one["after"]
        rows.append([
            one["recipe"], one["policy"], percent(measured["war"]), percent(measured["eea"]), percent(measured["epc"]),
            percent(measured["lexicon"]["epc"]), percent(measured["verified_share"]),
            f"{measured['tokens']['completion']:.1f}", f"{measured['tokens']['extra']:.1f}",
        ])
    head = ["model", "policy", "WAR", "EEA", "EPC", "EPC, lexicon", "verified", "tokens kept", "tokens thrown away"]
    return table(head, rows)


def svg(width, height, parts):
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui,sans-serif" font-size="13"><rect width="100%" height="100%" fill="#ffffff"/>'
        + "".join(parts) + "</svg>\n"
    )


def dots(before, runs):
    """A dot a run with its interval, in a row a figure."""
    figures = [item for item in MAIN if item[1] != "readable"]
    left, right, row, top = 190, 30, 76, 40
    width, height = 860, top + row * len(figures) + 30
    x = lambda share: left + (width - left - right) * share
    parts = []
    for tick in range(0, 101, 10):
        at = x(tick / 100)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top - 8}" y2="{height - 24}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - 8}" text-anchor="middle" fill="#555">{tick} %</text>')
    for index, name in enumerate(("before", *RECIPES)):
        at = left + index * 108
        parts.append(f'<circle cx="{at}" cy="14" r="5" fill="{COLOURS[name]}"/><text x="{at + 10}" y="18">{name}</text>')
    for index, (heading, path) in enumerate(figures):
        base = top + index * row
        parts.append(f'<text x="{left - 12}" y="{base + 30}" text-anchor="end">{heading}</text>')
        lines = [("before", before)] + [(run["recipe"], run["after"]) for run in runs]
        for line, (name, measured) in enumerate(lines):
            y = base + 5 + line * (row - 14) / max(1, len(lines) - 1)
            bounds = interval(measured, path)
            if bounds:
                parts.append(
                    f'<line x1="{x(bounds[0]):.1f}" x2="{x(bounds[1]):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
                    f'stroke="{COLOURS[name]}" stroke-width="2"/>'
                )
            parts.append(f'<circle cx="{x(figure(measured, path)):.1f}" cy="{y:.1f}" r="3.5" fill="{COLOURS[name]}"/>')
    return svg(width, height, parts)


def smooth(values, reach):
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    out = []
    for index in range(len(values)):
        low, high = max(0, index - reach), min(len(values), index + reach + 1)
        out.append((sums[high] - sums[low]) / (high - low))
    return out


def curves(runs, folder):
    """What the steps say: accuracy, explanation, share of sentences naming an emotion, cue accuracy, length, KL."""
    panels = ("accuracy", "explanation", "naming_share", "cue_accuracy", "length", "kl")
    wide, high, gap = 400, 210, 20
    parts = []
    for place, key in enumerate(panels):
        left, top = 50 + (place % 2) * (wide + gap), 60 + (place // 2) * (high + gap + 20)
        lines = []
        for run in (run for run in runs if run["recipe"] in TRAINED):
            path = folder / f"{run['recipe']}-{run['seed']}" / "metrics.jsonl"
            steps = [json.loads(line) for line in path.read_text().splitlines()]
            values = [step[key] for step in steps if step.get(key) is not None]
            lines.append((run["recipe"], smooth(values, 25)))
        lowest = min(min(values) for _, values in lines)
        highest = max(max(values) for _, values in lines)
        spread = (highest - lowest) or 1.0
        parts.append(f'<text x="{left}" y="{top - 8}" font-weight="600">{key}</text>')
        parts.append(f'<rect x="{left}" y="{top}" width="{wide - 50}" height="{high}" fill="none" stroke="#ccc"/>')
        for share, value in ((0, highest), (1, lowest)):
            y = top + share * high + (10 if share == 0 else 0)
            parts.append(f'<text x="{left - 4}" y="{y}" text-anchor="end" font-size="11">{value:.3g}</text>')
        for name, values in lines:
            chosen = range(0, len(values), max(1, len(values) // 200))
            points = " ".join(
                f"{left + (wide - 50) * i / max(1, len(values) - 1):.1f},{top + high * (1 - (values[i] - lowest) / spread):.1f}"
                for i in chosen
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.3"/>')
    for index, name in enumerate(TRAINED):
        at = 50 + index * 130
        parts.append(f'<circle cx="{at}" cy="14" r="5" fill="{COLOURS[name]}"/><text x="{at + 10}" y="18">{name}</text>')
    return svg(2 * wide + gap + 40, 50 + 3 * (high + gap + 20), parts)


def put(text, name, content):
    """Replaces what stands between <!-- NAME --> and <!-- end of NAME -->."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)", re.S)
    if not pattern.search(text):
        sys.exit(f"docs/experiment.md has no place for {name}")
    return pattern.sub(lambda match: match[1] + content + match[2], text)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    measured = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "eval").glob("*.json"))}
    before = measured["before"]
    runs, policies = [], []
    for name, after in measured.items():
        recipe, _, rest = name.partition("-")
        if match := re.fullmatch(r"(?:(\d+)-)?(retry|guide):(\d+)", rest):
            policies.append({"recipe": recipe, "seed": int(match[1]) if match[1] else None,
                             "policy": f"{match[2]}:{match[3]}", "after": after})
        elif recipe in RECIPES:
            runs.append({"recipe": recipe, "seed": int(rest), "before": before, "after": after})
    runs.sort(key=lambda run: (RECIPES.index(run["recipe"]), run["seed"]))
    order = ("before", *RECIPES)
    annotated = [{"recipe": "before", "seed": None, "policy": "annotate", "after": before}]
    annotated += [{"recipe": run["recipe"], "seed": run["seed"], "policy": "annotate", "after": run["after"]}
                  for run in runs if run["seed"] == 1]
    policies = sorted(annotated + policies, key=lambda one: (order.index(one["recipe"]), one["policy"]))
    out = {"runs": runs, "policies": policies}
    (ROOT / "docs/experiment.json").write_text(json.dumps(out, indent=1) + "\n")
    (ROOT / "docs/images/experiment.svg").write_text(dots(before, runs))
    (ROOT / "docs/images/experiment-curves.svg").write_text(curves(runs, folder))
    page = ROOT / "docs/experiment.md"
    text = page.read_text()
    for name, content in (
        ("main table", main_table(before, runs)),
        ("runs table", runs_table(before, runs)),
        ("policy table", policy_table(policies)),
    ):
        text = put(text, name, content)
    page.write_text(text)
    page = ROOT / "docs/reward.md"
    page.write_text(put(page.read_text(), "conduct table", conduct_table(before, runs)))


if __name__ == "__main__":
    main()
