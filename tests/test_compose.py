"""Every job of a sweep from one composition of its presets, as Hydra composes it by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import pytest
from hydra import initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig

from tests.soak import times
from vaeq import compose
from vaeq.cli import _register_plugins
from vaeq.compose import register_schemas, run_configs
from vaeq.config import identified
from vaeq.errors import InputError


@pytest.fixture(scope="module")
def hydra() -> Iterator[tuple[ConfigLoaderImpl, DictConfig]]:
    """The loader and the composed config of ``vaeq sweep``, as a launcher is given them."""
    register_schemas()
    _register_plugins()
    with initialize_config_module("vaeq.configs", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        yield loader, loader.load_configuration("sweep", [], RunMode.MULTIRUN)


def outcome(parts: tuple[ConfigLoaderImpl, DictConfig], job: Sequence[str], shared: bool) -> object:
    """The settings of a job, or the sentence that refuses it, with or without the short way."""
    loader, master = parts
    try:
        if shared:
            return asdict(run_configs(loader, master, [job])[0])
        return asdict(identified([compose._composed(loader, master, job).run_config()])[0])
    except InputError as error:
        return str(error)


# Good and bad values of every kind, and what has a meaning of its own to Hydra.
WORDS = [
    *(f"latent_dim={v}" for v in ("2", "-3", "abc", "2.5", "null", "'8'", "1e1", "true", "[1]")),
    *(f"beta={v}" for v in ("1", "1e6", "nan", "2.5", "'0.5'", "x", "-1")),
    *(f"early_stopping={v}" for v in ("null", "3", "0")),
    *(f"epochs={v}" for v in ("1", "5", "0")),
    *(f"kl_warmup_epochs={v}" for v in ("0", "4", "20")),
    *(f"activation={v}" for v in ("tanh", "step", "null")),
    *(f"data.n_train={v}" for v in ("null", "100", "0", "many")),
    *(f"generation.quality={v}" for v in ("true", "no", "0", "maybe")),
    *(f"measure.panel={v}" for v in ("full", "most")),
    *(f"experiment={v}" for v in ("smoke", "finding", "quick")),
    *(f"outputs={v}" for v in ("elsewhere", "'a b'", "''")),
    "data=kmnist",
    "encoder_width=${decoder_width}",
    "decoder_width=${encoder_width}",
    "encoder_width=64",
    "++seed=7",
    "seed=3",
    "n_jobs=2",
    "n_jobs=0",
    "hydra.verbose=true",
    "latent_dims=2",
]


@settings(max_examples=times(10, 500), deadline=None)
@given(job=st.lists(st.sampled_from(WORDS), min_size=1, max_size=4))
@example(job=["latent_dim=abc", "latent_dim=2"])
def test_the_short_way_gives_what_hydra_gives(
    hydra: tuple[ConfigLoaderImpl, DictConfig], job: list[str]
) -> None:
    # A preset is chosen once on a command line.
    if len({word for word in job if word.startswith("experiment=")}) > 1:
        job = [word for word in job if not word.startswith("experiment=")] or ["seed=3"]
    assert outcome(hydra, job, shared=True) == outcome(hydra, job, shared=False)


def test_one_bad_value_among_many_refuses_them_all(
    hydra: tuple[ConfigLoaderImpl, DictConfig],
) -> None:
    jobs = [["seed=0", f"latent_dim={d}"] for d in (2, 4, -3, 8)]
    with pytest.raises(InputError, match="latent_dim must be an integer between 1 and 4096, got -"):
        run_configs(*hydra, jobs)


def test_an_interpolation_sees_the_values_of_its_own_job(
    hydra: tuple[ConfigLoaderImpl, DictConfig],
) -> None:
    jobs = [["decoder_width=${encoder_width}", f"encoder_width={w}"] for w in (16, 64)]
    assert [config.decoder_width for config in run_configs(*hydra, jobs)] == [16, 64]


def test_two_thousand_jobs_are_composed_in_a_moment(
    hydra: tuple[ConfigLoaderImpl, DictConfig],
) -> None:
    jobs = [
        ["experiment=smoke", f"seed={seed}", f"latent_dim={d}"]
        for d in (2, 8) for seed in range(1000)
    ]  # fmt: skip
    began = time.process_time()
    configs = run_configs(*hydra, jobs)
    seconds = time.process_time() - began
    assert len({(config.seed, config.latent_dim) for config in configs}) == 2000
    assert {config.epochs for config in configs} == {2}
    # Hydra by itself takes two minutes for them; here 1 s.
    assert seconds < 20
