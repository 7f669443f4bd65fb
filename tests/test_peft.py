"""Adapters: LoRA with pruning on, from training to a merged model; what PEFT does to prompts is refused."""

import copy
import json

import pytest
import torch
from families import FAMILIES, models
from isolated import run_isolated
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText


LANGUAGE_MODEL = r".*language_model.*\.(q_proj|v_proj)"
EVERYWHERE = ["q_proj", "v_proj"]  # also in the CLIP towers


@pytest.fixture(params=FAMILIES.values(), ids=str)
def family(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def lora(target_modules=LANGUAGE_MODEL, task_type="CAUSAL_LM", **kwargs):
    """LoRA whose two factors are random, so that it does something before it is trained."""
    kwargs = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, **kwargs}
    return LoraConfig(target_modules=target_modules, task_type=task_type, **kwargs)


def training_batch(family):
    batch = family.inputs(family.rows(), padding_side="right")
    labels = batch["input_ids"].clone()
    ends = batch["attention_mask"].sum(-1)
    columns = torch.arange(labels.shape[1])
    labels[(columns < ends[:, None] - 3) | (columns >= ends[:, None])] = -100  # the last three tokens of each row
    return batch | {"labels": labels}


def train(model, batch, steps=8, lr=1e-2):
    """Losses; the names of all parameters that ever got a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    losses, names = [], set()
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        names |= {name for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses, names


def generate(model, inputs, **kwargs):
    """New tokens, greedily; how long the language model's inputs were; and the selections."""
    lengths = []
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    handle = base.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    kwargs = {"max_new_tokens": 5, "do_sample": False, "output_visual_selection": True} | kwargs
    try:
        out = model.generate(**inputs, return_dict_in_generate=True, **kwargs)
    finally:
        handle.remove()
    return out.sequences[:, inputs["input_ids"].shape[1] :], lengths, out.visual_selections


def in_text_encoder(name):
    return "text_encoder." in name


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_lora_on_the_language_model(family, task_type):
    model = family.build()
    before = copy.deepcopy(model.state_dict())
    adapted = get_peft_model(model, lora(task_type=task_type, init_lora_weights=True))
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable and all("language_model" in name and ".lora_" in name for name in trainable)
    inputs = family.inputs(family.rows())
    _, _, selections = generate(model, inputs)

    losses, names = train(adapted, training_batch(family))
    assert losses[-1] < 0.7 * losses[0]
    assert names == trainable
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    # The towers are as they were, and so is what they select.
    _, _, trained = generate(adapted, inputs)
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(selections, trained, strict=True))


def test_lora_everywhere_leaves_the_text_tower_alone(family):
    """
    `["q_proj", "v_proj"]` also names the projections of the CLIP towers. The vision tower is adapted, and saliency is
    the attention of the adapted tower. The text tower gets factors that never train: they start without effect and
    stay so, and the question's embedding is what it was.
    """
    model = family.build()
    if not family.has_text_encoder:
        pytest.skip("no text encoder")
    questions = [family.query([3, 4])[name] for name in ("query_input_ids", "query_attention_mask")]
    before = model.model.text_encoder.encode_query(*questions)
    adapted = get_peft_model(model, lora(EVERYWHERE, init_lora_weights=True))
    factors = {name for name, _ in adapted.named_parameters() if ".lora_" in name}
    hit = {name for name in factors if in_text_encoder(name)}
    assert hit and any("vision_tower" in name for name in factors)
    start = {name: p.detach().clone() for name, p in adapted.named_parameters() if name in hit}

    losses, names = train(adapted, training_batch(family))
    assert losses[-1] < losses[0]
    assert not any(in_text_encoder(name) for name in names)
    assert not any(p.requires_grad for name, p in adapted.named_parameters() if in_text_encoder(name))
    assert all(torch.equal(dict(adapted.named_parameters())[name], value) for name, value in start.items())
    assert torch.equal(model.model.text_encoder.encode_query(*questions), before)
    # One block of the tower and what comes after it do not count, as in the stock class.
    assert any("vision_tower" in name for name in names)
    assert any("language_model" in name for name in names)

    inputs = family.inputs(family.rows())
    adapted_tokens, lengths, selections = generate(adapted, inputs)
    assert lengths[0] < inputs["input_ids"].shape[1]
    merged_tokens, _, merged = generate(adapted.merge_and_unload(), inputs)
    assert torch.equal(adapted_tokens, merged_tokens)
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(selections, merged, strict=True))


def test_selection_follows_an_adapted_vision_tower(family):
    """Random factors in the tower: the selection is that of the merged tower, and not the one from before."""
    if not family.has_text_encoder:
        pytest.skip("no CLIP tower")
    inputs = family.inputs(family.rows())
    model = family.build()
    _, _, plain = generate(model, inputs)
    adapted = get_peft_model(model, lora(r".*vision_tower.*\.(q_proj|k_proj|v_proj|out_proj)"))
    tokens, _, selections = generate(adapted, inputs)
    with adapted.disable_adapter():
        _, _, disabled = generate(adapted, inputs)
    merged_tokens, _, merged = generate(adapted.merge_and_unload(), inputs)
    for one, two in ((selections, merged), (plain, disabled)):
        assert all(torch.equal(a.indices, b.indices) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a.indices, b.indices) for a, b in zip(selections, plain))
    assert torch.equal(tokens, merged_tokens)


@pytest.mark.parametrize("modules", [["multi_modal_projector", "merger"], ["embed_tokens", "lm_head"]], ids=str)
def test_modules_that_are_trained_whole(family, modules):
    """As in LLaVA's first stage: the projector is trained, the language model gets LoRA or nothing."""
    adapted = get_peft_model(family.build(), lora(init_lora_weights=True, modules_to_save=modules))
    present = [module for module in modules if any(f".{module}." in name for name, _ in adapted.named_parameters())]
    losses, names = train(adapted, training_batch(family), lr=5e-3)
    assert losses[-1] < 0.7 * losses[0]
    for module in present:
        own = {name for name, _ in adapted.named_parameters() if f".{module}.modules_to_save." in name}
        own = {name for name in own if "text_encoder" not in name}
        assert own and own <= names
    inputs = family.inputs(family.rows())
    tokens, lengths, _ = generate(adapted, inputs)
    assert lengths[0] < inputs["input_ids"].shape[1]
    merged, _, _ = generate(adapted.merge_and_unload(), inputs)
    assert torch.equal(tokens, merged)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # newer transformers have another name
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("target_modules", [LANGUAGE_MODEL, EVERYWHERE], ids=["language model", "everywhere"])
def test_gradient_checkpointing_with_a_frozen_base(family, use_reentrant, target_modules):
    """Nothing before the first adapter needs a gradient, unless `enable_input_require_grads` says so."""
    adapted = get_peft_model(family.build(), lora(target_modules)).train()
    batch = training_batch(family)

    def step():
        adapted.zero_grad()
        loss = adapted(**batch).loss
        loss.backward()
        return float(loss.detach()), {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}

    loss, expected = step()
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    block = adapted.get_base_model().get_decoder().layers[0].mlp
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed, grads = step()
    assert len(calls) == 2  # once forward, once again on the way back
    assert checkpointed == pytest.approx(loss, rel=1e-5)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


# ---------------------------------------------------------------------- saving and loading


def test_generate_through_an_adapter_prunes(family):
    inputs = family.inputs(family.rows())
    model = family.build()
    plain, plain_lengths, _ = generate(model, inputs)
    adapted = get_peft_model(model, lora())
    tokens, lengths, selections = generate(adapted, inputs)
    assert not torch.equal(tokens, plain)  # the adapter does something
    assert lengths == plain_lengths and lengths[0] < inputs["input_ids"].shape[1]
    assert selections
    _, fewer, few = generate(adapted, inputs, num_visual_tokens=4)
    assert fewer[0] < lengths[0]
    assert all(len(selection.indices) == 4 for selection in few)
    for kwargs in ({}, {"num_visual_tokens": 4}, {"num_beams": 2}, {"fsr_enabled": False}):
        kwargs |= {"output_visual_selection": "fsr_enabled" not in kwargs}
        expected = (
            copy.deepcopy(adapted)
            .merge_and_unload()
            .generate(**inputs, return_dict_in_generate=True, max_new_tokens=5, do_sample=False, **kwargs)
        )
        actual = adapted.generate(**inputs, return_dict_in_generate=True, max_new_tokens=5, do_sample=False, **kwargs)
        assert torch.equal(actual.sequences, expected.sequences)
    with adapted.disable_adapter():
        assert torch.equal(generate(adapted, inputs)[0], plain)


def test_saved_merged_and_loaded_by_transformers(family, tmp_path):
    """The merged model is an FSR checkpoint like any other; transformers loads the adapter itself, too."""
    inputs = family.inputs(family.rows())
    family.build().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(AutoModel.from_pretrained(tmp_path / "base"), lora(EVERYWHERE))
    adapted.save_pretrained(tmp_path / "adapter")
    tokens, _, _ = generate(adapted, inputs)

    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    untouched, _, _ = generate(base, inputs)
    assert not torch.equal(tokens, untouched)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(generate(reloaded, inputs)[0], tokens)
    reloaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged, info = AutoModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(generate(merged, inputs)[0], tokens)

    # The adapter's folder names its base.
    whole = AutoModel.from_pretrained(tmp_path / "adapter")
    assert type(whole) is family.model_class
    assert torch.equal(generate(whole, inputs)[0], tokens)
    added = AutoModel.from_pretrained(tmp_path / "base")
    added.load_adapter(tmp_path / "adapter")
    assert torch.equal(generate(added, inputs)[0], tokens)


CLEAN_PROCESS = """
import json, sys
sys.modules["fsr_hf"] = None  # an import of it fails, installed or not
import torch
from peft import PeftModel
from transformers import AutoModel

folder = sys.argv[1]
trust = {"trust_remote_code": True}
inputs = torch.load(folder + "/inputs.pt")
length = inputs["input_ids"].shape[1]


def generate(model):
    return model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, length:].tolist()


report = {}
model = PeftModel.from_pretrained(AutoModel.from_pretrained(folder + "/base", **trust), folder + "/adapter")
report["peft"] = generate(model)
report["merged"] = generate(model.merge_and_unload())
report["auto"] = generate(AutoModel.from_pretrained(folder + "/adapter", **trust))
report["modules"] = [name for name in sys.modules if name.startswith("fsr_hf.")]
print("REPORT" + json.dumps(report))
"""


def test_adapter_in_a_process_without_the_package(tmp_path):
    """Base and adapter from folders, the code from the base's folder."""
    family = FAMILIES["llava"]
    model = family.build()
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = model.name_or_path = str(tmp_path / "base")  # what the adapter calls its base
    adapted = get_peft_model(model, lora())
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = family.inputs(family.rows())
    torch.save(inputs, tmp_path / "inputs.pt")
    report = json.loads(run_isolated("-c", CLEAN_PROCESS, tmp_path, home=tmp_path).partition("REPORT")[2])
    tokens = generate(adapted, inputs)[0].tolist()
    assert report == {"peft": tokens, "merged": tokens, "auto": tokens, "modules": []}


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_virtual_tokens_are_refused(family, config):
    model = get_peft_model(family.build(), copy.deepcopy(config))
    inputs = family.inputs(family.rows())
    with pytest.raises(ValueError, match=rf"PEFT.*{config.peft_type.value}.*LoRA"):
        model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"PEFT.*LoRA"):
        model(**inputs)
    with pytest.raises(ValueError, match=r"PEFT.*LoRA"):
        model(**training_batch(family))
    # Prompts without pixels are what they always are.
    text = family.inputs([[1, 5, 6, 7], [1, 8, 9, 10]], query=False)
    assert model(**text, labels=text["input_ids"]).loss.isfinite()


# ---------------------------------------------------------------------- projections of another kind


class Opaque(nn.Module):
    """A linear layer that keeps its weight to itself, as quantised ones do."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, hidden_states):
        return self.linear(hidden_states)


def test_projections_without_a_weight(family):
    inputs = family.inputs(family.rows())
    expected, _, plain = generate(models(family.name)[0], inputs)
    model = family.build()
    replaced = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, Opaque(child))
                replaced += 1
    assert replaced > 20
    tokens, lengths, selections = generate(model, inputs)
    assert lengths[0] < inputs["input_ids"].shape[1]
    assert torch.equal(tokens, expected)
    for one, two in zip(plain, selections, strict=True):
        assert torch.equal(one.indices, two.indices)
        assert torch.equal(one.priority, two.priority)
