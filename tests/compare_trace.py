#!/usr/bin/env python3
"""Compares the out.* tensors of two safetensors files, as `candor trace` writes them.

    pip install numpy safetensors
    python tests/compare_trace.py GOLDEN TRACE

Prints max|trace - golden| / max|golden| of each tensor of GOLDEN, and fails if one is absent, of another shape, or above
2e-4, or if generated tokens differ.
"""
import sys

import numpy as np
from safetensors.numpy import load_file

TOLERANCE = 2e-4

golden, trace = (load_file(path) for path in sys.argv[1:3])
worst = 0.0
for name in sorted(name for name in golden if name.startswith("out.")):
    if name not in trace or trace[name].shape != golden[name].shape:
        sys.exit(f"{name}: {golden[name].shape} is needed, the trace has {trace[name].shape if name in trace else 'none'}")
    a, b = trace[name].astype(np.float64), golden[name].astype(np.float64)
    if golden[name].dtype.kind == "i":
        error = 0.0 if np.array_equal(a, b) else np.inf
    else:
        error = np.max(np.abs(a - b)) / np.max(np.abs(b))
    print(f"{name:20} {error:.1e}")
    worst = max(worst, np.inf if np.isnan(error) else error)
print(f"{'worst':20} {worst:.1e}")
sys.exit(f"above {TOLERANCE}" if worst > TOLERANCE else 0)
