"""Times a vision tower in llama.cpp's clip code (libmtmd): answers each line "run" with a line of JSON,
{"per_s": frames a second}, until its input ends.

    clip_worker.py MODEL FRAMES THREADS

MODEL is a file that `clip_files.py` wrote. A run encodes FRAMES pictures, one by one, as clip does with SigLIP. They
have the tower's size and are normalised before. Flash attention is on or off, whichever is faster before the first
answer.
"""

import ctypes
import random
import sys
import time
from pathlib import Path

import llama_cpp as llama
from gguf import GGUFReader
from llama_cpp import mtmd_cpp as mtmd

from worker import serve

SEED = 1
TRIALS = 2


class Tower:
    def __init__(self, path, frames, threads, flash):
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = params.warmup = params.print_timings = False
        params.n_threads = threads
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # Pictures alone need no words, and so no decoder.
        self.context = mtmd.mtmd_init_from_file(path.encode(), None, params)
        if not self.context:
            sys.exit(f"llama.cpp cannot open {path}")
        fields = GGUFReader(path).fields
        side, patch = (fields[f"clip.vision.{name}"].contents() for name in ("image_size", "patch_size"))
        source = random.Random(SEED)
        bitmaps = (ctypes.c_void_p * frames)()
        for frame in range(frames):
            pixels = (ctypes.c_uint8 * (3 * side * side)).from_buffer_copy(source.randbytes(3 * side * side))
            bitmaps[frame] = mtmd.mtmd_bitmap_init(side, side, pixels)
        marker = mtmd.mtmd_default_marker() * frames
        text = mtmd.mtmd_input_text(marker, len(marker), False, True)
        self.list = mtmd.mtmd_input_chunks_init()
        if mtmd.mtmd_tokenize(self.context, self.list, ctypes.byref(text), bitmaps, frames) != 0:
            sys.exit("mtmd_tokenize failed")
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        self.chunks = [mtmd.mtmd_input_chunks_get(self.list, i) for i in range(mtmd.mtmd_input_chunks_size(self.list))]
        outputs = [mtmd.mtmd_input_chunk_get_n_tokens(chunk) for chunk in self.chunks]
        # Not cut into several, and not made larger or smaller.
        if outputs != [(side // patch) ** 2] * frames:
            sys.exit(f"{frames} pictures of {side} pixels became {outputs} patches")

    def run(self):
        """Frames a second."""
        start = time.perf_counter()
        for chunk in self.chunks:
            if mtmd.mtmd_encode_chunk(self.context, chunk) != 0:
                sys.exit("mtmd_encode_chunk failed")
        return len(self.chunks) / (time.perf_counter() - start)

    def free(self):
        mtmd.mtmd_input_chunks_free(self.list)
        mtmd.mtmd_free(self.context)


def main(path, frames, threads):
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, None)
    mtmd.mtmd_log_set(quiet, None)
    llama.llama_backend_init()
    best = None
    for flash in (True, False):
        candidate = Tower(path, int(frames), int(threads), flash)
        # The first run makes the buffers.
        speed = max(candidate.run() for _ in range(1 + TRIALS))
        if best is None or speed > best[0]:
            if best:
                best[1].free()
            best = speed, candidate, flash
        else:
            candidate.free()
    _, chosen, flash = best
    system = llama.llama_print_system_info().decode()
    settings = f"{Path(path).stem}, flash attention {'on' if flash else 'off'}, {threads} threads"
    serve(settings, system, chosen.run)


if __name__ == "__main__":
    main(*sys.argv[1:])
