"""What is measured: for each row, our side and the rival's on the same shapes."""

from dataclasses import dataclass
from typing import Callable

POSITIONS = 256
TOKENS = 32
PROMPT = 512
SOUND_S = 30
FRAMES = 8
# What llama.cpp's tower is tried with: it has no repacked weights there, so that 8 bits are not always the fastest.
CLIP_KINDS = ("q8_0", "bf16", "f16")


@dataclass
class Row:
    # Takes the workshop, gives a function that measures our side once, and the rival with the settings to try.
    prepare: Callable
    unit: str
    # Whether every core is kept busy by another process meanwhile.
    contended: bool = False


def decode(weights, kind, contended=False):
    def prepare(shop):
        model = shop.model(weights)
        file = shop.gguf(kind, model)
        arguments = ["--stages", "decode", "--positions", str(POSITIONS), "--tokens", str(TOKENS)]
        # Under load each side is as a user starts it: ours with as many threads as it takes by itself.
        ours = lambda: shop.ours(model, *arguments, threads=not contended)
        # Its threads wait for each other by spinning, which is fast where each has a core, and the worse where not.
        policies = [{}, {"OMP_WAIT_POLICY": "passive"}] if contended else [{}]
        return ours, [shop.llama(file, "decode", POSITIONS, TOKENS, **policy) for policy in policies]

    return Row(prepare, "tokens/s", contended)


def prefill(weights, kind):
    def prepare(shop):
        model = shop.model(weights)
        file = shop.gguf(kind, model)
        ours = lambda: shop.ours(model, "--stages", "prefill", "--prompt", str(PROMPT))
        return ours, [shop.llama(file, "prefill", PROMPT, 0)]

    return Row(prepare, "tokens/s")


def vision(weights):
    def prepare(shop):
        model = shop.model(weights)
        rival = shop.onnxruntime(shop.onnx("vision", model), weights, FRAMES)
        return lambda: shop.ours(model, "--stages", "vision"), [rival]

    return Row(prepare, "frames/s")


def whisper(weights):
    def prepare(shop):
        model = shop.model(weights, audio=True)
        graphs = shop.onnx("audio", model, weights)
        return lambda: shop.ours(model, "--stages", "audio"), [shop.onnxruntime(graphs, weights, SOUND_S)]

    return Row(prepare, "x realtime")


def candle_decode():
    def prepare(shop):
        model = shop.model("f32")
        ours = lambda: shop.ours(model, "--stages", "decode", "--positions", str(POSITIONS), "--tokens", str(TOKENS))
        return ours, [shop.candle(model, "decode", POSITIONS, TOKENS)]

    return Row(prepare, "tokens/s")


def candle_vision():
    def prepare(shop):
        model = shop.model("f32")
        return lambda: shop.ours(model, "--stages", "vision"), [shop.candle(model, "vision", FRAMES)]

    return Row(prepare, "frames/s")


def clip_vision():
    def prepare(shop):
        model = shop.model("int8")
        rivals = [shop.clip(shop.clip_gguf(kind, model), FRAMES) for kind in CLIP_KINDS]
        return lambda: shop.ours(model, "--stages", "vision"), rivals

    return Row(prepare, "frames/s")


ROWS = {
    "decode_int4": decode("int4", "q4_0"),
    "decode_int8": decode("int8", "q8_0"),
    "prefill512_int4": prefill("int4", "q4_0"),
    "decode_int4_contended": decode("int4", "q4_0", contended=True),
    "vision_int8": vision("int8"),
    "vision_f32": vision("f32"),
    "whisper_int8": whisper("int8"),
    "decode_f32_candle": candle_decode(),
    "vision_f32_candle": candle_vision(),
    "vision_int8_llama": clip_vision(),
}
