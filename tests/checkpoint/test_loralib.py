"""loralib's checkpoints, read and written; and everything that can be wrong with them."""

from __future__ import annotations

import dataclasses
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import Toy, adapted, bits, outputs, shake, transformer
from torch import Tensor, nn

import lorica
import lorica.loralib as lora
from lorica.checkpoint import loralib as files
from lorica.errors import AdapterError, ConfigError, FileError

QV = [True, False, True]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        bits(one[key]) == bits(other[key]) and one[key].dtype == other[key].dtype for key in one
    )


def trained(model: nn.Module) -> nn.Module:
    lora.mark_only_lora_as_trainable(model)
    shake(model)
    return model


class Fused(nn.Module):
    """Attention's projections in one weight, by loralib's layers or torch's."""

    def __init__(self, **update: Any) -> None:
        super().__init__()
        make = lora.MergedLinear if update else nn.Linear
        self.c_attn = make(6, 18, **update)
        self.out = lora.Linear(6, 5, r=3, lora_alpha=4) if update else nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).chunk(3, -1)
        return self.out(q * k.sigmoid() + v)


class Apart(nn.Module):
    """The same with a module for each projection."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.q(x) * self.k(x).sigmoid() + self.v(x))


@pytest.fixture
def fused() -> nn.Module:
    return trained(Fused(r=2, lora_alpha=4, enable_lora=QV))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class TestMergedLinear:
    """One update for each projection, or one of the whole weight: the same function."""

    def test_stays_fused(self, fused: nn.Module, tmp_path: Path) -> None:
        torch.save(lora.lora_state_dict(fused), tmp_path / "lora.pt")
        adapter = files.read(tmp_path / "lora.pt", 4, enable_lora={"c_attn": QV})
        assert adapter.factors["c_attn"].r == 4
        assert [f.scale for f in adapter.factors.values()] == [2, 4 / 3]
        folder = lorica.write(adapter, tmp_path / "peft")
        model = Fused()
        model.load_state_dict({k: t for k, t in fused.state_dict().items() if "lora_" not in k})
        torch.testing.assert_close(lorica.load(model, folder)(X), fused(X), rtol=1e-6, atol=1e-6)
        back = files.write(lorica.read(folder), tmp_path / "back.pt", enable_lora={"c_attn": QV})
        assert equal(torch.load(back), lora.lora_state_dict(fused))

    def test_splits(self, fused: nn.Module, tmp_path: Path) -> None:
        torch.save(lora.lora_state_dict(fused), tmp_path / "lora.pt")
        split = {"c_attn": ["q", None, "v"]}
        adapter = files.read(tmp_path / "lora.pt", 4, split=split)
        assert {path: f.r for path, f in adapter.factors.items()} == {"q": 2, "v": 2, "out": 3}
        folder = lorica.write(adapter, tmp_path / "peft")
        model = Apart()
        plain = {k: t for k, t in fused.state_dict().items() if "lora_" not in k}
        for leaf in ("weight", "bias"):
            parts = plain.pop(f"c_attn.{leaf}").chunk(3)
            plain |= {f"{name}.{leaf}": part for name, part in zip("qkv", parts, strict=True)}
        model.load_state_dict(plain)
        torch.testing.assert_close(lorica.load(model, folder)(X), fused(X), rtol=1e-6, atol=1e-6)
        back = files.write(lorica.read(folder), tmp_path / "back.pt", split=split)
        assert equal(torch.load(back), lora.lora_state_dict(fused))
        # A view would have brought all of what it is a part of.
        assert back.stat().st_size < 2 * (tmp_path / "lora.pt").stat().st_size

    @pytest.mark.parametrize("how", ["enable_lora", "split"])
    def test_on_a_real_architecture(self, how: str, tmp_path: Path) -> None:
        """GPT-2's c_attn is fused and stored (in, out), and one weight for q, k and v."""
        model = transformer("gpt2")
        expected = transformer("gpt2")
        draw = torch.Generator().manual_seed(0)
        state = {}
        for i in range(2):
            A, B = torch.randn(4, 16, generator=draw), torch.randn(32, 2, generator=draw)
            state |= {f"transformer.h.{i}.attn.c_attn.lora_{s}": t for s, t in (("A", A), ("B", B))}
            for j, rows in enumerate((slice(0, 16), slice(32, 48))):
                update = 3 * (B[16 * j : 16 * j + 16] @ A[2 * j : 2 * j + 2])
                expected.transformer.h[i].attn.c_attn.weight.data[:, rows] += update.T
        torch.save({"model_state_dict": state, "step": 3}, tmp_path / "model.pt")
        if how == "split":
            named = files.read(tmp_path / "model.pt", 6, split={"c_attn": ["q", None, "v"]}).factors
            assert list(named) == [f"transformer.h.{i}.attn.{part}" for i in range(2) for part in "qv"]
            return
        adapter = files.read(tmp_path, 6, enable_lora={"attn.c_attn": QV})
        assert adapter.lora.target_modules == ["c_attn"]
        lorica.attach(model, adapter)
        torch.testing.assert_close(outputs(model, "gpt2"), outputs(expected, "gpt2"), rtol=1e-5, atol=1e-5)

    def test_an_attention_may_share_its_alpha(self, tmp_path: Path) -> None:
        """Ranks and alphas that differ by layer are what the configuration says, layer by layer."""
        model = trained(nn.Sequential(*(Fused(r=r, lora_alpha=4, enable_lora=QV) for r in (1, 2, 2))))
        adapter = files.from_tensors(lora.lora_state_dict(model), 4, files.fused_parts({"c_attn": QV}))
        again = lorica.read(lorica.write(adapter, tmp_path))
        assert [f.scale for f in again.factors.values()] == [4, 4 / 3, 2, 4 / 3, 2, 4 / 3]
        assert [f.r for f in again.factors.values()] == [2, 3, 4, 3, 4, 3]
        base = nn.Sequential(*(Fused() for _ in range(3)))
        assert len(lorica.adapters(lorica.attach(base, again))) == 1


class TestRealAdapter:
    """The adapter that microsoft/LoRA released for RoBERTa on MNLI."""

    def test_to_peft_and_back(self, data_dir: Path, tmp_path: Path) -> None:
        source = data_dir / "roberta_base_lora_mnli.bin"
        adapter = files.read(source, 16, base_model_name_or_path="roberta-base")
        folder = lorica.write(adapter, tmp_path / "peft")
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (8, 16)
        assert config["target_modules"] == ["query", "value"]
        assert config["modules_to_save"] == ["classifier"]
        assert config["base_model_name_or_path"] == "roberta-base"
        back = files.write(lorica.read(folder), tmp_path / "back.bin")
        original = torch.load(source, map_location="cpu", weights_only=True)
        assert len(original) == 52
        assert equal(torch.load(back), original)

    @pytest.mark.filterwarnings("ignore")  # PEFT's own
    def test_acts_alike_in_lorica_and_peft(self, data_dir: Path, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'lorica[peers]'")
        transformers = pytest.importorskip("transformers")
        config = transformers.RobertaConfig(vocab_size=50, num_labels=3, max_position_embeddings=20)
        adapter = files.read(data_dir / "roberta_base_lora_mnli.bin", 16, task_type="SEQ_CLS")
        folder = lorica.write(adapter, tmp_path)
        tokens = torch.arange(3, 15).view(2, 6)

        def base() -> Any:
            torch.manual_seed(0)
            return transformers.RobertaForSequenceClassification(config).eval()

        def logits(model: Any) -> Tensor:
            with torch.no_grad():
                return model(input_ids=tokens).logits

        judge = base()
        state = torch.load(data_dir / "roberta_base_lora_mnli.bin", map_location="cpu", weights_only=True)
        judge.load_state_dict({key: t for key, t in state.items() if "lora_" not in key}, strict=False)
        for i, layer in enumerate(judge.roberta.encoder.layer):
            for name in ("query", "value"):
                at = f"roberta.encoder.layer.{i}.attention.self.{name}.lora_"
                getattr(layer.attention.self, name).weight.data += 2 * state[f"{at}B"] @ state[f"{at}A"]
        ours = logits(lorica.load(base(), folder))
        torch.testing.assert_close(ours, logits(judge), rtol=1e-4, atol=1e-4)
        theirs = logits(peft.PeftModel.from_pretrained(base(), folder).eval())
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(ours, logits(base()), atol=1e-2)


class TestConfiguration:
    """What follows from the names."""

    def derived(self, *paths: str, extras: tuple[str, ...] = ()) -> lorica.LoraConfig:
        tensors = {f"{path}.lora_{side}": torch.ones(2, 2) for path in paths for side in "AB"}
        return files.from_tensors({**tensors, **{name: torch.ones(2) for name in extras}}, 2).lora

    @pytest.mark.parametrize(
        ("paths", "targets"),
        [
            (("a.0.q", "a.1.q", "a.0.v", "a.1.v"), ["q", "v"]),
            (("q", "v"), ["q", "v"]),
            (("enc.0.q", "enc.1.q", "dec.0.q"), ["q"]),
            (("a.0.q", "a.2.q"), ["a.0.q", "a.2.q"]),
            (("a.1.q",), ["a.1.q"]),
            (("a.0.q", "a.1.q", "a.0.v"), ["a.0.q", "a.0.v", "a.1.q"]),
            (("a.0.b.0.q", "a.0.b.1.q"), ["a.0.b.0.q", "a.0.b.1.q"]),
        ],
    )
    def test_targets(self, paths: tuple[str, ...], targets: list[str]) -> None:
        assert self.derived(*paths).target_modules == targets

    @pytest.mark.parametrize(
        ("extras", "whole", "bias"),
        [
            ((), None, "none"),
            (("a.q.bias",), None, "lora_only"),
            (("a.q.bias", "a.norm.bias"), None, "all"),
            (("head.weight", "head.bias"), ["head"], "none"),
            (("head.x.weight", "head.y.weight", "head.y.bias"), ["head"], "none"),
            (("head.x.weight", "a.q.bias"), ["head.x"], "lora_only"),
            (("a.norm.weight", "a.norm.bias"), ["a.norm"], "none"),
        ],
    )
    def test_what_is_trained_whole(self, extras: tuple[str, ...], whole: list[str] | None, bias: str) -> None:
        config = self.derived("a.q", extras=extras)
        assert (config.modules_to_save, config.bias) == (whole, bias)

    def test_what_is_given_stands(self, tmp_path: Path) -> None:
        torch.save({f"a.0.q.lora_{side}": torch.ones(2, 2) for side in "AB"}, tmp_path / "x.pt")
        config = files.read(tmp_path / "x.pt", 3, target_modules=["a.0.q"], task_type="CAUSAL_LM").lora
        assert (config.target_modules, config.task_type, config.lora_alpha) == (["a.0.q"], "CAUSAL_LM", 3)

    def test_biases_and_embeddings(self, tmp_path: Path) -> None:
        """A model with everything that loralib trains comes through PEFT's files and acts the same."""
        source = nn.ModuleDict(
            {"embed": lora.Embedding(40, 6, r=2, lora_alpha=3), "up": lora.Linear(6, 12, r=2, lora_alpha=3)}
        )
        lora.mark_only_lora_as_trainable(source, bias="lora_only")
        shake(source)
        torch.save(lora.lora_state_dict(source, bias="lora_only"), tmp_path / "x.pt")
        adapter = files.read(tmp_path / "x.pt", 3, embeddings=["embed"])
        assert adapter.lora.bias == "lora_only"
        base = nn.ModuleDict({"embed": nn.Embedding(40, 6), "up": nn.Linear(6, 12)})
        base.load_state_dict({key: t for key, t in source.state_dict().items() if "lora_" not in key})
        with torch.no_grad():
            base["up"].bias.zero_()  # type: ignore[union-attr, operator]
        lorica.load(base, lorica.write(adapter, tmp_path / "peft"))
        x = torch.tensor([[1, 2], [3, 4]])
        torch.testing.assert_close(base["up"](base["embed"](x)), source["up"](source["embed"](x)))
        back = files.write(lorica.read(tmp_path / "peft"), tmp_path / "back.pt")
        assert equal(torch.load(back), lora.lora_state_dict(source, bias="lora_only"))


class TestFiles:
    """On disk."""

    @pytest.mark.parametrize("suffix", files.SUFFIXES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_every_form(self, suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
        tensors = {f"q.lora_{side}": torch.randn(2, 2).to(dtype).t() for side in "AB"}
        adapter = files.from_tensors(tensors, 2)
        path = files.write(adapter, tmp_path / f"x{suffix}")
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
        again = files.read(tmp_path, 2)
        assert equal(files.to_tensors(again), {key: t.contiguous() for key, t in tensors.items()})

    def test_alpha_is_asked_for(self, tmp_path: Path) -> None:
        torch.save({f"q.lora_{side}": torch.ones(2, 2) for side in "AB"}, tmp_path / "x.pt")
        with pytest.raises(ConfigError, match=r"does not hold lora_alpha.*only the script that trained it"):
            files.read(tmp_path / "x.pt")
        with pytest.raises(ConfigError, match="lora_alpha must be a positive number, not 0"):
            files.read(tmp_path / "x.pt", 0)

    @pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
    def test_a_full_disk_leaves_the_old_file(self, name: str, tmp_path: Path) -> None:
        small, big = (
            files.from_tensors({"q.lora_A": torch.ones(2, size), "q.lora_B": torch.ones(size, 2)}, 2)
            for size in (2, 20_000)
        )
        path = files.write(small, tmp_path / name)
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with pytest.raises(FileError, match="cannot write to"):
                files.write(big, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [file.name for file in tmp_path.iterdir()] == [name]
        assert path.read_bytes() == before

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "truncated or damaged"),
            (b"nonsense", "truncated or damaged"),
            (b"\x80\x02.", "truncated or damaged"),
            ([1, 2], "should hold tensors by name, not a list"),
            ({"a.lora_A": 3}, "should hold tensors by name"),
        ],
    )
    def test_damaged(self, content: Any, message: str, tmp_path: Path) -> None:
        path = tmp_path / "x.bin"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(FileError, match=message):
            files.read(path, 1)

    def test_nothing_is_executed(self, tmp_path: Path) -> None:
        torch.save({"a.lora_A": print}, tmp_path / "x.bin")
        with pytest.raises(FileError, match="damaged"):
            files.read(tmp_path / "x.bin", 1)

    def test_which_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileError, match="neither a file nor a folder"):
            files.read(tmp_path / "none", 1)
        with pytest.raises(FileError, match="and has: none"):
            files.read(tmp_path, 1)
        for name in ("a.pt", "b.bin"):
            (tmp_path / name).touch()
        with pytest.raises(FileError, match=r"and has: a\.pt, b\.bin"):
            files.read(tmp_path, 1)
        adapter = files.from_tensors({f"q.lora_{side}": torch.ones(2, 2) for side in "AB"}, 2)
        with pytest.raises(FileError, match=r"should be a file that ends in one of \.bin"):
            files.write(adapter, tmp_path / "folder")


def pair(**changes: Tensor) -> dict[str, Tensor]:
    return {"q.lora_A": torch.ones(2, 3), "q.lora_B": torch.ones(4, 2), **changes}


class TestRefused:
    """With the whole list, and by name."""

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"head.weight": torch.ones(2)}, "there is no lora_A or lora_B in it"),
            (pair(**{"v.lora_A": torch.ones(2, 3)}), "v: lora_B is missing"),
            (pair(**{"q.lora_B": torch.ones(4, 2, 1)}), r"B \(4, 2, 1\) are not the two halves"),
            (pair(**{"q.lora_B": torch.ones(4, 0)}), "are not the two halves"),
            (pair(**{"q.lora_B": torch.ones(4, 3)}), "do not share one rank"),
            (
                pair(**{"q.lora_A": torch.ones(4, 3)}),
                "q: holds 2 updates of rank 2 in one, as a MergedLinear",
            ),
            (pair(**{"v.lora_A.weight": torch.ones(2)}), "v.lora_A.weight: a loralib layer has"),
            (pair(**{"q.weight": torch.ones(4, 3)}), "holds weights of the base.*save lora_state_dict"),
            (pair(**{"q.lora_A": torch.full((2, 3), torch.nan)}), "NaN"),
        ],
    )
    def test_on_reading(self, tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
        torch.save(tensors, tmp_path / "x.pt")
        with pytest.raises(AdapterError, match=message):
            files.read(tmp_path / "x.pt", 1)

    @pytest.mark.parametrize(
        ("said", "message"),
        [
            ({"embeddings": ["z"]}, "z: named as embeddings, but in no key"),
            ({"enable_lora": {"c_atn": [True]}}, "c_atn: named as a fused.*did you mean 'c_attn'"),
            ({"enable_lora": {"c_attn": [True] * 3}}, "do not hold 3 updates, as was said of it"),
            ({"split": {"c_attn": ["q", "v"], "w": ["q"]}}, "w: named as"),
            ({"split": {"c_attn": ["out", "v"]}}, "out: two updates would land there"),
        ],
    )
    def test_what_is_said_of_it(
        self, said: dict[str, Any], message: str, fused: nn.Module, tmp_path: Path
    ) -> None:
        torch.save(lora.lora_state_dict(fused), tmp_path / "x.pt")
        with pytest.raises(AdapterError, match=message):
            files.read(tmp_path / "x.pt", 1, **said)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (({"c": [True]}, {"c": ["q"]}), "'c' is in enable_lora.*and in split"),
            (({"c": [False]}, None), "must name each of its updates once"),
            ((None, {"c": ["q", "q"]}), "must name each of its updates once"),
        ],
    )
    def test_parts(self, arguments: tuple[Any, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            files.fused_parts(*arguments)

    def check(self, adapter: lorica.Adapter, message: str, tmp_path: Path, **said: Any) -> None:
        with pytest.raises(AdapterError, match=message):
            files.write(adapter, tmp_path / "x.pt", **said)
        assert not list(tmp_path.iterdir())

    def test_magnitudes(self, tmp_path: Path) -> None:
        model = adapted(Toy(), lorica.LoraConfig(r=2, target_modules=["up"], use_dora=True))
        self.check(
            lorica.extract(model), r"blocks.0.up: loralib has no place for DoRA's magnitudes", tmp_path
        )

    def test_what_a_factor_may_have_beside(self, tmp_path: Path) -> None:
        adapter = files.from_tensors(pair(), 2)
        biased = {path: dataclasses.replace(f, bias=torch.ones(4)) for path, f in adapter.factors.items()}
        beside = dataclasses.replace(adapter, factors=biased)
        self.check(beside, "q: loralib has no place for its bias", tmp_path)

    def test_convolutions(self, tmp_path: Path) -> None:
        model = adapted(nn.Sequential(nn.Conv1d(2, 2, 3)), lorica.LoraConfig(r=2, target_modules=["0"]))
        self.check(lorica.extract(model), "0: loralib lays out a conv layer's factors otherwise", tmp_path)

    @pytest.mark.parametrize(
        ("change", "said", "message"),
        [
            (lambda t: None, {"enable_lora": {"q": QV}}, "is not made of 2 blocks"),
            (lambda t: None, {"enable_lora": {"z": QV}}, "z: the adapter has nothing of which it is made"),
            (lambda t: None, {"split": {"c_attn": ["q", "k"]}}, "c_attn: there is no update for k"),
            (
                lambda t: t.update({"k.lora_A": torch.ones(1, 3), "k.lora_B": torch.ones(4, 1)}),
                {"split": {"c_attn": ["q", "k"]}},
                "share their shape, rank and alpha, and here q has r=2, scale 0.5, k has r=1, scale 1",
            ),
        ],
    )
    def test_fused(
        self, change: Callable[[dict[str, Tensor]], None], said: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        tensors = pair()
        change(tensors)
        self.check(files.from_tensors(tensors, 1), message, tmp_path, **said)

    def test_ranks_and_alphas_may_differ(self) -> None:
        config = lorica.LoraConfig(
            r=2,
            target_modules=["up", "down"],
            rank_pattern={"up": 4},
            alpha_pattern={"down": 3},
            use_rslora=True,
        )
        adapter = lorica.extract(adapted(Toy(), config))
        tensors = files.to_tensors(adapter)
        assert tensors["blocks.0.up.lora_A"].shape == (4, 6)
        assert len(tensors) == 8


def test_safetensors_is_read_too(tmp_path: Path) -> None:
    safetensors.torch.save_file(pair(), tmp_path / "x.safetensors")
    assert files.read(tmp_path / "x.safetensors", 6).factors["q"].scale == 3
