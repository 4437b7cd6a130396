//! Model folders made from names and shapes, as tests/fixtures/make_parity.py makes its models.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;

/// Standard deviation of a matrix's elements times the root of its inputs.
const SPREAD: f64 = 1.2;

/// `count` reals in -1..1 from a name: FNV-1a of the name, then Murmur3's finaliser.
pub(crate) fn uniform(name: &str, count: usize) -> impl Iterator<Item = f64> {
    let seed = name.bytes().fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    (0..count as u32).map(move |i| {
        let mut x = i.wrapping_mul(0x9e37_79b9).wrapping_add(seed);
        x ^= x >> 16;
        x = x.wrapping_mul(0x85eb_ca6b);
        x ^= x >> 13;
        x = x.wrapping_mul(0xc2b2_ae35);
        x ^= x >> 16;
        f64::from(x >> 8) / 8_388_608.0 - 1.0
    })
}

/// A weight in single precision.
fn weight(name: &str, shape: &[usize]) -> Vec<f32> {
    let values = uniform(name, shape.iter().product());
    match shape {
        [_] => {
            let middle = if name.ends_with(".weight") { 1.0 } else { 0.0 };
            values.map(|v| (v * 0.1 + middle) as f32).collect()
        }
        [_, inputs @ ..] => {
            let factor = SPREAD * (3.0 / inputs.iter().product::<usize>() as f64).sqrt();
            values.map(|v| (v * factor) as f32).collect()
        }
        [] => Vec::new(),
    }
}

/// A tensor as a file stores it.
#[derive(Clone)]
pub(crate) struct Stored {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Stored {
    pub(crate) fn f32(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Stored { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    pub(crate) fn i64(values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Stored { dtype: Dtype::I64, shape: vec![values.len()], bytes }
    }
}

pub(crate) type Tensors = BTreeMap<String, Stored>;

/// A fixture: what NAME.json says.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    description: Value,
}

impl Case {
    pub(crate) fn load(name: &'static str) -> Self {
        let text = std::fs::read_to_string(fixtures().join(format!("{name}.json"))).expect("the fixture is there");
        Case { name, description: serde_json::from_str(&text).expect("the fixture is JSON") }
    }

    pub(crate) fn goldens(&self) -> PathBuf {
        fixtures().join(format!("{}.safetensors", self.name))
    }

    pub(crate) fn variants(&self) -> Vec<String> {
        let list = self.description["variants"].as_array().expect("variants");
        list.iter().map(|v| v.as_str().expect("a text").to_owned()).collect()
    }

    /// config.json of a variant.
    pub(crate) fn config(&self, variant: &str) -> Value {
        let mut config = self.description["config"].clone();
        if config.get("tie_word_embeddings").is_some() {
            config["tie_word_embeddings"] = variant.starts_with("tied").into();
        }
        config
    }

    /// Ids under a key of `inputs`.
    pub(crate) fn ids(&self, key: &str) -> Vec<i64> {
        numbers(&self.description["inputs"][key])
    }

    pub(crate) fn texts(&self) -> Vec<Vec<i64>> {
        self.description["texts"].as_array().expect("texts").iter().map(numbers).collect()
    }

    /// Every weight of a variant, under its published name.
    pub(crate) fn tensors(&self, variant: &str) -> Tensors {
        let shapes = self.description["shapes"].as_object().expect("shapes");
        let mut tensors = Tensors::new();
        for (name, shape) in shapes {
            if variant.starts_with("tied") && name == "lm_head.weight" {
                continue;
            }
            let shape: Vec<usize> = numbers(shape).iter().map(|&n| n as usize).collect();
            store(&mut tensors, name, &shape, &weight(name, &shape), variant);
        }
        tensors
    }

    /// What a trace reads.
    pub(crate) fn inputs(&self) -> Tensors {
        let config = self.config("untied");
        let size = |section: &str, key: &str| config[section][key].as_u64().expect("a size") as usize;
        let (frames, side) =
            (config["num_frames"].as_u64().expect("a size") as usize, size("vision_config", "image_size"));
        let (mels, columns) = (size("audio_config", "num_mel_bins"), 2 * size("audio_config", "max_source_positions"));
        let real = |name: &str, shape: &[usize]| {
            let values: Vec<f32> = uniform(name, shape.iter().product()).map(|v| v as f32).collect();
            (name.to_owned(), Stored::f32(shape, &values))
        };
        let ids = |name: &str| (name.to_owned(), Stored::i64(&self.ids(name)));
        Tensors::from([
            real("in.pixel_values", &[frames, 3, side, side]),
            real("in.mel", &[mels, columns]),
            ids("in.bert_ids"),
            ids("in.prompt_ids"),
        ])
    }
}

fn numbers(value: &Value) -> Vec<i64> {
    value.as_array().expect("a list").iter().map(|v| v.as_i64().expect("a number")).collect()
}

/// Beside the sources; or where scripts/gpu-check.sh has put them, on a machine without.
pub(crate) fn fixtures() -> PathBuf {
    let packed = std::env::var_os("CANDOR_TEST_FIXTURES").map(PathBuf::from);
    packed.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity"))
}

/// Stores a weight the way a variant does; 8-bit weights get their scales beside them.
fn store(tensors: &mut Tensors, name: &str, shape: &[usize], values: &[f32], variant: &str) {
    let dtype = variant.split('.').nth(1).expect("TIE.TYPE");
    let table = name.contains("position") || name.contains("token_type");
    let stored = match dtype {
        "f16" => halves(Dtype::F16, shape, values.iter().map(|&v| f16::from_f32(v).to_bits())),
        "bf16" => halves(Dtype::BF16, shape, values.iter().map(|&v| bf16::from_f32(v).to_bits())),
        "int8" if shape.len() == 2 && name.ends_with(".weight") && !table => {
            let rows = values.chunks_exact(shape[1]);
            let scales: Vec<f32> =
                rows.clone().map(|r| r.iter().fold(0.0, |m: f32, v| m.max(v.abs())) / 127.0).collect();
            let bytes =
                rows.zip(&scales).flat_map(|(r, s)| r.iter().map(move |v| (v / s).round_ties_even() as i8 as u8));
            let bytes = bytes.collect();
            tensors.insert(format!("{name}_scale"), Stored::f32(&[shape[0], 1], &scales));
            Stored { dtype: Dtype::I8, shape: shape.to_vec(), bytes }
        }
        _ => Stored::f32(shape, values),
    };
    tensors.insert(name.to_owned(), stored);
}

fn halves(dtype: Dtype, shape: &[usize], bits: impl Iterator<Item = u16>) -> Stored {
    Stored { dtype, shape: shape.to_vec(), bytes: bits.flat_map(u16::to_le_bytes).collect() }
}

/// Writes one safetensors file.
pub(crate) fn write_tensors(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, t)| {
        (name.as_str(), TensorView::new(t.dtype, t.shape.clone(), &t.bytes).expect("bytes fit the shape"))
    });
    safetensors::serialize_to_file(views, None, path).expect("the folder can be written");
}

/// Writes a model folder of one file.
pub(crate) fn write_folder(folder: &Path, config: &Value, tensors: &Tensors) {
    std::fs::create_dir_all(folder).expect("the folder can be made");
    std::fs::write(folder.join("config.json"), config.to_string()).expect("the folder can be written");
    write_tensors(&folder.join("model.safetensors"), tensors);
}
