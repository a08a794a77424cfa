"""The plan cache: keys, damage, and files that appear only when complete."""

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.export.engines.plan_cache import PlanCache, default_cache, plan_key

KEY = "ab" * 32
parts = st.dictionaries(
    st.sampled_from(["onnx", "sm", "version", "profiles"]), st.text("ab1", max_size=3) | st.integers(), max_size=4
)


@given(parts, parts)
def test_key_tells_all_parts_apart(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert (plan_key(**first) == plan_key(**second)) == (first == second)
    assert plan_key(**dict(reversed(first.items()))) == plan_key(**first)


def store(cache: PlanCache, content: bytes = b"plan") -> Path:
    with cache.draft(KEY) as draft:
        draft.write_bytes(content)
        return cache.keep(KEY, draft, 1.25, hashlib.sha256(content).hexdigest()).path


def test_kept_plan_is_found(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    assert cache.find(KEY) is None
    path = store(cache)
    found = PlanCache(tmp_path).find(KEY)
    assert found is not None
    assert (found.path, found.bytes, found.build_seconds) == (path, 4, 1.25)
    assert found.path.read_bytes() == b"plan"


@pytest.mark.parametrize("suffix", [".plan", ".json"])
@pytest.mark.parametrize("content", [b"", b"blan", b"{}", None])
def test_damaged_entry_counts_as_absent(tmp_path: Path, suffix: str, content: bytes | None) -> None:
    cache = PlanCache(tmp_path)
    path = store(cache).with_suffix(suffix)
    path.unlink() if content is None else path.write_bytes(content)
    assert cache.find(KEY) is None
    store(cache)
    assert cache.find(KEY) is not None


def test_draft_that_is_not_kept_goes_away(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)

    def interrupted() -> None:
        with cache.draft(KEY) as draft:
            draft.write_bytes(b"half a plan")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_default_is_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "stiv-deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "stiv-deploy"


def test_drafts_of_processes_that_are_no_more_are_swept(tmp_path: Path) -> None:
    folder = tmp_path / "plans" / KEY[:2]
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owners = {
        "ended": f"{ended.pid} {platform.node()}",
        "alive": f"{os.getpid()} {platform.node()}",
        "elsewhere": f"{ended.pid} another-machine",
        "no number": f"{'9' * 40} {platform.node()}",
        "begun": None,
        "yesterday": f"{os.getpid()} {platform.node()}",
    }
    for name, owner in owners.items():
        draft = folder / f".{name}.partial"
        draft.mkdir(parents=True)
        (draft / "plan").touch()
        if owner is not None:
            (draft / "owner").write_text(owner)
    (folder / ".file-1.partial").touch()
    for name in (".yesterday.partial", ".file-1.partial"):
        os.utime(folder / name, times=(0, 0))
    cache = PlanCache(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        f".{name}.partial" for name in ("alive", "elsewhere", "no number", "begun")
    }
    with cache.draft(KEY) as draft:
        draft.write_bytes(b"half a plan")
        PlanCache(tmp_path)
        assert draft.exists(), "of a process that lives"
