"""Speed and memory, measured as ratios against baselines in the same run; no test asserts them."""

import os

# Before torch loads OpenMP, as the program itself does: the modules here import it first of all.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
