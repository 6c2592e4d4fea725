"""Which modules a configuration means, and what is said when it means none."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny import Toy, record, transformer
from torch import nn

import lorica
from lorica.errors import ConfigError, LoricaWarning, TargetError
from lorica.pieces import Search, resolve


def settled(found: Search) -> Any:
    """The configuration with what it means written into it."""
    return found.settled()


def targeted(model: nn.Module, **settings: Any) -> list[str]:
    """Paths that a configuration adapts."""
    return [target.path for target in resolve(model, lorica.LoraConfig(r=2, **settings)).targets]


def refusal(model: nn.Module, **settings: Any) -> str:
    """What is said to a configuration that is refused; the model stays what it was."""
    before = record(model)
    with pytest.raises(TargetError) as error:
        lorica.adapt(model, lorica.LoraConfig(r=2, **settings))
    assert record(model) == before
    return str(error.value)


class TestNames:
    """Lists, regular expressions, exclusion."""

    def test_a_name_means_every_module_that_ends_with_it(self) -> None:
        assert targeted(Toy(), target_modules=["up"]) == ["blocks.0.up", "blocks.1.up"]
        assert targeted(Toy(), target_modules=["1.up", "embed"]) == ["embed", "blocks.1.up"]

    def test_a_name_is_whole_dotted_parts(self) -> None:
        model = nn.ModuleDict({"q": nn.Linear(2, 2), "seq": nn.Linear(2, 2)})
        assert targeted(model, target_modules=["q"]) == ["q"]

    def test_a_string_is_a_regular_expression_over_the_whole_path(self) -> None:
        assert targeted(Toy(), target_modules=r"blocks\.\d\.(up|down)") == [
            f"blocks.{i}.{part}" for i in range(2) for part in ("up", "down")
        ]

    def test_exclusion_takes_names_or_an_expression(self) -> None:
        assert targeted(Toy(), target_modules=["up"], exclude_modules=["0.up"]) == ["blocks.1.up"]
        assert targeted(Toy(), target_modules=["up"], exclude_modules=r".*\.1\..*") == ["blocks.0.up"]

    def test_modules_to_save_are_not_adapted(self) -> None:
        assert targeted(
            Toy(), target_modules="all-linear", modules_to_save=["head"], exclude_modules=["down"]
        ) == [
            "blocks.0.up",
            "blocks.1.up",
        ]

    def test_patterns_set_rank_and_alpha(self) -> None:
        config = lorica.LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=["up", "down"],
            rank_pattern={"0.up": 3, r"blocks\.\d\.up": 5},
            alpha_pattern={"down": 1},
        )
        factors = lorica.extract(lorica.adapt(Toy(), config)).factors
        assert {path: (f.r, f.scale) for path, f in factors.items()} == {
            "blocks.0.up": (3, 4 / 3),
            "blocks.1.up": (5, 4 / 5),
            "blocks.0.down": (2, 1 / 2),
            "blocks.1.down": (2, 1 / 2),
        }

    def test_the_names_of_an_attention_mean_its_output_too(self) -> None:
        model = nn.TransformerEncoderLayer(8, 2, 12)
        assert targeted(model, target_modules=["self_attn"]) == ["self_attn", "self_attn.out_proj"]
        assert targeted(model, target_modules=["out_proj"]) == ["self_attn.out_proj"]
        assert targeted(model) == ["self_attn", "self_attn.out_proj"]
        assert targeted(model, target_modules=["self_attn"], exclude_modules=["out_proj"]) == ["self_attn"]
        both = ["self_attn", "linear1"]
        assert targeted(model, target_modules=both, exclude_modules=["self_attn"]) == ["linear1"]
        both = ["out_proj", "linear1"]
        with pytest.warns(LoricaWarning, match="no modules were excluded"):
            kept = targeted(model, target_modules=both, exclude_modules=["self_attn"])
        assert sorted(kept) == ["linear1", "self_attn.out_proj"]

    def test_the_settled_names_of_an_attention_leave_its_output_to_it(self) -> None:
        model = nn.TransformerEncoderLayer(8, 2, 12)
        assert settled(resolve(model, lorica.LoraConfig())).target_modules == ["self_attn"]
        found = resolve(model, lorica.LoraConfig(target_modules="all-linear"))
        assert settled(found).target_modules == ["linear1", "linear2", "self_attn"]
        assert {target.path for target in found.targets} == {
            "linear1",
            "linear2",
            "self_attn",
            "self_attn.out_proj",
        }


class TestChangedSince:
    """A later adapter of an equal configuration sees the model as it has become."""

    CONFIG = lorica.LoraConfig(r=2, target_modules=["up"])

    def test_a_module_that_was_replaced(self) -> None:
        model = lorica.adapt(Toy(dim=6), self.CONFIG, "a")
        fresh = nn.Linear(6, 20)
        model.set_submodule("blocks.0.up", fresh)
        model.set_submodule("blocks.0.down", nn.Linear(20, 6))
        lorica.adapt(model, self.CONFIG, "b")
        assert lorica.extract(model, "b").factors["blocks.0.up"].B.shape == (20, 2)
        assert model.get_submodule("blocks.0.up") is fresh
        lorica.detach(model)
        assert type(fresh) is nn.Linear

    def test_a_module_that_was_added_and_one_that_is_gone(self) -> None:
        model = lorica.adapt(Toy(blocks=2), self.CONFIG, "a")
        model.blocks.append(nn.ModuleDict({"up": nn.Linear(6, 12), "down": nn.Linear(12, 6)}))
        del model.blocks[0]
        lorica.adapt(model, self.CONFIG, "b")
        assert list(lorica.extract(model, "b").factors) == ["blocks.0.up", "blocks.1.up"]
        assert list(lorica.extract(model, "a").factors) == ["blocks.0.up"]


class TestBlocks:
    """`layers_to_transform` and `layers_pattern`."""

    def test_indices_choose_blocks(self) -> None:
        assert targeted(Toy(), target_modules=["up"], layers_to_transform=1) == ["blocks.1.up"]
        assert targeted(Toy(blocks=3), target_modules=["up"], layers_to_transform=[0, 2]) == [
            "blocks.0.up",
            "blocks.2.up",
        ]

    def test_they_combine_with_the_usual_targets(self) -> None:
        paths = targeted(transformer("bert"), layers_to_transform=[1])
        assert paths == ["encoder.layer.1.attention.self.query", "encoder.layer.1.attention.self.value"]

    def test_a_pattern_names_the_list_that_is_counted(self) -> None:
        model = nn.ModuleDict({"first": nn.ModuleList([Toy()]), "second": nn.ModuleList([Toy()])})
        assert targeted(model, target_modules=["up"], layers_to_transform=1, layers_pattern="blocks") == [
            "first.0.blocks.1.up",
            "second.0.blocks.1.up",
        ]
        assert (
            len(
                targeted(
                    model, target_modules=["up"], layers_to_transform=0, layers_pattern=["first", "second"]
                )
            )
            == 4
        )

    def test_a_pattern_may_be_an_expression(self) -> None:
        """As PEFT has it: of the end of the list's path; the outermost list that it means is counted."""
        model = nn.Module()
        model.blocks = nn.ModuleList([Toy(blocks=1), Toy(blocks=2)])
        paths = [
            targeted(model, target_modules=["up"], layers_to_transform=1, layers_pattern=pattern)
            for pattern in ("blocks", r"\d+\.blocks")
        ]
        assert paths == [["blocks.1.blocks.0.up", "blocks.1.blocks.1.up"], ["blocks.1.blocks.1.up"]]

    def test_the_outermost_list_is_counted_without_one(self) -> None:
        paths = targeted(transformer("t5"), layers_to_transform=1)
        assert len(paths) == 6
        assert all(".block.1." in path for path in paths)

    def test_a_block_that_is_not_there_is_named(self) -> None:
        message = refusal(Toy(), target_modules=["up"], layers_to_transform=[1, 7])
        assert "layers_to_transform names block 7; the targeted modules are in blocks 0, 1" in message

    def test_a_list_that_is_not_there_is_named(self) -> None:
        message = refusal(Toy(), target_modules=["up"], layers_to_transform=[0], layers_pattern="layers")
        assert "in layers" in message
        assert "in blocks none" in message


class TestRefused:
    """Nothing that matches nothing passes in silence."""

    def test_nothing_matches(self) -> None:
        message = refusal(Toy(), target_modules=["upp"])
        assert "target_modules names 'upp', which matches no module; did you mean 'up'?" in message
        assert "adaptable modules: embed, up, down, head" in message

    def test_one_string_that_is_a_name_is_told_apart_from_a_list(self) -> None:
        message = refusal(Toy(), target_modules="up")
        assert "one string is a regular expression of whole paths: give ['up']" in message

    @pytest.mark.parametrize("given", [{"r": 8}, "lora", 8, [{"r": 8}], object()])
    def test_what_is_no_configuration(self, given: Any) -> None:
        model = Toy()
        before = record(model)
        with pytest.raises(ConfigError, match=r"a configuration is a lorica\.LoraConfig.*, not a \w+"):
            lorica.adapt(model, given)
        assert record(model) == before

    def test_one_of_several_matches_nothing(self) -> None:
        message = refusal(transformer("bert"), target_modules=["query", "velue", "key"])
        assert "'velue'" in message
        assert "'value'" in message

    def test_an_expression_matches_nothing(self) -> None:
        message = refusal(Toy(), target_modules=r"block\.\d\.up")
        assert r"target_modules='block\\.\\d\\.up' matches no module" in message

    def test_a_container_shows_what_is_inside(self) -> None:
        message = refusal(Toy(), target_modules=["blocks.0"])
        assert "blocks.0 is a ModuleDict, which cannot be adapted" in message
        assert "Inside it are: blocks.0.up, blocks.0.down" in message

    def test_a_kind_that_cannot_be_adapted_is_named(self) -> None:
        assert "norm is a LayerNorm, which cannot be adapted (lorica adapts nn.Linear" in refusal(
            Toy(), target_modules=["norm"]
        )

    def test_an_exclusion_that_matches_nothing(self) -> None:
        assert "exclude_modules names 'dwn'" in refusal(Toy(), target_modules=["up"], exclude_modules=["dwn"])
        assert "exclude_modules='x.*' matches no module" in refusal(
            Toy(), target_modules=["up"], exclude_modules="x.*"
        )

    def test_an_exclusion_that_leaves_nothing(self) -> None:
        assert "no module is left to adapt" in refusal(Toy(), target_modules=["up"], exclude_modules=["up"])

    @pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
    def test_a_pattern_that_matches_no_adapted_module(self, name: str) -> None:
        message = refusal(Toy(), target_modules=["up"], **{name: {"up": 4, "down": 4}})
        assert f"{name} has 'down', which matches no adapted module" in message

    def test_a_module_to_save_that_is_not_there(self) -> None:
        message = refusal(Toy(), target_modules=["up"], modules_to_save=["haed"])
        assert "modules_to_save names 'haed', which the model does not have; did you mean 'head'?" in message

    def test_a_target_inside_a_module_to_save(self) -> None:
        assert "names 'head', which matches no module" in refusal(
            Toy(), target_modules=["up", "head"], modules_to_save=["head"]
        )

    def test_whole_and_low_rank_do_not_mix_between_adapters(self) -> None:
        model = lorica.adapt(Toy(), lorica.LoraConfig(r=2, target_modules=["up", "head"]), "a")
        before = record(model)
        with pytest.raises(TargetError, match="head cannot be trained whole: another adapter"):
            lorica.adapt(model, lorica.LoraConfig(target_modules=["up"], modules_to_save=["head"]), "b")
        assert record(model) == before
        lorica.detach(model)
        lorica.adapt(model, lorica.LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"]), "a")
        with pytest.raises(TargetError, match="head is trained whole by another adapter"):
            lorica.adapt(model, lorica.LoraConfig(target_modules=["head"]), "b")

    def test_an_attention_without_one_weight(self) -> None:
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=4)})
        assert "target its out_proj" in refusal(model, target_modules=["attention"])
        assert targeted(model, target_modules=["out_proj"]) == ["attention.out_proj"]

    def test_dropout_where_there_is_no_input_to_drop(self) -> None:
        model = nn.TransformerEncoderLayer(8, 2, 12)
        assert "set lora_dropout=0" in refusal(model, target_modules=["self_attn"], lora_dropout=0.1)

    def test_a_model_with_nothing_to_adapt(self) -> None:
        assert "adaptable modules: none" in refusal(nn.Sequential(nn.ReLU()), target_modules=["x"])
        assert "has no linear layer besides its head" in refusal(
            nn.Sequential(nn.ReLU()), target_modules="all-linear"
        )


class TestUsual:
    """None: the architecture's query and value projections."""

    @pytest.mark.parametrize(
        ("name", "leaves"),
        [
            ("bert", {"query", "value"}),
            ("roberta", {"query", "value"}),
            ("distilbert", {"q_lin", "v_lin"}),
            ("gpt2", {"c_attn"}),
            ("llama", {"q_proj", "v_proj"}),
            ("t5", {"q", "v"}),
            ("vit", {"q_proj", "v_proj"}),
            ("opt", {"q_proj", "v_proj"}),
        ],
    )
    def test_known_architectures(self, name: str, leaves: set[str]) -> None:
        model = transformer(name)
        if name == "vit" and not any(path.endswith("q_proj") for path, _ in model.named_modules()):
            leaves = {"query", "value"}  # its names before transformers 5
        paths = targeted(model)
        assert {path.rpartition(".")[2] for path in paths} == leaves
        blocks = 2 * 3 if name == "t5" else 2  # encoder, decoder and cross attention
        assert len(paths) == blocks * len(leaves)

    def test_the_configuration_then_names_them(self) -> None:
        model = lorica.adapt(transformer("t5"), lorica.LoraConfig(r=2))
        assert lorica.extract(model).lora.target_modules == ["q", "v"]

    def test_an_unknown_model_is_told_to_say(self) -> None:
        message = refusal(Toy())
        assert 'knows no usual targets for Toy. Or take "all-linear"' in message
        assert "embed, up, down, head" in message


class TestAllLinear:
    """Every linear layer but the output head."""

    @pytest.mark.parametrize("spelling", ["all-linear", "All-Linear"])
    def test_of_a_plain_model(self, spelling: str) -> None:
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "conv": nn.Conv1d(2, 2, 1), "embed": nn.Embedding(2, 2)})
        assert targeted(model, target_modules=spelling) == ["a"]

    @pytest.mark.parametrize(
        ("name", "head", "layers"),
        [
            ("llama", "lm_head", 2 * 7),
            ("gpt2", "lm_head", 2 * 4),
            ("opt", "lm_head", 2 * 6),
            ("bert-masked", "cls.predictions.decoder", 2 * 6 + 1),
        ],
    )
    def test_leaves_out_what_a_language_model_ends_in(self, name: str, head: str, layers: int) -> None:
        paths = targeted(transformer(name), target_modules="all-linear")
        assert head not in paths
        assert len(paths) == layers

    @pytest.mark.parametrize(
        "name", ["bert-classifier", "roberta", "distilbert", "llama-classifier", "gpt2-classifier"]
    )
    def test_leaves_out_a_head_trained_whole(self, name: str) -> None:
        found = resolve(
            transformer(name), lorica.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
        )
        assert found.whole
        paths = [target.path for target in found.targets]
        assert not any(path.startswith(tuple(found.whole)) for path in paths)
        assert set(settled(found).modules_to_save or ()) == {path.rpartition(".")[2] for path in found.whole}

    @pytest.mark.parametrize("name", ["bert", "bert-classifier", "gpt2", "t5", "llama", "vit", "opt"])
    def test_the_configuration_then_names_the_same_modules(self, name: str) -> None:
        model = transformer(name)
        found = resolve(model, lorica.LoraConfig(target_modules="all-linear"))
        assert isinstance(settled(found).target_modules, list)
        assert targeted(model, target_modules=settled(found).target_modules) == [
            t.path for t in found.targets
        ]


class TestTasks:
    """A task's new head is trained whole."""

    @pytest.mark.parametrize(
        ("name", "task", "saved"),
        [
            ("bert-classifier", "SEQ_CLS", ["classifier"]),
            ("roberta", "SEQ_CLS", ["classifier"]),
            ("distilbert", "SEQ_CLS", ["pre_classifier", "classifier"]),
            ("llama-classifier", "SEQ_CLS", ["score"]),
            ("vit", "SEQ_CLS", ["classifier"]),
            ("bert-tokens", "TOKEN_CLS", ["classifier"]),
            ("bert-answers", "QUESTION_ANS", ["qa_outputs"]),
            ("llama", "CAUSAL_LM", []),
            ("t5", "SEQ_2_SEQ_LM", []),
            ("bert", "FEATURE_EXTRACTION", []),
        ],
    )
    def test_head_of_a_task(self, name: str, task: str, saved: list[str]) -> None:
        assert list(resolve(transformer(name), lorica.LoraConfig(task_type=task)).whole) == saved

    def test_both_names_that_peft_writes_are_fine(self) -> None:
        config = lorica.LoraConfig(task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
        assert list(resolve(transformer("bert-classifier"), config).whole) == ["classifier"]


class TestATableThatOthersLookUpIn:
    """T5's `shared`: it holds the weight, and is never called."""

    def test_it_is_refused_by_name(self) -> None:
        message = "shared only holds the table that encoder.embed_tokens, decoder.embed_tokens look up in"
        assert message in refusal(transformer("t5"), target_modules=["shared"])
        assert message in refusal(transformer("t5"), target_modules=["q"], modules_to_save=["shared"])

    def test_those_that_look_up_are_adapted(self) -> None:
        paths = targeted(transformer("t5"), target_modules=["embed_tokens"])
        assert paths == ["encoder.embed_tokens", "decoder.embed_tokens"]

    def test_a_tied_head_is_no_table(self) -> None:
        assert targeted(transformer("gpt2"), target_modules=["wte"]) == ["transformer.wte"]


def test_messages_are_cut_where_a_model_has_many_names() -> None:
    model = nn.ModuleDict({f"layer_{i}": nn.Linear(1, 1) for i in range(100)})
    message = refusal(model, target_modules=["other"])
    assert "(80 more)" in message
    assert len(re.findall("layer_", message)) < 30


def test_conv1d_sets_fan_in_fan_out() -> None:
    model = lorica.adapt(transformer("gpt2"), lorica.LoraConfig(r=2))
    assert lorica.extract(model).lora.fan_in_fan_out is True
    model = lorica.adapt(transformer("bert"), lorica.LoraConfig(r=2, fan_in_fan_out=True))
    assert lorica.extract(model).lora.fan_in_fan_out is False


def test_a_shared_module_is_adapted_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model = lorica.adapt(Shared(), lorica.LoraConfig(r=2, target_modules="all-linear"))
    assert list(lorica.extract(model).factors) == ["a"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * 3
