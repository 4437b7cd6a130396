use candor_kernels::cpu::gemm::*;
use candor_kernels::cpu::pool::ThreadPool;
fn main() {
    let pool = ThreadPool::new(Some(1));
    let mut s = 1u64;
    let mut r = || {
        s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((s >> 40) as f32 / 16777216.0) - 0.5
    };
    for (m, n, k) in [
        (576, 1152, 384),
        (576, 384, 384),
        (576, 1536, 384),
        (576, 384, 1536),
        (1536, 384, 576),
        (384, 1536, 576),
        (1152, 384, 576),
        (16, 7, 384),
        (7, 384, 16),
        (9, 6144, 16),
        (16, 9, 6144),
        (384, 196, 576),
        (576, 384, 196),
    ] {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            for acc in [false, true] {
                for p in [Precision::F32, Precision::Bf16] {
                    let a: Vec<f32> = (0..m * k).map(|_| r()).collect();
                    let b: Vec<f32> = (0..k * n).map(|_| r()).collect();
                    let c0: Vec<f32> = (0..m * n).map(|_| r()).collect();
                    let mut c = c0.clone();
                    let am = if ta { MatrixRef::new(&a, m, k, 1, m) } else { MatrixRef::new(&a, m, k, k, 1) }.unwrap();
                    let bm = if tb { MatrixRef::new(&b, k, n, 1, k) } else { MatrixRef::new(&b, k, n, n, 1) }.unwrap();
                    gemm(&pool, am, bm, &mut c, acc, p).unwrap();
                    let mut e = 0f64;
                    let mut q = 0f64;
                    for t in 0..400 {
                        let i = (t * 7919) % m;
                        let j = (t * 104729 + t) % n;
                        let mut x = if acc { c0[i * n + j] as f64 } else { 0.0 };
                        for l in 0..k {
                            x += (if ta { a[l * m + i] } else { a[i * k + l] }) as f64
                                * (if tb { b[j * k + l] } else { b[l * n + j] }) as f64;
                        }
                        e += (x - c[i * n + j] as f64).powi(2);
                        q += x * x;
                    }
                    let rel = (e / q).sqrt();
                    if rel > 0.01 {
                        println!("BAD {m} {n} {k} ta{ta} tb{tb} acc{acc} {p:?} {rel}");
                    }
                }
            }
        }
    }
    println!("done");
}
