"""Training with pruning on: gradients, checkpointing, mixed precision, Trainer, distributed data parallel."""

import copy
from bisect import bisect_right
from dataclasses import replace
from inspect import signature

import pytest
import torch
from families import FAMILIES, Item, models
from oracle import Oracle
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING

from fsr_hf.modeling.guards import get_cache


IGNORED = -100
QUERY = ("query_input_ids", "query_attention_mask")


@pytest.fixture(params=FAMILIES.values(), ids=str)
def family(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------- batches


def default_answers(rows):
    return [[40 + row, 41, 42, 43][: 4 - row % 2] for row in range(len(rows))]


def batch_with_answers(family, answers=None, padding_side="right", rows=None):
    """
    The rows of the family, each followed by an answer, with labels on the answers alone. The question of a row is the
    one that it has without its answer.
    """
    rows = family.rows() if rows is None else rows
    answers = default_answers(rows) if answers is None else answers
    whole = [[*row, *answer] for row, answer in zip(rows, answers)]
    batch = family.inputs(whole, padding_side)
    questions = family.inputs(rows)
    batch |= {name: questions[name] for name in QUERY if name in questions}
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row, answer in enumerate(answers):
        end = int(batch["attention_mask"][row].nonzero().max()) + 1
        labels[row, end - len(answer) : end] = torch.tensor(answer)
    return batch | {"labels": labels}


def without_text_encoder(names):
    return {name for name in names if "text_encoder." not in name}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model, batch):
    """Loss and gradients of one step, from zero."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_close(actual, expected, tolerance=1e-4):
    """Equal gradients, up to rounding on the scale of the largest of them."""
    assert actual.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=float(tolerance * scale), msg=name)


# ---------------------------------------------------------------------- gradients


def loaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


@pytest.mark.parametrize("source", ["built", "loaded"])
def test_loss_falls_and_the_text_tower_never_trains(family, source, tmp_path):
    model = family.build()
    if source == "loaded":
        model = loaded(model, tmp_path)
    model.requires_grad_(True)
    model.train()
    assert all(p.requires_grad == ("text_encoder." not in name) for name, p in model.named_parameters())
    before = copy.deepcopy(model.state_dict())
    batch = batch_with_answers(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    losses = []
    for _ in range(8):
        model.train()
        loss, grads = backward(model, batch)
        optimizer.step()
        losses.append(float(loss))
        assert without_text_encoder(grads) == grads.keys()
    assert losses[-1] < 0.6 * losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert without_text_encoder(changed) == changed
    for part in ("language_model", "multi_modal_projector", "vision_tower"):
        assert any(part in name for name in changed) == any(part in name for name in before)
    if family.has_text_encoder:
        assert not any(module.training for module in model.model.text_encoder.modules())


def test_the_text_tower_stays_frozen_whatever_is_asked(family, tmp_path):
    if not family.has_text_encoder:
        pytest.skip("no text encoder")
    model = loaded(family.build(), tmp_path)
    text_encoder = model.model.text_encoder
    for act in (
        lambda: None,
        lambda: model.train(),
        lambda: model.requires_grad_(True),
        lambda: model.model.requires_grad_(True),
        lambda: text_encoder.requires_grad_(True),
        lambda: text_encoder.train(),
        lambda: model.eval(),
        lambda: model.float(),
    ):
        act()
        assert not any(p.requires_grad for p in text_encoder.parameters())
        assert not any(module.training for module in text_encoder.modules())
    # Even where someone sets the flags one by one, nothing flows.
    for parameter in model.parameters():
        parameter.requires_grad = True
    _, grads = backward(model, batch_with_answers(family))
    assert grads and without_text_encoder(grads) == grads.keys()
    model.train()
    assert not any(p.requires_grad for p in text_encoder.parameters())


def test_every_parameter_that_trains_in_the_stock_class_trains(family):
    if not family.is_stock:
        pytest.skip("no stock class")
    model, reference = models(family.name)
    batch = batch_with_answers(family)
    _, grads = backward(model, batch)
    _, expected = backward(reference, {name: value for name, value in batch.items() if name not in QUERY})
    assert grads.keys() == expected.keys()
    # A dropped newline has a gradient, of zero: enough for distributed training.
    assert all(grad.abs().sum() > 0 for name, grad in grads.items() if "image_newline" not in name)
    model.zero_grad()
    reference.zero_grad()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # newer transformers have another name
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(family, use_reentrant):
    model, batch = family.build().train(), batch_with_answers(family)
    loss, expected = backward(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = count_calls(model.get_decoder().layers[0].mlp)
    checkpointed, grads = backward(model, batch)
    assert len(calls) == 2  # once forward, once again on the way back
    torch.testing.assert_close(checkpointed, loss)
    assert_close(grads, expected)
    model.gradient_checkpointing_disable()
    plain, grads = backward(model, batch)
    assert torch.equal(plain, loss)
    assert_close(grads, expected, tolerance=0)


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_autocast(family):
    model = family.build().train()
    batch = batch_with_answers(family)
    loss, expected = backward(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch)
    assert mixed.logits.dtype == torch.bfloat16
    model.zero_grad()
    mixed.loss.backward()
    grads = gradients(model)
    assert grads.keys() == expected.keys()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())
    torch.testing.assert_close(mixed.loss, loss, rtol=0.1, atol=0.1)
    cosine = torch.cosine_similarity(
        *(torch.cat([g[name].flatten() for name in expected]) for g in (grads, expected)), 0
    )
    assert cosine > 0.9


# ---------------------------------------------------------------------- loss and logits


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_teacher_forcing_agrees_with_generate(family, padding_side):
    """What greedy decoding answers is what the logits of one forward over prompt and answer have as their maximum."""
    model, _ = models(family.name)
    rows = family.rows()
    inputs = family.inputs(rows)
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    answers = out.sequences[:, inputs["input_ids"].shape[1] :]
    batch = batch_with_answers(family, answers.tolist(), padding_side)
    with torch.no_grad():
        outputs = model(**batch)

    # The lines of TRL's SFTTrainer.
    shift_logits = outputs.logits[..., :-1, :].contiguous()
    shift_labels = batch["labels"][..., 1:].contiguous()
    predictions = shift_logits.argmax(dim=-1)
    mask = shift_labels != IGNORED
    correct_predictions = (predictions == shift_labels) & mask
    assert mask.sum() == answers.numel()
    assert correct_predictions.sum() == mask.sum()

    steps = torch.stack(out.logits, dim=1)  # [B, 5, V]
    torch.testing.assert_close(shift_logits[mask].view_as(steps), steps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.loss, cross_entropy(steps.flatten(0, 1), answers.flatten()))

    # A wrong label is seen to be one.
    wrong = batch["labels"].clone()
    wrong[0, int(wrong[0].ne(IGNORED).nonzero()[0])] += 1
    assert ((predictions == wrong[..., 1:]) & mask).sum() == mask.sum() - 1


def test_padding_does_not_change_loss_or_gradients(family):
    model = family.build().train()
    loss, grads = backward(model, batch_with_answers(family, padding_side="left"))
    right, right_grads = backward(model, batch_with_answers(family, padding_side="right"))
    torch.testing.assert_close(right, loss)
    assert_close(right_grads, grads)
    # The batch is the mean over its labels.
    rows = family.rows()
    total, count = 0.0, 0
    for row in range(len(rows)):
        alone = batch_with_answers(family, [[40 + row, 41, 42, 43][: 4 - row % 2]], rows=rows[row : row + 1])
        number = int(alone["labels"].ne(IGNORED).sum())
        total, count = total + float(model(**alone).loss.detach()) * number, count + number
    assert total / count == pytest.approx(float(loss), rel=1e-4)


def label_everything(batch):
    """
    Labels as TRL's collator for pictures makes them: all but padding, placeholders included. A row's first token is
    left out, because padding on the left would be what predicts it.
    """
    is_first = batch["attention_mask"].cumsum(-1) == 1
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | is_first, IGNORED)
    return {**batch, "labels": labels}


def step_by_step(family, rows, answers):
    """
    What the stock model says of the compressed rows: a function of the number of a row and a column of its unpadded
    ids to log-probabilities `(vocab_size,)` of the next token, from a run of what is kept up to this column.
    """
    model, reference = models(family.name)
    oracle = Oracle(family, model, reference)
    prompts = []
    for row, answer in zip(rows, answers):
        question = oracle.question(row)
        prompts.append(oracle.compress([*row, *answer], questions=[question] * len(row)))

    def log_probs(row, column):
        prompt, number = prompts[row], bisect_right(prompts[row].columns, column)
        prefix = replace(prompt, embeds=prompt.embeds[:number], positions=prompt.positions[..., :number])
        return oracle.logits(prefix)[-1].log_softmax(-1)

    return log_probs, prompts


def unpadded(batch, name):
    """The rows of a tensor of the batch, without padding."""
    return [values[mask.bool()].tolist() for values, mask in zip(batch[name], batch["attention_mask"])]


def negative_log_likelihood(family, batch, log_probs):
    """Sum and number of the losses of one batch: placeholders are no targets."""
    total, count = 0.0, 0
    for row, (ids, labels) in enumerate(zip(unpadded(batch, "input_ids"), unpadded(batch, "labels"))):
        for column, (token, label) in enumerate(zip(ids, labels)):
            if label != IGNORED and token not in family.placeholder_ids:
                total -= float(log_probs(row, column - 1)[label])
                count += 1
    return total, count


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_num_items_in_batch(family, padding_side):
    model, _ = models(family.name)
    rows = family.rows()
    answers = batch_with_answers(family, padding_side=padding_side)
    log_probs, _ = step_by_step(family, rows, default_answers(rows))
    total, count = negative_log_likelihood(family, answers, log_probs)
    assert count == int(answers["labels"].ne(IGNORED).sum())
    with torch.no_grad():
        assert float(model(**answers).loss) == pytest.approx(total / count, rel=1e-4)
        # Trainer passes how many labels all batches of a step have: here twice as many.
        for number in (torch.tensor(2 * count), 2 * count):
            loss = model(**answers, num_items_in_batch=number).loss
            assert float(loss) == pytest.approx(total / (2 * count), rel=1e-4)

    everything = label_everything(answers)
    total, count = negative_log_likelihood(family, everything, log_probs)
    # As Trainer counts: shifted labels, placeholders among them.
    counted = everything["labels"][:, 1:].ne(IGNORED).sum()
    assert counted > count
    with torch.no_grad():
        assert float(model(**everything).loss) == pytest.approx(total / count, rel=1e-4)
        assert float(model(**everything, num_items_in_batch=counted).loss) == pytest.approx(total / count, rel=1e-4)


def test_trainer_treats_the_class_as_the_stock_one(family):
    model, reference = models(family.name)
    assert model.loss_type == reference.loss_type
    assert LOSS_MAPPING[model.loss_type] is LOSS_MAPPING["ForCausalLM"]
    assert getattr(model, "accepts_loss_kwargs", None) == getattr(reference, "accepts_loss_kwargs", None)


# ---------------------------------------------------------------------- Trainer


def as_dataset(family, answers=None, number=None):
    """
    A dict for each row, with a column that no model reads. Images and videos are in the column of pixels, as they are
    before a processor has seen them.
    """
    dataset = []
    for row, parts in enumerate(family.rows()[:number]):
        answer = [40 + row, 41, 42, 43][: 4 - row % 2] if answers is None else answers[row]
        example = batch_with_answers(family, [answer], rows=[parts])
        columns = {name: example[name][0] for name in ("input_ids", "attention_mask", "labels")}
        columns |= {name: example[name] for name in QUERY if name in example}
        dataset.append(columns | {"pixel_values": [part for part in parts if isinstance(part, Item)], "note": "a dog"})
    return dataset


def collate_with(family):
    """A collator that pads rows on the right."""

    def collate(examples):
        assert not any("note" in example for example in examples)
        values = {name: [example[name] for example in examples] for name in examples[0]}
        batch = {
            name: pad_sequence(values[name], True, IGNORED if name == "labels" else 0)
            for name in ("input_ids", "attention_mask", "labels")
        }
        batch |= {name: torch.cat(values[name]) for name in QUERY if name in values}
        items = [item for row in values["pixel_values"] for item in row]
        return batch | family.more_inputs(batch["input_ids"]) | (family.collate(items) if items else {})

    return collate


def make_trainer(model, family, folder, train=None, evaluation=None, more=None, **arguments):
    arguments = {
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        **arguments,
    }
    settings = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", **arguments
    )
    train = as_dataset(family) if train is None else train
    return Trainer(
        model,
        settings,
        data_collator=collate_with(family),
        train_dataset=train,
        eval_dataset=evaluation,
        **(more or {}),
    )


def logged_losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer(family, tmp_path):
    """`remove_unused_columns` is on by default: the columns that FSR reads stay, others go."""
    model = family.build()
    seen = set()
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(model, family, tmp_path / "run", max_steps=6, optim="adamw_torch", learning_rate=2e-3)
    trainer.train()
    losses = logged_losses(trainer)
    assert len(losses) == 6 and losses[-1] < 0.7 * losses[0]
    batch = batch_with_answers(family)
    assert batch.keys() <= seen
    assert batch.keys() <= signature(model.forward).parameters.keys()
    assert any(name in seen for name in QUERY) == family.has_text_encoder
    for name, value in model.state_dict().items():
        if "text_encoder." in name:
            assert torch.equal(value, before[name])

    trainer.save_model(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


def test_gradient_accumulation_is_one_large_batch(family, tmp_path):
    """One row has no picture. Rows have different numbers of labels, if the class takes the number in all of them."""
    weights = []
    for size, steps in ((3, 1), (1, 3)):
        model = family.build()
        answers = None if getattr(model, "accepts_loss_kwargs", True) else [[40, 41]] * 3
        trainer = make_trainer(
            model,
            family,
            tmp_path,
            train=as_dataset(family, answers, number=3),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        weights.append({name: p.detach() for name, p in model.named_parameters()})
    start = dict(family.build().named_parameters())
    updates = [{name: start[name].detach() - value for name, value in after.items()} for after in weights]
    assert max(update.abs().max() for update in updates[0].values()) > 1e-3
    assert_close(updates[1], updates[0])


def smoothed_loss(log_probs, labels):
    """Cross entropy of the labels, a tenth of whose mass is spread over the vocabulary."""
    terms = [0.9 * float(values[label]) + 0.1 * float(values.mean()) for values, label in zip(log_probs, labels)]
    return -sum(terms) / len(terms)


@pytest.mark.parametrize("is_shifted", [False, True])
def test_label_smoothing(family, is_shifted, tmp_path):
    """
    Trainer takes the labels away, and reads logits at the caller's positions. It shifts labels only for classes that
    it knows as causal language models, which no class for images is: there the script does it.
    """
    model = family.build()
    rows = family.rows()
    log_probs, prompts = step_by_step(family, rows, default_answers(rows))
    labels = unpadded(label_everything(batch_with_answers(family)), "labels")
    if is_shifted:
        labels = [[*row[1:], IGNORED] for row in labels]
    for row in labels:
        row[0] = IGNORED  # Trainer does not count it
    places = [
        (row, at, label) for row in range(len(labels)) for at, label in enumerate(labels[row]) if label != IGNORED
    ]
    # Some are read where a token was dropped, and some of these right after an image or a video.
    dropped = {(row, column) for row, column, _ in places if column not in prompts[row].columns}
    assert any(prompts[row].ids[column + 1] not in family.placeholder_ids for row, column in dropped)
    expected = smoothed_loss([log_probs(row, column) for row, column, _ in places], [label for *_, label in places])

    dataset = as_dataset(family)
    for example, row in zip(dataset, labels):
        example["labels"] = torch.tensor(row)
    size = len(dataset)
    trainer = make_trainer(
        model, family, tmp_path, train=dataset, label_smoothing_factor=0.1, per_device_train_batch_size=size
    )
    trainer.train()
    assert logged_losses(trainer)[0] == pytest.approx(expected, rel=1e-4)


def test_all_but_logits_is_named_as_no_prediction(family):
    """What Trainer gathers is what `keys_to_ignore_at_inference` does not name."""
    model, _ = models(family.name)
    batch = batch_with_answers(family)
    for options in ({}, {"fsr_enabled": False}):
        with torch.no_grad():
            outputs = model(**batch, **options)
        assert get_cache(outputs) is not None
        assert outputs.keys() - set(model.config.keys_to_ignore_at_inference) == {"loss", "logits"}


def test_evaluation(family, tmp_path):
    model = family.build()
    dataset = as_dataset(family)
    seen = {}

    def compute_metrics(prediction):
        logits = prediction.predictions
        seen["shape"] = logits.shape
        predictions, labels = logits.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
        mask = labels != IGNORED
        return {"accuracy": float(((predictions == labels) & mask).sum() / mask.sum()), "labels": int(mask.sum())}

    trainer = make_trainer(
        model,
        family,
        tmp_path,
        evaluation=dataset,
        more={"compute_metrics": compute_metrics},
        per_device_eval_batch_size=len(dataset),
    )
    metrics = trainer.evaluate()
    batch = batch_with_answers(family)
    with torch.no_grad():
        outputs = model(**batch)
    assert seen["shape"] == (*batch["input_ids"].shape, outputs.logits.shape[-1])
    labels = batch["labels"][:, 1:]
    right = (outputs.logits.argmax(-1)[:, :-1] == labels).sum() / labels.ne(IGNORED).sum()
    assert metrics["eval_accuracy"] == pytest.approx(float(right))
    assert metrics["eval_labels"] == labels.ne(IGNORED).sum()
    assert metrics["eval_loss"] == pytest.approx(float(outputs.loss), rel=1e-4)

    # Smaller batches, each of its own length: the metrics are the same.
    trainer.args.per_device_eval_batch_size = 1
    alone = trainer.evaluate()
    assert alone["eval_accuracy"] == pytest.approx(float(right))
    assert alone["eval_labels"] == labels.ne(IGNORED).sum()
    assert trainer.predict(dataset).predictions.shape == seen["shape"]
    # Nothing else is a prediction, not even where nothing is pruned.
    model.config.fsr_config.retention_ratio = 1.0
    assert trainer.predict(dataset).predictions.shape == seen["shape"]


def test_evaluation_with_argmax_before_gathering(family, tmp_path):
    """`preprocess_logits_for_metrics`, as most scripts have it, and a label that is right."""
    model = family.build()
    rows = family.rows()
    inputs = family.inputs(rows)
    answers = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
    dataset = as_dataset(family, answers)

    def compute_metrics(prediction):
        predictions, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        return {"accuracy": float((predictions == labels)[labels != IGNORED].mean())}

    trainer = make_trainer(
        model,
        family,
        tmp_path,
        train=dataset,
        evaluation=dataset,
        more={
            "compute_metrics": compute_metrics,
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        },
    )
    assert trainer.evaluate()["eval_accuracy"] == 1.0


# ---------------------------------------------------------------------- distributed


def test_distributed_data_parallel(family, tmp_path):
    """
    With the vision tower frozen, as LLaVA is tuned, every parameter that may train gets a gradient. Two processes are
    in tests/test_distributed.py.
    """
    model = family.build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = parameter.requires_grad and "vision_tower" not in name and "visual" not in name
    model.train()
    batch = batch_with_answers(family)
    _, expected = backward(model, batch)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, find_unused_parameters=False)
        for _ in range(2):  # a parameter without a gradient is an error in the next step
            loss, grads = backward(wrapped, batch)
        assert_close({name.removeprefix("module."): grad for name, grad in grads.items()}, expected)
        assert loss.isfinite()
    finally:
        torch.distributed.destroy_process_group()
