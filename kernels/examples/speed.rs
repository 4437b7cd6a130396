#![allow(missing_docs, clippy::unwrap_used)]
use candor_kernels::cpu::CpuDevice;
use candor_kernels::{Activation, DType, Device, HostTensor, Scales};
use std::sync::Arc;
use std::time::Instant;

fn main() {
    let threads: usize = std::env::args().nth(1).map_or(2, |a| a.parse().unwrap());
    let device = CpuDevice::new(Some(threads));
    println!("{}", device.describe());
    println!("roof {:.1} GB/s", candor_kernels::cpu::measure_read_bandwidth(device.pool(), 256 << 20));
    for (dtype, group, rows, n, k) in [
        (DType::I4, Some(32), 1, 151_936, 896),
        (DType::I4, Some(32), 1, 1000, 896),
        (DType::I4, Some(128), 1, 1000, 896),
        (DType::I8, None, 1, 1000, 896),
        (DType::I4, Some(32), 1, 400, 4864),
        (DType::I4, Some(128), 1, 151_936, 896),
        (DType::I4, None, 1, 151_936, 896),
        (DType::I8, None, 1, 151_936, 896),
        (DType::I8, Some(32), 1, 151_936, 896),
        (DType::I4, Some(32), 512, 4864, 896),
        (DType::I4, Some(32), 512, 896, 4864),
        (DType::I4, Some(128), 512, 4864, 896),
        (DType::I8, None, 512, 4864, 896),
        (DType::I8, None, 1568, 3072, 768),
        (DType::I8, None, 1568, 768, 3072),
        (DType::I8, None, 1500, 5120, 1280),
        (DType::F32, None, 1568, 3072, 768),
        (DType::F32, None, 1568, 768, 3072),
    ]
    .into_iter()
    .enumerate()
    .filter(|(i, _)| std::env::args().nth(2).is_none_or(|a| a.parse() == Ok(*i)))
    .map(|x| x.1)
    {
        let bytes = dtype.row_bytes(k).unwrap() * n;
        let tensor = if dtype == DType::F32 {
            HostTensor::from_f32(&vec![0.5; n * k], &[n, k]).unwrap()
        } else {
            let data: Vec<u8> = (0..bytes).map(|i| ((i * 7919) >> 3) as u8).collect();
            let scales = match group {
                None => Scales::rows(vec![0.01; n]),
                Some(g) => {
                    let half = vec![f32::from_bits(0x2c00_2c00); n * (k / g) / 2];
                    let bytes: Vec<u8> = half.iter().flat_map(|h| h.to_ne_bytes()).collect();
                    Scales::groups(Arc::new(bytes), 0, DType::F16, g, n, k / g).unwrap()
                }
            };
            HostTensor::new(Arc::new(data), 0, bytes, dtype, vec![n, k], Some(scales)).unwrap()
        };
        let total = bytes + group.map_or(0, |g| n * k / g * 2);
        let w = device.weight(&tensor).unwrap();
        let mut x = device.allocate(rows * k).unwrap();
        device.write(&(0..rows * k).map(|i| (i % 17) as f32 - 8.0).collect::<Vec<_>>(), &mut x, 0).unwrap();
        let mut out = device.allocate(rows * n).unwrap();
        let mut times = Vec::new();
        let cpu = || {
            std::fs::read_to_string("/proc/thread-self/schedstat")
                .unwrap()
                .split(' ')
                .next()
                .unwrap()
                .parse::<f64>()
                .unwrap()
        };
        let mut spent = Vec::new();
        for _ in 0..std::env::args().nth(3).map_or(31, |a| a.parse().unwrap()) {
            let t = Instant::now();
            let c = cpu();
            device.linear(&x, rows, &w, None, Activation::Identity, &mut out).unwrap();
            times.push(t.elapsed().as_secs_f64());
            spent.push((cpu() - c) / 1e9);
        }
        times.sort_by(f64::total_cmp);
        spent.sort_by(f64::total_cmp);
        let t = spent[spent.len() / 2].max(1e-9);
        println!(
            "{dtype} {group:?} {rows}x{n}x{k}: {:.2} ms cpu (wall median {:.2} best {:.2})  {:.1} GB/s  {:.0} GOP/s",
            t * 1e3,
            times[times.len() / 2] * 1e3,
            times[0] * 1e3,
            total as f64 / t / 1e9,
            2.0 * (rows * n * k) as f64 / t / 1e9
        );
    }
}
