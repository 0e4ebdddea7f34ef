"""`python -m tests.benchmarks`: every benchmark, one table after another."""

from __future__ import annotations

from tests.benchmarks import bench_divergence, bench_report

bench_divergence.main()
bench_report.main()
