//! The kernels by name, and how they are launched.

use cudarc::driver::{CudaFunction, DeviceRepr};
use std::ffi::c_void;
use std::sync::Arc;

use super::driver::{CudaError, Gpu, failed};
use super::replay;
use crate::device::{DeviceError, Result};

/// Names the kernels of each file of cuda/.
macro_rules! kernels {
    ($($family:ident: $($name:ident)*;)*) => {
        /// Every kernel, loaded.
        #[derive(Debug)]
        pub(super) struct Kernels {
            $($(pub(super) $name: CudaFunction,)*)*
        }

        /// The files of cuda/ that kernels come from.
        pub(super) const FAMILIES: &[&str] = &[$(stringify!($family)),*];

        impl Kernels {
            /// Loads the kernels of each file from what `image` gives for it: a cubin, or PTX.
            pub(super) fn load(gpu: &Gpu, image: &Images<'_>) -> std::result::Result<Self, CudaError> {
                $(
                    let $family = gpu.context.load_module(cudarc::nvrtc::Ptx::from_binary(image(stringify!($family))?))?;
                )*
                Ok(Kernels { $($($name: Arc::clone(&$family).load_function(stringify!($name))?,)*)* })
            }
        }
    };
}

kernels! {
    attention: attention_f32 attention_f16 attention_i8;
    cache: cache_write_f32 cache_write_f16 cache_write_i8 rope_write_f32 rope_write_f16 rope_write_i8 round_keys;
    convolution: unfold depthwise3x3 bilinear;
    decode: decode_f16 decode_i8;
    decoder: decoder_layer_i4 decoder_layer_i8 set_position;
    elementwise: activate copy add multiply add_positions embed weighted_sum mean_rows scale_groups;
    flash: flash_f32_64 flash_f32_96 flash_f32_128 flash_keys_i8_64 flash_keys_i8_96 flash_keys_i8_128 flash_f16_64 flash_f16_128 flash_i8_64 flash_i8_128;
    float: float_matvec_1 float_matvec_8 float_matmul;
    half: to_half matmul_f16;
    linear: linear;
    matmul: matmul_i4 matmul_i8;
    matvec: matvec_i4_1 matvec_i4_8 matvec_i8_1 matvec_i8_8;
    mel: power log_mel_most log_mel;
    norm: layer_norm rms_norm softmax;
    pixels: picture_patches;
    position: rope;
    quantise: quantise;
    roof: read_all multiply_all;
    sample: choose_most choose_any choose_nucleus;
}

/// Gives the image of a file of kernels.
pub(super) type Images<'a> = dyn Fn(&str) -> std::result::Result<Vec<u8>, CudaError> + 'a;

/// Blocks and threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grid {
    pub(super) blocks: [usize; 3],
    pub(super) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(super) shared: usize,
    /// The blocks are on the GPU all at once, and can wait for each other.
    pub(super) cooperative: bool,
}

impl Grid {
    /// A thread for each of `count` things, of one kernel's 256.
    pub(super) fn each(count: usize) -> Self {
        Self::blocks([count.div_ceil(256), 1, 1], 256)
    }

    /// `blocks` blocks.
    pub(super) fn blocks(blocks: [usize; 3], threads: u32) -> Self {
        Grid { blocks, threads, shared: 0, cooperative: false }
    }
}

/// A value that a kernel takes as it lies in memory.
pub(super) struct Argument<'a> {
    pub(super) value: *mut c_void,
    pub(super) bytes: usize,
    lives: std::marker::PhantomData<&'a ()>,
}

impl<'a> Argument<'a> {
    pub(super) fn new<T: DeviceRepr>(value: &'a T) -> Self {
        let bytes = size_of::<T>();
        Argument { value: std::ptr::from_ref(value).cast_mut().cast(), bytes, lives: std::marker::PhantomData }
    }
}

/// Launches `function`, or records that for a replay; a grid without blocks is no work.
///
/// # Safety
///
/// The arguments are those of the kernel, in number and type, and it touches only memory that lives until the stream has
/// come past it.
pub(super) unsafe fn launch<const N: usize>(
    gpu: &Gpu,
    op: &'static str,
    function: &CudaFunction,
    grid: Grid,
    arguments: [Argument<'_>; N],
) -> Result<()> {
    // What CUDA takes: 2³¹ - 1 blocks on the first axis, 65 535 on the others.
    let most = [i32::MAX as usize, 65_535, 65_535];
    if grid.blocks.contains(&0) {
        return Ok(());
    }
    if grid.blocks.iter().zip(most).any(|(&blocks, most)| blocks > most) {
        return Err(DeviceError::Argument {
            op,
            reason: format!("{:?} blocks are more than a GPU takes", grid.blocks),
        });
    }
    // SAFETY: the arguments are those of the kernel.
    if unsafe { replay::record(gpu, function, grid, &arguments) } {
        return Ok(());
    }
    let mut pointers = arguments.map(|argument| argument.value);
    let [x, y, z] = grid.blocks.map(|blocks| blocks as u32);
    gpu.context.bind_to_thread().map_err(failed(op, 0))?;
    let (function, stream) = (function.cu_function(), gpu.stream.cu_stream());
    let (blocks, threads, shared) = ((x, y, z), (grid.threads, 1, 1), grid.shared as u32);
    use cudarc::driver::result::{launch_cooperative_kernel, launch_kernel};
    // SAFETY: the caller vouches for the arguments; function and stream belong to the context that is current.
    let launched = unsafe {
        match grid.cooperative {
            true => launch_cooperative_kernel(function, blocks, threads, shared, stream, &mut pointers),
            false => launch_kernel(function, blocks, threads, shared, stream, &mut pointers),
        }
    };
    launched.map_err(failed(op, 0))
}
