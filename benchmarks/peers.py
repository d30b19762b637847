"""Other ways to run the same weights: stock Accelerate, llama.cpp, diffusers' group offload, AirLLM."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.clock import Clock, ClockStreamer, weight_files


class _Transformers:
    """A model of transformers that answers with its own ``generate``."""

    def __init__(self, folder: str, model: Any) -> None:
        from transformers import AutoTokenizer

        self._model = model.eval()
        self._model.generation_config.pad_token_id = 0
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._files = weight_files(folder)

    def measure(self, prompt: str, tokens: int, *, cold: bool = False) -> dict[str, Any]:
        """One answer, greedy."""
        import torch

        device = self._input_device()
        clock = ClockStreamer(self._files if cold else ())
        inputs = self._tokenizer(prompt, return_tensors="pt")
        ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
        with torch.inference_mode():
            self._model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, streamer=clock
            )
        text = self._tokenizer.decode(clock.ids, skip_special_tokens=True)
        return clock.rates(ids.shape[1]) | {"answer": text.strip()}

    def _input_device(self) -> Any:
        places = getattr(self._model, "hf_device_map", None) or {}
        gpus = [place for place in places.values() if place not in ("cpu", "disk")]
        return gpus[0] if gpus else self._model.device


class StockAccelerate(_Transformers):
    """``from_pretrained(device_map=…)`` and ``generate``, nothing else."""

    def __init__(self, folder: str, device_map: Mapping[str, str], quantize: str = "") -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._offload = tempfile.TemporaryDirectory(prefix="llm-magic-stock-")
        packed = {"quantization_config": _bitsandbytes(quantize)} if quantize else {}
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map=dict(device_map),
            dtype=torch.bfloat16,
            offload_folder=self._offload.name,
            local_files_only=True,
            **packed,
        )
        super().__init__(folder, model)

    def close(self) -> None:
        """Remove what was offloaded."""
        self._offload.cleanup()


def _bitsandbytes(method: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=method, bnb_4bit_compute_dtype=torch.bfloat16
    )


class DiffusersOffload(_Transformers):
    """diffusers' group offload, block by block on a stream of its own: every layer in RAM."""

    def __init__(self, folder: str) -> None:
        import torch
        from diffusers.hooks import apply_group_offloading
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
        gpu = torch.device("cuda:0")
        for name in ("embed_tokens", "norm", "rotary_emb"):
            getattr(model.model, name).to(gpu)
        model.lm_head.to(gpu)
        apply_group_offloading(
            model.model,
            onload_device=gpu,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
            exclude_kwargs=["past_key_values"],
        )
        super().__init__(folder, model)

    def _input_device(self) -> Any:
        return "cuda:0"


class AirLLM:
    """AirLLM, which reads every layer from the disk for each token."""

    def __init__(self, folder: str) -> None:
        from airllm import AutoModel
        from transformers import AutoTokenizer

        self._model = AutoModel.from_pretrained(folder, delete_original=False)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def measure(self, prompt: str, tokens: int) -> dict[str, Any]:
        """Two answers, one of them of a single token: it has no streamer to look at."""
        seconds = []
        for count in (1, tokens):
            start = time.perf_counter()
            ids = self._tokenizer(prompt, return_tensors="pt")["input_ids"].to("cuda:0")
            self._model.generate(
                ids, max_new_tokens=count, min_new_tokens=count, use_cache=True, do_sample=False
            )
            seconds.append(time.perf_counter() - start)
        return {"first_token_s": seconds[0], "decode_tps": (tokens - 1) / (seconds[1] - seconds[0])}


class LlamaCppOnGpu:
    """Whether llama.cpp is here with a GPU backend."""

    def measure(self) -> dict[str, str]:
        """Nothing.

        Raises
        ------
        RuntimeError
            When it is not.
        """
        import llama_cpp

        if not llama_cpp.llama_supports_gpu_offload():
            raise RuntimeError("llama-cpp-python is here without a GPU backend")
        return {}


class LlamaCpp:
    """llama.cpp on a GGUF file; layers that are not on the GPU are computed by the CPU.

    Parameters
    ----------
    gpu_layers
        Counted from the end; ``-1`` is all of them.
    """

    def __init__(self, path: str, gpu_layers: int = 0, context: int = 1024) -> None:
        import llama_cpp

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._model = llama_cpp.Llama(
            path,
            n_gpu_layers=gpu_layers,
            n_ctx=context,
            n_threads=cores,
            n_threads_batch=cores,
            verbose=False,
        )

    def measure(self, prompt: str, tokens: int) -> dict[str, Any]:
        """One answer, greedy."""
        self._model.reset()  # or it would find the prompt in its cache
        clock, found = Clock(), []
        ids = self._ids(prompt)
        for token in self._model.generate(ids, temp=0.0):
            found.append(token)
            clock.tick()
            if len(found) == tokens:
                break
        return clock.rates(len(ids))

    def _ids(self, prompt: str) -> list[int]:
        """Words of a random model are their ids; llama.cpp knows no words of it."""
        if all(word[:1] == "w" and word[1:].isdigit() for word in prompt.split()):
            return [int(word[1:]) for word in prompt.split()]
        return list(self._model.tokenize(prompt.encode(), add_bos=False))
