"""`LoraConfig`: what it accepts, what it refuses when it is made, and its JSON."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica import LoraConfig
from lorica.config import BIASES, TASK_TYPES, matches_pattern
from lorica.errors import ConfigError, LoricaWarning, UnknownField

words = st.text("abcdefghij_", min_size=1, max_size=6)
names = st.lists(words, min_size=1, max_size=3)
alphas = st.one_of(st.integers(1, 64), st.floats(0.01, 64))
configs = st.builds(
    LoraConfig,
    r=st.integers(1, 256),
    lora_alpha=alphas,
    lora_dropout=st.floats(0, 0.99),
    target_modules=st.one_of(st.none(), st.just("all-linear"), words, names),
    exclude_modules=st.one_of(st.none(), words, names),
    bias=st.sampled_from(BIASES),
    use_rslora=st.booleans(),
    modules_to_save=st.one_of(st.none(), names),
    init_lora_weights=st.sampled_from([True, False, "gaussian", "pissa_niter_4", "olora", "loftq", "eva"]),
    rank_pattern=st.dictionaries(words, st.integers(1, 64), max_size=2),
    alpha_pattern=st.dictionaries(words, alphas, max_size=2),
    task_type=st.one_of(st.none(), st.sampled_from(TASK_TYPES)),
    inference_mode=st.booleans(),
    base_model_name_or_path=st.one_of(st.none(), words),
)


@given(configs)
def test_json_there_and_back(config: LoraConfig) -> None:
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_defaults_are_pefts() -> None:
    expected = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_dora": False,
        "target_modules": None,
        "exclude_modules": None,
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": False,
        "task_type": None,
        "inference_mode": False,
        "base_model_name_or_path": None,
        "revision": None,
    }
    got = LoraConfig().to_dict()
    assert {field: got[field] for field in expected} == expected


class TestRefused:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("r", 0),
            ("r", -1),
            ("r", 8.0),
            ("r", True),
            ("r", "8"),
            ("lora_alpha", 0),
            ("lora_alpha", -2),
            ("lora_alpha", math.nan),
            ("lora_alpha", math.inf),
            ("lora_alpha", "16"),
            ("lora_dropout", 1.0),
            ("lora_dropout", -0.1),
            ("lora_dropout", math.nan),
            ("lora_dropout", False),
            ("bias", "some"),
            ("bias", None),
            ("init_lora_weights", "xavier"),
            ("init_lora_weights", 1),
            ("use_rslora", 1),
            ("lora_bias", "none"),
            ("fan_in_fan_out", "yes"),
            ("inference_mode", None),
            ("target_modules", []),
            ("target_modules", ""),
            ("target_modules", [""]),
            ("target_modules", [1]),
            ("target_modules", 3),
            ("exclude_modules", [None]),
            ("target_parameters", "experts.weight"),
            ("target_parameters", [""]),
            ("modules_to_save", "classifier"),
            ("modules_to_save", [1]),
            ("rank_pattern", {"query": 0}),
            ("rank_pattern", {"query": 2.5}),
            ("rank_pattern", {3: 8}),
            ("rank_pattern", ["query"]),
            ("rank_pattern", 4),
            ("alpha_pattern", {"query": 0}),
            ("alpha_pattern", {"query": math.inf}),
            ("alpha_pattern", "query"),
            ("layers_to_transform", -1),
            ("layers_to_transform", [0, -1]),
            ("layers_to_transform", True),
            ("layers_to_transform", "0"),
            ("layers_to_transform", []),
        ],
    )
    def test_a_wrong_value_is_named_with_its_field(self, field: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=rf"^{field} must be .*, not ") as error:
            LoraConfig(**{field: value})
        assert str(error.value).endswith(repr(value))

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("target_modules", "query("),
            ("exclude_modules", "*"),
            ("rank_pattern", {"[": 4}),
            ("alpha_pattern", {"(?i)query": 4}),
        ],
    )
    def test_a_broken_regular_expression(self, field: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=f"{field} holds .* not a regular expression"):
            LoraConfig(**{field: value})

    def test_layers_pattern_alone(self) -> None:
        with pytest.raises(ConfigError, match="`layers_to_transform` must also be specified"):
            LoraConfig(layers_pattern="h")

    @pytest.mark.parametrize("pattern", ["all-linear", r".*\.query"])
    def test_block_indices_beside_a_regular_expression(self, pattern: str) -> None:
        with pytest.raises(ConfigError, match="cannot be used when `target_modules` is a str"):
            LoraConfig(target_modules=pattern, layers_to_transform=[0])

    def test_a_task_that_there_is_not(self) -> None:
        with pytest.raises(ConfigError, match=r"Invalid task type: 'CLASSIFY'. Must be one of .* SEQ_CLS, "):
            LoraConfig(task_type="CLASSIFY")

    @pytest.mark.parametrize("start", ["Gaussian", "OLoRA", "PiSSA", "PISSA_niter_4", "EVA"])
    def test_the_case_of_a_start_does_not_matter(self, start: str) -> None:
        assert LoraConfig(init_lora_weights=start).init_lora_weights == start.lower()

    def test_a_start_that_is_not_carried(self) -> None:
        with pytest.raises(ConfigError, match=r"MiCA.*is not carried"):
            LoraConfig(init_lora_weights="mica")

    def test_a_wrong_change(self) -> None:
        with pytest.raises(ConfigError, match="r must be"):
            LoraConfig().replace(r=0)

    def test_also_by_those_who_expect_a_value_error(self) -> None:
        with pytest.raises(ValueError, match="r must be"):
            LoraConfig(r=0)


class TestNormalised:
    def test_collections_become_lists(self) -> None:
        config = LoraConfig(target_modules=("b", "a"), modules_to_save=iter(["c"]))  # pyright: ignore[reportArgumentType]
        assert config.target_modules == ["b", "a"]
        assert config.modules_to_save == ["c"]

    def test_a_set_is_sorted_so_that_files_are_the_same_every_time(self) -> None:
        config = LoraConfig(target_modules={"value", "key", "query"})  # pyright: ignore[reportArgumentType]
        assert config.target_modules == ["key", "query", "value"]

    def test_what_was_given_is_copied(self) -> None:
        targets, ranks = ["query"], {"query": 4}
        config = LoraConfig(target_modules=targets, rank_pattern=ranks)
        targets.append("key")
        ranks["query"] = 2
        assert (config.target_modules, config.rank_pattern) == (["query"], {"query": 4})

    def test_a_task_type_of_pefts_enumeration(self) -> None:
        class Task(enum.StrEnum):
            SEQ_CLS = "SEQ_CLS"

        assert LoraConfig(task_type=Task.SEQ_CLS).to_dict()["task_type"] == "SEQ_CLS"

    def test_null_patterns(self) -> None:
        assert LoraConfig(rank_pattern=None).rank_pattern == {}  # pyright: ignore[reportArgumentType]


class TestRankAndScale:
    def test_without_patterns(self) -> None:
        config = LoraConfig(r=4, lora_alpha=8)
        assert (config.rank("any.path"), config.scale("any.path")) == (4, 2.0)

    def test_rslora_divides_by_the_root(self) -> None:
        assert LoraConfig(r=16, lora_alpha=8, use_rslora=True).scale("x") == 2.0

    def test_patterns_change_both(self) -> None:
        config = LoraConfig(r=4, lora_alpha=8, rank_pattern={"query": 16}, alpha_pattern={"query": 4})
        assert (config.rank("layer.0.query"), config.scale("layer.0.query")) == (16, 0.25)
        assert (config.rank("layer.0.key"), config.scale("layer.0.key")) == (4, 2.0)

    def test_the_first_match_wins(self) -> None:
        config = LoraConfig(rank_pattern={r"layer\.0\.query": 2, "query": 3, "que.*": 4})
        assert [config.rank(p) for p in ("layer.0.query", "layer.1.query", "layer.1.queer")] == [2, 3, 4]

    @pytest.mark.parametrize(
        ("key", "path", "speaks"),
        [
            ("query", "query", True),
            ("query", "a.query", True),
            ("query", "a.my_query", False),
            ("query", "a.query.dense", False),
            ("a|b", "x.b", True),
            ("a|b", "x.ab", False),
            (r"\d+\.up", "blocks.10.up", True),
            (r"^blocks\.0\.up", "blocks.0.up", True),
            (r"^blocks\.0\.up", "model.blocks.0.up", False),
        ],
    )
    def test_a_key_means_a_whole_name_or_the_end_from_a_dot_on(
        self, key: str, path: str, speaks: bool
    ) -> None:
        assert matches_pattern(key, path) == speaks


class TestFromDict:
    def test_a_file_of_pefts(self) -> None:
        config = LoraConfig.from_dict(
            {
                "peft_type": "LORA",
                "peft_version": "0.21.2",
                "auto_mapping": {"base_model_class": "BertModel"},
                "r": 4,
                "target_modules": ["value", "query"],
                "rank_pattern": None,
                "layers_to_transform": None,
                "megatron_core": "megatron.core",
                "megatron_config": None,
                "loftq_config": {},
                "use_dora": False,
                "qalora_group_size": 16,
                "runtime_config": {"ephemeral_gpu_offload": False},
                "something_of_tomorrow": None,
            }
        )
        assert config == LoraConfig(r=4, target_modules=["value", "query"])

    def test_what_cannot_be_honoured_is_refused_by_name(self) -> None:
        with pytest.raises(ConfigError, match="use_qalora"):
            LoraConfig.from_dict({"peft_type": "LORA", "use_qalora": True})

    def test_a_field_of_a_later_peft_is_left_out_with_a_warning_that_names_it(self) -> None:
        with pytest.warns(LoricaWarning, match=r"\['of_tomorrow'\].*of_tomorrow=1") as seen:
            config = LoraConfig.from_dict({"peft_type": "LORA", "r": 4, "of_tomorrow": 1, "unset": False})
        assert config == LoraConfig(r=4)
        assert len(seen) == 1

    def test_an_unknown_field_of_what_nobody_says_is_pefts(self) -> None:
        with pytest.raises(UnknownField, match=r"required keys: \{'peft_type'\}.*foo='bar'"):
            LoraConfig.from_dict({"r": 4, "foo": "bar"})

    @pytest.mark.parametrize("merges", [True, False])
    def test_a_file_of_peft_before_its_fourth_version(self, merges: bool) -> None:
        old = {"enable_lora": None, "merge_weights": merges, "peft_type": "LORA", "r": 2}
        assert LoraConfig.from_dict(old) == LoraConfig(r=2)

    def test_an_update_of_parts_of_a_fused_projection(self) -> None:
        with pytest.raises(ConfigError, match="enable_lora"):
            LoraConfig.from_dict({"enable_lora": [True, False, True], "peft_type": "LORA"})

    @pytest.mark.parametrize(
        ("key", "value", "method"),
        [
            ("velora_config", {"num_groups": 8}, "VeLoRA"),
            ("kasa_config", {"beta": 1e-3}, "KaSA"),
            ("alora_invocation_tokens", [4, 5], "activated LoRA"),
            ("monteclora_config", {"num_samples": 2}, "MonteCLoRA"),
            ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
            ("arrow_config", {"top_k": 3}, "Arrow"),
            ("use_qalora", True, "QA-LoRA"),
            ("qalora_group_size", 8, "QA-LoRA"),
            ("megatron_config", {"hidden_size": 8}, "Megatron"),
        ],
    )
    @pytest.mark.parametrize("make", [LoraConfig.from_dict, lambda fields: LoraConfig(**fields)])
    def test_a_method_of_pefts_that_is_not_carried(
        self, make: Callable[[dict[str, Any]], LoraConfig], key: str, value: Any, method: str
    ) -> None:
        with pytest.raises(ConfigError, match=rf"{key}=.*{method}.* is not carried; \w+"):
            make({key: value, "r": 4})

    def test_a_name_that_nobody_has_is_pythons_own_error(self) -> None:
        with pytest.raises(TypeError, match="lora_alhpa"):
            LoraConfig(lora_alhpa=3)  # pyright: ignore[reportCallIssue]

    def test_a_misspelt_field_is_told_its_neighbour(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'lora_alpha'"):
            LoraConfig.from_dict({"lora_alhpa": 16})

    def test_another_method(self) -> None:
        with pytest.raises(ConfigError, match="'IA3'; this is not a LoRA adapter"):
            LoraConfig.from_dict({"peft_type": "IA3"})

    def test_a_wrong_value_in_a_file(self) -> None:
        with pytest.raises(ConfigError, match="r must be"):
            LoraConfig.from_dict({"peft_type": "LORA", "r": 0})
