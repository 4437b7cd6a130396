"""Times onnxruntime: answers each line "run" with a line of JSON, {"per_s": things a second}, until its input ends.

    onnx_worker.py FOLDER int8|f32 THINGS THREADS

Before the first answer every file of FOLDER that `onnx_files.py` wrote in that precision is timed, and the fastest is
kept: attention plain or fused, quantised weights signed or unsigned. All graph optimisations are on. THINGS are what a
run processes: frames, or seconds of sound.
"""

import sys
import time
from pathlib import Path

import numpy
import onnxruntime

from worker import serve

TRIALS = 2
# A candidate that is slower than the best by this factor in its first run is not timed again.
HOPELESS = 1.3


def session(path, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def seconds(opened, inputs):
    start = time.perf_counter()
    opened.run(None, inputs)
    return time.perf_counter() - start


def main(folder, precision, things, threads):
    files = sorted(Path(folder).glob("*.onnx"))
    quantised = [path for path in files if path.stem.endswith("int8")]
    candidates = quantised if precision == "int8" else [path for path in files if path not in quantised]
    best = None
    for path in candidates:
        opened = session(path, int(threads))
        source = opened.get_inputs()[0]
        inputs = {source.name: numpy.random.default_rng(1).standard_normal(source.shape, dtype=numpy.float32)}
        time_s = seconds(opened, inputs)
        if best is None or time_s < HOPELESS * best[0]:
            time_s = min(seconds(opened, inputs) for _ in range(TRIALS))
        print(f"{path.stem}: {1e3 * time_s:.1f} ms", file=sys.stderr, flush=True)
        if best is None or time_s < best[0]:
            best = time_s, opened, inputs, path.stem
    if best is None:
        sys.exit(f"{folder} holds no graph")
    _, opened, inputs, name = best
    about = f"onnxruntime {onnxruntime.__version__}"
    serve(f"{name}, {threads} threads", about, lambda: int(things) / seconds(opened, inputs))


if __name__ == "__main__":
    main(*sys.argv[1:])
