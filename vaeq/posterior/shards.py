"""An aggregated posterior whose codes stay on disk: workers hold parts of them, the shards.

    log q_N(z) = log Σ_s exp(log Σ_{i in s} q(z|xᵢ)) − log N

The inner sums are those of :mod:`vaeq.posterior.log_density`, shard by shard and with one origin,
so the result is that of all codes in one place but for the rounding of the outer sum, in float64.
Moments, histograms and the densities of single dimensions are sums over components, too. What is
drawn is drawn here, and only the rows that a draw hits are read: z, and every number of the panel,
are the same as without shards, to rounding.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import torch

from vaeq.errors import InputError, VaeqError, one_line
from vaeq.files.npy import NpyRows
from vaeq.memory import available_memory
from vaeq.posterior.aggregated import AggregatedPosterior
from vaeq.posterior.codes import Codes, as_codes, log_variance
from vaeq.posterior.log_density import sum_rows
from vaeq.posterior.sources import SPREADS, npy_paths

T = TypeVar("T")
Rows = range | np.ndarray[Any, np.dtype[np.int64]]

# Subsets up to this size are held by the process that asks for them: those of n_curve, and the
# images that the bracket fits its densities to.
_GATHERED = 256_000


@dataclass(frozen=True)
class CodeFiles:
    """Means and variances of N posteriors in two .npy files, read some rows at a time.

    Args:
        mean: μ, (N, D).
        spread: log σ², σ² or σ, likewise.
        kind: which of logvar, var and std the second holds.
    """

    mean: NpyRows
    spread: NpyRows
    kind: str

    def __post_init__(self) -> None:
        if self.mean.shape != self.spread.shape:
            raise InputError(
                f"mean and {self.kind} must have the same shape, got {self.mean.shape} and "
                f"{self.spread.shape}."
            )

    @property
    def n(self) -> int:
        """Number of images."""
        return self.mean.shape[0]

    @property
    def latent_dim(self) -> int:
        """Number of latent dimensions."""
        return self.mean.shape[1]

    @property
    def bytes(self) -> int:
        """What the codes take in memory, as float32 or float64."""
        width = max(4, self.mean.dtype.itemsize, self.spread.dtype.itemsize)
        return 2 * self.n * self.latent_dim * width

    def read(self, rows: Rows) -> Codes:
        """Checked codes of some images."""
        mean = _native(self.mean.read(rows))
        return as_codes(mean, log_variance(self.kind, _native(self.spread.read(rows))))

    @contextmanager
    def explaining(self, rows: Rows) -> Iterator[None]:
        """Say of an error which rows of the files it is in."""
        try:
            yield
        except InputError as error:
            where = f"rows {rows[0]} to {rows[-1]}" if len(rows) > 1 else f"row {rows[0]}"
            raise InputError(f"{where} of {self.mean.label}, counted from there: {error}") from None


def _native(array: Any) -> Any:
    """The array as a tensor that shares its memory, where torch has its type."""
    same = array.dtype.isnative and array.dtype in (np.float32, np.float64)
    return torch.from_numpy(array) if same else array


@dataclass(frozen=True)
class _Shard:
    """Some rows of the files, and how all of them are to be computed."""

    files: CodeFiles
    rows: Rows
    token: int  # what a worker recognises it by
    dtype: torch.dtype | None = None
    centre: Any = None  # (D,), NumPy

    def load(self) -> AggregatedPosterior:
        centre = None if self.centre is None else torch.from_numpy(self.centre)
        with self.files.explaining(self.rows):
            codes = self.files.read(self.rows)
            dtype = self.dtype or codes.mean.dtype
            return AggregatedPosterior(codes.mean.to(dtype), codes.logvar.to(dtype), centre=centre)


_tokens = itertools.count()


class Workers:
    """Processes that hold shards and answer for them, each always for the same ones.

    Args:
        count: processes.
        threads: CPU threads of each.
    """

    def __init__(self, count: int, threads: int) -> None:
        # Forked from a server that has torch: a worker costs milliseconds and little memory. It
        # imports the main module of the program, which must not start another (the usual guard).
        context = get_context("forkserver")
        context.set_forkserver_preload(["vaeq.posterior.shards"])
        self._pools = [
            ProcessPoolExecutor(1, context, initializer=_begin, initargs=(threads,))
            for _ in range(count)
        ]
        self._pids = [pool.submit(os.getpid) for pool in self._pools]

    def ask(self, shards: list[_Shard], function: Callable[..., T], arguments: Any) -> list[T]:
        """``function(posterior of the shard, *arguments)`` for every shard."""
        packed = _packed(arguments)
        asked: list[Future[Any]] = []
        try:
            for place, shard in enumerate(shards):
                pool = self._pools[place % len(self._pools)]
                asked.append(pool.submit(_answer, shard, function, packed))
            return [_unpacked(one.result()) for one in asked]
        except BrokenProcessPool:
            raise VaeqError(
                "a worker that held a shard was killed (out of memory?); take more shards, or "
                "fewer threads."
            ) from None
        except BaseException:
            for one in asked:
                one.cancel()
            raise

    def close(self) -> None:
        """End the processes, also in the middle of an answer."""
        for pool, pid in zip(self._pools, self._pids, strict=True):
            if pid.done() and not pid.exception():
                try:
                    os.kill(pid.result(), signal.SIGTERM)
                except ProcessLookupError:
                    continue
            pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    # Ctrl-C reaches the whole process group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    # A worker waits for orders at a pipe that it holds both ends of: it would outlive a parent that
    # was killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# The shard that this process has in memory.
_held: dict[int, AggregatedPosterior] = {}


def _answer(shard: _Shard, function: Callable[..., Any], arguments: Any) -> Any:
    if shard.token not in _held:
        _held.clear()  # before the next is read
        _held[shard.token] = shard.load()
    return _packed(function(_held[shard.token], *_unpacked(arguments)))


@dataclass(frozen=True)
class _Packed:
    """A tensor on its way between processes, by value: torch would send it through /dev/shm."""

    array: Any


def _packed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Packed(value.cpu().numpy())
    if isinstance(value, (list, tuple)):
        return type(value)(_packed(item) for item in value)
    return value


def _unpacked(value: Any) -> Any:
    if isinstance(value, _Packed):
        return torch.from_numpy(value.array)
    if isinstance(value, (list, tuple)):
        return type(value)(_unpacked(item) for item in value)
    return value


@dataclass(frozen=True)
class _Survey:
    """What must be known of all shards before any is computed with."""

    sums: Any  # (D,), NumPy
    dtype: torch.dtype
    lowest_logvar: float
    highest_logvar: float


def _survey(part: AggregatedPosterior) -> _Survey:
    low, high = (float(end) for end in part.logvar.aminmax())
    return _Survey(sum_rows(part.mean).numpy(), part.dtype, low, high)


def _log_sum(part: AggregatedPosterior, z: torch.Tensor) -> torch.Tensor:
    return part.log_sum(z)


def _log_sum_marginal(part: AggregatedPosterior, z: torch.Tensor) -> torch.Tensor:
    return part.log_prob_marginal(z).double() + math.log(part.n)


class ShardedPosterior(AggregatedPosterior):
    """The aggregated posterior of codes in files, held in parts by workers, on the CPU.

    It answers as :class:`AggregatedPosterior` does, but that it has no ``mean`` and ``logvar``:
    ``rows`` and ``chunks`` read them from the files. Use it in a ``with`` statement.

    Args:
        files: the codes.
        shards: parts, each in the memory of one process while it is computed with.
        workers: processes; with fewer of them than shards, each reads its shards in turn.
        threads: CPU threads, of all workers together.

    Raises:
        InputError: as for :class:`AggregatedPosterior`, in which rows; more shards than images.
    """

    def __init__(self, files: CodeFiles, shards: int, workers: int, threads: int) -> None:
        if not 1 <= shards <= files.n:
            raise InputError(f"shards must be between 1 and {files.n} images, got {shards}.")
        count = min(workers, shards)
        self._files = files
        self._most = -(-files.n // shards)
        self._workers = Workers(count, max(1, threads // count))
        self._rows: Rows = range(files.n)
        try:
            self._shards = self._cut()
            found = self.over_parts(_survey)
            total = np.sum([one.sums for one in found], 0)
            narrow = any(one.dtype == torch.float64 for one in found)
            self._dtype = torch.float64 if narrow else torch.float32
            self.logvar_range = (
                min(one.lowest_logvar for one in found),
                max(one.highest_logvar for one in found),
            )
            self._prepare(total / files.n)
        except BaseException:
            self._workers.close()
            raise

    def _cut(self) -> list[_Shard]:
        """Equal shards of the rows, none larger than those of all codes."""
        count = len(self._rows)
        pieces = -(-count // self._most)
        bounds = [count * i // pieces for i in range(pieces + 1)]
        return [
            _Shard(self._files, self._rows[a:b], next(_tokens))
            for a, b in itertools.pairwise(bounds)
        ]

    def _prepare(self, centre: Any) -> None:
        """Give all shards one dtype and one origin.

        A worker with one shard converts what it holds by reading it again, from the system's cache.
        """
        self._shards = [
            replace(shard, dtype=self._dtype, centre=centre, token=next(_tokens))
            for shard in self._shards
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._workers.close()

    @property
    def n(self) -> int:
        """Number of components (images)."""
        return len(self._rows)

    @property
    def latent_dim(self) -> int:
        """Number of latent dimensions."""
        return self._files.latent_dim

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """float32, or float64 where any of the codes came so or are too narrow for float32."""
        return self._dtype

    @property
    def shards(self) -> int:
        """Number of parts."""
        return len(self._shards)

    @property
    def path(self) -> str:
        """Which arithmetic log_prob takes, e.g. ``"tiled float32, 8 shards"``."""
        return f"{super().path}, {self.shards} shards"

    def over_parts(self, function: Callable[..., T], *arguments: Any) -> list[T]:
        """``function(shard, *arguments)`` for each shard, in its worker."""
        return self._workers.ask(self._shards, function, arguments)

    def rows(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """μ and log σ² of some images, by their numbers, in that order, from the files."""
        chosen = index.cpu().numpy()
        numbers = chosen + self._rows.start if isinstance(self._rows, range) else self._rows[chosen]
        codes = self._files.read(numbers)
        return codes.mean.to(self._dtype), codes.logvar.to(self._dtype)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Exact log q_N(z) over all N components, in nats: log-sum-exp over the shards."""
        z = torch.as_tensor(z).to("cpu", self._dtype)
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise InputError(f"z must have shape (S, {self.latent_dim}), got {tuple(z.shape)}.")
        sums = torch.stack(self.over_parts(_log_sum, z))
        return (torch.logsumexp(sums, 0) - math.log(self.n)).to(self._dtype)

    def log_prob_marginal(self, z: torch.Tensor) -> torch.Tensor:
        """log q_{N,j}(z_j) of every dimension by itself, shape (S, D), in nats."""
        sums = torch.stack(self.over_parts(_log_sum_marginal, z.to("cpu", self._dtype)))
        return (torch.logsumexp(sums, 0) - math.log(self.n)).to(self._dtype)

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The codes some rows at a time, float64, from the files."""
        for start in range(0, self.n, _GATHERED // 8):
            index = torch.arange(start, min(start + _GATHERED // 8, self.n))
            mean, logvar = self.rows(index)
            yield from AggregatedPosterior(mean, logvar).chunks()

    def subset(self, index: torch.Tensor) -> AggregatedPosterior:
        """The aggregated posterior of some of the images (indices or a boolean mask).

        Up to 256,000 are read into this process; more are shards again, of the same workers.
        """
        index = index.cpu()
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        if len(index) <= _GATHERED:
            return AggregatedPosterior(*self.rows(index))
        part = object.__new__(ShardedPosterior)
        part.__dict__.update(self.__dict__)
        chosen = index.numpy()
        part._rows = chosen + self._rows.start if isinstance(self._rows, range) else (
            self._rows[chosen]
        )  # fmt: skip
        part._shards = part._cut()
        part._prepare(self._shards[0].centre)
        return part

    def __repr__(self) -> str:
        return f"ShardedPosterior(n={self.n}, latent_dim={self.latent_dim}, shards={self.shards})"


def in_shards(source: str, shards: int | None) -> ShardedPosterior | None:
    """The codes of a source in shards; None where they are to be held in one piece.

    Args:
        source: as :mod:`vaeq.posterior.sources` says; only .npy files can be in shards.
        shards: parts; None: as many as the free memory makes necessary, mostly one.

    Raises:
        InputError: there are no such files, or what they hold cannot be measured.
    """
    if shards == 1:
        return None
    files = _code_files(source)
    if files is None:
        if shards is None:
            return None
        raise InputError(
            f"shards={shards} needs .npy files, of which some rows can be read at a time, got "
            f"codes={one_line(source)}; save the arrays with numpy.save."
        )
    threads = torch.get_num_threads()
    if shards is None:
        shards = shards_needed(files.bytes, available_memory(), threads)
        if shards == 1:
            return None
    return ShardedPosterior(files, shards, threads, threads)


def shards_needed(size: int, memory: int, workers: int) -> int:
    """Shards so that those that ``workers`` processes hold at once fit into half of the memory.

    What is computed with codes takes three times their own size at most.
    """
    room = memory // 2
    if 3 * size <= room:
        return 1
    return math.ceil(3 * size / room) * workers


def _code_files(source: str) -> CodeFiles | None:
    paths = npy_paths(source)
    if paths is None or "mean" not in paths:
        return None
    given = [name for name in SPREADS if name in paths]
    if len(given) != 1:  # the reader of whole files has the words for that
        return None

    def rows(name: str) -> NpyRows:
        return NpyRows(paths[name], f"codes={one_line(str(paths[name]))}")

    return CodeFiles(rows("mean"), rows(given[0]), given[0])
