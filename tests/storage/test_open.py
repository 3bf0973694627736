"""What a user may write as the place of a store."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardckpt.storage.open import open_storage


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("/a/b", "/a/b"),
        (Path("/a/b"), "/a/b"),
        ("file:///a/b%20c", "/a/b c"),
        ("FILE:///a", "/a"),
        ("file://localhost/a", "/a"),
        ("/a/with%20percent", "/a/with%20percent"),
        ("/a/../b/", "/b"),
    ],
)
def test_paths_and_file_urls_name_directories(place: str | Path, path: str) -> None:
    assert open_storage(place).url == path


@pytest.mark.parametrize("url", ["s3://user:geheim@bucket/x", "gs://b/x", "memory://x"])
def test_another_scheme_is_refused_and_says_what_works(url: str) -> None:
    with pytest.raises(ValueError, match=r"scheme .* not supported; give a path") as caught:
        open_storage(url)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("url", ["file://server/share", "file://", ""])
def test_a_place_without_a_path_here_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="store"):
        open_storage(url)
