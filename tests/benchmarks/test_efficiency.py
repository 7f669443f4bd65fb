"""The efficiency and growth benchmarks on tiny models: what they count, write and say. No time is looked at."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from benchmarks import efficiency, growth, selectors
from benchmarks.efficiency import PEERS, as_selector, methods_of, time_calls
from benchmarks.efficiency_docs import BLOCKS, DOCS, RESULTS, fill_blocks, targets_block, write_docs
from benchmarks.growth import exponent
from benchmarks.models import Prompt, build, make_inputs


# Billions of weights without the text tower, as published.
PARAMETERS = {"llava": 7.06, "llava_next": 7.06, "qwen2_5_vl": 8.29, "llava_video": 8.03}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of the tiny models, section by section as after an interruption, and of small growth."""
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--quick", "--device", "cpu", "--new-tokens", "1", "--output", str(folder / "efficiency-cpu.json")]
    efficiency.main([*arguments, "--sections", "flops", "selection"])
    efficiency.main([*arguments, "--sections", *efficiency.BUDGETS])
    growth.main(["--quick", "--device", "cpu", "--hidden-size", "32", "--output", str(folder / "growth-cpu.json")])
    shutil.copy(RESULTS / "paper.json", folder)
    return folder


def load(results: Path, name: str):
    return json.loads((results / f"{name}.json").read_text())


@pytest.mark.parametrize("family", PARAMETERS)
def test_full_size(family):
    model = build(family, "full", "meta", torch.bfloat16)
    weights = [weight.numel() for name, weight in model.named_parameters() if "text_encoder" not in name]
    assert round(sum(weights) / 1e9, 2) == PARAMETERS[family]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    scaled = build(family, "scaled", "meta", torch.float32)
    assert sum(weight.numel() for weight in scaled.parameters()) < 0.5e9


@pytest.mark.parametrize(
    ("family", "size", "tokens"),
    [
        ("llava", 0, (576, 576)),
        ("llava_next", 0, (2880 + 48, 2880)),
        ("qwen2_5_vl", 74, (37 * 37, 37 * 37)),
        ("llava_video", 32, (32 * 14 * 15, 32 * 14 * 14)),
    ],
)
def test_prompts_have_the_tokens_of_the_published_models(family, size, tokens):
    model = build(family, "full", "meta", torch.bfloat16)
    inputs = make_inputs(model, family, Prompt(size, text=20), 2)
    items = model.model.build_items(**model.model.pop_visual(inputs))
    items = model.model.place_items(inputs["input_ids"], items)
    assert [item.row for item in items] == [0, 1]
    assert [item.length for item in items] == [tokens[0]] * 2
    assert [item.num_candidates for item in items] == [tokens[1]] * 2
    assert inputs["input_ids"].shape == (2, tokens[0] + 20)


def test_sections(results):
    found = load(results, "efficiency-cpu")
    assert set(found) == set(efficiency.SECTIONS)
    for family, budgets in efficiency.BUDGETS.items():
        (result,) = found[family]
        methods = [(method["method"], method["budget"]) for method in result["methods"]]
        expected = [("unpruned", None), *(("FSR", budget) for budget in budgets)]
        expected += [("random", budget) for budget in budgets]
        if family == "llava":
            expected += [(peer, 64) for peer in PEERS]
        assert methods == expected
        lengths = {(method["budget"], method["length"]) for method in result["methods"]}
        assert len(lengths) == 1 + len(budgets)  # no method keeps more or less than another
        assert result["stages"]["focus_tokens"] == (5 if family == "llava_next" else 1)  # one in each pool
        assert result["machine"] and result["versions"]["torch"]
    assert all(pool["own_products"]["low"] > 0 for pool in found["selection"])


def test_time_in_products():
    left, right = torch.randn(2, 2, 64, 64)
    assert efficiency.time_products(lambda: left + right) == 0
    assert efficiency.time_products(lambda: left @ right) > 0
    assert efficiency.time_products(lambda: left[0] @ right[0]) > 0


def test_flops_without_values_are_those_of_a_run(results):
    found = load(results, "efficiency-cpu")
    for (family, _), counted in zip(efficiency.BUDGETS.items(), found["flops"]):
        (result,) = found[family]
        batch, unpruned = result["prompt"]["batch"], result["methods"][0]
        # Transformers up to 5.17 multiply matrices for rotary angles, in a run once for all rows.
        assert counted["rows"][0]["flops"] * batch == pytest.approx(unpruned["flops"], rel=1e-4)
        assert counted["rows"][0]["length"] == unpruned["length"]
        for row, method in zip(counted["rows"][1:], result["methods"][1:]):
            assert (row["visual_tokens"], row["length"]) == (method["visual_tokens"], method["length"])
            assert row["visual_kv_bytes"] * 2 * batch == method["visual_kv_bytes"]  # of 2 bytes a number, and of 4


def test_peers_in_the_place_of_fsr():
    features, saliency, relevance = torch.randn(2, 40, 8), torch.rand(2, 40), torch.rand(2, 40)
    for select, _ in PEERS.values():
        tokens, indices = select(features, saliency, relevance, 12)
        selection = as_selector(select)(features, saliency, relevance, 12, rho=0.5)
        assert torch.equal(selection.indices, indices.sort(-1).values)
        for row in range(2):
            place = {int(index): slot for slot, index in enumerate(indices[row])}
            expected = torch.stack([tokens[row, place[int(index)]] for index in selection.indices[row]])
            assert torch.equal(selection.features[row], expected)
    with pytest.raises(ValueError, match="one size"):
        as_selector(selectors.divprune)(features, saliency, relevance, 12, mask=torch.ones(2, 40, dtype=torch.bool))
    names = [method.name for method in methods_of(efficiency.CASES["full"][0])]
    assert names == ["unpruned", *["FSR"] * 3, *["random"] * 3, *PEERS]


def test_a_slow_call_leaves_the_rounds(monkeypatch):
    now = [0.0]
    counts = {"fast": 0, "slow": 0, "endless": 0}

    def wait(name, seconds):
        counts[name] += 1
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    calls = {
        "fast": lambda: wait("fast", 0.01),
        "slow": lambda: wait("slow", 0.75),
        "endless": lambda: wait("endless", 9.0),
    }
    times = time_calls(calls, "cpu", 20, 1.0, "calls")
    assert {name: len(seconds) for name, seconds in times.items()} == {"fast": 20, "slow": 3, "endless": 1}
    assert times["slow"] == pytest.approx([0.75] * 3) and counts["endless"] == 2  # and one that does not count


def test_arguments_are_refused(tmp_path, capsys):
    for main, arguments, expected in (
        (efficiency.main, ["--quick"], "--output"),
        (efficiency.main, ["--repeats", "0"], "--repeats"),
        (efficiency.main, ["--sections", "nothing"], "--sections"),
        (growth.main, ["--quick"], "--output"),
        (growth.main, ["--repeats", "0"], "--repeats"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert expected in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            efficiency.main(["--device", "cuda"])
        assert "no GPU" in capsys.readouterr().err


# ---------------------------------------------------------------------- growth


def test_exponent():
    sizes = [10, 20, 40, 80, 160]
    assert exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert exponent(sizes, [7.0, 7.0, *(size**2 for size in sizes[2:])]) == pytest.approx(2)  # the upper half
    assert exponent([1], [1.0]) is None and exponent(sizes, [0.0] * 5) is None


def test_growth(results, tmp_path):
    found = load(results, "growth-cpu")
    assert list(found) == ["fixed", "share", "kept"]
    assert [point["tokens"] for point in found["fixed"]["points"]] == [36, 72, 144, 288]
    assert all(point["time"]["median"] > 0 for series in found.values() for point in series["points"])
    arguments = ["--quick", "--device", "cpu", "--hidden-size", "32", "--output", str(tmp_path / "growth.json")]
    growth.main([*arguments, "--limit", "0", "--series", "fixed"])
    series = load(tmp_path, "growth")["fixed"]
    assert len(series["points"]) == 1
    assert [point["reason"] for point in series["left_out"]] == ["it would take more than 0 s"] * 3


# ---------------------------------------------------------------------- the page


def test_the_page_is_what_the_results_say():
    text = (DOCS / "efficiency.md").read_text(encoding="utf-8")
    assert fill_blocks(text) == text, "run `python -m benchmarks.efficiency --docs`"
    with pytest.raises(ValueError, match="blocks"):
        fill_blocks(text.replace("begin flops", "begin flop"))


def test_docs(results, tmp_path):
    page = "\n".join(f"# {name}\n<!-- begin {name} -->\nold\n<!-- end {name} -->" for name in BLOCKS)
    (tmp_path / "efficiency.md").write_text(page)
    write_docs(results, tmp_path)
    text = (tmp_path / "efficiency.md").read_text()
    blocks = dict(zip(BLOCKS, text.split("# ")[1:]))
    assert "old" not in text
    for name, block in blocks.items():
        assert ("Not measured yet" in block) == name.endswith("-cuda"), name
    assert "| FSR | 64 |" in blocks["prefill-cpu"] and "| DivPrune | 64 |" in blocks["prefill-cpu"]
    assert "| 64 | 2.291 | 1.145 |" in blocks["paper"]
    for name in ("efficiency", "growth"):
        assert (tmp_path / f"{name}-cpu.webp").stat().st_size < 200_000
        assert not (tmp_path / f"{name}-cuda.webp").exists()
    write_docs(results, tmp_path)
    assert (tmp_path / "efficiency.md").read_text() == text


def test_targets(tmp_path):
    def times(seconds):
        return {"median": seconds, "low": seconds, "high": seconds, "runs": [seconds]}

    def method(name, tokens, flops, seconds):
        sizes = {"length": tokens + 10, "kv_bytes": (tokens + 10) * 8, "visual_kv_bytes": tokens * 8}
        return {"method": name, "visual_tokens": tokens, "flops": flops, "prefill": times(seconds), **sizes}

    result = {
        "model": "a model",
        "prompt": {"batch": 1},
        "methods": [method("unpruned", 100, 80, 8.0), method("FSR", 20, 20, 2.5)],
        "stages": {"own": times(0.4)},
    }
    larger = {**result, "prompt": {"batch": 4}, "stages": {"own": times(0.41)}}
    pool = {"tokens": 576, "kept": 64, "batch": 1, "own_products": times(1.25)}
    pool["methods"] = [
        {"method": name, "time": times(seconds)}
        for name, seconds in (("FSR", 2.0), ("random", 1.0), ("A", 1.9), ("B", 3.0))
    ]
    (tmp_path / "efficiency-cpu.json").write_text(json.dumps({"llava": [result, larger], "selection": [pool]}))
    rows = [[cell.strip() for cell in line.split("|")[2:5]] for line in targets_block(tmp_path).splitlines()[2:]]
    assert rows == [
        ["a model, batch of 4", "5.12%", "**no**"],
        ["a model, batch of 4", "80.0%", "**no**"],  # 3.2 times as fast with a quarter of the FLOPs
        ["all 2 prompts", "exactly", "yes"],
        ["576 → 64, batch of 1", "slower than A", "**no**"],
        ["576 → 64, batch of 1", "1.60", "**no**"],
    ]
    (tmp_path / "efficiency-cpu.json").write_text(json.dumps({"llava": [result]}))
    rows = [line.split("|")[3:5] for line in targets_block(tmp_path).splitlines()[2:]]
    assert [cell.strip() for cell in rows[0]] == ["5.00%", "yes"]
