#!/usr/bin/env python3
"""Tries the reward server with TRL: some steps of GRPOTrainer on the decoder of Candor's default model, with LoRA.

    pip install -r tools/integrations/requirements.txt
    candor-tools reward-server --verifier models/default-verifier &
    torchrun --nproc_per_node 2 tools/integrations/try_trl.py --out trl
    candor watch --adapter trl/adapter demo/sad-to-happy.mp4

torchrun starts the processes and accelerate, which TRL stands on, finds them; `accelerate launch` itself starts several
on CPUs only through MPI.

The decoder is tuned on text alone, as TRL has it: this shows that the pieces fit, not how a good model is made. The
adapter that comes out stands beside the whole model in `candor watch`.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import accelerate
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from candor_reward import URL, compute_score, trl_reward

PARTS = ("format", "accuracy", "explanation")
LABELS = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def decoder(folder):
    """The decoder of a model folder as transformers' Qwen2: int8 weights times the scales of their rows."""
    config = json.loads((folder / "config.json").read_text())
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "vocab_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    config = Qwen2Config(**{key: config[key] for key in kept},
                         rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]})
    stored = load_file(folder / "model.safetensors")
    parts = ("model.embed_tokens.", "model.norm.", "model.layers.")
    tensors = {}
    for name, tensor in stored.items():
        if name.startswith(parts) and not name.endswith(".weight_scale"):
            tensors[name] = tensor.float() * stored.get(name + "_scale", torch.ones(1))
    model = Qwen2ForCausalLM(config)
    # The value projection has no bias where Qwen2 has one.
    tensors |= {name: torch.zeros_like(value) for name, value in model.state_dict().items()
                if name.endswith("v_proj.bias") and name not in tensors}
    outcome = model.load_state_dict(tensors, strict=False)
    assert not outcome.unexpected_keys and set(outcome.missing_keys) <= {"lm_head.weight"}, outcome
    model.tie_weights()
    return model


def tokenizer_of(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), chat_template=settings["chat_template"],
        eos_token=settings["eos_token"], pad_token=settings["pad_token"], padding_side="left",
    )


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", type=pathlib.Path, default="models/default", help="model folder of Candor")
    options.add_argument("--url", default=URL, help="where the reward server listens")
    options.add_argument("--out", type=pathlib.Path, required=True, help="folder for the adapter")
    options.add_argument("--steps", type=int, default=5)
    options.add_argument("--processes", type=int, default=2, help="how many there must be, so that one is not two")
    options = options.parse_args()
    accelerate.utils.set_seed(1)

    model = decoder(options.model)
    model.generation_config.eos_token_id = model.config.eos_token_id = 2
    model.generation_config.pad_token_id = model.config.pad_token_id = 0
    question = [{"role": "user", "content": "Which emotion does the face show, and why?"}]
    data = Dataset.from_list([{"prompt": question, "label": label} for label in LABELS * 8])
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer_of(options.model),
        reward_funcs=[trl_reward(part, url=options.url) for part in PARTS],
        train_dataset=data,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
        args=GRPOConfig(
            output_dir=str(options.out), max_steps=options.steps, per_device_train_batch_size=8, num_generations=4,
            max_completion_length=160, temperature=1.0, beta=0.0, learning_rate=1e-3, reward_weights=[1.0, 1.0, 1.0],
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, seed=1,
        ),
    )
    if trainer.accelerator.num_processes != options.processes:
        raise SystemExit(f"{trainer.accelerator.num_processes} processes, not {options.processes}; start it with torchrun")
    trainer.train()
    trainer.save_model(str(options.out / "adapter"))
    if trainer.accelerator.is_main_process:
        print(f"{trainer.accelerator.num_processes} processes, {trainer.state.global_step} steps")
        for line in trainer.state.log_history:
            if "reward" in line:
                means = {part: round(line[f"rewards/candor_{part}/mean"], 3) for part in PARTS}
                print(f"step {line['step']}: reward {line['reward']:.3f} {means} loss {line['loss']:.4f}")
        # verl calls the same server this way.
        rationale = "<think>The corners of his mouth turn down. He feels deep sadness.</think>\n<answer>sad</answer>"
        print("verl's compute_score:", compute_score("faces", rationale, "sad", extra_info={}, url=options.url))


if __name__ == "__main__":
    main()
