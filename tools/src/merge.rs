//! `candor-tools merge`: folds an adapter into a model's weights. Each tensor keeps the type it is stored in.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use candor::message::say;
use candor::model::{Adapter, Model};
use candor::weights::Checkpoint;
use candor_kernels::cpu::CpuDevice;
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize};

use crate::folder;
use crate::quantize::format::Scheme;
use crate::quantize::stored::Integers;
use crate::train::checkpoint::write_atomically;

/// `candor-tools merge`
#[derive(clap::Args)]
pub struct MergeArgs {
    /// The model's folder.
    #[arg(long)]
    pub model: PathBuf,
    /// The adapter: a PEFT folder, or that of a `train grpo` run.
    #[arg(long)]
    pub adapter: PathBuf,
    /// Folder for the merged model; it must not exist, or be empty.
    #[arg(long)]
    pub out: PathBuf,
}

/// Runs `candor-tools merge`.
pub fn run(args: &MergeArgs) -> anyhow::Result<()> {
    let adapter = Adapter::open(&args.adapter)?;
    // Opening model and adapter together checks that they belong together.
    Model::open(&args.model, CpuDevice::new(Some(1)))?.adapt(Some(&adapter))?;
    folder::check_empty(&args.out, "--out")?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let mut merged = HashMap::new();
    for (module, low_rank) in adapter.factors() {
        let name = format!("{module}.weight");
        let mut values = checkpoint.tensor(&name)?.to_f32();
        let (a, b) = (low_rank.a.to_f32(), low_rank.b.to_f32());
        let (rank, inputs) = (low_rank.rank(), low_rank.a.row_len());
        for (row, factors) in values.chunks_exact_mut(inputs).zip(b.chunks_exact(rank)) {
            for (factor, a) in factors.iter().zip(a.chunks_exact(inputs)) {
                row.iter_mut().zip(a).for_each(|(value, a)| *value += factor * a);
            }
        }
        merged.insert(name, values);
    }
    let count = merged.len();
    let rounding = write(&args.model, &args.out, merged)?;
    say(format_args!(
        "{}: {count} layers merged, rounding to the stored types changed them by {:.4} of their size at most",
        args.out.display(),
        rounding
    ))?;
    Ok(())
}

/// Copies a model folder with other values for some tensors, each in the type it is stored in, and seals it. Returns the
/// largest relative error of the rounding.
pub fn write(model: &Path, out: &Path, mut values: HashMap<String, Vec<f32>>) -> anyhow::Result<f64> {
    let checkpoint = Checkpoint::open(model)?;
    let files: Vec<PathBuf> = checkpoint.files().map(Path::to_path_buf).collect();
    std::fs::create_dir_all(out).with_context(|| format!("{}", out.display()))?;
    folder::copy_files(model, out, &files)?;
    let mut replaced: HashMap<String, Vec<u8>> = HashMap::new();
    let mut worst = 0.0f64;
    let names: Vec<String> = values.keys().cloned().collect();
    for name in names {
        let own = values.remove(&name).unwrap_or_default();
        let raw = checkpoint.raw(&name)?;
        let expected: usize = raw.shape.iter().product();
        ensure!(own.len() == expected, "{name} has {} elements, the model's has {expected}", own.len());
        let (bytes, rounded): (Vec<u8>, Vec<f32>) = match raw.dtype {
            "F32" => (own.iter().flat_map(|v| v.to_le_bytes()).collect(), own.clone()),
            "F16" => {
                let halves: Vec<f16> = own.iter().map(|&v| f16::from_f32(v)).collect();
                (halves.iter().flat_map(|v| v.to_le_bytes()).collect(), halves.iter().map(|v| v.to_f32()).collect())
            }
            "BF16" => {
                let halves: Vec<bf16> = own.iter().map(|&v| bf16::from_f32(v)).collect();
                (halves.iter().flat_map(|v| v.to_le_bytes()).collect(), halves.iter().map(|v| v.to_f32()).collect())
            }
            "I8" => {
                let columns = *raw.shape.get(1).with_context(|| format!("{name} is no matrix"))?;
                let scale = format!("{name}_scale");
                let scales = checkpoint.raw(&scale)?;
                if scales.dtype != "F32" || scales.shape.get(1).is_some_and(|&per_row| per_row != 1) {
                    bail!("{scale} is {}{:?}; only F32 scales of rows can be written anew", scales.dtype, scales.shape);
                }
                let stored = Integers::nearest(&own, columns, Scheme::INT8_ROWS, None);
                replaced.insert(scale, stored.scale_bytes());
                (stored.bytes(), stored.values())
            }
            other => bail!("{name} is stored as {other}, which cannot be written anew"),
        };
        let square = |x: f32| f64::from(x) * f64::from(x);
        let error: f64 = own.iter().zip(&rounded).map(|(a, b)| square(a - b)).sum();
        let size: f64 = own.iter().map(|&v| square(v)).sum();
        worst = worst.max((error / size.max(f64::MIN_POSITIVE)).sqrt());
        replaced.insert(name, bytes);
    }
    for file in &files {
        let dtype = |name: &str| match name {
            "F32" => Ok(Dtype::F32),
            "F16" => Ok(Dtype::F16),
            "BF16" => Ok(Dtype::BF16),
            "I8" => Ok(Dtype::I8),
            "I64" => Ok(Dtype::I64),
            "I32" => Ok(Dtype::I32),
            "U8" => Ok(Dtype::U8),
            other => bail!("tensors of type {other} cannot be copied"),
        };
        let mut views = Vec::new();
        for name in checkpoint.names().filter(|name| checkpoint.file_of(name) == file.as_path()) {
            let raw = checkpoint.raw(name)?;
            let bytes = replaced.get(name).map_or(raw.bytes, Vec::as_slice);
            views.push((name, TensorView::new(dtype(raw.dtype)?, raw.shape.to_vec(), bytes)?));
        }
        let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let bytes = serialize(views, Some(about))?;
        let name = file.file_name().context("a weights file has a name")?;
        write_atomically(&out.join(name), &bytes)?;
    }
    folder::copy_manifest(model, out, out)?;
    Ok(worst)
}
