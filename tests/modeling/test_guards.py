"""
What a version of transformers that nobody has seen might do between `generate()` and the language model: it has to
raise, and no other tokens come out.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import FAMILIES, models
from isolated import ROOT, TESTS, run_python
from transformers import DynamicCache, GenerationMixin, LogitsProcessorList

from fsr_hf.modeling import guards
from fsr_hf.modeling.guards import PromptGuard, get_cache, name_cache


@pytest.fixture(params=FAMILIES)
def case(request):
    family = FAMILIES[request.param]
    model, _ = models(request.param)
    return model, family.inputs(family.rows())


def change_inputs(monkeypatch, change):
    """Every step of `generate` has other inputs than it should have."""
    original = GenerationMixin.prepare_inputs_for_generation

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = original(self, *args, **kwargs)
        change(inputs)
        return inputs

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", prepare_inputs_for_generation)


def widen_mask(inputs):
    mask = inputs["attention_mask"]
    inputs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def fill_cache(inputs):
    cache = get_cache(inputs)
    if cache is not None and not cache.get_seq_length():
        name = "cache" if "cache" in inputs else "past_key_values"
        inputs[name] = DynamicCache()
        inputs[name].update(torch.zeros(3, 2, 5, 12), torch.zeros(3, 2, 5, 12), 0)


CHANGES = {
    "a mask of another width": (widen_mask, "width of `attention_mask`"),
    "the mask vanishes": (lambda inputs: inputs.pop("attention_mask"), "`attention_mask` should be the mask"),
    "positions vanish": (lambda inputs: inputs.pop("position_ids"), "`position_ids` should be"),
    "features vanish": (lambda inputs: inputs.pop("mm_encoder_outputs", None), "visual tokens that the model was fed"),
    "a cache that is not emptied": (fill_cache, "the cache before the prompt"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_inputs_that_change_on_the_way(case, name, monkeypatch):
    model, inputs = case
    change, message = CHANGES[name]
    change_inputs(monkeypatch, change)
    with pytest.raises(RuntimeError, match=f"FSR stops here.*{message}"):
        model.generate(**inputs, max_new_tokens=3)


def test_features_that_do_not_reach_the_placeholders(case, monkeypatch):
    """The stock inner model forgets them, in `generate()` and in `forward()`."""
    model, inputs = case
    stock = next(c for c in type(model.model).__mro__ if c.__module__.startswith("transformers.models."))
    original = stock.forward

    def forward(self, *args, mm_encoder_outputs=None, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(stock, "forward", forward)
    for call in (lambda: model.generate(**inputs, max_new_tokens=3), lambda: model(**inputs)):
        with pytest.raises(RuntimeError, match=r"FSR stops here.*visual tokens that filled placeholders"):
            call()


def test_a_prompt_that_is_fed_in_part(case, monkeypatch):
    model, inputs = case
    original = PromptGuard.check_inputs
    monkeypatch.setattr(PromptGuard, "check_inputs", lambda self, num_new, *rest: original(self, num_new - 1, *rest))
    with pytest.raises(RuntimeError, match=r"FSR stops here"):
        model.generate(**inputs, max_new_tokens=1)


def test_a_cache_that_does_not_grow(case, monkeypatch):
    model, inputs = case
    monkeypatch.setattr(DynamicCache, "get_seq_length", lambda self, layer_idx=0: 0)
    with pytest.raises((RuntimeError, ValueError), match=r"FSR stops here|width"):
        model.generate(**inputs, max_new_tokens=3)


def test_calls_in_threads(case):
    """Each thread has its own prompt; a call that fails leaves nothing behind."""
    model, inputs = case
    options = {"max_new_tokens": 4, "do_sample": False}
    settings = [{"num_visual_tokens": 3}, {"num_visual_tokens": 9}, {"fsr_enabled": False}] * 2
    expected = [model.generate(**inputs, **options, **setting) for setting in settings]
    with pytest.raises(ZeroDivisionError):
        model.generate(**inputs, logits_processor=LogitsProcessorList([lambda ids, scores: 1 / 0]))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda setting: model.generate(**inputs, **options, **setting), settings))
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)
    assert guards.active_guard() is None


def test_both_names_of_the_cache():
    cache = object()
    for name in ("cache", "past_key_values"):
        assert get_cache({name: cache}) is cache
        (renamed,) = name_cache({name: cache})
        assert renamed == guards._CACHE_NAME
    assert get_cache({}) is None


@pytest.mark.parametrize("silence", [False, True])
def test_warning_of_a_newer_version(silence):
    """Once, however many models are built."""
    program = (
        "from fsr_hf.modeling import guards\n"
        "guards.VERSION, guards.transformers_version = (99, 1), '99.1.0'\n"
        "from families import FAMILIES\n"
        "FAMILIES['llava'].build(); FAMILIES['llava'].build()\n"
    )
    silenced = {"FSR_SILENCE_VERSION_WARNING": "1" if silence else "0"}
    result = run_python("-c", program, cwd=TESTS, path=[TESTS, ROOT], **silenced)
    assert result.returncode == 0, result.stderr
    warning = "FSR was tested with transformers up to 5.24; this is 99.1.0. Check it with `fsr-hf verify --run FOLDER`"
    assert result.stderr.count(warning) == (0 if silence else 1), result.stderr
