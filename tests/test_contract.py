"""
What every family promises, line by line, against `oracle.py`: `generate()` and `forward()` over a compressed prompt
are the stock model on that prompt, and what goes in and comes out is the caller's.
"""

import contextlib
import copy
import functools
import inspect
import math

import pytest
import torch
from families import BOS, EOS, FAMILIES, PAD, VOCAB_SIZE, Item, initialize, models
from oracle import Oracle
from processing.tiny_tokenizers import llama_tokenizer
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CompileConfig,
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation import candidate_generator
from transformers.generation.logits_process import WatermarkLogitsProcessor
from transformers.generation.streamers import BaseStreamer

from fsr_hf.modeling import clip_tower, compression, guards
from fsr_hf.modeling.guards import VERSION, get_cache


NEW = 8  # tokens that most tests generate


class Case:
    """A family's tiny model, a batch for it, and the oracle's answers."""

    def __init__(self, family):
        self.family = family
        self.model, self.reference = models(family.name)
        self.oracle = Oracle(family, self.model, self.reference)
        self.rows = family.rows()
        self.inputs = family.inputs(self.rows)
        self.length = self.inputs["input_ids"].shape[1]
        # A prompt for candidates: it ends in words that it has said before.
        self.repeated = [BOS, 5, 6, family.item(seed=20), 7, 10, 11, 12, 13, 14, 10, 11]
        self.one = family.inputs([self.repeated])

    def compress(self, rows=None, **settings):
        return [self.oracle.compress(row, **settings) for row in (self.rows if rows is None else rows)]

    @functools.cached_property
    def prompts(self):
        return self.compress()

    @functools.cached_property
    def expected(self):
        """Greedy tokens of the batch, `(rows, NEW)`, and their logits."""
        return self.oracle.decode(self.prompts, NEW)

    @functools.cached_property
    def expected_one(self):
        """Greedy tokens of the row that ends in a repetition, `(1, 12)`, and their logits."""
        return self.oracle.decode(self.compress([self.repeated]), 12)

    def stock_inputs(self, inputs=None):
        return {k: v for k, v in (self.inputs if inputs is None else inputs).items() if not k.startswith("query_")}

    def generate(self, inputs=None, model=None, **options):
        """Greedy unless told otherwise; the new tokens, after a look at the rest."""
        inputs = self.inputs if inputs is None else inputs
        if options.keys().isdisjoint(("max_new_tokens", "max_length", "generation_config")):
            options["max_new_tokens"] = NEW
        sequences = (model or self.model).generate(**inputs, **{"do_sample": False, **options})
        length = inputs["input_ids"].shape[1]
        copies = len(sequences) // len(inputs["input_ids"])
        assert torch.equal(sequences[:, :length], inputs["input_ids"].repeat_interleave(copies, 0))
        return sequences[:, length:]


@functools.cache
def build_case(name):
    return Case(FAMILIES[name])


@pytest.fixture(params=FAMILIES)
def case(request):
    return build_case(request.param)


@pytest.fixture
def stock(case):
    """The stock model with the attention implementation of the model under test: the same sums in the same order."""
    if not case.family.is_stock:
        pytest.skip("no stock class has this layout")
    return case.family.build_reference(case.model, attn_implementation="sdpa")


@contextlib.contextmanager
def recorded(module):
    """The keyword arguments of every call of a module."""
    calls = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


# --- 1: unpruned is the stock model, bit for bit ---

UNPRUNED = [{"fsr_enabled": False}, {"num_visual_tokens": 10**6}, {"retention_ratio": 1.0}, {"retention_ratio": 1}]


@pytest.mark.parametrize("setting", UNPRUNED, ids=str)
def test_unpruned_is_the_stock_model(case, stock, setting):
    inputs = case.stock_inputs()
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = stock.generate(**inputs, **options)
    actual = case.model.generate(**case.inputs, **options, **setting)
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(torch.stack(actual.logits), torch.stack(expected.logits))
    labels = inputs["input_ids"]
    with torch.no_grad():
        expected, actual = stock(**inputs, labels=labels), case.model(**case.inputs, labels=labels, **setting)
        assert torch.equal(actual.loss, expected.loss)
        assert torch.equal(actual.logits, expected.logits)
        assert actual.past_key_values.get_seq_length() == case.length
        expected = stock(**inputs, logits_to_keep=1, return_dict=False)[0]
        assert torch.equal(case.model(**case.inputs, logits_to_keep=1, return_dict=False, **setting)[0], expected)


def test_disabled_by_the_config(case, stock):
    model = copy.deepcopy(case.model)
    model.config.fsr_config.enabled = False
    expected = stock.generate(**case.stock_inputs(), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(**case.inputs, max_new_tokens=NEW, do_sample=False), expected)
    with torch.no_grad():
        assert torch.equal(model(**case.inputs).logits, stock(**case.stock_inputs()).logits)
    # The call wins over the config.
    assert torch.equal(case.generate(model=model, fsr_enabled=True), case.expected[0])


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_unpruned_copies_keep_their_images_together(case, stock, options):
    """The row with two items comes first: each copy needs both."""
    item = case.rows[0][3]
    inputs = case.family.inputs([[BOS, 20, item, 21, case.rows[1][3], 22, 23], [BOS, 30, item, 31]])
    torch.manual_seed(0)
    expected = stock.generate(**case.stock_inputs(inputs), max_new_tokens=NEW, **options)
    torch.manual_seed(0)
    actual = case.model.generate(**inputs, max_new_tokens=NEW, fsr_enabled=False, **options)
    assert torch.equal(actual, expected)


def test_query_is_dropped_where_nothing_is_pruned(case, stock):
    nonsense = {"query_input_ids": torch.zeros(1, 3), "query_attention_mask": torch.zeros(7)}
    inputs = case.stock_inputs()
    expected = stock.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    actual = case.model.generate(**inputs, **nonsense, max_new_tokens=NEW, do_sample=False, fsr_enabled=False)
    assert torch.equal(actual, expected)
    text = case.family.inputs([case.rows[2]], query=False)
    expected = stock.generate(**text, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(case.model.generate(**text, **nonsense, max_new_tokens=NEW, do_sample=False), expected)
    with torch.no_grad():
        assert torch.equal(case.model(**text, **nonsense).logits, stock(**text).logits)


def test_unpruned_is_the_oracle_with_all_tokens(case):
    expected = case.oracle.decode(case.compress(fsr_enabled=False), NEW)[0]
    assert torch.equal(case.generate(fsr_enabled=False), expected)
    assert not torch.equal(expected, case.expected[0])  # pruning does change the answers of this model


def test_get_image_features_stays_stock(case, stock):
    item = case.rows[0][3]
    arguments = {k: v for k, v in item.inputs.items() if k in inspect.signature(stock.get_image_features).parameters}
    if item.modality != "image":
        pytest.skip("the first kind of this family is no image")
    with torch.no_grad():
        expected, actual = stock.get_image_features(**arguments), case.model.get_image_features(**arguments)
    for left, right in zip(actual.pooler_output, expected.pooler_output, strict=True):
        assert torch.equal(left, right)


# --- 2: a row attends to its text and to what it keeps ---


def test_attended_entries(case):
    lengths = [len(prompt.columns) for prompt in case.prompts]
    assert lengths[2] == len(case.rows[2])
    assert lengths[0] < len(case.prompts[0].ids)
    with recorded(case.model.get_submodule(case.family.language_model)) as calls:
        out = case.model.generate(**case.inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    first = calls[0][1]
    assert first["inputs_embeds"].shape[1] == max(lengths)
    for step, (_, call) in enumerate(calls):
        mask = call["attention_mask"]
        if mask.ndim == 2:
            assert mask.sum(-1).tolist() == [length + step for length in lengths]
        for row, prompt in enumerate(case.prompts):  # several axes: the last three are of the model
            positions = call["position_ids"][..., row, :][-3 if call["position_ids"].ndim == 3 else None :]
            expected = prompt.positions[..., 0, :] if step == 0 else prompt.positions[..., 0, -1:] + step
            assert torch.equal(positions[..., -expected.shape[-1] :], expected)
    assert len(calls) == 3
    assert out.past_key_values.get_seq_length() == max(lengths) + 2


def test_attended_entries_in_the_attention_maps(case):
    model = copy.deepcopy(case.model)
    model.set_attn_implementation("eager")
    out = model.generate(
        **case.inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_attentions=True
    )
    for step, layers in enumerate(out.attentions):
        for attention in layers:
            attended = (attention[:, :, -1] > 0).sum(-1)  # [rows, heads]
            expected = torch.tensor([len(prompt.columns) + step for prompt in case.prompts])
            assert torch.equal(attended, expected[:, None].expand_as(attended))


# --- 3: the caller's view ---


class Recorder(BaseStreamer, LogitsProcessor, StoppingCriteria):
    """Streamer, logits processor and stopping criterion: keeps what it sees, changes nothing."""

    def __init__(self, stop_at=math.inf):
        self.seen, self.ended, self.stop_at = [], False, stop_at

    def put(self, value):
        self.seen.append(value.clone())

    def end(self):
        self.ended = True

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        if self.stop_at == math.inf:
            return scores
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.stop_at)


def test_streamer_sees_the_whole_prompt(case):
    streamer = Recorder()
    tokens = case.generate(streamer=streamer)
    assert torch.equal(streamer.seen[0], case.inputs["input_ids"])
    assert torch.equal(torch.stack(streamer.seen[1:], dim=1), tokens)
    assert streamer.ended


def test_logits_processor_sees_the_whole_prompt(case):
    class Ban(Recorder):
        """No token twice in a row of the batch, prompt included."""

        def __call__(self, input_ids, scores):
            super().__call__(input_ids, scores)
            return scores.scatter(1, input_ids, -math.inf)

    processor = Ban()
    tokens = case.generate(logits_processor=LogitsProcessorList([processor]))
    for step, ids in enumerate(processor.seen):
        assert torch.equal(ids, torch.cat([case.inputs["input_ids"], tokens[:, :step]], dim=1))
    assert len(processor.seen) == NEW
    banned = [set(row.tolist()) for row in case.inputs["input_ids"]]

    def choose(rows, logits):
        return [
            max(set(range(VOCAB_SIZE)) - seen - set(row), key=lambda i, row_logits=row_logits: row_logits[i])
            for seen, row, row_logits in zip(banned, rows, logits)
        ]

    assert torch.equal(tokens, case.oracle.decode(case.prompts, NEW, choose)[0])


def test_stopping_criterion_sees_the_whole_prompt(case):
    criterion = Recorder(stop_at=case.length + 3)
    tokens = case.generate(stopping_criteria=StoppingCriteriaList([criterion]))
    assert torch.equal(tokens, case.expected[0][:, :3])
    for step, ids in enumerate(criterion.seen, start=1):
        assert torch.equal(ids, torch.cat([case.inputs["input_ids"], tokens[:, :step]], dim=1))


def after_eos(tokens, eos):
    """`tokens` `(rows, n)` as `generate` returns them with this EOS: padded after it, cut where all rows ended."""
    ended = (tokens == eos).long().cumsum(-1)
    tokens = tokens.masked_fill(ended - (tokens == eos).long() > 0, PAD)
    alive = (ended == 0).any(0).nonzero()
    return tokens[:, : int(alive.max()) + 2] if len(alive) else tokens[:, :1]


def test_stopping_criteria_of_transformers(case):
    eos = int(case.expected[0][0, 2])
    expected = after_eos(case.expected[0], eos)
    assert (expected == PAD).any()
    # A criterion with `eos_token_id` pads finished rows.
    tokens = case.generate(stopping_criteria=StoppingCriteriaList([EosTokenCriteria(eos)]))
    assert torch.equal(tokens, expected)
    assert torch.equal(case.generate(eos_token_id=eos), expected)
    # A length of the whole prompt, which takes the place of the one that `generate` would set.
    criteria = StoppingCriteriaList([MaxLengthCriteria(case.length + 5)])
    for number in (3, 50):
        assert torch.equal(case.generate(stopping_criteria=criteria, max_new_tokens=number), case.expected[0][:, :5])


def test_processors_and_criteria_in_the_place_of_those_of_transformers(case):
    """One from the caller replaces the one of the same class that `generate` makes; both would be another answer."""
    first, second = case.expected[0][0, [1, 3]].tolist()
    assert first not in case.expected[0][0, 3:]
    tokens = case.generate(
        case.family.inputs(case.rows[:1]),
        stopping_criteria=StoppingCriteriaList([EosTokenCriteria(second)]),
        eos_token_id=first,
    )
    assert torch.equal(tokens, case.expected[0][:1, :4])

    length = case.one["input_ids"].shape[1]
    prompts = case.compress([case.repeated])

    def from_the_end_of_the_prompt(rows, logits):
        return penalize(0.3)([row[length:] for row in rows], logits)

    for options, choose in (
        ({}, penalize(0.3)),
        ({"prompt_ignore_length": length}, from_the_end_of_the_prompt),
    ):
        expected = case.oracle.decode(prompts, NEW, choose)[0]
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(0.3, **options)])
        tokens = case.generate(case.one, logits_processor=processors, repetition_penalty=1.0 if options else 9.0)
        assert torch.equal(tokens, expected), options


def test_callbacks_under_beams(case):
    """Every beam of a row comes with the caller's prompt of that row."""
    criterion, processor = Recorder(stop_at=case.length + 3), Recorder()
    tokens = case.generate(
        num_beams=3,
        stopping_criteria=StoppingCriteriaList([criterion]),
        logits_processor=LogitsProcessorList([processor]),
    )
    assert torch.equal(tokens, torch.stack([case.oracle.beam_search(prompt, 3, 3)[0][0] for prompt in case.prompts]))
    for ids in (*criterion.seen, *processor.seen):
        prompts = case.inputs["input_ids"].repeat_interleave(len(ids) // len(case.rows), 0)
        assert torch.equal(ids[:, : case.length], prompts)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_prefix_allowed_tokens_fn_sees_the_whole_prompt(case, options):
    is_numbered_apart = VERSION < (5, 24) and options.get("num_beams", 1) == 1
    copies = options.get("num_return_sequences", 1) if is_numbered_apart else 1
    seen = []

    def allowed(number, ids):
        row = number // copies
        assert torch.equal(ids[: case.length], case.inputs["input_ids"][row])
        seen.append(number)
        # What comes next depends on the row and on the place in the caller's prompt.
        place = len(ids) - case.length
        return [20 + 40 * row + 4 * place + k for k in range(4)]

    tokens = case.generate(prefix_allowed_tokens_fn=allowed, max_new_tokens=4, **options)
    returned = options.get("num_return_sequences", 1)
    for row, values in enumerate(tokens):
        start = 20 + 40 * (row // returned)
        assert all(start + 4 * place <= value < start + 4 * place + 4 for place, value in enumerate(values.tolist()))
    assert set(seen) == set(range(len(case.rows) * copies))


@pytest.mark.parametrize("source", ["kwargs", "generation_config", "model", "kwargs over generation_config"])
def test_lengths_count_the_whole_prompt(case, source, monkeypatch):
    greedy = case.expected[0][:, :6]
    eos = next(token for token in range(EOS, VOCAB_SIZE) if token not in greedy)
    lengths = {"max_length": case.length + 6, "min_length": case.length + 4, "eos_token_id": eos}
    options = {"do_sample": False}
    if source == "kwargs":
        options |= lengths
    elif source == "generation_config":
        options["generation_config"] = GenerationConfig(**lengths, do_sample=False)
    elif source == "model":
        monkeypatch.setattr(case.model, "generation_config", GenerationConfig(**lengths, pad_token_id=PAD))
    else:
        options["generation_config"] = GenerationConfig(max_length=case.length + 1, do_sample=False)
        options |= lengths
    configs = [case.model.generation_config, options.get("generation_config", GenerationConfig())]
    before = [copy.deepcopy(config.to_dict()) for config in configs]
    out = case.model.generate(**case.inputs, **options)
    assert torch.equal(out, torch.cat([case.inputs["input_ids"], greedy], dim=1))

    class Push(LogitsProcessor):
        """EOS wherever it is allowed."""

        def __call__(self, input_ids, scores):
            scores[:, eos] += 1000
            return scores

    out = case.model.generate(**case.inputs, **options, logits_processor=LogitsProcessorList([Push()]))
    ends = torch.full((len(greedy), 1), eos)
    assert torch.equal(out, torch.cat([case.inputs["input_ids"], greedy[:, :4], ends], dim=1))
    assert [config.to_dict() for config in configs] == before


def test_default_length(case):
    """Without any length, 20 new tokens (of which the first ones are known)."""
    out = case.model.generate(**case.inputs, do_sample=False)
    assert out.shape[1] == case.length + 20
    assert torch.equal(out[:, case.length :][:, :NEW], case.expected[0])


def test_max_new_tokens_wins_over_max_length(case):
    assert torch.equal(case.generate(max_new_tokens=3, max_length=case.length + 6), case.expected[0][:, :3])
    assert case.generate(max_new_tokens=3, min_new_tokens=2, min_length=2).shape[1] == 3


@pytest.mark.parametrize("surplus", [-5, 0])
@pytest.mark.parametrize("source", ["kwargs", "generation_config", "model"])
def test_stock_error_where_the_prompt_is_too_long(case, source, surplus, monkeypatch):
    lengths = {"max_length": case.length + surplus}
    options = {"kwargs": lengths, "generation_config": {"generation_config": GenerationConfig(**lengths)}, "model": {}}
    messages = []
    text = {name: case.inputs[name] for name in ("input_ids", "attention_mask")}
    for model, inputs in ((case.reference, text), (case.model, case.inputs)):
        if source == "model":
            monkeypatch.setattr(model, "generation_config", GenerationConfig(**lengths))
        with pytest.raises(ValueError, match=f"Input length of input_ids is {case.length}") as error:
            model.generate(**inputs, **options[source])
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_positional_prompt(case):
    inputs = dict(case.inputs)
    out = case.model.generate(inputs.pop("input_ids"), **inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out[:, case.length :], case.expected[0])


# --- 4: a row in a batch is the row alone ---


def test_batch_and_rows_alone(case):
    assert torch.equal(case.generate(), case.expected[0])
    for number, row in enumerate(case.rows):
        assert torch.equal(case.generate(case.family.inputs([row])), case.expected[0][number, None])


def test_batches_of_other_make_up(case):
    """The longest row has most to lose; no row has an item but one; padding that no row needs."""
    first, second, text = range(3)
    for order in ([second, text], [text, first], [first, first], [text, text, second]):
        inputs = case.family.inputs([case.rows[number] for number in order])
        assert torch.equal(case.generate(inputs), case.expected[0][order])
    padded = dict(case.inputs)
    extra = torch.full((len(case.rows), 7), PAD)
    padded["input_ids"] = torch.cat([extra, padded["input_ids"]], dim=1)
    padded["attention_mask"] = torch.cat([torch.zeros_like(extra), padded["attention_mask"]], dim=1)
    padded |= case.family.more_inputs(padded["input_ids"])
    assert torch.equal(case.generate(padded), case.expected[0])


def test_items_that_touch(case):
    """No text between two items, and none before or after them."""
    family = case.family
    rows = [
        [BOS, family.item(seed=1), family.item(seed=2), 5],
        [family.item(seed=3), family.item(family.kinds[-1], 4)],
    ]
    assert torch.equal(case.generate(family.inputs(rows)), case.oracle.decode(case.compress(rows), NEW)[0])


def test_items_within_their_budget_beside_larger_ones(case):
    """The budget is one less than the candidates of the largest item."""
    layouts = [
        case.family.layout(case.reference, part, None, None)
        for row in case.rows
        for part in row
        if isinstance(part, Item)
    ]
    sizes = [sum(len(pool.numbers) for pool in layout.pools) for layout in layouts]
    settings = {"num_visual_tokens": max(sizes) - 1}
    prompts = case.compress(**settings)
    pruned = [selection is not None for prompt in prompts for selection in prompt.selections]
    assert pruned == [size == max(sizes) for size in sizes]
    assert torch.equal(case.generate(**settings), case.oracle.decode(prompts, NEW)[0])
    out = case.model.generate(
        **case.inputs, **settings, max_new_tokens=2, return_dict_in_generate=True, output_visual_selection=True
    )
    for selection, is_pruned, layout in zip(out.visual_selections, pruned, layouts, strict=True):
        candidates = sorted(number for pool in layout.pools for number in pool.numbers)
        if is_pruned:
            assert len(selection.indices) == len(candidates) - 1
        else:
            assert selection.indices.tolist() == candidates
            assert torch.equal(selection.merged_into, torch.full((len(layout.run),), -1))
            close(selection.features, layout.run[candidates])


def test_mask_is_inferred_from_padding(case):
    inputs = {name: value for name, value in case.inputs.items() if name != "attention_mask"}
    assert torch.equal(case.generate(inputs), case.expected[0])


def test_training_within_the_budget_needs_no_question(case, monkeypatch):
    """Nor under FSDP2, where a prompt that loses nothing takes the way of the others."""
    inputs = {name: value for name, value in case.inputs.items() if not name.startswith("query_")}
    is_first = torch.nn.functional.pad(inputs["attention_mask"], (1, 0))[:, :-1] == 0  # padding, and what follows it
    placeholders = torch.tensor(case.family.placeholder_ids)
    labels = inputs["input_ids"].masked_fill(is_first | torch.isin(inputs["input_ids"], placeholders), -100)
    monkeypatch.setattr(case.model, "training", True)
    monkeypatch.setattr(case.model.model, "training", True)
    losses = []
    for sharded in (False, True):
        monkeypatch.setattr(compression, "is_sharded", lambda model, sharded=sharded: sharded)
        losses.append(case.model(**inputs, labels=labels, retention_ratio=1.0).loss)
    close(*losses)


def test_question_matters_and_may_be_missing(case):
    if not case.family.has_text_encoder:
        pytest.skip("no text encoder")
    expected = case.oracle.decode(case.compress(query=False), NEW)[0]
    assert not torch.equal(expected, case.expected[0])
    assert torch.equal(case.generate(case.stock_inputs()), expected)
    # A row without a question (its mask is 0) is ranked by saliency alone; the others keep theirs.
    inputs = dict(case.inputs)
    inputs["query_attention_mask"] = inputs["query_attention_mask"].clone()
    inputs["query_attention_mask"][0] = 0
    tokens = case.generate(inputs)
    assert torch.equal(tokens[0], expected[0])
    assert torch.equal(tokens[1:], case.expected[0][1:])
    # Without a mask every chunk counts.
    one = case.family.inputs([case.rows[0]], query=False) | case.family.query([1], chunks=1)
    expected = case.generate(one)
    assert torch.equal(case.generate({k: v for k, v in one.items() if k != "query_attention_mask"}), expected)


# --- 5: options that are right ---


@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_sampling(case, num_return_sequences):
    def choose(rows, logits):
        scores = logits / 0.8
        scores = scores.masked_fill(scores < scores.topk(20).values[:, -1:], -math.inf)
        return torch.multinomial(scores.softmax(-1), 1)[:, 0]

    prompts = [prompt for prompt in case.prompts for _ in range(num_return_sequences)]
    torch.manual_seed(3)
    expected = case.oracle.decode(prompts, NEW, choose)[0]
    torch.manual_seed(3)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": num_return_sequences}
    assert torch.equal(case.generate(**options), expected)
    if num_return_sequences > 1:
        assert not torch.equal(expected[0], expected[1])


def test_beams(case):
    expected = [case.oracle.beam_search(prompt, NEW, 3) for prompt in case.prompts]
    assert torch.equal(case.generate(num_beams=3), torch.stack([beams[0] for beams, _ in expected]))
    assert not torch.equal(expected[0][0][0], case.expected[0][0])
    out = case.model.generate(
        **case.inputs,
        max_new_tokens=NEW,
        num_beams=3,
        num_return_sequences=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert torch.equal(out.sequences[:, : case.length], case.inputs["input_ids"].repeat_interleave(2, 0))
    assert torch.equal(out.sequences[:, case.length :], torch.cat([beams[:2] for beams, _ in expected]))
    close(out.sequences_scores, torch.cat([scores[:2] for _, scores in expected]))


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "offloaded_static"},
        {"use_cache": False},
        {"synced_gpus": False},
        {"max_time": 1000.0},
    ],
    ids=str,
)
def test_greedy_under_options_of_the_machinery(case, options):
    if "offloaded" in options.get("cache_implementation", "") and not torch.cuda.is_available():
        pytest.skip("transformers' offloaded caches need CUDA streams")
    assert torch.equal(case.generate(**options), case.expected[0])


def test_static_cache_used_again(case):
    """transformers keeps a static cache from one call to the next."""
    text = [BOS, 20, 21, 22]
    expected = case.oracle.decode([case.oracle.compress(text)], 4)[0]
    unpruned = case.oracle.decode(case.compress(case.rows[:1], fsr_enabled=False), 4)[0]
    one = case.family.inputs(case.rows[:1])
    for _ in range(2):
        options = {"cache_implementation": "static", "max_new_tokens": 4}
        assert torch.equal(case.generate(one, **options), case.expected[0][:1, :4])
        assert torch.equal(case.generate(one, fsr_enabled=False, **options), unpruned)
        assert torch.equal(case.generate(case.family.inputs([text], query=False), **options), expected)


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_beams_under_options_of_the_machinery(case, options):
    expected = torch.stack([case.oracle.beam_search(prompt, 4, 2)[0][0] for prompt in case.prompts])
    assert torch.equal(case.generate(num_beams=2, max_new_tokens=4, **options), expected)


def test_compiled_decoding_with_a_static_cache(case):
    config = CompileConfig(backend="eager", mode=None, fullgraph=False)
    config._compile_all_devices = True
    torch.compiler.reset()
    try:
        tokens = case.generate(cache_implementation="static", compile_config=config)
    finally:
        torch.compiler.reset()
    assert torch.equal(tokens, case.expected[0])


def test_synced_gpus(case):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert torch.equal(case.generate(synced_gpus=True), case.expected[0])
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def candidates(monkeypatch):
    """How many candidates assisted decoding proposes, call by call."""
    proposed = []
    for name in ("AssistedCandidateGenerator", "PromptLookupCandidateGenerator"):
        generator = getattr(candidate_generator, name)

        def get_candidates(self, input_ids, *args, original=generator.get_candidates, **kwargs):
            ids, logits = original(self, input_ids, *args, **kwargs)
            proposed.append(ids.shape[1] - input_ids.shape[1])
            return ids, logits

        monkeypatch.setattr(generator, "get_candidates", get_candidates)
    return proposed


@pytest.mark.parametrize("options", [{}, {"max_matching_ngram_size": 2}, {"use_cache": True}], ids=str)
def test_prompt_lookup(case, candidates, options):
    tokens = case.generate(case.one, prompt_lookup_num_tokens=3, max_new_tokens=12, **options)
    assert torch.equal(tokens, case.expected_one[0])
    assert candidates[0] == 3


def test_prompt_lookup_that_proposes_a_placeholder(case, candidates):
    """The prompt ends in the words that stand before its picture; a placeholder among the candidates is a word."""
    item = case.family.item(seed=20)
    first = item.token_ids.index(next(token for token in item.token_ids if token in case.family.placeholder_ids))
    row = [BOS, 7, item, 8, 9, *item.token_ids[:first], 7, *item.token_ids[:first]]
    expected = case.oracle.decode(case.compress([row]), 12)[0]
    tokens = case.generate(case.family.inputs([row]), prompt_lookup_num_tokens=4, max_new_tokens=12)
    assert torch.equal(tokens, expected)
    assert candidates[0] == 4
    without_cache = case.generate(case.family.inputs([row]), use_cache=False, max_new_tokens=12)
    assert torch.equal(without_cache, expected)


def text_model(hidden_size):
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return initialize(LlamaForCausalLM(config), seed=5)


ASSISTANTS = {
    "the model itself": lambda case: case.model,
    "a copy": lambda case: copy.deepcopy(case.model),
    "the stock model": lambda case: case.family.build_reference(case.model, attn_implementation="sdpa"),
    "another model of the family": lambda case: case.family.build(seed=1),
    "a wider model of the family": lambda case: case.family.build(seed=2, text_config=wider(case)),
    "a wider stock model": lambda case: case.family.build_reference(
        case.family.build(seed=2, text_config=wider(case)), text_config=wider(case)
    ),
    "a text model": lambda case: text_model(case.family.config["text_config"]["hidden_size"]),
    "a narrower text model": lambda case: text_model(16),
}


def wider(case):
    text_config = case.family.config["text_config"]
    return {**text_config, **{name: 2 * text_config[name] for name in ("hidden_size", "num_attention_heads")}}


@pytest.mark.parametrize("assistant", ASSISTANTS)
def test_assistant(case, candidates, assistant):
    model = ASSISTANTS[assistant](case)
    if "text model" in assistant and case.model.model.has_position_axes:
        with idle(case), pytest.raises(ValueError, match=r"`assistant_model` is not supported .* several axes"):
            case.generate(case.one, assistant_model=model)
        return
    with recorded(case.model.get_submodule(case.family.language_model)) as calls:
        tokens = case.generate(case.one, assistant_model=model, max_new_tokens=12)
    assert torch.equal(tokens, case.expected_one[0])
    assert candidates[0] > 0  # right after the prompt, where the embeddings are
    if assistant == "a copy":  # all of its candidates are right
        assert len(calls) == len(candidates) < 12


def test_assistant_without_pixels(case, candidates):
    text = case.family.inputs([[BOS, 5, 6, 7, 10, 11, 12, 13, 14, 10, 11]])
    prompts = [case.oracle.compress([BOS, 5, 6, 7, 10, 11, 12, 13, 14, 10, 11])]
    expected = case.oracle.decode(prompts, 12)[0]
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": copy.deepcopy(case.model)}):
        assert torch.equal(case.generate(text, max_new_tokens=12, **options), expected)
    assert max(candidates) > 0


def test_candidates_with_logits_processors(case, candidates):
    """A processor sees candidates behind the caller's prompt."""

    class Shift(LogitsProcessor):
        """Depends on the length of what it sees, which it also notes."""

        def __call__(self, input_ids, scores):
            assert torch.equal(input_ids[0, :length], case.one["input_ids"][0])
            return scores.roll(input_ids.shape[1], dims=-1)

    length = case.one["input_ids"].shape[1]
    expected = case.oracle.decode(
        case.compress([case.repeated]), 12, lambda rows, logits: logits.roll(len(rows[0]), dims=-1).argmax(-1)
    )[0]
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": copy.deepcopy(case.model)}):
        processors = LogitsProcessorList([Shift()])
        assert torch.equal(
            case.generate(case.one, logits_processor=processors, max_new_tokens=12, **options), expected
        )
    assert max(candidates) > 0


def test_candidates_for_an_unpruned_prompt(case, candidates):
    expected = case.oracle.decode(case.compress([case.repeated], fsr_enabled=False), 12)[0]
    assert not torch.equal(expected, case.expected_one[0])
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": case.model}):
        for setting in ({"fsr_enabled": False}, {"num_visual_tokens": 10**6}):
            assert torch.equal(case.generate(case.one, max_new_tokens=12, **options, **setting), expected)
    assert candidates[0] == 3


def test_as_the_assistant_of_the_stock_model(case, stock, candidates):
    inputs = case.stock_inputs(case.one)
    expected = stock.generate(**inputs, max_new_tokens=12, do_sample=False)
    actual = stock.generate(**inputs, assistant_model=case.model, max_new_tokens=12, do_sample=False)
    assert torch.equal(actual, expected)
    assert candidates[0] > 0


def test_assistant_with_callbacks(case, candidates):
    """Several tokens at a time reach streamer and criteria; lengths count the caller's prompt."""
    length = case.one["input_ids"].shape[1]
    streamer, criterion = Recorder(), Recorder(stop_at=length + 9)
    tokens = case.generate(
        case.one,
        assistant_model=copy.deepcopy(case.model),
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([criterion]),
        max_length=length + 12,
    )
    assert torch.equal(tokens[:, :9], case.expected_one[0][:, :9])
    streamed = torch.cat([value.reshape(-1) for value in streamer.seen])
    assert torch.equal(streamed, torch.cat([case.one["input_ids"][0], tokens[0]]))
    for ids in criterion.seen:
        assert torch.equal(ids[0, :length], case.one["input_ids"][0])


def test_generation_output(case):
    model = copy.deepcopy(case.model)
    model.set_attn_implementation("eager")
    out = model.generate(
        **case.inputs,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    tokens, logits = case.expected
    assert torch.equal(out.sequences, torch.cat([case.inputs["input_ids"], tokens], dim=1))
    close(torch.stack(out.logits, dim=1), logits)
    close(torch.stack(out.scores, dim=1), logits)
    length = max(len(prompt.columns) for prompt in case.prompts)
    text_config = model.config.get_text_config()
    assert len(out.attentions) == len(out.hidden_states) == NEW
    assert len(out.attentions[0]) == text_config.num_hidden_layers
    assert out.attentions[0][0].shape[-2:] == (length, length)
    assert out.hidden_states[0][-1].shape == (len(case.rows), length, text_config.hidden_size)
    for row, prompt in enumerate(case.prompts):
        expected = case.oracle.run(prompt, output_hidden_states=True, output_attentions=True)
        size = len(prompt.columns)
        close(out.hidden_states[0][-1][row, length - size :], expected.hidden_states[-1][0])
        close(out.attentions[0][-1][row, :, length - size :, length - size :], expected.attentions[-1][0])


def penalize(penalty):
    """The penalty on all tokens of the caller's row."""

    def choose(rows, logits):
        logits = logits.clone()
        for row, scores in zip(rows, logits):
            seen = torch.tensor(sorted(set(row)), dtype=torch.long)
            scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        return logits.argmax(-1)

    return choose


def no_repeat(size):
    """No n-gram of the caller's row again."""

    def choose(rows, logits):
        logits = logits.clone()
        for row, scores in zip(rows, logits):
            for start in range(len(row) - size + 1):
                if row[start : start + size - 1] == row[len(row) - size + 1 :]:
                    scores[row[start + size - 1]] = -math.inf
        return logits.argmax(-1)

    return choose


def ban(*words):
    """None of the sequences of tokens."""

    def choose(rows, logits):
        logits = logits.clone()
        for row, scores in zip(rows, logits):
            for *start, last in words:
                if not start or row[-len(start) :] == start:
                    scores[last] = -math.inf
        return logits.argmax(-1)

    return choose


def test_logits_processors_of_transformers(case):
    greedy = case.expected[0]
    single, pair = int(greedy[0, 0]), greedy[1, 1:3].tolist()
    for options, choose in (
        ({"repetition_penalty": 3.0}, penalize(3.0)),
        ({"no_repeat_ngram_size": 2}, no_repeat(2)),
        ({"no_repeat_ngram_size": 1}, no_repeat(1)),
        ({"bad_words_ids": [[single], pair]}, ban([single], pair)),
        ({"suppress_tokens": [single]}, ban([single])),
    ):
        for row, prompt in zip(case.rows, case.prompts):
            expected = case.oracle.decode([prompt], NEW, choose)[0]
            assert torch.equal(case.generate(case.family.inputs([row]), **options), expected), options
    assert not torch.equal(case.generate(bad_words_ids=[[single]]), greedy)
    # In the repeating prompt some of these have something to do.
    for options, choose in (({"repetition_penalty": 3.0}, penalize(3.0)), ({"no_repeat_ngram_size": 2}, no_repeat(2))):
        expected = case.oracle.decode(case.compress([case.repeated]), NEW, choose)[0]
        assert torch.equal(case.generate(case.one, **options), expected)


def test_penalties_in_a_batch(case):
    """Slack on the left of a row adds nothing to what the row has said."""

    def choose(rows, logits):
        return penalize(3.0)(rows, logits.index_fill(1, torch.tensor([PAD]), -math.inf))

    expected = case.oracle.decode(case.prompts, NEW, choose)[0]
    assert not torch.equal(expected, case.expected[0])
    assert torch.equal(case.generate(repetition_penalty=3.0, suppress_tokens=[PAD]), expected)


def test_watermark(case):
    config = WatermarkingConfig(bias=4.0, seeding_scheme="selfhash", context_width=2)
    processor = WatermarkLogitsProcessor(
        vocab_size=VOCAB_SIZE,
        device="cpu",
        greenlist_ratio=config.greenlist_ratio,
        bias=config.bias,
        hashing_key=config.hashing_key,
        seeding_scheme=config.seeding_scheme,
        context_width=config.context_width,
    )

    def choose(rows, logits):
        return torch.cat([processor(torch.tensor([row]), s[None]) for row, s in zip(rows, logits)]).argmax(-1)

    expected = case.oracle.decode(case.prompts, 4, choose)[0]
    assert not torch.equal(expected, case.expected[0][:, :4])
    assert torch.equal(case.generate(watermarking_config=config, max_new_tokens=4), expected)


def test_stop_strings(case):
    tokenizer = llama_tokenizer()
    specials = list(range(len(tokenizer), VOCAB_SIZE)) + tokenizer.all_special_ids
    words = [[token] for token in specials]
    prompt = case.prompts[0]
    expected = case.oracle.decode([prompt], NEW, ban(*words))[0]
    text = "".join(tokenizer.convert_ids_to_tokens(expected[0].tolist()))
    stop = text[2:4]
    end = text.index(stop) + 2
    inputs = case.family.inputs([case.rows[0]])
    tokens = case.generate(inputs, suppress_tokens=specials, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(tokens, expected[:, :end])


def test_guidance(case):
    if not case.family.supports_guidance:
        pytest.skip("refused")
    row, prompt = case.rows[0], case.prompts[0]
    scale = 1.7

    def choose(rows, logits):
        # The prompt without the condition is the last token of the prompt, as `guidance_scale` makes it.
        alone = case.oracle.compress(rows[0][len(prompt.ids) - 1 :])
        free = case.oracle.logits(alone)[-1].log_softmax(-1)
        return (free + scale * (logits.log_softmax(-1) - free)).argmax(-1)

    expected = case.oracle.decode([prompt], NEW, choose)[0]
    assert not torch.equal(expected, case.expected[0][:1])
    assert torch.equal(case.generate(case.family.inputs([row]), guidance_scale=scale), expected)


# --- 5: options that are refused ---


def refused(case):
    embeds = case.model.get_input_embeddings()(case.inputs["input_ids"])
    if VERSION < (5, 23):
        yield {"prefill_chunk_size": 4}, "`prefill_chunk_size` .* by chunks"
    yield {"token_healing": True}, "`token_healing` .* visual tokens do not follow"
    yield {"cache_implementation": "paged"}, "`cache_implementation` .* ids alone"
    yield {"custom_generate": lambda model, **kwargs: None}, "`custom_generate` .* decoding loop"
    yield {"penalty_alpha": 0.6, "top_k": 4}, "`custom_generate` .* decoding loop"
    yield {"dola_layers": "low"}, "`custom_generate` .* decoding loop"
    yield {"encoder_repetition_penalty": 1.5}, "`encoder_repetition_penalty` .* encoder"
    yield {"encoder_no_repeat_ngram_size": 2}, "`encoder_no_repeat_ngram_size` .* encoder"
    yield {"inputs_embeds": embeds}, "`inputs_embeds` .* unpruned"
    yield {"mm_encoder_outputs": {"image": None}}, "`mm_encoder_outputs` .* unpruned"
    yield {"position_ids": torch.arange(case.length)[None]}, "`position_ids` together with pixels"
    yield {"num_visual_token": 4}, "num_visual_token"
    yield {"query_inputs_ids": torch.ones(1, 77)}, "query_inputs_ids"
    yield {"num_visual_tokens": 4, "retention_ratio": 0.5}, "`num_visual_tokens=4` and `retention_ratio=0.5`"
    yield {"output_visual_selection": True}, "`output_visual_selection=True` needs `return_dict_in_generate=True`"
    for value in (0, -1, 2.5, True, "9"):
        yield {"num_visual_tokens": value}, "`num_visual_tokens=.*` is not allowed: .* int >= 1"
    for value in (0.0, 1.5, -0.1, math.nan, "0.5"):
        yield {"retention_ratio": value}, r"`retention_ratio=.*` is not allowed: .* \(0, 1\]"
    yield {"fsr_enabled": "no"}, "`fsr_enabled='no'` is not allowed"
    if not case.family.supports_guidance:
        yield {"guidance_scale": 2.0}, "`guidance_scale` .* positions"


@contextlib.contextmanager
def idle(case):
    """Nothing may run: neither a tower nor the language model."""
    language_model = case.model.get_submodule(case.family.language_model)
    with recorded(case.model.get_submodule(case.family.tower)) as tower, recorded(language_model) as inner:
        yield
    assert not tower
    assert not inner


@pytest.fixture
def no_work(case):
    with idle(case):
        yield


def test_refused_options(case, no_work):
    for options, message in refused(case):
        with pytest.raises(ValueError, match=message):
            case.model.generate(**case.inputs, **options, max_new_tokens=2)
        if not {*options} & {"num_visual_tokens", "retention_ratio", "fsr_enabled", "position_ids"}:
            generation_config = None
            with contextlib.suppress(Exception):
                generation_config = GenerationConfig(**options)
            known = generation_config is not None and all(hasattr(GenerationConfig(), name) for name in options)
            if known:
                with pytest.raises(ValueError, match=message):
                    case.model.generate(**case.inputs, generation_config=generation_config)


def test_refused_in_the_generation_config(case, no_work):
    for options, message in (
        ({"num_visual_tokens": 0}, "`num_visual_tokens=0` is not allowed"),
        ({"num_visual_tokens": 4, "retention_ratio": 0.5}, "both set"),
        ({"num_visual_token": 4}, "`num_visual_token` is no argument .* `num_visual_tokens`"),
        ({"rho": 0.5}, "`rho` is no argument of a call"),
    ):
        with pytest.raises(ValueError, match=message):
            case.model.generate(**case.inputs, generation_config=GenerationConfig(**options))


def test_continuous_batching_is_refused(case, no_work):
    with pytest.raises(ValueError, match=r"takes ids alone, so images would be lost\. Use `generate\(\)`"):
        case.model.generate_batch([case.inputs["input_ids"][0].tolist()])


def test_placeholders_without_pixels(case, no_work):
    text = {name: case.inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(
        ValueError, match=r"placeholders .* but there are no pixels .* Pass what the processor returns"
    ):
        case.model.generate(**text, max_new_tokens=2)


def test_pixels_without_ids(case, no_work):
    inputs = {name: value for name, value in case.inputs.items() if name != "input_ids"}
    with pytest.raises(ValueError, match="Pixels need `input_ids`"):
        case.model.generate(**inputs, max_new_tokens=2)


def test_empty_pixels_are_none(case):
    """What some collators pass for a batch of words alone."""
    text = case.family.inputs([case.rows[2]], query=False)
    item = next(part for part in case.rows[0] if isinstance(part, Item))
    empty = {name: value[:0] for name, value in item.inputs.items()}
    expected = case.generate(text)
    assert torch.equal(case.generate({**text, **empty}), expected)
    with torch.no_grad():
        assert torch.equal(case.model(**text, **empty).logits, case.model(**text).logits)


def test_masks_of_other_shapes(case, no_work):
    for mask in (torch.ones(len(case.rows), case.length + 1), torch.ones(len(case.rows), 1, 4, 4)):
        with pytest.raises(ValueError, match=r"`attention_mask` must have the shape of `input_ids`"):
            case.model.generate(**{**case.inputs, "attention_mask": mask}, max_new_tokens=2)


def test_queries_of_other_shapes(case, no_work):
    if not case.family.has_text_encoder:
        pytest.skip("no text encoder")
    ids, mask = case.inputs["query_input_ids"], case.inputs["query_attention_mask"]
    for wrong in (ids[:, :50], ids[:1], ids[0], ids[:, :0]):
        with pytest.raises(ValueError, match=r"`query_input_ids` must have the shape \(batch, chunks \* 77\)"):
            case.model.generate(**{**case.inputs, "query_input_ids": wrong}, max_new_tokens=2)
    with pytest.raises(ValueError, match="`query_attention_mask` must have the shape of `query_input_ids`"):
        case.model.generate(**{**case.inputs, "query_attention_mask": mask[:, :77]}, max_new_tokens=2)


# --- 6: caches ---


def test_empty_cache_of_the_caller(case):
    for cache in (DynamicCache(), StaticCache(config=case.model.config.get_text_config(), max_cache_len=200)):
        out = case.model.generate(
            **case.inputs, past_key_values=cache, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True
        )
        assert torch.equal(out.sequences[:, case.length :], case.expected[0])
        assert out.past_key_values is cache


def test_ngrams_of_a_short_row_in_a_batch(case):
    """What fills a shorter row is no word of it: the same tokens are banned as in the row alone."""
    item = case.family.item(seed=5)
    short, long = [7, item, 8, 7], [BOS, 5, case.family.item(seed=6), *range(9, 18)]
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    for settings in ({"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.7}):
        alone = case.model.generate(**case.family.inputs([short]), **options, **settings).scores[0]
        batch = case.model.generate(**case.family.inputs([short, long]), **options, **settings).scores[0]
        assert torch.equal(batch[0].isinf(), alone[0].isinf()), settings
        finite = alone[0].isfinite()
        close(batch[0][finite], alone[0][finite])


def test_penalties_after_a_row_that_ended_early(case):
    """The end of a shorter answer, and the padding behind it, are no words of the conversation."""
    first = case.generate(case.family.inputs(case.rows[:2]), max_new_tokens=5)
    eos = int(first[0, 2])
    if eos in first[0, :2] or eos in first[1]:
        pytest.skip("both rows end there")
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": eos}
    out = case.model.generate(**case.family.inputs(case.rows[:2]), **options)
    answers = out.sequences[:, case.inputs["input_ids"].shape[1] :].tolist()
    x, y = answers[0][:2]
    rows = [[*case.rows[0], x, y, 30, 31, 32, x], [*case.rows[1], *answers[1], 33, 34]]  # without the end
    questions = [[case.oracle.question(row)] * sum(isinstance(p, Item) for p in row) for row in case.rows[:2]]
    prompts = [case.oracle.compress(row, questions=q) for row, q in zip(rows, questions)]
    for settings, choose in (
        ({"no_repeat_ngram_size": 2}, no_repeat(2)),
        ({"repetition_penalty": 3.0}, penalize(3.0)),
    ):
        expected = case.oracle.decode(prompts[:1], 3, choose)[0]
        tokens = case.generate(
            case.family.inputs(rows), past_key_values=copy.deepcopy(get_cache(out)), max_new_tokens=3, **settings
        )
        assert torch.equal(tokens[:1], expected), settings


def test_calls_from_a_callback(case):
    """A call of the model in a callback of `generate` prunes as any other, whatever `generate` runs."""
    one = case.family.inputs([case.rows[0]])
    with torch.no_grad():
        expected = case.model(**one).logits
        smaller = case.model(**one, num_visual_tokens=4).logits
    seen = []

    class Ask(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append((case.model(**one).logits, case.model(**one, num_visual_tokens=4).logits))
            return scores

    text = case.family.inputs([case.rows[2]], query=False)
    runs = [text, one] if VERSION < (5, 23) else [text, one, {**one, "num_visual_tokens": 10**6}]
    for inputs in runs:
        case.generate(inputs, max_new_tokens=1, logits_processor=LogitsProcessorList([Ask()]))
    assert len(seen) == len(runs)
    for logits, with_budget in seen:
        assert torch.equal(logits, expected)
        assert torch.equal(with_budget, smaller)


def test_disabled_in_the_second_turn(case):
    """After a first turn within its budget the second one runs unpruned, from the cache."""
    turns = Turns(case, [list(case.rows[0]), list(case.rows[2])])
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    out = case.model.generate(**turns.inputs(), **options, num_visual_tokens=10**6)
    turns.add(out.sequences[:, -3:], [[40, *new_items(case, 91), 41], [42]])
    prompts = [case.oracle.compress(row, fsr_enabled=False) for row in turns.rows]
    tokens = case.generate(turns.inputs(), past_key_values=get_cache(out), fsr_enabled=False)
    assert torch.equal(tokens, case.oracle.decode(prompts, NEW)[0])


def test_a_static_cache_without_room(case):
    turns = Turns(case, [list(case.rows[0])])
    room = len(case.prompts[0].columns) + 10
    cache = StaticCache(config=case.model.config.get_text_config(), max_cache_len=room)
    turns.add(case.generate(turns.inputs(), past_key_values=cache, max_new_tokens=3), [[40, 41, 42]])
    with pytest.raises(ValueError, match=f"room for {room} tokens, but this turn .* needs {room - 4} and 20 new ones"):
        case.model.generate(**turns.inputs(), past_key_values=cache, max_new_tokens=20)
    assert torch.equal(case.generate(turns.inputs(), past_key_values=cache, max_new_tokens=5), turns.expected(5))


def test_empty_static_cache_whose_length_only_the_device_knows(case, monkeypatch):
    """As on a GPU: transformers keeps the length of a static cache there."""
    monkeypatch.setattr(guards, "cache_length", lambda cache: 0 if cache is None else None)
    cache = StaticCache(config=case.model.config.get_text_config(), max_cache_len=200)
    assert torch.equal(case.generate(past_key_values=cache), case.expected[0])
    cache.reset()
    with torch.no_grad():
        logits = case.model(**case.inputs, past_key_values=cache).logits
    assert torch.equal(logits[:, -1].argmax(-1), case.expected[0][:, 0])


def conversation(case, cache_of):
    """A first call, its cache, and a follow-up of ids alone and with pixels."""
    row = case.rows[0]
    inputs = case.family.inputs([row])
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    out = cache_of(inputs, options)
    ids = torch.cat([out.sequences, torch.tensor([[30, 31, 32]])], dim=1)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **case.family.more_inputs(ids)}
    return get_cache(out), text, {**inputs, **text}


def new_items(case, seed):
    """A picture for a second turn; LLaVA-Video's stock layout of a first picture depends on whether it stays alone."""
    return [case.family.item(seed=seed)]


class Turns:
    """A conversation in a batch: what `generate` is given turn by turn, and what it has to answer."""

    def __init__(self, case, rows, eos=None):
        self.case, self.rows, self.eos = case, rows, eos
        self.questions = [[] for _ in rows]

    def inputs(self):
        for row, questions in zip(self.rows, self.questions):
            new = sum(isinstance(part, Item) for part in row) - len(questions)
            questions += [self.case.oracle.question(row)] * new
        return self.case.family.inputs(self.rows)

    def expected(self, number):
        prompts = [
            self.case.oracle.compress(row, questions=questions) for row, questions in zip(self.rows, self.questions)
        ]
        tokens = self.case.oracle.decode(prompts, number)[0]
        return tokens if self.eos is None else after_eos(tokens, self.eos)

    def add(self, tokens, parts):
        """The answers, less what stands behind an end, and what the user says then."""
        for row, answer, new in zip(self.rows, tokens.tolist(), parts):
            if self.eos in answer:
                answer = answer[: answer.index(self.eos) + 1]
            row += [*answer, *new]


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("ends", [False, True], ids=["one length", "one row ends early"])
def test_conversation(case, name, ends):
    """Words, then a second picture, then words again; each turn runs only what is new."""
    rows = [list(row) for row in case.rows[:2]] + [list(case.rows[2])]
    eos = int(case.expected[0][0, 1]) if ends else None
    turns = Turns(case, rows, eos)
    cache = None
    parts = [
        [[40, 41], [42, 43, 44], [45]],
        [[50, *new_items(case, 61), 51], [52], [*new_items(case, 62), *new_items(case, 63), 53, 54]],
        [[55], [56, 57], [58]],
    ]
    language_model = case.model.get_submodule(case.family.language_model)
    ran = None
    for turn in range(4):
        inputs = turns.inputs()
        options = {} if cache is None else {name: cache}
        with recorded(language_model) as calls:
            out = case.model.generate(
                **inputs, **options, max_new_tokens=4, do_sample=False, eos_token_id=eos, return_dict_in_generate=True
            )
        length = inputs["input_ids"].shape[1]
        assert torch.equal(out.sequences[:, :length], inputs["input_ids"])
        assert torch.equal(out.sequences[:, length:], turns.expected(4)), turn
        cache = get_cache(out)
        width = calls[0][1]["inputs_embeds"].shape[1]
        assert ran is None or width <= 2 * 9 + 12  # two pruned pictures, words, and what was not yet cached
        ran = width
        if turn < 3:
            turns.add(out.sequences[:, length:], parts[turn])


def test_conversation_in_words_without_pixels(case):
    """The pictures are in the cache: a turn of words needs no pixels."""
    turns = Turns(case, [list(case.rows[0])])
    cache = DynamicCache()
    inputs = turns.inputs()
    tokens = case.generate(inputs, past_key_values=cache, max_new_tokens=3)
    turns.add(tokens, [[30, 31]])
    inputs = turns.inputs()
    text = {"input_ids": inputs["input_ids"], **case.family.more_inputs(inputs["input_ids"])}
    assert torch.equal(case.generate(text, past_key_values=cache), turns.expected(NEW))


@pytest.mark.skipif(VERSION < (5, 23), reason="transformers splits visual tokens wrongly between chunks")
def test_conversation_in_chunks(case):
    turns = Turns(case, [list(case.repeated)])
    out = case.model.generate(**turns.inputs(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    turns.add(out.sequences[:, -3:], [[10, 11, *new_items(case, 71), 12, 10, 11]])
    tokens = case.generate(turns.inputs(), past_key_values=get_cache(out), prefill_chunk_size=3)
    assert torch.equal(tokens, turns.expected(NEW))


def test_conversation_that_begins_with_words(case):
    turns = Turns(case, [[BOS, 20, 21, 22], [BOS, 23, 24]])
    out = case.model.generate(**turns.inputs(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    turns.add(out.sequences[:, -3:], [[30, *new_items(case, 81), 31], [32, 33]])
    assert torch.equal(case.generate(turns.inputs(), past_key_values=get_cache(out)), turns.expected(NEW))


def test_conversation_that_does_not_fit(case):
    cache, _, with_pixels = conversation(case, lambda inputs, options: case.model.generate(**inputs, **options))
    other = with_pixels["input_ids"].clone()
    other[0, 1] += 1
    shorter = {k: v[:, :-4] if k in ("input_ids", "attention_mask") else v for k, v in with_pixels.items()}
    shorter |= case.family.more_inputs(shorter["input_ids"])
    cropped, reordered = copy.deepcopy(cache), copy.deepcopy(cache)
    assert torch.equal(  # a copy is as good
        case.generate(with_pixels, past_key_values=copy.deepcopy(cache), max_new_tokens=2),
        case.generate(with_pixels, past_key_values=copy.deepcopy(cache), max_new_tokens=2),
    )
    cropped.crop(-1)
    reordered.layers[-1].keys = reordered.layers[-1].keys.flip(1)
    two = {"max_new_tokens": 2}
    with idle(case):
        for inputs, wrong, options, message in (
            ({**with_pixels, "input_ids": other}, cache, {}, "does not begin with what the cache holds"),
            (shorter, cache, {}, "nothing after what the cache holds"),
            ({"input_ids": torch.tensor([[30, 31]])}, cache, {}, "does not begin with"),
            (with_pixels, cropped, {}, "cropped"),
            (with_pixels, reordered, {}, "reordered"),
            (with_pixels, cache, {"num_beams": 2}, "`num_beams` is not supported where a conversation goes on"),
            (with_pixels, cache, {"assistant_model": case.model}, "`assistant_model` is not supported where"),
            (with_pixels, cache, {"prompt_lookup_num_tokens": 2}, "`prompt_lookup_num_tokens` is not supported where"),
            (with_pixels, cache, {"use_cache": False}, "`use_cache` is not supported where"),
            (with_pixels, cache, {"fsr_enabled": False}, "cannot go on with"),
        ):
            with pytest.raises(ValueError, match=message):
                case.model.generate(**inputs, **two, **options, past_key_values=wrong)
    beams = case.model.generate(**case.inputs, num_beams=2, max_new_tokens=3, return_dict_in_generate=True)
    with torch.no_grad():
        by_hand = get_cache(case.model(**case.inputs))
        foreign = get_cache(case.model(**case.family.inputs([case.rows[2]], query=False), fsr_enabled=False))
    for wrong in (get_cache(beams), by_hand, foreign):
        with pytest.raises(ValueError, match=r"cannot go on from this cache|no FSR model wrote"):
            case.model.generate(**with_pixels, **two, past_key_values=wrong)


def test_conversation_whose_answer_has_a_placeholder(case):
    """A sampled one is a word in a turn of words, if the cache has it; else the error says where it comes from."""
    placeholder = case.family.placeholder_ids[0]

    length = case.family.inputs([case.rows[0]])["input_ids"].shape[1]

    class Write(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == length + 1:
                scores = scores.index_fill(1, torch.tensor([placeholder]), 1e9)
            return scores

    def call(inputs, options):
        return case.model.generate(**inputs, **options, logits_processor=[Write()])

    cache, text, with_pixels = conversation(case, call)
    assert text["input_ids"][0, -5] == placeholder
    row = [*case.rows[0], *text["input_ids"][0, -6:].tolist()]
    row[-5] = 33  # any word, for the positions
    prompt = case.oracle.compress(row, questions=[case.oracle.question(case.rows[0])])
    prompt.embeds[-5] = case.oracle.reference.get_input_embeddings()(torch.tensor(placeholder)).detach()
    words = case.generate({"input_ids": text["input_ids"]}, past_key_values=copy.deepcopy(cache))
    assert torch.equal(words, case.oracle.decode([prompt], NEW)[0])
    last, *_ = conversation(case, lambda inputs, options: call(inputs, {**options, "max_new_tokens": 2}))
    hint = rf"wrote one in an answer.*`suppress_tokens=\[{placeholder}"
    with idle(case):
        for inputs, written in ((with_pixels, cache), ({"input_ids": text["input_ids"]}, last)):
            with pytest.raises(ValueError, match=hint):
                case.model.generate(**inputs, past_key_values=written, max_new_tokens=2)
    suppressed = case.generate(suppress_tokens=[int(case.expected[0][0, 0])])
    assert not (suppressed == case.expected[0][0, 0]).any()


@pytest.mark.parametrize("options", [{"fsr_enabled": False}, {"num_visual_tokens": 10**6}], ids=str)
def test_cache_of_an_unpruned_prompt_goes_on(case, stock, options):
    expected_cache, text, _ = conversation(
        case, lambda inputs, kwargs: stock.generate(**case.stock_inputs(inputs), **kwargs)
    )
    cache, same_text, _ = conversation(case, lambda inputs, kwargs: case.model.generate(**inputs, **kwargs, **options))
    assert torch.equal(same_text["input_ids"], text["input_ids"])
    expected = stock.generate(**text, past_key_values=expected_cache, max_new_tokens=NEW, do_sample=False)
    actual = case.model.generate(**text, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(actual, expected)


def test_text_conversation_with_a_cache(case, stock):
    row = [[BOS, 20, 21, 22]]
    first = case.family.inputs(row, query=False)
    results = []
    for model in (stock, case.model):
        cache = DynamicCache()
        out = model.generate(**first, past_key_values=cache, max_new_tokens=3, do_sample=False)
        ids = torch.cat([out, torch.tensor([[30, 31, 32]])], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **case.family.more_inputs(ids)}
        results.append(model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW, do_sample=False))
    assert torch.equal(*results)


def test_steps_of_a_decoding_loop_by_hand(case):
    """Prefill by `forward` with pixels, then one token at a time into its cache."""
    inputs = case.family.inputs([case.rows[0]])
    tokens, position = [], case.prompts[0].positions[..., -1:]
    with torch.no_grad():
        out = case.model(**inputs, use_cache=True)
        for _ in range(NEW):
            tokens.append(int(out.logits[0, -1].argmax()))
            position = position + 1
            out = case.model(
                input_ids=torch.tensor([tokens[-1:]]), position_ids=position, past_key_values=out.past_key_values
            )
    assert tokens == case.expected[0][0].tolist()
    with pytest.raises(ValueError, match=r"`attention_mask` has .* columns"):
        case.model(
            input_ids=torch.tensor([[5]]),
            attention_mask=torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long),
            past_key_values=out.past_key_values,
        )


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_steps_without_positions(case, positions, monkeypatch):
    """They go on from the last position of the prompt, whatever other calls come between them."""
    monkeypatch.setattr(case.model.config.fsr_config, "positions", positions)
    prompt = case.oracle.compress(case.rows[0])
    if positions == "original" and case.family.positions is None:
        prompt.positions = torch.tensor([prompt.columns])
    expected = case.oracle.decode([prompt], NEW)[0][0].tolist()
    tokens = []
    with torch.no_grad():
        out = case.model(**case.family.inputs([case.rows[0]]), use_cache=True)
        for _ in range(NEW):
            tokens.append(int(out.logits[0, -1].argmax()))
            case.model(**case.family.inputs([case.rows[1]]), use_cache=True)
            out = case.model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values)
    assert tokens == expected


# --- 7: the selections ---


@pytest.mark.parametrize("settings", [{}, {"retention_ratio": 0.5}, {"num_visual_tokens": 1}], ids=str)
def test_visual_selections(case, settings):
    out = case.model.generate(
        **case.inputs,
        **settings,
        max_new_tokens=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_visual_selection=True,
    )
    prompts = case.compress(**settings)
    expected = [(row, selection) for row, prompt in enumerate(prompts) for selection in prompt.selections]
    items = [part for row in case.rows for part in row if isinstance(part, Item)]
    assert len(out.visual_selections) == len(expected) == len(items)
    for actual, (row, selection), item in zip(out.visual_selections, expected, items):
        assert (actual.row, actual.modality) == (row, item.modality)
        assert actual.indices.tolist() == selection.kept
        assert actual.is_focus.tolist() == [i in selection.focus for i in selection.kept]
        assert actual.merged_into.tolist() == [selection.merged_into.get(i, -1) for i in range(item.length)]
        places = list(selection.priority)  # a pool without a share of the budget has none
        close(actual.priority[places], torch.tensor([selection.priority[i] for i in places]))
        close(actual.features, torch.stack([selection.features[i] for i in selection.kept]))
        assert actual.grid.shape == (item.length, 3)
    if not settings:
        assert any(selection.merged_into for _, selection in expected)
        assert any(1 < len(selection.focus) < len(selection.kept) for _, selection in expected)


def test_visual_selections_of_what_is_not_pruned(case):
    options = {"return_dict_in_generate": True, "output_visual_selection": True, "max_new_tokens": 2}
    out = case.model.generate(**case.inputs, **options, num_visual_tokens=10**6)
    items = [part for row in case.rows for part in row if isinstance(part, Item)]
    for selection, item in zip(out.visual_selections, items, strict=True):
        assert (selection.merged_into == -1).all()
        assert len(selection.indices) <= item.length
        assert selection.indices.tolist() == sorted(set(selection.indices.tolist()))
    text = case.family.inputs([case.rows[2]], query=False)
    assert case.model.generate(**text, **options).visual_selections == []
    assert "visual_selections" not in case.model.generate(
        **{**case.inputs, **options, "output_visual_selection": False}
    )
    with pytest.raises(ValueError, match="pruning that is enabled"):
        case.model.generate(**case.inputs, **options, fsr_enabled=False)


# --- 8: budgets for a call ---


def test_budget_of_the_generation_config(case, monkeypatch):
    """Of a call, else of the model: where servers put what a request says."""
    unpruned = case.generate(fsr_enabled=False, max_new_tokens=4)
    assert not torch.equal(unpruned, case.expected[0][:, :4])  # the test can tell
    monkeypatch.setattr(case.model, "generation_config", GenerationConfig(fsr_enabled=False, pad_token_id=PAD))
    assert torch.equal(case.generate(max_new_tokens=4), unpruned)
    assert torch.equal(case.generate(fsr_enabled=True), case.expected[0])
    assert torch.equal(
        case.generate(generation_config=GenerationConfig(fsr_enabled=True, max_new_tokens=NEW)), case.expected[0]
    )
    misspelt = GenerationConfig(retention_ration=0.5)
    with pytest.raises(ValueError, match="Did you mean `retention_ratio`"):
        case.generate(generation_config=misspelt)
    monkeypatch.setattr(case.model, "generation_config", misspelt)
    with pytest.raises(ValueError, match="Did you mean `retention_ratio`"):
        case.generate()


@pytest.mark.parametrize(
    "settings",
    [{"num_visual_tokens": 1}, {"num_visual_tokens": 5}, {"retention_ratio": 0.5}, {"retention_ratio": 0.01}],
    ids=str,
)
def test_budget_of_a_call(case, settings):
    before = case.model.config.to_dict()
    prompts = case.compress(**settings)
    expected = case.oracle.decode(prompts, 4)[0]
    assert torch.equal(case.generate(**settings, max_new_tokens=4), expected)
    in_config = GenerationConfig(**settings, max_new_tokens=4)
    assert torch.equal(case.generate(generation_config=in_config), expected)
    other = GenerationConfig(num_visual_tokens=2, max_new_tokens=4)
    assert torch.equal(case.generate(generation_config=other, **settings), expected)
    with torch.no_grad():
        out = case.model(**case.inputs, **settings)
    assert out.past_key_values.get_seq_length() == max(len(prompt.columns) for prompt in prompts)
    assert torch.equal(out.logits[:, -1].argmax(-1), expected[:, 0])
    assert case.model.config.to_dict() == before
    assert torch.equal(case.generate(), case.expected[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"num_visual_tokens": 4},
        {"retention_ratio": 0.4},
        {"rho": 1.0},
        {"alpha": 0.0, "kappa": 3.0},
        {"beta": 2, "focus_mass": "budget", "kappa": 0},
        {"rho": 0.95, "focus_mass": "budget"},
        {"invert_relevance": False},
    ],
    ids=str,
)
def test_settings_of_the_config(case, settings):
    model = copy.deepcopy(case.model)
    for name, value in settings.items():
        setattr(model.config.fsr_config, name, value)
    oracle = copy.copy(case.oracle)
    oracle.config = model.config
    prompts = [oracle.compress(row) for row in case.rows]
    assert torch.equal(case.generate(model=model, max_new_tokens=4), oracle.decode(prompts, 4)[0])


# --- 9: the same selection everywhere ---


def selections(model, inputs, **settings):
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_visual_selection": True}
    return model.generate(**inputs, **options, **settings).visual_selections


def test_selection_under_attention_implementations(case):
    model = copy.deepcopy(case.model)
    expected = selections(model, case.inputs)
    model.set_attn_implementation("eager")
    for left, right in zip(selections(model, case.inputs), expected, strict=True):
        assert torch.equal(left.indices, right.indices)
        assert torch.equal(left.is_focus, right.is_focus)
        assert torch.equal(left.merged_into, right.merged_into)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(case, dtype):
    rows = [[BOS, 5, case.family.item(kind, seed=40 + n), 6] for n in range(4) for kind in case.family.kinds]
    inputs = case.family.inputs(rows)
    expected = selections(case.model, inputs, retention_ratio=0.5)
    model = copy.deepcopy(case.model).to(dtype)
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    actual = selections(model, half, retention_ratio=0.5)
    kept = sum(len(selection.indices) for selection in expected)
    both = [len({*a.indices.tolist()} & {*e.indices.tolist()}) for a, e in zip(actual, expected, strict=True)]
    # Another Focus token moves the evenly spread ones behind it by one.
    assert sum(both) >= 0.85 * kept
    assert all(selection.features.dtype == dtype for selection in actual)
    # Pixels in float32 are what processors return; the stock classes cast them.
    assert case.generate(half, model=model, max_new_tokens=3).shape == (len(rows), 3)


def test_autocast(case):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert case.generate().shape == (len(case.rows), NEW)
        out = case.model(**case.inputs, labels=case.inputs["input_ids"])
    out.loss.backward()
    case.model.zero_grad()
    with torch.no_grad():
        expected = case.model(**case.inputs, labels=case.inputs["input_ids"]).loss
    torch.testing.assert_close(out.loss.detach(), expected, rtol=0.05, atol=0)


class NoHostRead(TorchDispatchMode):
    """What waits for the device: reading a value on the host, or a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"), func
        return func(*args, **(kwargs or {}))


def test_selection_does_not_wait_for_the_device(case, monkeypatch):
    calls = []

    def watch(module, name):
        original = getattr(module, name)

        def watched(*args, **kwargs):
            calls.append(name)
            with NoHostRead():
                return original(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    with pytest.raises(AssertionError), NoHostRead():
        torch.ones(3).sum().item()
    watch(compression, "select_from_items")
    if case.family.has_text_encoder:
        watch(clip_tower, "cls_attention")
        watch(case.model.model.text_encoder, "encode_query")
        watch(case.model.model.text_encoder, "forward")
    assert torch.equal(case.generate(), case.expected[0])
    assert len(calls) == (4 if case.family.has_text_encoder else 1)


def test_no_attention_maps_and_no_hooks(case):
    model = copy.deepcopy(case.model)
    tower = model.get_submodule(case.family.tower)
    calls = []
    handles = [
        module.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
        for module in tower.modules()
    ]
    case.generate(model=model)
    assert calls
    assert not any(kwargs.get("output_attentions") for kwargs in calls)
    for handle in handles:
        handle.remove()
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    # transformers has its own, which record hidden states.
    assert {hook.__module__.split(".")[0] for hook in hooks} <= {"transformers"}


def test_offloaded_weights(case):
    """Weights are on the meta device but while their module is called."""
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(copy.deepcopy(case.model), execution_device="cpu")
    assert next(model.get_submodule(case.family.tower).parameters()).device.type == "meta"
    assert torch.equal(case.generate(model=model), case.expected[0])


# --- 10: forward ---


def labels_for(inputs):
    """
    All ids but padding and the first of a row, which padding would have to predict. The first column keeps its label,
    which nothing predicts.
    """
    mask = inputs["attention_mask"]
    labels = inputs["input_ids"].masked_fill((mask == 0) | (mask.cumsum(-1) == 1), -100)
    labels[:, 0] = inputs["input_ids"][:, 0]
    return labels


def reference_loss(case, prompts, logits, count=None):
    """Mean over the labels of words, and over `count` instead where given."""
    total, number = 0.0, 0
    for prompt, scores in zip(prompts, logits):
        ids = torch.tensor([prompt.ids[column] for column in prompt.columns])
        ids = ids.masked_fill(torch.tensor(prompt.visual), -100)[1:]
        total = total + cross_entropy(scores[:-1].float(), ids, ignore_index=-100, reduction="sum")
        number += int((ids != -100).sum())
    return total / (number if count is None else count)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_forward(case, padding_side):
    inputs = case.family.inputs(case.rows, padding_side=padding_side)
    labels = labels_for(inputs)
    with torch.no_grad():
        out = case.model(**inputs, labels=labels)
    logits = [case.oracle.logits(prompt) for prompt in case.prompts]
    close(out.loss, reference_loss(case, case.prompts, logits))
    assert out.logits.shape == (len(case.rows), case.length, VOCAB_SIZE)
    for row, (prompt, expected) in enumerate(zip(case.prompts, logits)):
        start = case.length - len(prompt.ids) if padding_side == "left" else 0
        columns = torch.tensor(prompt.columns) + start
        close(out.logits[row, columns], expected)
        is_dropped = torch.ones(case.length, dtype=torch.bool)
        is_dropped[columns] = False
        is_dropped &= inputs["attention_mask"][row].bool()
        assert is_dropped.sum() == len(prompt.ids) - len(prompt.columns)
        # A dropped position has the logits of the last kept one before it.
        for position in is_dropped.nonzero()[:, 0].tolist():
            before = (columns <= position).sum() - 1
            close(out.logits[row, position], expected[before])
    # The same with labels of placeholders, which never count, or at -100.
    placeholders = torch.isin(inputs["input_ids"], torch.tensor(case.family.placeholder_ids))
    with torch.no_grad():
        assert torch.equal(case.model(**inputs, labels=labels.masked_fill(placeholders, -100)).loss, out.loss)


@pytest.mark.parametrize("number", [int, torch.tensor], ids=["int", "tensor"])
def test_num_items_in_batch(case, number):
    """Trainer divides by the labels it counted in the step, those of placeholders among them."""
    inputs = case.inputs
    labels = labels_for(inputs)
    counted = int((labels[:, 1:] != -100).sum())
    logits = [case.oracle.logits(prompt) for prompt in case.prompts]
    with torch.no_grad():
        loss = case.model(**inputs, labels=labels, num_items_in_batch=number(counted)).loss
        close(loss, reference_loss(case, case.prompts, logits))
        # Several micro-batches to a step: each is a share of it.
        share = case.model(**inputs, labels=labels, num_items_in_batch=number(2 * counted)).loss
        close(share, loss / 2)
        # Labels that count words alone.
        placeholders = torch.isin(inputs["input_ids"], torch.tensor(case.family.placeholder_ids))
        masked = labels.masked_fill(placeholders, -100)
        words = case.model(**inputs, labels=masked, num_items_in_batch=number(7)).loss
        close(words, reference_loss(case, case.prompts, logits, count=7))


def test_loss_counts_as_the_stock_model(case, stock):
    """On rows without an item, and with nothing pruned, both are the same thing."""
    labels = labels_for(case.inputs)
    with torch.no_grad():
        for count in (None, torch.tensor(5)):
            options = {} if count is None else {"num_items_in_batch": count}
            expected = stock(**case.stock_inputs(), labels=labels, **options).loss
            assert torch.equal(case.model(**case.inputs, labels=labels, fsr_enabled=False, **options).loss, expected)


def test_logits_to_keep(case):
    with torch.no_grad():
        full = case.model(**case.inputs).logits
        for number in (1, 2, 6, case.length - 1, case.length, case.length + 10):
            close(case.model(**case.inputs, logits_to_keep=number).logits, full[:, -number:])
        index = torch.tensor([case.length - 1, 0, 5, case.length - 4])
        close(case.model(**case.inputs, logits_to_keep=index).logits, full[:, index])
        if VERSION < (5, 22):
            return  # the stock class takes no more forms of it
        per_row = torch.stack([(index + row) % case.length for row in range(len(case.rows))])
        expected = full.take_along_dim(per_row[..., None], dim=1)
        close(case.model(**case.inputs, logits_to_keep=per_row).logits, expected)
        mask = torch.arange(case.length) % 3 == torch.arange(len(case.rows))[:, None] % 3
        close(case.model(**case.inputs, logits_to_keep=mask).logits, full[mask])


def test_compressed_parts_of_the_output(case):
    length = max(len(prompt.columns) for prompt in case.prompts)
    model = copy.deepcopy(case.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**case.inputs, output_hidden_states=True, output_attentions=True)
        expected = case.oracle.run(case.prompts[1], output_hidden_states=True)
    assert out.past_key_values.get_seq_length() == length
    assert out.attentions[0].shape[-2:] == (length, length)
    assert out.hidden_states[-1].shape[:2] == (len(case.rows), length)
    close(out.hidden_states[-1][1, -len(case.prompts[1].columns) :], expected.hidden_states[-1][0])
    with torch.no_grad():
        as_tuple = model(**case.inputs, labels=case.inputs["input_ids"], return_dict=False)
        out = model(**case.inputs, labels=case.inputs["input_ids"])
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], out.loss)
    assert torch.equal(as_tuple[1], out.logits)


def test_forward_without_a_mask(case):
    inputs = case.family.inputs([case.rows[0]])
    expected = case.oracle.logits(case.prompts[0])
    del inputs["attention_mask"]
    with torch.no_grad():
        close(case.model(**inputs).logits[0, case.prompts[0].columns], expected)


def test_forward_into_an_empty_cache(case):
    cache = DynamicCache()
    with torch.no_grad():
        out = case.model(**case.inputs, past_key_values=cache)
        assert out.past_key_values is cache
        with pytest.raises(ValueError, match=r"`past_key_values` .* already holds tokens"):
            case.model(**case.inputs, past_key_values=cache)
    assert torch.equal(out.logits[:, -1].argmax(-1), case.expected[0][:, 0])


def test_forward_of_text(case, stock):
    text = case.family.inputs([case.rows[2]], query=False)
    with torch.no_grad():
        expected, actual = stock(**text, labels=text["input_ids"]), case.model(**text, labels=text["input_ids"])
        assert torch.equal(actual.loss, expected.loss)
        assert torch.equal(actual.logits, expected.logits)
        embeds = stock.get_input_embeddings()(text["input_ids"])
        assert torch.equal(case.model(inputs_embeds=embeds).logits, stock(inputs_embeds=embeds).logits)


def test_forward_refuses_what_refers_to_the_whole_prompt(case, no_work):
    embeds = case.model.get_input_embeddings()(case.inputs["input_ids"])
    for options, message in (
        ({"position_ids": torch.arange(case.length)[None]}, "`position_ids` together with pixels"),
        ({"shift_labels": case.inputs["input_ids"]}, "`shift_labels` together with pixels"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "`cu_seq_lens_q` together with pixels"),
        ({"inputs_embeds": embeds}, "`inputs_embeds` together with pixels"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "`attention_mask` must have the shape"),
        ({"num_visual_tokens": 0}, "`num_visual_tokens=0` is not allowed"),
        ({"num_visual_tokens": 3, "retention_ratio": 0.5}, "are both set"),
    ):
        with pytest.raises(ValueError, match=message):
            case.model(**{**case.inputs, **options})
    inputs = {name: value for name, value in case.inputs.items() if name != "input_ids"}
    with pytest.raises(ValueError, match="Pixels need `input_ids`"):
        case.model(**inputs)


def test_visual_outputs(case):
    """As the stock class has them: the tower's states, and for each picture what the language model got of it."""
    with torch.no_grad():
        out = case.model.model(**case.inputs)
    if VERSION < (5, 24):
        pytest.skip("the stock class has them from 5.24 on")
    for modality in ("image", "video"):
        items = [
            (item, selection)
            for row, prompt in zip(case.rows, case.prompts)
            for item, selection in zip([part for part in row if isinstance(part, Item)], prompt.selections)
            if item.modality == modality
        ]
        outputs = out.get(f"{modality}_outputs")
        if not items:
            assert outputs is None
            continue
        assert outputs.last_hidden_state.ndim >= 2
        for features, (_, selection) in zip(outputs.pooler_output, items, strict=True):
            close(features, torch.stack([selection.features[i] for i in selection.kept]))


# --- 13: the inner model ---


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_inner_model(case, padding_side):
    """As trainers with a fused head call it: pruned, with states at the caller's positions."""
    inputs = case.family.inputs(case.rows, padding_side=padding_side)
    with recorded(case.model.get_submodule(case.family.language_model)) as calls, torch.no_grad():
        out = case.model.model(**inputs, use_cache=False)
        logits = case.model(**inputs).logits
        assert torch.equal(case.model.base_model(**inputs).last_hidden_state, out.last_hidden_state)
        as_tuple = case.model.model(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], out.last_hidden_state)
    width = max(len(prompt.columns) for prompt in case.prompts)
    assert [call["inputs_embeds"].shape[1] for _, call in calls] == [width] * 4
    assert out.last_hidden_state.shape[:2] == inputs["input_ids"].shape
    close(case.model.lm_head(out.last_hidden_state), logits)
    for row, prompt in enumerate(case.prompts):
        columns = torch.tensor(prompt.columns) + (case.length - len(prompt.ids) if padding_side == "left" else 0)
        expected = case.oracle.run(prompt, output_hidden_states=True).hidden_states[-1][0]
        close(out.last_hidden_state[row, columns], expected)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("inner", [True, False], ids=["inner", "outer"])
def test_own_loop_under_either_name_of_the_cache(case, name, inner):
    """A batch, with and without a mask of the cache's width, after a prefill into the caller's own cache."""
    cache = DynamicCache()
    model = case.model.model if inner else case.model

    def last_logits(out):
        return case.model.lm_head(out.last_hidden_state[:, -1]) if inner else out.logits[:, -1]

    with torch.no_grad():
        out = model(**case.inputs, **{name: cache})
        assert get_cache(out) is cache
        width = cache.get_seq_length()
        mask = torch.zeros(len(case.rows), width, dtype=torch.long)
        for row, prompt in enumerate(case.prompts):
            mask[row, width - len(prompt.columns) :] = 1
        tokens = []
        for _ in range(NEW):
            tokens.append(last_logits(out).argmax(-1))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            out = model(input_ids=tokens[-1][:, None], attention_mask=mask, **{name: cache})
    assert torch.equal(torch.stack(tokens, dim=1), case.expected[0])
    with pytest.raises(ValueError, match="already holds tokens"):
        model(**case.inputs, **{name: cache})


# --- 11: gradients ---


def test_gradients_are_those_of_the_oracle(case):
    model, reference = copy.deepcopy(case.model), copy.deepcopy(case.reference)
    labels = labels_for(case.inputs)
    model(**case.inputs, labels=labels).loss.backward()
    oracle = Oracle(case.family, model, reference)
    prompts = [oracle.compress(row, grad=True) for row in case.rows]
    assert any(selection.merged_into for prompt in prompts for selection in prompt.selections)
    logits = [oracle.run(prompt).logits[0] for prompt in prompts]
    reference_loss(case, prompts, logits).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    tower = 0.0
    for name, parameter in reference.named_parameters():
        expected = parameter.grad
        if expected is None or not expected.any():
            assert gradients[name] is None or not gradients[name].any(), name
            continue
        torch.testing.assert_close(
            gradients[name], expected, rtol=1e-2, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
        tower += float(expected.abs().sum()) * name.startswith(case.family.tower)
    assert tower > 0
    assert all(gradient is None for name, gradient in gradients.items() if "text_encoder." in name)


def test_text_tower_never_trains(case, tmp_path):
    if not case.family.has_text_encoder:
        pytest.skip("no text encoder")
    case.model.save_pretrained(tmp_path)
    loaded = type(case.model).from_pretrained(tmp_path)
    for model in (case.family.build(), loaded, copy.deepcopy(case.model)):
        for change in (lambda m: m, lambda m: m.train(), lambda m: m.requires_grad_(True), lambda m: m.train()):
            change(model)
            assert not model.model.text_encoder.training
            assert not any(module.training for module in model.model.text_encoder.modules())
            assert not any(parameter.requires_grad for parameter in model.model.text_encoder.parameters())
        assert model.training
        assert all(p.requires_grad for name, p in model.named_parameters() if "text_encoder." not in name)
        model(**case.inputs, labels=case.inputs["input_ids"]).loss.backward()
        assert all(parameter.grad is None for parameter in model.model.text_encoder.parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(case, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(case.model).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**case.inputs, labels=case.inputs["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    language_model = {name for name in gradients[0] if name.startswith(case.family.language_model)}
    assert language_model
    for name in language_model:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-3, atol=1e-6)


# --- 12: placeholders ---


def test_placeholders_must_match_the_pixels(case, no_work):
    family = case.family
    item = family.item(seed=1)
    shorter = Item(
        item.modality, [t for n, t in enumerate(item.token_ids) if n != len(item.token_ids) // 2], item.inputs, 0
    )
    longer = Item(
        item.modality,
        [*item.token_ids[:1], item.token_ids[len(item.token_ids) // 2], *item.token_ids[1:]],
        item.inputs,
        0,
    )
    silent = Item(item.modality, [], item.inputs, 0)
    broken = Item(item.modality, [*item.token_ids[:-2], 9, *item.token_ids[-2:]], item.inputs, 0)
    without = Item(item.modality, item.token_ids, {}, 0)
    for rows in (
        [[BOS, shorter, 7]],
        [[BOS, longer, 7]],
        [[BOS, item, 7, silent]],
        [[BOS, item, 7, without]],
        [[BOS, shorter, 7], [BOS, longer, 7]],
        [[BOS, silent, 7], [BOS, 7, 8]],
        [[BOS, broken, 7]],
    ):
        inputs = family.inputs(rows)
        for call in (case.model, functools.partial(case.model.generate, max_new_tokens=2)):
            with pytest.raises(ValueError, match=f"(?i){item.modality} .*do not match"):
                call(**inputs)


def test_sampled_placeholder_is_legal(case):
    """A model may write a placeholder; it is a word then."""
    placeholder = case.family.placeholder_ids[0]

    class Force(LogitsProcessor):
        def __call__(self, input_ids, scores):
            is_turn = (input_ids.shape[1] - case.length) in (1, 2, 4)
            return scores.index_fill(1, torch.tensor([placeholder]), math.inf) if is_turn else scores

    def choose(rows, logits):
        is_turn = (len(rows[0]) - len(case.prompts[0].ids)) in (1, 2, 4)
        return torch.full((len(rows),), placeholder) if is_turn else logits.argmax(-1)

    expected = case.oracle.decode(case.prompts, NEW, choose)[0]
    for options in ({}, {"use_cache": False}):
        assert torch.equal(case.generate(logits_processor=LogitsProcessorList([Force()]), **options), expected)


# --- The model as an object ---


def test_meta_device(case):
    with torch.device("meta"):
        model = type(case.model)(case.family.build_config())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_and_load(case, tmp_path, dtype):
    case.model.save_pretrained(tmp_path)
    model, info = type(case.model).from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    if dtype == torch.float32:
        assert torch.equal(case.generate(model=model), case.expected[0])
    assert case.generate(model=model, inputs=case.inputs).shape == (len(case.rows), NEW)


def test_deepcopy(case):
    model = copy.deepcopy(case.model)
    for parameter in case.model.parameters():
        assert all(parameter is not other for other in model.parameters())
        break
    assert torch.equal(case.generate(model=model), case.expected[0])


def test_inference_mode(case):
    with torch.inference_mode():
        assert torch.equal(case.generate(), case.expected[0])


def test_calls_leave_no_state(case):
    """The same call again, after calls with other prompts and budgets, and their inputs stay as they are."""
    inputs = {name: value.clone() for name, value in case.inputs.items()}
    case.generate()
    case.generate(case.one, num_visual_tokens=2, num_beams=2)
    case.generate(case.family.inputs([case.rows[2]]))
    assert torch.equal(case.generate(), case.expected[0])
    for name, value in inputs.items():
        torch.testing.assert_close(case.inputs[name], value, rtol=0, atol=0, equal_nan=True)


def test_misspelt_arguments_of_forward(case):
    for name in ("num_visual_token", "retention_ration", "fsr_enable"):
        with recorded(case.model.get_submodule(case.family.tower)) as calls, pytest.raises(ValueError, match=name):
            case.model(**case.inputs, **{name: 1})
        assert not calls


def test_labels_of_another_shape(case):
    with recorded(case.model.get_submodule(case.family.tower)) as calls, pytest.raises(ValueError, match="`labels`"):
        case.model(**case.inputs, labels=case.inputs["input_ids"][:, 1:])
    assert not calls


def test_pixels_that_are_none(case):
    """As from `batch.get("pixel_values")` of a batch of words, or of one modality: those of the other are `None`."""
    words = case.family.inputs([case.rows[2]], query=False)
    nothing = dict.fromkeys(case.model.model.pixel_inputs)
    for settings in ({}, {"fsr_enabled": False}):
        assert torch.equal(case.generate({**words, **nothing}, **settings), case.generate(words))
    for settings in ({}, {"num_visual_tokens": 10**6}):
        expected = case.generate(case.inputs, **settings)
        assert torch.equal(case.generate({**nothing, **case.inputs}, **settings), expected)


def test_a_video_for_a_model_of_images(case):
    if "pixel_values_videos" in case.model.model.visual_inputs:
        pytest.skip("this family takes videos")
    inputs = {**case.inputs, "pixel_values_videos": torch.zeros(1, 2, 3, 84, 84)}
    for call in (case.model, case.model.generate):
        with pytest.raises(ValueError, match="takes images alone"):
            call(**inputs)
