"""Speed and memory, measured as ratios against baselines in the same run; no test asserts them."""
