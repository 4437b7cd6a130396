"""Tests of candor_reward.py against a running reward server: CANDOR_REWARD_URL=http://… python3 test_candor_reward.py

`cargo test` starts one and runs this.
"""

import asyncio
import inspect
import socket
import unittest

import candor_reward
from candor_reward import compute_score, rewards, trl_reward

GOOD = "<think>The corners of her mouth turn down. She feels deep sadness.</think>\n<answer>sad</answer>"
BARE = "sad"


class Client(unittest.TestCase):
    def test_parts(self):
        good, bare = rewards([GOOD, BARE], ["sadness", "happy"])
        self.assertEqual([good["format"], good["accuracy"], good["explanation"]], [1, 1, 1])
        self.assertEqual(good["reward"], 3)
        self.assertEqual(good["sentences"], [["neutral"], ["sadness"]])
        self.assertEqual([bare["format"], bare["accuracy"], bare["explanation"], bare["sentences"]], [0, 0, 0, []])

    def test_refusals_have_reasons(self):
        with self.assertRaisesRegex(RuntimeError, r"422.*labels\[1\].*calm"):
            rewards([GOOD, GOOD], ["sad", "calm"])

    def test_no_server(self):
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))  # bound and not listening: refuses
            with self.assertRaisesRegex(RuntimeError, "/reward: .*"):
                rewards([GOOD], ["sad"], url=f"http://127.0.0.1:{held.getsockname()[1]}/", patience=0)


class Shims(unittest.TestCase):
    def test_trl(self):
        functions = [trl_reward(part) for part in ("reward", "format", "accuracy", "explanation")]
        self.assertTrue(all(inspect.iscoroutinefunction(one) for one in functions))
        self.assertEqual(functions[3].__name__, "candor_explanation")
        conversation = [{"role": "assistant", "content": GOOD}]
        parts = [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}]
        batch = {"prompts": ["p"] * 3, "completion_ids": [[1]] * 3, "label": ["sad", "happy", "sad"], "trainer_state": None}

        async def together():
            return await asyncio.gather(*(one(completions=[GOOD, conversation, parts], **batch) for one in functions))

        self.assertEqual(asyncio.run(together()), [[3, 1, 3], [1, 1, 1], [1, 0, 1], [1, 0, 1]])

    def test_verl(self):
        score = compute_score(data_source="faces", solution_str=GOOD, ground_truth="sad", extra_info={}, strict=False)
        self.assertEqual(score, {"score": 3, "format": 1, "accuracy": 1, "explanation": 1})
        self.assertEqual(compute_score("faces", BARE, "sad", url=candor_reward.URL)["score"], 0)


if __name__ == "__main__":
    unittest.main()
