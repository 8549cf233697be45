"""The format of adapter files, and how a file takes the place of another."""

import json
import os
import stat
import threading
import time

import numpy as np
import pytest
import safetensors.numpy
from helpers import run_python

from keras_fvae.model import files

pytestmark = pytest.mark.one_backend
RECORD = {"name": "model", "layers": ["query", "größe"], "rank": 4}
ARRAYS = {
    "b": np.arange(6, dtype="float32").reshape(2, 3).T,
    "scalar": np.array(3.25, "float32"),
    "empty": np.zeros((0, 3), "float32"),
    "precise": np.array([0.1]),
    "counts": np.array([1, 2], "int64"),
    "flags": np.array([True, False]),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "task.safetensors"
    files.write(path, RECORD, ARRAYS)
    return path


def parse(content):
    return files.parse(content, "some.safetensors")


def assert_same(parsed):
    record, arrays = parsed
    assert record == RECORD
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def test_what_is_written_is_read(path):
    assert_same(parse(path.read_bytes()))
    # Any reader of the format can read the arrays.
    arrays = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(arrays["b"], ARRAYS["b"])


def refused(content):
    with pytest.raises(ValueError, match="some.safetensors"):
        parse(content)


def test_every_cut_is_refused(path):
    content = path.read_bytes()
    for size in range(len(content)):
        refused(content[:size])


@pytest.mark.parametrize(
    "number", [300, pytest.param(3000, marks=pytest.mark.slow)]
)
def test_every_flipped_bit_is_refused(number, path, rng):
    content = path.read_bytes()
    for offset in rng.integers(0, len(content), number):
        damaged = bytearray(content)
        damaged[offset] ^= 1 << int(rng.integers(8))
        refused(bytes(damaged))


def with_header(content, change):
    """A file whose header was changed, and nothing else."""
    size = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + size].decode())
    header = header.encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def in_json(change):
    def changed(header):
        entries = json.loads(header)
        change(entries)
        return json.dumps(entries)

    return changed


HEADERS = [
    lambda header: "[" * 100_000,
    lambda header: "[]",
    lambda header: header.replace('"scalar"', '"b"'),
    lambda header: header.replace("[3,2]", "[1000000000,2]"),
    lambda header: header.replace("[3,2]", "[6]"),
    lambda header: header.replace("[3,2]", "[NaN,2]"),
    lambda header: header.replace('"F32"', '"F8_E5M2"'),
    lambda header: header.replace('"F32"', '"BF16"', 1),
    lambda header: header.replace('"F64"', '"I64"'),
    in_json(lambda header: header.pop("b")),
    in_json(lambda header: header.pop("__metadata__")),
    in_json(lambda header: header.update(__metadata__=[])),
    in_json(lambda header: header.update(b=None)),
    in_json(lambda header: header["__metadata__"].pop("format")),
    in_json(lambda header: header["__metadata__"].pop("sha256")),
    in_json(lambda header: header["__metadata__"].update(record={})),
    in_json(lambda header: header["__metadata__"].update(record="{}")),
    in_json(
        lambda header: header["b"].update(
            data_offsets=header["precise"]["data_offsets"]
        )
    ),
]


@pytest.mark.parametrize("change", HEADERS)
def test_hostile_headers_are_refused_at_once(change, path):
    content = with_header(path.read_bytes(), change)
    assert content != path.read_bytes()
    begin = time.perf_counter()
    refused(content)
    assert time.perf_counter() - begin < 1


def test_a_record_that_is_no_json_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "task.safetensors"
    for record in ("[" * 100_000, '{"a": 1, "a": 2}', '{"a": NaN}', "no"):
        monkeypatch.setattr(files.json, "dumps", lambda r, text=record: text)
        files.write(path, RECORD, {})
        monkeypatch.undo()
        content = path.read_bytes()
        # The checksum is of what is there.
        monkeypatch.setattr(
            files, "_checksum", lambda *_, c=content: checksum_in(c)
        )
        with pytest.raises(ValueError, match="the record is no JSON"):
            parse(content)
        monkeypatch.undo()


def checksum_in(content):
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size])["__metadata__"]["sha256"]


def test_other_files_are_named(path):
    content = path.read_bytes()
    newer = with_header(
        content,
        in_json(lambda header: header["__metadata__"].update(version="2")),
    )
    with pytest.raises(ValueError, match="saved in format '2'"):
        parse(newer)
    foreign = safetensors.numpy.save({"x": np.zeros(3)}, {"format": "pt"})
    with pytest.raises(ValueError, match="none that `save_adapter`"):
        parse(foreign)
    for content in (b"", b"no file of ours", b"\x89HDF\r\n\x1a\n" + bytes(99)):
        with pytest.raises(ValueError, match="damaged, cut short"):
            parse(content)


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("task.h5", ValueError, "Call it 'task.safetensors'"),
        ("a/task.fvae_lora.h5", ValueError, "Call it 'a/task.safetensors'"),
        ("task", ValueError, "Call it 'task.safetensors'"),
        ("gs://bucket/task.safetensors", ValueError, "local file system"),
        (b"task.safetensors", TypeError, "must be a string or path"),
        (3, TypeError, "must be a string or path"),
    ],
)
def test_paths_that_are_none(name, error, message):
    with pytest.raises(error, match=message):
        files.check_filepath(name)


def test_a_file_is_written_as_open_would(tmp_path):
    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    plain, ours = tmp_path / "plain", tmp_path / "ours.safetensors"
    previous = os.umask(0o027)
    try:
        plain.write_bytes(b"")
        files.write(ours, RECORD, ARRAYS)
        assert mode(ours) == mode(plain)
        ours.chmod(0o604)
        files.write(ours, RECORD, ARRAYS)
        assert mode(ours) == 0o604
    finally:
        os.umask(previous)
    link = tmp_path / "link.safetensors"
    link.symlink_to("ours.safetensors")
    ours.write_bytes(b"")
    files.write(link, RECORD, ARRAYS)
    assert link.is_symlink()
    assert_same(parse(ours.read_bytes()))
    dangling = tmp_path / "dangling.safetensors"
    dangling.symlink_to("new.safetensors")
    files.write(dangling, RECORD, ARRAYS)
    assert_same(parse((tmp_path / "new.safetensors").read_bytes()))


def test_a_name_may_be_as_long_as_names_are(tmp_path):
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    suffix = ".safetensors"
    path = tmp_path / ("x" * (longest - len(suffix)) + suffix)
    files.write(path, RECORD, ARRAYS)
    assert_same(parse(path.read_bytes()))


def test_paths_that_cannot_be_written_say_so(tmp_path):
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    missing = tmp_path / "missing" / "task.safetensors"
    for path, error in (
        (folder, IsADirectoryError),
        (pipe, OSError),
        (missing, FileNotFoundError),
        (tmp_path / ("x" * 300 + ".safetensors"), OSError),
    ):
        with pytest.raises(error) as raised:
            files.write(path, RECORD, ARRAYS)
        assert str(path) in str(raised.value)
    assert {p.name for p in tmp_path.iterdir()} == {folder.name, pipe.name}
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_fails_leaves_the_old_file(path, monkeypatch):
    content = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space.*task.safetensors"):
        files.write(path, RECORD, {})
    with (
        pytest.raises(KeyboardInterrupt),
        files.replaced_when_complete(path) as file,
    ):
        file.write(b"half")
        raise KeyboardInterrupt
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == content


LIMITED = """
import resource, sys
import numpy as np
from keras_fvae.model import files
path = sys.argv[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
try:
    files.write(path, {}, {"x": np.zeros(1000)})
except OSError as error:
    print("OSError", path in str(error))
"""
KILLED = """
import os, sys
from keras_fvae.model import files
with files.replaced_when_complete(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    os._exit(9)
"""


def test_full_disks_and_kills_leave_the_old_file(path):
    content = path.read_bytes()
    output = run_python("-c", LIMITED, path).stdout
    assert output.split() == ["OSError", "True"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    killed = run_python("-c", KILLED, path, check=False)
    assert killed.returncode == 9, killed.stderr
    assert path.read_bytes() == content


def test_several_write_at_once(path):
    """Whoever reads meanwhile gets a whole file, of one of them."""
    stop = time.time() + 2
    arrays = {"x": np.ones((200, 100), "float32")}
    errors, numbers = [], set()

    def write(number):
        try:
            while time.time() < stop:
                files.write(path, {"number": number}, arrays)
        except Exception as error:
            errors.append(error)

    files.write(path, {"number": 0}, arrays)
    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    while time.time() < stop:
        record, _ = parse(path.read_bytes())
        numbers.add(record["number"])
    for thread in threads:
        thread.join()
    assert errors == []
    assert numbers <= {0, 1, 2} and len(numbers) > 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]
