//! Where the large matrix products of training are computed: on the calling thread, or on a GPU through candle. All else
//! of training stays on the processor. A product's operands go to the GPU and its result comes back; weights that stay as
//! they are ([`keep`]) go there once.
//!
//! candle's CUDA is the feature `cuda` of this package. It opens the driver when the program runs, as the runtime does, so
//! that a program built with it still trains on the processor where there is no GPU.

use super::ops::Matrix;
use candle_core::{Device, Tensor};
use candor::device::Choice;
use candor_kernels::cuda::CudaError;
use std::collections::HashMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

/// Multiplications from which on a product is worth its way to a GPU and back.
const WORTH_IT: usize = 1 << 23;

/// Why a GPU cannot be trained on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainDeviceError {
    /// The program has no CUDA for training.
    #[error("this program was built without CUDA for training; `make cuda-tools` builds one with it")]
    NotBuilt,
    /// There is no driver, or no such GPU.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// A library of CUDA is missing.
    #[error(
        "there is no lib{0} of CUDA; training on a GPU takes cuBLAS and cuRAND beside the driver (LD_LIBRARY_PATH)"
    )]
    Library(&'static str),
    /// The GPU was found, and does not work.
    #[error("the GPU cannot be trained on: {0}")]
    Failed(String),
}

/// Where training computes.
#[derive(clap::Args, Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainDevice {
    /// Where training computes its large products: auto (a GPU if one can be used, else the processor), cpu, cuda or cuda:N.
    /// A GPU takes a program that `make cuda-tools` has built.
    #[arg(long, default_value_t = Choice::Auto)]
    pub train_device: Choice,
}

impl Default for TrainDevice {
    fn default() -> Self {
        TrainDevice { train_device: Choice::Auto }
    }
}

impl TrainDevice {
    /// Decides where the products of this process are computed from now on; `exact` takes f32 operands. Why `auto` takes
    /// the processor goes to the log, once. What it returns belongs to a run's recipe: a GPU rounds sums in another way.
    ///
    /// # Errors
    /// Where a GPU is asked for by its number and cannot be used.
    pub fn choose(self, exact: bool) -> anyhow::Result<&'static str> {
        use anyhow::Context;
        let ordinal = match self.train_device {
            Choice::Cpu => return Ok(""),
            Choice::Auto => 0,
            Choice::Cuda(ordinal) => ordinal,
        };
        match open(ordinal, exact) {
            Ok(products) => {
                // A process trains once; in tests, the first choice stays.
                let _ = CHOSEN.set(products);
                Ok(" products on a GPU")
            }
            Err(error) if self.train_device == Choice::Auto => {
                match error {
                    TrainDeviceError::NotBuilt
                    | TrainDeviceError::Cuda(CudaError::NoDriver | CudaError::NoDevice { .. }) => {
                        log::info!("{error}: training stays on the processor");
                    }
                    error => log::warn!("{error}: training stays on the processor"),
                }
                Ok("")
            }
            Err(error) => Err(error).with_context(|| format!("--train-device {}", self.train_device)),
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn open(_ordinal: usize, _exact: bool) -> Result<Products, TrainDeviceError> {
    Err(TrainDeviceError::NotBuilt)
}

/// Opens a GPU. What candle calls of CUDA panics where a library or a function is missing, so all is looked at before, and
/// what is left is caught.
#[cfg(feature = "cuda")]
fn open(ordinal: usize, exact: bool) -> Result<Products, TrainDeviceError> {
    use candor_kernels::cuda::{CudaDevice, missing_library};
    if !CudaDevice::all()?.iter().any(|gpu| gpu.ordinal == ordinal) {
        return Err(CudaError::NoDevice { ordinal }.into());
    }
    if let Some(library) = missing_library(&["cublas", "cublasLt", "curand"]) {
        return Err(TrainDeviceError::Library(library));
    }
    // In place of bf16 on the processor: TF32, which has more digits.
    candle_core::cuda::set_gemm_reduced_precision_f32(!exact);
    let opened = caught(|| {
        let products = Products::new(Device::new_cuda_with_stream(ordinal)?);
        let a = [1.0, 2.0, 3.0, 4.0];
        let c = products.product([2, 2, 2], Matrix::new(&a, 2), Matrix::transposed(&a, 2))?;
        Ok((products, c))
    });
    match opened {
        Ok((products, c)) if c == [5.0, 11.0, 11.0, 25.0] => Ok(products),
        Ok((_, wrong)) => Err(TrainDeviceError::Failed(format!("it computes {wrong:?} in place of [5, 11, 11, 25]"))),
        Err(error) => Err(TrainDeviceError::Failed(error)),
    }
}

/// The GPU that was chosen.
static CHOSEN: OnceLock<Products> = OnceLock::new();

/// Places in memory whose values stay as they are.
static KEPT: RwLock<Vec<Range<usize>>> = RwLock::new(Vec::new());

/// A promise that values stay as they are; made by [`keep`].
#[derive(Debug)]
pub struct Kept(Range<usize>);

/// Lets `values` be kept on the GPU, where products with them are computed there. Until what is returned is dropped they
/// must neither change nor move.
pub fn keep(values: &[f32]) -> Kept {
    let place = place(values);
    KEPT.write().unwrap_or_else(PoisonError::into_inner).push(place.clone());
    Kept(place)
}

impl Drop for Kept {
    fn drop(&mut self) {
        let mut kept = KEPT.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = kept.iter().position(|place| *place == self.0) {
            kept.swap_remove(index);
        }
        if let Some(products) = CHOSEN.get() {
            products.forget(&self.0);
        }
    }
}

fn place(values: &[f32]) -> Range<usize> {
    let start = values.as_ptr() as usize;
    start..start + size_of_val(values)
}

fn is_kept(place: &Range<usize>) -> bool {
    let kept = KEPT.read().unwrap_or_else(PoisonError::into_inner);
    kept.iter().any(|kept| kept.start <= place.start && place.end <= kept.end)
}

/// The GPU that was chosen, if there is one and so many multiplications are worth it.
pub(super) fn for_product(multiplications: usize) -> Option<&'static Products> {
    CHOSEN.get().filter(|_| multiplications >= WORTH_IT)
}

/// What a caught panic or an error of candle says.
fn caught<T>(work: impl FnOnce() -> candle_core::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(said.unwrap_or("a panic").to_owned())
        }
    }
}

/// Products on a device of candle.
pub struct Products {
    device: Device,
    /// Kept operands by where they lie.
    on_device: Mutex<HashMap<(usize, usize, usize), Tensor>>,
    /// Threads take turns: a GPU works on one product at a time anyway.
    turn: Mutex<()>,
    failed: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is whole whatever a thread did while it held one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Products {
    /// On this device.
    pub fn new(device: Device) -> Products {
        Products { device, on_device: Mutex::default(), turn: Mutex::default(), failed: AtomicBool::new(false) }
    }

    /// `c = a · b` (or `c += a · b`): a `[rows, depth]`, b `[depth, columns]`, c `[rows, columns]`, contiguous. False, and
    /// nothing is done, where the device fails or has failed: a run that began on it goes on on the processor.
    #[allow(clippy::too_many_arguments)]
    pub fn multiply(
        &self,
        c: &mut [f32],
        rows: usize,
        columns: usize,
        depth: usize,
        a: Matrix,
        b: Matrix,
        accumulate: bool,
    ) -> bool {
        if self.failed.load(Ordering::Relaxed) {
            return false;
        }
        let product = match caught(|| self.product([rows, columns, depth], a, b)) {
            Ok(product) => product,
            Err(error) => {
                if !self.failed.swap(true, Ordering::Relaxed) {
                    log::warn!("the GPU failed in training ({error}); the processor goes on");
                }
                return false;
            }
        };
        let c = &mut c[..rows * columns];
        if accumulate {
            c.iter_mut().zip(&product).for_each(|(c, product)| *c += product);
        } else {
            c.copy_from_slice(&product);
        }
        true
    }

    /// `a · b`, as in [`Self::multiply`].
    fn product(&self, [rows, columns, depth]: [usize; 3], a: Matrix, b: Matrix) -> candle_core::Result<Vec<f32>> {
        let _turn = lock(&self.turn);
        let product = self.operand(a, rows, depth)?.matmul(&self.operand(b, depth, columns)?)?;
        product.flatten_all()?.to_vec1()
    }

    /// An operand, `[rows, columns]` as the product reads it.
    fn operand(&self, matrix: Matrix, rows: usize, columns: usize) -> candle_core::Result<Tensor> {
        let (stored_rows, width) = if matrix.transposed { (columns, rows) } else { (rows, columns) };
        let values = &matrix.data[..(stored_rows - 1) * matrix.stride + width];
        let place = place(values);
        let key = is_kept(&place).then_some((place.start, place.end, width));
        let known = key.and_then(|key| lock(&self.on_device).get(&key).cloned());
        let stored = match known {
            Some(stored) => stored,
            None => {
                let shape = (stored_rows, width);
                let stored = if matrix.stride == width {
                    Tensor::from_slice(values, shape, &self.device)?
                } else {
                    let rows = values.chunks(matrix.stride).flat_map(|row| &row[..width]).copied();
                    Tensor::from_vec(rows.collect::<Vec<f32>>(), shape, &self.device)?
                };
                if let Some(key) = key {
                    lock(&self.on_device).insert(key, stored.clone());
                }
                stored
            }
        };
        if matrix.transposed { stored.t() } else { Ok(stored) }
    }

    /// Frees what lies in a place.
    fn forget(&self, place: &Range<usize>) {
        lock(&self.on_device).retain(|key, _| key.0 < place.start || key.1 > place.end);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::train::ops::multiply_exact;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn random(len: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
        (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    #[test]
    fn products_are_those_of_the_processor() {
        let products = Products::new(Device::Cpu);
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        for (rows, columns, depth) in [(1, 1, 1), (7, 5, 3), (1, 40, 9), (33, 1, 17), (20, 30, 40)] {
            for case in 0..16 {
                let [a_turned, b_turned, wide, accumulate] = [1, 2, 4, 8].map(|bit| case & bit != 0);
                let matrix = |rows: usize, columns: usize, turned: bool, rng: &mut ChaCha8Rng| {
                    let (stored, width) = if turned { (columns, rows) } else { (rows, columns) };
                    let stride = width + 3 * usize::from(wide);
                    // The last row ends with its last value, as where a matrix is a part of a wider one.
                    (random((stored - 1) * stride + width, rng), stride)
                };
                let (a, a_stride) = matrix(rows, depth, a_turned, &mut rng);
                let (b, b_stride) = matrix(depth, columns, b_turned, &mut rng);
                let a = Matrix { data: &a, stride: a_stride, transposed: a_turned };
                let b = Matrix { data: &b, stride: b_stride, transposed: b_turned };
                let mut expected = random(rows * columns + 2, &mut rng);
                let mut c = expected.clone();
                multiply_exact(&mut expected, columns, rows, columns, depth, a, b, accumulate);
                assert!(products.multiply(&mut c, rows, columns, depth, a, b, accumulate));
                let worst = c.iter().zip(&expected).map(|(c, e)| (c - e).abs()).fold(0.0, f32::max);
                assert!(worst < 1e-5, "{rows} {columns} {depth} {case}: {worst}");
            }
        }
    }

    #[test]
    fn what_stays_goes_to_the_device_once() {
        let products = Products::new(Device::Cpu);
        let weights = vec![2.0f32; 4];
        let once = |x: &[f32]| {
            let mut c = vec![0.0; 2];
            assert!(products.multiply(&mut c, 1, 2, 2, Matrix::new(x, 2), Matrix::transposed(&weights, 2), false));
            (c, lock(&products.on_device).len())
        };
        assert_eq!(once(&[1.0, 2.0]), (vec![6.0; 2], 0), "nothing is kept unless it is said to stay");
        let kept = keep(&weights);
        assert_eq!(once(&[1.0, 2.0]), (vec![6.0; 2], 1));
        assert_eq!(once(&[1.0, 3.0]), (vec![8.0; 2], 1));
        products.forget(&kept.0);
        drop(kept);
        assert_eq!(once(&[1.0, 1.0]), (vec![4.0; 2], 0));
    }

    #[test]
    fn a_failure_leaves_the_work_to_the_processor() {
        let products = Products::new(Device::Cpu);
        let (a, mut c) = ([1.0; 4], [7.0; 4]);
        let b = Matrix::new(&a[..1], 2);
        assert!(!products.multiply(&mut c, 2, 2, 2, Matrix::new(&a, 2), b, true), "b is too short: a panic is caught");
        assert!(!products.multiply(&mut c, 2, 2, 2, Matrix::new(&a, 2), Matrix::new(&a, 2), true), "it has failed");
        assert_eq!(c, [7.0; 4]);
    }

    /// Tests run where there is no driver, or in a program without the feature.
    #[test]
    fn a_gpu_that_cannot_be_had_is_an_error_or_the_processor() {
        if candor_kernels::cuda::CudaDevice::all().is_ok() {
            return;
        }
        assert_eq!(TrainDevice { train_device: Choice::Auto }.choose(true).unwrap(), "");
        assert_eq!(TrainDevice { train_device: Choice::Cpu }.choose(true).unwrap(), "");
        let error = format!("{:#}", TrainDevice { train_device: Choice::Cuda(3) }.choose(true).unwrap_err());
        let expected = if cfg!(feature = "cuda") {
            "--train-device cuda:3: there is no CUDA driver (libcuda was not found)"
        } else {
            "--train-device cuda:3: this program was built without CUDA for training; `make cuda-tools` builds one with it"
        };
        assert_eq!(error, expected);
    }
}
