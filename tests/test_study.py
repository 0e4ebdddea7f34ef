"""Searches: the trial said to be the best is, and a stopped search goes on as it would have."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean

import pytest
from rich.console import Console

from tests.conftest import TINY
from tests.soak import SOAK
from vaeq.cli import main
from vaeq.compose import search_space
from vaeq.config import RunConfig, SweepConfig, config_hash
from vaeq.errors import InputError, RunsFailed, VaeqError
from vaeq.experiment import estimates_of, run
from vaeq.launch.study import Axis, Point, search
from vaeq.runs.record import RunRecord, complete_record, run_directory, write_record

optuna = pytest.importorskip("optuna")

RATE = Axis("learning_rate", low=1e-4, high=1e-1, log=True)
DIMENSION = Axis("latent_dim", low=2, high=32, integer=True)


def valley(config: RunConfig) -> float:
    """Least, 0, at latent_dim=8 and learning_rate=1e-3."""
    return (math.log2(config.latent_dim) - 3) ** 2 + math.log10(config.learning_rate / 1e-3) ** 2


@dataclass
class Bench:
    """Runs whose result is a formula, in the place of training."""

    settings: SweepConfig
    worth: Callable[[RunConfig], float | None] = valley
    launched: list[str] = field(default_factory=list)  # one word a run that really ran
    stop_after: int | None = None

    def compose(self, points: Sequence[Point]) -> list[RunConfig]:
        configs = []
        for point in points:
            words = dict(word.split("=", 1) for word in point)
            values = {name: json.loads(value) for name, value in words.items()}
            configs.append(replace(self.settings.run_config(), **values))
        return configs

    def launch(self, points: Sequence[Point], first: int) -> None:
        failed = False
        for point, config in zip(points, self.compose(points), strict=True):
            directory = run_directory(config)
            if complete_record(directory, config) is not None:
                continue
            if len(self.launched) == self.stop_after:
                raise KeyboardInterrupt
            self.launched.append(" ".join(point))
            value = self.worth(config)
            failed |= value is None
            directory.mkdir(parents=True, exist_ok=True)
            estimates = {"marginal_kl": {"value": value, "std_error": 0.0, "unit": "nats"}}
            record = RunRecord(
                "complete",
                asdict(config),
                config_hash(config),
                history={"epoch": [1]},
                estimates=estimates,
            )
            if value is None:
                record = replace(record, state="failed", estimates={}, failure={"type": "x"})
            write_record(directory, record)
        if failed:
            raise RunsFailed("some of 4 runs failed")

    def search(self, *axes: Axis, **changes: int) -> tuple[dict[str, str], str]:
        stream = io.StringIO()
        found = search(
            replace(self.settings, **changes),
            axes,
            compose=self.compose,
            launch=self.launch,
            console=Console(file=stream, width=80),
        )
        return found, stream.getvalue()

    def table(self) -> list[dict[str, str]]:
        path = Path(self.settings.outputs) / self.settings.experiment / "study.csv"
        return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def bench(tiny: RunConfig) -> Bench:
    values = {item.name: getattr(tiny, item.name) for item in fields(RunConfig)}
    return Bench(SweepConfig(**values, objective="marginal_kl", n_trials=12))


def test_the_best_trial_is_the_best_and_the_search_closes_in_on_it(bench: Bench) -> None:
    best, words = bench.search(DIMENSION, RATE, n_trials=24)
    rows = bench.table()
    assert len(rows) == 24
    assert {row["state"] for row in rows} == {"complete"}
    values = [float(row["marginal_kl"]) for row in rows]
    winner = rows[values.index(min(values))]
    assert best == {name: winner[name] for name in ("latent_dim", "learning_rate")}
    assert f"(trial {winner['trial']})" in words.splitlines()[-1]
    (config,) = bench.compose([[f"{name}={value}" for name, value in best.items()]])
    assert valley(config) == min(values)
    # The first ten are drawn at random; what follows knows of them.
    assert fmean(values[12:]) < fmean(values[:10]) / 2


def test_the_largest_is_the_best_where_it_is_asked_for(bench: Bench) -> None:
    upward = Bench(replace(bench.settings, direction="maximize"))
    best, _ = upward.search(Axis("latent_dim", choices=("8", "16", "32")), n_trials=8)
    tried = {row["latent_dim"]: float(row["marginal_kl"]) for row in upward.table()}
    assert best["latent_dim"] == max(tried, key=lambda name: tried[name]) == "32"


@pytest.mark.parametrize("stop_after", [0, 3, 4, 6, 9])
def test_a_stopped_search_goes_on_as_if_it_had_not(
    bench: Bench, stop_after: int, tmp_path: Path
) -> None:
    whole = Bench(replace(bench.settings, outputs=str(tmp_path / "whole")))
    whole.search(DIMENSION, RATE)
    stopped = replace(bench, stop_after=stop_after)
    with pytest.raises(KeyboardInterrupt):
        stopped.search(DIMENSION, RATE)
    stopped.stop_after = None
    stopped.search(DIMENSION, RATE)
    assert stopped.table() == whole.table()
    assert stopped.launched == whole.launched  # nothing ran twice
    again, _ = stopped.search(DIMENSION, RATE)
    assert stopped.launched == whole.launched
    assert again == whole.search(DIMENSION, RATE)[0]


def test_a_search_that_is_stopped_while_it_proposes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = Bench(replace(bench.settings, outputs=str(tmp_path / "whole")))
    whole.search(DIMENSION, RATE)
    ask, asked = optuna.Study.ask, []

    def stop(study: object, fixed_distributions: object) -> object:
        if len(asked) == 6:
            raise KeyboardInterrupt
        asked.append(ask(study, fixed_distributions))
        return asked[-1]

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "ask", stop)
        with pytest.raises(KeyboardInterrupt):
            bench.search(DIMENSION, RATE)
    bench.search(DIMENSION, RATE)
    assert bench.table() == whole.table()


def test_more_trials_go_on_from_those_there_are(bench: Bench) -> None:
    bench.search(DIMENSION, RATE, n_trials=6)
    bench.search(DIMENSION, RATE, n_trials=9)
    assert len(bench.table()) == 9
    assert len(bench.launched) == 9
    bench.search(DIMENSION, RATE, n_trials=3)  # fewer than there are: all of them are told of
    assert len(bench.table()) == 9


def test_a_failed_trial_is_named_and_the_search_goes_on(bench: Bench) -> None:
    bench.worth = lambda config: None if config.latent_dim > 16 else valley(config)
    best, words = bench.search(DIMENSION)
    rows = bench.table()
    failed = [row for row in rows if int(row["latent_dim"]) > 16]
    assert failed
    assert {(row["state"], row["marginal_kl"]) for row in failed} == {("fail", "")}
    assert int(best["latent_dim"]) <= 16
    assert f"best of 12 trials, {len(failed)} failed: marginal_kl=" in words
    assert "marginal_kl=no number, latent_dim=" in words
    bench.worth = lambda config: None
    other = replace(bench, settings=replace(bench.settings, experiment="none"))
    with pytest.raises(VaeqError, match="none of 12 trials has a number for objective=marginal_kl"):
        other.search(DIMENSION)


def test_a_point_of_several_seeds_is_worth_their_mean(bench: Bench) -> None:
    bench.worth = lambda config: valley(config) + (1.0 if config.seed else -1.0)
    seeds = Axis("seed", choices=("0", "1"))
    best, _ = bench.search(DIMENSION, seeds, n_trials=4)
    for row in bench.table():
        (config,) = bench.compose([[f"latent_dim={row['latent_dim']}"]])
        assert float(row["marginal_kl"]) == pytest.approx(valley(config), abs=1e-12)
        assert len(row["runs"].split()) == 2
    assert list(best) == ["latent_dim"]
    assert len(bench.launched) == 2 * len({row["latent_dim"] for row in bench.table()})


def test_another_question_in_the_folder_is_another_study(bench: Bench) -> None:
    bench.search(DIMENSION, n_trials=4)
    Bench(replace(bench.settings, direction="maximize")).search(DIMENSION, n_trials=4)
    Bench(replace(bench.settings, epochs=5)).search(DIMENSION, n_trials=4)
    # Where it runs is no part of the question.
    bench.search(DIMENSION, n_trials=4, threads=1, n_jobs=3)
    journal = Path(bench.settings.outputs) / "default" / "study.journal"
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(journal))
    )
    studies = optuna.get_all_study_summaries(storage)
    assert sorted(study.n_trials for study in studies) == [4, 4, 4]


@pytest.mark.parametrize(
    ("changes", "axes", "sentence"),
    [
        ({"objective": None}, [RATE], "objective is missing"),
        (
            {"objective": "marginal_kll"},
            [RATE],
            r"did you mean marginal_kl\? They are active_units",
        ),
        ({"objective": "mmd"}, [RATE], r"measure\.panel=full and generation\.\* have more"),
        ({}, [], "there is nothing to search"),
        ({}, [Axis("latent_dim", low=0, high=5, integer=True)], "latent_dim must be .* got 0"),
        ({}, [Axis("latent_dim", low=1, high=5000, integer=True)], "got 5000"),
        ({}, [Axis("activation", choices=('"relu"', '"tahn"'))], "activation must be"),
        ({}, [RATE, Axis("seed", choices=("0", "-1"))], "seed must be .* got -1"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_starts(
    bench: Bench, changes: dict[str, str], axes: list[Axis], sentence: str
) -> None:
    bench.settings = replace(bench.settings, **changes)
    with pytest.raises(InputError, match=sentence):
        bench.search(*axes)
    assert not Path(bench.settings.outputs).exists()


def test_two_searches_do_not_share_a_folder_at_once(bench: Bench) -> None:
    def nested(config: RunConfig) -> float:
        with pytest.raises(InputError, match="another process is at the search in"):
            Bench(bench.settings).search(DIMENSION)
        return 0.0

    bench.worth = nested
    bench.search(DIMENSION, n_trials=1)
    assert len(bench.launched) == 1


@pytest.mark.parametrize("content", ["no journal\n", '{"op_code": 99}\n', "link"])
def test_a_journal_that_is_none_is_one_line(bench: Bench, content: str, tmp_path: Path) -> None:
    bench.search(DIMENSION, n_trials=2)
    journal = Path(bench.settings.outputs) / "default" / "study.journal"
    journal.unlink()
    if content == "link":
        (tmp_path / "elsewhere").write_text("")
        journal.symlink_to(tmp_path / "elsewhere")
    else:
        journal.write_text(content)
    with pytest.raises(InputError, match=r"study\.journal .*; delete it") as caught:
        bench.search(DIMENSION, n_trials=4)
    assert "\n" not in str(caught.value)
    journal.unlink()
    ran = list(bench.launched)
    bench.search(DIMENSION, n_trials=2)
    assert bench.launched == ran


def test_the_space_is_read_as_hydra_writes_it() -> None:
    fixed, axes = search_space(
        [
            "latent_dim=2,4",  # of a preset; the command line counts
            "epochs=3",
            "latent_dim=range(2,33,2)",
            "encoder_depth=interval(1,3)",
            "learning_rate=tag(log,interval(1e-4,1e-2))",
            "beta=range(0.5,2.1,0.5)",
            "activation=choice(relu,tanh)",
            "decoder_width=tag(log,range(16,257))",
        ]
    )
    assert fixed == ["epochs=3"]
    assert axes == [
        Axis("latent_dim", low=2, high=32, step=2, integer=True),
        Axis("encoder_depth", low=1, high=3, integer=True),
        Axis("learning_rate", low=1e-4, high=1e-2, log=True),
        Axis("beta", low=0.5, high=2.0, step=0.5),
        Axis("activation", choices=("relu", "tanh")),
        Axis("decoder_width", low=16, high=256, log=True, integer=True),
    ]
    for axis in axes:
        axis.distribution()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("latent_dim=range(5,2)", "holds no value"),
        ("beta=interval(2,1)", "write the smaller end first"),
        ("beta=tag(log,interval(0,1))", "by its logarithm and must be > 0, got 0"),
    ],
)
def test_an_empty_range_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        search_space([text])


@pytest.mark.parametrize(
    "changes",
    [
        {"n_importance": 5},
        {"model": "ppca"},
        pytest.param(
            {"panel": "bracket", "ais_images": 2},
            marks=[pytest.mark.soak, pytest.mark.skipif(not SOAK, reason="make soak")],
        ),
    ],
)
def test_the_names_an_objective_may_have_are_those_of_a_record(
    tiny: RunConfig, changes: dict[str, object]
) -> None:
    parts = {"panel": "measure", "n_importance": "generation", "ais_images": "generation"}
    config = tiny
    for name, value in changes.items():
        section = parts.get(name)
        if section is None:
            config = replace(config, model=str(value))
        else:
            inner = replace(getattr(config, section), **{name: value})
            config = replace(config, **{section: inner})
    if config.generation.n_importance:
        config = replace(config, generation=replace(config.generation, likelihood_images=5))
    assert run(config, lambda event: None, threads=1).estimates.keys() == estimates_of(config)


@pytest.fixture
def said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Exit status, output and errors of ``vaeq ...``, run in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["vaeq", *words])
        try:
            main()
        except SystemExit as ended:
            return (int(str(ended.code)), *capsys.readouterr())
        return (0, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    "launcher",
    [
        "ensemble",
        pytest.param(
            "pool", marks=[pytest.mark.soak, pytest.mark.skipif(not SOAK, reason="make soak")]
        ),
    ],
)
def test_a_search_on_real_digits_finds_what_a_grid_finds(
    launcher: str, said: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """More weight on the KL gives less of it: of β = 0.1 and 50 the best is known beforehand."""
    words = (
        "sweep",
        *TINY,
        "beta=0.1,50",
        "latent_dim=2",
        "threads=1",
        f"hydra/launcher={launcher}",
    )
    status, shown, errors = said(
        *words, "hydra/sweeper=optuna", "objective=kl_per_image", "n_trials=4"
    )
    assert (status, errors) == (0, "")
    assert "best of 4 trials: kl_per_image=" in shown.splitlines()[-1]
    assert " at beta=50 (trial " in shown.splitlines()[-1]
    folder = tmp_path / "outputs" / "smoke"
    value = {}
    for file in folder.glob("*/record.json"):
        record = json.loads(file.read_text())
        value[record["config"]["beta"]] = record["estimates"]["kl_per_image"]["value"]
    assert set(value) == {0.1, 50.0}
    assert value[50.0] < value[0.1]
    rows = list(csv.DictReader((folder / "study.csv").read_text().splitlines()))
    assert [float(row["kl_per_image"]) for row in rows] == [value[float(r["beta"])] for r in rows]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["hydra/sweeper=optuna", "objective=kl_per_imag"],
            "objective=kl_per_imag is not among the estimates of these runs; did you mean "
            "kl_per_image? They are ",
        ),
        (["hydra/sweeper=optuna"], "objective is missing: hydra/sweeper=optuna needs"),
        (["objective=elbo"], "objective is for hydra/sweeper=optuna, which searches; add it"),
        (["hydra/sweeper=optuna", "n_trials=0"], "n_trials must be an integer between 1 and"),
        (["beta=interval(0,1)"], "beta=interval(0,1) is no list of values; write them out, "),
    ],
)
def test_a_search_that_cannot_be_is_one_line(
    words: list[str],
    sentence: str,
    said: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    status, shown, errors = said("sweep", *TINY, "latent_dim=2,3", *words)
    assert (status, shown) == (2, "")
    assert errors.startswith(f"vaeq: {sentence}")
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
