"""Writes a GGUF file of a decoder's shapes with random weights, for llama.cpp.

    llama_files.py CONFIG KIND OUTPUT

CONFIG is the config.json of the folder that `candor-tools synthesize` wrote, so that both sides have the same shapes.
KIND is q4_0 (with the embedding table, which is the output head too, in q8_0) or q8_0.
"""

import json
import sys

import numpy
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

BLOCK = 32
# Bytes of a block behind its scale, and the standard deviation of random ones as the numbers they stand for.
KINDS = {"q4_0": (Type.Q4_0, 16, 4.61), "q8_0": (Type.Q8_0, 32, 73.9)}
SMALL = 0.02

random = numpy.random.default_rng(1)


def blocks(kind, rows, columns, deviation):
    """A quantised matrix: blocks of a half-precision scale and 32 values."""
    dtype, size, spread = KINDS[kind]
    table = random.integers(0, 256, (rows, columns // BLOCK, 2 + size), dtype=numpy.uint8)
    scale = numpy.array([deviation / spread], dtype="<f2").view(numpy.uint8)
    table[:, :, :2] = scale
    return dtype, table.reshape(rows, -1)


def write(config, kind, output):
    width, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    key_heads, vocabulary = config["num_key_value_heads"], config["vocab_size"]
    head = config.get("head_dim", width // heads)
    writer = GGUFWriter(output, "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocabulary)
    # Token ids go in and scores come out: no words are needed.
    writer.add_tokenizer_model("no_vocab")

    def matrix(name, rows, columns, kind=kind, deviation=None):
        dtype, table = blocks(kind, rows, columns, deviation or columns**-0.5)
        writer.add_tensor(f"{name}.weight", table, raw_dtype=dtype)

    def vector(name, size, middle=0.0):
        writer.add_tensor(name, (middle + SMALL * random.standard_normal(size)).astype(numpy.float32))

    matrix("token_embd", vocabulary, width, kind="q8_0", deviation=SMALL)
    vector("output_norm.weight", width, 1.0)
    for layer in range(config["num_hidden_layers"]):
        name = f"blk.{layer}"
        vector(f"{name}.attn_norm.weight", width, 1.0)
        for part, rows in (("q", heads * head), ("k", key_heads * head), ("v", key_heads * head)):
            matrix(f"{name}.attn_{part}", rows, width)
            vector(f"{name}.attn_{part}.bias", rows)
        matrix(f"{name}.attn_output", width, heads * head)
        vector(f"{name}.ffn_norm.weight", width, 1.0)
        matrix(f"{name}.ffn_gate", mlp, width)
        matrix(f"{name}.ffn_up", mlp, width)
        matrix(f"{name}.ffn_down", width, mlp)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        write(json.load(file), *sys.argv[2:])
