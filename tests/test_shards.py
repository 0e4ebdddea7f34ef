"""Codes in shards: every number that of the codes in one piece, and the errors of bad files."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Run
from tests.soak import times
from vaeq.divergence import marginals, moment_kl
from vaeq.divergence.decomposition import kl_per_image, marginal_kl
from vaeq.divergence.reverse import reverse_marginal_kl
from vaeq.divergence.tabulated import mixed as mixed_tables
from vaeq.divergence.tabulated import tabulate
from vaeq.divergence.uniform import uniform_view
from vaeq.errors import InputError, VaeqError
from vaeq.files.npy import NpyRows
from vaeq.measurement import measure_file
from vaeq.posterior.aggregated import AggregatedPosterior
from vaeq.posterior.codes import CodesWarning
from vaeq.posterior.shards import CodeFiles, ShardedPosterior, shards_needed

N, DIMS = 1_203, 3  # not a multiple of the shards


def codes(n: int = N, dims: int = DIMS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes off the origin and of mixed widths, float64."""
    source = torch.Generator().manual_seed(seed)
    mean = 1.5 + torch.randn(n, dims, generator=source, dtype=torch.float64)
    logvar = -2 + 1.5 * torch.randn(n, dims, generator=source, dtype=torch.float64)
    return mean, logvar


def write(folder: Path, **arrays: torch.Tensor) -> CodeFiles:
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values.numpy())
    spread = next(name for name in arrays if name in ("logvar", "std", "var"))
    return CodeFiles(
        NpyRows(folder / "mean.npy", "mean"), NpyRows(folder / f"{spread}.npy", spread), spread
    )


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="module")
def whole() -> AggregatedPosterior:
    return AggregatedPosterior(*codes())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardedPosterior]:
    """The same in five shards of two workers, so that each reads its shards in turn."""
    mean, logvar = codes()
    files = write(tmp_path_factory.mktemp("codes"), mean=mean, logvar=logvar)
    with ShardedPosterior(files, shards=5, workers=2, threads=2) as posterior:
        yield posterior


def test_log_q_is_the_log_sum_exp_of_the_shards(
    whole: AggregatedPosterior, sharded: ShardedPosterior
) -> None:
    assert sharded.shards == 5
    assert (sharded.n, sharded.latent_dim, sharded.dtype) == (N, DIMS, torch.float64)
    expected, expected_index = whole.sample(300, stream())
    z, index = sharded.sample(300, stream())
    torch.testing.assert_close(z, expected, rtol=0, atol=0)
    torch.testing.assert_close(index, expected_index, rtol=0, atol=0)
    # Far from every code as well, where each shard's sum underflows by itself.
    z = torch.cat([z, torch.tensor([[300.0] * DIMS, [-1e4] * DIMS]).double()])
    torch.testing.assert_close(sharded.log_prob(z), whole.log_prob(z), rtol=1e-12, atol=1e-12)
    found = sharded.log_prob_marginal(z[:300])
    torch.testing.assert_close(found, whole.log_prob_marginal(z[:300]), rtol=0, atol=1e-12)
    conditional = sharded.log_prob_conditional(z[:300], index)
    assert torch.equal(conditional, whole.log_prob_conditional(z[:300], index))


def test_it_is_the_formula_itself(sharded: ShardedPosterior) -> None:
    mean, logvar = codes()
    z = sharded.sample(20, stream())[0]
    log_density = -0.5 * (
        (z[:, None] - mean).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi)
    ).sum(2)
    expected = torch.logsumexp(log_density, 1) - math.log(N)
    torch.testing.assert_close(sharded.log_prob(z), expected, rtol=0, atol=1e-11)


def test_float32_codes_agree_to_1e_5(tmp_path: Path) -> None:
    mean, logvar = (part.float() for part in codes(4_000, 8))
    whole = AggregatedPosterior(mean, logvar)
    files = write(tmp_path, mean=mean, logvar=logvar)
    with ShardedPosterior(files, shards=3, workers=1, threads=1) as sharded:
        z = sharded.sample(500, stream())[0]
        assert sharded.dtype == torch.float32
        torch.testing.assert_close(sharded.log_prob(z), whole.log_prob(z), rtol=0, atol=1e-5)
        assert sharded.path.endswith(", 3 shards")


def test_sums_over_components_are_those_of_one_piece(
    whole: AggregatedPosterior, sharded: ShardedPosterior
) -> None:
    for found, expected in zip(sharded.moments(), whole.moments(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(kl_per_image(sharded), kl_per_image(whole))
    assert moment_kl(sharded).value == pytest.approx(moment_kl(whole).value, abs=1e-13)
    found, expected = uniform_view(sharded), uniform_view(whole)
    np.testing.assert_allclose(found.mass, expected.mass, atol=1e-14)
    mine, other = marginals(sharded), marginals(whole)
    assert mine["active"] == other["active"]
    for name in ("mean", "std", "kl", "ks", "w2", "kl_per_image"):
        # Quadrature on finer panels: its own error is 1e-9.
        np.testing.assert_allclose(mine[name], other[name], rtol=0, atol=1e-9)


def test_the_same_draws_give_the_same_estimates(
    whole: AggregatedPosterior, sharded: ShardedPosterior
) -> None:
    mine, other = (marginal_kl(part, 400, stream()) for part in (sharded, whole))
    assert mine.value == pytest.approx(other.value, abs=1e-9)
    assert mine.std_error == pytest.approx(other.std_error, abs=1e-9)
    reverse = [reverse_marginal_kl(part, 400, stream()) for part in (sharded, whole)]
    for name, estimate in reverse[0].items():
        assert estimate.value == pytest.approx(reverse[1][name].value, rel=1e-9)


def test_subsets_are_of_the_images_that_were_named(
    whole: AggregatedPosterior, sharded: ShardedPosterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = torch.randperm(N, generator=stream())
    few = sharded.subset(order[:50])
    assert not isinstance(few, ShardedPosterior)
    assert torch.equal(few.mean, whole.mean[order[:50]])
    # More than may be gathered are shards again, and so are theirs.
    monkeypatch.setattr("vaeq.posterior.shards._GATHERED", 100)
    many = sharded.subset(order[:900])
    assert isinstance(many, ShardedPosterior)
    again = many.subset(torch.arange(900) % 3 > 0)
    assert isinstance(again, ShardedPosterior)
    expected = whole.subset(order[:900]).subset(torch.arange(900) % 3 > 0)
    assert (again.n, again.shards) == (600, 3)
    assert torch.equal(kl_per_image(again), kl_per_image(expected))
    z = expected.sample(50, stream())[0]
    torch.testing.assert_close(again.log_prob(z), expected.log_prob(z), rtol=0, atol=1e-12)
    chunked = torch.cat([mean for mean, _ in again.chunks()])
    assert torch.equal(chunked, expected.mean)


@settings(max_examples=times(30, 2_000), deadline=None)
@given(st.data())
def test_tables_of_parts_add_up_to_the_table_of_the_whole(data: st.DataObject) -> None:
    number = st.floats(-8, 8, allow_subnormal=False)
    components = data.draw(st.lists(st.tuples(number, st.floats(-5, 2)), min_size=2, max_size=12))
    cut = data.draw(st.integers(1, len(components) - 1))
    mean, log_std = (np.array(column) for column in zip(*components, strict=True))
    std = np.exp(log_std)
    parts = [tabulate(mean[:cut], std[:cut]), tabulate(mean[cut:], std[cut:])]
    mixed = mixed_tables(parts, [cut / len(mean), 1 - cut / len(mean)])
    right = mixed.left + mixed.width
    assert (mixed.left[1:] >= right[:-1]).all()
    x = mixed.nodes()
    each = np.exp(-0.5 * ((x[..., None] - mean) / std) ** 2) / std / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(mixed.density, each.mean(-1), atol=1e-9 / std.min())


def test_narrow_codes_in_one_shard_make_all_of_them_float64(tmp_path: Path) -> None:
    mean, logvar = (part.float() for part in codes())
    logvar[-1] = -30
    with ShardedPosterior(write(tmp_path, mean=mean, logvar=logvar), 4, 2, 2) as sharded:
        whole = AggregatedPosterior(mean, logvar)
        assert sharded.dtype == whole.dtype == torch.float64
        z = sharded.sample(100, stream())[0]
        torch.testing.assert_close(sharded.log_prob(z), whole.log_prob(z), rtol=0, atol=1e-9)


def test_vaeq_measure_is_the_same_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What these cost does not depend on the codes.
    for name, value in (("CURVE_SAMPLES", 100), ("N_SAMPLES", 50), ("REPEATS", 2)):
        monkeypatch.setattr(f"vaeq.measurement.{name}", value)
    mean, logvar = codes(2_400, 2)
    test_mean, test_logvar = codes(300, 2, seed=1)
    write(tmp_path, mean=mean, std=torch.exp(0.5 * logvar), test_mean=test_mean,
          test_logvar=test_logvar, labels=torch.arange(2_400) % 2)  # fmt: skip
    one, four = (measure_file(tmp_path, n_samples=200, shards=count) for count in (1, 4))
    assert four.settings["path"] == f"{one.settings['path']}, 4 shards"
    assert list(four.estimates) == list(one.estimates)
    for name, estimate in one.estimates.items():
        assert four.estimates[name].value == pytest.approx(estimate.value, rel=1e-8, abs=1e-9), name
    for name, column in one.per_dimension.items():
        np.testing.assert_allclose(four.per_dimension[name], column, rtol=0, atol=1e-9)
    assert four.curves["by_class"]["n"] == one.curves["by_class"]["n"]


def test_the_command_line_takes_shards(vaeq: Run, tmp_path: Path) -> None:
    mean, logvar = codes()
    (tmp_path / "codes").mkdir()
    write(tmp_path / "codes", mean=mean, logvar=logvar)
    words = ("codes=codes", "shards=3", "panel=decomposition", "n_samples=200", "threads=1")
    found = vaeq("measure", *words, check=True).stdout
    expected = measure_file(tmp_path / "codes", panel="decomposition", n_samples=200)
    assert found == f"{expected}\n"


def test_only_npy_files_can_be_in_shards(tmp_path: Path) -> None:
    file = tmp_path / "codes.npz"
    mean, logvar = codes()
    np.savez(file, mean=mean.numpy(), logvar=logvar.numpy())
    with pytest.raises(InputError, match=r"shards=3 needs \.npy files, .* with numpy\.save\.$"):
        measure_file(file, shards=3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, v: m[900].fill_(math.nan), "rows 601 to 1202 of mean, counted from there: mean "
         "must be finite, got 3 NaN or infinite of 1806 values, the first at [299, 0]"),
        (lambda m, v: v[2].fill_(1e3), "logvar must be in [-80, 80], got 1000 at [2, 0]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_rows(tmp_path: Path, change: object, words: str) -> None:
    mean, logvar = codes()
    change(mean, logvar)  # type: ignore[operator]
    with pytest.raises(InputError) as caught:
        ShardedPosterior(write(tmp_path, mean=mean, logvar=logvar), 2, 1, 1)
    assert words in str(caught.value)


def test_shapes_and_numbers_of_shards_are_checked(tmp_path: Path) -> None:
    mean, logvar = codes()
    files = write(tmp_path, mean=mean, logvar=logvar)
    with pytest.raises(InputError, match="shards must be between 1 and 1203 images, got 1204"):
        ShardedPosterior(files, 1204, 1, 1)
    with pytest.raises(InputError, match="mean and logvar must have the same shape"):
        write(tmp_path, mean=mean, logvar=logvar[:-1])
    np.save(tmp_path / "mean.npy", np.asfortranarray(mean.numpy()))
    with pytest.raises(InputError, match="column by column"):
        NpyRows(tmp_path / "mean.npy", "mean")
    np.save(tmp_path / "mean.npy", mean[0].numpy())
    with pytest.raises(InputError, match=r"must have shape \(N, D\)"):
        NpyRows(tmp_path / "mean.npy", "mean")


def _die(part: AggregatedPosterior) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_sentence(tmp_path: Path) -> None:
    mean, logvar = codes()
    with (
        ShardedPosterior(write(tmp_path, mean=mean, logvar=logvar), 2, 2, 2) as sharded,
        pytest.raises(VaeqError, match="was killed"),
    ):
        sharded.over_parts(_die)


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from vaeq.posterior.shards import in_shards\n"
        "if __name__ == '__main__':\n"
        "    posterior = in_shards(sys.argv[1], 2)\n"
        "    print(*posterior.over_parts(pid), flush=True)\n"
        "    time.sleep(600)\n"
    )
    (tmp_path / "main.py").write_text("import os\ndef pid(part): return os.getpid()\n" + code)
    mean, logvar = codes()
    write(tmp_path, mean=mean, logvar=logvar)
    parent = subprocess.Popen(
        [sys.executable, "main.py", "."],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_variances_that_seem_mistaken_are_told_of_in_shards_too(tmp_path: Path) -> None:
    mean, logvar = codes()
    write(tmp_path, mean=mean, logvar=logvar.exp())
    said = []
    for count in (1, 3):
        with pytest.warns(CodesWarning) as caught:
            measure_file(tmp_path, panel="decomposition", n_samples=50, shards=count)
        said.append([str(one.message) for one in caught])
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_is_used_up_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    mean, logvar = codes()
    write(tmp_path, mean=mean, logvar=logvar)

    def full(*arguments: object, **settings: object) -> None:
        raise error

    monkeypatch.setattr("vaeq.measurement.decompose", full)
    with pytest.raises(InputError, match=r"need more memory than there is; .* add shards=16, or"):
        measure_file(tmp_path)


def test_as_many_shards_as_fit_into_half_of_the_memory() -> None:
    assert shards_needed(10 * 2**20, 60 * 2**20, workers=2) == 1
    assert shards_needed(10 * 2**20, 59 * 2**20, workers=2) == 4
    assert shards_needed(5 * 2**30, 8 * 2**30, workers=4) == 16
