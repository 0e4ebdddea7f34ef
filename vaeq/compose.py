"""From YAML and overrides to typed configs; from Hydra's errors to one sentence."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    OverrideType,
    Quote,
    QuotedString,
    RangeSweep,
)
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from vaeq.config import (
    CodesConfig,
    ReportConfig,
    RunConfig,
    SampleConfig,
    SweepConfig,
    identified,
    keys_of,
    out_of_range,
)
from vaeq.errors import InputError, one_line
from vaeq.launch.study import Axis

SCHEMAS: dict[str, type] = {
    "train": RunConfig,
    "sweep": SweepConfig,
    "report": ReportConfig,
    "measure": CodesConfig,
    "sample": SampleConfig,
}
_GROUPS = ("data", "experiment")
_DOLLAR = r"${name} stands for another setting, \${ for these two characters."

C = TypeVar("C")


def register_schemas() -> None:
    """Put the schemas where the defaults lists of ``configs/*.yaml`` find them."""
    for command, schema in SCHEMAS.items():
        # A frozen dataclass gives a read-only node; overrides must still be able to set it.
        node = OmegaConf.structured(schema)
        OmegaConf.set_readonly(node, None)
        for child in node.values():
            if isinstance(child, DictConfig):
                OmegaConf.set_readonly(child, None)
        ConfigStore.instance().store(name=f"{command}_schema", node=node, provider="vaeq")


def typed(cfg: DictConfig, schema: type[C]) -> C:
    """The checked dataclass of a composed config.

    Raises:
        InputError: a value is out of its range.
    """
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, schema)
    return config


def run_configs(
    loader: ConfigLoader, master: DictConfig, jobs: Sequence[Sequence[str]]
) -> list[RunConfig]:
    """The typed config of every job of a sweep; the first illegal value refuses them all.

    Raises:
        InputError: a value is out of its range, or the files of some data set cannot be used.
    """
    shared = _Shared(loader, master)
    configs = [shared.compose(job) or _composed(loader, master, job).run_config() for job in jobs]
    return identified(configs)


def _composed(loader: ConfigLoader, master: DictConfig, overrides: Sequence[str]) -> SweepConfig:
    """One job as Hydra composes it, which takes a tenth of a second.

    Raises:
        InputError: a value is out of its range, or there is no such preset.
    """
    try:
        return typed(_node(loader, master, overrides), SweepConfig)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, SweepConfig, overrides)) from error


def _node(loader: ConfigLoader, master: DictConfig, overrides: Sequence[str]) -> DictConfig:
    cfg = loader.load_sweep_config(master, list(overrides))
    with read_write(cfg), open_dict(cfg):
        del cfg["hydra"]
    return cfg


class _Base:
    """What the jobs of some presets share."""

    def __init__(self, node: DictConfig, config: SweepConfig) -> None:
        self.config = config
        self._node = node
        self._values: dict[tuple[str, str], Any] = {}  # by key and repr

    def convert(self, key: str, value: Any) -> Any:
        """The value in the type of the schema, by OmegaConf's own rules."""
        place = key, repr(value)
        if place not in self._values:
            OmegaConf.update(self._node, key, value, merge=True)
            self._values[place] = OmegaConf.select(self._node, key)
        return self._values[place]


class _Shared:
    """The jobs of a sweep by what they share: Hydra composes their presets once, not every job."""

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self._loader, self._master = loader, master
        self._known = keys_of(SweepConfig)
        self._parser = OverridesParser.create()
        self._parsed: dict[str, Override] = {}
        self._bases: dict[tuple[str, ...], _Base | None] = {}

    def compose(self, overrides: Sequence[str]) -> RunConfig | None:
        """A job from the config of its presets and the plain values it sets.

        None where there is more to it, or a value is refused: then Hydra has the word, so that
        every error is Hydra's.
        """
        presets: list[str] = []
        # In their order: of two for one setting the last counts, and the first must be legal.
        changes: list[tuple[str, Any]] = []
        for word in overrides:
            if word not in self._parsed:
                self._parsed[word] = self._parser.parse_override(word)
            override = self._parsed[word]
            name = override.key_or_group
            if name in _GROUPS or name.split(".")[0].split("/")[0] == "hydra":
                presets.append(word)
            elif (
                override.type is not OverrideType.CHANGE or name not in self._known or "${" in word
            ):
                return None
            else:
                changes.append((name, override.value()))
        base = self._base(tuple(presets))
        if base is None:
            return None
        try:
            own: dict[str, Any] = {}
            sections: dict[str, dict[str, Any]] = {}
            for name, value in changes:
                section, _, key = name.rpartition(".")
                place = sections.setdefault(section, {}) if section else own
                place[key] = base.convert(name, value)
            for section, values in sections.items():
                own[section] = replace(getattr(base.config, section), **values)
            return replace(base.config, **own).run_config()
        except (InputError, OmegaConfBaseException):
            return None

    def _base(self, presets: tuple[str, ...]) -> _Base | None:
        """None where a value hangs on another one, or is bad by itself."""
        if presets not in self._bases:
            base = None
            with suppress(HydraException, OmegaConfBaseException, InputError):
                node = _node(self._loader, self._master, presets)
                # An interpolation, ${...}, must see the values of its own job.
                if "${" not in OmegaConf.to_yaml(node):
                    base = _Base(node, typed(node, SweepConfig))
            self._bases[presets] = base
        return self._bases[presets]


def literal(command: str, argument: str) -> str:
    """A path or a condition quoted for Hydra, whose grammar reads ``=``, ``,``, ``(`` and ``ü``.

    In a shell one pair of quotes is then enough: ``where='latent_dim>=8 and seed<3'``, and
    ``outputs=1e3`` is a folder of that name. What Hydra's own quotes enclose stays as it is, and so
    does ``${...}``, which OmegaConf resolves.
    """
    name, _, value = argument.partition("=")
    spec, type_name, _ = keys_of(SCHEMAS[command]).get(name.lstrip("+"), (None, "", None))
    text = type_name in ("str", "str | None", "Any")
    if spec is None or not text or spec.choices or spec.pattern or value in ("", "null"):
        return argument
    if type_name == "Any" and not os.path.exists(value):  # one text or several
        if value[0] == "[":
            return argument
        if name == "metrics" and "," in value:
            return f"{name}=[{value}]"
    if value[0] in "'\"" and _is_override(argument):
        return argument
    # No shell expands the tilde of outputs=~/runs.
    value = os.path.expanduser(value)
    return f"{name}={QuotedString(value, Quote.double).with_quotes()}"


def _is_override(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def sweep_config(master: DictConfig) -> SweepConfig:
    """The settings of a sweep itself, those of its runs as they are without the swept values."""
    cfg = master.copy()
    with read_write(cfg), open_dict(cfg):
        del cfg["hydra"]
    return typed(cfg, SweepConfig)


def search_space(overrides: Sequence[str]) -> tuple[list[str], list[Axis]]:
    """The overrides of a search that are fixed, and the values between which it may choose.

    The last override of a setting counts. A list of values is a choice without an order; integers
    of a ``range`` or an ``interval`` have one, and so have the numbers of an ``interval``; with
    ``tag(log, ...)`` their logarithm is searched.

    Raises:
        InputError: a range or an interval is empty.
    """
    last = {o.key_or_group: o for o in OverridesParser.create().parse_overrides(list(overrides))}
    fixed, axes = [], []
    for name, override in last.items():
        if not override.is_sweep_override():
            fixed.append(str(override.input_line))
            continue
        swept = override.value()
        log = "log" in getattr(swept, "tags", ())
        if override.is_choice_sweep():
            axes.append(Axis(name, choices=tuple(override.sweep_string_iterator())))
        elif isinstance(swept, RangeSweep):
            values = [float(value) for value in swept.range()]
            step = None if log else abs(float(swept.step))
            if not values:
                raise InputError(f"{override.input_line} holds no value.")
            axes.append(_axis(name, min(values), max(values), step, log))
        elif isinstance(swept, IntervalSweep):
            assert swept.start is not None
            assert swept.end is not None
            if not swept.start <= swept.end:
                raise InputError(f"{override.input_line} is empty: write the smaller end first.")
            axes.append(_axis(name, float(swept.start), float(swept.end), None, log))
    return fixed, axes


def _axis(name: str, low: float, high: float, step: float | None, log: bool) -> Axis:
    integer = "int" in keys_of(SweepConfig)[name][1]
    if log and low <= 0:
        raise InputError(f"{name} is searched by its logarithm and must be > 0, got {low:g}.")
    return Axis(name, low=low, high=high, step=step, log=log, integer=integer)


def check_overrides(command: str, arguments: Iterable[str]) -> None:
    """Refuse a misspelt key, a key behind ``+``, or a list of values where one run is wanted.

    Raises:
        InputError: with the key that was probably meant.
    """
    known = keys_of(SCHEMAS[command])
    groups = _GROUPS if command in ("train", "sweep") else ()
    arguments = list(arguments)
    searched = "hydra/sweeper=optuna" in arguments
    for argument in arguments:
        shown = one_line(argument, 80)
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            several = argument.partition("=")[2].startswith("[")
            advice = """, and a list of names as '["a=1,b=2","c"]'""" if several else ""
            raise InputError(f"{shown!r} is not an override; write key=value{advice}.") from None
        name = override.key_or_group
        if name.split(".")[0].split("/")[0] == "hydra":
            continue
        if name not in known and name not in groups:
            raise InputError(
                f"{one_line(name, 80)} is not a setting of vaeq {command}; "
                f"{_suggest(name, [*known, *groups])}"
                f"vaeq {command} --help lists them all."
            )
        if name in groups and "/" in argument:
            raise InputError(f"{name} must be the name of a preset, got {shown.partition('=')[2]}.")
        if override.is_delete():
            raise InputError(f"{name} cannot be removed; drop {shown!r}.")
        if override.is_add() and not override.is_force_add():
            raise InputError(f"{name} is a setting already; drop the '+' of {shown!r}.")
        if override.is_interval_sweep() and not searched:
            raise InputError(
                f"{shown} is no list of values; write them out, {name}=1,2,3, or search it with "
                "hydra/sweeper=optuna objective=..."
            )
        if command == "train" and override.is_sweep_override():
            raise InputError(
                f"{shown} names several values, and vaeq train fits one model; "
                f"use vaeq sweep {shown}."
            )


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    # measure=full names a section: its own keys are what was meant.
    inside = [word for word in known if word.startswith(f"{name}.")]
    found = inside or close
    return f"did you mean {found[0]}? " if found else ""


def explain(error: Exception, schema: type, overrides: Sequence[str]) -> str:
    """One sentence for an error of Hydra or OmegaConf: field, range and value where known."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for each in causes:
        name = re.search(r"full_key: (\S+)", str(each))
        value = re.search(r"[Vv]alue '(.*?)'", str(each), re.DOTALL)
        known = keys_of(schema)
        if name and name[1] in known and value:
            spec, type_name, _ = known[name[1]]
            return out_of_range(name[1], spec, type_name, value[1])
        if name and name[1] in known and "nterpolation" in str(each):
            return f"{name[1]}: {str(each).splitlines()[0].rstrip('.')}; {_DOLLAR}"
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group} must be one of {', '.join(error.options)}, got {choice}."
    words = " ".join(str(error).split())
    unclosed = any(isinstance(each, GrammarParseError) for each in causes)
    return f"{words}: {_DOLLAR}" if unclosed else words
