"""What a config would keep and never read is refused, with where it belongs."""

import json

import pytest
from transformers import AutoConfig, CLIPTextConfig

from fsr_hf import (
    FSRConfig,
    FSRLlavaConfig,
    FSRLlavaNextConfig,
    FSRLlavaVideoConfig,
    FSRQwen2_5_VLConfig,
    FSRQwen3VLConfig,
)


@pytest.fixture(
    params=[FSRLlavaConfig, FSRLlavaNextConfig, FSRLlavaVideoConfig, FSRQwen2_5_VLConfig, FSRQwen3VLConfig],
    ids=lambda cls: cls.model_type,
)
def family(request):
    return request.param


def test_fields_of_fsr_belong_into_fsr_config(family, tmp_path):
    config = family()
    message = r"has no field `num_visual_tokens=5`: it belongs into `fsr_config`"
    with pytest.raises(ValueError, match=message):
        family(num_visual_tokens=5)
    with pytest.raises(ValueError, match=message):
        config.num_visual_tokens = 5
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        family.from_pretrained(tmp_path, num_visual_tokens=5)
    with pytest.raises(
        ValueError, match=r"`rho=0\.5`: it belongs into `fsr_config`, as in `fsr_config={'rho': 0\.5}`"
    ):
        AutoConfig.from_pretrained(tmp_path, rho=0.5)
    assert family.from_pretrained(tmp_path, fsr_config={"num_visual_tokens": 5}).fsr_config.num_visual_tokens == 5


def test_unknown_fields_of_the_text_tower_are_refused():
    with pytest.raises(ValueError, match=r"`text_encoder_config` has no field `nope=1`\. .*hidden_size"):
        FSRConfig(text_encoder_config={"nope": 1})
    config = FSRConfig()
    with pytest.raises(ValueError, match="`hiden_size=8`"):
        config.text_encoder_config = {"hiden_size": 8}
    # Fields of every config, as a saved text tower may have them, are none of these.
    saved = {**CLIPTextConfig(hidden_size=8).to_dict(), "torch_dtype": "float16"}
    config.text_encoder_config = saved
    assert config.text_encoder_config.hidden_size == 8


def test_what_another_config_left_in_a_text_tower_is_not_written(tmp_path):
    text_config = CLIPTextConfig(hidden_size=8, bad_words_ids=None, top_p=1.0)
    FSRLlavaConfig(fsr_config={"text_encoder_config": text_config}).save_pretrained(tmp_path)
    assert "top_p" not in json.loads((tmp_path / "config.json").read_text())["fsr_config"]["text_encoder_config"]
    assert FSRLlavaConfig.from_pretrained(tmp_path).fsr_config.text_encoder_config.hidden_size == 8


def test_update_refuses_two_budgets(family):
    config = family()
    before = config.fsr_config.to_dict()
    both = {"num_visual_tokens": 5, "retention_ratio": 0.5}
    with pytest.raises(ValueError, match=r"`num_visual_tokens=5` and `retention_ratio=0\.5` are both set"):
        config.fsr_config.update(both)
    with pytest.raises(ValueError, match="are both set"):
        config.update({"fsr_config": both})
    assert config.fsr_config.to_dict() == before
    config.fsr_config.update({"retention_ratio": 0.25, "num_visual_tokens": None})
    assert (config.fsr_config.num_visual_tokens, config.fsr_config.retention_ratio) == (None, 0.25)
