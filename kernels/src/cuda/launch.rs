//! The kernels by name, and how they are launched.

use cudarc::driver::{CudaFunction, DeviceRepr};
use std::ffi::c_void;
use std::sync::Arc;

use super::driver::{CudaError, Gpu, failed};
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
    cache: cache_write_f32 cache_write_f16 cache_write_i8 rope_write_f32 rope_write_f16 rope_write_i8;
    convolution: unfold depthwise3x3 bilinear;
    decode: decode_f16 decode_i8;
    elementwise: activate add multiply add_positions embed weighted_sum mean_rows scale_groups;
    flash: flash_f32_64 flash_f32_128 flash_f16_64 flash_f16_128 flash_i8_64 flash_i8_128;
    float: float_matvec_1 float_matvec_8 float_matmul;
    linear: linear;
    matmul: matmul_i4 matmul_i8;
    matvec: matvec_i4_1 matvec_i4_8 matvec_i8_1 matvec_i8_8;
    norm: layer_norm rms_norm softmax;
    position: rope;
    quantise: quantise;
    roof: read_all multiply_all;
    sample: choose_most choose_any choose_nucleus;
}

/// Gives the image of a file of kernels.
pub(super) type Images<'a> = dyn Fn(&str) -> std::result::Result<Vec<u8>, CudaError> + 'a;

/// Blocks and threads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    pub(super) blocks: [usize; 3],
    pub(super) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(super) shared: usize,
}

impl Grid {
    /// A thread for each of `count` things, of one kernel's 256.
    pub(super) fn each(count: usize) -> Self {
        Grid { blocks: [count.div_ceil(256), 1, 1], threads: 256, shared: 0 }
    }

    /// `blocks` blocks.
    pub(super) fn blocks(blocks: [usize; 3], threads: u32) -> Self {
        Grid { blocks, threads, shared: 0 }
    }
}

/// A value that a kernel takes as it lies in memory.
pub(super) struct Argument<'a>(*mut c_void, std::marker::PhantomData<&'a ()>);

impl<'a> Argument<'a> {
    pub(super) fn new<T: DeviceRepr>(value: &'a T) -> Self {
        Argument(std::ptr::from_ref(value).cast_mut().cast(), std::marker::PhantomData)
    }
}

/// Launches `function`; a grid without blocks is no work.
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
    let mut pointers = arguments.map(|argument| argument.0);
    let [x, y, z] = grid.blocks.map(|blocks| blocks as u32);
    gpu.context.bind_to_thread().map_err(failed(op, 0))?;
    // SAFETY: the caller vouches for the arguments; function and stream belong to the context that is current.
    unsafe {
        cudarc::driver::result::launch_kernel(
            function.cu_function(),
            (x, y, z),
            (grid.threads, 1, 1),
            grid.shared as u32,
            gpu.stream.cu_stream(),
            &mut pointers,
        )
    }
    .map_err(failed(op, 0))
}
