"""Files are written whole or not at all, their hashes are those that caches and checkpoints were made with, and weights are found."""

import errno
import hashlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hypersd_pipeline import files
from hypersd_pipeline.errors import UserError, storage_fault
from hypersd_pipeline.io.records import RecordStore
from hypersd_pipeline.training.checkpoints import CheckpointStore

SRC = Path(__file__).parents[1] / "src"


class Killed(BaseException):
    """As an interrupt: no ``Exception``."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# --- writing -----------------------------------------------------------------------------------------------------------------------------


def test_text_and_tensors_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for text in ("one", "zwei: ä"):
        files.write_text(path, text)
        assert path.read_bytes() == text.encode() and names(path.parent) == ["a.txt"]
    tensors = {"x": torch.arange(6.0).view(2, 3).T, "y": torch.ones(1, dtype=torch.int64)}
    files.write_tensors(tmp_path / "t.safetensors", tensors, {"key": "k"})
    read = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert file.metadata() == {"key": "k"}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_tensors_are_readable_as_far_as_the_umask_allows(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        files.write_tensors(tmp_path / "t.safetensors", {"x": torch.ones(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "t.safetensors").stat().st_mode & 0o777 == mode


def test_the_same_tensors_give_the_same_bytes_whatever_the_order_of_their_metadata(tmp_path: Path) -> None:
    tensors, metadata = {"b": torch.ones(3, 5), "a": torch.zeros(2, dtype=torch.uint8)}, {f"k{i}": str(i) for i in range(20)}
    written = set()
    for order in (metadata, dict(reversed(metadata.items()))):
        for number in range(3):
            path = tmp_path / f"{number}.safetensors"
            files.write_tensors(path, tensors, order)
            written.add(path.read_bytes())
    assert len(written) == 1 and torch.equal(load_file(tmp_path / "0.safetensors")["b"], tensors["b"])


def test_the_hash_of_tensors_sees_names_and_values_in_any_order_and_dtype() -> None:
    tensors = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.tensor(3)}
    known = files.tensors_sha256(tensors)
    assert known == files.tensors_sha256(dict(reversed(tensors.items())))
    expected = hashlib.sha256(b"a" + b"\x80\x3f" * 2 + b"b" + (3).to_bytes(8, "little")).hexdigest()  # bfloat16's 1 is 0x3f80
    assert known == expected


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Killed])
def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(error), files.replacing_file(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Killed])
def test_a_failure_in_the_middle_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "folder"
    for content in ("older", "old"):
        with files.replacing_folder(path) as folder:
            assert not any(folder.iterdir())
            (folder / content).touch()
    with pytest.raises(error), files.replacing_folder(path) as folder:
        (folder / "half").touch()
        raise error
    assert names(path) == ["old"] and names(tmp_path) == ["folder"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space"), files.replacing_folder(path) as folder:
        (folder / "new").touch()
    assert names(path) == ["old"] and names(tmp_path) == ["folder"]


def test_a_killed_process_leaves_the_old_file_and_the_next_one_clears_up(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    code = (
        "import os, pathlib, sys\nfrom hypersd_pipeline import files\n"
        "with files.replacing_file(pathlib.Path(sys.argv[1])) as temporary:\n    temporary.write_text('half')\n    os._exit(9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], env={**os.environ, "PYTHONPATH": str(SRC)})
    assert killed.returncode == 9 and path.read_text() == "old" and len(names(tmp_path)) == 2
    (tmp_path / f".a.txt.{os.getppid()}.tmp").write_text("of a process that is still writing")
    (tmp_path / ".a.txt.note.tmp").write_text("of somebody else")
    files.write_text(path, "new")
    assert path.read_text() == "new" and names(tmp_path) == sorted([f".a.txt.{os.getppid()}.tmp", ".a.txt.note.tmp", "a.txt"])


@pytest.mark.parametrize("number", [dead_pid, os.getpid])
def test_a_folder_that_a_killed_process_had_moved_away_is_put_back(tmp_path: Path, number: Callable[[], int]) -> None:
    path, pid = tmp_path / "folder", number()
    for suffix in ("old", "tmp"):
        (tmp_path / f".folder.{pid}.{suffix}").mkdir()
        (tmp_path / f".folder.{pid}.{suffix}" / suffix).touch()
    with pytest.raises(Killed), files.replacing_folder(path):
        raise Killed
    assert names(tmp_path) == ["folder"] and names(path) == ["old"]


def test_a_record_and_a_checkpoint_that_fail_leave_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, checkpoints = RecordStore(tmp_path / "records"), CheckpointStore(tmp_path / "checkpoints")
    records.put("cell", "key", {"fd": 1})
    checkpoints.save(1, "key", {"x": torch.ones(1)})
    kept = names(tmp_path / "checkpoints" / "key")

    def fail(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(Killed):
        records.put("cell", "key", {"fd": 2})
    with pytest.raises(Killed):
        checkpoints.save(1, "key", {"x": torch.zeros(1)})
    found = checkpoints.load("key")
    assert records.get("cell", "key") == {"fd": 1} and found is not None and float(found[1]["x"]) == 1
    assert names(tmp_path / "records") == ["cell.json"] and names(tmp_path / "checkpoints" / "key") == kept


# --- what the operating system refuses ---------------------------------------------------------------------------------------------------

_WRITERS = {
    "text": lambda folder: files.write_text(folder / "out", "x" * 200_000),
    "tensors": lambda folder: files.write_tensors(folder / "out", {"x": torch.ones(50_000)}),
    "checkpoint": lambda folder: CheckpointStore(folder / "out").save(2, "key", {"x": torch.ones(50_000)}),
}


@pytest.mark.parametrize("writer", _WRITERS)
def test_no_space_is_one_sentence_and_what_was_there_stays(tmp_path: Path, writer: str) -> None:
    """A limit on the size of files: the same path through the libraries as a full disk."""
    CheckpointStore(tmp_path / "out" if writer == "checkpoint" else tmp_path / "other").save(1, "key", {"x": torch.ones(1)})
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"/out.*: no space is left for it; free some .* what was finished before is kept\.$"):
            _WRITERS[writer](tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


_ON_A_FULL_DISK = """
import subprocess, sys
from pathlib import Path
import torch
from hypersd_pipeline import files
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.training.checkpoints import CheckpointStore

folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
store = CheckpointStore(folder / "checkpoints")
store.save(1, "key", {"x": torch.ones(1000)})
files.write_tensors(folder / "lora.safetensors", {"x": torch.ones(1000)})
before = (folder / "lora.safetensors").read_bytes()
big = {"x": torch.ones(1_000_000)}
for write in (
    lambda: store.save(2, "key", big),
    lambda: files.write_tensors(folder / "lora.safetensors", big),
    lambda: files.write_text(folder / "results.md", "x" * 4_000_000),
):
    try:
        write()
    except UserError as error:
        print(error)
found = CheckpointStore(folder / "checkpoints").load("key")
assert found is not None and found[0] == 1 and found[1]["x"].sum() == 1000
assert (folder / "lora.safetensors").read_bytes() == before and not (folder / "results.md").exists()
"""


def test_a_full_disk_keeps_what_was_finished(tmp_path: Path) -> None:
    """A tmpfs of 1 MB, in a mount namespace of its own."""
    (tmp_path / "disk").mkdir()
    namespace = ["unshare", "--map-root-user", "--mount"]
    tried = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")]
    if shutil.which("unshare") is None or subprocess.run([*namespace, *tried], capture_output=True).returncode:
        pytest.skip("this system lets the user mount nothing")
    done = subprocess.run([*namespace, sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path / "disk")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("no space is left for it" in line for line in lines)
    assert [name in line for name, line in zip(("checkpoints", "lora.safetensors", "results.md"), lines, strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/data/.a.1.tmp"), "/data/a: its file system is read-only; choose"),
        (PermissionError(errno.EACCES, "Permission denied", "/etc/other"), "/etc/other: permission denied; give this user"),
        (OSError(errno.ENOSPC, "No space left on device"), "/data/a: no space is left for it; free some"),
        (RuntimeError("serializing: I/O error: Stale file handle (os error 116)"), "/data/a: the network file system has lost it"),
    ],
)
def test_what_the_system_refuses_names_the_file_that_the_user_knows(error: Exception, sentence: str) -> None:
    wrapped = RuntimeError("enforce fail at inline_container.cc")
    wrapped.__context__ = error  # as torch.save leaves it
    for case in (error, wrapped):
        found = storage_fault(case, Path("/data/a"))
        assert found is not None and found.startswith(sentence) and found.count("\n") == 0
    assert storage_fault(ValueError("os error")) is None and storage_fault(FileNotFoundError(errno.ENOENT, "x", "y")) is None


# --- hashes ------------------------------------------------------------------------------------------------------------------------------


def test_hashes_of_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    abc, empty = hashlib.sha256(b"abc").hexdigest(), hashlib.sha256(b"").hexdigest()
    assert files.file_sha256(tmp_path / "a") == abc == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.content_hashes([tmp_path / "b", tmp_path / "a"]) == [empty, abc]
    for expected in (None, abc, abc[:8]):
        files.check_sha256(tmp_path / "a", expected)
    with pytest.raises(UserError, match=rf"^.*a: its sha256 is {abc}, not 00000000; fetch the file again, or correct sha256\.$"):
        files.check_sha256(tmp_path / "a", "00000000")
    with pytest.raises(UserError, match=rf"^w: .*a has sha256 {abc}, not 00000000; fetch the file again or correct w\.sha256\.$"):
        files.check_sha256(tmp_path / "a", "00000000", "w")


def test_keys_of_old_checkpoints_and_caches_stay_valid() -> None:
    assert files.fingerprint("vae", {"b": 1.5, "a": [1, None, True]}, "ä", Path("data/x")) == "9a8c9bd9faf69175"
    assert files.fingerprint({"a": 1, "b": 2}) == files.fingerprint({"b": 2, "a": 1}) != files.fingerprint({"a": 1}, {"b": 2})
    assert files.sha256_of({"b": [1, 2.5], "a": "ä"}) == "cd19b2bc68911723c88b42c7cbfe69cf3cf76373500454d6867f49eeae97d3dc"


# --- finding weights ---------------------------------------------------------------------------------------------------------------------


def test_local_weights_are_found_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(
        UserError, match=r"^w: .*model\.safetensors does not exist; put the file there, or name its place in w\.path or w\.repo\.$"
    ):
        files.find_weights("w", path)
    path.write_bytes(b"abc")
    right = files.file_sha256(path)
    assert files.find_weights("w", path, sha256=right, repo="local/goes-first", file="x") == path
    with pytest.raises(UserError, match=rf"^w: .* has sha256 {right}, not 0{{64}}; fetch the file again or correct w\.sha256\.$"):
        files.find_weights("w", path, sha256="0" * 64)
    with pytest.raises(UserError, match=r"w: .*config\.json does not exist"):
        files.find_weights("w", path, beside=("config.json",))
    (tmp_path / "config.json").touch()
    assert files.find_weights("w", path, beside=("config.json",)) == path


def test_weights_of_the_hub_come_with_what_lies_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, file: str, revision: str | None) -> str:
        asked.append((repo, file, revision))
        (tmp_path / file).write_bytes(file.encode())
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = files.find_weights("w", repo="a/b", file="m.pt", revision="r", beside=("config.json",))
    assert found == tmp_path / "m.pt" and asked == [("a/b", "config.json", "r"), ("a/b", "m.pt", "r")]
    with pytest.raises(UserError, match=r"w: .*m\.pt has sha256 "):
        files.find_weights("w", repo="a/b", file="m.pt", sha256="0" * 64)


def test_what_cannot_be_fetched_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cure = "check the spelling, the network and HF_TOKEN, or give"
    with pytest.raises(UserError, match=rf"^w: m\.pt of a/b could not be fetched from the hub \(\w+\); {cure} a local file in w\.path\.$"):
        files.find_weights("w", repo="a/b", file="m.pt")
    told = rf"^w: a/b is no local folder and could not be fetched from the hub \(\w+\); {cure} a local folder\.$"
    with pytest.raises(UserError, match=told):
        files.hub_folder("a/b", ["*.json"], None, "w")


def test_the_file_of_an_address_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    address = "https://example.org/solo.pth"
    told = r"^weights: https://example\.org/solo\.pth could not be fetched \(no route\); check it and sha256, or give a local file\.$"
    with pytest.raises(UserError, match=told):
        files.address_file(address, "12345678", "weights")
    (tmp_path / "checkpoints" / "solo.pth").touch()
    assert files.address_file(address, "12345678", "weights") == tmp_path / "checkpoints" / "solo.pth"
