"""The aggregated posterior q_N(z) of anybody's codes: samples, moments, and exact log density."""
