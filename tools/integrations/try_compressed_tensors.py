#!/usr/bin/env python3
"""Reads a model that `candor-tools quantize` wrote with transformers and compressed-tensors, and compares the logits.

    pip install torch==2.15.0 transformers==5.24.0 compressed-tensors==0.20.0 accelerate==1.15.0
    candor-tools quantize --model models/default --output int4 --weights int4
    tools/integrations/try_compressed_tensors.py int4 [more folders]

A folder's decoder has the names and the layout of a plain Qwen2, so it is laid beside a config.json that says so, with the
folder's own quantization_config, and loaded as any other checkpoint. `candor trace` reads the folder itself. Both are given
the same ids and compute in single precision; the relative error is that of docs/exactness.md.
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ROOT = pathlib.Path(__file__).resolve().parents[2]
DECODER = ("model.embed_tokens.", "model.norm.", "model.layers.", "lm_head.")
KEPT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
        "vocab_size", "rms_norm_eps", "hidden_act", "max_position_embeddings", "tie_word_embeddings",
        "quantization_config")


def decoder_folder(folder, place):
    """The decoder of a model folder as a checkpoint of its own; returns its vocabulary."""
    config = json.loads((folder / "config.json").read_text())
    own = {key: config[key] for key in KEPT if key in config}
    own |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "float32",
            "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]}}
    # Targets of the towers would find nothing in a decoder.
    groups = own["quantization_config"]["config_groups"]
    for group in groups.values():
        group["targets"] = [target for target in group["targets"]
                            if target.replace("\\", "").removeprefix("re:^").startswith(DECODER)
                            or target + "." in DECODER]
    own["quantization_config"]["config_groups"] = {name: group for name, group in groups.items() if group["targets"]}
    (place / "config.json").write_text(json.dumps(own, indent=2))
    with safe_open(folder / "model.safetensors", "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys() if name.startswith(DECODER)}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return config["vocab_size"]


def compare(folder, candor, positions):
    with tempfile.TemporaryDirectory() as scratch:
        place = pathlib.Path(scratch)
        vocabulary = decoder_folder(folder, place)
        ids = torch.randint(0, vocabulary, (positions,), generator=torch.Generator().manual_seed(1))
        save_file({"in.prompt_ids": ids}, place / "in.safetensors")
        subprocess.run([candor, "trace", "--model", folder, "--inputs", place / "in.safetensors",
                        "--out", place / "out.safetensors", "--new-tokens", "0"], check=True, stdout=subprocess.DEVNULL)
        own = load_file(place / "out.safetensors")["out.logits"]
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        with torch.no_grad():
            theirs = model(input_ids=ids[None]).logits[0]
    error = ((own - theirs).abs().max() / theirs.abs().max()).item()
    same = (own.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    formats = json.loads((folder / "config.json").read_text())["quantization_config"]["format"]
    print(f"{folder}: {formats}, {positions} positions, relative error {error:.1e}, the same likeliest token at {same:.0%}")
    return error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--candor", default=ROOT / "target/debug/candor", type=pathlib.Path)
    parser.add_argument("--positions", type=int, default=100)
    parser.add_argument("--most", type=float, default=2e-4, help="relative error from which on it fails")
    options = parser.parse_args()
    errors = [compare(folder, options.candor, options.positions) for folder in options.folders]
    raise SystemExit(max(errors) > options.most)


if __name__ == "__main__":
    main()
