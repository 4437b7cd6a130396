//! exp, tanh, erf and the activations made of them, a vector at a time.
//!
//! exp and tanh are Cephes' single-precision forms (Moshier), erf is Juffa's; all are within a few
//! units in the last place of the exact function.

use crate::cpu::simd::Simd;
use crate::device::Activation;

/// eˣ; 0 below the smallest normal result, infinity above the largest.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    const LOWEST: f32 = -87.336_54;
    // ln 2 in two parts, the first short enough that its multiples are exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Operand order keeps NaN.
    let bounded = simd.min(simd.splat(89.0), simd.max(simd.splat(LOWEST), x));
    let n = simd.round(simd.mul(bounded, simd.splat(std::f32::consts::LOG2_E)));
    let r = simd.mul_add(n, simd.splat(-LN_2_HIGH), bounded);
    let r = simd.mul_add(n, simd.splat(-LN_2_LOW), r);
    let p = polynomial(simd, r, [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5]);
    let p = simd.add(simd.mul_add(p, simd.mul(r, r), r), simd.splat(1.0));
    simd.if_less(x, simd.splat(LOWEST), simd.splat(0.0), simd.scale(p, n))
}

#[inline(always)]
fn tanh<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    let size = simd.abs(x);
    let square = simd.mul(x, x);
    let p = polynomial(simd, square, [-5.704_988_7e-3, 2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1]);
    let near = simd.mul_add(simd.mul(p, square), x, x);
    let e = exp(simd, simd.add(size, size));
    let far = simd.sub(simd.splat(1.0), simd.div(simd.splat(2.0), simd.add(e, simd.splat(1.0))));
    simd.if_less(size, simd.splat(0.625), near, simd.copy_sign(far, x))
}

/// The error function, as Juffa's `erff`: a polynomial near 0, 1 - e^polynomial beyond.
#[inline(always)]
fn erf<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    let size = simd.abs(x);
    let square = simd.mul(x, x);
    let far = polynomial(
        simd,
        size,
        [
            -1.728_534_7e-5,
            3.831_971_3e-4,
            -3.883_964_4e-3,
            2.425_462_2e-2,
            -1.067_778_8e-1,
            -6.348_467e-1,
            -1.287_175_1e-1,
        ],
    );
    let far = simd.sub(simd.mul(far, size), size);
    let far = simd.copy_sign(simd.sub(simd.splat(1.0), exp(simd, far)), x);
    let near = polynomial(
        simd,
        square,
        [-5.967_617e-4, 4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_25e-1, -3.761_253_4e-1, 1.283_791_7e-1],
    );
    simd.if_less(size, simd.splat(0.927_734_4), simd.mul_add(near, x, x), far)
}

/// Σ cᵢ·x^(n-1-i): coefficients of the highest power first.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(simd: S, x: S::Vector, coefficients: [f32; N]) -> S::Vector {
    let mut sum = simd.splat(coefficients[0]);
    for &c in &coefficients[1..] {
        sum = simd.mul_add(sum, x, simd.splat(c));
    }
    sum
}

/// 1 / (1 + e⁻ˣ)
#[inline(always)]
fn sigmoid<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    let one = simd.splat(1.0);
    simd.div(one, simd.add(one, exp(simd, simd.sub(simd.splat(0.0), x))))
}

#[inline(always)]
pub(crate) fn activate<S: Simd>(simd: S, activation: Activation, x: S::Vector) -> S::Vector {
    match activation {
        Activation::Identity => x,
        Activation::Gelu => {
            let half = simd.mul(x, simd.splat(0.5));
            simd.mul_add(half, erf(simd, simd.mul(x, simd.splat(std::f32::consts::FRAC_1_SQRT_2))), half)
        }
        Activation::GeluTanh => {
            // x/2 · (1 + tanh u) = x / (1 + e^(-2u)), which loses no digits where x is negative; these are
            // -2 · sqrt(2/π) and 0.044715 times it.
            const LINEAR: f32 = -1.595_769;
            const CUBIC: f32 = -0.071_354_82;
            let square = simd.mul(x, x);
            let inner = simd.mul(simd.mul_add(square, simd.splat(CUBIC), simd.splat(LINEAR)), x);
            simd.div(x, simd.add(simd.splat(1.0), exp(simd, inner)))
        }
        Activation::Silu => simd.div(x, simd.add(simd.splat(1.0), exp(simd, simd.sub(simd.splat(0.0), x)))),
        Activation::Sigmoid => sigmoid(simd, x),
        Activation::Tanh => tanh(simd, x),
        Activation::Relu => simd.max(simd.splat(0.0), x),
    }
}
