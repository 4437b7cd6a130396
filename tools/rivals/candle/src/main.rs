//! Times candle: answers each line "run" with a line of JSON, {"per_s": things a second}, until its input ends.
//!
//! ```text
//! candle-worker MODEL decode POSITIONS TOKENS
//! candle-worker MODEL vision FRAMES
//! ```
//!
//! MODEL is a folder of ours with f32 weights, which candle maps. `decode`: POSITIONS tokens are in the cache, then TOKENS
//! are decoded one by one. `vision`: the layers of the tower that the model uses, over FRAMES pictures at once.
//! RAYON_NUM_THREADS sets the threads.

use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{qwen2, siglip};
use serde_json::{Value, json};

fn number(config: &Value, key: &str) -> Result<usize> {
    let value = config.pointer(key).and_then(Value::as_u64);
    Ok(value.with_context(|| format!("config.json has no number at {key}"))? as usize)
}

fn decoder(config: &Value, weights: VarBuilder) -> Result<qwen2::ModelForCausalLM> {
    let positions = number(config, "/max_position_embeddings")?;
    let config = qwen2::Config {
        vocab_size: number(config, "/vocab_size")?,
        hidden_size: number(config, "/hidden_size")?,
        intermediate_size: number(config, "/intermediate_size")?,
        num_hidden_layers: number(config, "/num_hidden_layers")?,
        num_attention_heads: number(config, "/num_attention_heads")?,
        num_key_value_heads: number(config, "/num_key_value_heads")?,
        max_position_embeddings: positions,
        sliding_window: positions,
        max_window_layers: 0,
        tie_word_embeddings: true,
        rope_theta: 1e6,
        rms_norm_eps: 1e-6,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    };
    Ok(qwen2::ModelForCausalLM::new(&config, weights)?)
}

fn tower(config: &Value, weights: VarBuilder) -> Result<siglip::VisionModel> {
    // The model takes the output of the last layer but one, so the last is not computed.
    let config = siglip::VisionConfig {
        hidden_size: number(config, "/vision_config/hidden_size")?,
        intermediate_size: number(config, "/vision_config/intermediate_size")?,
        num_hidden_layers: number(config, "/vision_config/num_hidden_layers")? - 1,
        num_attention_heads: number(config, "/vision_config/num_attention_heads")?,
        num_channels: 3,
        image_size: number(config, "/vision_config/image_size")?,
        patch_size: number(config, "/vision_config/patch_size")?,
        hidden_act: Activation::GeluPytorchTanh,
        layer_norm_eps: 1e-6,
    };
    // candle ends the tower by a norm that the model does not use and our file does not have; it gets another's values.
    let named = |name: &str| name.replace("post_layernorm", "encoder.layers.0.layer_norm1");
    let weights = weights.rename_f(named).pp("model.vision_tower.vision_tower.vision_model");
    Ok(siglip::VisionModel::new(&config, false, weights)?)
}

/// Does one run and gives the seconds of its timed part.
type Run = Box<dyn FnMut() -> Result<f64>>;

/// What a task runs, and how many things that processes.
fn task(folder: &Path, name: &str, numbers: &[usize]) -> Result<(Run, usize)> {
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    let config: Value = serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))?;
    let file = folder.join("model.safetensors");
    // SAFETY: nobody changes the file while it is measured.
    let weights = unsafe { VarBuilder::from_mmaped_safetensors(&[file], DType::F32, &Device::Cpu)? };
    match (name, numbers) {
        ("decode", &[positions, tokens]) => {
            let mut model = decoder(&config, weights)?;
            let vocabulary = number(&config, "/vocab_size")?;
            let id = move |index: usize| (index * 7919 % vocabulary) as u32;
            let run = move || {
                model.clear_kv_cache();
                let prompt: Vec<u32> = (0..positions).map(id).collect();
                model.forward(&Tensor::new(prompt.as_slice(), &Device::Cpu)?.unsqueeze(0)?, 0)?;
                let start = Instant::now();
                for position in positions..positions + tokens {
                    let input = Tensor::new(&[id(position)], &Device::Cpu)?.unsqueeze(0)?;
                    let scores = model.forward(&input, position)?;
                    scores.flatten_all()?.to_vec1::<f32>()?;
                }
                Ok(start.elapsed().as_secs_f64())
            };
            Ok((Box::new(run), tokens))
        }
        ("vision", &[frames]) => {
            let model = tower(&config, weights)?;
            let size = number(&config, "/vision_config/image_size")?;
            let pictures = Tensor::randn(0f32, 1.0, (frames, 3, size, size), &Device::Cpu)?;
            let run = move || {
                let start = Instant::now();
                model.forward(&pictures)?;
                Ok(start.elapsed().as_secs_f64())
            };
            Ok((Box::new(run), frames))
        }
        _ => bail!("usage: candle-worker MODEL decode POSITIONS TOKENS | candle-worker MODEL vision FRAMES"),
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (Some(folder), Some(name)) = (arguments.first(), arguments.get(1)) else {
        bail!("usage: candle-worker MODEL decode POSITIONS TOKENS | candle-worker MODEL vision FRAMES");
    };
    let numbers = arguments[2..].iter().map(|number| number.parse()).collect::<Result<Vec<usize>, _>>()?;
    let (mut run, things) = task(Path::new(folder), name, &numbers)?;
    run()?;
    let threads = candle_core::utils::get_num_threads();
    println!("{}", json!({"settings": format!("{threads} threads"), "about": "candle 0.11, f32"}));
    std::io::stdout().flush()?;
    for line in std::io::stdin().lock().lines() {
        if line?.trim() == "run" {
            println!("{}", json!({"per_s": things as f64 / run()?}));
            std::io::stdout().flush()?;
        }
    }
    Ok(())
}
