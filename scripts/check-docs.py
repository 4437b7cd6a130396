#!/usr/bin/env python3
"""Holds the documentation to what exists. Called by `make check-docs`; needs the built binaries and nothing but Python.

- Every relative link leads to a file, and to a heading where it names one.
- Every `candor` and `candor-tools` command in a code block or code span names subcommands and options that --help
  knows; every `make` command names a target.
- Every block whose fence says ```sh run is run, in a scratch folder from which the repository's files can be reached
  under their own names, and must succeed.
"""

import os
import re
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BINARIES = ("candor", "candor-tools")
RUN_LIMIT_S = 600
problems = []


def pages():
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()
    return [ROOT / name for name in tracked]


def slug(heading):
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"[`*_]|\[|\]\([^)]*\)", "", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def split_fences(text):
    """The page without its fenced blocks, and the blocks as (fence words, first line, lines)."""
    prose, blocks, fence = [], [], None
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            if fence is None:
                fence = (line.strip().strip("`").split(), number, [])
            else:
                blocks.append(fence)
                fence = None
        elif fence is None:
            prose.append((number, line))
        else:
            fence[2].append(line)
    return prose, blocks


def check_links(page, prose, anchors):
    for number, line in prose:
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            where = f"{page.relative_to(ROOT)}:{number}"
            if not file.exists():
                problems.append(f"{where}: the link {target} leads nowhere")
            elif anchor and file.suffix == ".md" and anchor not in anchors.get(file, ()):
                problems.append(f"{where}: {path or page.name} has no heading #{anchor}")


@lru_cache(maxsize=None)
def help_of(command):
    """--help of a subcommand, None where there is no such subcommand."""
    result = subprocess.run(
        [ROOT / "target" / "debug" / command[0], *command[1:], "--help"], capture_output=True, text=True, timeout=60
    )
    return result.stdout if result.returncode == 0 else None


@lru_cache(maxsize=None)
def subcommands(command):
    text = help_of(command) or ""
    listed = re.search(r"^Commands:\n((?:  .*\n|\n)+)", text, re.MULTILINE)
    return set(re.findall(r"^  (\S+)", listed.group(1), re.MULTILINE)) - {"help"} if listed else set()


def check_command(where, line):
    """A command line of ours: do its subcommands and options exist?"""
    words = re.split(r"\s+", line.strip())
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)] or [""]
    name = words[0].rpartition("/")[2]
    if name == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        for word in words[1:]:
            if re.fullmatch(r"[a-z-]+", word) and word not in targets:
                problems.append(f"{where}: make has no target {word}")
        return
    if name not in BINARIES:
        return
    command = (name,)
    rest = words[1:]
    while rest and rest[0] in subcommands(command):
        command += (rest.pop(0),)
    if rest and subcommands(command) and re.fullmatch(r"[a-z][a-z-]*", rest[0]):
        problems.append(f"{where}: {' '.join(command)} has no subcommand {rest[0]}")
        return
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", help_of(command) or ""))
    for word in rest:
        if word in ("|", ">", "<", "&&", ";"):
            break
        option = re.match(r"--?[a-zA-Z][\w-]*", word)
        if option and option.group() not in known:
            problems.append(f"{where}: {' '.join(command)} has no option {option.group()}")


def check_commands(page, prose, blocks):
    name = page.relative_to(ROOT)
    for number, line in prose:
        for span in re.findall(r"`([^`]+)`", line):
            check_command(f"{name}:{number}", span)
    for words, first, lines in blocks:
        if words[:1] == ["sh"]:
            joined = "\n".join(lines).replace("\\\n", " ")
            for line in joined.splitlines():
                line = re.sub(r"(^|\s)#.*", "", line)
                for part in re.split(r"\s*(?:\||&&|;)\s+", line):
                    check_command(f"{name}:{first}", part)


def run_blocks(page, blocks):
    for words, first, lines in blocks:
        if words[:2] != ["sh", "run"]:
            continue
        where = f"{page.relative_to(ROOT)}:{first}"
        with tempfile.TemporaryDirectory() as scratch:
            for entry in ROOT.iterdir():
                if entry.name not in (".git", "target") and not (entry.is_file() and entry.suffix == ".html"):
                    (Path(scratch) / entry.name).symlink_to(entry)
            path = f"{ROOT / 'target' / 'debug'}:{os.environ['PATH']}"
            try:
                result = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
                    cwd=scratch, env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=RUN_LIMIT_S,
                )
            except subprocess.TimeoutExpired:
                problems.append(f"{where}: still running after {RUN_LIMIT_S} s")
                continue
        print(f"ran {where}: exit code {result.returncode}")
        if result.returncode != 0:
            problems.append(f"{where}: exit code {result.returncode}\n{result.stdout[-2000:]}")


def main():
    parsed = {page: split_fences(page.read_text(encoding="utf-8")) for page in pages()}
    anchors = {
        page: {slug(line.lstrip("#")) for _, line in prose if line.startswith("#")} for page, (prose, _) in parsed.items()
    }
    for page, (prose, blocks) in parsed.items():
        check_links(page, prose, anchors)
        check_commands(page, prose, blocks)
        run_blocks(page, blocks)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(parsed)} pages, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
