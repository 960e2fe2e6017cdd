"""Names that leave their folder, in every way there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_nanotron.checkpoint.files.inside import inside

# The ways in which a name can leave its folder, or be no name.
ESCAPES = [
    "../x",
    "a/../../x",
    "a/..",
    "..",
    "/etc/x",
    "//etc/x",
    "C:/x",
    "C:x",
    "..\\x",
    "\\\\host\\x",
    "",
    ".",
    "./x",
    "a//x",
    "a/",
    "a\0x",
    "a\nx",
    "\ud800",
    "x" * 256,
    None,
    3,
    ["x"],
]


@pytest.mark.parametrize("name", ESCAPES, ids=repr)
def test_a_name_that_leaves_its_folder_is_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(ValueError, match="the index names .*only files inside"):
        inside(tmp_path, name, "the index")


def test_a_name_of_megabytes(tmp_path: Path) -> None:
    """Is not looked at character by character, nor printed whole."""
    for name in ("../" * 10_000_000, "x/" * 1000, "\n" * 1000):
        with pytest.raises(ValueError, match="the index names .*only files inside") as error:
            inside(tmp_path, name, "the index")
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["x", "a/x", "..x", "a/x..y", "model-00001-of-00002.safetensors", "ä.json", "a b"])
def test_a_good_name_is_a_path(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name, "the index") == tmp_path / name


def test_links(tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir(), other.mkdir()
    (other / "x").write_text("")
    (home / "file").symlink_to(other / "x")
    (home / "folder").symlink_to(other)
    (home / "to_be").symlink_to(other / "not yet")
    (home / "loop").symlink_to(home / "loop")
    for name in ("file", "folder/x", "to_be"):
        with pytest.raises(ValueError, match="symbolic link out of"):
            inside(home, name, "the index")
    (home / "own").write_text("")
    (home / "within").symlink_to("own")
    assert inside(home, "within", "the index") == home / "within"
    (tmp_path / "link").symlink_to(home)  # the user's own way to the folder
    assert inside(tmp_path / "link", "own", "the index") == tmp_path / "link" / "own"


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    (blobs / "123").write_text("")
    (snapshot / "model.safetensors").symlink_to(Path("..", "..", "blobs", "123"))
    (snapshot / "out").symlink_to(tmp_path / "else")
    assert inside(snapshot, "model.safetensors", "the index") == snapshot / "model.safetensors"
    with pytest.raises(ValueError, match="symbolic link out of"):
        inside(snapshot, "out", "the index")


def test_what_looks_like_the_cache_of_the_hub(tmp_path: Path) -> None:
    """Its `blobs/` is a folder of its own, and the repository's folder has a name of the Hub's."""
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "123").write_text("")
    for number, (name, blob) in enumerate({"models--a--b": "folder", "models--c--d": "file", "my--run": ""}.items()):
        snapshot, blobs = tmp_path / name / "snapshots" / "abc", tmp_path / name / "blobs"
        snapshot.mkdir(parents=True)
        if blob == "folder":
            blobs.symlink_to(tmp_path / "else")
        else:
            blobs.mkdir()
            (blobs / "123").symlink_to(tmp_path / "else" / "123") if blob else (blobs / "123").write_text("")
        (snapshot / "x").symlink_to(Path("..", "..", "blobs", "123"))
        with pytest.raises(ValueError, match="symbolic link out of"):
            inside(snapshot, "x", f"index {number}")
