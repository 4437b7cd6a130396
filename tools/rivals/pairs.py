"""Pairs of runs: processes that answer, processes that get in the way, and the statistics."""

import json
import os
import signal
import statistics
import subprocess
import sys
from contextlib import contextmanager


class Failure(Exception):
    """What went wrong and what to do, for the user."""


def call(command, folder):
    """The standard output of a command that must succeed."""
    words = [str(word) for word in command]
    try:
        result = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise Failure(f"{words[0]} cannot be started: {error}") from None
    if result.returncode != 0:
        said = result.stderr.strip().splitlines()[-3:]
        raise Failure(f"{' '.join(words)} failed:\n" + "\n".join(said))
    return result.stdout


class Rival:
    """A worker that holds the rival's model open and times a run whenever it is asked."""

    def __init__(self, command, environment=None):
        self.command, self.environment = [str(word) for word in command], environment or {}

    def __enter__(self):
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | self.environment,
        )
        about = self.answer()
        more = "".join(f", {name}={value}" for name, value in self.environment.items())
        self.settings = f"{about['settings']}{more} ({about['about'].strip()})"
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            said = self.process.stderr.read().strip().splitlines()[-3:]
            raise Failure(f"{self.command[1]} ended:\n" + "\n".join(said))
        return json.loads(line)

    def run(self):
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return self.answer()["per_s"]


# Ends with the process that started it, however that ends.
SPIN = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1000000):
        pass
"""


@contextmanager
def busy(wanted):
    """Keeps every core busy: a spinning process for each, in a session of its own so that the system's fair sharing
    takes it for somebody else's."""
    cores = len(os.sched_getaffinity(0)) if wanted else 0
    processes = [subprocess.Popen([sys.executable, "-c", SPIN], start_new_session=True) for _ in range(cores)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def end_cleanly():
    """Makes a termination end the processes that were started, as an interruption does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def fastest(rivals):
    """The rival whose middle run is the fastest."""
    if len(rivals) == 1:
        return rivals[0]
    return max(rivals, key=lambda rival: statistics.median(rival.run() for _ in range(3)))


def compare(ours, rival, pairs):
    """Runs both in turn. The ratio is the median of the pairs' ratios, ours over the rival's: above 1 ours is faster."""
    measured = [(ours(), rival()) for _ in range(pairs)]
    ratios = [own / other for own, other in measured]
    return {
        "ours": statistics.median(own for own, _ in measured),
        "rival": statistics.median(other for _, other in measured),
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "pairs": measured,
    }
