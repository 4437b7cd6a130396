"""Candor's rewards for trainers in Python: a client of `candor-tools reward-server`, and what TRL and verl call.

Nothing but Python's standard library is needed; see docs/reward-server.md.
"""

import asyncio
import json
import os
import time
import urllib.error
import urllib.request

URL = os.environ.get("CANDOR_REWARD_URL", "http://127.0.0.1:8000")

# Trainer and server talk directly, whatever proxy the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def rewards(completions, labels, url=None, timeout=180, patience=30):
    """The parts of each completion's reward: dicts with format, accuracy, explanation, reward and sentences.

    A server that is busy or not there (any more, or yet) is asked again for `patience` seconds; everything else it
    refuses is a RuntimeError with its reason.
    """
    address = (url or URL).rstrip("/") + "/reward"
    body = json.dumps({"completions": list(completions), "labels": list(labels)}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    end = time.monotonic() + patience
    while True:
        try:
            with _OPENER.open(request, timeout=timeout) as answer:
                return json.load(answer)["rewards"]
        except urllib.error.HTTPError as error:
            reason = f"{error.code}: {error.read().decode(errors='replace')}"
            if error.code != 503:
                raise RuntimeError(f"{address}: {reason}") from None
        except (urllib.error.URLError, ConnectionError) as error:
            reason = str(error)
        if time.monotonic() > end:
            raise RuntimeError(f"{address}: {reason}")
        time.sleep(1)


def trl_reward(part="reward", label="label", url=None):
    """An asynchronous reward function for TRL's trainers: reward_funcs=[trl_reward()].

    `part` is reward (the server's weighted sum), format, accuracy or explanation; one function each with
    reward_weights=[...] lets TRL weigh and log them. `label` is the data set's column with the true emotion.
    """

    async def reward(completions, **columns):
        paid = await asyncio.to_thread(rewards, [_text(one) for one in completions], columns[label], url)
        return [one[part] for one in paid]

    reward.__name__ = f"candor_{part}"
    return reward


def compute_score(data_source, solution_str, ground_truth, extra_info=None, url=None, **_):
    """For verl: reward.custom_reward_function.path=candor_reward.py, its name=compute_score."""
    paid = rewards([solution_str], [ground_truth], url)[0]
    return {"score": paid["reward"], **{part: paid[part] for part in ("format", "accuracy", "explanation")}}


def _text(completion):
    """A completion's text: it may come as a text, or as messages whose content is a text or a list of parts."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
