"""What the workers share: how they answer."""

import json
import sys


def serve(settings, about, run):
    """Says what was chosen, then answers each line "run" with what `run()` gives: things a second."""
    print(json.dumps({"settings": settings, "about": about}), flush=True)
    for line in sys.stdin:
        if line.strip() == "run":
            print(json.dumps({"per_s": run()}), flush=True)
