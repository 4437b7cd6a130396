"""Writes a GGUF file of a vision tower's shapes with random weights, for llama.cpp's clip code.

    clip_files.py CONFIG KIND OUTPUT

CONFIG is the config.json of the folder that `candor-tools synthesize` wrote. The tower is SigLIP up to the layer whose
state the model uses. Linear layers are in KIND (q8_0, bf16 or f16), the kernel of the patches in f16, the rest in f32.
clip wants a projector behind the tower; this one has few outputs.
"""

import json
import sys

import numpy
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

SMALL = 0.02
PROJECTED = 32

random = numpy.random.default_rng(1)


def write(config, kind, output):
    linear_type = GGMLQuantizationType[kind.upper()]
    tower = config["vision_config"]
    width, mlp, side, patch = (tower[key] for key in ("hidden_size", "intermediate_size", "image_size", "patch_size"))
    selected = config["mm_vision_select_layer"]
    layers = selected + tower["num_hidden_layers"] + 1 if selected < 0 else selected
    writer = GGUFWriter(output, "clip")
    writer.add_clip_has_vision_encoder(True)
    # SigLIP with a picture of one size, an output a patch, and a projector of two layers.
    writer.add_clip_projector_type("janus_pro")
    writer.add_vision_image_size(side)
    writer.add_vision_patch_size(patch)
    writer.add_vision_embedding_length(width)
    writer.add_vision_feed_forward_length(mlp)
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(tower["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_projection_dim(PROJECTED)
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.5] * 3)
    # The one with tanh.
    writer.add_vision_use_gelu(True)

    def values(name, *shape, deviation=SMALL, middle=0.0, dtype=numpy.float32):
        writer.add_tensor(name, (middle + deviation * random.standard_normal(shape)).astype(dtype))

    def linear(name, rows, columns):
        table = columns**-0.5 * random.standard_normal((rows, columns), dtype=numpy.float32)
        writer.add_tensor(f"{name}.weight", quantize(table, linear_type), raw_dtype=linear_type)
        values(f"{name}.bias", rows)

    def norm(name):
        values(f"{name}.weight", width, middle=1.0)
        values(f"{name}.bias", width)

    kernel = (width, 3, patch, patch)
    values("v.patch_embd.weight", *kernel, deviation=(3 * patch * patch) ** -0.5, dtype=numpy.float16)
    values("v.patch_embd.bias", width)
    values("v.position_embd.weight", (side // patch) ** 2, width)
    for layer in range(layers):
        name = f"v.blk.{layer}"
        norm(f"{name}.ln1")
        for part in ("q", "k", "v", "out"):
            linear(f"{name}.attn_{part}", width, width)
        norm(f"{name}.ln2")
        linear(f"{name}.ffn_up", mlp, width)
        linear(f"{name}.ffn_down", width, mlp)
    linear("mm.0", PROJECTED, width)
    linear("mm.1", PROJECTED, PROJECTED)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        write(json.load(file), *sys.argv[2:])
