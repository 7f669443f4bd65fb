"""`fsr-hf bench`: what it counts is checked by hand, what it times only for being there."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModel
from typer.testing import CliRunner

from fsr_hf import bench, select_visual_tokens
from fsr_hf.bench import Method, StageClock, measure, parse_budgets, parse_size, random_selection, run_bench
from fsr_hf.cli import app
from fsr_hf.modeling import clip_tower, fsr
from fsr_hf.testing.small_families import SMALL_FAMILIES, export_small_model


# Placeholders and candidates of a picture of 672 x 672 pixels, or a video of 4 frames, in each family: a view has
# 24 x 24 patches, four tiles have 48 rows, each with a newline; 28 pixels are a token of Qwen2.5-VL, 32 one of
# Qwen3-VL; a frame of LLaVA-Video has 14 rows of 14 tokens and a newline.
TOKENS = {
    "fsr_llava": (576, 576),
    "fsr_llava_next": (5 * 576 + 48, 5 * 576),
    "fsr_qwen2_5_vl": (24 * 24, 24 * 24),
    "fsr_qwen3_vl": (21 * 21, 21 * 21),
    "fsr_llava_video": (4 * 14 * 15, 4 * 14 * 14),
}
LAYERS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE = 2, 2, 16, 64, 128  # of all small models but LLaVA-1.5
OWN = {"saliency", "Focus", "Scan", "Refine", "compaction"}
TEXT = {"text tower", "relevance"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    return {name: export_small_model(name, root / name) for name in SMALL_FAMILIES}


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# ---------------------------------------------------------------------- arguments


def test_budgets_and_sizes():
    assert parse_budgets("64,0.25, 128") == [64, 0.25, 128] and isinstance(parse_budgets("1")[0], int)
    assert parse_size("672x336") == (672, 336)
    for text in ("", "64,", "0", "-3", "1.5", "0.0", "nan", "64 128", "x"):
        with pytest.raises(ValueError, match="--budgets"):
            parse_budgets(text)
    for text in ("672", "672x", "0x3", "3x4x5", "a x b"):
        with pytest.raises(ValueError, match="--image-size"):
            parse_size(text)


def test_refuses_before_any_work(folders, tmp_path, monkeypatch):
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 30)).save(image)
    llava, words = folders["fsr_llava"], tmp_path / "words.png"
    words.write_text("no picture")
    monkeypatch.setattr(bench, "measure", None)  # none of them comes to it
    for arguments, code, expected in (
        ((llava, "--budgets", "0"), 2, "--budgets"),
        ((llava, "--image-size", "672"), 2, "--image-size"),
        ((llava, "--image-size", "9999999x9999999"), 1, "--image-size 9999999x9999999 is too large"),
        ((llava, "--num-frames", 9999999), 1, "fewer --num-frames"),
        ((llava, "--image", tmp_path / "none.png"), 2, "no file"),
        ((llava, "--image", words), 1, "not an image"),
        ((llava, "--json", tmp_path / "no" / "out.json"), 1, "no folder"),
        ((llava, "--dtype", "int8"), 1, "--dtype"),
        ((llava, "--device", "abacus"), 1, "abacus"),
        ((llava, "--num-frames", 4), 1, "images alone"),
        ((folders["fsr_llava"].parent / "stock",), 1, "without FSR"),
        ((tmp_path / "no" / "such" / "model",), 1, "neither a folder nor"),
    ):
        result = invoke("bench", *arguments)
        assert result.exit_code == code, (arguments, result.output)
        message = [line for line in result.stderr.splitlines() if line.startswith("fsr-hf: ")]
        assert len(message) == 1 and expected in message[0], (arguments, result.stderr)


def test_a_budget_that_prunes_nothing_is_refused(folders):
    result = invoke("bench", folders["fsr_llava"], "--budgets", "64,576")
    assert result.exit_code == 1 and "576 would prune nothing" in result.stderr


def test_help_has_examples():
    result = invoke("bench", "--help")
    assert result.exit_code == 0 and "fsr-hf bench ./llava-1.5-7b-fsr" in result.output


# ---------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("family", SMALL_FAMILIES)
def test_every_family(folders, family, tmp_path):
    placeholders, candidates = TOKENS[family]
    options = {"num_frames": 4} if family == "fsr_llava_video" else {}
    lines, file = [], tmp_path / "out.json"
    results = run_bench(
        str(folders[family]),
        budgets=[40, 0.25],
        batch_sizes=[1, 2],
        repeats=2,
        new_tokens=1,
        device="cpu",
        json_file=file,
        progress=False,
        echo=lines.append,
        **options,
    )
    assert json.loads(file.read_text()) == results
    assert max(map(len, lines[1:])) <= 125
    heads = 4 if family == "fsr_llava" else KV_HEADS
    for batch, result in enumerate(results, start=1):
        prompt, methods = result["prompt"], result["methods"]
        assert (prompt["placeholders"], prompt["candidates"]) == (placeholders, candidates)
        assert (prompt["batch"], prompt["items"]) == (batch, batch)
        kept = {None: placeholders, 40: 40, 0.25: candidates // 4}
        names = ["unpruned", "FSR", "FSR", "random", "random"]
        assert [(method["method"], method["budget"]) for method in methods] == list(
            zip(names, [None, 40, 0.25, 40, 0.25])
        )
        for method in methods:
            tokens = kept[method["budget"]]
            assert method["visual_tokens"] == tokens and method["length"] == tokens + prompt["text"]
            entry = batch * LAYERS * 2 * heads * HEAD_DIM * 4  # keys and values in float32
            assert method["kv_bytes"] == method["length"] * entry
            assert method["visual_kv_bytes"] == tokens * entry
            assert method["flops"] == 2 * method["macs"]
            for times in (method["prefill"], method["decode"]):
                assert len(times["runs"]) == 2 and 0 < times["low"] <= times["median"] <= times["high"]
        # FLOPs of random tokens differ from the unpruned ones in the language model alone: weights, and attention.
        unpruned, random = methods[0], methods[3]
        key_size = heads * HEAD_DIM
        intermediate = 8 * HIDDEN // 3 if family == "fsr_llava" else INTERMEDIATE
        weights = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * key_size + 3 * HIDDEN * intermediate)
        expected = 2 * weights * (unpruned["length"] - random["length"])
        expected += 4 * LAYERS * HIDDEN * (unpruned["length"] ** 2 - random["length"] ** 2)
        # 5.17 multiplies matrices for rotary angles, too.
        assert unpruned["flops"] - random["flops"] == pytest.approx(batch * expected, rel=1e-3)
        assert all(ours["flops"] > floor["flops"] for ours, floor in zip(methods[1:3], methods[3:]))

        stages = result["stages"]
        has_text = family in ("fsr_llava", "fsr_llava_next")
        assert OWN | (TEXT if has_text else set()) <= set(stages["stages"])
        assert {"vision tower", "projector", "features", "language model", "rest"} <= set(stages["stages"])
        assert has_text or not TEXT & set(stages["stages"])
        own = sum(stages["stages"][name]["runs"][0] for name in OWN | (TEXT if has_text else set()))
        assert stages["own"]["runs"][0] == pytest.approx(own) and own > 0
        assert stages["visual_tokens"] == 40 and 1 <= stages["focus_tokens"] <= 40
    text = "\n".join(lines)
    assert f"{placeholders:,} visual tokens" in text and "FSR at 40 tokens" in text and "transformers" in text


def test_video_file_and_picture_file(folders, tmp_path):
    from clips import write_clip

    write_clip(tmp_path / "clip.mp4")
    options = {"budgets": [30], "repeats": 1, "new_tokens": 0, "device": "cpu", "progress": False}
    for family in ("fsr_llava_video", "fsr_qwen2_5_vl", "fsr_qwen3_vl"):
        folder = str(folders[family])
        (result,) = run_bench(folder, image=tmp_path / "clip.mp4", num_frames=2, **options)
        if family == "fsr_llava_video":
            assert result["prompt"]["candidates"] == 2 * 14 * 14
        assert result["methods"][1]["visual_tokens"] == 30 and result["methods"][0]["decode"] is None
        (result,) = run_bench(folder, num_frames=4, image_size=(140, 84), **options)
        assert result["methods"][1]["visual_tokens"] == 30
    Image.effect_noise((140, 84), 80).convert("RGB").save(tmp_path / "image.png")
    (result,) = run_bench(str(folders["fsr_llava"]), image=tmp_path / "image.png", **options)
    assert result["prompt"]["candidates"] == 576


def test_the_package_is_as_before_also_after_an_error(folders):
    model = AutoModel.from_pretrained(folders["fsr_llava"]).eval()
    ids = torch.tensor([[1, *[model.config.image_token_id] * 576, 5, 6]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336)}
    before = [vars(owner).get(name) for owner in (fsr, clip_tower) for name in vars(owner)]
    settings = model.config.fsr_config.to_dict()

    def fail(*args, **kwargs):
        raise ArithmeticError

    methods = [Method("unpruned", scores=()), Method("FSR", 20), Method("broken", 20, fail)]
    with pytest.raises(ArithmeticError):
        measure(model, inputs, methods, repeats=1, progress=False)
    measure(model, inputs, methods[:2], repeats=1, progress=False)
    assert before == [vars(owner).get(name) for owner in (fsr, clip_tower) for name in vars(owner)]
    assert model.config.fsr_config.to_dict() == settings and model.selector is select_visual_tokens
    for module in model.modules():
        assert not {"forward", "selector", "compress", "get_image_features", "encode_query"} & set(vars(module))


def test_what_a_selector_does_not_read_is_not_computed(folders, monkeypatch):
    model = AutoModel.from_pretrained(folders["fsr_llava"]).eval()
    ids = torch.tensor([[1, *[model.config.image_token_id] * 576, 5, 6]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336)}
    inputs |= {"query_input_ids": torch.ones(1, 77, dtype=torch.long)}
    seen = {}

    def remember(name):
        def select(features, saliency, relevance, number, **options):
            seen[name] = (bool(saliency.any()), relevance is not None)
            return random_selection(features, saliency, relevance, number, **options)

        return select

    scores = {"all": ("saliency", "relevance"), "saliency": ("saliency",), "relevance": ("relevance",), "none": ()}
    methods = [
        Method("unpruned", scores=()),
        *(Method(name, 20, remember(name), needed) for name, needed in scores.items()),
    ]
    result = measure(model, inputs, methods, repeats=1, new_tokens=0, progress=False)
    assert seen == {"all": (True, True), "saliency": (True, False), "relevance": (False, True), "none": (False, False)}
    flops = {method["method"]: method["flops"] for method in result["methods"]}
    assert flops["none"] < flops["saliency"] < flops["all"] and flops["none"] < flops["relevance"] < flops["all"]
    assert result["stages"] is None  # none of these is FSR


# ---------------------------------------------------------------------- parts


def test_random_selection():
    features = torch.randn(3, 50, 8)
    selection = random_selection(features, None, None, 20)
    assert selection.indices.shape == (3, 20) and (selection.indices.diff(dim=1) > 0).all()
    assert torch.equal(selection.features, features.gather(1, selection.indices[..., None].expand(-1, -1, 8)))

    mask = torch.arange(50) < torch.tensor([50, 30, 4])[:, None]
    selection = random_selection(
        features, None, None, torch.tensor([7, 3, 4]), mask=mask, max_num_visual_tokens=7, rho=0.9
    )
    assert selection.indices.shape == (3, 7)
    assert (selection.indices >= 0).sum(1).tolist() == [7, 3, 4]
    assert selection.indices[1].max() < 30 and selection.indices[2, :4].tolist() == [0, 1, 2, 3]
    for row in selection.indices:
        kept = row[row >= 0]
        assert len(kept.unique()) == len(kept) and torch.equal(row[: len(kept)], kept.sort().values)


def test_times_of_stages_do_not_overlap(monkeypatch):
    now = [0.0]

    def wait(seconds, *calls):
        now[0] += seconds
        for call in calls:
            call()

    clock = StageClock(torch.device("cpu"))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    inner = clock.wrap("inner", lambda: wait(2.0))
    middle = clock.wrap("middle", lambda: wait(3.0, inner, inner))
    outer = clock.wrap("outer", lambda: wait(5.0, middle, inner))
    outer()
    assert clock.times() == {"outer": 5.0, "middle": 3.0, "inner": 6.0}


def test_times_on_a_gpu_are_those_between_events(monkeypatch):
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.seconds = now[0]

        def elapsed_time(self, end):
            return 1e3 * (end.seconds - self.seconds)

    def wait(seconds, *calls):
        now[0] += seconds
        for call in calls:
            call()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StageClock(torch.device("cuda"))
    inner = clock.wrap("inner", lambda: wait(2.0))
    clock.wrap("outer", lambda: wait(3.0, inner))()
    assert clock.times() == {"outer": 3.0, "inner": 2.0}


def test_every_round_runs_every_method_in_another_order(monkeypatch):
    order = []

    def run(model, inputs, method, new_tokens):
        order.append(method.name)
        return {"prefill": 1.0, "decode": 1.0, "peak_bytes": None}

    monkeypatch.setattr(bench, "_run", run)
    prompt = {"batch": 1, "length": 9, "items": 1, "placeholders": 8, "candidates": 8, "text": 1}
    monkeypatch.setattr(bench, "_describe_prompt", lambda *_: prompt)
    monkeypatch.setattr(bench, "_count", lambda *_: {"flops": 1})
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(_attn_implementation="sdpa"))
    model = SimpleNamespace(device=torch.device("cpu"), config=config, dtype=torch.float32, parameters=list)
    methods = [Method("a"), Method("b", 3, random_selection), Method("c", 4, random_selection)]
    result = measure(model, {}, methods, repeats=3, warmup=1, progress=False)
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"] and result["repeats"] == 3
    order.clear()
    result = measure(model, {}, methods, repeats=9, seconds=0.0, warmup=2, progress=False)
    assert len(order) == 3 + 9 and result["repeats"] == 3
