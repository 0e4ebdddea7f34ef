"""Training: one run beside the usual loops and the arithmetic; a sweep; an ensemble; starting up.

Run with `python -m tests.benchmarks.bench_training [name ...]`, name a key of BENCHMARKS.
Prints tables and writes outputs/bench/training.json. Every ratio is of times taken in turn.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks import textbook
from tests.benchmarks.harness import REPEATS, in_turn, main, say, summary, three
from tests.operations import operations, tiles_of_a_gpu
from vaeq.config import RunConfig
from vaeq.data.images import Images, load_images
from vaeq.divergence import marginal_kl
from vaeq.divergence.marginals import marginals
from vaeq.errors import VaeqError
from vaeq.experiment import build, recipe
from vaeq.generation.likelihood import ais_check, ais_check_together
from vaeq.hardware import resolve_device, resolve_precision
from vaeq.launch.pool import available_cores
from vaeq.lockstep import in_lockstep, side_by_side
from vaeq.measurement import measure
from vaeq.models.mlp import VAE
from vaeq.posterior.aggregated import AggregatedPosterior
from vaeq.training.ensemble import Ensemble, Moments, encode_all
from vaeq.training.kernels import resolve_kernels
from vaeq.training.loop import State, fit, fit_together, train_epoch

Codes = Sequence[tuple[Tensor, Tensor]]  # mean and logvar, a run
# A quarter of MNIST, where every loop takes long enough to be timed.
SOME_IMAGES = 15_000
TEXTBOOK = RunConfig(
    latent_dim=20, encoder_depth=1, encoder_width=400, decoder_depth=1, decoder_width=400
)
# The same model and batches; the first weights and the step sizes, 1e-3 there, are our own.
FAST_SETTINGS = {
    "epochs": 4,
    "learning_rate": 7e-3,
    "learning_rate_warmup_steps": 100,
    "schedule": "cosine",
    "initialization": "mean_image",
}
FAST = replace(TEXTBOOK, **FAST_SETTINGS)
DEEP = RunConfig(latent_dim=8)
SHAPES: dict[str, tuple[RunConfig, list[int]]] = {
    "784-400-20": (TEXTBOOK, [400]),
    "784-500-500-8": (DEEP, [500, 500]),
}


def resolved() -> tuple[torch.device, str, str]:
    """Device, precision and kernels that a run gets here."""
    device = resolve_device("auto")
    return device, resolve_precision("auto", device), resolve_kernels("auto", device)


def bench_target() -> list[dict[str, Any]]:
    """Time to the ELBO the textbook example has after ten epochs."""
    device, precision, kernels = resolved()
    images = load_images().to(device)
    cpu = load_images()
    settings = " ".join(f"{name}={value}" for name, value in FAST_SETTINGS.items())
    say(
        "seconds to the held-out negative ELBO that the textbook example has after 10 epochs "
        f"(784-400-20, batch 128); vaeq: {settings}, {precision}, kernels {kernels}"
    )
    say(
        f"{'seed':>4} {'textbook':>9} {'-ELBO':>8} "
        f"{'vaeq':>7} {'-ELBO':>8} {'epochs':>6} {'ratio':>7}"
    )
    rows = []
    for seed in range(REPEATS):
        slow, target = textbook.textbook(
            (cpu.train, cpu.train_labels), (cpu.test, cpu.test_labels), 10, seed
        )
        config = replace(FAST, seed=seed)
        began = time.perf_counter()
        state = build(config, images)
        reached: list[tuple[float, float, int]] = []

        def note(state: State, began: float = began, target: float = target) -> None:
            elbo = -state.history[-1]["test_elbo"]
            if not reached and elbo <= target:  # noqa: B023
                reached.append((time.perf_counter() - began, elbo, state.epoch))  # noqa: B023

        fit(state, images, recipe(config), precision=precision, kernels=kernels, on_epoch=note)
        seconds, elbo, epoch = reached[0] if reached else (None, None, None)
        row = {
            "seed": seed, "textbook_seconds": slow, "target": target, "vaeq_seconds": seconds,
            "vaeq": elbo, "epochs": epoch, "ratio": slow / seconds if seconds else None,
        }  # fmt: skip
        rows.append(row)
        mine = f"{seconds:7.2f} {elbo:8.2f} {epoch:6d} {slow / seconds:6.1f}x" if seconds else (
            f"not reached: {-state.history[-1]['test_elbo']:.2f}"
        )  # fmt: skip
        say(f"{seed:>4} {slow:9.1f} {target:8.2f} {mine}")
    ratios = [row["ratio"] for row in rows if row["ratio"]]
    if ratios:
        say(f"ratio {three(summary(ratios))} (min / median / max of {len(ratios)})\n")
    return rows


def bench_epoch() -> list[dict[str, Any]]:
    """An epoch of training beside the usual loops and the float32 products alone."""
    images = load_images(n_train=SOME_IMAGES)
    device, best, kernels = resolved()
    ours = images.to(device)
    say(f"seconds of a training epoch of {SOME_IMAGES} images, batch 128 (min / median / max of "
        f"{REPEATS}, in turn), and how many times that of vaeq, turn by turn")  # fmt: skip
    rows = []
    everything = torch.get_num_threads()
    for threads in sorted({1, everything}):
        torch.set_num_threads(threads)
        for name, (config, hidden) in SHAPES.items():
            runs: dict[str, Callable[[], float]] = {
                "floor": lambda h=hidden, c=config: textbook.matmul_floor(
                    SOME_IMAGES, h, c.latent_dim
                ),
                "tensor loop": lambda h=hidden, c=config: textbook.tensor_loop(
                    images.train, h, c.latent_dim
                ),
            }
            for precision, by in dict.fromkeys(
                (("fp32", "torch"), ("fp32", kernels), (best, "torch"), (best, kernels))
            ):
                state = build(config, images)
                ensemble = Ensemble([state.vae], [state.moments], [1e-3], precision, by)
                label = f"vaeq {precision} {by}"
                runs[label] = lambda e=ensemble, c=config: timed_epoch(e, c, ours)
            if config is TEXTBOOK:
                part = (images.train, images.train_labels)
                one = (images.test[:1], images.test_labels[:1])
                runs["textbook"] = lambda a=part, b=one: textbook.textbook(a, b, 1, 0)[0]
            pythae = pythae_seconds(images.train, hidden, config.latent_dim)
            if pythae is not None:
                runs["pythae"] = pythae
            times: dict[str, list[float]] = {label: [] for label in runs}
            for repeat in range(REPEATS + 1):
                for label, run in runs.items():
                    seconds = run()
                    if repeat:  # the first is not counted
                        times[label].append(seconds)
            say(f"{name}, {threads} thread{'s' if threads > 1 else ''}")
            own = f"vaeq {best} {kernels}"
            for label, taken in times.items():
                over = summary([a / b for a, b in zip(taken, times[own], strict=True)])
                rows.append({"model": name, "threads": threads, "loop": label,
                             "seconds": summary(taken), "over_vaeq": over})  # fmt: skip
                say(f"  {label:<18} {three(summary(taken)):>22} {three(over):>22} x {own}")
    torch.set_num_threads(everything)
    say("the textbook's without its test pass\n")
    return rows


def timed_epoch(ensemble: Ensemble, config: RunConfig, images: Any) -> float:
    began = time.perf_counter()
    train_epoch(ensemble, images, [recipe(config)] * len(ensemble), 1, ensemble.step)
    float(ensemble.totals.sum())  # waits for the device
    return time.perf_counter() - began


def pythae_seconds(
    images: torch.Tensor, hidden: list[int], latent_dim: int
) -> Callable[[], float] | None:
    try:
        import pythae  # noqa: F401
    except ImportError:
        say("  pythae is not installed (pip install 'vaeq[bench]') and left out")
        return None
    return lambda: textbook.pythae_epoch(images, hidden, latent_dim)


def bench_sweep() -> list[dict[str, Any]]:
    """Runs side by side against one worker, as they are typed; what a run costs at the least."""
    cores = available_cores()
    runs = 6 * cores  # enough that the start of the program, counted in, is a small part
    say(f"vaeq sweep, from start to end: {runs} runs of 784-500-500-8, 4 epochs of {SOME_IMAGES} "
        f"images each, by one worker and by {cores}")  # fmt: skip
    rows: list[dict[str, Any]] = []
    ratios = []
    for _ in range(REPEATS):
        seconds = {
            n: sweep_seconds(n, runs, epochs=4, n_train=SOME_IMAGES)
            for n in dict.fromkeys((1, cores))
        }
        ratios.append(seconds[1] / seconds[cores])
        say("  " + ", ".join(f"{n}: {taken:.1f} s" for n, taken in seconds.items()))
        rows.append({"seconds": seconds, "speedup": ratios[-1]})
    say(f"  speed-up {three(summary(ratios))} on {cores} cores (min / median / max of {REPEATS})")
    tiny = []
    for _ in range(REPEATS):
        few, many = (sweep_seconds(1, n, epochs=1, n_train=256, width=8) for n in (8, 48))
        tiny.append((many - few) / 40)
    rows.append({"seconds_a_tiny_run": summary(tiny)})
    say(f"  a run of 256 images and 8 units, everything included: {three(summary(tiny))} s\n")
    return rows


def sweep_seconds(workers: int, runs: int, *, epochs: int, n_train: int, width: int = 500) -> float:
    """Seconds of the whole command, in a folder of its own."""
    words = [
        "sweep", f"seed=range({runs})", f"n_jobs={workers}", "latent_dim=8",
        f"encoder_width={width}", f"decoder_width={width}", f"epochs={epochs}", "device=cpu",
        f"data.n_train={n_train}", f"data.n_test={min(n_train, 2000)}",
        "generation.n_importance=null", "generation.quality=false",
        "measure.panel=decomposition", "measure.n_samples=100",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        taken = command_seconds(words, folder)
        assert finished_runs(folder) == runs
    return taken


def command_seconds(words: Sequence[str], folder: str) -> float:
    """Seconds of ``vaeq`` with these words, typed in a folder."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "vaeq", *words]
    subprocess.run(command, capture_output=True, check=True, cwd=folder, env=users())
    return time.perf_counter() - began


def finished_runs(folder: str) -> int:
    return len(list(Path(folder).glob("outputs/*/*/record.json")))


def users() -> dict[str, str]:
    """The environment of whoever uses the program, whose first command leaves its bytecode."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def bench_finding() -> list[dict[str, Any]]:
    """A run's epochs a second, and the finding sweep as one program, against its runs alone."""
    device, precision, kernels = resolved()
    images = load_images().to(device)
    say(f"epochs a second of 784-500-500-8 on all of MNIST, held-out ELBO included: {device.type}, "
        f"{precision}, kernels {kernels}")  # fmt: skip
    rates = []
    for seed in range(REPEATS):
        config = replace(DEEP, seed=seed, epochs=20)
        ends: list[float] = []
        fit(
            build(config, images), images, recipe(config), precision=precision, kernels=kernels,
            on_epoch=lambda state, ends=ends: ends.append(time.perf_counter()),
        )  # fmt: skip
        rates.append((len(ends) - 1) / (ends[-1] - ends[0]))  # in the first, graphs are captured
    say(f"  {three(summary(rates))} (min / median / max of {REPEATS})")
    rows: list[dict[str, Any]] = [{"epochs_a_second": summary(rates)}]
    sweep = ["sweep", "experiment=finding", "epochs=20"]
    say(f"vaeq {' '.join(sweep)} hydra/launcher=ensemble, and its runs one after another")
    together, alone = [], []
    for _ in range(REPEATS if device.type == "cuda" else 1):
        with tempfile.TemporaryDirectory() as folder:
            together.append(command_seconds([*sweep, "hydra/launcher=ensemble"], folder))
            runs = finished_runs(folder)
            # One of the middle once more, by itself: the others are skipped.
            shutil.rmtree(next(Path(folder).glob("outputs/finding/latent_dim=8,encoder_depth=2*")))
            alone.append(runs * command_seconds([*sweep, "n_jobs=1"], folder))
    return [*rows, {"runs": runs, **compared(f"{runs} runs", together, alone)}]


def bench_ensemble() -> list[dict[str, Any]]:
    """Runs of one shape as one program against the same runs one after another."""
    device, precision, kernels = resolved()
    images = load_images(n_train=SOME_IMAGES).to(device)
    say(f"8 runs of 784-500-500-D, D = 2 to 16, on {device.type}: together against one after "
        "another")  # fmt: skip
    configs = [replace(DEEP, latent_dim=d, seed=s) for d in (2, 4, 8, 16) for s in (0, 1)]
    together, alone = [], []
    for repeat in range(REPEATS + 1):
        states = [build(config, images) for config in configs]
        rates = [config.learning_rate for config in configs]
        stack = Ensemble(
            [s.vae for s in states], [s.moments for s in states], rates, precision, kernels
        )
        seconds = timed_epoch(stack, DEEP, images)
        single = 0.0
        for state in states:
            solo = Ensemble([state.vae], [state.moments], [1e-3], precision, kernels)
            single += timed_epoch(solo, DEEP, images)
        if repeat:
            together.append(seconds)
            alone.append(single)
    rows = [compared("an epoch", together, alone)]
    vaes = [state.vae for state in states]
    for i, vae in enumerate(vaes):
        vae.load_state_dict(stack.member(i)[0])
    train = encode_all(vaes, images.train)
    held_out = encode_all(vaes, images.test)
    rows += _measuring_together(train, held_out, images)
    rows += _annealing_together(vaes, held_out, images.test)
    say("")
    return rows


def _measuring_together(train: Codes, held_out: Codes, images: Images) -> list[dict[str, Any]]:
    """The panel of four runs as their device has it, and in lockstep, as a GPU has it."""
    device = images.train.device
    members = list(zip(train, held_out, strict=True))[::2]

    def measured(member: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]) -> object:
        codes, test_codes = member
        return measure(*codes, *test_codes, images.train_labels, panel=panel)

    panel = "bracket"  # half of the time of all
    times = in_turn(
        {
            "side by side": (lambda: side_by_side(measured, members, device), 1),
            "in lockstep": (lambda: in_lockstep(measured, members), 1),
            "alone": (lambda: [measured(member) for member in members], 1),
        }
    )
    rows = [
        compared(f"4 panels {name}", times[name], times["alone"])
        for name in ("side by side", "in lockstep")
    ]
    panel = "full"
    with tiles_of_a_gpu():
        alone = sum(operations(measured, [member]) for member in members)
        together = operations(measured, members)
    say(f"  {'their operations':<26} in lockstep {together}, alone {alone}, "
        f"ratio {alone / together:.2f}")  # fmt: skip
    return [*rows, {"what": "operations", "together": together, "alone": alone}]


def _annealing_together(
    vaes: Sequence[VAE], held_out: Codes, images: Tensor
) -> list[dict[str, Any]]:
    """The check of log p(x) on 25 images by short chains: side by side, and as one program."""
    stack = Ensemble(vaes, [Moments() for _ in vaes], [0.0] * len(vaes))
    means, logvars = zip(*held_out, strict=True)
    short = {"n_images": 25, "n_steps": 8, "n_importance": 500}

    def generator() -> torch.Generator:
        return torch.Generator(images.device).manual_seed(0)

    def one(i: int) -> object:
        return ais_check(vaes[i].decode, means[i], logvars[i], images, generator(), **short)

    def together() -> object:
        generators = [generator() for _ in vaes]
        return ais_check_together(stack.decode, means, logvars, images, generators, **short)

    members = range(len(vaes))
    times = in_turn(
        {
            "side by side": (lambda: side_by_side(one, members, images.device), 1),
            "as one program": (together, 1),
            "alone": (lambda: [one(i) for i in members], 1),
        }
    )
    return [
        compared(f"annealing {name}", times[name], times["alone"])
        for name in ("side by side", "as one program")
    ]


def compared(what: str, together: list[float], alone: list[float]) -> dict[str, Any]:
    ratio = summary([a / t for a, t in zip(alone, together, strict=True)])
    say(f"  {what:<26} together {three(summary(together)):>20} s, alone "
        f"{three(summary(alone)):>20} s, ratio {three(ratio)}")  # fmt: skip
    return {
        "what": what,
        "together": summary(together),
        "alone": summary(alone),
        "ratio": ratio,
    }


# `vaeq train` as it is typed, until its first step has been taken: the step is replaced as soon as
# its module is there, a tenth of a second before it is called.
_TO_FIRST_STEP = """
import os, sys, threading, time

def watch():
    while not hasattr(ensemble := sys.modules.get("vaeq.training.ensemble"), "Ensemble"):
        time.sleep(0.01)
    step = ensemble.Ensemble.step
    def once(*batch):
        step(*batch)
        os.write(1, f" {time.time()}".encode())
        os._exit(0)
    ensemble.Ensemble.step = once

threading.Thread(target=watch, daemon=True).start()
sys.argv = ["vaeq", "train"]
from vaeq.cli import main
main()
"""


def bench_startup() -> list[dict[str, Any]]:
    """What a person waits for before anything happens."""
    torch_alone, first_step = "import torch, the floor", "vaeq train, first step"
    commands = {
        torch_alone: [sys.executable, "-c", "import time, torch; print(time.time())"],
        "vaeq --help": [sys.executable, "-m", "vaeq", "--help"],
        "vaeq report, of nothing": [sys.executable, "-m", "vaeq", "report", "runs=nothing"],
        first_step: [sys.executable, "-c", _TO_FIRST_STEP],
    }
    say(f"starting up, seconds (min / median / max of {REPEATS})")
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(1 + REPEATS):
        for name, command in commands.items():
            with tempfile.TemporaryDirectory() as folder:
                began = time.time()
                found = subprocess.run(
                    command, capture_output=True, check=False, cwd=folder, env=users()
                )
                ended = time.time()
            if name in (torch_alone, first_step):  # which end before their processes
                ended = float(found.stdout.split()[-1])
            if turn > 0:
                times[name].append(ended - began)
    for name, taken in times.items():
        say(f"  {name:<26} {three(summary(taken))}")
    say("")
    return [{"command": name, "seconds": summary(taken)} for name, taken in times.items()]


def bench_precision() -> list[dict[str, Any]]:
    """Does bf16 move the science? The same seeds in both, against the spread over seeds."""
    device, best, kernels = resolved()
    images = load_images().to(device)
    how = "" if best == "bf16" else " (emulated: no such products here)"
    say(f"bf16{how} against fp32, 5 seeds each, MLP 2x500, 10 epochs: mean ± sd over seeds, and "
        "the difference in units of its standard error")  # fmt: skip
    rows = []
    for latent_dim in (2, 8):
        configs = [replace(DEEP, latent_dim=latent_dim, seed=seed) for seed in range(5)]
        found: dict[str, dict[str, list[float]]] = {}
        for precision in ("fp32", "bf16"):
            states = [build(config, images) for config in configs]
            fit_together(
                states, images, [recipe(c) for c in configs], precision=precision,
                kernels=kernels, on_failed=fail,
            )  # fmt: skip
            values: dict[str, list[float]] = {
                "elbo": [],
                "dimension_kl_mean": [],
                "marginal_kl": [],
            }
            for state, codes in zip(
                states, encode_all([s.vae for s in states], images.train), strict=True
            ):
                posterior = AggregatedPosterior(*codes)
                values["elbo"].append(state.history[-1]["test_elbo"])
                values["dimension_kl_mean"].append(statistics.mean(marginals(posterior)["kl"]))
                joint = marginal_kl(posterior, 10_000, torch.Generator(device).manual_seed(0))
                values["marginal_kl"].append(float(joint.value or float("nan")))
            found[precision] = values
        for metric in ("elbo", "dimension_kl_mean", "marginal_kl"):
            fp32, bf16 = found["fp32"][metric], found["bf16"][metric]
            spread = (statistics.variance(fp32) / 5 + statistics.variance(bf16) / 5) ** 0.5
            z = (statistics.mean(bf16) - statistics.mean(fp32)) / spread
            rows.append({"latent_dim": latent_dim, "metric": metric, "fp32": fp32, "bf16": bf16,
                         "z": z})  # fmt: skip
            say(f"  D = {latent_dim}  {metric:<18} fp32 {statistics.mean(fp32):10.4f} ± "
                f"{statistics.stdev(fp32):.4f}   bf16 {statistics.mean(bf16):10.4f} ± "
                f"{statistics.stdev(bf16):.4f}   z = {z:+.2f}")  # fmt: skip
    say("")
    return rows


def fail(member: int, error: VaeqError) -> None:
    raise error


BENCHMARKS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "startup": bench_startup,
    "epoch": bench_epoch,
    "target": bench_target,
    "sweep": bench_sweep,
    "ensemble": bench_ensemble,
    "finding": bench_finding,
    "precision": bench_precision,
}
# Emulated, bf16 takes long, for the same roundings; the sweep on a CPU more than an hour.
_SHORT = {"precision": resolved()[1] == "bf16", "finding": resolved()[0].type == "cuda"}
LONG = [name for name, short in _SHORT.items() if not short]


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main("training", BENCHMARKS, sys.argv[1:], long=LONG)
