"""`python -m tests.benchmarks`: every benchmark but the long ones, a table each."""

from __future__ import annotations

from tests.benchmarks import (
    bench_divergence,
    bench_report,
    bench_scale,
    bench_shards,
    bench_training,
    harness,
)

for module in (bench_divergence, bench_shards, bench_training, bench_scale, bench_report):
    name = module.__name__.rpartition("bench_")[2]
    harness.main(name, module.BENCHMARKS, long=getattr(module, "LONG", ()))
