"""
A vLLM engine in a process of its own: `python serving_engine.py JOBS RESULTS`, two pickles.

`JOBS` holds the options of `vllm.LLM` and batches of prompts: each batch is handed to the engine at once. `RESULTS` is
a list with, for each batch, its answers and what the encoder did meanwhile.
"""

import os
import pickle
import sys
from pathlib import Path


os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
)
TOKENS = 8


def record(model):
    """Note what the encoder of the model returns, from here on: vLLM has tried it out before it compiles a model."""
    encode, model.fsr_log = model.encoder, []
    encode.num_encoded, encode.cache = 0, type(encode.cache)(encode.cache.max_bytes)

    def recorded(visual, budgets, keys, query=None):
        kept = encode(visual, budgets, keys, query)
        model.fsr_log += [part.indices.tolist() for part in kept]
        return kept

    model.encoder = recorded
    model.fsr_encoder = encode


def take_log(model):
    log, model.fsr_log = model.fsr_log, []
    cache = model.fsr_encoder.cache
    return {
        "kept": log,
        "num_encoded": model.fsr_encoder.num_encoded,
        "num_cached": len(cache),
        "num_bytes": cache.num_bytes,
    }


def run(options, batches):
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter

    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 16, "block_size": 32, **options}
    is_fsr = options.pop("is_fsr", True)
    if options.get("tensor_parallel_size", 1) > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # by itself, vLLM wants a NUMA node for each rank
    llm = LLM(**options)
    if is_fsr:
        llm.apply_model(record)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, ignore_eos=True, logprobs=1)
    results, num_before = [], 0
    for batch in batches:
        try:
            outputs = llm.generate(batch, sampling, use_tqdm=False)
        except ValueError as error:
            results.append({"error": str(error)})
            continue
        ranks = llm.apply_model(take_log) if is_fsr else [{"num_encoded": 0}]
        results.append(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "logprobs": [
                    [
                        step[token].logprob
                        for step, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids)
                    ]
                    for output in outputs
                ],
                "lengths": [len(output.prompt_token_ids) for output in outputs],
                "prefix_hits": [output.num_cached_tokens for output in outputs],
                **ranks[0],
                "num_encoded": ranks[0]["num_encoded"] - num_before,
                "kept_by_rank": [rank.get("kept") for rank in ranks],
                "is_compiled": compilation_counter.num_models_seen > 0,
            }
        )
        num_before = ranks[0]["num_encoded"]
    return results


if __name__ == "__main__":
    jobs, results = map(Path, sys.argv[1:])
    results.write_bytes(pickle.dumps(run(*pickle.loads(jobs.read_bytes()))))
