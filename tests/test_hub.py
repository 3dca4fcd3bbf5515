"""Sharing through the Hugging Face Hub: its real client against a Hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from torch import nn

from exitkit import ExitkitError, MultiExitModel, collect
from tests.fake_hub import TOKEN, FakeHub, running
from tests.toy import TinyNet, images


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield hub


def test_pushed_exits_load_by_name_and_answer_alike(hub: FakeHub, tiny_ee: MultiExitModel, tiny_net: TinyNet) -> None:
    address = tiny_ee.push_to_hub("user/exits", threshold=0.75, private=True, commit_message="First", token=TOKEN)
    again = MultiExitModel.from_pretrained(tiny_net, "user/exits")
    with torch.no_grad():
        before, after = tiny_ee.eval()(images(5)).logits, again.eval()(images(5)).logits
    assert all(torch.equal(first, second) for first, second in zip(before, after, strict=True))
    assert again.threshold == 0.75
    assert hub.private == {"user/exits": True}
    assert hub.repositories["user/exits"][-1].title == "First"
    assert address == f"{hub.url}/user/exits/commit/{hub.repositories['user/exits'][-1].sha}"


def test_the_card_on_the_hub_names_the_repository_in_full(hub: FakeHub, tiny_ee: MultiExitModel) -> None:
    tiny_ee.push_to_hub("exits", token=TOKEN)
    card = ModelCard(hub.repositories["user/exits"][-1].files["README.md"].decode())
    assert 'from_pretrained(backbone, "user/exits")' in card.text
    assert card.data.library_name == "exitkit"


def test_a_second_push_is_one_commit_that_replaces_the_first(
    hub: FakeHub, tiny_ee: MultiExitModel, tiny_net: TinyNet
) -> None:
    tiny_ee.push_to_hub("user/exits", threshold=0.5, token=TOKEN)
    first = hub.repositories["user/exits"][-1]
    nn.init.ones_(tiny_ee.classifiers[0].linear.weight)
    tiny_ee.push_to_hub("user/exits", threshold=0.6, token=TOKEN)
    commits = hub.repositories["user/exits"]
    assert len(commits) == 3  # the Hub's own first commit, and one for each push
    assert len(first.files) == len(commits[-1].files) == 4
    old = MultiExitModel.from_pretrained(tiny_net, "user/exits", revision=first.sha)
    new = MultiExitModel.from_pretrained(tiny_net, "user/exits")
    assert (old.threshold, new.threshold) == (0.5, 0.6)
    assert not bool((old.classifiers[0].linear.weight == 1).any())
    assert bool((new.classifiers[0].linear.weight == 1).all())


def test_only_what_is_needed_is_downloaded(hub: FakeHub, tiny_ee: MultiExitModel, tiny_net: TinyNet) -> None:
    tiny_ee.push_to_hub("user/exits", token=TOKEN)
    hub.commit("user/exits", "More", {**hub.repositories["user/exits"][-1].files, "big.bin": b"0" * 1000})
    MultiExitModel.from_pretrained(tiny_net, "user/exits")
    fetched = {
        request.rpartition("/")[2] for request in hub.requests if request.startswith("GET") and "/resolve/" in request
    }
    assert "config.json" in fetched
    assert not fetched & {"big.bin", "README.md"}


def test_without_connection_the_downloaded_copy_is_used(
    hub: FakeHub, tiny_ee: MultiExitModel, tiny_net: TinyNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_ee.push_to_hub("user/exits", threshold=0.5, token=TOKEN)
    MultiExitModel.from_pretrained(tiny_net, "user/exits")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert MultiExitModel.from_pretrained(tiny_net, "user/exits").threshold == 0.5
    with pytest.raises(ExitkitError, match=r"'user/others' is not a folder here.* Hub failed.*HF_HUB_OFFLINE"):
        MultiExitModel.from_pretrained(tiny_net, "user/others")
    with pytest.raises(ExitkitError, match=r"repo_id='user/exits' on the Hub failed: OfflineModeIsEnabled"):
        tiny_ee.push_to_hub("user/exits", token=TOKEN)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("user/unknown", None, "RepositoryNotFoundError.*token"),
        ("user/exits", "v7", "RevisionNotFoundError.*revision"),
    ],
)
def test_what_is_not_on_the_hub_is_named(
    hub: FakeHub, tiny_ee: MultiExitModel, tiny_net: TinyNet, name: str, revision: str | None, message: str
) -> None:
    tiny_ee.push_to_hub("user/exits", token=TOKEN)
    with pytest.raises(ExitkitError, match=rf"source='{name}' is not a folder here.*{message}"):
        MultiExitModel.from_pretrained(tiny_net, name, revision=revision)


def test_another_kind_of_model_on_the_hub_is_refused(hub: FakeHub, tiny_net: TinyNet) -> None:
    hub.repositories["google/bert"] = []
    hub.commit("google/bert", "Upload", {"config.json": b'{"model_type": "bert"}'})
    with pytest.raises(ExitkitError, match=r"config\.json' is not a configuration of exits"):
        MultiExitModel.from_pretrained(tiny_net, "google/bert")


def test_a_wrong_token_and_a_wrong_name_are_refused_without_leaving_anything(
    hub: FakeHub, tiny_ee: MultiExitModel
) -> None:
    with pytest.raises(ExitkitError, match=r"creating repo_id='user/exits' on the Hub failed: .*401.*token="):
        tiny_ee.push_to_hub("user/exits", token="hf_stranger")
    with pytest.raises(ExitkitError, match=r"repo_id='no name!' on the Hub failed: HFValidationError"):
        tiny_ee.push_to_hub("no name!", token=TOKEN)
    assert hub.repositories == {}


def test_what_cannot_be_saved_makes_no_repository(hub: FakeHub, tiny_ee: MultiExitModel) -> None:
    unlabelled = collect(tiny_ee, [images(4)])
    with pytest.raises(ExitkitError, match="labels"):
        tiny_ee.push_to_hub("user/exits", outputs=unlabelled, token=TOKEN)
    assert hub.repositories == {}


def test_no_server_at_all_is_a_clear_error(
    tiny_ee: MultiExitModel, tiny_net: TinyNet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ExitkitError, match=r"repo_id='user/exits' on the Hub failed: ConnectError.*connection"):
        tiny_ee.push_to_hub("user/exits", token=TOKEN)
    with pytest.raises(ExitkitError, match=r"source='user/exits' is not a folder here.* Hub failed.*connection"):
        MultiExitModel.from_pretrained(tiny_net, "user/exits")
