"""Times llama.cpp: answers each line "run" with a line of JSON, {"per_s": tokens a second}, until its input ends.

    llama_worker.py MODEL TASK POSITIONS TOKENS THREADS

TASK decode: POSITIONS tokens are in the cache, then TOKENS are decoded one by one, each by a llama_decode of its own.
TASK prefill: one batch of POSITIONS tokens is read into an empty cache.

Settings are those that are best for llama.cpp here: weights repacked for the processor when it has that (the default),
the number of threads that was asked for, and flash attention on or off and, for a prompt, runs of 512 or 128 tokens,
whichever is fastest in short runs of each before the first answer.
"""

import ctypes
import itertools
import random
import sys
import time

import llama_cpp as llama

from worker import serve

SEED = 1
TRIALS = 3
TRIAL_TOKENS = 8
# No more trials of a candidate after this time, and no more tokens of a run: on a busy machine, threads that wait for each
# other at hundreds of barriers a token can take minutes.
TRIAL_S = 5.0
RUN_S = 10.0
# Tokens of a prompt that are computed at once (n_ubatch).
RUNS = (512, 128)


class Task:
    def __init__(self, model, task, positions, tokens, threads, flash, run):
        params = llama.llama_context_default_params()
        params.n_ctx = positions + tokens + 8
        params.n_batch, params.n_ubatch = positions, min(run, positions)
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama.llama_init_from_model(model, params)
        if not self.context:
            sys.exit("llama.cpp gives no context")
        self.memory = llama.llama_get_memory(self.context)
        self.task, self.positions, self.tokens = task, positions, tokens
        vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        source = random.Random(SEED)
        self.ids = (ctypes.c_int32 * (positions + tokens))(*(source.randrange(vocabulary) for _ in range(positions + tokens)))
        if task == "decode":
            self.decode(0, positions)

    def decode(self, first, count):
        address = ctypes.byref(self.ids, 4 * first)
        ids = ctypes.cast(address, ctypes.POINTER(ctypes.c_int32))
        if llama.llama_decode(self.context, llama.llama_batch_get_one(ids, count)) != 0:
            sys.exit("llama_decode failed")
        # Waits for the scores.
        llama.llama_get_logits(self.context)

    def run(self, tokens=None):
        """Tokens a second."""
        tokens = tokens or self.tokens
        if self.task == "prefill":
            llama.llama_memory_clear(self.memory, False)
            start = time.perf_counter()
            self.decode(0, self.positions)
            return self.positions / (time.perf_counter() - start)
        llama.llama_memory_seq_rm(self.memory, 0, self.positions, -1)
        start, done, taken = time.perf_counter(), 0, 0.0
        while done < tokens and taken < RUN_S:
            self.decode(self.positions + done, 1)
            done, taken = done + 1, time.perf_counter() - start
        return done / taken

    def trial(self):
        """The best of some short runs."""
        start, speeds = time.perf_counter(), []
        while not speeds or len(speeds) < 1 + TRIALS and time.perf_counter() - start < TRIAL_S:
            speeds.append(self.run(TRIAL_TOKENS))
        return max(speeds)


def main(path, task, positions, tokens, threads):
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, None)
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot open {path}")
    best = None
    runs = RUNS if task == "prefill" else RUNS[:1]
    for flash, run in itertools.product((True, False), runs):
        candidate = Task(model, task, int(positions), int(tokens), int(threads), flash, run)
        speed = candidate.trial()
        if best is None or speed > best[0]:
            if best:
                llama.llama_free(best[1].context)
            best = speed, candidate, flash, run
        else:
            llama.llama_free(candidate.context)
    _, chosen, flash, run = best
    system = llama.llama_print_system_info().decode()
    settings = f"flash attention {'on' if flash else 'off'}, runs of {run}, {threads} threads"
    serve(settings, system, chosen.run)


if __name__ == "__main__":
    main(*sys.argv[1:])
