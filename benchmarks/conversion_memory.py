"""Peak memory of a conversion, over the size of its checkpoint.

    python -m benchmarks.conversion_memory
    python -m benchmarks.conversion_memory --stored bfloat16 --served bfloat16

Makes a random Llama classifier of that size in shards, converts it with the command that users run, and
samples the anonymous memory (RssAnon) of the command and of all that it starts, every 10 ms. Pages of mapped
files are told (RssFile) but not judged: the kernel takes them back when memory is short.
What the libraries alone need is measured by converting a model of a few kilobytes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

_SAMPLE_EVERY_S = 0.01
_MIB = 1 << 20
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_VOCABULARY = 32_000


def main() -> None:
    """Print a table: size, peaks, and the ratio that is judged."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        libraries = _convert(_checkpoint(Path(scratch) / "small", 0, "float32"), arguments.served)
        folder = _checkpoint(Path(scratch) / "large", arguments.gigabytes, arguments.stored)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        peak = _convert(folder, arguments.served)
    print(f"checkpoint, {arguments.stored}: {size / _MIB:.0f} MiB, served as {arguments.served}")
    for name in ("RssAnon", "RssFile"):
        print(f"peak {name}: {peak[name] / _MIB:.0f} MiB, libraries alone {libraries[name] / _MIB:.0f} MiB")
    print(f"peak anonymous memory over checkpoint: {peak['RssAnon'] / size:.2f}; it took {peak['seconds']} s")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Peak memory of a conversion, over the checkpoint's size.")
    parser.add_argument(
        "--gigabytes", type=float, default=1.0, help="of the checkpoint; default: %(default)s"
    )
    parser.add_argument("--stored", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--served", choices=("float32", "bfloat16", "float16", "int8"), default="float32")
    parser.add_argument(
        "--scratch", help="where to make the checkpoint; default: the system's temporary folder"
    )
    return parser.parse_args()


def _checkpoint(folder: Path, gigabytes: float, dtype: str) -> Path:
    """A classifier with as many layers of width 1024 as make that size; a tiny one for 0."""
    layers, width, vocabulary = 1, 16, len(_LETTERS) + 3
    if gigabytes:
        each = 2 if dtype == "bfloat16" else 4
        width, vocabulary = 1024, _VOCABULARY
        per_layer = 4 * width**2 + 3 * 4 * width**2
        layers = max(1, round((gigabytes * 1e9 / each - vocabulary * width) / per_layer))
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        vocab_size=vocabulary,
        max_position_embeddings=64,
        pad_token_id=len(_LETTERS),
    )
    config.num_labels = 1
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="300MB")
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*_LETTERS, "<pad>", "<eos>", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def _convert(folder: Path, served: str) -> Counter[str]:
    """Peaks in bytes of each kind of memory, over the whole tree of processes at one moment."""
    command = [
        sys.executable,
        "-m",
        "conch.converters.to_triton",
        "--checkpoint",
        str(folder),
        "--dtype",
        served,
    ]
    command += ["--name", "measured", "--model_store", str(folder.parent / "store"), "--force", "--quiet"]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks: Counter[str] = Counter()
    while process.poll() is None:
        for name, amount in _memory_of_tree(process.pid).items():
            peaks[name] = max(peaks[name], amount)
        time.sleep(_SAMPLE_EVERY_S)
    if process.returncode != 0:
        sys.exit(f"the conversion left with code {process.returncode}")
    peaks["seconds"] = round(time.monotonic() - started)
    return peaks


def _memory_of_tree(pid: int) -> Counter[str]:
    total: Counter[str] = Counter()
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return total
    for process in processes:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except OSError:  # it ended meanwhile
            continue
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssFile"):
                total[name] += int(value.split()[0]) * 1024
    return total


if __name__ == "__main__":
    main()
