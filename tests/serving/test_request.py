"""What a request may say about its budget."""

import pytest

from fsr_hf import FSRLlavaConfig
from fsr_hf.serving.request import budget_settings, without_settings


@pytest.fixture
def fsr():
    return FSRLlavaConfig(fsr_config={"num_visual_tokens": 128}).fsr_config


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, {"num_visual_tokens": 128}),
        ({"num_visual_tokens": 128}, {"num_visual_tokens": 128}),
        ({"num_visual_tokens": 64, "query": "a cup"}, {"num_visual_tokens": 64}),
        ({"retention_ratio": 0.25}, {"retention_ratio": 0.25}),
        ({"fsr_enabled": True}, {"num_visual_tokens": 128}),
        ({"fsr_enabled": False}, {"fsr_enabled": False}),
        ({"fsr_enabled": False, "num_visual_tokens": 64}, {"fsr_enabled": False}),
    ],
)
def test_requests_that_mean_the_same_are_one(fsr, kwargs, expected):
    assert budget_settings(fsr, kwargs) == expected


def test_the_config_of_a_request(fsr):
    """Of what `budget_settings` returned: the processor reads it once more."""
    for kwargs in ({}, {"num_visual_tokens": 64}, {"retention_ratio": 0.25}, {"fsr_enabled": False}):
        config = fsr.for_call(budget_settings(fsr, kwargs))
        assert config.enabled is kwargs.get("fsr_enabled", True)
        assert config.retention_ratio == kwargs.get("retention_ratio")
        if config.retention_ratio is None:
            assert config.num_visual_tokens == kwargs.get("num_visual_tokens", 128)
    assert fsr.enabled and fsr.num_visual_tokens == 128


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"num_visual_tokens": 0}, "num_visual_tokens=0.*int"),
        ({"num_visual_tokens": "64"}, "num_visual_tokens='64'"),
        ({"retention_ratio": 1.5}, "retention_ratio=1.5"),
        ({"num_visual_tokens": 64, "retention_ratio": 0.5}, "both set"),
        ({"fsr_enabled": "no"}, "fsr_enabled='no'"),
        ({"num_visual_token": 64}, "num_visual_token`.*Did you mean `num_visual_tokens`"),
        ({"retention_rate": 0.5}, "Did you mean `retention_ratio`"),
        ({"query": ["a", "b"]}, "query=.*one text"),
    ],
)
def test_a_bad_budget_is_refused(fsr, kwargs, words):
    with pytest.raises(ValueError, match=words):
        budget_settings(fsr, kwargs)


def test_the_processor_gets_the_rest():
    kwargs = {"num_visual_tokens": 3, "query": "", "fsr_enabled": True, "retention_ratio": None, "max_pixels": 9}
    assert without_settings(kwargs) == {"max_pixels": 9}
