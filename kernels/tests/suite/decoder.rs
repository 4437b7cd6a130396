//! A decoder layer at once against the steps that it is made of.

use candor_kernels::{
    Activation, AttentionShape, CacheType, DType, DecoderBuffers, DecoderLayer, Device, DeviceError, HostTensor,
    Rounding, Scales,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// Sizes of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) width: usize,
    pub(crate) mlp: usize,
    pub(crate) heads: usize,
    pub(crate) key_heads: usize,
    pub(crate) head_dim: usize,
}

const EPS: f32 = 1e-6;
const THETA: f32 = 1e6;

/// A layer's weights on a device.
pub(crate) struct Layer<D: Device> {
    sizes: Sizes,
    norms: [D::Weight; 2],
    projections: [(D::Weight, Option<D::Weight>); 3],
    output: D::Weight,
    gate: D::Weight,
    up: D::Weight,
    down: D::Weight,
}

/// Buffers of a position.
struct Buffers<D: Device> {
    x: D::Buffer,
    normed: D::Buffer,
    query: D::Buffer,
    key: D::Buffer,
    value: D::Buffer,
    attended: D::Buffer,
    gate: D::Buffer,
    scratch: D::Buffer,
}

fn quantised(random: &mut ChaCha8Rng, dtype: DType, rows: usize, depth: usize) -> HostTensor {
    let bytes: Vec<u8> = (0..rows * dtype.row_bytes(depth).expect("small")).map(|_| random.random()).collect();
    let size = if dtype == DType::I4 { 0.12 } else { 0.008 } / (depth as f32).sqrt();
    let mut scale = || random.random_range(0.5 * size..1.5 * size);
    let scales = match dtype {
        DType::I4 => Scales::groups_from_f32((0..rows * depth.div_ceil(32)).map(|_| scale()).collect(), 32, rows)
            .expect("a good group"),
        _ => Scales::rows((0..rows).map(|_| scale()).collect::<Vec<f32>>()),
    };
    let len = bytes.len();
    HostTensor::new(Arc::new(bytes), 0, len, dtype, vec![rows, depth], Some(scales)).expect("a good tensor")
}

impl<D: Device> Layer<D> {
    pub(crate) fn random(device: &D, random: &mut ChaCha8Rng, sizes: Sizes, dtype: DType) -> Self {
        let Sizes { width, mlp, heads, key_heads, head_dim } = sizes;
        let upload = |tensor: HostTensor| device.weight(&tensor).expect("a good tensor");
        let floats = |random: &mut ChaCha8Rng, len: usize| {
            let values: Vec<f32> = (0..len).map(|_| random.random_range(0.5..1.5)).collect();
            upload(HostTensor::from_f32(&values, &[len]).expect("a good tensor"))
        };
        let norms = [(); 2].map(|()| floats(random, width));
        let projections = [heads, key_heads, key_heads].map(|heads| {
            let weight = upload(quantised(random, dtype, heads * head_dim, width));
            // Queries and keys of Qwen2 have biases; a layer without one is a layer too.
            let bias = (heads != key_heads || heads == 1).then(|| floats(random, heads * head_dim));
            (weight, bias)
        });
        let mut matrix = |rows, depth| upload(quantised(random, dtype, rows, depth));
        Layer {
            sizes,
            norms,
            projections,
            output: matrix(width, heads * head_dim),
            gate: matrix(mlp, width),
            up: matrix(mlp, width),
            down: matrix(width, mlp),
        }
    }

    fn whole(&self) -> DecoderLayer<'_, D::Weight> {
        let Sizes { heads, key_heads, head_dim, .. } = self.sizes;
        DecoderLayer {
            attention_norm: &self.norms[0],
            projections: self.projections.each_ref().map(|(weight, bias)| (weight, bias.as_ref())),
            output: &self.output,
            mlp_norm: &self.norms[1],
            gate: &self.gate,
            up: &self.up,
            down: &self.down,
            heads: [heads, key_heads],
            head_dim,
            eps: EPS,
            theta: THETA,
            scale: 1.0 / (head_dim as f32).sqrt(),
        }
    }

    fn buffers(&self, device: &D, x: &[f32]) -> Buffers<D> {
        let Sizes { width, mlp, heads, key_heads, head_dim } = self.sizes;
        let of = |len: usize| device.allocate(len).expect("memory");
        let mut buffer = of(width);
        device.write(x, &mut buffer, 0).expect("fits");
        let [query, attended] = [(); 2].map(|()| of(heads * head_dim));
        let [key, value] = [(); 2].map(|()| of(key_heads * head_dim));
        let scratch = of(width.max(mlp));
        Buffers { x: buffer, normed: of(width), query, key, value, attended, gate: of(mlp), scratch }
    }

    fn at_once(&self, device: &D, buffers: &mut Buffers<D>, cache: &mut D::Cache, position: usize) -> bool {
        let Buffers { x, query, key, value, attended, gate, .. } = buffers;
        let buffers = DecoderBuffers { x, query, key, value, attended, gate };
        device.decoder_layer(&self.whole(), buffers, cache, position).expect("a good layer")
    }

    fn in_steps(
        &self,
        device: &D,
        buffers: &mut Buffers<D>,
        cache: &mut D::Cache,
        position: usize,
    ) -> Result<(), DeviceError> {
        let Sizes { width, mlp, heads, key_heads, head_dim } = self.sizes;
        let Buffers { x, normed, query, key, value, attended, gate, scratch } = buffers;
        device.rms_norm(x, 1, &self.norms[0], EPS, normed)?;
        let layers = self.projections.each_ref().map(|(weight, bias)| (weight, bias.as_ref(), Activation::Identity));
        device.linear_each(normed, 1, &layers, &mut [&mut *query, &mut *key, &mut *value])?;
        device.rope_and_write(query, key, value, 1, [heads, key_heads], head_dim, cache, position, THETA)?;
        let shape = AttentionShape {
            batch: 1,
            queries: 1,
            keys: position + 1,
            heads,
            key_heads,
            head_dim,
            causal: true,
            scale: 1.0 / (head_dim as f32).sqrt(),
            rounding: Rounding::None,
        };
        device.cache_attention(query, cache, shape, attended)?;
        device.linear_add(attended, 1, &self.output, None, width, scratch, x)?;
        device.rms_norm(x, 1, &self.norms[1], EPS, normed)?;
        device.linear_gated(normed, 1, &self.gate, &self.up, Activation::Silu, mlp, scratch, gate)?;
        device.linear_add(gate, 1, &self.down, None, width, scratch, x)
    }
}

fn read<D: Device>(device: &D, buffer: &D::Buffer) -> Vec<f32> {
    let mut values = vec![0.0; device.len(buffer)];
    device.read(buffer, 0, &mut values).expect("long enough");
    values
}

#[track_caller]
fn near(what: &str, found: &[f32], expected: &[f32]) {
    let size = expected.iter().fold(1e-3f32, |size, value| size.max(value.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= 2e-6 * size, "{what}, element {i}: {found}, not {expected}");
    }
}

/// Layers of odd sizes, at the first positions, and where a chunk of the cache begins: one position after the other, each by its
/// own way from the state that the other left, so that errors do not grow.
pub(crate) fn at_once_is_in_steps<D: Device>(device: &D) {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    let all = [
        Sizes { width: 64, mlp: 96, heads: 2, key_heads: 1, head_dim: 16 },
        Sizes { width: 160, mlp: 200, heads: 14, key_heads: 2, head_dim: 64 },
        Sizes { width: 130, mlp: 37, heads: 4, key_heads: 4, head_dim: 128 },
        Sizes { width: 896, mlp: 1030, heads: 6, key_heads: 3, head_dim: 20 },
    ];
    for (index, sizes) in all.into_iter().enumerate() {
        for dtype in [DType::I4, DType::I8] {
            let layer = Layer::random(device, &mut random, sizes, dtype);
            let Sizes { width, key_heads, head_dim, .. } = sizes;
            let [mut at_once, mut in_steps] =
                [(); 2].map(|()| device.cache(CacheType::I8, 140, key_heads, head_dim).expect("memory"));
            let mut replay = D::Replay::default();
            for position in [0, 1, 2, 126, 127, 128, 129] {
                if position == 126 {
                    let rows = 124;
                    let mut between = || {
                        let values: Vec<f32> =
                            (0..rows * key_heads * head_dim).map(|_| random.random_range(-1.0..1.0)).collect();
                        let mut buffer = device.allocate(values.len()).expect("memory");
                        device.write(&values, &mut buffer, 0).expect("fits");
                        buffer
                    };
                    let (k, v) = (between(), between());
                    device.cache_write(&k, &v, rows, &mut in_steps, 3).expect("fits");
                    device.cache_copy(&in_steps, &mut at_once, position).expect("fits");
                }
                let x: Vec<f32> = (0..width).map(|_| random.random_range(-2.0..2.0)).collect();
                let [mut ours, mut theirs] = [(); 2].map(|()| layer.buffers(device, &x));
                let mut done = false;
                let mut at_once = || done = layer.at_once(device, &mut ours, &mut at_once, position);
                // Some for themselves, some replayed.
                if position % 2 == 0 {
                    at_once();
                } else {
                    let run = || {
                        at_once();
                        Ok(())
                    };
                    device.replay(&mut replay, run).expect("it can be replayed");
                }
                assert!(done, "{sizes:?} of {dtype}");
                layer.in_steps(device, &mut theirs, &mut in_steps, position).expect("a good layer");
                let what = format!("layer {index} of {dtype} at {position}");
                near(&format!("{what}: attended"), &read(device, &ours.attended), &read(device, &theirs.attended));
                near(&format!("{what}: gate"), &read(device, &ours.gate), &read(device, &theirs.gate));
                near(&format!("{what}: x"), &read(device, &ours.x), &read(device, &theirs.x));
            }
        }
    }
}

/// What cannot be taken at once is said so, and left alone; what is wrong is an error.
pub(crate) fn others_are_refused<D: Device>(device: &D) {
    let mut random = ChaCha8Rng::seed_from_u64(12);
    let sizes = Sizes { width: 64, mlp: 96, heads: 2, key_heads: 1, head_dim: 16 };
    let mut layer = Layer::random(device, &mut random, sizes, DType::I8);
    let x = vec![1.0; 64];
    let mut buffers = layer.buffers(device, &x);
    for kind in [CacheType::F32, CacheType::F16] {
        let mut cache = device.cache(kind, 4, 1, 16).expect("memory");
        assert!(!layer.at_once(device, &mut buffers, &mut cache, 0), "a cache of {kind:?}");
        assert_eq!(read(device, &buffers.x), x);
    }
    let mut cache = device.cache(CacheType::I8, 4, 1, 16).expect("memory");
    let mut refused = |layer: &Layer<D>, position: usize, expected: &str| {
        let Buffers { x, query, key, value, attended, gate, .. } = &mut buffers;
        let buffers = DecoderBuffers { x, query, key, value, attended, gate };
        let error = device.decoder_layer(&layer.whole(), buffers, &mut cache, position).expect_err("it is wrong");
        assert!(error.to_string().contains(expected), "{error}");
    };
    refused(&layer, 4, "the cache");
    refused(&layer, usize::MAX, "the cache");
    std::mem::swap(&mut layer.gate, &mut layer.down);
    refused(&layer, 0, "gate");
    std::mem::swap(&mut layer.gate, &mut layer.down);
    layer.sizes.head_dim = 8;
    refused(&layer, 0, "what the cache holds");
    layer.sizes.head_dim = 16;
    layer.gate = Layer::random(device, &mut random, sizes, DType::I4).gate;
    assert!(!layer.at_once(device, &mut buffers, &mut cache, 0), "weights of two types");
}
