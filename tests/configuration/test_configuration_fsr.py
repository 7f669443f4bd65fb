"""`FSRConfig` and the family configs that hold it: allowed values, what overrides what, lossless saving."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoConfig, CLIPTextConfig, LlavaConfig

from fsr_hf import (
    FSRConfig,
    FSRLlavaConfig,
    FSRLlavaNextConfig,
    FSRLlavaVideoConfig,
    FSRQwen2_5_VLConfig,
    FSRQwen3VLConfig,
)


DEFAULTS = {
    "enabled": True,
    "num_visual_tokens": None,
    "retention_ratio": None,
    "alpha": 3.0,
    "beta": 1.0,
    "rho": 0.9,
    "focus_limit": 0.5,
    "uniform_scan": 0.0,
    "kappa": 1.0,
    "focus_mass": "all",
    "relevance": None,
    "invert_relevance": True,
    "text_encoder_config": None,
    "pool": None,
    "positions": None,
}
# What a family puts in the place of None, and of defaults.
CLIP_SETTINGS = {"focus_limit": 0.25, "uniform_scan": 1.0, "kappa": None}
FAMILY_DEFAULTS = {
    FSRLlavaConfig: {"num_visual_tokens": 128, "pool": "item", "positions": "original", **CLIP_SETTINGS},
    FSRLlavaNextConfig: {"retention_ratio": 1 / 9, "pool": "view", "positions": "original", **CLIP_SETTINGS},
    FSRQwen2_5_VLConfig: {
        "retention_ratio": 0.5,
        "relevance": "none",
        "pool": "item",
        "positions": "original",
    },
    FSRQwen3VLConfig: {
        "retention_ratio": 0.5,
        "relevance": "none",
        "pool": "item",
        "positions": "original",
    },
    FSRLlavaVideoConfig: {
        "retention_ratio": 0.2,
        "relevance": "none",
        "pool": "item",
        "positions": "compact",
    },
}
BUDGETS = ("num_visual_tokens", "retention_ratio")

ALLOWED = {
    "enabled": [True, False],
    "num_visual_tokens": [1, 128, 10**6, None],
    "retention_ratio": [1e-9, 0.5, 1, 1.0, None],
    "alpha": [0, 0.5, 3, 100.0],
    "beta": [0, 0.5, 1, 100.0],
    "rho": [1e-9, 0.9, 1, 1.0],
    "focus_limit": [1e-9, 0.5, 1, 1.0],
    "uniform_scan": [0, 0.5, 1, 5.0],
    "kappa": [0, 0.5, 1, 5.0, None],
    "focus_mass": ["all", "budget"],
    "relevance": ["clip_values", "clip", "none", None],
    "invert_relevance": [True, False],
    "text_encoder_config": [None, {}, {"hidden_size": 32}, CLIPTextConfig(hidden_size=48)],
    "pool": ["view", "item", None],
    "positions": ["compact", "original", None],
}
NO_NUMBERS = [True, False, None, "1", [1], math.nan, math.inf, -math.inf, np.float32(1.0)]
REFUSED = {
    "enabled": [None, 0, 1, "true", "no"],
    "num_visual_tokens": [0, -1, 64.0, 0.5, True, False, "64", [64], math.inf],
    "retention_ratio": [0, 0.0, -0.1, 1.0001, 50, *(value for value in NO_NUMBERS if value is not None)],
    "alpha": [-1e-9, -1, *NO_NUMBERS],
    "beta": [-1e-9, -1, *NO_NUMBERS],
    "rho": [0, -0.1, 1.0001, *NO_NUMBERS],
    "focus_limit": [0, -0.1, 1.0001, *NO_NUMBERS],
    "uniform_scan": [-1e-9, -1, *NO_NUMBERS],
    "kappa": [-1e-9, -1, *(value for value in NO_NUMBERS if value is not None)],
    "focus_mass": ["none", "ALL", None, 0, True],
    "relevance": ["siglip", "None", False, 0],
    "invert_relevance": [None, 0, 1, "false"],
    "text_encoder_config": ["openai/clip-vit-large-patch14", 3, True, ["hidden_size"]],
    "pool": ["frame", True, 0],
    "positions": ["rope", True, 0],
}
TEXT = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "projection_dim": 8, "vocab_size": 60}


@pytest.fixture(params=list(FAMILY_DEFAULTS), ids=lambda cls: cls.model_type)
def family(request):
    return request.param


def default_budget(family):
    return {name: FAMILY_DEFAULTS[family].get(name) for name in BUDGETS}


def budget_of(fsr_config):
    return {name: getattr(fsr_config, name) for name in BUDGETS}


def text_tower(family):
    """`fsr_config` with a text tower, where the family can have one."""
    return {} if "relevance" in FAMILY_DEFAULTS[family] else {"text_encoder_config": TEXT}


def text_width(config):
    """Width of the text tower, or what `text_tower` has where the family can have none."""
    tower = config.fsr_config.text_encoder_config
    return TEXT["hidden_size"] if not text_tower(type(config)) and tower is None else tower.hidden_size


def fields_of(config):
    """The fields of FSR, by name, with the text tower as a dict."""
    fields = {name: getattr(config, name) for name in DEFAULTS}
    if fields["text_encoder_config"] is not None:
        fields["text_encoder_config"] = fields["text_encoder_config"].to_dict()
    return fields


def cases(table):
    return [pytest.param(name, value, id=f"{name}-{value!r:.30}") for name in table for value in table[name]]


# ---------------------------------------------------------------------- FSRConfig by itself


def test_defaults():
    assert fields_of(FSRConfig()) == DEFAULTS
    assert DEFAULTS.keys() == ALLOWED.keys() == REFUSED.keys()


@pytest.mark.parametrize(("name", "value"), cases(ALLOWED))
def test_allowed_values(name, value):
    built, assigned = FSRConfig(**{name: value}), FSRConfig()
    setattr(assigned, name, value)
    for config in (built, assigned):
        stored = getattr(config, name)
        if name == "text_encoder_config" and value is not None:
            assert isinstance(stored, CLIPTextConfig)
            assert stored.hidden_size == (value["hidden_size"] if value == {"hidden_size": 32} else stored.hidden_size)
        else:
            assert stored == value and type(stored) is type(value)
        assert {**fields_of(config), name: None} == {**DEFAULTS, name: None}


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_refused_values_are_named_with_what_is_allowed(name, value):
    family = FSRLlavaConfig
    allowed = {
        "num_visual_tokens": "an int >= 1",
        "retention_ratio": "(0, 1]",
        "rho": "(0, 1]",
        "focus_limit": "(0, 1]",
        "text_encoder_config": "CLIPTextConfig",
        "enabled": "True or False",
        "invert_relevance": "True or False",
        "focus_mass": '"all" or "budget"',
        "relevance": '"clip", "none"',
        "pool": '"view", "item"',
        "positions": '"compact", "original"',
    }.get(name, "a number >= 0")
    config, parent = FSRConfig(), family()

    def assign():
        setattr(config, name, value)

    def assign_dict():
        parent.fsr_config = {name: value}

    for act in (
        lambda: FSRConfig(**{name: value}),
        assign,
        lambda: family(fsr_config={name: value}),
        assign_dict,
    ):
        with pytest.raises(ValueError) as error:
            act()
        assert f"`{name}={value!r}`" in str(error.value)
        assert allowed in str(error.value)
    # What was refused is not there.
    assert fields_of(config) == DEFAULTS
    assert fields_of(parent.fsr_config) == DEFAULTS | FAMILY_DEFAULTS[family]


def test_unknown_fields_are_refused(family):
    for act in (lambda: FSRConfig(alpah=1.0), lambda: family(fsr_config={"alpah": 1.0})):
        with pytest.raises(ValueError, match=r"`alpah=1\.0`.*alpha, beta, rho"):
            act()
    config = family()
    with pytest.raises(ValueError, match="num_visual_token=3"):
        config.fsr_config = {"num_visual_token": 3}


@pytest.mark.parametrize("value", [64, 0.5, "enabled", ["enabled"], CLIPTextConfig()], ids=str)
def test_fsr_config_itself_is_checked(value, family):
    with pytest.raises(ValueError, match="fsr_config"):
        family(fsr_config=value)


def test_two_budgets_are_refused(family):
    both = {"num_visual_tokens": 64, "retention_ratio": 0.25}
    config = family()

    def assign():
        config.fsr_config = both

    for act in (
        lambda: FSRConfig(**both),
        lambda: family(fsr_config=both),
        lambda: FSRConfig().override(**both),
        assign,
    ):
        with pytest.raises(ValueError, match=r"`num_visual_tokens=64` and `retention_ratio=0\.25`"):
            act()
    assert budget_of(config.fsr_config) == default_budget(family)


def test_a_budget_that_is_assigned_clears_the_other():
    config = FSRConfig(num_visual_tokens=64)
    config.retention_ratio = 0.25
    assert (config.num_visual_tokens, config.retention_ratio) == (None, 0.25)
    config.num_visual_tokens = 32
    assert (config.num_visual_tokens, config.retention_ratio) == (32, None)
    config.retention_ratio = None
    assert (config.num_visual_tokens, config.retention_ratio) == (32, None)
    with pytest.raises(ValueError):
        config.retention_ratio = 2
    assert (config.num_visual_tokens, config.retention_ratio) == (32, None)


@pytest.mark.parametrize(
    ("settings", "num_tokens", "expected"),
    [
        ({"num_visual_tokens": 128}, 576, 128),
        ({"num_visual_tokens": 128}, 128, 128),
        ({"num_visual_tokens": 128}, 100, 100),  # no more than there are
        ({"retention_ratio": 1 / 9}, 576, 64),
        ({"retention_ratio": 1.0}, 576, 576),
        ({"retention_ratio": 1}, 7, 7),
        ({"retention_ratio": 0.5}, 5, 2),  # Python rounds halves to even: 2.5
        ({"retention_ratio": 0.5}, 7, 4),  # 3.5
        ({"retention_ratio": 0.5}, 9, 4),  # 4.5
        ({"retention_ratio": 0.3}, 9, 3),  # 2.7
        ({"retention_ratio": 0.001}, 576, 1),  # 0.576
        ({"retention_ratio": 0.0001}, 576, 1),  # rounds to 0
        ({"retention_ratio": 0.5}, 1, 1),  # 0.5 rounds to 0
    ],
)
def test_budget(settings, num_tokens, expected):
    assert FSRConfig(**settings).budget(num_tokens) == expected


def test_override_wins_for_one_call_and_leaves_the_config(family):
    config = family(fsr_config={"num_visual_tokens": 64}).fsr_config
    before = config.to_dict()
    by_ratio = config.override(retention_ratio=0.5)
    assert (by_ratio.num_visual_tokens, by_ratio.retention_ratio, by_ratio.enabled) == (None, 0.5, True)
    assert config.override(num_visual_tokens=7).num_visual_tokens == 7
    assert config.override(fsr_enabled=False).enabled is False
    assert config.override().num_visual_tokens == 64
    for wrong in ({"num_visual_tokens": 0}, {"retention_ratio": 1.5}, {"fsr_enabled": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            config.override(**wrong)
    assert config.to_dict() == before


def test_relevance_needs_a_text_tower_unless_it_is_named():
    assert not FSRConfig().uses_relevance
    assert FSRConfig(text_encoder_config=TEXT).uses_relevance
    assert not FSRConfig(text_encoder_config=TEXT, relevance="none").uses_relevance
    assert FSRConfig(relevance="clip").uses_relevance


def test_saved_by_itself(tmp_path):
    config = FSRConfig(retention_ratio=0.25, alpha=2, text_encoder_config=TEXT)
    config.save_pretrained(tmp_path)
    loaded = FSRConfig.from_pretrained(tmp_path)
    assert fields_of(loaded) == fields_of(config)
    assert FSRConfig.from_pretrained(tmp_path, beta=2).beta == 2


# ---------------------------------------------------------------------- inside a family's config


def test_family_defaults(family):
    for config in (family(), family(fsr_config=None), family(fsr_config={}), family(fsr_config=FSRConfig())):
        assert type(config.fsr_config) is FSRConfig
        assert fields_of(config.fsr_config) == DEFAULTS | FAMILY_DEFAULTS[family]
    settings = {
        "pool": "view",
        "positions": "original",
        "retention_ratio": 0.1,
        "relevance": "none",
    }
    expected = DEFAULTS | FAMILY_DEFAULTS[family] | {"num_visual_tokens": None} | settings
    assert fields_of(family(fsr_config=settings).fsr_config) == expected


@pytest.mark.parametrize("make", [dict, FSRConfig])
def test_named_fields_win_over_those_of_the_family(make, family):
    """Where they are equal to a default of FSRConfig, too; also through a copy, a dict, and an assigned field."""
    named = {"focus_limit": 0.5, "kappa": 1.0}
    own = FAMILY_DEFAULTS[family].get("uniform_scan", 0.0)

    def settings(config):
        return [getattr(config.fsr_config, name) for name in ("focus_limit", "kappa", "uniform_scan")]

    config = family(fsr_config=make(**named))
    assert settings(config) == [0.5, 1.0, own]
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), family.from_dict(config.to_dict())):
        assert settings(other) == [0.5, 1.0, own] and other.fsr_config == config.fsr_config
    replaced = family()
    replaced.fsr_config = config.fsr_config
    assert settings(replaced) == [0.5, 1.0, own]
    assigned = FSRConfig()
    assigned.kappa = 1.0
    assert family(fsr_config=assigned).fsr_config.kappa == 1.0


def test_two_configs_share_nothing(family):
    settings = {"alpha": 2.0, **copy.deepcopy(text_tower(family))}
    first, second = family(fsr_config=settings), family(fsr_config=settings)
    shared = FSRConfig(alpha=4)
    third, fourth = family(fsr_config=shared), family(fsr_config=shared)
    first.fsr_config.alpha = third.fsr_config.alpha = 1.0
    if text_tower(family):
        first.fsr_config.text_encoder_config.hidden_size = 16
    assert second.fsr_config.alpha == 2.0 and fourth.fsr_config.alpha == shared.alpha == 4
    assert text_width(second) == TEXT["hidden_size"]
    assert settings == {"alpha": 2.0, **text_tower(family)}
    assert family().fsr_config.alpha == 3.0


def override_by_constructor(family, folder, settings):
    stored = json.loads((folder / "config.json").read_text())
    stored["fsr_config"].update(dict.fromkeys(BUDGETS))
    return family(**{**stored, "fsr_config": {**stored["fsr_config"], **settings}})


def override_on_load_by_dict(family, folder, settings):
    return family.from_pretrained(folder, fsr_config=settings)


def override_on_load_by_object(family, folder, settings):
    return family.from_pretrained(folder, fsr_config=FSRConfig(**settings))


def override_by_dict(family, folder, settings):
    config = family.from_pretrained(folder)
    config.fsr_config = settings
    return config


def override_by_object(family, folder, settings):
    config = family.from_pretrained(folder)
    config.fsr_config = FSRConfig(**settings)
    return config


def override_by_attributes(family, folder, settings):
    config = family.from_pretrained(folder)
    for name, value in settings.items():
        setattr(config.fsr_config, name, value)
    return config


def override_by_update(family, folder, settings):
    config = family.from_pretrained(folder)
    config.update({"fsr_config": settings})
    return config


def override_by_auto_config(family, folder, settings):
    return AutoConfig.from_pretrained(folder, fsr_config=settings)


@pytest.mark.parametrize(
    "override",
    [
        override_by_constructor,
        override_on_load_by_dict,
        override_on_load_by_object,
        override_by_dict,
        override_by_object,
        override_by_attributes,
        override_by_update,
        override_by_auto_config,
    ],
)
@pytest.mark.parametrize(
    ("stored", "settings"),
    [
        ({"num_visual_tokens": 64}, {"retention_ratio": 0.25}),
        ({"retention_ratio": 0.25}, {"num_visual_tokens": 64}),
        ({"num_visual_tokens": 64}, {"num_visual_tokens": 32}),
        ({}, {"retention_ratio": 0.25}),
    ],
)
def test_naming_a_budget_clears_the_other(override, stored, settings, family, tmp_path):
    family(fsr_config={**stored, **text_tower(family)}).save_pretrained(tmp_path / "a")
    config = override(family, tmp_path / "a", settings)
    assert type(config) is family
    assert budget_of(config.fsr_config) == dict.fromkeys(BUDGETS) | settings
    assert text_width(config) == TEXT["hidden_size"]
    config.save_pretrained(tmp_path / "b")
    assert fields_of(family.from_pretrained(tmp_path / "b").fsr_config) == fields_of(config.fsr_config)


def test_a_dict_changes_what_it_names(family, tmp_path):
    stored = {"retention_ratio": 0.25, "alpha": 2, "focus_mass": "budget", "pool": "view"}
    family(fsr_config={**stored, **text_tower(family)}).save_pretrained(tmp_path)
    loaded = family.from_pretrained(tmp_path, fsr_config={"beta": 0.5})
    assigned = family.from_pretrained(tmp_path)
    assigned.fsr_config = {"beta": 0.5}
    for config in (loaded, assigned):
        assert text_width(config) == TEXT["hidden_size"]
        expected = DEFAULTS | FAMILY_DEFAULTS[family] | stored | {"beta": 0.5, "num_visual_tokens": None}
        assert fields_of(config.fsr_config) | {"text_encoder_config": None} == expected


def test_an_object_replaces_everything_but_the_text_tower(family, tmp_path):
    family(fsr_config={"alpha": 2, **text_tower(family)}).save_pretrained(tmp_path)
    config = family.from_pretrained(tmp_path, fsr_config=FSRConfig(beta=0.5))
    assert (config.fsr_config.alpha, config.fsr_config.beta) == (3.0, 0.5)
    assert text_width(config) == TEXT["hidden_size"]
    assert budget_of(config.fsr_config) == default_budget(family)
    if text_tower(family):
        other = FSRConfig(text_encoder_config={**TEXT, "hidden_size": 16})
        assert text_width(family.from_pretrained(tmp_path, fsr_config=other)) == 16


def test_the_text_tower_can_be_left_out_by_name(family, tmp_path):
    family(fsr_config={**text_tower(family), "alpha": 2}).save_pretrained(tmp_path)
    loaded = family.from_pretrained(tmp_path, fsr_config={"text_encoder_config": None})
    assigned = family.from_pretrained(tmp_path)
    assigned.fsr_config = {"text_encoder_config": None}
    for config in (loaded, assigned):
        assert config.fsr_config.text_encoder_config is None
        assert not config.fsr_config.uses_relevance
        assert config.fsr_config.alpha == 2


@pytest.mark.parametrize(
    "settings", [{"relevance": "clip"}, {"text_encoder_config": TEXT}], ids=lambda s: next(iter(s))
)
def test_families_without_clip_refuse_a_text_tower(settings, family):
    if text_tower(family):
        assert family(fsr_config=settings).fsr_config.uses_relevance
        return
    config = family()

    def assign():
        config.fsr_config = settings

    for act in (lambda: family(fsr_config=settings), assign):
        with pytest.raises(ValueError, match=r'relevance="clip".*not supported'):
            act()
    assert config.fsr_config.relevance == "none"


def test_both_budgets_none_means_the_familys_default(family):
    config = family(fsr_config={"retention_ratio": 0.25})
    assert budget_of(config.fsr_config) != default_budget(family)
    config.fsr_config = {"num_visual_tokens": None, "retention_ratio": None}
    assert budget_of(config.fsr_config) == default_budget(family)


@pytest.mark.parametrize("duplicate", [lambda config: config, copy.deepcopy, copy.copy])
def test_a_budget_that_is_taken_away_leaves_the_familys_default(duplicate, family):
    for name, value in (("num_visual_tokens", 64), ("retention_ratio", 0.25)):
        config = duplicate(family(fsr_config={name: value}).fsr_config)
        setattr(config, name, None)
        assert budget_of(config) == default_budget(family)
        assert config.budget(10**6) < 10**6
        # As people change from one to the other.
        config.num_visual_tokens = None
        config.retention_ratio = 0.75
        assert budget_of(config) == {"num_visual_tokens": None, "retention_ratio": 0.75}


# ---------------------------------------------------------------------- saving


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_visual_tokens": 64},
        {"retention_ratio": 0.3, "alpha": 2, "beta": 0, "rho": 1, "kappa": 5, "enabled": False},
        {"text_encoder_config": TEXT, "invert_relevance": False, "focus_mass": "budget"},
        {"pool": "view", "positions": "original"},
    ],
)
def test_three_generations_are_equal(settings, family, tmp_path):
    if "text_encoder_config" in settings:
        settings = {**settings, "text_encoder_config": None} | text_tower(family)
    config = family(fsr_config=settings, architectures=["Some"])
    fields = fields_of(config.fsr_config)
    assert fields.items() >= {name: value for name, value in settings.items() if value is not TEXT}.items()
    files = []
    for generation in range(3):
        folder = tmp_path / str(generation)
        config.save_pretrained(folder)
        files.append((folder / "config.json").read_text())
        config = (family if generation else AutoConfig).from_pretrained(folder)
        assert type(config) is family
        assert fields_of(config.fsr_config) == fields
        assert config.architectures == ["Some"]
    assert files[0] == files[1] == files[2]


def test_the_file_holds_fields_of_fsr_alone(family, tmp_path):
    config = family(fsr_config={**text_tower(family), "dtype": "bfloat16"})
    config.fsr_config._attn_implementation = "sdpa"
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == family.model_type
    nested = stored["fsr_config"]
    assert nested.keys() == {*DEFAULTS, "model_type"}
    assert nested["model_type"] == "fsr"
    if text_tower(family):
        assert nested["text_encoder_config"].items() >= {**TEXT, "model_type": "clip_text_model"}.items()
    assert config.to_dict()["fsr_config"].keys() == nested.keys()
    assert json.loads(config.to_json_string()) == stored


def test_a_field_that_is_gone_is_refused_with_what_replaces_it(family):
    for act in (lambda: FSRConfig(newline="keep"), lambda: family(fsr_config={"newline": "keep"})):
        with pytest.raises(ValueError, match=r"no more: `newline='keep'`: newline tokens .* are always dropped"):
            act()


def test_a_foreign_key_in_the_file_is_refused(family, tmp_path):
    family().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["fsr_config"]["colour"] = "red"
    (tmp_path / "config.json").write_text(json.dumps(stored))
    for cls in (family, AutoConfig):
        with pytest.raises(ValueError, match="`colour='red'`"):
            cls.from_pretrained(tmp_path)


def test_a_value_in_the_file_is_checked(family, tmp_path):
    family().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["fsr_config"]["rho"] = 1.5
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"`rho=1\.5`"):
        family.from_pretrained(tmp_path)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies(duplicate, family):
    config = family(fsr_config={"retention_ratio": 0.25, **text_tower(family)})
    for original in (config, config.fsr_config):
        twin = duplicate(original)
        assert type(twin) is type(original)
        assert twin.to_dict() == original.to_dict()
        assert twin == original
    # A copy has the same rules as its original.
    twin = duplicate(config.fsr_config)
    twin.num_visual_tokens = 16
    assert twin.retention_ratio is None and config.fsr_config.retention_ratio == 0.25
    with pytest.raises(ValueError, match="alpha"):
        twin.alpha = -1


def test_configs_differ_where_a_field_differs(family):
    assert family(fsr_config={"alpha": 2}) != family()
    assert FSRConfig(alpha=2) != FSRConfig()
    assert FSRConfig(text_encoder_config=TEXT) != FSRConfig(text_encoder_config={**TEXT, "hidden_size": 16})
    assert family(fsr_config={"alpha": 2}) == family(fsr_config={"alpha": 2})


def test_repr(family):
    config = family(fsr_config={"retention_ratio": 0.25, **text_tower(family)})
    for text in (repr(config), str(config), repr(config.fsr_config)):
        assert '"retention_ratio": 0.25' in text
        assert '"alpha": 3.0' in text
    assert '"enabled": true' in repr(FSRConfig())
    assert "FSRConfig" in repr(FSRConfig())


def test_unused_kwargs_come_back(family, tmp_path):
    family().save_pretrained(tmp_path)
    config, unused = family.from_pretrained(
        tmp_path, fsr_config={"alpha": 2}, return_unused_kwargs=True, return_dict=False, colour="red"
    )
    assert unused == {"colour": "red"}
    assert (config.fsr_config.alpha, config.return_dict) == (2, False)


# ---------------------------------------------------------------------- with transformers


def test_stock_config_file(tmp_path):
    text_config = {"vocab_size": 300, "hidden_size": 64, "model_type": "llama"}
    stock = LlavaConfig(text_config=text_config, image_seq_length=36, vision_feature_layer=-3)
    stock.save_pretrained(tmp_path / "stock")
    config = FSRLlavaConfig.from_pretrained(tmp_path / "stock", fsr_config={"num_visual_tokens": 9})
    assert config.model_type == "fsr_llava"
    assert config.fsr_config.num_visual_tokens == 9
    assert (config.image_seq_length, config.vision_feature_layer) == (36, -3)
    config.save_pretrained(tmp_path / "fsr")
    stored = json.loads((tmp_path / "fsr" / "config.json").read_text())
    assert stored["model_type"] == "fsr_llava"
    # Apart from what FSR adds, the file is the stock one.
    expected = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert {name: stored[name] for name in expected} == expected | {"model_type": "fsr_llava"}
    assert stored.keys() - expected.keys() == {"fsr_config", "auto_map"}
    # The file of the stock config still gives a stock config.
    assert type(AutoConfig.from_pretrained(tmp_path / "stock")) is LlavaConfig


def test_auto_config(family, tmp_path):
    assert type(AutoConfig.for_model(family.model_type)) is family
    family(fsr_config={"num_visual_tokens": 9}).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is family and config.fsr_config.num_visual_tokens == 9
    stock = next(cls for cls in family.__mro__[1:] if getattr(cls, "model_type", "") and "fsr_config" not in vars(cls))
    assert family.model_type != stock.model_type
    assert issubclass(family, stock)


def test_attention_implementation_reaches_the_text_tower(family, tmp_path):
    if not text_tower(family):
        pytest.skip("no text tower")
    config = family(fsr_config={"text_encoder_config": TEXT})
    for implementation in ("eager", "sdpa"):
        config._attn_implementation = implementation
        assert config.fsr_config.text_encoder_config._attn_implementation == implementation
        assert config.text_config._attn_implementation == implementation
    built = family(fsr_config={"text_encoder_config": TEXT}, attn_implementation="eager")
    assert built.fsr_config.text_encoder_config._attn_implementation == "eager"
    # Other settings change nothing about that.
    built.fsr_config = {"alpha": 2}
    assert built.fsr_config.text_encoder_config._attn_implementation == "eager"
    built.save_pretrained(tmp_path)
    for overrides in ({}, {"fsr_config": {"alpha": 2}}, {"fsr_config": FSRConfig()}):
        loaded = family.from_pretrained(tmp_path, attn_implementation="eager", **overrides)
        assert loaded.fsr_config.text_encoder_config._attn_implementation == "eager"


def test_dtype_is_no_field_of_fsr(family, tmp_path):
    family(dtype="bfloat16").save_pretrained(tmp_path)
    config = family.from_pretrained(tmp_path)
    assert config.dtype == torch.bfloat16
    assert "dtype" not in config.to_dict()["fsr_config"]


def test_a_misspelt_field_cannot_be_assigned():
    config = FSRLlavaConfig()
    with pytest.raises(ValueError, match="num_visual_token=3"):
        config.fsr_config.num_visual_token = 3


def test_made_of_the_fields_of_a_stock_config():
    config = FSRLlavaConfig(**LlavaConfig().to_dict())
    assert config.model_type == config.to_dict()["model_type"] == "fsr_llava"


@pytest.mark.parametrize("value", ["drop", "keep"])
def test_a_field_of_an_older_config_is_refused_by_name(value):
    with pytest.raises(ValueError, match=rf"`newline='{value}'`: newline tokens .* always dropped.*Take it out"):
        FSRConfig(newline=value)
    with pytest.raises(ValueError, match="newline tokens"):
        FSRLlavaNextConfig(fsr_config={"newline": value})
