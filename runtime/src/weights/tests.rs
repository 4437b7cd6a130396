//! Files that lie, each in its own way.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use candor_kernels::DType;
use tempfile::TempDir;

use super::*;

/// A file of `header` and `data`.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

fn folder(bytes: &[u8]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    folder
}

fn open(header: &str, data: &[u8]) -> Result<Checkpoint, WeightsError> {
    Checkpoint::open(folder(&file(header, data)).path())
}

fn tensor(name: &str, dtype: &str, shape: &str, start: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
}

fn header(tensors: &[String]) -> String {
    // Padded, so that the data starts at a multiple of eight.
    let text = format!("{{{}}}", tensors.join(","));
    format!("{text:<width$}", width = text.len().next_multiple_of(8))
}

macro_rules! refused {
    ($result:expr, $variant:pat $(if $guard:expr)?, $($word:expr),*) => {
        let error = $result.err().expect("the file must be refused");
        assert!(matches!(&error, $variant $(if $guard)?), "{error:?}");
        let text = error.to_string();
        $(assert!(text.contains($word), "{text} does not name {}", $word);)*
    };
}

#[test]
fn a_sound_file_is_viewed_in_place() {
    let data: Vec<u8> = [1.5_f32, -2.0, 0.25].iter().flat_map(|v| v.to_le_bytes()).chain([0, 60, 0, 64]).collect();
    let text = header(&[
        r#""__metadata__":{"format":"pt"}"#.into(),
        tensor("b", "F16", "[2,1]", 12, 16),
        tensor("a", "F32", "[3]", 0, 12),
    ]);
    let folder = folder(&file(&text, &data));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(checkpoint.tensor("a").unwrap().to_f32(), [1.5, -2.0, 0.25]);
    assert_eq!(checkpoint.tensor("b").unwrap().to_f32(), [1.0, 2.0]);
    assert_eq!(checkpoint.mapped_bytes(), 8 + text.len() + data.len());
    let view = checkpoint.tensor("a").unwrap();
    drop(checkpoint);
    assert_eq!(view.to_f32()[0], 1.5, "a view keeps its file mapped");
}

#[test]
fn lengths_that_lie() {
    let raw = |bytes: &[u8]| Checkpoint::open(folder(bytes).path());
    refused!(raw(&[]), WeightsError::Truncated { actual: 0, .. }, "model.safetensors");
    refused!(raw(&[1, 2, 3]), WeightsError::Truncated { actual: 3, .. }, "truncated");
    refused!(raw(&10_000_000_000_u64.to_le_bytes()), WeightsError::HeaderSize { .. }, "10000000000");
    refused!(raw(&u64::MAX.to_le_bytes()), WeightsError::HeaderSize { .. }, "damaged");
    refused!(raw(&50_u64.to_le_bytes()), WeightsError::Truncated { needed: 58, actual: 8, .. }, "58");
}

#[test]
fn headers_that_are_no_headers() {
    for text in ["", "[]", "{", "nonsense", r#"{"a":1}"#, r#"{"a":{"dtype":"F32"}}"#, r#"{"__metadata__":{"k":1}}"#] {
        refused!(open(text, &[]), WeightsError::Header { .. }, "model.safetensors");
    }
    let nested = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    refused!(open(&format!(r#"{{"a":{nested}}}"#), &[]), WeightsError::Header { .. }, "bad header");
    let negative = r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#;
    refused!(open(negative, &[0; 4]), WeightsError::Header { .. }, "bad header");
}

#[test]
fn names_that_stand_twice() {
    let twice = header(&[tensor("a", "F32", "[1]", 0, 4), tensor("a", "F32", "[1]", 4, 8)]);
    refused!(open(&twice, &[0; 8]), WeightsError::Duplicate { .. }, "a is listed twice");
}

#[test]
fn ranges_that_lie() {
    let one =
        |dtype, shape, start, end, data: usize| open(&header(&[tensor("a", dtype, shape, start, end)]), &vec![0; data]);
    refused!(one("F32", "[2]", 0, 4, 4), WeightsError::Range { needed: 8, .. }, "a:", "0..4");
    refused!(one("F32", "[1]", 8, 4, 8), WeightsError::Range { .. }, "8..4");
    refused!(one("F32", "[2]", 0, 8, 4), WeightsError::Range { available: 4, .. }, "the file holds 4");
    refused!(one("F32", "[1]", u64::MAX - 3, u64::MAX, 4), WeightsError::Range { .. }, "a:");
    refused!(one("F32", "[4294967296,4294967296]", 0, 4, 4), WeightsError::Overflow { .. }, "too large");
    refused!(one("F32", "[18446744073709551615]", 0, 4, 4), WeightsError::Overflow { .. }, "too large");
    refused!(one("F4", "[2]", 0, 1, 1), WeightsError::UnknownType { .. }, "F4");
    refused!(one("F32", "[1]", 0, 4, 8), WeightsError::Hole { .. }, "belong to no tensor");
    refused!(one("F32", "[1]", 4, 8, 8), WeightsError::Hole { .. }, "belong to no tensor");
    let overlapping = header(&[tensor("a", "F32", "[2]", 0, 8), tensor("b", "F32", "[1]", 4, 8)]);
    refused!(open(&overlapping, &[0; 8]), WeightsError::Overlap { .. }, "a and b overlap");
    let same = header(&[tensor("a", "F32", "[1]", 0, 4), tensor("b", "F32", "[1]", 0, 4)]);
    refused!(open(&same, &[0; 4]), WeightsError::Overlap { .. }, "overlap");
}

#[test]
fn data_that_cannot_be_used_in_place() {
    let text = header(&[tensor("odd", "U8", "[1]", 0, 1), tensor("a", "F32", "[1]", 1, 5)]);
    let checkpoint = open(&text, &[0; 5]).unwrap();
    refused!(checkpoint.tensor("a"), WeightsError::Misaligned { .. }, "a:", "save the file again");
    refused!(checkpoint.tensor("odd"), WeightsError::WrongType { .. }, "odd is stored as U8");
    refused!(checkpoint.tensor("b"), WeightsError::Missing { .. }, "b is missing");
}

#[test]
fn a_part_asks_for_shapes_and_the_rest_is_reported() {
    let text = header(&[
        tensor("m.LayerNorm.gamma", "F32", "[2]", 0, 8),
        tensor("m.w", "F32", "[1,2]", 8, 16),
        tensor("stray", "F32", "[1]", 16, 20),
    ]);
    let checkpoint = open(&text, &[0; 20]).unwrap();
    let inventory = Inventory::new(&checkpoint);
    let part = inventory.part("").under("m");
    assert_eq!(part.tensor("LayerNorm.weight", &[2]).unwrap().shape(), [2]);
    refused!(part.tensor("LayerNorm.bias", &[2]), WeightsError::Missing { .. }, "m.LayerNorm.bias");
    refused!(part.tensor("w", &[2, 1]), WeightsError::Shape { .. }, "m.w", "[1, 2]", "[2, 1]");
    refused!(inventory.finish(|_| false), WeightsError::Unexpected { count: 2, .. }, "m.w", "stray");
    part.tensor("w", &[1, 2]).unwrap();
    refused!(inventory.finish(|_| false), WeightsError::Unexpected { count: 1, .. }, "stray");
    inventory.finish(|name| name == "stray").unwrap();
}

/// An 8-bit weight of two rows with the given scales.
fn int8(scale_type: &str, shape: &str, scales: &[u8]) -> Result<Checkpoint, WeightsError> {
    let end = scales.len() as u64;
    let text =
        header(&[tensor("w.weight_scale", scale_type, shape, 0, end), tensor("w.weight", "I8", "[2,3]", end, end + 6)]);
    open(&text, &[scales, &[1, 2, 3, 0xff, 0xfe, 0xfd]].concat())
}

fn singles(values: [f32; 2]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[test]
fn eight_bit_rows_carry_scales() {
    for (dtype, shape, scales) in [
        ("F32", "[2,1]", singles([0.5, 2.0])),
        ("F32", "[2]", singles([0.5, 2.0])),
        ("F16", "[2,1]", vec![0x00, 0x38, 0x00, 0x40]),
        ("BF16", "[2,1]", vec![0x00, 0x3f, 0x00, 0x40]),
    ] {
        let checkpoint = int8(dtype, shape, &scales).unwrap();
        let weight = checkpoint.tensor("w.weight").unwrap();
        assert_eq!(weight.dtype(), DType::I8);
        assert_eq!(weight.to_f32(), [0.5, 1.0, 1.5, -2.0, -4.0, -6.0], "{dtype}");
        let inventory = Inventory::new(&checkpoint);
        inventory.part("w.").tensor("weight", &[2, 3]).unwrap();
        inventory.finish(|_| false).unwrap();
    }
}

#[test]
fn scales_that_lie() {
    for bad in [f32::NAN, f32::INFINITY, 0.0, -1.0] {
        refused!(
            int8("F32", "[2,1]", &singles([1.0, bad])),
            WeightsError::ScaleValue { row: 1, .. },
            "w.weight_scale",
            "row 1"
        );
    }
    refused!(int8("F32", "[1,2]", &singles([1.0; 2])), WeightsError::ScaleShape { .. }, "w.weight_scale", "[2, 1]");
    refused!(int8("F64", "[1]", &[0; 8]), WeightsError::ScaleShape { .. }, "F64");
    let alone = header(&[tensor("w.weight", "I8", "[1]", 0, 1)]);
    refused!(open(&alone, &[0]), WeightsError::ScaleMissing { .. }, "w.weight_scale is missing");
    let stray = header(&[tensor("w.weight_scale", "F32", "[1]", 0, 4)]);
    refused!(open(&stray, &[0; 4]), WeightsError::ScaleUnused { .. }, "w.weight_scale");
}

#[test]
fn folders_without_weights() {
    let empty = tempfile::tempdir().unwrap();
    refused!(Checkpoint::open(empty.path()), WeightsError::NoWeights { .. }, "model.safetensors");
    let instead = tempfile::tempdir().unwrap();
    fs::create_dir(instead.path().join("model.safetensors")).unwrap();
    refused!(Checkpoint::open(instead.path()), WeightsError::NotAFile { .. }, "not a plain file");
    refused!(Checkpoint::open_file(&empty.path().join("none")), WeightsError::Io { .. }, "none");
}

/// Two shards that hold `a` and `b`, under the given index.
fn sharded(index: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, tensor_name) in [("1.safetensors", "a"), ("2.safetensors", "b")] {
        let bytes = file(&header(&[tensor(tensor_name, "F32", "[1]", 0, 4)]), &[0; 4]);
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    folder
}

#[test]
fn shards_and_their_index() {
    let open = |index: &str| Checkpoint::open(sharded(index).path());
    let sound =
        open(r#"{"metadata":{"total_size":8},"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}"#).unwrap();
    assert_eq!((sound.names().count(), sound.files().count()), (2, 2));
    refused!(open("{"), WeightsError::Index { .. }, "index.json");
    refused!(open(r#"{"weight_map":{"a":3}}"#), WeightsError::Index { .. }, "bad index");
    refused!(open(r#"{"weight_map":{}}"#), WeightsError::Index { .. }, "empty");
    refused!(
        open(r#"{"weight_map":{"a":"3.safetensors"}}"#),
        WeightsError::ShardMissing { .. },
        "3.safetensors",
        "for a"
    );
    for path in ["../1.safetensors", "/etc/passwd", "x/1.safetensors", "..", "", "1.safetensors/", "x\\\\y"] {
        refused!(
            open(&format!(r#"{{"weight_map":{{"a":"{path}"}}}}"#)),
            WeightsError::ShardPath { .. },
            "no plain file name"
        );
    }
    refused!(
        open(r#"{"weight_map":{"a":"2.safetensors","b":"2.safetensors"}}"#),
        WeightsError::ShardMismatch { .. },
        "a:",
        "2.safetensors"
    );
    refused!(
        open(r#"{"weight_map":{"a":"1.safetensors","c":"2.safetensors"}}"#),
        WeightsError::ShardMismatch { .. },
        "c:"
    );
    refused!(
        open(r#"{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}"#),
        WeightsError::Duplicate { .. },
        "a is listed twice"
    );
}

#[test]
fn shards_that_hold_one_tensor_twice_or_unnamed() {
    let index = r#"{"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}"#;
    let both = file(&header(&[tensor("a", "F32", "[1]", 0, 4), tensor("b", "F32", "[1]", 4, 8)]), &[0; 8]);
    let twice = sharded(index);
    fs::write(twice.path().join("2.safetensors"), &both).unwrap();
    refused!(Checkpoint::open(twice.path()), WeightsError::ShardMismatch { .. }, "a:", "another shard");
    let unnamed = sharded(r#"{"weight_map":{"a":"1.safetensors"}}"#);
    fs::write(unnamed.path().join("1.safetensors"), &both).unwrap();
    refused!(Checkpoint::open(unnamed.path()), WeightsError::ShardMismatch { .. }, "b:", "does not name it");
}

#[test]
fn quantisation_schemes() {
    let check = |text: &str| check_quantisation(Path::new("config.json"), &serde_json::from_str(text).unwrap());
    let scheme = |format: &str, bits: u8, strategy: &str| {
        format!(
            r#"{{"quantization_config":{{"quant_method":"compressed-tensors","format":"{format}","config_groups":
            {{"group_0":{{"targets":["Linear"],"input_activations":null,"weights":{{"num_bits":{bits},"type":"int",
            "symmetric":true,"strategy":"{strategy}"}}}}}}}}}}"#
        )
    };
    check("{}").unwrap();
    check(&scheme("int-quantized", 8, "channel")).unwrap();
    check(&scheme("pack-quantized", 4, "channel")).unwrap();
    refused!(check(&scheme("pack-quantized", 8, "channel")), WeightsError::Quantisation { .. }, "pack-quantized");
    refused!(check(&scheme("float-quantized", 8, "channel")), WeightsError::Quantisation { .. }, "float-quantized");
    refused!(check(&scheme("int-quantized", 4, "channel")), WeightsError::Quantisation { .. }, "num_bits is 4");
    refused!(check(&scheme("int-quantized", 8, "tensor")), WeightsError::Quantisation { .. }, "strategy");
    refused!(check(&scheme("int-quantized", 8, "group")), WeightsError::Quantisation { .. }, "group_size is missing");
    refused!(check(r#"{"quantization_config":{"quant_method":"gptq"}}"#), WeightsError::Quantisation { .. }, "gptq");
    refused!(check(r#"{"quantization_config":7}"#), WeightsError::Quantisation { .. }, "quant_method");
}

#[test]
fn every_cut_and_every_flipped_byte_of_a_file_is_an_error_or_a_sound_view() {
    let text = header(&[tensor("w.weight_scale", "F32", "[1]", 0, 4), tensor("w.weight", "I8", "[1,4]", 4, 8)]);
    let whole = file(&text, &[0, 0, 128, 63, 1, 2, 3, 4]);
    let folder = folder(&whole);
    let path = folder.path().join("model.safetensors");
    for cut in 0..whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        assert!(Checkpoint::open(folder.path()).is_err(), "cut at {cut}");
    }
    for at in 0..8 + text.len() {
        for flip in [1, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= flip;
            // Replaced, not overwritten: an open mapping of the old file stays whole.
            fs::remove_file(&path).unwrap();
            fs::write(&path, &bytes).unwrap();
            if let Ok(checkpoint) = Checkpoint::open(folder.path()) {
                for name in checkpoint.names() {
                    if let Ok(view) = checkpoint.tensor(name) {
                        assert_eq!(view.to_f32().len(), view.elements());
                    }
                }
            }
        }
    }
}
