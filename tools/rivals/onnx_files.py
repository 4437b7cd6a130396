"""Writes ONNX graphs of the encoders with random weights, for onnxruntime.

    onnx_files.py CONFIG TOWER OUTPUT [int8]

CONFIG is the config.json of the folder that `candor-tools synthesize` wrote. TOWER is vision (SigLIP over a window's
frames, up to the layer whose state the model uses) or audio (the Whisper encoder over 30 seconds). OUTPUT is a folder;
in it come to lie, to be tried by the worker,

    plain.onnx                attention as products and a softmax
    fused.onnx                attention as onnxruntime's own MultiHeadAttention
    NAME-int8.onnx            both with onnxruntime's quantize_dynamic: signed 8-bit weights, a scale an output
    NAME-uint8.onnx           the same with unsigned weights

Products are quantised and convolutions are not, which is the faster of the two. With int8, the files in single precision
are removed when they have been quantised.
"""

import json
import sys
from pathlib import Path

import numpy
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

OPSET = 20
SMALL = 0.02
AUDIO_KERNEL = 3

random = numpy.random.default_rng(1)


class Graph:
    """Nodes and weights, as they come."""

    def __init__(self, fused):
        self.fused, self.nodes, self.weights, self.count = fused, [], [], 0

    def name(self):
        self.count += 1
        return f"v{self.count}"

    def constant(self, array):
        name = self.name()
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape, deviation=SMALL, middle=0.0):
        values = random.standard_normal(shape, dtype=numpy.float32) * numpy.float32(deviation)
        return self.constant(values + numpy.float32(middle))

    def node(self, kind, *inputs, **attributes):
        name = self.name()
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"{kind}_{name}", **attributes))
        return name

    def shape(self, x, *shape):
        return self.node("Reshape", x, self.constant(numpy.array(shape, dtype=numpy.int64)))

    def linear(self, x, inputs, outputs, bias=True):
        product = self.node("MatMul", x, self.weight(inputs, outputs, deviation=inputs**-0.5))
        return self.node("Add", product, self.weight(outputs)) if bias else product

    def norm(self, x, width, eps):
        return self.node(
            "LayerNormalization", x, self.weight(width, middle=1.0), self.weight(width), axis=-1, epsilon=eps
        )

    def attention(self, query, key, value, length, width, heads):
        # The factor of the scores is folded into the weights, as an exporter may do.
        if self.fused:
            return self.node(
                "MultiHeadAttention", query, key, value, domain="com.microsoft", num_heads=heads, scale=1.0
            )
        split = lambda x, *order: self.node("Transpose", self.shape(x, -1, length, heads, width // heads), perm=order)
        scores = self.node("MatMul", split(query, 0, 2, 1, 3), split(key, 0, 2, 3, 1))
        mixed = self.node("MatMul", self.node("Softmax", scores, axis=-1), split(value, 0, 2, 1, 3))
        return self.shape(self.node("Transpose", mixed, perm=[0, 2, 1, 3]), -1, length, width)

    def layer(self, x, length, width, heads, mlp, eps, gelu, key_bias):
        normed = self.norm(x, width, eps)
        query, key, value = (self.linear(normed, width, width, bias) for bias in (True, key_bias, True))
        mixed = self.attention(query, key, value, length, width, heads)
        x = self.node("Add", x, self.linear(mixed, width, width))
        inner = self.node("Gelu", self.linear(self.norm(x, width, eps), width, mlp), approximate=gelu)
        return self.node("Add", x, self.linear(inner, mlp, width))

    def model(self, source, shape, result):
        graph = helper.make_graph(
            self.nodes,
            "tower",
            [helper.make_tensor_value_info(source, TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
            self.weights,
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def vision(config, fused):
    tower, frames = config["vision_config"], config["num_frames"]
    width, side, patch = tower["hidden_size"], tower["image_size"], tower["patch_size"]
    patches = (side // patch) ** 2
    graph = Graph(fused)
    kernel = graph.weight(width, 3, patch, patch, deviation=(3 * patch * patch) ** -0.5)
    x = graph.node("Conv", "pixels", kernel, graph.weight(width), strides=[patch, patch])
    x = graph.node("Transpose", graph.shape(x, frames, width, patches), perm=[0, 2, 1])
    x = graph.node("Add", x, graph.weight(patches, width))
    selected = config["mm_vision_select_layer"]
    layers = selected + tower["num_hidden_layers"] + 1 if selected < 0 else selected
    for _ in range(layers):
        x = graph.layer(
            x, patches, width, tower["num_attention_heads"], tower["intermediate_size"], 1e-6, "tanh", True
        )
    return graph.model("pixels", [frames, 3, side, side], x)


def audio(config, fused):
    tower = config["audio_config"]
    width, mels, length = tower["d_model"], tower["num_mel_bins"], tower["max_source_positions"]
    graph = Graph(fused)
    x = "mel"
    for channels, stride in ((mels, 1), (width, 2)):
        kernel = graph.weight(width, channels, AUDIO_KERNEL, deviation=(AUDIO_KERNEL * channels) ** -0.5)
        x = graph.node("Conv", x, kernel, graph.weight(width), strides=[stride], pads=[1, 1])
        x = graph.node("Gelu", x)
    x = graph.node("Add", graph.node("Transpose", x, perm=[0, 2, 1]), graph.weight(length, width))
    for _ in range(tower["encoder_layers"]):
        x = graph.layer(
            x, length, width, tower["encoder_attention_heads"], tower["encoder_ffn_dim"], 1e-5, "none", False
        )
    return graph.model("mel", [1, mels, 2 * length], graph.norm(x, width, 1e-5))


def save(model, path):
    # A message of protobuf ends at 2 GB, so weights lie beside it.
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)


def main(config, tower, output, precision=None):
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    for name, fused in (("plain", False), ("fused", True)):
        random.bit_generator.state = numpy.random.default_rng(1).bit_generator.state
        path = output / f"{name}.onnx"
        save({"vision": vision, "audio": audio}[tower](config, fused), path)
        for kind, weights in (("int8", QuantType.QInt8), ("uint8", QuantType.QUInt8)):
            quantize_dynamic(
                path,
                output / f"{name}-{kind}.onnx",
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                reduce_range=False,
                weight_type=weights,
                use_external_data_format=True,
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT},
            )
        if precision == "int8":
            path.unlink()
            path.with_name(f"{path.name}.data").unlink()


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        main(json.load(file), *sys.argv[2:])
