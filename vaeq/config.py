"""What a run is: every setting with its unit, range and meaning, checked once at the edge.

The dataclasses below are the schema of the YAML files in ``configs/`` (Hydra structured configs)
and the typed objects the rest of the code receives. A field declares its own range, so the error
message, the ``--help`` text and the check cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from vaeq.errors import InputError, one_line

# Part of every run's hash: raise it when the same settings no longer give the same numbers.
SCHEMA_VERSION = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Key:
    """What a setting may hold: the words of its help line and of its error message."""

    help: str
    unit: str = ""
    low: float | None = None
    above: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str = ""
    pattern_words: str = ""
    # Does the value change the numbers of a run? Only such settings enter its hash.
    science: bool = True
    # Came after runs had been kept: at its default it is left out of the hash, which stays theirs.
    later: bool = False

    def range_words(self, type_name: str) -> str:
        """``an integer >= 1``, ``a number > 0``, ``one of relu, tanh``."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.pattern_words:
            return self.pattern_words
        optional = "None" in type_name
        if "int" in type_name:
            words = "an integer"
        elif "float" in type_name:
            words = "a number"
        elif "bool" in type_name:
            words = "true or false"
        else:
            words = "text"
        if self.low is not None and self.high is not None:
            words += f" between {self.low:g} and {self.high:.10g}"
        elif self.low is not None:
            words += f" >= {self.low:g}"
        elif self.above is not None:
            words += f" > {self.above:g}"
            if self.high is not None:
                words += f" and <= {self.high:g}"
        return words + (", or null" if optional else "")

    def accepts(self, value: Any) -> bool:
        """True if a value of the right type is in range; NaN and infinity never are."""
        if value == "":
            return False
        if self.choices:
            return value in self.choices
        if self.pattern:
            return re.fullmatch(self.pattern, str(value)) is not None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return (
                (isinstance(value, int) or math.isfinite(value))
                and (self.low is None or value >= self.low)
                and (self.above is None or value > self.above)
                and (self.high is None or value <= self.high)
            )
        return True


def key(default: T, help: str, **spec: Any) -> T:
    """A dataclass field with its default, range and meaning."""
    result: T = field(default=default, metadata={"key": Key(help, **spec)})
    return result


def check(config: Any, prefix: str = "") -> None:
    """Raise InputError for the first field of a config dataclass that is out of its range."""
    for item in dataclasses.fields(config):
        spec = item.metadata.get("key")
        value = getattr(config, item.name)
        if spec is None or (value is None and "None" in str(item.type)):
            continue
        if not (_is_of(str(item.type), value) and spec.accepts(value)):
            raise InputError(out_of_range(prefix + item.name, spec, str(item.type), value))


def _is_of(type_name: str, value: Any) -> bool:
    """Is a value of the type its field names? The settings in a record passed through no YAML."""
    kinds = {"int": int, "float": int | float, "bool": bool, "str": str}
    kind = kinds.get(type_name.partition(" |")[0], object)
    return isinstance(value, kind) and (not isinstance(value, bool) or kind in (bool, object))


def out_of_range(name: str, spec: Key, type_name: str, value: Any) -> str:
    """The one sentence for a bad value: field, range, value received."""
    shown = one_line(str(value), 100) or repr(value)
    return f"{name} must be {spec.range_words(type_name)}, got {shown}."


FILE_NAME = r"(?!\.)[A-Za-z0-9_.+-]{1,100}"
# Data sets that are read from files which may hold anything, by name or by path.
NAMED = ("fashion_mnist", "kmnist", "emnist")
OWN = ("idx", "npz")
# Settings of some data sets alone.
_OWNERS = {
    "path": OWN,
    "split": ("emnist",),
    "synthetic_dim": ("synthetic_ppca",),
    "synthetic_side": ("synthetic_ppca",),
    "synthetic_signal": ("synthetic_ppca",),
    "synthetic_seed": ("synthetic_ppca",),
}


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how grey levels become Bernoulli observations."""

    name: str = key(
        "mnist",
        "data set; mnist ships with vaeq, fashion_mnist, kmnist and emnist come through "
        "torchvision; idx and npz are anyone's images, in data.path; synthetic_ppca is drawn",
        choices=("mnist", *NAMED, *OWN, "synthetic_ppca"),
    )
    root: str | None = key(
        None,
        "folder of the files of a named data set; null: the packaged MNIST, else ~/.cache/vaeq",
        science=False,
    )
    path: str | None = key(
        None,
        "data=idx: folder of four IDX files named like MNIST's; data=npz: file with train_images, "
        "test_images and perhaps their labels",
        science=False,
    )
    md5: str | None = key(
        None,
        "MD5 of the images and labels in the files, which a run is told apart by wherever they "
        "lie; null: that of the files found; another is refused",
        pattern="[0-9a-f]{32}",
        pattern_words="32 hexadecimal digits, or null",
        later=True,
    )
    split: str | None = key(
        None,
        "which part of emnist",
        choices=("byclass", "bymerge", "balanced", "letters", "digits", "mnist"),
        later=True,
    )
    download: bool = key(False, "let torchvision download a data set it misses", science=False)
    binarize: str = key(
        "none",
        "none: grey levels as Bernoulli means; dynamic: a fresh draw every epoch; static: one draw",
        choices=("none", "dynamic", "static"),
    )
    n_train: int | None = key(
        None, "use the first n training images; null: all", unit="images", low=1
    )
    n_test: int | None = key(None, "use the first n test images; null: all", unit="images", low=1)
    synthetic_dim: int = key(
        4,
        "latent dimension that synthetic_ppca is drawn from",
        unit="dimensions",
        low=1,
        high=4096,
        later=True,
    )
    synthetic_side: int = key(
        8, "height and width of its images", unit="pixels", low=2, high=64, later=True
    )
    synthetic_signal: float = key(
        4.0,
        "variance along each of its latent directions, in units of the noise's",
        above=0,
        high=100,
        later=True,
    )
    synthetic_seed: int = key(0, "seed of its parameters and draws", low=0, later=True)

    def __post_init__(self) -> None:
        check(self, "data.")
        for field_name, names in _OWNERS.items():
            (item,) = (item for item in dataclasses.fields(self) if item.name == field_name)
            value = getattr(self, field_name)
            if value != item.default and self.name not in names:
                raise InputError(
                    f"data.{field_name} is a setting of data={' and data='.join(names)}, "
                    f"got data={self.name}; drop it."
                )
        if self.name in OWN and self.path is None:
            what = "the folder of its IDX files" if self.name == "idx" else "its .npz file"
            raise InputError(f"data.path is missing; data={self.name} needs {what} there.")
        if self.name == "emnist" and self.split is None:
            choices = keys_of(DataConfig)["split"][0].choices
            raise InputError(f"data.split is missing; data=emnist has {', '.join(choices)}.")
        if self.name == "synthetic_ppca" and self.synthetic_dim >= self.synthetic_side**2:
            raise InputError(
                f"data.synthetic_dim must be below the {self.synthetic_side**2} pixels of its "
                f"images, got {self.synthetic_dim}; raise data.synthetic_side."
            )


@dataclass(frozen=True)
class MeasureConfig:
    """How closely the aggregated posterior is looked at after training."""

    panel: str = key(
        "bracket",
        "decomposition: that of the average KL, exact; bracket: and the certified bracket of the "
        "population's; full: and two-sample tests, reverse KL and curves",
        choices=("decomposition", "bracket", "full"),
    )
    n_samples: int = key(
        10_000,
        "Monte Carlo samples of the aggregated posterior",
        unit="samples",
        low=2,
        high=10_000_000,
    )
    flow: bool = key(False, "also fit a neural spline flow for the lower bound (needs vaeq[flow])")

    def __post_init__(self) -> None:
        check(self, "measure.")


@dataclass(frozen=True)
class GenerationConfig:
    """What the decoder is asked: the likelihood of held-out images, the worth of samples."""

    n_importance: int | None = key(
        200,
        "importance draws an image for log p(x) and the inference gap; null: not estimated",
        unit="draws",
        low=2,
        high=1_000_000,
    )
    likelihood_images: int = key(
        1000, "held-out images of which log p(x) is estimated, at most", unit="images", low=2
    )
    ais_images: int = key(
        0,
        "held-out images on which annealed importance sampling checks log p(x); 0: none",
        unit="images",
        low=0,
    )
    quality: bool = key(
        True,
        "judge samples from the prior, the aggregated posterior, an ex-post mixture and a scaled "
        "prior in the features of a digit classifier",
    )

    def __post_init__(self) -> None:
        check(self, "generation.")


@dataclass(frozen=True)
class RunConfig:
    """One VAE: fitted, measured, written to one directory."""

    model: str = key(
        "mlp",
        "mlp: a VAE of two multilayer perceptrons; conv: of convolutions, as many as the depth, "
        "from width/16 channels on, and a dense layer of the width; ppca: probabilistic PCA by EM "
        "(of the network only latent_dim matters then). q(z|x) is a diagonal Gaussian in all",
        choices=("mlp", "conv", "ppca"),
    )
    latent_dim: int = key(2, "dimension of the latent code z", unit="dimensions", low=1, high=4096)
    encoder_depth: int = key(
        2, "hidden layers of the encoder; 0 is linear", unit="layers", low=0, high=64
    )
    encoder_width: int = key(
        500, "units in a hidden encoder layer", unit="units", low=1, high=65536
    )
    decoder_depth: int = key(
        2, "hidden layers of the decoder; 0 is linear", unit="layers", low=0, high=64
    )
    decoder_width: int = key(
        500, "units in a hidden decoder layer", unit="units", low=1, high=65536
    )
    activation: str = key(
        "relu",
        "nonlinearity of the hidden layers",
        choices=("relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh"),
    )
    initialization: str = key(
        "he_glorot",
        "he_glorot: He before a rectifier, else Glorot; mean_image: the same with small last "
        "layers and the decoder's bias at the mean image; torch: the default of torch.nn.Linear",
        choices=("he_glorot", "mean_image", "torch"),
    )
    beta: float = key(1.0, "weight of the KL term in the training loss", low=0, high=1e6)
    kl_warmup_epochs: int = key(
        0, "epochs over which the KL weight rises to beta", unit="epochs", low=0
    )
    epochs: int = key(10, "passes over the training images", unit="epochs", low=1, high=1_000_000)
    batch_size: int = key(128, "images in a gradient step", unit="images", low=1, high=1_000_000)
    learning_rate: float = key(1e-3, "step size of Adam", above=0, high=10)
    learning_rate_warmup_steps: int = key(
        0, "gradient steps over which the learning rate rises to its value", unit="steps", low=0
    )
    schedule: str = key(
        "constant",
        "learning rate over the epochs; burda: eight steps down to a tenth, each three times as "
        "long as the one before",
        choices=("constant", "cosine", "burda"),
    )
    early_stopping: int | None = key(
        None,
        "stop after so many epochs without a better held-out ELBO; null: never",
        unit="epochs",
        low=1,
    )
    seed: int = key(0, "seed of weights, batches and noise", low=0, high=2**31 - 1)
    device: str = key(
        "auto",
        "auto takes the first GPU, else the CPU",
        pattern=r"auto|cpu|cuda(:\d+)?",
        pattern_words="auto, cpu, cuda or cuda:N",
        science=False,
    )
    precision: str = key(
        "auto",
        "matrix products of the training step; auto: bf16 where the processor has it, else fp32; "
        "measures are fp32 or better",
        choices=("auto", "fp32", "tf32", "bf16"),
    )
    kernels: str = key(
        "auto",
        "what takes the training steps of model=mlp; compiled: C, on a CPU; torch: its operations; "
        "auto: compiled where there is a C compiler",
        choices=("auto", "compiled", "torch"),
        science=False,
    )
    threads: int | None = key(
        None,
        "CPU threads of a run; null: 1 in a sweep, all cores in vaeq train",
        unit="threads",
        low=1,
        high=1024,
        science=False,
    )
    outputs: str = key("outputs", "folder that receives the runs", science=False)
    experiment: str = key(
        "default",
        "preset from configs/experiment; also the sub-folder of outputs",
        pattern=FILE_NAME,
        pattern_words="a plain folder name of letters, digits, '_', '.', '+' and '-'",
        science=False,
    )
    logger: str = key(
        "none",
        "also show the run in a tracker, on this machine alone: scalars by epoch, estimates, "
        "figures; needs vaeq[tensorboard], vaeq[trackio] or vaeq[wandb]",
        choices=("none", "tensorboard", "trackio", "wandb_offline"),
        science=False,
    )
    data: DataConfig = field(default_factory=DataConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        check(self)
        if self.kl_warmup_epochs > self.epochs:
            raise InputError(
                f"kl_warmup_epochs must be at most epochs={self.epochs}, "
                f"got {self.kl_warmup_epochs}."
            )
        if self.kernels == "compiled" and self.model != "mlp":
            raise InputError("kernels=compiled needs model=mlp; use kernels=auto.")
        if self.model == "conv":
            for name in ("encoder_depth", "decoder_depth"):
                if getattr(self, name) < 1:
                    raise InputError(f"{name} must be >= 1 with model=conv, got 0.")
            if self.initialization == "mean_image":
                raise InputError(
                    "initialization must be he_glorot or torch with model=conv, whose last layer "
                    "has a bias a channel, got mean_image."
                )


@dataclass(frozen=True)
class SweepConfig(RunConfig):
    """Many runs: the settings of each, and how many train side by side."""

    n_jobs: int | None = key(
        None,
        "runs trained side by side; null: one a core",
        unit="processes",
        low=1,
        high=1024,
        science=False,
    )
    objective: str | None = key(
        None,
        "with hydra/sweeper=optuna, the estimate to search by, such as marginal_kl; where seed has "
        "several values, its mean over them",
        science=False,
    )
    direction: str = key(
        "minimize",
        "of the search: is less of the objective better, or more?",
        choices=("minimize", "maximize"),
        science=False,
    )
    n_trials: int = key(
        20, "points that a search tries in all", unit="trials", low=1, high=1_000_000, science=False
    )
    trial_batch: int = key(
        4,
        "points a search chooses at once, which then train side by side; the next ones know how "
        "they ended",
        unit="trials",
        low=1,
        high=1024,
        science=False,
    )
    trial_seed: int = key(0, "seed of the choice of points", low=0, high=2**31 - 1, science=False)

    def run_config(self) -> RunConfig:
        """The settings of one run, without those of the sweep around it."""
        names = [item.name for item in dataclasses.fields(RunConfig)]
        return RunConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class CodesConfig(MeasureConfig):
    """Anybody's codes: where they are, and how closely to look."""

    panel: str = key(
        "full",
        "decomposition, bracket or full, as for vaeq train",
        choices=("decomposition", "bracket", "full"),
    )
    codes: str | None = key(
        None, "a .npz, a .safetensors or a folder of .npy files with mean, logvar, ..."
    )
    output: str | None = key(None, "JSON file that receives the numbers; null: print only")
    seed: int = key(0, "seed of everything that is drawn", low=0, high=2**31 - 1)
    threads: int | None = key(
        None, "CPU threads; null: all cores", unit="threads", low=1, high=1024
    )
    shards: int | None = key(
        None,
        "parts in which .npy files are read, so that no process holds more than one; null: 1, or "
        "as many as the free memory makes necessary",
        unit="parts",
        low=1,
        high=100_000,
    )

    def __post_init__(self) -> None:
        check(self)
        if self.codes is None:
            raise InputError("codes is missing; give codes=FILE.npz (see vaeq measure --help).")


@dataclass(frozen=True)
class SampleConfig:
    """Which trained run to draw pictures from, and how."""

    run: str | None = key(None, "folder of a finished run")
    picture: str = key(
        "samples",
        "samples; plane: the manifold of a two-dimensional code; interpolations between held-out "
        "digits; reconstructions of held-out digits under their originals",
        choices=("samples", "plane", "interpolations", "reconstructions"),
    )
    source: str = key(
        "prior",
        "where the codes of samples come from: N(0, I), the aggregated posterior, a Gaussian "
        "mixture fitted to it, or N(0, scale² I)",
        choices=("prior", "aggregated", "gmm", "scaled"),
    )
    scale: float = key(0.8, "standard deviation of source=scaled", above=0, high=100)
    n: int = key(100, "images; the plane has about as many", unit="images", low=1, high=1_000_000)
    seed: int = key(0, "seed of everything that is drawn", low=0, high=2**31 - 1)
    output: str | None = key(None, "folder that receives the PNG and the .npz; null: the run's own")

    def __post_init__(self) -> None:
        check(self)
        if self.run is None:
            raise InputError("run is missing; give run=FOLDER of a finished run.")


@dataclass(frozen=True)
class ReportConfig:
    """Which runs to tabulate, and where the report goes."""

    # A text or a list of texts, which OmegaConf's unions do not know.
    runs: Any = key(  # noqa: RUF009
        None,
        "folders of runs, searched three levels deep, or globs; null: the newest experiment in "
        "outputs",
        pattern_words="a folder, a glob such as 'outputs/*', or a list [A,B]",
    )
    output: str | None = key(
        None,
        "folder that receives the report; null: the folder of runs, or report beside several",
    )
    where: str | None = key(
        None,
        "keep the runs for which this holds, such as 'latent_dim>=8 and seed<3'",
        pattern_words="comparisons of settings and metrics with ==, !=, <, <=, >, >=, in, and, or, "
        "not",
    )
    metrics: Any = key(  # noqa: RUF009
        None,
        "columns of the tables; null: those that tell most",
        pattern_words="metrics such as kl_per_image,marginal_kl",
    )
    baseline: str | None = key(
        None,
        "also show differences from this configuration",
        pattern_words="settings such as 'latent_dim=2,encoder_depth=1', or how a run's name begins",
    )

    def __post_init__(self) -> None:
        check(self)
        for name in ("runs", "metrics"):
            value = getattr(self, name)
            words = value if isinstance(value, list) else [value]
            if value is not None and not (words and all(isinstance(w, str) and w for w in words)):
                spec = keys_of(ReportConfig)[name][0]
                raise InputError(out_of_range(name, spec, "Any", value))


def science(config: Any) -> dict[str, Any]:
    """The settings that change the numbers of a run, as plain values."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            values[item.name] = science(value)
            continue
        spec = item.metadata["key"]
        if spec.science and not (spec.later and value == item.default):
            values[item.name] = value
    return values


def identified(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """The same settings with ``data.md5`` filled in, where a run's images come in files.

    Where the files lie is no part of what a run is, and what they hold is: without this two runs on
    other images would share a folder.

    Raises:
        InputError: the files cannot be used.
    """
    found: dict[DataConfig, DataConfig] = {}
    for data in {config.data for config in configs}:
        found[data] = data
        if data.name in (*NAMED, *OWN) and data.md5 is None:
            from vaeq.data.datasets import read_image_set

            images = read_image_set(
                data.name,
                root=data.root,
                download=data.download,
                split=data.split,
                path=data.path,
            )
            found[data] = replace(data, md5=images.md5)
    return [replace(config, data=found[config.data]) for config in configs]


def run_config(values: dict[str, Any]) -> RunConfig:
    """The typed config of a record's plain values.

    Raises:
        InputError: a value is missing, unknown or out of its range.
    """
    parts = {"data": DataConfig, "measure": MeasureConfig, "generation": GenerationConfig}
    try:
        nested = {name: schema(**values[name]) for name, schema in parts.items()}
        return RunConfig(**{**values, **nested})
    except (KeyError, TypeError) as error:
        raise InputError(f"its settings are those of another version of vaeq ({error}).") from None


def config_hash(config: RunConfig) -> str:
    """SHA-256 (hex) of the settings that change the science and of the schema version.

    Device, paths, thread and worker counts stay outside: they must not change a result, and a run
    moved to another machine must be recognised there.
    """
    content = {"schema_version": SCHEMA_VERSION, "config": science(config)}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def run_name(config: RunConfig) -> str:
    """The directory name of a run: the axes for people, eight digits of the hash for truth."""
    axes = ("latent_dim", "encoder_depth", "encoder_width", "seed")
    words = ",".join(f"{axis}={getattr(config, axis)}" for axis in axes)
    return f"{words}-{config_hash(config)[:8]}"


def keys_of(schema: type) -> dict[str, tuple[Key, str, Any]]:
    """Every dotted key of a schema with its Key, type name and default, in order."""
    result: dict[str, tuple[Key, str, Any]] = {}
    for item in dataclasses.fields(schema):
        if item.default_factory is not dataclasses.MISSING:
            nested = item.default_factory
            assert isinstance(nested, type)
            for name, entry in keys_of(nested).items():
                result[f"{item.name}.{name}"] = entry
        else:
            result[item.name] = (item.metadata["key"], str(item.type), item.default)
    return result
