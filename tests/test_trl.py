"""TRL's trainers, unedited, on the small trained checkpoint: they train on pruned prompts, ranked by the question."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.generation import LogitsProcessor

from fsr_hf import export
from fsr_hf.demo.run import PICTURES
from fsr_hf.demo.shapes_vqa import shapes_vqa_folder


datasets = pytest.importorskip("datasets", reason="trl is not installed")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

PATCHES = 144  # of a picture of the small checkpoint
QUESTIONS = json.loads((PICTURES / "questions.json").read_text(encoding="utf-8"))
LORA = {"r": 4, "target_modules": r".*language_model.*\.(q_proj|v_proj)", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As on the Hub: TRL loads reference models from it."""
    return export(shapes_vqa_folder(), tmp_path_factory.mktemp("export") / "fsr", progress=False)


@pytest.fixture
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def load(folder, **fsr_config):
    model = AutoModel.from_pretrained(folder, fsr_config=fsr_config, dtype=torch.float32)
    return model, model.config.fsr_config.num_visual_tokens if model.config.fsr_config.enabled else PATCHES


def dataset(make_row):
    rows = [{"images": [Image.open(PICTURES / q["image"]).convert("RGB")], **make_row(q)} for q in QUESTIONS]
    return datasets.Dataset.from_list(rows)


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def settings(config_class, folder, **options):
    usual = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return config_class(str(folder), **{**usual, **quiet, **options})


def record_lengths(model):
    """The rows and columns that the language model gets."""
    shapes = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    return shapes


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Force(LogitsProcessor):
    """Greedy decoding gives these words."""

    def __init__(self, ids):
        self.ids = list(ids)

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.ids.pop(0)]), 0.0)


def log_probs_step_by_step(model, processor, question, answer_ids):
    """What `generate()` says of each word of an answer: by the cache, word by word, of one row without padding."""
    text = {"type": "text", "text": question["question"]}
    image = {"type": "image", "image": Image.open(PICTURES / question["image"]).convert("RGB")}
    conversation = [{"role": "user", "content": [image, text]}]
    to_inputs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    options = {"do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(
        **processor.apply_chat_template(conversation, **to_inputs),
        logits_processor=[Force(answer_ids)],
        max_new_tokens=len(answer_ids),
        **options,
    )
    steps = torch.stack(out.logits, dim=1)[0].log_softmax(-1)
    return steps.gather(-1, torch.tensor(answer_ids)[:, None])[:, 0]


# ---------------------------------------------------------------------- SFT


def prompt_and_completion(question):
    return {"prompt": user(question["question"]), "completion": assistant(question["answer"])}


def messages(question):
    return {"messages": user(question["question"]) + assistant(question["answer"])}


@pytest.mark.parametrize(
    ("make_row", "fsr_config", "options"),
    [
        pytest.param(prompt_and_completion, {}, {}, id="prompt-completion"),
        pytest.param(prompt_and_completion, {"num_visual_tokens": 5}, {}, id="five tokens"),
        pytest.param(prompt_and_completion, {"enabled": False}, {}, id="unpruned"),
        pytest.param(prompt_and_completion, {}, {"lora": True}, id="lora"),
        pytest.param(messages, {}, {"assistant_only_loss": True}, id="messages"),
    ],
)
def test_sft(make_row, fsr_config, options, folder, processor, tmp_path):
    options = dict(options)
    model, budget = load(folder, **fsr_config)
    seen, given, losses = record_lengths(model), [], []
    answers = {question["answer"] for question in QUESTIONS}
    trainer = trl.SFTTrainer(
        model,
        peft_config=peft.LoraConfig(**LORA) if options.pop("lora", False) else None,
        args=settings(trl.SFTConfig, tmp_path, **options),
        train_dataset=dataset(make_row),
        processing_class=processor,
    )
    compute_loss = trainer.compute_loss

    def remember(wrapped, inputs, *args, **kwargs):
        for row in inputs["labels"]:  # as many words as the answer has, and what ends it
            assert processor.decode(row[row >= 0]).removesuffix("</s>").strip() in answers
        given.append(tuple(inputs["input_ids"].shape))
        if not losses:  # what the class itself calls the loss of this batch
            with torch.no_grad():
                losses.append(float(type(model).forward(model, **inputs).loss))
            seen.clear()
        return compute_loss(wrapped, inputs, *args, **kwargs)

    trainer.compute_loss = remember
    trainer.train()
    total, read = (sum(rows * length for rows, length in shapes) for shapes in (given, seen))
    print(f"{fsr_config}: of {total} tokens in {len(given)} batches, the language model saw {read}")
    assert len(given) == 6
    assert seen == [(rows, length - PATCHES + budget) for rows, length in given]
    loss = logged(trainer, "loss")
    assert loss[0] == pytest.approx(losses[0], rel=1e-3)
    assert sum(loss[-3:]) < sum(loss[:3])


# ---------------------------------------------------------------------- DPO


@pytest.mark.parametrize("has_adapter", [False, True], ids=["full", "lora"])
def test_dpo(has_adapter, folder, processor, tmp_path):
    """The reference comes from the folder (or is the model without its adapter), with the budget of the arguments."""
    model, budget = load(folder, num_visual_tokens=9)
    seen, outputs = record_lengths(model), []
    trainer = trl.DPOTrainer(
        model,
        args=settings(trl.DPOConfig, tmp_path, model_init_kwargs={"fsr_config": {"num_visual_tokens": 9}}),
        train_dataset=dataset(
            lambda q: {"prompt": user(q["question"]), "chosen": assistant(q["answer"]), "rejected": assistant("no")}
        ),
        processing_class=processor,
        peft_config=peft.LoraConfig(**LORA) if has_adapter else None,
    )
    trainer.model.register_forward_hook(
        lambda module, args, kwargs, output: outputs.append((kwargs, output.log_probs.detach())), with_kwargs=True
    )
    trainer.train()
    batch, log_probs = outputs[0]
    assert seen[0] == (4, batch["input_ids"].shape[1] - PATCHES + budget)
    assert logged(trainer, "loss")[0] == pytest.approx(0.6931, abs=1e-3)  # policy and reference agree at the start
    assert logged(trainer, "rewards/margins")[-1] > 0

    start, _ = load(folder, num_visual_tokens=9)
    texts = [" ".join(text.split()) for text in processor.batch_decode(batch["input_ids"], skip_special_tokens=True)]
    for text, ids, labels, values in zip(texts, batch["input_ids"], batch["labels"], log_probs):
        question = next(q for q in QUESTIONS if q["question"] in text)
        expected = log_probs_step_by_step(start, processor, question, ids[labels != -100].tolist())
        torch.testing.assert_close(values[labels[1:] != -100], expected, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------- GRPO and RLOO


def make_trainer(kind, model, processor, folder, **options):
    adapter = options.pop("peft_config", None)
    trainer_class, config_class = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    usual = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4}
    args = settings(config_class, folder, **usual, temperature=3.0, **options)
    return trainer_class(
        model,
        reward_funcs=lambda completions, **_: [float(len(c[0]["content"])) for c in completions],
        args=args,
        train_dataset=dataset(lambda q: {"prompt": user(q["question"])}),
        processing_class=processor,
        peft_config=adapter,
    )


@pytest.mark.parametrize("kind", ["GRPO", "GRPO-LoRA", "RLOO"])
def test_rollouts_and_training_keep_the_same_tokens(kind, folder, processor, tmp_path):
    """With a reference model, and steps on rollouts of an older policy: TRL runs the model in all of its ways."""
    model, budget = load(folder)
    kind, _, has_adapter = kind.partition("-")
    adapter = peft.LoraConfig(**LORA) if has_adapter else None
    trainer = make_trainer(kind, model, processor, tmp_path, beta=0.1, num_iterations=2, peft_config=adapter)
    processor.bind_query(trainer.model, trainer.ref_model)
    assert "query_input_ids" not in processor(text="USER: a ASSISTANT:")
    kept = {"rollouts": set(), "steps": set()}
    for part in (model, trainer.ref_model):
        if part is None:
            continue

        def selector(*args, select=part.selector, **kwargs):
            selection = select(*args, **kwargs)
            kept["steps" if torch.is_grad_enabled() else "rollouts"] |= {
                tuple(row) for row in selection.indices.tolist()
            }
            return selection

        part.selector = selector
    seen = record_lengths(model)
    trainer.train()
    assert kept["steps"] == kept["rollouts"]
    assert len(kept["steps"]) == 2  # a step has two questions, and both steps have the same
    assert seen and all(length == 1 or length < budget + 40 < PATCHES for _, length in seen)
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-5)  # the reference ranks as the policy does

    # The question counts: without it, other tokens are kept.
    alone, _ = load(folder, relevance="none")
    inputs = AutoProcessor.from_pretrained(folder)(
        images=[Image.open(PICTURES / QUESTIONS[0]["image"]).convert("RGB")],
        text=f"USER: <image>\n{QUESTIONS[0]['question']} ASSISTANT:",
        return_tensors="pt",
    )
    selections = [
        part.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, output_visual_selection=True)
        for part in (load(folder)[0], alone)
    ]
    indices = [out.visual_selections[0].indices.flatten().tolist() for out in selections]
    assert indices[0] != indices[1]


def test_a_trainer_that_drops_the_question_is_noticed(folder, processor, tmp_path):
    model, _ = load(folder)
    trainer = make_trainer("GRPO", model, processor, tmp_path)
    with pytest.raises(ValueError, match=r"`query_input_ids` is missing in a training step.*bind_query"):
        trainer.train()


def test_saliency_alone_trains_without_a_question(folder, processor, tmp_path):
    model, _ = load(folder, relevance="none")
    trainer = make_trainer("GRPO", model, processor, tmp_path)
    trainer.train()
    assert len(logged(trainer, "loss")) == 2
