//! Matrix instructions, by the fragment tables of the PTX ISA ("Matrix Fragments for mma.m16n8k16", "... m16n8k32",
//! "ldmatrix"). Lane `4 g + t` holds row or column `g` and the elements that start at `t`.

use super::arithmetic::signed;
use super::instruction::{Mma, Product, Type};
use super::round::widen;

/// The registers of one lane.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fragments {
    pub(super) a: [u32; 4],
    pub(super) b: [u32; 2],
    pub(super) c: [u32; 4],
}

/// `D = A B + C` of a warp: what each lane gets.
pub(super) fn multiply(mma: &Mma, lanes: &[Fragments; 32]) -> [[u32; 4]; 32] {
    let mut d = [[0; 4]; 32];
    for (lane, registers) in d.iter_mut().enumerate() {
        for (at, register) in registers.iter_mut().enumerate() {
            let (row, column) = place_of_c(lane, at);
            *register = element(mma, lanes, row, column, lanes[lane].c[at]);
        }
    }
    d
}

/// C and D, 16 x 8: registers 0 and 1 are neighbours in row `g`, 2 and 3 in row `g + 8`.
fn place_of_c(lane: usize, register: usize) -> (usize, usize) {
    (lane / 4 + 8 * (register / 2), 2 * (lane % 4) + register % 2)
}

/// Where A, 16 x K, holds row `row` and column `k`, where `per` elements fill a register: the lane, the register, and
/// the element in it. Register 0 is of rows 0 to 7, 1 of rows 8 to 15; 2 and 3 are the same in the second half of
/// the columns.
fn place_in_a(row: usize, k: usize, per: usize) -> (usize, usize, usize) {
    let (half, within) = (k / (4 * per), k % (4 * per));
    (4 * (row % 8) + within / per, row / 8 + 2 * half, within % per)
}

/// Where B, K x 8, holds row `k` and column `column`: register 0 is of the first half of the rows.
fn place_in_b(k: usize, column: usize, per: usize) -> (usize, usize, usize) {
    let (half, within) = (k / (4 * per), k % (4 * per));
    (4 * column + within / per, half, within % per)
}

fn element(mma: &Mma, lanes: &[Fragments; 32], row: usize, column: usize, c: u32) -> u32 {
    match mma.product {
        Product::F16 => float_element(Type::F16, mma.k, lanes, row, column, c),
        Product::Bf16 => float_element(Type::Bf16, mma.k, lanes, row, column, c),
        Product::Int8 { signed_a, signed_b, saturate } => {
            let part = |register: u32, at: usize, with_sign: bool| {
                let byte = register >> (8 * at) & 0xff;
                if with_sign { signed(byte.into(), 8) } else { byte.into() }
            };
            let product = |k: usize| {
                let ((lane_a, a, at_a), (lane_b, b, at_b)) = (place_in_a(row, k, 4), place_in_b(k, column, 4));
                part(lanes[lane_a].a[a], at_a, signed_a) * part(lanes[lane_b].b[b], at_b, signed_b)
            };
            let sum = i64::from(c as i32) + (0..mma.k).map(product).sum::<i64>();
            if saturate { sum.clamp(i32::MIN.into(), i32::MAX.into()) as u32 } else { sum as u32 }
        }
    }
}

/// Products are exact and their sum is rounded once; devices differ from that, and from each other, in the last bits.
fn float_element(ty: Type, depth: usize, lanes: &[Fragments; 32], row: usize, column: usize, c: u32) -> u32 {
    let part = |register: u32, at: usize| widen(ty, u64::from(register >> (16 * at) & 0xffff));
    let product = |k: usize| {
        let ((lane_a, a, at_a), (lane_b, b, at_b)) = (place_in_a(row, k, 2), place_in_b(k, column, 2));
        part(lanes[lane_a].a[a], at_a) * part(lanes[lane_b].b[b], at_b)
    };
    let sum = f64::from(f32::from_bits(c)) + (0..depth).map(product).sum::<f64>();
    (sum as f32).to_bits()
}

/// What a lane gets of one 8 x 8 matrix of 16-bit numbers, given its rows of 16 bytes: elements `(g, 2t)` and
/// `(g, 2t + 1)`, or, transposed, `(2t, g)` and `(2t + 1, g)`.
pub(super) fn load_part(rows: &[[u8; 16]], lane: usize, transposed: bool) -> u32 {
    let (g, t) = (lane / 4, lane % 4);
    let number =
        |row: usize, column: usize| u32::from(u16::from_le_bytes([rows[row][2 * column], rows[row][2 * column + 1]]));
    let [low, high] = [2 * t, 2 * t + 1].map(|k| if transposed { number(k, g) } else { number(g, k) });
    low | high << 16
}
