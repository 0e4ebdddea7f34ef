"""log q_N(z) = log 1/N Σᵢ N(z; μᵢ, diag σᵢ²), every component, without the (S, N, D) broadcast.

    log₂ N(z; μ, σ²) = [z², z, 1] · [−½σ⁻², μσ⁻², −½(μ²σ⁻² + log 2πσ²)] log₂e

is a matrix product. It is made in tiles that stay in cache; each is exponentiated and summed in
place, so the (S, N) matrix never exists. Powers of two are taken, since torch.exp2 costs a third of
torch.exp and does not slow down on the large negative logits of components that are far away.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from vaeq.lockstep import made
from vaeq.threads import in_threads

_LOG2_E = math.log2(math.e)
_LOG_2PI = math.log(2 * math.pi)
# Relative rounding of the expanded square is amplified by (μ/σ)². Three times the unit roundoff
# times the root sum of squares of that, over the groups of dimensions below, bounds the errors
# seen; beyond the limit it could pass 1e-3 nats.
_TOLERANCE = 1e-3
_LIMIT = {
    torch.float32: _TOLERANCE / (3 * 2.0**-24),
    torch.float64: _TOLERANCE / (3 * 2.0**-53),
}
# z², z and 1 alternate every so many dimensions: their products cancel group by group, and partial
# sums stay small however many dimensions there are.
_GROUP = {torch.float32: 4, torch.float64: 1}
# Smaller powers of two than these would be slow subnormal numbers; they cannot be seen in the sum.
_SMALLEST = {torch.float32: -126.0, torch.float64: -1022.0}
# A tile whose sum is this large has outgrown its shift, long before it overflows.
_OUTGROWN = 2.0**50
# log₂ of a component that is not there: far below all that are, and no infinity, of which a
# product with 0 would be NaN.
_NOTHING = -1e30
# float32 would overflow in z²/σ² beyond either of these.
_FAR = 1e9
_EXTREME = 40.0
# Logits in a tile, and rows in it: 2 MB, and many rows for each packing of the keys.
_CPU_TILE, _CPU_ROWS = 1 << 19, 1 << 10
_GPU_TILE, _GPU_ROWS = 1 << 24, 1 << 12
# Tiles whose keys are made at once: one stays in cache, and a GPU would wait for the launches.
_CPU_PACKED, _GPU_PACKED = 1, 1 << 10
_BLOCK_BYTES = 1 << 26


class MixtureLogDensity:
    """The exact log density of an equally weighted mixture of N diagonal Gaussians.

    Each component is computed in the cheapest arithmetic that keeps its error below 1e-3 nats (or
    1e-6 of the value, where z is so far from every code that this is more): float32 where its
    codes are float32 and |μ − centre|/σ is moderate, float64 where that is large, and float64
    differences (z − μ)/σ one by one where even that would cancel. float32 products that the device
    would round to TF32 are made in float64.

    Args:
        mean: μ, shape (N, D), float32 or float64.
        logvar: log σ², likewise.
        centre: origin of the arithmetic, shape (D,), float64; None: the mean of the codes.
    """

    def __init__(
        self, mean: torch.Tensor, logvar: torch.Tensor, centre: torch.Tensor | None = None
    ) -> None:
        self._mean = mean.detach()
        self._logvar = logvar.detach()
        self._centre = sum_rows(self._mean) / len(mean) if centre is None else centre
        single, double, extreme = self._conditioning()
        narrow = (single > _LIMIT[torch.float32]) | (mean.dtype == torch.float64)
        narrow |= extreme > _EXTREME
        direct = double > _LIMIT[torch.float64]
        self._single = (~narrow).nonzero()[:, 0]
        self._double = (narrow & ~direct).nonzero()[:, 0]
        self._direct = (narrow & direct).nonzero()[:, 0]

    def _conditioning(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What decides on the arithmetic of every component, float64 (N,) each.

        (Σ_g (Σ_{j in g} (μ − centre)²/σ²)²)^½ for the groups of float32 and of float64, and the
        largest |log σ²|.
        """
        count, dims = self._mean.shape
        found = torch.empty(3, count, dtype=torch.float64, device=self._mean.device)
        # Small results kept between the megabytes of every chunk leave holes in the heap, gigabytes
        # of them at a million codes of 512 dimensions: everything here has its place beforehand.
        rows = min(count, chunk_rows(dims))
        widths = [_GROUP[dtype] for dtype in (torch.float32, torch.float64)]
        padding = -dims % math.lcm(*widths)
        ratios = torch.zeros(rows, dims + padding, dtype=torch.float64, device=found.device)
        precisions = torch.empty(rows, dims, dtype=torch.float64, device=found.device)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            ratio, precision = ratios[: part.stop - start], precisions[: part.stop - start]
            precision.copy_(self._logvar[part])
            found[2, part] = precision.abs().amax(1)
            precision.neg_().exp_()
            ratio[:, :dims].copy_(self._mean[part]).sub_(self._centre)
            ratio[:, :dims].square_().mul_(precision)
            for place, width in enumerate(widths):
                groups = ratio.view(len(ratio), -1, width).sum(2)
                found[place, part] = groups.square_().sum(1).sqrt()
        return found[0], found[1], found[2]

    @property
    def arithmetic(self) -> dict[str, int]:
        """How many components are computed in which arithmetic."""
        counts = {"tiled float32": len(self._single), "tiled float64": len(self._double)}
        if counts["tiled float32"] and rounds_products(self._mean.device):
            counts = {"tiled float64": len(self._single) + len(self._double)}
        return {**counts, "direct float64": len(self._direct)}

    @property
    def path(self) -> str:
        """The arithmetic in use, in words."""
        return path_words(self.arithmetic)

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """log q_N(z) of z (S, D) in nats, float64, shape (S,)."""
        (found,) = made(_log_densities, [(self, z)], shape=(len(z), z.device))
        return found

    def components(self, far: bool) -> Iterator[tuple[torch.Tensor, torch.dtype]]:
        """Components for matrix products, as numbers of the mixture's, and their arithmetic.

        Args:
            far: products that are float32 elsewhere have to be float64.
        """
        for index, dtype in (
            (self._single, torch.float64 if far else torch.float32),
            (self._double, torch.float64),
        ):
            if len(index):
                yield index, dtype

    def centred(self, z: torch.Tensor) -> torch.Tensor:
        """z (S, D) from the origin of the arithmetic, float64."""
        return z.double() - self._centre

    def operands(
        self, index: torch.Tensor, dims: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """μ from the origin of the arithmetic and log σ² of some components, (count, dims) float64.

        Further dimensions are those of N(0, 1), at which z must be 0; further components are 0.
        """
        more = (0, dims - self._mean.shape[1], 0, count - len(index))
        mean, logvar = self._mean[index].double() - self._centre, self._logvar[index].double()
        return (pad(mean, more), pad(logvar, more)) if any(more) else (mean, logvar)

    def by_differences(self, z: torch.Tensor) -> torch.Tensor | None:
        """log Σᵢ of the unnormalized densities from (z − μ)/σ itself: no cancellation, slow.

        None where no component asks for it.
        """
        if not len(self._direct):
            return None
        rows = chunk_rows(z.shape[1])
        total = torch.full_like(z[:, 0], -math.inf)
        for members in self._direct.split(max(1, min(rows, 1024))):
            mean, logvar = self._mean[members].double(), self._logvar[members].double()
            precision, log_det = torch.exp(-logvar), logvar.sum(1)
            found = [
                torch.logsumexp(
                    -0.5 * (((chunk[:, None] - mean).square() * precision).sum(2) + log_det), 1
                )
                for chunk in z.split(max(1, rows // len(mean)))
            ]
            total = torch.logaddexp(total, torch.cat(found))
        return total

    @property
    def log_scale(self) -> float:
        """log N (2π)^(D/2), by which the unnormalized densities are too large."""
        count, dims = self._mean.shape
        return math.log(count) + 0.5 * dims * _LOG_2PI


def _log_densities(
    asked: Sequence[tuple[MixtureLogDensity, torch.Tensor]],
) -> list[torch.Tensor]:
    """log q_N(z) of E mixtures, each at z (S, D) of its own, float64, (S,) each.

    Those of fewer dimensions and components are padded, and multiplied as one stack.
    """
    device = asked[0][1].device
    exact = not rounds_products(device)
    far = [not exact or float(z.abs().amax()) >= _FAR for _, z in asked]
    parts: list[list[torch.Tensor]] = [[] for _ in asked]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        # Rows at a time, so that neither the queries nor the results outgrow their bounds.
        rows = _BLOCK_BYTES // 8 // sum(3 * z.shape[1] + 1 for _, z in asked)
        for points in zip(*(z.split(max(1, rows)) for _, z in asked), strict=True):
            centred = [mixture.centred(z) for (mixture, _), z in zip(asked, points, strict=True)]
            totals = [torch.full_like(z[:, 0], -math.inf) for z in centred]
            for dtype in (torch.float32, torch.float64):
                stack = [
                    _Operands(e, mixture, index, centred[e])
                    for e, (mixture, _) in enumerate(asked)
                    for index, own in mixture.components(far[e])
                    if own == dtype
                ]
                if stack:
                    for one, found in zip(stack, _tiled(stack, dtype), strict=True):
                        totals[one.member] = torch.logaddexp2(totals[one.member], found)
            for e, ((mixture, _), z) in enumerate(zip(asked, points, strict=True)):
                total = totals[e] / _LOG2_E
                differences = mixture.by_differences(z.double())
                if differences is not None:
                    total = torch.logaddexp(total, differences)
                parts[e].append(total)
    return [
        torch.cat(part) - mixture.log_scale for part, (mixture, _) in zip(parts, asked, strict=True)
    ]


class _Operands(NamedTuple):
    """Some components of a mixture, and the points (S, D) at which they are wanted."""

    member: int
    mixture: MixtureLogDensity
    chosen: torch.Tensor  # (n,), their numbers
    z: torch.Tensor


def _tiled(stack: Sequence[_Operands], dtype: torch.dtype) -> torch.Tensor:
    """log₂ Σᵢ of the unnormalized densities of all components, (E, S)."""
    dims = max(one.z.shape[1] for one in stack)
    most = max(len(one.chosen) for one in stack)
    device = stack[0].z.device
    queries = torch.stack([_queries(_widened(one.z, dims), dtype) for one in stack])
    rows, columns = _tile_shape(queries.shape[1], device, len(stack))
    size = len(stack) * queries.shape[2] * queries.element_size()
    block = max(columns, _BLOCK_BYTES // size // columns * columns)
    packed = columns * (_CPU_PACKED if device.type == "cpu" else _GPU_PACKED)
    total = torch.full(queries.shape[:2], -math.inf, dtype=torch.float64, device=device)
    for start in range(0, most, block):
        end = min(start + block, most)
        tiles = [
            tile
            for first in range(start, end, packed)
            for tile in _keys(stack, slice(first, min(first + packed, end)), dtype, dims).split(
                columns, 2
            )
        ]
        each = functools.partial(_log2_sum, tiles=tiles)
        side_by_side = in_threads if device.type == "cpu" else map
        found = list(side_by_side(each, queries.split(rows, 1)))
        total = torch.logaddexp2(total, torch.cat(found, 1))
    return total


def _keys(stack: Sequence[_Operands], some: slice, dtype: torch.dtype, dims: int) -> torch.Tensor:
    """[−½σ⁻², μσ⁻², −½(μ²σ⁻² + log σ²)] log₂e in groups, and ones for the shift, (E, K, n).

    Where a mixture has no more components, such as add nothing.
    """
    count = some.stop - some.start
    chosen = [one.chosen[some] for one in stack]
    operands = [
        one.mixture.operands(own, dims, count) for one, own in zip(stack, chosen, strict=True)
    ]
    mean, logvar = (
        torch.stack(part) if len(part) > 1 else part[0][None]
        for part in zip(*operands, strict=True)
    )
    precision = _LOG2_E * torch.exp(-logvar)
    linear = mean * precision
    constant = -0.5 * (mean * linear + _LOG2_E * logvar)
    for row, own in zip(constant, chosen, strict=True):
        if len(own) < count:
            row[len(own) :, 0] = _NOTHING
    parts = []
    for start in range(0, dims, _GROUP[dtype]):
        group = slice(start, start + _GROUP[dtype])
        parts += [
            -0.5 * precision[..., group],
            linear[..., group],
            constant[..., group].sum(2, True),
        ]
    keys = torch.cat([*parts, torch.ones_like(parts[-1])], 2).to(dtype)
    # A CPU transposes a matrix fast, and a stack of one slowly.
    return keys[0].T.contiguous()[None] if len(stack) == 1 else keys.mT.contiguous()


def path_words(arithmetic: Mapping[str, int]) -> str:
    """Arithmetic in words, such as "tiled float32 (93 of 100 components) and tiled float64 (7 of
    100 components)", or without numbers where there is one.
    """
    total = sum(arithmetic.values())
    used = {name: count for name, count in arithmetic.items() if count}
    if len(used) == 1:
        return next(iter(used))
    return " and ".join(f"{name} ({count} of {total} components)" for name, count in used.items())


def chunk_rows(dims: int) -> int:
    """Rows of D numbers to convert to float64 at once: 1 MB, in cache."""
    return max(1, (1 << 17) // dims)


def sum_rows(codes: torch.Tensor) -> torch.Tensor:
    """Column sums in float64, in bounded memory."""
    parts = codes.split(chunk_rows(codes.shape[1]))
    sums = torch.empty(len(parts), codes.shape[1], dtype=torch.float64, device=codes.device)
    for place, part in zip(sums, parts, strict=True):
        torch.sum(part, 0, dtype=torch.float64, out=place)
    return sums.sum(0)


def _tile_shape(draws: int, device: torch.device, mixtures: int) -> tuple[int, int]:
    """Rows and columns of a tile: every thread gets the same number of equal chunks of rows."""
    on_cpu = device.type == "cpu"
    tile, most = (_CPU_TILE, _CPU_ROWS) if on_cpu else (_GPU_TILE, _GPU_ROWS)
    threads = torch.get_num_threads() if on_cpu else 1
    chunks = threads * math.ceil(draws / (threads * most))
    rows = math.ceil(draws / chunks)
    return rows, max(512, min(tile // (rows * mixtures), 1 << 16))


def rounds_products(device: torch.device) -> bool:
    """Whether float32 matrix products on the device round their operands (TF32, bfloat16).

    Asked of the device and not of the settings, of which torch has had several at odds: each
    product and sum of 64 times 1 + 2⁻¹² is exact in float32, and rounded to 1 in TF32.
    """
    if device.type == "cpu":
        return False
    operand = torch.full((128, 64), 1 + 2.0**-12, device=device)
    with torch.autocast(device.type, enabled=False):
        product = operand @ torch.ones(64, 512, device=device)
    return bool((product != 64 * (1 + 2.0**-12)).any())


def _widened(values: torch.Tensor, dims: int) -> torch.Tensor:
    """Values (S, D) followed by zeros, (S, dims)."""
    missing = dims - values.shape[1]
    return pad(values, (0, missing)) if missing else values


def _queries(z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[z², z, 1] in groups of dimensions, and a last column for minus the shift, (S, K)."""
    ones = torch.ones_like(z[:, :1])
    parts = []
    for group in z.split(_GROUP[dtype], 1):
        parts += [group.square(), group, ones]
    return torch.cat([*parts, torch.zeros_like(ones)], 1).to(dtype)


def _log2_sum(queries: torch.Tensor, tiles: Sequence[torch.Tensor]) -> torch.Tensor:
    """log₂ Σ 2^(queries · keys) over all tiles (E, K, n), at queries (E, S, K): float64, (E, S).

    The shift of a row is the maximum of its first tile. It is raised only where a later tile
    outgrows it, which the sum of that tile tells: a running maximum would cost a pass over each.
    """
    queries = queries.clone()
    dtype = queries.dtype
    stack, rows, _ = queries.shape
    buffer = queries.new_empty(stack * rows * max(tile.shape[2] for tile in tiles))
    shift: torch.Tensor | None = None
    for keys in tiles:
        logits = buffer[: stack * rows * keys.shape[2]].view(stack, rows, -1)
        torch.bmm(queries, keys, out=logits)
        if shift is None:
            shift = logits.amax(2)
            logits.sub_(shift[..., None])
            queries[..., -1] = -shift
            total = torch.zeros_like(shift, dtype=torch.float64)
        part = logits.clamp_min_(_SMALLEST[dtype]).exp2_().sum(2)
        outgrown = (part > _OUTGROWN).nonzero()
        for e in range(stack) if len(outgrown) else ():
            own = outgrown[outgrown[:, 0] == e, 1]
            logits = torch.mm(queries[e][own], keys[e])
            raised = shift[e][own] + logits.amax(1)
            rise = raised - shift[e][own]
            logits.sub_(rise[:, None])
            part[e][own] = logits.clamp_min_(_SMALLEST[dtype]).exp2_().sum(1)
            total[e][own] *= torch.exp2(-rise.double())
            shift[e][own] = raised
            queries[e][own, -1] = -raised
        total += part
    assert shift is not None
    return shift.double() + torch.log2(total)
