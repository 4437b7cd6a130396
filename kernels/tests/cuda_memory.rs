//! The GPU's memory on the stand-in driver: what is allocated when, where weights lie, and that everything is given back.
#![allow(missing_docs)]
#![cfg(not(target_feature = "crt-static"))] // those are cross builds, whose programs the host's compiler cannot make

mod stand_in;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use candor_kernels::cuda::{CudaDevice, CudaWeight};
use candor_kernels::tensor::Keeper;
use candor_kernels::{Activation, AttentionShape, CacheType, DType, Device, DeviceError, HostTensor, Rounding, Scales};
use stand_in::{alone, counts};

/// Bytes at a page, as a mapped file's are.
struct File {
    bytes: Vec<u8>,
    start: usize,
    mapping: bool,
    gone: Mutex<Vec<Range<usize>>>,
}

impl File {
    fn new(content: &[u8], mapping: bool) -> Arc<Self> {
        const PAGE: usize = 4096;
        let mut bytes = vec![0; content.len().next_multiple_of(PAGE) + PAGE];
        let start = bytes.as_ptr().align_offset(PAGE);
        bytes[start..start + content.len()].copy_from_slice(content);
        Arc::new(File { bytes, start, mapping, gone: Mutex::default() })
    }

    fn tensor(self: &Arc<Self>, start: usize, rows: usize, depth: usize) -> HostTensor {
        HostTensor::new(self.clone(), start, rows * depth * 4, DType::F32, vec![rows, depth], None)
            .expect("a good tensor")
    }
}

impl AsRef<[u8]> for File {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[self.start..]
    }
}

impl Keeper for File {
    fn is_mapping(&self) -> bool {
        self.mapping
    }

    fn let_go(&self, range: Range<usize>) {
        self.gone.lock().expect("nobody panicked").push(range);
    }
}

/// Prints what the library logs.
struct Said;

impl log::Log for Said {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        println!("\nlog: {}", record.args());
    }

    fn flush(&self) {}
}

fn listen() {
    log::set_logger(&Said).expect("the only one");
    log::set_max_level(log::LevelFilter::Info);
}

fn logged(said: &str) -> Vec<&str> {
    said.lines().filter_map(|line| line.strip_prefix("log: ")).collect()
}

/// f32 values that tell where they are.
fn table(rows: usize, depth: usize) -> Vec<u8> {
    (0..rows * depth).flat_map(|i| (i as f32).to_le_bytes()).collect()
}

/// Rows of a table as the GPU reads them.
fn rows(device: &CudaDevice, weight: &CudaWeight, ids: &[u32], depth: usize) -> Vec<f32> {
    let mut out = device.allocate(ids.len() * depth).expect("memory");
    device.embed(weight, ids, &mut out, 0).expect("they are there");
    let mut values = vec![0.0; ids.len() * depth];
    device.read(&out, 0, &mut values).expect("long enough");
    values
}

fn check_rows(device: &CudaDevice, weight: &CudaWeight, ids: &[u32], depth: usize) {
    let expected: Vec<f32> =
        ids.iter().flat_map(|&id| (0..depth).map(move |i| (id as usize * depth + i) as f32)).collect();
    assert!(rows(device, weight, ids, depth) == expected, "rows {ids:?}");
}

fn quantised(dtype: DType, rows: usize, depth: usize) -> HostTensor {
    let len = rows * dtype.row_bytes(depth).expect("small");
    let scales = match dtype {
        DType::I4 => Scales::groups_from_f32(vec![0.01; rows * depth / 32], 32, rows).expect("a good group"),
        _ => Scales::rows(vec![0.01; rows]),
    };
    HostTensor::new(Arc::new(vec![0x37; len]), 0, len, dtype, vec![rows, depth], Some(scales)).expect("a good tensor")
}

/// Layers of every type, attention and copies, all in memory that was taken before.
struct Work {
    device: CudaDevice,
    weights: Vec<CudaWeight>,
    caches: [<CudaDevice as Device>::Cache; 2],
    buffers: [<CudaDevice as Device>::Buffer; 4],
}

impl Work {
    const WIDTH: usize = 128;
    const ROWS: usize = 70;

    fn new(device: CudaDevice, kind: CacheType) -> Self {
        let width = Self::WIDTH;
        let float = HostTensor::from_f32(&vec![0.01; width * width], &[width, width]).expect("a good tensor");
        let tensors = [quantised(DType::I4, width, width), quantised(DType::I8, width, width), float];
        let weights = tensors.iter().map(|tensor| device.weight(tensor).expect("memory")).collect();
        let caches = [200, 100].map(|capacity| device.cache(kind, capacity, 2, 64).expect("memory"));
        let buffers = [(); 4].map(|()| device.allocate(Self::ROWS * width).expect("memory"));
        Work { device, weights, caches, buffers }
    }

    fn run(&mut self) -> Result<(), DeviceError> {
        let Work { device, weights, caches: [cache, copy], buffers: [x, out, scratch, q] } = self;
        let width = Self::WIDTH;
        device.write(&vec![0.5; Self::ROWS * width], x, 0)?;
        for weight in weights.iter() {
            for rows in [1, 5, Self::ROWS] {
                let len = rows * width;
                device.linear(x, rows, weight, None, Activation::Silu, out)?;
                device.linear_gated(x, rows, weight, weight, Activation::Silu, len, scratch, out)?;
                device.linear_add(x, rows, weight, None, len, scratch, out)?;
            }
        }
        device.copy(x, 0, q, 0, Self::ROWS * width)?;
        device.rope_and_write(q, scratch, x, Self::ROWS, [2, 2], 64, cache, 0, 1e4)?;
        device.cache_copy(cache, copy, Self::ROWS)?;
        for (queries, keys) in [(1, 20), (1, Self::ROWS), (3, Self::ROWS)] {
            let shape = AttentionShape {
                batch: 1,
                queries,
                keys,
                heads: 2,
                key_heads: 2,
                head_dim: 64,
                causal: true,
                scale: 0.125,
                rounding: Rounding::None,
            };
            device.cache_attention(q, copy, shape, out)?;
            device.attention(q, x, x, shape, out)?;
        }
        let mut values = vec![0.0; width];
        device.read(out, 0, &mut values)?;
        assert!(values.iter().all(|value| value.is_finite()));
        // Memory of no elements is none.
        drop(device.allocate(0)?);
        Ok(())
    }
}

#[test]
fn a_second_run_allocates_nothing() {
    alone("a_second_run_allocates_nothing", "", false, || {
        for device in [stand_in::device(), stand_in::device().exact()] {
            for kind in [CacheType::F32, CacheType::F16, CacheType::I8] {
                let mut work = Work::new(device.clone(), kind);
                work.run().expect("it fits");
                let before = counts();
                for _ in 0..3 {
                    work.run().expect("it fits");
                }
                assert_eq!(counts().made, before.made, "{kind:?}");
            }
        }
        assert_eq!(counts().device, 0, "everything is given back with the device");
    });
}

#[test]
fn weights_share_an_arena_and_the_ring_goes() {
    let said = alone("weights_share_an_arena_and_the_ring_goes", "", false, || {
        listen();
        let device = stand_in::device();
        let before = counts();
        let tensors: Vec<HostTensor> =
            (0..50).map(|i| File::new(&table(100, 200 + i), true).tensor(0, 100, 200 + i)).collect();
        let bytes = tensors.iter().map(|tensor| tensor.bytes().len().next_multiple_of(256)).sum();
        device.loading(bytes);
        let weights: Vec<CudaWeight> = tensors.iter().map(|tensor| device.weight(tensor).expect("memory")).collect();
        assert_eq!(counts().host, 2, "the ring");
        device.loaded().expect("copied");
        let now = counts();
        assert_eq!((now.host, now.registered), (0, 0));
        assert_eq!((now.device - before.device, now.used - before.used), (1, bytes as u64));
        for (i, weight) in weights.iter().enumerate() {
            check_rows(&device, weight, &[0, 57, 99], 200 + i);
        }
        // Views keep it.
        let view = device.weight_rows(&weights[3], 10, 5).expect("they are there");
        drop(weights);
        assert_eq!(counts().device - before.device, 1);
        assert_eq!(rows(&device, &view, &[0], 203)[0], 2030.0);
        drop(view);
        assert_eq!(counts().device, before.device);
    });
    let said = logged(&said);
    assert_eq!(said[0], "weights: 4 MB uploaded through 16 MB of pinned memory, in 1 new arena");
    // These are in f32.
    assert!(said.len() == 2 && said[1].starts_with("weights: 4 MB are in f32 or bf16"), "{said:?}");
}

#[test]
fn what_is_larger_than_the_ring_comes_through_it() {
    for lazy in [false, true] {
        alone("what_is_larger_than_the_ring_comes_through_it", "", lazy, || {
            let device = stand_in::device();
            let (rows, depth) = (10_500, 1000);
            let file = File::new(&table(rows, depth), true);
            device.loading(2 * rows * depth * 4);
            let first = device.weight(&file.tensor(0, rows, depth)).expect("memory");
            // Again, behind what the first has left of the ring.
            let second = device.weight(&file.tensor(0, rows, depth)).expect("memory");
            device.loaded().expect("copied");
            let ids: Vec<u32> = (0..rows as u32).step_by(97).chain([1999, 2000, 2001, 3999, 4000, 10_499]).collect();
            check_rows(&device, &first, &ids, depth);
            check_rows(&device, &second, &ids, depth);
            assert_eq!(file.gone.lock().expect("nobody panicked").len(), 2, "its pages may go");
        });
    }
}

/// The states in which a mapped file is uploaded, and what is said of it.
#[test]
fn a_mapped_file_is_uploaded_where_it_cannot_be_read() {
    for state in ["", "integrated=1,register=none", "integrated=1,register=refused", "pinned=none", "largest=1100000"] {
        let said = alone("a_mapped_file_is_uploaded_where_it_cannot_be_read", state, false, || {
            listen();
            let device = stand_in::device();
            let before = counts();
            let file = File::new(&table(4000, 100), true);
            device.loading(4000 * 100 * 4);
            let weights = [0, 1, 2, 3].map(|i| device.weight(&file.tensor(i * 400_000, 1000, 100)).expect("memory"));
            device.loaded().expect("copied");
            assert_eq!((counts().host, counts().registered), (0, 0));
            assert_eq!(rows(&device, &weights[3], &[0], 100)[7], 300_007.0);
            assert_eq!(file.gone.lock().expect("nobody panicked").len(), 4);
            drop(weights);
            assert_eq!(counts().device, before.device);
        });
        let through = "weights: 2 MB uploaded through 16 MB of pinned memory, in 1 new arena";
        let mut expected = match state {
            "integrated=1,register=refused" => vec!["the driver does not take the weights' mapped file", through],
            "pinned=none" => vec!["there is no pinned memory", "weights: 2 MB uploaded, in 1 new arena"],
            "largest=1100000" => vec!["weights: 2 MB uploaded through 16 MB of pinned memory, in 2 new arenas"],
            _ => vec![through],
        };
        expected.push("weights: 2 MB are in f32 or bf16");
        let said = logged(&said);
        let as_expected = said.iter().zip(&expected).all(|(said, expected)| said.starts_with(expected));
        assert!(said.len() == expected.len() && as_expected, "{state}: {said:?}");
    }
}

#[test]
fn a_mapped_file_is_read_where_it_lies() {
    let said = alone("a_mapped_file_is_read_where_it_lies", "integrated=1", false, || {
        listen();
        let device = stand_in::device();
        let before = counts();
        let mut content = table(1000, 100);
        content.extend(vec![0; 8]);
        content.extend(table(1000, 100));
        let (file, plain) = (File::new(&content, true), File::new(&content, false));
        device.loading(800_000);
        let there = device.weight(&file.tensor(0, 1000, 100)).expect("registered");
        assert_eq!((counts().registered, counts().device), (1, before.device), "and nothing is copied");
        let odd = device.weight(&file.tensor(400_008, 1000, 100)).expect("uploaded: it does not begin at 16 bytes");
        let other = device.weight(&plain.tensor(0, 1000, 100)).expect("uploaded: it is no mapping");
        device.loaded().expect("copied");
        assert_eq!((counts().registered, counts().device), (1, before.device + 1));
        for weight in [&there, &odd, &other] {
            check_rows(&device, weight, &[0, 500, 999], 100);
        }
        assert_eq!(
            *file.gone.lock().expect("nobody panicked"),
            std::slice::from_ref(&(400_008..800_008)),
            "pages that are read stay"
        );
        drop(there);
        assert_eq!(counts().registered, 0, "nobody reads it any more");
        let again = device.weight(&file.tensor(0, 1000, 100)).expect("registered again");
        let weak = Arc::downgrade(&file);
        drop(file);
        assert!(weak.upgrade().is_some(), "the GPU reads it");
        check_rows(&device, &again, &[3], 100);
        drop((again, odd, other));
        assert!(weak.upgrade().is_none());
        assert_eq!((counts().registered, counts().device), (0, before.device));
    });
    assert_eq!(
        logged(&said)[..2],
        [
            "weights: 0 MB of the mapped file are used where they lie",
            "weights: 1 MB uploaded through 16 MB of pinned memory, in 1 new arena"
        ]
    );
}

#[test]
fn a_tensor_larger_than_an_arena_works() {
    let said = alone("a_tensor_larger_than_an_arena_works", "", false, || {
        listen();
        let device = stand_in::device();
        let (rows, depth) = (1100, 64 << 10);
        let (len, bytes) = (rows * depth * 4, Arc::new(vec![0; rows * depth * 4]));
        let tensor = HostTensor::new(bytes, 0, len, DType::F32, vec![rows, depth], None).expect("a good tensor");
        device.loading(len);
        let weight = device.weight(&tensor).expect("memory");
        device.loaded().expect("copied");
        assert!(self::rows(&device, &weight, &[1099], depth).iter().all(|&value| value == 0.0));
    });
    let said = logged(&said);
    assert!(said[0].starts_with("a tensor of 288 MB is an allocation of its own"), "{said:?}");
}

#[test]
fn out_of_memory_in_the_middle_of_loading_frees_all() {
    for state in ["memory=3000000", "memory=3000000,integrated=1"] {
        alone("out_of_memory_in_the_middle_of_loading_frees_all", state, false, || {
            let device = stand_in::device();
            let before = counts();
            let tensors: Vec<HostTensor> =
                (0..20).map(|_| File::new(&table(1000, 100), false).tensor(0, 1000, 100)).collect();
            device.loading(20 * 400_128);
            let weights: Result<Vec<CudaWeight>, DeviceError> =
                tensors.iter().map(|tensor| device.weight(tensor)).collect();
            assert!(matches!(weights, Err(DeviceError::GpuOutOfMemory { bytes: 400_000, .. })));
            device.loaded().expect("the ring goes");
            let now = counts();
            assert_eq!((now.device, now.host, now.used), (before.device, 0, before.used));
            // And what fits still goes.
            device.loading(400_128);
            let weight = device.weight(&tensors[0]).expect("there is room");
            device.loaded().expect("copied");
            check_rows(&device, &weight, &[1], 100);
        });
    }
}

/// Whenever the GPU goes while weights are loaded, there is an error that says so, and no panic.
#[test]
fn a_gpu_can_be_lost_while_weights_are_loaded() {
    let mut lost = 0;
    for call in (25..130).step_by(3) {
        let state = format!("lost-at={call},integrated=1");
        let said = alone("a_gpu_can_be_lost_while_weights_are_loaded", &state, false, || {
            let load = |device: &CudaDevice| -> Result<(), DeviceError> {
                let (file, plain) = (File::new(&table(1000, 100), true), File::new(&table(9000, 500), false));
                device.loading(20_000_000);
                let weights = [file.tensor(0, 500, 100), plain.tensor(0, 9000, 500), file.tensor(200_000, 500, 100)]
                    .map(|tensor| device.weight(&tensor));
                let done = device.loaded();
                for weight in weights {
                    weight?;
                }
                done
            };
            let outcome = stand_in::open().map_err(|error| error.to_string());
            let outcome = outcome.and_then(|device| load(&device).map_err(|error| error.to_string()));
            println!("\noutcome: {outcome:?}");
        });
        assert!(!said.contains("panicked"), "{call}: {said}");
        lost += usize::from(said.contains("the GPU was lost"));
        assert!(said.contains("the GPU was lost") || said.contains("outcome: Ok(())"), "{call}: {said}");
    }
    assert!(lost > 3, "{lost}");
}
