import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mathv2_jax.hf import tensors


def make():
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(5, 3)).astype(np.float32),
        "b": rng.normal(size=(4,)).astype(ml_dtypes.bfloat16),
        "c": rng.normal(size=(2, 3, 2)).astype(np.float16),
        "d": np.asarray(1.5, np.float32),
    }


def write(path, held):
    writer = tensors.Writer(str(path), {n: (x.dtype, x.shape) for n, x in held.items()})
    for name, x in reversed(held.items()):
        if not x.shape:
            writer.write_rows(name, x)
            continue
        for row in reversed(range(len(x))):
            writer.write_rows(name, x[row : row + 1], row)
    writer.close()


def test_what_is_written_by_rows_is_what_the_formats_library_reads(tmp_path):
    held = make()
    write(tmp_path / "x.safetensors", held)
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert {n: (x.dtype, x.shape, x.tobytes()) for n, x in found.items()} == {
        n: (x.dtype, x.shape, x.tobytes()) for n, x in held.items()
    }


def test_rows_of_what_the_library_writes_are_read(tmp_path):
    held = make()
    safetensors.numpy.save_file(held, tmp_path / "x.safetensors")
    found = tensors.read_header(str(tmp_path / "x.safetensors"))
    assert set(found) == set(held)
    for name, x in held.items():
        assert found[name].shape == x.shape
        assert found[name].read_rows(slice(None)).tobytes() == x.tobytes()
    np.testing.assert_array_equal(found["a"].read_rows(slice(1, 4)), held["a"][1:4])
    np.testing.assert_array_equal(found["c"].read_rows(slice(1, 2)), held["c"][1:2])


def test_a_file_is_never_written_over(tmp_path):
    write(tmp_path / "x.safetensors", make())
    with pytest.raises(FileExistsError):
        write(tmp_path / "x.safetensors", make())


ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}}).encode(),
        json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode(),
        json.dumps({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}).encode(),
        json.dumps({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}).encode(),
        json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}).encode(),
        json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}).encode(),
        json.dumps({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}).encode(),
        b"[" * 200_000,
        json.dumps({"a": {"dtype": "F32", "shape": [2]}}).encode(),
        json.dumps({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}).encode(),
    ],
)
def test_a_damaged_header_is_an_error_that_names_the_file(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        tensors.find(str(tmp_path))


@pytest.mark.parametrize("data", [b"", b"abc", struct.pack("<Q", 10**15) + b"{}", b"PK" * 40])
def test_what_is_no_safetensors_file_is_an_error(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="no safetensors file"):
        tensors.find(str(tmp_path))


def test_a_file_that_is_cut_after_its_header_was_read_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    write(path, make())
    found = tensors.find(str(tmp_path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cut short"):
        found["c"].read_rows(slice(None))
    with pytest.raises(ValueError, match=r"cut short.*copy or download it again"):
        tensors.find(str(tmp_path))


BETWEEN = {
    "a and b overlap": ({"a": [0, 8], "b": [4, 12]}, 12, "b begins at 4, but a ends at 8"),
    "nothing between": ({"a": [0, 8], "b": [12, 20]}, 20, "b begins at 12, but a ends at 8"),
    "nothing before": ({"a": [4, 12]}, 12, "a begins at 4, but the header ends at 0"),
    "more after": ({"a": [0, 8]}, 12, "a ends at 8 of 12 bytes"),
}


@pytest.mark.parametrize(("places", "size", "said"), BETWEEN.values(), ids=BETWEEN)
def test_each_byte_is_of_one_tensor(tmp_path, places, size, said):
    header = {n: {"dtype": "F32", "shape": [2], "data_offsets": at} for n, at in places.items()}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(ValueError, match=said):
        tensors.find(str(tmp_path))


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"model\.safetensors is no file"):
        tensors.find(str(tmp_path))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_none_is_seen(dtype, broken):
    x = np.zeros((3, 70_000), dtype)
    x[0, 0] = ml_dtypes.finfo(dtype).max
    assert tensors.is_finite(x) and tensors.is_finite(x.T) and tensors.is_finite(x[:0])
    x[2, 69_999] = broken
    assert not tensors.is_finite(x) and not tensors.is_finite(x.T)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth"])
def test_pickles_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=name):
        tensors.find(str(tmp_path))


def test_a_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        tensors.find(str(tmp_path))


def indexed(at, places, **files):
    for name, held in files.items():
        safetensors.numpy.save_file(held, at / f"{name}.safetensors")
    (at / tensors.INDEX).write_text(json.dumps({"weight_map": places}))


def test_the_tensors_of_an_index_are_found_in_their_files(tmp_path):
    held = make()
    first, second = {"a": held["a"]}, {n: held[n] for n in ("b", "c", "d")}
    places = {n: "x.safetensors" if n == "a" else "y.safetensors" for n in held}
    indexed(tmp_path, places, x=first, y=second)
    found = tensors.find(str(tmp_path))
    assert {n: t.read_rows(slice(None)).tobytes() for n, t in found.items()} == {
        n: x.tobytes() for n, x in held.items()
    }


def test_everything_that_index_and_files_differ_in_is_one_error(tmp_path):
    one = {"a": np.zeros(2, np.float32)}
    places = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}
    indexed(tmp_path, places, x=one, y=one)
    with pytest.raises(ValueError) as error:
        tensors.find(str(tmp_path))
    faults = ("a is in y.safetensors and in another", "b is not in x", "c is not in y")
    assert all(fault in str(error.value) for fault in faults)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin", 3, None]
)
def test_an_index_names_safetensors_beside_it_only(tmp_path, name):
    indexed(tmp_path, {"a": name})
    with pytest.raises(ValueError, match="lie beside it"):
        tensors.find(str(tmp_path))


def test_a_single_file_beside_an_index_is_one_of_its_files_or_an_error(tmp_path):
    one, other = ({"a": np.full(2, x, np.float32)} for x in (1.0, 2.0))
    indexed(tmp_path, {"a": tensors.SINGLE}, model=one)
    assert tensors.find(str(tmp_path))["a"].read_rows(slice(None))[0] == 1.0
    indexed(tmp_path, {"a": "x.safetensors"}, x=other)
    with pytest.raises(ValueError, match=r"model\.safetensors that is not in it"):
        tensors.find(str(tmp_path))


def test_files_that_are_absent_are_listed(tmp_path):
    indexed(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors, y\.safetensors"):
        tensors.find(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_an_error(tmp_path, text):
    (tmp_path / tensors.INDEX).write_text(text)
    with pytest.raises(ValueError, match="no index"):
        tensors.find(str(tmp_path))
