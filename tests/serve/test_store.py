"""The store of adapters: names and contents, leases, eviction, and folders that strangers write to."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers.generation.continuous_batching", reason="needs lorica[serve]")

import safetensors.torch
import tiny
import torch
from serving import KINDS, decoder, write_adapter

import lorica
from lorica.model.slots import Slots
from lorica.serve import RefusedAdapter, Store, UnknownAdapter
from lorica.serve.store import folders


@pytest.fixture(scope="module")
def model() -> Any:
    return decoder()


@pytest.fixture(scope="module")
def made(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters a, b, c, of one shape and different contents."""
    root = tmp_path_factory.mktemp("made")
    for seed, name in enumerate("abc"):
        write_adapter(model, root / name, KINDS["some"], seed)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "root")
    return tmp_path / "root"


def store(model: Any, root: Path, **settings: Any) -> Store:
    return Store(lambda adapter, folder: Slots(model).fit(adapter), (root,), **settings)


async def held(own: Store, name: str) -> Any:
    lease = own.lease(name)
    await lease.ready()
    return lease


def test_listed_resident_and_back(model: Any, root: Path):
    async def use() -> None:
        own = store(model, root, resident=2)
        assert [(e.name, e.state, e.rank, e.hash) for e in own.entries()] == [
            (name, "listed", 4, None) for name in "abc"
        ]
        a, again = await asyncio.gather(held(own, "a"), held(own, "a"))
        assert a.content is again.content
        entry = own.entry("a")
        assert (entry.state, entry.requests, entry.applied, entry.total) == ("resident", 2, 4, 4)
        assert entry.size == (root / "a" / "adapter_model.safetensors").stat().st_size
        (await held(own, "b")).release()
        (await held(own, "c")).release()  # the third: b, which nobody holds, makes room
        assert [e.state for e in own.entries()] == ["resident", "listed", "resident"]
        a.release(served=True)
        a.release(served=True)  # once is enough
        again.release()
        assert own.entry("a").served == 1
        assert own.leases == 0
        (await held(own, "b")).release()  # c was used after b, but a after both
        assert [e.state for e in own.entries()] == ["resident", "resident", "listed"]
        await own.load("c", pin=True)
        (await held(own, "a")).release()
        (await held(own, "b")).release()
        assert own.entry("c").state == "resident"

    asyncio.run(use())


def test_a_name_is_an_alias_of_a_content(model: Any, root: Path):
    dropped: list[Any] = []

    async def use() -> None:
        own = store(model, root, dropped=dropped.append)
        before = await held(own, "a")
        await own.load("same", root / "a")
        same = await held(own, "same")
        assert same.content is before.content
        with pytest.raises(RefusedAdapter, match="'a' is loaded already"):
            await own.load("a", root / "b")
        await own.load("a", root / "b", replace=True)
        after = await held(own, "a")
        assert after.content is not before.content
        await own.unload("same")
        same.release()
        assert not dropped  # somebody holds it still
        before.release()
        assert dropped == [before.content]
        with pytest.raises(UnknownAdapter, match="'same'"):
            own.lease("same")

    asyncio.run(use())


def test_a_watched_folder_is_followed(model: Any, made: Path, root: Path):
    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(120):
            while not condition():
                await asyncio.sleep(0.01)

    async def use() -> None:
        shutil.rmtree(root / "c")
        own = store(model, root)
        before = await held(own, "a")
        own.watch(0.02)
        shutil.copytree(made / "c", root / "other")
        await until(lambda: "other" in {e.name for e in own.entries()})
        shutil.copytree(made / "b", root / "new")
        shutil.rmtree(root / "a")
        (root / "new").rename(root / "a")
        await until(lambda: own.entry("a").hash not in (None, before.content.hash))
        assert own.entry("a").state == "resident"  # read before requests need it
        assert own.entry("a").hash == (await held(own, "b")).content.hash
        shutil.rmtree(root / "other")
        await until(lambda: "other" not in {e.name for e in own.entries()})
        await own.unload("b")
        await asyncio.sleep(0.1)
        assert "b" not in {e.name for e in own.entries()}  # unloaded stays so while its files are the same
        await own.close()

    asyncio.run(use())


def test_identity_goes_by_what_files_say(model: Any, root: Path):
    async def hash_of(name: str) -> str | None:
        return (await own.load(name)).hash

    async def use() -> None:
        first = await hash_of("a")
        weights = root / "b" / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(root / "a" / "adapter_model.safetensors")
        shutil.copy(root / "a" / "adapter_config.json", root / "b")
        safetensors.torch.save_file(dict(reversed(tensors.items())), weights, {"note": "the same"})
        assert await hash_of("b") == first
        settings = json.loads((root / "c" / "adapter_config.json").read_text())
        assert await hash_of("c") != first
        (root / "c" / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 3}))
        before = own.entry("c").hash
        assert (await own.load("c", root / "c", replace=True)).hash != before

    own: Store
    own = store(model, root)
    asyncio.run(use())


def _cut(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


def _linked(folder: Path) -> None:
    outside = folder.parent.parent / "outside.safetensors"
    (folder / "adapter_model.safetensors").rename(outside)
    (folder / "adapter_model.safetensors").symlink_to(outside)


def _folder_linked(folder: Path) -> None:
    outside = folder.parent.parent / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)


def _pipe(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def _infinite(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    safetensors.torch.save_file(tensors, weights)


def _elsewhere(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    renamed = {key.replace("model.layers", "model.blocks"): value for key, value in tensors.items()}
    safetensors.torch.save_file(renamed, weights)


def _another_base(folder: Path) -> None:
    shutil.rmtree(folder)
    write_adapter(tiny.transformer("llama", hidden_size=32, num_attention_heads=4), folder, KINDS["some"])


def _high(folder: Path) -> None:
    shutil.rmtree(folder)
    write_adapter(decoder(), folder, {"r": 12, "target_modules": ["q_proj"]})


def _changed(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (_cut, "not written to its end"),
    "without weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "is missing; the adapter"),
    "without configuration": (
        lambda f: (f / "adapter_config.json").unlink(),
        "adapter_config.json is missing",
    ),
    "half a configuration": (lambda f: (f / "adapter_config.json").write_text('{"r": 4,'), "damaged"),
    "no safetensors": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), "no safetensors"),
    "pickled": (_pickled, "is a pickle, which is never served"),
    "a file linked out": (_linked, "a link that leaves the folder"),
    "the folder linked out": (_folder_linked, "among those that adapters are served from"),
    "a pipe": (_pipe, "no plain file"),
    "not finite": (_infinite, "NaN or infinity"),
    "acting on nothing": (_elsewhere, r"model\.blocks\.0\.self_attn\.q_proj is not in the model"),
    "of another base": (_another_base, "shape of model.layers.0.self_attn.q_proj"),
    "of a high rank": (_high, "its rank is 12, and at most 8"),
    "another method": (lambda f: _changed(f, peft_type="IA3"), "IA3"),
    "with trained experts": (lambda f: _changed(f, target_parameters=["mlp.up_proj.weight"]), "up_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_by_name_and_the_rest_goes_on(model: Any, root: Path, case: str):
    damage, said = REFUSED[case]
    damage(root / "b")

    async def use() -> None:
        own = store(model, root, max_rank=8)
        with pytest.raises(lorica.LoricaError, match=said) as caught:
            await held(own, "b")
        assert isinstance(caught.value, RefusedAdapter)
        assert (own.entry("b").state, own.entry("b").requests) == ("refused", 0)
        assert own.entry("b").problem == str(caught.value)
        (await held(own, "a")).release()
        assert own.leases == 0

    asyncio.run(use())


@pytest.mark.parametrize("name", ["../a", "a/b", "/etc/passwd", "", ".hidden", "a\0b", "x" * 129, "ä"])
def test_a_name_is_no_path(model: Any, root: Path, name: str):
    async def use() -> None:
        own = store(model, root)
        with pytest.raises(UnknownAdapter):
            own.lease(name)
        with pytest.raises(RefusedAdapter, match="cannot be an adapter's name"):
            await own.load(name, root / "a")

    asyncio.run(use())


def test_a_path_outside_is_as_one_that_is_not_there(model: Any, root: Path):
    outside = root.parent / "secret"
    shutil.copytree(root / "a", outside)

    async def use() -> list[str]:
        own, said = store(model, root), []
        for path in (outside, root / "nothing", root / ".." / "secret", "/etc", "\0"):
            with pytest.raises(UnknownAdapter) as caught:
                await own.load("x", path)
            said.append(str(caught.value).replace(str(path), "PATH"))
        return said

    said = asyncio.run(use())
    assert len(set(said[:4])) == 1


def test_a_failed_load_leaves_what_was_there(model: Any, root: Path):
    async def use() -> None:
        own = store(model, root)
        before = (await own.load("a")).hash
        _cut(root / "b")
        with pytest.raises(RefusedAdapter, match="not written"):
            await own.load("a", root / "b", replace=True)
        assert own.entry("a").hash == before
        assert own.entry("a").state == "resident"

    asyncio.run(use())


def test_what_was_asked_for_holds_until_the_folder_changes(model: Any, made: Path, root: Path):
    dropped: list[Any] = []

    async def use() -> None:
        own = store(model, root, dropped=dropped.append)
        shutil.move(root / "c", root / "a" / "elsewhere")  # inside the root, and not listed
        own._merge(folders.scan(own.roots))
        first = (await own.load("a")).hash
        other = (await own.load("a", root / "a" / "elsewhere", replace=True)).hash
        assert other != first
        own._merge(folders.scan(own.roots))
        assert own.entry("a").hash == other
        await own.unload("a")
        own._merge(folders.scan(own.roots))
        assert [e.name for e in own.entries()] == ["b"]
        assert len(dropped) == 2
        assert not own.contents
        os.utime(root / "a" / "adapter_config.json")
        own._merge(folders.scan(own.roots))
        assert (await own.load("a")).hash == first

    asyncio.run(use())


def test_a_content_leaves_memory_whenever_its_name_goes(model: Any, root: Path):
    dropped: list[Any] = []

    async def use() -> None:
        own = store(model, root, dropped=dropped.append)
        await own.load("new", root / "a")
        assert len(own.contents) == 1
        await own.unload("new")
        assert (len(dropped), own.contents) == (1, {})
        lease = own.lease("b")
        await own.unload("b")  # before it was read; who holds it goes on
        content = await lease.ready()
        assert own.contents.get(content.hash) is not content or content not in dropped[1:]
        lease.release()
        assert dropped[-1] is content
        assert own.leases == 0
        assert not own.contents

    asyncio.run(use())


def test_two_loads_of_a_name_do_not_cross(model: Any, root: Path):
    async def use() -> None:
        own = store(model, root)
        loads = [own.load("new", root / name, replace=True) for name in "ab"]
        one, other = await asyncio.gather(*loads, return_exceptions=True)
        assert isinstance(other, RefusedAdapter)
        assert "is being loaded already" in str(other)
        assert not isinstance(one, BaseException)
        assert own.entry("new").hash == one.hash == (await own.load("a")).hash

    asyncio.run(use())


def test_what_breaks_fitting_is_refused(model: Any, root: Path):
    def fit(adapter: Any, folder: Path) -> Any:
        raise ValueError("nobody thought of this")

    async def use() -> None:
        own = Store(fit, (root,))
        with pytest.raises(RefusedAdapter, match="a: ValueError: nobody thought of this"):
            await held(own, "a")
        assert own.leases == 0

    asyncio.run(use())


def test_a_folder_that_changed_since_it_was_listed_is_read_as_it_is(
    model: Any, root: Path, monkeypatch: pytest.MonkeyPatch
):
    async def use() -> None:
        own = store(model, root)
        other = (await own.load("b")).hash
        shutil.rmtree(root / "a")
        shutil.copytree(root / "b", root / "a")
        assert (await held(own, "a")).content.hash == other  # by no look at the folder in between
        digest, turns = folders.digest, iter(range(9))

        def late(folder: Path) -> str:
            found = digest(folder)
            if next(turns) == 0:  # once, it is replaced while it is read
                shutil.rmtree(root / "c")
                shutil.copytree(root / "b", root / "c")
            return found

        monkeypatch.setattr(folders, "digest", late)
        assert (await held(own, "c")).content.hash == other

    asyncio.run(use())


def test_files_may_be_links_inside_the_root(model: Any, root: Path):
    weights = root / "a" / "adapter_model.safetensors"
    weights.rename(root / "blob")
    weights.symlink_to("../blob")

    async def use() -> None:
        own = store(model, root)
        assert (await own.load("a")).state == "resident"

    asyncio.run(use())


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({"tokenizer_config.json": "{}"}, None),
        ({"tokenizer_config.json": '{"chat_template": "one"}'}, "one"),
        ({"tokenizer_config.json": '{"chat_template": "one"}', "chat_template.jinja": "two"}, "two"),
        (
            {
                "tokenizer_config.json": '{"chat_template": [{"name": "rag", "template": "one"}, '
                '{"name": "default", "template": "two"}, 3]}'
            },
            "two",
        ),
        ({"tokenizer_config.json": '{"chat_template": 3}'}, None),
    ],
)
def test_an_adapter_brings_its_chat_template(root: Path, files: dict[str, str], template: str | None):
    for name, text in files.items():
        (root / "a" / name).write_text(text)
    found = folders.scan((root,))["a"]
    assert (found.template, found.problem) == (template, None)
    assert folders.scan((root,), {"a": found})["a"] is found
    (root / "a" / "chat_template.jinja").write_text("three")
    assert folders.scan((root,), {"a": found})["a"].template == "three"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("chat_template.jinja", "x" * 300_000, "larger than 262,144 bytes"),
        ("tokenizer_config.json", '{"chat_template": "' + "x" * 300_000 + '"}', "larger than 262,144 bytes"),
        ("tokenizer_config.json", "{", "damaged"),
        ("chat_template.jinja", None, "a link that leaves the folder"),
    ],
)
def test_a_chat_template_that_is_none_is_refused(root: Path, name: str, text: str | None, said: str):
    if text is None:
        (root.parent / "outside").write_text("secret")
        (root / "a" / name).symlink_to(root.parent / "outside")
    else:
        (root / "a" / name).write_text(text)
    assert said in str(folders.scan((root,))["a"].problem)
