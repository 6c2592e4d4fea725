"""The Hub, spoken to on a loopback address; and that nothing else ever speaks to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hub_server import TOKEN, Hub
from tiny import Toy, adapted, bits, outputs

import lorica
from lorica.checkpoint import hub as files
from lorica.checkpoint.stream.shards import open_checkpoint
from lorica.cli import main
from lorica.errors import AdapterError, ConfigError, FileError, LoricaWarning, MissingExtra

huggingface_hub = pytest.importorskip(
    "huggingface_hub", reason="needs huggingface_hub: pip install 'lorica[hub]'"
)

NAMES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
CONFIG = lorica.LoraConfig(r=2, target_modules=["up"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that huggingface_hub takes for the real one, an empty cache, and nobody logged in."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    with Hub() as server:
        point_at(server.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
        assert huggingface_hub.hf_hub_url("a/b", "c").startswith(server.url)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server
        huggingface_hub.close_session()


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, file_download

    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


def unreachable(monkeypatch: pytest.MonkeyPatch) -> str:
    """Point at an address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    point_at(url, monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    return url


@pytest.fixture
def adapter() -> lorica.Adapter:
    return lorica.extract(adapted(Toy(), CONFIG))


def written(adapter: lorica.Adapter, folder: Path) -> dict[str, bytes]:
    lorica.write(adapter, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def content(adapter: lorica.Adapter, tmp_path: Path) -> dict[str, bytes]:
    return written(adapter, tmp_path / "made")


def same(one: lorica.Adapter, other: lorica.Adapter) -> bool:
    a, b = one.named_tensors(), other.named_tensors()
    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


class TestLoading:
    """By name."""

    def test_by_name(self, hub: Hub, content: dict[str, bytes], adapter: lorica.Adapter) -> None:
        hub.add("user/toy", {**content, "optimizer.pt": b"large", "checkpoint-1/adapter_config.json": b"{}"})
        model, expected = Toy(), Toy()
        expected.load_state_dict(model.state_dict())
        lorica.load(model, "user/toy", name="toy")
        assert bits(outputs(model)) == bits(outputs(lorica.attach(expected, adapter)))
        assert same(lorica.read("user/toy"), adapter)
        fetched = {
            line.rpartition("/")[2] for line in hub.requests if line.startswith("GET") and "resolve" in line
        }
        assert fetched == {"adapter_config.json", "adapter_model.safetensors"}

    def test_the_cache_counts(
        self, hub: Hub, content: dict[str, bytes], adapter: lorica.Adapter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.add("user/toy", content)
        lorica.read("user/toy")
        hub.requests.clear()
        assert same(lorica.read("user/toy"), adapter)
        assert not [line for line in hub.requests if line.startswith("GET") and "resolve" in line]
        hub.requests.clear()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert same(lorica.read("user/toy"), adapter)
        assert hub.requests == []
        with pytest.raises(
            FileError, match="not asked, since HF_HUB_OFFLINE is set, and the cache does not hold it"
        ):
            lorica.read("user/other")

    def test_subfolder_and_revision(self, hub: Hub, adapter: lorica.Adapter, tmp_path: Path) -> None:
        versions = [lorica.extract(adapted(Toy(), CONFIG, seed=seed)) for seed in (1, 2)]
        shas = []
        for i, version in enumerate(versions):
            made = written(version, tmp_path / f"version-{i}")
            shas.append(hub.add("user/toy", {f"a/b/{name}": data for name, data in made.items()}))
        hub.repositories["user/toy"].branches["v1"] = shas[0]
        assert same(lorica.read("user/toy", subfolder="a/b"), versions[1])
        assert same(lorica.read("user/toy", subfolder="a/b", revision="v1"), versions[0])
        assert same(lorica.read("user/toy", subfolder="a/b", revision=shas[0]), versions[0])

    def test_config_and_weights_are_of_one_commit(
        self, hub: Hub, content: dict[str, bytes], adapter: lorica.Adapter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.add("user/toy", content)
        download = huggingface_hub.hf_hub_download

        def pushed_meanwhile(name: str, file: str, **options: Any) -> str:
            path = download(name, file, **options)
            hub.add("user/toy", dict.fromkeys(content, b"another"))
            return path

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", pushed_meanwhile)
        assert same(lorica.read("user/toy"), adapter)

    def test_pickled_weights(self, hub: Hub, adapter: lorica.Adapter, tmp_path: Path) -> None:
        from lorica.checkpoint import peft

        peft.write(adapter, tmp_path / "old", pickled=True)
        hub.add("user/old", {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()})
        assert same(lorica.read("user/old"), adapter)

    def test_a_folder_wins(self, hub: Hub, content: dict[str, bytes], tmp_path: Path) -> None:
        hub.add("user/toy", content)
        (tmp_path / "user" / "toy").mkdir(parents=True)
        with pytest.raises(FileError, match=r"user/toy is not an adapter"):
            lorica.read("user/toy")
        with (
            pytest.raises(FileError, match="not an adapter"),
            pytest.warns(LoricaWarning, match="revision='v1'"),
        ):
            lorica.read("user/toy", revision="v1")
        assert hub.requests == []

    @pytest.mark.parametrize(
        "name", ["nowhere", "./user/toy", "/user/toy", "a/b/c", "~/toy", Path("user/toy")]
    )
    def test_what_is_no_name_on_the_hub(self, name: str | Path, hub: Hub, content: dict[str, bytes]) -> None:
        hub.add("user/toy", content)
        with pytest.raises(FileError, match=r"is not an adapter: it should hold adapter_config\.json"):
            lorica.read(name)
        assert hub.requests == []

    def test_subfolders_of_folders(self, adapter: lorica.Adapter, tmp_path: Path) -> None:
        lorica.write(adapter, tmp_path / "a" / "b")
        assert same(lorica.read(tmp_path, subfolder="a/b"), adapter)
        assert len(lorica.adapters(lorica.load(Toy(), tmp_path / "a", subfolder="b"))) == 1

    def test_tokens(self, hub: Hub, content: dict[str, bytes], adapter: lorica.Adapter) -> None:
        hub.add("user/secret", content, private=True)
        hub.add("user/gated", content, gated=True)
        with pytest.raises(FileError, match=r"no repository 'user/secret', or a private one.*token="):
            lorica.read("user/secret", token="hf_wrong")
        with pytest.raises(FileError, match=rf"gated: ask for access at {hub.url}/user/gated"):
            lorica.load(Toy(), "user/gated")
        assert same(lorica.read("user/secret", token=TOKEN), adapter)
        assert len(lorica.adapters(lorica.load(Toy(), "user/gated", token=TOKEN))) == 1

    def test_what_is_not_there(self, hub: Hub, content: dict[str, bytes]) -> None:
        hub.add("user/toy", content)
        hub.add("user/base", {"config.json": b"{}"})
        hub.add("user/half", {"adapter_config.json": content["adapter_config.json"]})
        for name, options, message in (
            ("user/tyo", {}, r"'user/tyo' is no folder here, and the Hub has no repository.*give its path"),
            ("user/toy", {"revision": "v9"}, r"user/toy has no revision 'v9'"),
            ("user/toy", {"subfolder": "x"}, r"user/toy/x is not an adapter.*subfolder= says where"),
            ("user/base", {}, r"user/base is not an adapter: it should hold adapter_config.json and"),
            ("user/half", {}, r"user/half is not an adapter"),
            ("user/--x..y", {}, r"'user/--x..y' cannot name a repository"),
        ):
            with pytest.raises(FileError, match=message):
                lorica.read(name, **options)

    def test_no_network(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        url = unreachable(monkeypatch)
        with pytest.raises(
            FileError, match=rf"the Hub \({url}\) cannot be reached: .*refused.*give its path"
        ):
            lorica.load(Toy(), "user/toy")

    def test_a_server_that_fails(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hub_server._ROUTES", {})
        with pytest.raises(FileError, match=r"'user/toy' is no folder here, and the Hub"):
            lorica.read("user/toy")

    def test_without_huggingface_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("huggingface_hub", "huggingface_hub.errors"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingExtra, match=r"'user/toy' is no folder here.*pip install 'lorica\[hub\]'"):
            lorica.read("user/toy")

    def test_peft_models_load_by_name(
        self, hub: Hub, content: dict[str, bytes], adapter: lorica.Adapter
    ) -> None:
        from lorica import peft

        hub.add("user/toy", content)
        model = peft.PeftModel.from_pretrained(Toy(), "user/toy")
        assert same(lorica.extract(model.get_base_model(), "default"), adapter)


class TestBase:
    """A base's safetensors, for what looks at its weights and needs no model."""

    CONFIG = b'{"model_type": "toy"}'

    @staticmethod
    def weights(*names: str) -> bytes:
        return safetensors.torch.save({name: torch.ones(2, 2) for name in names})

    def test_one_file(self, hub: Hub) -> None:
        files_there = {"config.json": self.CONFIG, "model.safetensors": self.weights("a")}
        hub.add("user/base", {**files_there, "pytorch_model.bin": b"large"})
        found = open_checkpoint(files.locate_base("user/base"))
        assert (found.config["model_type"], list(found.home)) == ("toy", ["a"])
        assert not [line for line in hub.requests if "pytorch_model" in line]

    def test_shards(self, hub: Hub) -> None:
        index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
        shards = {"one.safetensors": self.weights("a"), "two.safetensors": self.weights("b")}
        content = {"config.json": self.CONFIG, "model.safetensors.index.json": json.dumps(index).encode()}
        hub.add("user/base", {**content, **shards})
        assert sorted(open_checkpoint(files.locate_base("user/base")).home) == ["a", "b"]

    @pytest.mark.parametrize(
        ("index", "said"),
        [
            (b"{", "cannot be read as JSON"),
            (b"[]", "should hold a JSON object"),
            (b"{}", "has no weight_map"),
            (b'{"weight_map": {"a": 5}}', "should name files that stand beside it"),
            (b'{"weight_map": {"a": "../../stolen"}}', "should name files that stand beside it"),
        ],
    )
    def test_an_index_that_is_none(self, index: bytes, said: str, hub: Hub) -> None:
        hub.add("user/base", {"config.json": self.CONFIG, "model.safetensors.index.json": index})
        with pytest.raises(FileError, match=said):
            files.locate_base("user/base")
        assert not [line for line in hub.requests if "stolen" in line]

    def test_what_is_here_wins(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "base").mkdir()
        assert files.locate_base("base") == Path("base")
        assert files.locate_base(Path("user/base")) == Path("user/base")
        assert not hub.requests

    def test_what_is_not_there(self, hub: Hub) -> None:
        hub.add("user/pickled", {"config.json": self.CONFIG, "pytorch_model.bin": b"large"})
        with pytest.raises(FileError, match=r"not a model in safetensors: it should hold config\.json"):
            files.locate_base("user/pickled")
        with pytest.raises(FileError, match=r"has no repository 'user/none'.*model's files needs no network"):
            files.locate_base("user/none")


class TestPushing:
    """From a model, a value or a folder."""

    def test_peft_models_push_and_load_by_name(self, hub: Hub) -> None:
        from lorica import peft

        model = peft.get_peft_model(Toy(), peft.LoraConfig(r=2, target_modules=["up"]))
        model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["down"]))
        with pytest.raises(ConfigError, match="push_to_hub of an adapter takes no tags"):
            model.push_to_hub("user/toy", tags=["mine"])
        url = model.push_to_hub("user/toy", use_auth_token=TOKEN, commit_message="Both", revision="mine")
        repository = hub.repositories["user/toy"]
        sha = repository.branches["mine"]
        assert url == f"{hub.url}/user/toy/commit/{sha}"
        assert repository.commits[sha].keys() == NAMES | {f"other/{name}" for name in NAMES}
        again = peft.PeftModel.from_pretrained(Toy(), "user/toy", revision="mine", token=TOKEN)
        again.load_adapter("user/toy", "second", subfolder="other", revision="mine")
        for name, source in (("default", "default"), ("second", "other")):
            one = lorica.extract(again.get_base_model(), name)
            assert same(one, lorica.extract(model.get_base_model(), source))
        config = peft.PeftConfig.from_pretrained("user/toy", subfolder="other", revision="mine")
        assert config.r == 3

    def test_and_back(self, hub: Hub, adapter: lorica.Adapter) -> None:
        url = lorica.push_to_hub(adapted(Toy(), CONFIG), "user/toy", token=TOKEN)
        repository = hub.repositories["user/toy"]
        sha = repository.branches["main"]
        assert url == f"{hub.url}/user/toy/commit/{sha}"
        assert repository.commits[sha].keys() == NAMES
        assert repository.titles[1:] == ["Upload adapter"]
        assert not repository.private
        assert same(lorica.read("user/toy"), adapter)

    def test_only_the_adapters_files_of_a_folder(
        self, hub: Hub, adapter: lorica.Adapter, tmp_path: Path
    ) -> None:
        folder = lorica.write(adapter, tmp_path / "run")
        for name in ("optimizer.pt", "adapter_model.bin", ".env", "checkpoint-1/adapter_config.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("secret")
        lorica.push_to_hub(folder, "user/toy", token=TOKEN)
        repository = hub.repositories["user/toy"]
        assert repository.commits[repository.branches["main"]].keys() == NAMES

    def test_every_option(self, hub: Hub, adapter: lorica.Adapter) -> None:
        options: dict[str, Any] = {"token": TOKEN, "private": True, "commit_message": "First"}
        lorica.push_to_hub(adapter, "user/toy", subfolder="a/b", revision="dev", **options)
        repository = hub.repositories["user/toy"]
        assert repository.private
        assert repository.titles[1:] == ["First"]
        assert repository.commits[repository.branches["dev"]].keys() == {f"a/b/{name}" for name in NAMES}
        assert repository.commits[repository.branches["main"]] == {}
        assert same(lorica.read("user/toy", subfolder="a/b", revision="dev", token=TOKEN), adapter)
        url = lorica.push_to_hub(adapter, "user/toy", token=TOKEN, create_pr=True)
        assert url == f"{hub.url}/user/toy/discussions/1"
        assert repository.commits[repository.branches["main"]] == {}
        assert repository.commits[repository.branches["refs/pr/1"]].keys() == NAMES

    def test_one_of_several(self, hub: Hub) -> None:
        model = adapted(adapted(Toy(), CONFIG, "one", seed=1), CONFIG, "two", seed=2)
        lorica.push_to_hub(model, "user/one", "one", token=TOKEN)
        assert same(lorica.read("user/one"), lorica.extract(model, "one"))
        with pytest.raises(AdapterError, match="no adapter is named 'three'"):
            lorica.push_to_hub(model, "user/three", "three", token=TOKEN)
        with pytest.raises(ConfigError, match="chooses among a model's adapters"):
            lorica.push_to_hub(lorica.extract(model, "one"), "user/one", "one", token=TOKEN)
        assert "user/three" not in hub.repositories

    def test_nothing_private_goes_where_it_is_public(self, hub: Hub, adapter: lorica.Adapter) -> None:
        hub.add("user/toy", {})
        with pytest.raises(ConfigError, match="user/toy is there already and is public"):
            lorica.push_to_hub(adapter, "user/toy", private=True, token=TOKEN)
        assert len(hub.repositories["user/toy"].commits) == 1

    def test_what_is_damaged_stays(self, hub: Hub, adapter: lorica.Adapter, tmp_path: Path) -> None:
        folder = lorica.write(adapter, tmp_path / "run")
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        with pytest.raises(FileError, match="truncated or damaged"):
            lorica.push_to_hub(folder, "user/toy", token=TOKEN)
        assert hub.requests == []

    def test_refused(self, hub: Hub, adapter: lorica.Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(FileError, match=r"was not pushed: the Hub .*token"):
            lorica.push_to_hub(adapter, "user/toy", token="hf_wrong")
        with pytest.raises(FileError, match="cannot name a repository"):
            lorica.push_to_hub(adapter, "a/b/c", token=TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(
            FileError, match=r"was not pushed: the Hub is not asked, since HF_HUB_OFFLINE is set\.$"
        ):
            lorica.push_to_hub(adapter, "user/toy", token=TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        url = unreachable(monkeypatch)
        with pytest.raises(FileError, match=rf"the Hub \({url}\) cannot be reached"):
            lorica.push_to_hub(adapter, "user/toy", token=TOKEN)

    def test_command(
        self, hub: Hub, adapter: lorica.Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = str(lorica.write(adapter, tmp_path / "run"))
        assert (
            main(["push", folder, "user/toy", "--token", TOKEN, "--private", "--commit_message", "Hello"])
            == 0
        )
        repository = hub.repositories["user/toy"]
        sha = repository.branches["main"]
        assert capsys.readouterr().out == f"pushed {folder} to {hub.url}/user/toy/commit/{sha}\n"
        assert (repository.private, repository.titles[-1]) == (True, "Hello")
        assert main(["push", str(tmp_path / "none"), "user/toy"]) == 1
        assert "is not an adapter" in capsys.readouterr().err


def test_saving_touches_no_network(
    adapter: lorica.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blocked(*_: object, **__: object) -> Any:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", blocked)
    monkeypatch.setattr(socket, "create_connection", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    base = adapter.config.replace(base_model_name_or_path="user/base")
    lorica.write(lorica.Adapter(base, adapter.factors), tmp_path / "a")
    lorica.save(adapted(Toy(), CONFIG), tmp_path / "b")
    assert same(lorica.read(tmp_path / "a"), lorica.read(str(tmp_path / "b")))


def test_the_environment_counts(content: dict[str, bytes], tmp_path: Path) -> None:
    """A process with HF_ENDPOINT and HF_HOME set, and again with the network switched off."""
    code = "import json, lorica; print(json.dumps(lorica.read('user/toy').numel))"
    with Hub() as server:
        server.add("user/toy", content)
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        counts = []
        for changes in ({"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}, {"HF_HUB_OFFLINE": "1"}):
            done = subprocess.run(
                [sys.executable, "-c", code],
                env={**environment, **changes},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=True,
            )
            counts.append(json.loads(done.stdout))
            server.requests, asked = [], server.requests
            assert bool(asked) is ("HF_ENDPOINT" in changes)
    assert counts == [lorica.read(tmp_path / "made").numel] * 2


def test_locate_takes_what_downloads_take(hub: Hub, content: dict[str, bytes], tmp_path: Path) -> None:
    hub.add("user/toy", content)
    folder = files.locate("user/toy", cache_dir=tmp_path / "elsewhere", revision=None)
    assert folder.is_relative_to(tmp_path / "elsewhere")
    assert lorica.is_adapter(folder)
