"""Names on the hub where it cannot be reached, which is never asked here."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from huggingface_hub.errors import EntryNotFoundError

from moacompress.core.errors import ModelError
from moacompress.models import hub
from moacompress.models.hub import can_reach, hub_arguments, is_hub_name
from moacompress.models.source import load_source


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that cannot be reached."""
    from huggingface_hub import constants, file_download

    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "can_reach", lambda endpoint: False)
    return tmp_path


def test_what_can_be_a_name_on_the_hub() -> None:
    assert all(map(is_hub_name, ("gpt2", "owner/name", "HuggingFaceTB/SmolLM2-135M-Instruct", "a.b/c_d")))
    assert not any(map(is_hub_name, ("", "/x", "./x", "../x/y", "a/b/c", "a b", "models/", "~/x")))


@pytest.mark.parametrize("offline", [False, True])
def test_what_is_not_in_the_cache_fails_at_once(cache: Path, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "can_reach", lambda endpoint: offline)  # offline, nobody asks
    why = "HF_HUB_OFFLINE is set" if offline else "https://.* cannot be reached"
    missing = f"there is no folder owner/name, {why}, and the cache in .* does not have it; give"
    for name, said in (("owner/name", missing), ("a--b..c", "there is no folder a--b..c")):
        with pytest.raises(ModelError, match=said):
            hub_arguments(name)


def test_what_is_in_the_cache_is_loaded_without_asking(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache / "models--owner--name"  # as the hub's own package lays it out
    for file, text in (("refs/main", "abc"), ("snapshots/abc/config.json", "{}")):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text(text)
    assert hub_arguments("owner/name") == {"local_files_only": True}
    with pytest.raises(ModelError, match="transformers can load"):  # its config says nothing
        load_source("owner/name")
    monkeypatch.setattr(hub, "can_reach", lambda endpoint: True)
    assert hub_arguments("owner/name") == {}


def test_whether_a_server_takes_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert can_reach(f"http://127.0.0.1:{port}")
    assert not can_reach(f"http://127.0.0.1:{port}")
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:1")
    assert can_reach(f"http://127.0.0.1:{port}")  # it would be asked by the proxy


def test_the_index_of_a_name(tmp_path, monkeypatch):
    asked = []

    def download(name, file, local_files_only):
        asked.append((name, file, local_files_only))
        if name == "owner/one-file":
            raise EntryNotFoundError("404")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    file = "model.safetensors.index.json"
    assert hub.index_of("owner/name", {}) == tmp_path / file
    assert hub.index_of("owner/one-file", {"local_files_only": True}) is None
    assert asked == [("owner/name", file, False), ("owner/one-file", file, True)]
