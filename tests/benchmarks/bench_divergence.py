"""The divergence engine: log q_N(z) beside the broadcast, the chunked matmul and the floor.

Run with `python -m tests.benchmarks.bench_divergence [name ...]`, name one of the keys of
BENCHMARKS. Prints tables and writes outputs/bench/divergence.json. Codes are drawn to look like
those of a VAE trained on MNIST: a dozen active dimensions at most, the others at the prior.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import resource
import statistics
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.harness import REPEATS, in_turn, main, say, seconds, summary, three
from vaeq.divergence import bracket, marginal_kl, marginals, tabulated
from vaeq.divergence.reverse import reverse_marginal_kl
from vaeq.divergence.two_sample import REPEATS as REPEATS_OF_PAIRS
from vaeq.divergence.two_sample import two_sample
from vaeq.estimate import Estimate
from vaeq.posterior.aggregated import AggregatedPosterior

DRAWS, IMAGES = 10_000, 60_000
DIMS = (2, 8, 32, 128)


def codes(n: int, dims: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and log variances, float32: μ of variance 1 − σ², σ as trained VAEs have it."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.arange(dims) < 12
    typical = {2: 0.045, 8: 0.13}.get(dims, 0.18)
    std = torch.where(active, typical, 0.97) * torch.exp(
        torch.where(active, 0.4, 0.02) * torch.randn(n, dims, generator=generator)
    )
    mean = torch.randn(n, dims, generator=generator) * (1 - std**2).clamp_min(1e-3).sqrt()
    return mean, 2 * std.log()


def broadcast(z: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """The usual (S, 1, D) − (1, N, D)."""
    square = (z[:, None] - mean[None]).square() / logvar.exp()[None]
    log_density = -0.5 * (square + logvar[None] + math.log(2 * math.pi)).sum(2)
    return torch.logsumexp(log_density, 1) - math.log(len(mean))


def chunked(z: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """The expanded square as one matmul a chunk of rows, and logsumexp."""
    precision = torch.exp(-logvar)
    constant = -0.5 * (mean.square() * precision + logvar + math.log(2 * math.pi)).sum(1)
    keys = torch.cat([-0.5 * precision, mean * precision], 1).T.contiguous()
    parts = [
        torch.logsumexp(torch.addmm(constant, torch.cat([part.square(), part], 1), keys), 1)
        for part in z.split(256)
    ]
    return torch.cat(parts) - math.log(len(mean))


def floor(dims: int) -> None:
    """As many flops in matmuls, and S·N powers in cache: nothing read, shifted, summed or checked.

    In as many threads as log q_N uses, and with torch.exp2, which is the cheaper of torch's two.
    """
    threads, rows, columns = torch.get_num_threads(), 1000, 512
    tiles = math.ceil(DRAWS * IMAGES / (rows * columns) / threads)

    def work(_: int) -> None:
        left, right = torch.randn(rows, 2 * dims + 1), torch.randn(2 * dims + 1, columns)
        logits, powers = torch.empty(rows, columns), torch.rand(128, 512)
        out = torch.empty_like(powers)
        for _ in range(tiles):
            torch.mm(left, right, out=logits)
            for _ in range(rows * columns // powers.numel()):
                torch.exp2(powers, out=out)

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(work, range(threads)))
    torch.set_num_threads(threads)


def peak_megabytes(dims: int, n: int = IMAGES, draws: int = DRAWS) -> float:
    """Peak resident memory of log_prob above what its inputs and imports hold, in a new process."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_divergence", "--peak"]
    result = subprocess.run(
        [*command, str(dims), str(n), str(draws)], capture_output=True, text=True, check=True
    )
    return float(result.stdout)


def report_peak(dims: int, n: int, draws: int) -> None:
    mean, logvar = codes(n, dims)
    posterior = AggregatedPosterior(mean, logvar)
    z, _ = posterior.sample(draws, torch.Generator().manual_seed(1))
    posterior.log_prob(z[:2])  # libraries load their kernels on the first call
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)  # give back what making the inputs has freed
            Path("/proc/self/clear_refs").write_text("5")  # and forget the peak it had
    before = resident_peak()
    posterior.log_prob(z)
    sys.stdout.write(f"{resident_peak() - before:.1f}\n")


def resident_peak() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(lines[0].split()[1]) / 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def float64_error(posterior: AggregatedPosterior, z: torch.Tensor) -> float:
    """Largest difference to the broadcast in float64, over the z given."""
    mean, logvar = posterior.mean.double(), posterior.logvar.double()
    exact = torch.cat([broadcast(point, mean, logvar) for point in z.double().split(1)])
    return float((posterior.log_prob(z).double() - exact).abs().max())


def bench_log_density() -> list[dict[str, Any]]:
    say(f"log q_N(z), S = {DRAWS}, N = {IMAGES}, float32; seconds min / median / max of {REPEATS}, "
        "the four taken in turn; ratios are medians of the turns")  # fmt: skip
    say(f"{'D':>4} {'vaeq':>20} {'broadcast*':>23} {'chunked*':>20} {'floor':>20} "
        f"{'/broadcast':>10} {'/chunked':>9} {'of floor':>9} {'peak MB':>8} "
        f"{'max error':>10}  path")  # fmt: skip
    rows = []
    for dims in DIMS:
        mean, logvar = codes(IMAGES, dims)
        posterior = AggregatedPosterior(mean, logvar)
        z, _ = posterior.sample(DRAWS, torch.Generator().manual_seed(1))
        few, some = max(20, 800 // dims), 500
        runs: dict[str, tuple[Callable[[], object], float]] = {
            "vaeq": (lambda: posterior.log_prob(z), 1.0),  # noqa: B023
            "floor": (lambda: floor(dims), 1.0),  # noqa: B023
            "broadcast": (lambda: broadcast(z[:few], mean, logvar), DRAWS / few),  # noqa: B023
            "chunked": (lambda: chunked(z[:some], mean, logvar), DRAWS / some),  # noqa: B023
        }
        times = in_turn(runs)
        row: dict[str, Any] = {"latent_dim": dims, "broadcast_draws": few, "chunked_draws": some}
        for name in runs:
            row[name] = summary(times[name])
            ratios = [other / own for other, own in zip(times[name], times["vaeq"], strict=True)]
            row[f"{name}_over_vaeq"] = statistics.median(ratios)
        row["peak_megabytes"] = peak_megabytes(dims)
        row["max_error"] = float64_error(posterior, z[:50])
        row["path"] = posterior.path
        rows.append(row)
        say(f"{dims:>4} {three(row['vaeq']):>20} {three(row['broadcast']):>23} "
            f"{three(row['chunked']):>20} {three(row['floor']):>20} "
            f"{row['broadcast_over_vaeq']:>9.0f}x {row['chunked_over_vaeq']:>8.1f}x "
            f"{1 / row['floor_over_vaeq']:>8.2f}x {row['peak_megabytes']:>8.0f} "
            f"{row['max_error']:>10.1e}  {row['path']}")  # fmt: skip
    slices = ", ".join(f"{row['broadcast_draws']} at D = {row['latent_dim']}" for row in rows)
    say(f"* extrapolated from fewer z: broadcast {slices}; chunked {rows[0]['chunked_draws']}.\n")
    return rows


def bench_extremes() -> list[dict[str, Any]]:
    say("float32 codes, narrow and far: largest error against float64 over 200 draws, N = 2000")
    say(f"{'D':>4} {'std':>8} {'|mean| <=':>9} {'max error':>10}  path")
    rows = []
    for dims in (2, 32, 128):
        for std, reach in ((1e-2, 5.0), (1e-3, 5.0), (1e-4, 50.0)):
            generator = torch.Generator().manual_seed(0)
            mean = reach * (2 * torch.rand(2000, dims, generator=generator) - 1)
            logvar = 2 * math.log(std) + 0.5 * torch.randn(2000, dims, generator=generator)
            posterior = AggregatedPosterior(mean, logvar)
            z, _ = posterior.sample(200, generator)
            row = {
                "latent_dim": dims, "std": std, "reach": reach,
                "max_error": float64_error(posterior, z), "path": posterior.path,
            }  # fmt: skip
            rows.append(row)
            say(f"{dims:>4} {std:>8.0e} {reach:>9.0f} {row['max_error']:>10.1e}  {row['path']}")
    say("")
    return rows


def bench_marginals() -> list[dict[str, Any]]:
    say(f"one-dimensional quadrature (kl, ks and w2), N = {IMAGES}, and its time where components "
        "are exponentiated one by one; error in nats, closed form")  # fmt: skip
    say(f"{'D':>4} {'seconds':>22} {'one by one':>22} {'ratio':>20} {'max error':>10}")
    rows = []
    for dims in (2, 8, 32):
        posterior = AggregatedPosterior(*codes(IMAGES, dims))
        runs = (lambda: marginals(posterior)), (lambda: marginals_one_by_one(posterior))  # noqa: B023
        times = in_turn({"together": (runs[0], 1), "one by one": (runs[1], 1)})
        together, apart = times["together"], times["one by one"]
        ratios = summary([a / t for a, t in zip(apart, together, strict=True)])
        # Every image alike: q_N,j is one Gaussian, with a KL in closed form.
        std = torch.logspace(-4, 1, dims, dtype=torch.float64)
        mean = torch.linspace(-50, 50, dims, dtype=torch.float64)
        alike = AggregatedPosterior(
            mean.expand(IMAGES, dims).contiguous(),
            (2 * std.log()).expand(IMAGES, dims).contiguous(),
        )
        truth = 0.5 * (mean**2 + std**2 - 1) - std.log()
        error = float(
            (torch.tensor(marginals(alike)["kl"], dtype=torch.float64) - truth).abs().max()
        )
        row = {"latent_dim": dims, "seconds": summary(together), "one_by_one": summary(apart),
               "ratio": ratios, "max_error": error}  # fmt: skip
        rows.append(row)
        say(f"{dims:>4} {three(row['seconds']):>22} {three(row['one_by_one']):>22} "
            f"{three(ratios):>20} {error:>10.1e}")  # fmt: skip
    say("")
    return rows


def marginals_one_by_one(posterior: AggregatedPosterior) -> None:
    """The same table with an exponential a component and node."""
    with unittest.mock.patch.object(tabulated, "_CROWD", posterior.n + 1):
        marginals(posterior)


COVERAGE_REPEATS = 200


def bench_coverage() -> list[dict[str, Any]]:
    say(f"coverage by ±2 s.e. over {COVERAGE_REPEATS} repeats; 95.4% is nominal, with a binomial "
        "sd of 1.5%; z is (value − expectation)/s.e.")  # fmt: skip
    return [
        *coverage_of_marginal_kl(),
        *coverage_of_reverse_kl(),
        *coverage_of_two_sample(),
        *coverage_of_bracket(),
    ]


def coverage_row(
    estimator: str, target: str, found: list[tuple[float, float]], expectation: float
) -> dict[str, Any]:
    offsets = [(value - expectation) / error for value, error in found]
    row = {
        "estimator": estimator, "target": target, "expectation": expectation,
        "coverage": sum(abs(z) <= 2 for z in offsets) / len(offsets),
        "mean_z": statistics.mean(offsets), "sd_z": statistics.stdev(offsets),
        "sd": statistics.stdev(value for value, _ in found),
        "std_error": statistics.mean(error for _, error in found),
    }  # fmt: skip
    say(f"  {estimator:<27} {target:<18} {expectation:>9.4g} {row['coverage']:6.1%}   "
        f"z = {row['mean_z']:+.2f} ± {row['sd_z']:.2f}")  # fmt: skip
    return row


def pair(estimate: Estimate) -> tuple[float, float]:
    assert estimate.value is not None
    assert estimate.std_error is not None
    return estimate.value, estimate.std_error


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(COVERAGE_REPEATS)]


def coverage_of_marginal_kl() -> list[dict[str, Any]]:
    from tests.test_decomposition import TARGETS

    rows = []
    for name, posterior in TARGETS.items():
        truth = math.fsum(marginals(posterior)["kl"])
        found = [pair(marginal_kl(posterior, 500, source)) for source in generators()]
        rows.append(coverage_row("marginal_kl (MI, TC), S=500", name, found, truth))
    return rows


def coverage_of_reverse_kl() -> list[dict[str, Any]]:
    """On products of mixtures, where KL(p ‖ q_N) = Σ_j ∫ φ log φ/q_j, by the trapezium rule."""
    from tests.test_decomposition import TARGETS

    axis = torch.linspace(-10, 10, 40_001, dtype=torch.float64)
    log_p = -0.5 * axis.square() - 0.5 * math.log(2 * math.pi)
    rows = []
    for name, posterior in TARGETS.items():
        log_q = posterior.log_prob_marginal(axis[:, None].expand(-1, posterior.latent_dim))
        integrand = log_p.exp() * (log_p[:, None] - log_q).sum(1)
        truth = float(torch.trapezoid(integrand, axis))
        found = [
            pair(reverse_marginal_kl(posterior, 2000, source)["reverse_marginal_kl"])
            for source in generators()
        ]
        rows.append(coverage_row("reverse_marginal_kl, S=2000", name, found, truth))
    return rows


def coverage_of_two_sample() -> list[dict[str, Any]]:
    """The truth is the expectation at this n, from 8000 more pairs, or by symmetry."""
    n, long_run = 50, 8000
    rows = []
    for name, shift, width in (("N(0, I)", 0.0, 1.0), ("N(0.5, 0.6² I)", 0.5, 0.6)):
        mean = torch.full((10, 3), shift)
        posterior = AggregatedPosterior(mean, torch.full_like(mean, 2 * math.log(width)))
        runs = [two_sample(posterior, n, REPEATS_OF_PAIRS, source) for source in generators()]
        truth = two_sample(posterior, n, long_run, torch.Generator().manual_seed(1 << 20))
        for statistic in runs[0]:
            expectation = pair(truth[statistic])[0]
            if statistic.endswith("_z") and not shift:
                expectation = 0.0
            elif statistic == "c2st_auc_null":
                expectation = 0.5
            found = [pair(run[statistic]) for run in runs]
            rows.append(coverage_row(f"{statistic}, n={n}", name, found, expectation))
    return rows


def coverage_of_bracket() -> list[dict[str, Any]]:
    """The ends on sets of held-out images, r fitted once on training images.

    The expectation of the lower end comes from 200,000 more images. That of the upper ends at this
    M is known only as the mean over the repeats.
    """
    from tests import test_bracket

    images, draws = 300, 4
    rows = []
    for encode, kl in test_bracket.TARGETS:
        source, known = torch.Generator().manual_seed(1), kl()
        training = AggregatedPosterior(*encode(4000, source))
        log_r = bracket._choose(training, False, source).best.log_prob
        ends = test_bracket.repeats(images, encode, log_r, draws)
        z = bracket._points(AggregatedPosterior(*encode(200_000, source)), source)
        expectation = {name: float(values[:, 0].mean()) for name, values in ends.items()}
        expectation["lower"] = float((log_r(z) - bracket._log_prior(z)).mean())
        for name, values in ends.items():
            found = [(value, error) for value, error in values.tolist()]
            row = coverage_row(f"{name}, M={images}", encode.__name__, found, expectation[name])
            sign = 1 if name == "lower" else -1
            row["kl"] = known
            row["on_its_side"] = sign * (known - expectation[name]) > 0
            row["beyond"] = sum(sign * (v - known) > 2 * e for v, e in found) / len(found)
            rows.append(row)
            side = "below" if name == "lower" else "above"
            verdict = side if row["on_its_side"] else f"NOT {side}"
            say(f"{'':>4}its mean is {verdict} KL = {known:.4f}; "
                f"beyond that by 2 s.e. in {row['beyond']:.1%} of the sets")  # fmt: skip
    return rows


def bench_large() -> list[dict[str, Any]]:
    say("large codes: log q_N of 1000 draws, seconds once, and peak MB above the inputs")
    rows = []
    for n, dims in ((1_000_000, 32), (100_000, 512)):
        posterior = AggregatedPosterior(*codes(n, dims))
        z, _ = posterior.sample(1000, torch.Generator().manual_seed(1))
        start = time.perf_counter()
        posterior.log_prob(z)
        elapsed = time.perf_counter() - start
        del posterior
        row = {"n": n, "latent_dim": dims, "seconds": elapsed,
               "peak_megabytes": peak_megabytes(dims, n, 1000)}  # fmt: skip
        rows.append(row)
        say(f"  N = {n:>7}, D = {dims:>3}: {elapsed:6.2f} s, {row['peak_megabytes']:.0f} MB")
    say("")
    return rows


def bench_panel() -> list[dict[str, Any]]:
    import vaeq

    say(f"the full panel, N = {IMAGES}, D = 32, 10000 held-out images, no flow; seconds")
    mean, logvar = codes(IMAGES, 32)
    test_mean, test_logvar = codes(10_000, 32, seed=1)
    labels = torch.arange(IMAGES) % 10
    times = summary(
        seconds(lambda: vaeq.measure(mean, logvar, test_mean, test_logvar, labels, flow=False), 2)
    )
    say(f"  {three(times)}\n")
    return [{"n": IMAGES, "latent_dim": 32, "flow": False, "seconds": times}]


BENCHMARKS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "log_density": bench_log_density,
    "extremes": bench_extremes,
    "marginals": bench_marginals,
    "coverage": bench_coverage,
    "large": bench_large,
    "panel": bench_panel,
}
LONG = ("coverage",)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        report_peak(*(int(value) for value in sys.argv[2:5]))
    else:
        main("divergence", BENCHMARKS, sys.argv[1:], long=LONG)
