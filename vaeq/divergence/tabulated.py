"""Mixtures of Gaussians in one dimension, tabulated for deterministic quadrature.

The density is held at Gauss-Legendre nodes on dyadic panels. A component is summed at the nodes of
panels between 2 and 4 of its own σ wide, where a polynomial of degree 23 holds it to 1e-11 of its
peak; where narrower components lie, that polynomial carries it to the finer panels.

The components of a panel and an octave of σ are summed together, by a fast Gauss transform. With u
the place of μ in the panel and v that of log σ in the octave, both from −1 to 1, a component adds
Σ_ab T_a(u) T_b(v) K_ab(x) at a node x, to 1e-14 of its peak: Chebyshev polynomials in both, and K
the same for every panel of every size. The sum over components of T_a(u) T_b(v) is a matrix
product, some 1,000 multiplications a component and no exponential. Only where a panel has few
components is each exponentiated by itself.

References:
    Greengard & Strain (1991), The fast Gauss transform: here in μ and σ, and by Chebyshev
    interpolation.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.polynomial import chebyshev, legendre
from numpy.typing import NDArray

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

# Half-width, in σ, beyond which a component is left out: 1e-16 of its mass.
_REACH = 8.3
# As many panels of its own size to either side can a component reach, at σ of half a panel.
_NEIGHBOURS = 5
# Chebyshev polynomials in μ, over a panel, and in log σ, over an octave: 1e-14 of a peak.
_DEGREES = 26, 20
# Components of one panel from which on they are summed together.
_CROWD = 48
# Rows worked on at once, components or panels: some megabytes.
_BLOCK = 4096
_PANELS_TOGETHER = 256
_LOG_2PI = math.log(2 * math.pi)

NODES, WEIGHTS = legendre.leggauss(24)
_POWERS = np.stack([NODES**2, NODES, np.ones_like(NODES)])  # (3, 24)


def to_coefficients() -> Array:
    """Values at the nodes -> Legendre coefficients, (24, 24)."""
    degree = np.arange(len(NODES))[:, None]
    basis = legendre.legvander(NODES, len(NODES) - 1)
    coefficients: Array = (degree + 0.5) * basis.T * WEIGHTS
    return coefficients


def _interpolation(points: Array) -> Array:
    """Values at the nodes -> values at points of [-1, 1], (len(points), 24)."""
    matrix: Array = legendre.legvander(points, len(NODES) - 1) @ to_coefficients()
    return matrix


_HALVES = np.stack([_interpolation(0.5 * (NODES - 1)), _interpolation(0.5 * (NODES + 1))])


@dataclass
class Panels:
    """Disjoint intervals, from left to right, with the density at the nodes of each."""

    left: Array  # (P,)
    width: Array  # (P,)
    density: Array  # (P, 24)

    def nodes(self) -> Array:
        """Node positions, (P, 24)."""
        centre = self.left + 0.5 * self.width
        points: Array = centre[:, None] + 0.5 * self.width[:, None] * NODES
        return points

    def halved(self) -> Panels:
        """Both halves of every panel, left before right."""
        half = np.repeat(0.5 * self.width, 2)
        left = np.repeat(self.left, 2)
        left[1::2] += half[1::2]
        density = np.empty((len(left), len(NODES)))
        density[0::2] = self.density @ _HALVES[0].T
        density[1::2] = self.density @ _HALVES[1].T
        return Panels(left, half, density)

    def take(self, rows: NDArray[np.bool_] | slice) -> Panels:
        return Panels(self.left[rows], self.width[rows], self.density[rows])

    def blocks(self) -> Iterator[Panels]:
        for start in range(0, len(self.left), _BLOCK):
            yield self.take(slice(start, start + _BLOCK))

    @classmethod
    def joined(cls, parts: list[Panels]) -> Panels:
        left = np.concatenate([part.left for part in parts])
        width = np.concatenate([part.width for part in parts])
        density = np.concatenate([part.density for part in parts])
        order = np.argsort(left)
        return cls(left[order], width[order], density[order])


@dataclass
class _Components:
    """Some components of one octave of σ, in the order of the panels that hold their μ.

    The unit of length is a panel of twice to four times their σ, which starts at a whole number.
    """

    panel: Integers  # (n,), ascending
    place: Array  # (n,), of μ in its panel, from 0 to 1
    std: Array  # (n,), from 1/4 to 1/2
    first: Integers  # (n,), panel that it reaches to the left
    last: Integers  # (n,), and to the right

    @functools.cached_property
    def opens(self) -> Integers:
        """The first component of every panel that holds any, (P,)."""
        return _opens(self.panel)

    def take(self, rows: NDArray[np.bool_] | slice) -> _Components:
        return _Components(
            self.panel[rows], self.place[rows], self.std[rows], self.first[rows], self.last[rows]
        )

    def reached(self) -> Integers:
        """Every panel that some component reaches, ascending."""
        first = np.minimum.reduceat(self.first, self.opens)
        last = np.maximum.reduceat(self.last, self.opens)
        order = np.argsort(first)
        return _union(first[order], last[order])

    def add_to(self, density: Array, panels: Integers) -> None:
        """Add exp(−½(x−μ)²/σ²)/σ, x and σ in panels, at the nodes of all panels in reach."""
        counts = np.diff(self.opens, append=len(self.panel))
        crowded = np.repeat(counts >= _CROWD, counts)
        if crowded.any():
            self.take(crowded)._add_together(density, panels)
        if not crowded.all():
            self.take(~crowded)._add_one_by_one(density, panels)

    def _add_together(self, density: Array, panels: Integers) -> None:
        own = self.panel[self.opens]
        reach_left = np.minimum.reduceat(self.first, self.opens) - own
        reach_right = np.maximum.reduceat(self.last, self.opens) - own
        u, v = 2 * self.place - 1, 2 * np.log2(self.std) + 3
        ends = [*self.opens.tolist(), len(self.panel)]
        for start in range(0, len(own), _PANELS_TOGETHER):
            some = slice(start, start + _PANELS_TOGETHER)
            moments = _moments(u, v, ends[start : start + _PANELS_TOGETHER + 1])
            added = (moments @ _kernel()).view(len(moments), -1, len(NODES)).numpy()
            for i in range(2 * _NEIGHBOURS + 1):
                offset = i - _NEIGHBOURS
                inside = (reach_left[some] <= offset) & (offset <= reach_right[some])
                density[np.searchsorted(panels, own[some][inside] + offset)] += added[inside, i]

    def _add_one_by_one(self, density: Array, panels: Integers) -> None:
        for offset in range(-_NEIGHBOURS, _NEIGHBOURS + 1):
            target = self.panel + offset
            inside = (self.first <= target) & (target <= self.last)
            reaching = self.take(inside)
            row = np.searchsorted(panels, target[inside])
            for start in range(0, len(row), _BLOCK):
                part = slice(start, start + _BLOCK)
                std = reaching.std[part]
                distance = (offset + 0.5 - reaching.place[part]) / std
                half = 0.5 / std
                exponent = np.stack(
                    [-0.5 * half**2, -distance * half, -0.5 * distance**2 - np.log(std)], 1
                )
                values = exponent @ _POWERS
                np.exp(values, out=values)
                own = row[part]
                opens = _opens(own)
                density[own[opens]] += np.add.reduceat(values, opens, axis=0)


def _opens(values: Integers) -> Integers:
    """Where each number begins among ascending ones."""
    return np.flatnonzero(np.diff(values, prepend=values[0] - 1))


def _union(first: Integers, last: Integers) -> Integers:
    """Sorted union of the integer ranges first..last, the firsts ascending."""
    reach = np.maximum.accumulate(last)
    opens = np.flatnonzero(np.concatenate([[True], first[1:] > reach[:-1] + 1]))
    start = first[opens]
    length = reach[np.append(opens[1:], len(first)) - 1] - start + 1
    offset = np.repeat(np.cumsum(length) - length, length)
    union: Integers = np.repeat(start, length) + np.arange(length.sum()) - offset
    return union


def _chebyshev(x: Array, out: Array) -> Array:
    """T_0, T_1, ... at points of [−1, 1], in the first columns of ``out``, a row each.

    By T_{m+k} = 2 T_m T_k − T_{m−k}, twice as many at each turn: few calls on large arrays, which
    threads can make side by side.
    """
    rows = out[:, : len(x)]
    rows[0] = 1
    rows[1] = x
    done = 1
    while done < len(rows) - 1:
        more = min(done, len(rows) - 1 - done)
        found = rows[done + 1 : done + 1 + more]
        np.multiply(2 * rows[done], rows[1 : 1 + more], out=found)
        found -= rows[done - more : done][::-1]
        done += more
    return rows


def _moments(u: Array, v: Array, ends: Sequence[int]) -> torch.Tensor:
    """Σ T_a(u) T_b(v) over ends[k] up to ends[k + 1], for every k, (len(ends) − 1, 26 · 20)."""
    moments = torch.zeros(len(ends) - 1, *_DEGREES, dtype=torch.float64)
    width = min(ends[-1] - ends[0], _BLOCK)
    in_mean, in_std = (np.empty((count, width)) for count in _DEGREES)
    for begin in range(ends[0], ends[-1], _BLOCK):
        end = min(begin + _BLOCK, ends[-1])
        left = torch.from_numpy(_chebyshev(u[begin:end], in_mean))
        right = torch.from_numpy(_chebyshev(v[begin:end], in_std)).T
        for k in range(bisect_right(ends, begin) - 1, bisect_left(ends, end)):
            part = slice(max(ends[k], begin) - begin, min(ends[k + 1], end) - begin)
            moments[k].addmm_(left[:, part], right[part])
    return moments.flatten(1)


@functools.cache
def _kernel() -> torch.Tensor:
    """K: moments of the components of a panel -> what they add to its neighbours' nodes.

    Interpolation at the Chebyshev points of u and v of exp(−½(x − μ)²/σ²)/σ, the panel from 0 to 1.
    Shape (26 · 20, 11 · 24).
    """
    angles = [np.pi * (np.arange(count) + 0.5) / count for count in _DEGREES]
    u, v = np.cos(angles[0]), np.cos(angles[1])
    panels = np.arange(-_NEIGHBOURS, _NEIGHBOURS + 1)
    x = (panels[:, None] + 0.5 + 0.5 * NODES).ravel()
    std = np.exp2(0.5 * (v - 3))
    distance = (x - 0.5 * (u[:, None, None] + 1)) / std[:, None]
    values = np.exp(-0.5 * distance**2) / std[:, None]  # (26, 20, 264)
    in_mean, in_std = (
        np.where(np.arange(count)[:, None] == 0, 1, 2) / count
        * chebyshev.chebvander(points, count - 1).T
        for count, points in zip(_DEGREES, (u, v), strict=True)
    )  # fmt: skip
    kernel = np.einsum("ai,bj,ijx->abx", in_mean, in_std, values, optimize=True)
    return torch.from_numpy(kernel.reshape(-1, len(x)))


def tabulate(mean: Array, std: Array) -> Panels:
    """The density of 1/N Σᵢ N(μᵢ, σᵢ²) on panels that resolve every component that reaches them.

    Args:
        mean, std: (N,), with |μ|/σ up to 1e12.
    """
    level = np.frexp(4 * std)[1].astype(np.int64) - 1  # 2σ < 2^level <= 4σ
    mean, std = np.ldexp(mean, -level), np.ldexp(std, -level)
    panel = np.floor(mean).astype(np.int64)
    low, high = int(level.min()), int(level.max())
    # By level, and by panel in each: one number to sort by.
    order = np.argsort((level - low) * (np.ptp(panel) + 1) + (panel - panel.min()))
    mean, std, panel = mean[order], std[order], panel[order]
    first = np.floor(mean - _REACH * std).astype(np.int64)
    last = np.floor(mean + _REACH * std).astype(np.int64)
    components = _Components(panel, mean - panel, std, first, last)
    bounds = np.searchsorted(level[order], np.arange(low, high + 2))

    own = {
        low + i: components.take(slice(*bounds[i : i + 2]))
        for i in range(len(bounds) - 1)
        if bounds[i] < bounds[i + 1]
    }
    parents: Integers = np.empty(0, dtype=np.int64)  # panels of this level that must be halved
    split = {}
    for k in range(low, high + 1):
        split[k] = parents
        needed = parents
        if k in own:
            needed = np.union1d(needed, own[k].reached())
        parents = np.unique(needed >> 1)
    panels = needed
    density = np.zeros((len(panels), len(NODES)))
    leaves = []
    for k in range(high, low - 1, -1):
        width = math.ldexp(1.0, k)
        if k in own:
            in_panels = np.zeros_like(density)
            own[k].add_to(in_panels, panels)
            density += in_panels / width
        halve = np.isin(panels, split[k], assume_unique=True)
        left = np.asarray(panels * width, dtype=np.float64)
        table = Panels(left, np.full_like(left, width), density)
        leaves.append(table.take(~halve))
        if halve.any():
            density = table.take(halve).halved().density
            panels = np.repeat(panels[halve] * 2, 2)
            panels[1::2] += 1
    result = Panels.joined(leaves)
    result.density *= math.exp(-0.5 * _LOG_2PI) / len(mean)
    return result


def mixed(parts: list[Panels], shares: list[float]) -> Panels:
    """The density of a mixture of mixtures: Σ share · density, on panels as fine as any of theirs.

    Panels are dyadic, so of two that overlap one is a part of the other: the larger is halved until
    all are alike.
    """
    if len(parts) == 1:
        return parts[0]
    for part, share in zip(parts, shares, strict=True):
        part.density *= share
    left, width, density = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("left", "width", "density")
    )
    everything = Panels(left, width, density)
    done = []
    while len(everything.left):
        size = everything.width.max()
        own = everything.width == size
        current, everything = everything.take(own), everything.take(~own)
        place = np.round(current.left / size).astype(np.int64)
        # Narrower panels that lie inside one of these.
        inside = np.unique(np.floor(everything.left / size).astype(np.int64))
        halve = np.isin(place, inside)
        whole, place = current.take(~halve), place[~halve]
        if len(place):
            order = np.argsort(place, kind="stable")
            opens = _opens(place[order])
            summed = np.add.reduceat(whole.density[order], opens, axis=0)
            one = order[opens]
            done.append(Panels(whole.left[one], whole.width[one], summed))
        if halve.any():
            everything = Panels.joined([everything, current.take(halve).halved()])
    return Panels.joined(done)
