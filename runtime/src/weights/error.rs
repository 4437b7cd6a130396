use std::path::PathBuf;

use candor_kernels::tensor::TensorError;

/// Why weights could not be read. Each variant names the file and the tensor at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The operating system refused a file.
    #[error("{}: {source}", .file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A path that should be a plain file is a folder, a pipe or a device.
    #[error("{}: not a plain file", .file.display())]
    NotAFile {
        /// The path.
        file: PathBuf,
    },
    /// A folder without weights.
    #[error("{}: holds neither model.safetensors nor model.safetensors.index.json; is this a model's folder?", .folder.display())]
    NoWeights {
        /// The folder.
        folder: PathBuf,
    },
    /// A text file (configuration, index) is larger than any real one.
    #[error("{}: {bytes} bytes, more than the {limit} that are read", .file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The file is shorter than its header says.
    #[error("{}: truncated: {needed} bytes are needed, the file has {actual}; fetch it again", .file.display())]
    Truncated {
        /// The file.
        file: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes there are.
        actual: u64,
    },
    /// The header claims a length no real file has.
    #[error("{}: a header of {bytes} bytes is claimed, at most {limit} are read; this is no safetensors file, or a damaged one", .file.display())]
    HeaderSize {
        /// The file.
        file: PathBuf,
        /// Length claimed.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The header is not what the safetensors format says.
    #[error("{}: bad header: {reason}; save the file again with the safetensors library", .file.display())]
    Header {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A name stands twice in a header or an index.
    #[error("{}: {tensor} is listed twice", .file.display())]
    Duplicate {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// An element type the format does not know, or whose elements are not whole bytes.
    #[error("{}: {tensor}: unknown element type {dtype}", .file.display())]
    UnknownType {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The type as written.
        dtype: String,
    },
    /// The number of bytes of a tensor cannot be computed without overflow.
    #[error("{}: {tensor}: shape {shape:?} of {dtype} is too large to address", .file.display())]
    Overflow {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The element type as written.
        dtype: String,
        /// The shape as written.
        shape: Vec<u64>,
    },
    /// A tensor's byte range is reversed, outside the file, or not as long as its shape needs.
    #[error("{}: {tensor}: bytes {start}..{end} do not fit: shape and type need {needed} bytes, the file holds {available}", .file.display())]
    Range {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// First byte.
        start: u64,
        /// Byte behind the last.
        end: u64,
        /// Bytes that shape and type need.
        needed: u64,
        /// Bytes of data in the file.
        available: u64,
    },
    /// Two tensors share bytes.
    #[error("{}: {first} and {second} overlap", .file.display())]
    Overlap {
        /// The file.
        file: PathBuf,
        /// The tensor that starts first.
        first: String,
        /// The tensor that starts inside it.
        second: String,
    },
    /// Bytes that belong to no tensor.
    #[error("{}: bytes {start}..{end} belong to no tensor; save the file again with the safetensors library", .file.display())]
    Hole {
        /// The file.
        file: PathBuf,
        /// First byte.
        start: u64,
        /// Byte behind the last.
        end: u64,
    },
    /// A tensor's first byte is not at a multiple of its element size, so it cannot be used in place.
    #[error("{}: {tensor}: {dtype} data is not aligned to its element size; save the file again with the safetensors library, which aligns tensors", .file.display())]
    Misaligned {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The element type.
        dtype: String,
    },
    /// The index file is not readable.
    #[error("{}: bad index: {reason}", .file.display())]
    Index {
        /// The index file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The index names a file outside the model's folder.
    #[error("{}: {tensor} is said to lie in {shard:?}, which is no plain file name; shards lie beside their index", .file.display())]
    ShardPath {
        /// The index file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The name as written.
        shard: String,
    },
    /// The index names a file that is not there.
    #[error("{}: the index names {} for {tensor}, which is not there; fetch the missing file", .file.display(), .shard.display())]
    ShardMissing {
        /// The index file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The absent file.
        shard: PathBuf,
    },
    /// The index and the shard disagree on where a tensor lies.
    #[error("{}: {tensor}: {reason}; index and shards are not of one model, fetch them again", .file.display())]
    ShardMismatch {
        /// The shard.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// How they disagree.
        reason: &'static str,
    },
    /// A tensor that the model needs is not there. Nothing is ever filled in for it.
    #[error("{}: {tensor} is missing; the model cannot run without it", .folder.display())]
    Missing {
        /// The model's folder.
        folder: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// Tensors that no part of the model reads: the configuration and the weights are not of one model.
    #[error("{}: {count} tensors that no part of this model reads: {}; is config.json the one of these weights?", .folder.display(), .tensors.join(", "))]
    Unexpected {
        /// The model's folder.
        folder: PathBuf,
        /// How many there are.
        count: usize,
        /// The first of them.
        tensors: Vec<String>,
    },
    /// A tensor's shape is not the one that config.json asks for.
    #[error("{}: {tensor} has shape {actual:?}, config.json asks for {expected:?}", .file.display())]
    Shape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Shape needed.
        expected: Vec<usize>,
        /// Shape there is.
        actual: Vec<usize>,
    },
    /// A tensor's element type cannot be computed with.
    #[error("{}: {tensor} is stored as {dtype}; weights must be F32, F16, BF16, or I8 or packed I32 with scales", .file.display())]
    WrongType {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The element type.
        dtype: String,
    },
    /// A quantised weight without its scales.
    #[error("{}: {tensor} is stored as integers, but {tensor}_scale is missing", .file.display())]
    ScaleMissing {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A scale beside a weight that is not quantised, or beside no weight.
    #[error("{}: {tensor} belongs to no quantised weight", .file.display())]
    ScaleUnused {
        /// The file.
        file: PathBuf,
        /// The scale's name.
        tensor: String,
    },
    /// Scales are neither one floating-point number a row nor one a group.
    #[error(
        "{}: {tensor} is {dtype}{actual:?}; F32, F16 or BF16 numbers are needed, one a row ([{rows}, 1]) or one for each 32, 64 or 128 of a row's {columns}",
        .file.display()
    )]
    ScaleShape {
        /// The file.
        file: PathBuf,
        /// The scale's name.
        tensor: String,
        /// Its element type.
        dtype: String,
        /// Its shape.
        actual: Vec<usize>,
        /// Rows of the weight.
        rows: usize,
        /// Elements a row of the weight has.
        columns: usize,
    },
    /// A packed weight that is not what its shape says.
    #[error("{}: {tensor}: {reason}", .file.display())]
    Packed {
        /// The file.
        file: PathBuf,
        /// The packed tensor.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// A scale that is not a number, infinite, zero or negative.
    #[error("{}: {tensor}: row {row} has the scale {value}; scales are finite and above zero, the file is damaged", .file.display())]
    ScaleValue {
        /// The file.
        file: PathBuf,
        /// The scale's name.
        tensor: String,
        /// The row.
        row: usize,
        /// The scale.
        value: f32,
    },
    /// The weights are quantised in a way this program does not read.
    #[error("{}: quantization_config: {reason}; compressed-tensors' int-quantized with 8 bits and pack-quantized with 4 are read, symmetric, with a scale a row (channel) or a group of 32, 64 or 128", .file.display())]
    Quantisation {
        /// config.json.
        file: PathBuf,
        /// What is not supported.
        reason: String,
    },
    /// Bytes could not be viewed as a tensor.
    #[error("{}: {tensor}: {source}", .file.display())]
    View {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Why.
        source: Box<TensorError>,
    },
}
