"""Anybody's codes: every accepted form, and one sentence for every form that is not."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from vaeq.errors import InputError
from vaeq.measurement import measure_file
from vaeq.posterior.codes import CodesWarning, as_codes, read_codes, warn_of

RNG = np.random.default_rng(0)
MEAN = RNG.normal(size=(6, 3)).astype(np.float32)
LOGVAR = -RNG.uniform(0.5, 3, size=(6, 3)).astype(np.float32)
TEST_MEAN, TEST_LOGVAR = MEAN[:2] + 1, LOGVAR[:2] - 1
LABELS = np.array([0, 1, 2, 0, 1, 2])
ALL = {
    "mean": MEAN,
    "logvar": LOGVAR,
    "test_mean": TEST_MEAN,
    "test_logvar": TEST_LOGVAR,
    "labels": LABELS,
}


def write(folder: Path, kind: str, arrays: dict[str, Any]) -> str:
    if kind == "npz":
        np.savez(folder / "codes.npz", **arrays)
        return str(folder / "codes.npz")
    if kind == "compressed npz":
        np.savez_compressed(folder / "codes.npz", **arrays)
        return str(folder / "codes.npz")
    if kind == "safetensors":
        save_file(arrays, folder / "codes.safetensors")
        return str(folder / "codes.safetensors")
    for name, value in arrays.items():
        np.save(folder / f"{name}.npy", value)
    return str(folder if kind == "folder" else folder / "mean.npy")


@pytest.mark.parametrize("kind", ["npz", "compressed npz", "safetensors", "folder", "mean.npy"])
def test_every_kind_of_file_gives_the_same_codes(tmp_path: Path, kind: str) -> None:
    codes = read_codes(write(tmp_path, kind, ALL))
    assert np.array_equal(codes.mean, MEAN)
    assert np.array_equal(codes.logvar, LOGVAR)
    assert codes.test_mean is not None
    assert np.array_equal(codes.test_mean, TEST_MEAN)
    assert codes.labels is not None
    assert codes.labels.tolist() == LABELS.tolist()
    assert codes.suspicions == ()


def test_a_pair_of_npy_files_may_be_listed(tmp_path: Path) -> None:
    np.save(tmp_path / "run3_mean.npy", MEAN)
    np.save(tmp_path / "run3_logvar.npy", LOGVAR)
    listed = f"{tmp_path}/run3_mean.npy,{tmp_path}/run3_logvar.npy"
    for source in (listed, str(tmp_path / "run3_mean.npy")):
        codes = read_codes(source)
        assert np.array_equal(codes.mean, MEAN)
        assert np.array_equal(codes.logvar, LOGVAR)
        assert codes.test_mean is None


def test_a_spread_may_be_logvar_std_or_var(tmp_path: Path) -> None:
    for name, value in (("std", np.exp(0.5 * LOGVAR)), ("var", np.exp(LOGVAR))):
        arrays = {"mean": MEAN, name: value, "test_mean": MEAN, f"test_{name}": value}
        codes = read_codes(write(tmp_path, "npz", arrays))
        np.testing.assert_allclose(codes.logvar, LOGVAR, rtol=1e-5)
        assert codes.test_logvar is not None
        np.testing.assert_allclose(codes.test_logvar, LOGVAR, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_floating_point_of_any_width(dtype: str) -> None:
    codes = as_codes(MEAN.astype(dtype), LOGVAR.astype(dtype))
    expected = torch.float64 if dtype == "float64" else torch.float32
    assert codes.mean.dtype == codes.logvar.dtype == expected
    np.testing.assert_allclose(codes.mean, MEAN, atol=2e-3)


def test_torch_tensors_with_gradients_and_odd_strides() -> None:
    codes = as_codes(torch.tensor(MEAN, requires_grad=True), torch.tensor(LOGVAR.T.copy()).T)
    assert not codes.mean.requires_grad
    assert np.array_equal(codes.logvar, LOGVAR)
    assert np.array_equal(as_codes(MEAN[::-1], LOGVAR[::-1]).mean, MEAN[::-1])


def test_one_image_and_one_dimension_are_enough() -> None:
    codes = as_codes(MEAN[:1, :1], LOGVAR[:1, :1])
    assert codes.mean.shape == (1, 1)
    assert codes.test_mean is None
    assert codes.labels is None


def changed(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in {**ALL, **changes}.items() if value is not None}


def with_nan() -> np.ndarray[Any, Any]:
    bad = MEAN.copy()
    bad[4, 1], bad[5, 2] = np.nan, np.inf
    return bad


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"other": MEAN}, "has no array named mean; found other"),
        (
            changed(mean=None),
            r"no array named mean; found logvar, test_mean, test_logvar, labels\.",
        ),
        (changed(logvar=None), "no array named logvar, std or var; found mean, test_mean"),
        (changed(test_logvar=None), "test_mean was given without test_logvar"),
        (changed(test_mean=None), "test_logvar was given without test_mean"),
        (changed(std=MEAN), "has logvar, std; keep one of them"),
        (changed(logvar=LOGVAR[:5]), r"the same shape, got \(6, 3\) and \(5, 3\)"),
        (changed(test_mean=MEAN[:, :2], test_logvar=LOGVAR[:, :2]), "as many dimensions as mean"),
        (changed(mean=MEAN[:0], logvar=LOGVAR[:0]), r"N >= 1 images, got shape \(0, 3\)"),
        (changed(mean=MEAN[:, :0]), r"D >= 1 latent dimensions, got shape \(6, 0\)"),
        (changed(mean=MEAN[0]), r"shape \(N, D\).*got shape \(3,\)"),
        (changed(mean=with_nan()), r"got 2 NaN or infinite of 18 values, the first at \[4, 1\]"),
        (changed(test_mean=with_nan()[3:5]), r"test_mean must be finite, got 1 .* at \[1, 1\]"),
        (changed(logvar=None, std=LOGVAR), r"std must be > 0, got .* at \[0, 0\]"),
        (changed(mean=MEAN.astype(int)), "mean must be floating point, got int64"),
        (changed(mean=MEAN.astype(str)), "mean must be floating point, got <U"),
        (changed(mean=MEAN.astype(complex)), "mean must be floating point, got complex128"),
        (changed(labels=LABELS[:5]), r"labels must have shape \(6,\).*got \(5,\)"),
        (changed(labels=MEAN[:, 0]), r"labels must be integers, got float32"),
        (changed(logvar=LOGVAR * 1000), r"logvar must be in \[-80, 80\], got -"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(
    tmp_path: Path, arrays: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        measure_file(write(tmp_path, "npz", arrays), tmp_path / "out.json")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.json").exists()


def test_a_variance_under_the_name_of_a_log_variance_is_suspected() -> None:
    codes = as_codes(MEAN, np.exp(LOGVAR))
    with pytest.warns(CodesWarning, match="logvar is positive everywhere.*name it var or std"):
        warn_of(codes)
    assert as_codes(MEAN, LOGVAR).suspicions == ()
    assert as_codes(MEAN, np.zeros_like(LOGVAR)).suspicions == ()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("an object was unpickled",))


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_objects_are_never_unpickled(tmp_path: Path, kind: str) -> None:
    bomb = np.empty((6, 3), dtype=object)
    bomb[:] = None
    bomb[0, 0] = Bomb()
    stream = io.BytesIO()
    np.lib.format.write_array(stream, bomb, allow_pickle=True)
    if kind == "npz":
        with zipfile.ZipFile(tmp_path / "codes.npz", "w") as archive:
            archive.writestr("mean.npy", stream.getvalue())
            archive.writestr("logvar.npy", stream.getvalue())
        source = tmp_path / "codes.npz"
    else:
        (tmp_path / "mean.npy").write_bytes(stream.getvalue())
        np.save(tmp_path / "logvar.npy", LOGVAR)
        source = tmp_path
    with pytest.raises(InputError, match="holds Python objects, which are not read"):
        read_codes(str(source))


def test_a_header_that_promises_more_than_the_file_is_refused_unread(tmp_path: Path) -> None:
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**10)}
    np.lib.format.write_array_header_1_0(stream, header)
    (tmp_path / "mean.npy").write_bytes(stream.getvalue() + b"\0" * 64)
    np.save(tmp_path / "logvar.npy", LOGVAR)
    with pytest.raises(InputError, match="cannot be read: it is truncated"):
        read_codes(str(tmp_path))


def test_files_that_are_not_there_or_of_no_known_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"codes=.*none\.npz does not exist; give a \.npz"):
        read_codes(str(tmp_path / "none.npz"))
    (tmp_path / "codes.pt").write_bytes(pickle.dumps({"mean": 1}))
    with pytest.raises(InputError, match=r"must be \.npz, \.safetensors or \.npy, got '\.pt'"):
        read_codes(str(tmp_path / "codes.pt"))


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["npz", "safetensors", "folder"]), data=st.data())
def test_damaged_files_give_the_clear_error_or_sound_codes(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("codes")
    source = write(folder, kind, ALL)
    file = folder / "mean.npy" if kind == "folder" else Path(source)
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        del content[data.draw(st.integers(0, len(content) - 1), label="at") :]
    for _ in range(data.draw(st.integers(0, 4), label="flips")):
        if content:
            place = data.draw(st.integers(0, len(content) - 1), label="place")
            content[place] ^= data.draw(st.integers(1, 255), label="bits")
    file.write_bytes(content)
    try:
        codes = read_codes(source)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert torch.isfinite(codes.mean).all()
