"""A name on the Hub is asked for once; the libraries would try each of their files six times."""

import logging
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants
from transformers.utils import hub as transformers_hub

from tests.hub_server import Repository, serve_hub
from vlcpt.demo import base_path
from vlcpt.errors import ConfigError
from vlcpt.model.adapters import read_adapter_config
from vlcpt.model.base import only_cached
from vlcpt.model.loading import load_base, load_processor, read_config

BASE = "org/base"


@pytest.fixture
def naps(monkeypatch, tmp_path):
    """The seconds that anything slept; caches are empty, and the Hub is allowed."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    close_session()
    yield slept
    close_session()


def go_to(endpoint, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"  # made from the endpoint at import
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)  # whose endpoint is that of its first use


@pytest.fixture
def hub(naps, monkeypatch):
    with serve_hub() as served:
        go_to(served.endpoint, monkeypatch)
        files = {path.name: path.read_bytes() for path in Path(base_path()).iterdir()}
        served.repositories[BASE] = Repository(private=False, branches={"main": files})
        yield served


@pytest.fixture
def no_network(monkeypatch):
    """As without one; a closed port says so at once."""

    def cut():
        go_to("http://127.0.0.1:9", monkeypatch)

    return cut


@pytest.mark.parametrize("look", [load_processor, read_config, load_base, read_adapter_config])
def test_without_a_network_an_unknown_id_is_one_message_within_a_second(naps, no_network, caplog, look):
    no_network()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ConfigError, match=r"nowhere/nothing: no such folder, and no .* of this id") as refused,
    ):
        look("nowhere/nothing")

    assert "The Hub cannot be reached: " in str(refused.value)
    assert "HF_ENDPOINT" in str(refused.value) and "spelling" not in str(refused.value)
    assert sum(naps) <= 1
    assert not caplog.records


def test_an_id_that_the_hub_does_not_have_is_asked_for_once(hub):
    with pytest.raises(ConfigError, match="nowhere/nothing: no such folder, and no processor of this id"):
        load_processor("nowhere/nothing")

    assert hub.requests == ["HEAD /nowhere/nothing/resolve/main/config.json"]


def test_without_a_network_what_is_cached_is_used_at_once(hub, naps, no_network, caplog):
    first = load_processor(BASE).tokenizer("a b").input_ids
    load_base(BASE)
    no_network()

    with caplog.at_level(logging.WARNING):
        assert load_processor(BASE).tokenizer("a b").input_ids == first
        load_base(BASE)
    assert naps.count(1.0) == len([nap for nap in naps if nap]) <= 3
    assert not caplog.records


def test_a_hub_that_answers_something_else_is_left_to_the_libraries(hub):
    hub.fail_at, hub.status = "config.json", 503

    assert not only_cached("model", BASE)
