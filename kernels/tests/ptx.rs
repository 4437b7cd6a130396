//! The PTX interpreter of `ptx/` against values computed by hand and against the definitions of the PTX ISA; and over
//! what NVIDIA's compiler makes of CUDA C++, where it is there.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "ptx/mod.rs"]
mod ptx;

#[path = "ptx/compiled.rs"]
mod compiled;
#[path = "../build/nvrtc.rs"]
mod nvrtc;

use half::{bf16, f16};
use ptx::{Arg, Error, Fault, Memory, Module, Space};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const HEAD: &str = ".version 8.5\n.target sm_87\n.address_size 64\n";

/// Runs one instruction in one thread. Operands are named a, b, c, e and have these types and bits; the result is d.
fn evaluate(instruction: &str, result: &str, operands: &[(&str, u64)]) -> Result<u64, Error> {
    let mut body = format!(".reg .{result} d;\n.reg .b64 address;\n.reg .b32 number;\n");
    body += "ld.param.u64 address, [from];\n";
    let mut bytes = Vec::new();
    for (at, ((ty, bits), name)) in operands.iter().zip(["a", "b", "c", "e"]).enumerate() {
        body += &format!(".reg .{ty} {name};\n");
        if *ty == "pred" {
            body += &format!("ld.global.u32 number, [address+{}];\nsetp.ne.u32 {name}, number, 0;\n", 8 * at);
        } else {
            body += &format!("ld.global.{} {name}, [address+{}];\n", bits_of(ty), 8 * at);
        }
        bytes.extend(bits.to_le_bytes());
    }
    body += &format!("{instruction}\nld.param.u64 address, [to];\n");
    if result == "pred" {
        body += "selp.u32 number, 1, 0, d;\nst.global.u32 [address], number;\n";
    } else {
        body += &format!("st.global.{} [address], d;\n", bits_of(result));
    }
    let text = format!("{HEAD}.visible .entry k(.param .u64 to, .param .u64 from)\n{{\n{body}ret;\n}}\n");
    let mut memory = Memory::new();
    let (to, from) = (memory.add(&[0; 8]), memory.add(&bytes));
    let one = [1, 1, 1];
    Module::parse(&text)?.launch(&mut memory, "k", one, one, 0, &[Arg::U64(to), Arg::U64(from)])?;
    Ok(u64::from_le_bytes(memory.bytes(to).try_into().unwrap()))
}

fn bits_of(ty: &str) -> &'static str {
    match ty {
        "b16" | "u16" | "s16" | "f16" => "b16",
        "b64" | "u64" | "s64" | "f64" => "b64",
        _ => "b32",
    }
}

#[track_caller]
fn check(instruction: &str, result: &str, operands: &[(&str, u64)], expected: u64) {
    let value = evaluate(instruction, result, operands).unwrap_or_else(|error| panic!("{instruction}: {error}"));
    assert_eq!(value, expected, "{instruction} of {operands:x?}: {value:#x} in place of {expected:#x}");
}

/// With operands of 32 bits.
#[track_caller]
fn check32(instruction: &str, operands: &[u32], expected: u32) {
    let operands: Vec<(&str, u64)> = operands.iter().map(|bits| ("b32", u64::from(*bits))).collect();
    check(instruction, "b32", &operands, expected.into());
}

#[track_caller]
fn check64(instruction: &str, operands: &[u64], expected: u64) {
    let operands: Vec<(&str, u64)> = operands.iter().map(|bits| ("b64", *bits)).collect();
    check(instruction, "b64", &operands, expected);
}

#[track_caller]
fn check_f32(instruction: &str, operands: &[f32], expected: f32) {
    let operands: Vec<u32> = operands.iter().map(|x| x.to_bits()).collect();
    check32(instruction, &operands, expected.to_bits());
}

// ---- Integers

#[test]
fn sums_and_products_of_integers() {
    check32("add.s32 d, a, b;", &[0x7fff_ffff, 1], 0x8000_0000);
    check32("add.sat.s32 d, a, b;", &[0x7fff_ffff, 1], 0x7fff_ffff);
    check32("sub.sat.s32 d, a, b;", &[0x8000_0000, 1], 0x8000_0000);
    check32("sub.u32 d, a, 5;", &[3], 0xffff_fffe);
    check32("mul.lo.s32 d, a, b;", &[0xffff_fffd, 7], 0xffff_ffeb);
    check32("mul.hi.s32 d, a, b;", &[0x8000_0000, 0x8000_0000], 0x4000_0000);
    check32("mul.hi.u32 d, a, b;", &[0xffff_ffff, 0xffff_ffff], 0xffff_fffe);
    check32("mad.lo.s32 d, a, b, c;", &[6, 7, 0xffff_ffff], 41);
    check32("mad.hi.u32 d, a, b, c;", &[0x8000_0000, 4, 3], 5);
    check("mul.wide.s32 d, a, b;", "b64", &[("b32", 0xffff_ffff), ("b32", 5)], -5i64 as u64);
    check("mul.wide.u32 d, a, b;", "b64", &[("b32", 0xffff_ffff), ("b32", 5)], 0x4_ffff_fffb);
    check("mul.wide.s16 d, a, b;", "b32", &[("b16", 0xffff), ("b16", 5)], 0xffff_fffb);
    let wide = [("b32", 0xffff_fffe), ("b32", 3), ("b64", 10)];
    check("mad.wide.s32 d, a, b, c;", "b64", &wide, 4);
    check64("add.s64 d, a, b;", &[u64::MAX, 2], 1);
    check64("mul.lo.s64 d, a, b;", &[1 << 40, 1 << 24 | 3], 3 << 40);
    check64("mul.hi.u64 d, a, b;", &[u64::MAX, u64::MAX], u64::MAX - 1);
    check64("mul.hi.s64 d, a, b;", &[u64::MAX, 5], u64::MAX);
    check("add.s16 d, a, b;", "b16", &[("b16", 0xffff), ("b16", 3)], 2);
    check("mul.lo.s16 d, a, b;", "b16", &[("b16", 300), ("b16", 300)], 90_000 & 0xffff);
}

#[test]
fn carries() {
    let all = u64::from(u32::MAX);
    let chain = |first: &str, second: &str| format!(".reg .b32 low; {first} low, a, b; {second} d, c, e;");
    let operands = [("b32", all), ("b32", 1), ("b32", 5), ("b32", 6)];
    check(&chain("add.cc.u32", "addc.u32"), "b32", &operands, 12);
    check(&chain("add.u32", "add.u32"), "b32", &operands, 11);
    let operands = [("b32", 0), ("b32", 1), ("b32", 5), ("b32", 6)];
    check(&chain("sub.cc.u32", "subc.u32"), "b32", &operands, -2i32 as u32 as u64);
    let operands = [("b32", all), ("b32", all), ("b32", all)];
    check(".reg .b32 low; mad.lo.cc.u32 low, a, b, c; madc.hi.u32 d, a, b, 0;", "b32", &operands, all - 1 + 1);
    let alone = evaluate("addc.u32 d, a, b;", "b32", &operands[..2]).unwrap_err();
    assert_eq!(alone.fault(), Some(&Fault::UnwrittenRegister("CC.CF".to_owned())));
}

#[test]
fn quotients_of_integers() {
    check32("div.s32 d, a, b;", &[-7i32 as u32, 2], -3i32 as u32);
    check32("rem.s32 d, a, b;", &[-7i32 as u32, 2], -1i32 as u32);
    check32("div.u32 d, a, b;", &[-7i32 as u32, 2], 0x7fff_fffc);
    check64("rem.u64 d, a, b;", &[1 << 50, 1000], (1 << 50) % 1000);
    let fault = evaluate("div.s32 d, a, b;", "b32", &[("b32", 1), ("b32", 0)]).unwrap_err();
    assert_eq!(fault.fault(), Some(&Fault::DivisionByZero));
}

#[test]
fn extremes_and_signs_of_integers() {
    check32("min.s32 d, a, b;", &[0xffff_ffff, 1], 0xffff_ffff);
    check32("min.u32 d, a, b;", &[0xffff_ffff, 1], 1);
    check32("max.s32 d, a, b;", &[0xffff_ffff, 1], 1);
    check64("max.u64 d, a, b;", &[u64::MAX, 1], u64::MAX);
    check32("abs.s32 d, a;", &[-5i32 as u32], 5);
    check32("neg.s32 d, a;", &[5], -5i32 as u32);
    check32("not.b32 d, a;", &[0xffff_0000], 0xffff);
    check32("cnot.b32 d, a;", &[0], 1);
    check32("sad.s32 d, a, b, c;", &[-5i32 as u32, 3, 100], 108);
    check32("sad.u32 d, a, b, c;", &[3, 10, 1], 8);
}

#[test]
fn shifts() {
    check32("shl.b32 d, a, b;", &[1, 31], 0x8000_0000);
    check32("shl.b32 d, a, b;", &[1, 32], 0);
    check32("shr.u32 d, a, b;", &[0x8000_0000, 31], 1);
    check32("shr.u32 d, a, b;", &[0x8000_0000, 40], 0);
    check32("shr.s32 d, a, b;", &[0x8000_0000, 40], 0xffff_ffff);
    check("shr.s64 d, a, b;", "b64", &[("b64", 1 << 63), ("b32", 63)], u64::MAX);
    check("shl.b64 d, a, b;", "b64", &[("b64", 3), ("b32", 63)], 1 << 63);
    check("shr.s16 d, a, b;", "b16", &[("b16", 0x8000), ("b32", 4)], 0xf800);
    check32("shf.l.wrap.b32 d, a, b, c;", &[0x8000_0001, 0x1234_5678, 36], 0x2345_6788);
    check32("shf.r.wrap.b32 d, a, b, c;", &[0x1234_5678, 0x9abc_def0, 4], 0x0123_4567);
    check32("shf.l.clamp.b32 d, a, b, c;", &[7, 9, 40], 7);
    check32("shf.r.clamp.b32 d, a, b, c;", &[7, 9, 40], 9);
}

#[test]
fn bits() {
    check32("popc.b32 d, a;", &[0xf0f0_0001], 9);
    check32("clz.b32 d, a;", &[0x0000_8000], 16);
    check32("clz.b32 d, a;", &[0], 32);
    check("clz.b64 d, a;", "b32", &[("b64", 1)], 63);
    check("popc.b64 d, a;", "b32", &[("b64", u64::MAX)], 64);
    check32("brev.b32 d, a;", &[0x0000_0003], 0xc000_0000);
    check32("bfind.u32 d, a;", &[0x0000_8000], 15);
    check32("bfind.u32 d, a;", &[0], 0xffff_ffff);
    check32("bfind.s32 d, a;", &[0xffff_fff0], 3);
    check32("bfind.shiftamt.u32 d, a;", &[0x0000_8000], 16);
    check32("bfe.u32 d, a, 4, 8;", &[0x0000_abc0], 0xbc);
    check32("bfe.s32 d, a, 4, 8;", &[0x0000_abc0], 0xffff_ffbc);
    check32("bfe.s32 d, a, 28, 8;", &[0x8000_0000], 0xffff_fff8);
    check32("bfe.s32 d, a, 3, 0;", &[0xffff_ffff], 0);
    check32("bfi.b32 d, a, b, 8, 4;", &[0xff, 0], 0xf00);
    check32("bfi.b32 d, a, b, 28, 8;", &[0, 0xffff_ffff], 0x0fff_ffff);
    check32("and.b32 d, a, b;", &[0xff00, 0x0ff0], 0x0f00);
    check32("or.b32 d, a, b;", &[0xff00, 0x0ff0], 0xfff0);
    check32("xor.b32 d, a, b;", &[0xff00, 0x0ff0], 0xf0f0);
    check32("prmt.b32 d, a, b, 0x5410;", &[0x3322_1100, 0x7766_5544], 0x5544_1100);
    check32("prmt.b32 d, a, b, 0x98;", &[0x0000_8000, 0], 0x0000_ff00);
}

#[test]
fn logic_of_three_is_a_table() {
    let [a, b, c] = [0xf0, 0xcc, 0xaa];
    // The table of an expression is the expression of these three.
    let tables = [(a & b | c, "a & b | c"), (a ^ b ^ c, "a ^ b ^ c"), (!a & 0xff | b & c, "!a | b & c")];
    let [x, y, z] = [0x1234_5678u32, 0x9abc_def0, 0x0f1e_2d3c];
    let values = [x & y | z, x ^ y ^ z, !x | y & z];
    for ((table, name), value) in tables.into_iter().zip(values) {
        println!("{name}");
        check32(&format!("lop3.b32 d, a, b, c, {table:#x};"), &[x, y, z], value);
    }
}

#[test]
fn dot_products_of_bytes() {
    let (a, b) = (i32::from_le_bytes([1, -2i8 as u8, 3, -128i8 as u8]), i32::from_le_bytes([5, 6, -7i8 as u8, 127]));
    let sum = 5 - 12 - 21 - 128 * 127;
    check32("dp4a.s32.s32 d, a, b, c;", &[a as u32, b as u32, 100], (100 + sum) as u32);
    check32("dp4a.u32.u32 d, a, b, c;", &[0xff01_0203, 0x0204_0608, 1], 510 + 4 + 12 + 24 + 1);
    check32("dp4a.u32.s32 d, a, b, c;", &[0xff, 0xff, 0], -255i32 as u32);
    check32("dp2a.lo.s32.s32 d, a, b, c;", &[0xffff_0003, 0x0000_0205, 1], 3 * 5 - 2 + 1);
    check32("dp2a.hi.s32.s32 d, a, b, c;", &[0xffff_0003, 0x0205_0000, 1], 3 * 5 - 2 + 1);
    check32("vabsdiff4.u32.u32.u32 d, a, b, c;", &[0x0102_03ff, 0x0301_0300, 0], 0x0201_00ff);
}

// ---- Floating point

#[test]
fn f32_arithmetic() {
    check_f32("add.f32 d, a, b;", &[1e8, 1.0], 1e8);
    check_f32("sub.rn.f32 d, a, b;", &[1.5, 0.25], 1.25);
    check_f32("mul.f32 d, a, b;", &[0.1, 3.0], 0.1 * 3.0);
    check_f32("div.rn.f32 d, a, b;", &[1.0, 3.0], 1.0 / 3.0);
    check_f32("div.full.f32 d, a, b;", &[1.0, 3.0], 1.0 / 3.0);
    check_f32("div.approx.f32 d, a, b;", &[1.0, 2f32.powi(127)], 0.0);
    check_f32("fma.rn.f32 d, a, b, c;", &[1.0 + f32::EPSILON, 1.0 - f32::EPSILON, -1.0], -f32::EPSILON * f32::EPSILON);
    check_f32("mad.rn.f32 d, a, b, c;", &[3.0, 4.0, 5.0], 17.0);
    check_f32("add.f32 d, a, 0f3F800000;", &[2.0], 3.0);
    check_f32("add.sat.f32 d, a, b;", &[0.75, 0.75], 1.0);
    check_f32("add.sat.f32 d, a, b;", &[-0.75, 0.5], 0.0);
    check_f32("neg.f32 d, a;", &[0.0], -0.0);
    check_f32("abs.f32 d, a;", &[-2.5], 2.5);
    check_f32("copysign.f32 d, a, b;", &[-1.0, 3.0], -3.0);
    check_f32("sqrt.rn.f32 d, a;", &[2.0], 2f32.sqrt());
    check_f32("rcp.rn.f32 d, a;", &[3.0], 1.0 / 3.0);
    check32("add.f32 d, a, b;", &[f32::INFINITY.to_bits(), f32::NEG_INFINITY.to_bits()], 0x7fff_ffff);
}

#[test]
fn f32_rounds_in_every_direction() {
    let next = 1.0 + f32::EPSILON;
    let tiny = f32::EPSILON / 4.0;
    for (mode, up, down) in [("rn", 1.0, -1.0), ("rz", 1.0, -1.0), ("rm", 1.0, -next), ("rp", next, -1.0)] {
        check_f32(&format!("add.{mode}.f32 d, a, b;"), &[1.0, tiny], up);
        check_f32(&format!("add.{mode}.f32 d, a, b;"), &[-1.0, -tiny], down);
        check_f32(&format!("fma.{mode}.f32 d, a, b, c;"), &[tiny, 1.0, 1.0], up);
    }
    check_f32("mul.rz.f32 d, a, b;", &[f32::MAX, 2.0], f32::MAX);
    check_f32("mul.rp.f32 d, a, b;", &[f32::MAX, 2.0], f32::INFINITY);
    check_f32("add.rz.f32 d, a, b;", &[1.0, -tiny], 1.0 - f32::EPSILON / 2.0);
    // Smaller than anything that f64 keeps beside one.
    check_f32("add.rp.f32 d, a, b;", &[1.0, f32::from_bits(1)], next);
    check_f32("add.rm.f32 d, a, b;", &[1.0, -f32::from_bits(1)], 1.0 - f32::EPSILON / 2.0);
}

#[test]
fn subnormals_are_flushed_where_asked() {
    let small = f32::MIN_POSITIVE;
    check_f32("mul.f32 d, a, b;", &[small, 0.5], small / 2.0);
    check_f32("mul.ftz.f32 d, a, b;", &[small, 0.5], 0.0);
    check_f32("mul.ftz.f32 d, a, b;", &[-small, 0.5], -0.0);
    check_f32("add.ftz.f32 d, a, b;", &[small / 2.0, small / 2.0], 0.0);
    check_f32("add.f32 d, a, b;", &[small / 2.0, small / 2.0], small);
    check_f32("ex2.approx.f32 d, a;", &[-127.0], small / 2.0);
    check_f32("ex2.approx.ftz.f32 d, a;", &[-127.0], 0.0);
}

#[test]
fn extremes_of_floats() {
    let nan = f32::NAN;
    check_f32("min.f32 d, a, b;", &[nan, 2.0], 2.0);
    check_f32("max.f32 d, a, b;", &[2.0, nan], 2.0);
    check_f32("min.f32 d, a, b;", &[0.0, -0.0], -0.0);
    check_f32("max.f32 d, a, b;", &[-0.0, 0.0], 0.0);
    check32("max.NaN.f32 d, a, b;", &[2f32.to_bits(), nan.to_bits()], 0x7fff_ffff);
    check32("max.f32 d, a, b;", &[0xffc0_0000, 0x7fc0_0001], 0x7fff_ffff);
}

#[test]
fn functions_are_those_of_f64_rounded() {
    for x in [0.3f32, 1.0, 2.5, 77.0] {
        let y = f64::from(x);
        check_f32("ex2.approx.ftz.f32 d, a;", &[x], y.exp2() as f32);
        check_f32("lg2.approx.f32 d, a;", &[x], y.log2() as f32);
        check_f32("rsqrt.approx.f32 d, a;", &[x], (1.0 / y.sqrt()) as f32);
        check_f32("rcp.approx.ftz.f32 d, a;", &[x], (1.0 / y) as f32);
        check_f32("sqrt.approx.f32 d, a;", &[x], y.sqrt() as f32);
        check_f32("sin.approx.f32 d, a;", &[x], y.sin() as f32);
        check_f32("cos.approx.f32 d, a;", &[x], y.cos() as f32);
        check_f32("tanh.approx.f32 d, a;", &[x], y.tanh() as f32);
    }
    check_f32("lg2.approx.f32 d, a;", &[0.0], f32::NEG_INFINITY);
    check_f32("ex2.approx.f32 d, a;", &[f32::NEG_INFINITY], 0.0);
    check_f32("rcp.approx.f32 d, a;", &[-0.0], f32::NEG_INFINITY);
}

#[test]
fn f64_arithmetic() {
    let of = |x: f64| x.to_bits();
    check64("add.f64 d, a, b;", &[of(0.1), of(0.2)], of(0.1 + 0.2));
    check64("fma.rn.f64 d, a, b, c;", &[of(0.1), of(0.2), of(0.3)], of(0.1f64.mul_add(0.2, 0.3)));
    check64("div.rn.f64 d, a, b;", &[of(1.0), of(3.0)], of(1.0 / 3.0));
    check64("mul.f64 d, a, 0d4008000000000000;", &[of(1.5)], of(4.5));
    check64("rcp.approx.ftz.f64 d, a;", &[of(4.0)], of(0.25));
}

/// Sums, products and fused products of halves have one rounding, that of the exact result.
#[test]
fn halves_round_once() {
    let of = |x: f32| u64::from(f16::from_f32(x).to_bits());
    check("add.f16 d, a, b;", "b16", &[("b16", of(2048.0)), ("b16", of(1.0))], of(2048.0));
    check("add.f16 d, a, b;", "b16", &[("b16", of(2048.0)), ("b16", of(3.0))], of(2052.0));
    check("mul.f16 d, a, b;", "b16", &[("b16", of(65504.0)), ("b16", of(2.0))], 0x7c00);
    check("sub.rn.f16 d, a, b;", "b16", &[("b16", of(1.0)), ("b16", of(0.25))], of(0.75));
    // 2^-24 lies below half a unit of 2049 / 2 beside the product: only an exact sum sees it.
    let operands = [("b16", of(1.0 + 1.0 / 1024.0)), ("b16", of(1.0 + 1.0 / 1024.0)), ("b16", 0x8001)];
    let exact = (1.0 + 1.0 / 1024.0f64).powi(2) - 2f64.powi(-24);
    check("fma.rn.f16 d, a, b, c;", "b16", &operands, u64::from(f16::from_f64(exact).to_bits()));
    let pair = |low: f32, high: f32| of(low) | of(high) << 16;
    let operands = [("b32", pair(1.0, 2.0)), ("b32", pair(0.5, -4.0)), ("b32", pair(3.0, 1.0))];
    check("add.f16x2 d, a, b;", "b32", &operands[..2], pair(1.5, -2.0));
    check("mul.f16x2 d, a, b;", "b32", &operands[..2], pair(0.5, -8.0));
    check("fma.rn.f16x2 d, a, b, c;", "b32", &operands, pair(3.5, -7.0));
    check("fma.rn.relu.f16x2 d, a, b, c;", "b32", &operands, pair(3.5, 0.0));
    check("max.f16x2 d, a, b;", "b32", &operands[..2], pair(1.0, 2.0));
    check("neg.f16x2 d, a;", "b32", &operands[..1], pair(-1.0, -2.0));
    let of = |x: f32| u64::from(bf16::from_f32(x).to_bits());
    let operands = [("b16", of(1.5)), ("b16", of(-2.0)), ("b16", of(0.25))];
    check("fma.rn.bf16 d, a, b, c;", "b16", &operands, of(-2.75));
    check("max.bf16 d, a, b;", "b16", &operands[..2], of(1.5));
}

/// Every f16, every bf16, and random sums, against another way to the same numbers.
#[test]
fn rounding_to_halves_agrees_with_the_half_crate() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let text = format!(
        "{HEAD}.visible .entry k(.param .u64 to, .param .u64 from)\n{{\n.reg .b64 %rd<5>;\n.reg .b32 %r<3>;\n\
         .reg .b16 %h<5>;\n.reg .f32 %f<3>;\nmov.u32 %r0, %tid.x;\nmov.u32 %r1, %ctaid.x;\nmad.lo.s32 %r2, %r1, 256, %r0;\n\
         ld.param.u64 %rd0, [to];\nld.param.u64 %rd1, [from];\nmul.wide.u32 %rd2, %r2, 4;\nadd.s64 %rd3, %rd1, %rd2;\n\
         add.s64 %rd4, %rd0, %rd2;\nld.global.f32 %f0, [%rd3];\ncvt.rn.f16.f32 %h0, %f0;\ncvt.rn.bf16.f32 %h1, %f0;\n\
         st.global.v2.b16 [%rd4], {{%h0, %h1}};\nret;\n}}\n"
    );
    let module = Module::parse(&text).unwrap();
    let mut numbers: Vec<f32> = (0..=u16::MAX).map(|bits| f16::from_bits(bits).to_f32()).collect();
    numbers.extend((0..=u16::MAX).map(|bits| bf16::from_bits(bits).to_f32()));
    numbers.extend((0..1 << 17).map(|_| f32::from_bits(rng.random())));
    numbers.extend((0..1 << 16).map(|_| rng.random_range(-1e-4f32..1e-4)));
    let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut memory = Memory::new();
    let (to, from) = (memory.add_unwritten(bytes.len()), memory.add(&bytes));
    let blocks = [numbers.len() as u32 / 256, 1, 1];
    module.launch(&mut memory, "k", blocks, [256, 1, 1], 0, &[Arg::U64(to), Arg::U64(from)]).unwrap();
    assert_eq!(memory.first_unwritten(to), None);
    for (x, word) in numbers.iter().zip(memory.words(to)) {
        let (half, brain) = (f16::from_bits(word as u16), bf16::from_bits((word >> 16) as u16));
        if x.is_nan() {
            assert!(half.is_nan() && brain.is_nan());
        } else {
            assert_eq!((half, brain), (f16::from_f32(*x), bf16::from_f32(*x)), "{x:e}");
        }
    }
}

// ---- Comparison and conversion

#[test]
fn comparisons() {
    let below = |name: &str, a: f32, b: f32, expected: bool| {
        let operands = [("b32", a.to_bits().into()), ("b32", b.to_bits().into())];
        check(&format!("setp.{name}.f32 d, a, b;"), "pred", &operands, expected.into());
    };
    for (name, less, equal, nan) in [
        ("eq", false, true, false),
        ("ne", true, false, false),
        ("lt", true, false, false),
        ("le", true, true, false),
        ("gt", false, false, false),
        ("ge", false, true, false),
        ("equ", false, true, true),
        ("neu", true, false, true),
        ("ltu", true, false, true),
        ("leu", true, true, true),
        ("gtu", false, false, true),
        ("geu", false, true, true),
        ("num", true, true, false),
        ("nan", false, false, true),
    ] {
        below(name, 1.0, 2.0, less);
        below(name, 2.0, 2.0, equal);
        below(name, f32::NAN, 2.0, nan);
    }
    let operands = [("b32", 0xffff_ffff), ("b32", 1)];
    check("setp.lt.s32 d, a, b;", "pred", &operands, 1);
    check("setp.lt.u32 d, a, b;", "pred", &operands, 0);
    check("setp.hi.u32 d, a, b;", "pred", &operands, 1);
    check("setp.gt.s64 d, a, -1;", "pred", &[("b64", 0)], 1);
    check("setp.eq.s16 d, a, b;", "pred", &[("b16", 7), ("b16", 7)], 1);
    let operands = [("b32", 1), ("b32", 2), ("pred", 0)];
    check("setp.lt.and.s32 d, a, b, c;", "pred", &operands, 0);
    check("setp.lt.and.s32 d, a, b, !c;", "pred", &operands, 1);
    check("setp.gt.or.s32 d, a, b, !c;", "pred", &operands, 1);
    check(".reg .pred q; setp.lt.s32 q|d, a, b;", "pred", &operands[..2], 0);
    check("and.pred d, a, b;", "pred", &[("pred", 1), ("pred", 1)], 1);
    check("xor.pred d, a, b;", "pred", &[("pred", 1), ("pred", 1)], 0);
    check("not.pred d, a;", "pred", &[("pred", 1)], 0);
    check("set.lt.u32.f32 d, a, b;", "b32", &[("b32", 0x3f80_0000), ("b32", 0x4000_0000)], 0xffff_ffff);
    check("set.gt.f16x2.f16x2 d, a, b;", "b32", &[("b32", 0x4000_3c00), ("b32", 0x3c00_3c00)], 0x3c00_0000);
    check("selp.b32 d, a, b, c;", "b32", &[("b32", 5), ("b32", 6), ("pred", 0)], 6);
    check("slct.f32.s32 d, a, b, c;", "b32", &[("b32", 5), ("b32", 6), ("b32", 0xffff_ffff)], 6);
    check("testp.finite.f32 d, a;", "pred", &[("b32", 0x7f80_0000)], 0);
    check("testp.subnormal.f32 d, a;", "pred", &[("b32", 1)], 1);
}

#[test]
fn conversions() {
    let f = |x: f32| u64::from(x.to_bits());
    let to_s32 = |mode: &str, x: f32, y: i32| {
        check(&format!("cvt.{mode}.s32.f32 d, a;"), "b32", &[("b32", f(x))], u64::from(y as u32));
    };
    for (mode, half, minus) in [("rni", 2, -2), ("rzi", 2, -2), ("rmi", 2, -3), ("rpi", 3, -2)] {
        to_s32(mode, 2.5, half);
        to_s32(mode, -2.5, minus);
    }
    to_s32("rni", 3.5, 4);
    to_s32("rzi", 1e20, i32::MAX);
    to_s32("rzi", f32::NEG_INFINITY, i32::MIN);
    to_s32("rzi", f32::NAN, 0);
    check("cvt.rzi.u32.f32 d, a;", "b32", &[("b32", f(-3.0))], 0);
    check("cvt.rzi.s64.f32 d, a;", "b64", &[("b32", f(f32::NAN))], 1 << 63);
    check("cvt.rni.f32.f32 d, a;", "b32", &[("b32", f(-0.4))], f(-0.0));
    check("cvt.sat.f32.f32 d, a;", "b32", &[("b32", f(7.0))], f(1.0));
    check("cvt.rn.f32.s32 d, a;", "b32", &[("b32", 16_777_217)], f(16_777_216.0));
    check("cvt.rp.f32.s32 d, a;", "b32", &[("b32", 16_777_217)], f(16_777_218.0));
    check("cvt.rn.f32.u64 d, a;", "b32", &[("b64", u64::MAX)], f(18_446_744_073_709_551_616.0));
    check("cvt.rn.f64.s64 d, a;", "b64", &[("b64", -3i64 as u64)], (-3f64).to_bits());
    check("cvt.f64.f32 d, a;", "b64", &[("b32", f(0.1))], f64::from(0.1f32).to_bits());
    check("cvt.rn.f32.f64 d, a;", "b32", &[("b64", 0.1f64.to_bits())], f(0.1));
    check("cvt.rz.f32.f64 d, a;", "b32", &[("b64", 0.1f64.to_bits())], f(0.1f32.next_down()));
    check("cvt.f32.f16 d, a;", "b32", &[("b16", 0x0001)], f(2f32.powi(-24)));
    check("cvt.rz.f16.f32 d, a;", "b16", &[("b32", f(65519.9))], 0x7bff);
    check("cvt.rn.f16.f32 d, a;", "b16", &[("b32", f(65520.0))], 0x7c00);
    check("cvt.rn.f16x2.f32 d, a, b;", "b32", &[("b32", f(1.0)), ("b32", f(2.0))], 0x3c00_4000);
    check("cvt.rn.bf16x2.f32 d, a, b;", "b32", &[("b32", f(1.0)), ("b32", f(2.0))], 0x3f80_4000);
    check("cvt.rn.relu.f16x2.f32 d, a, b;", "b32", &[("b32", f(-1.0)), ("b32", f(2.0))], 0x4000);
    check("cvt.rni.s32.f16 d, a;", "b32", &[("b16", 0xc500)], -5i32 as u32 as u64);
    check("cvt.s64.s32 d, a;", "b64", &[("b32", 0xffff_ffff)], u64::MAX);
    check("cvt.u64.u32 d, a;", "b64", &[("b32", 0xffff_ffff)], 0xffff_ffff);
    check("cvt.u32.u64 d, a;", "b32", &[("b64", 0x1_0000_0007)], 7);
    check("cvt.s32.s8 d, a;", "b32", &[("b32", 0x80)], 0xffff_ff80);
    check("cvt.u32.u8 d, a;", "b32", &[("b32", 0x1ff)], 0xff);
    check("cvt.sat.s8.s32 d, a;", "b32", &[("b32", -300i32 as u32 as u64)], 0xffff_ff80);
    check("cvt.sat.u8.s32 d, a;", "b32", &[("b32", -300i32 as u32 as u64)], 0);
}

#[test]
fn moves_pack_and_unpack() {
    check("mov.b64 d, {a, b};", "b64", &[("b32", 1), ("b32", 2)], 0x2_0000_0001);
    check("mov.b32 d, {a, b};", "b32", &[("b16", 0x1111), ("b16", 0x2222)], 0x2222_1111);
    check("mov.b32 d, {0, a};", "b32", &[("b16", 0x3f80)], 0x3f80_0000);
    check(".reg .b32 low; mov.b64 {low, d}, a;", "b32", &[("b64", 0x5_0000_0001)], 5);
    check("mov.b64 {d, _}, a;", "b32", &[("b64", 0x5_0000_0001)], 1);
    check("mov.b32 d, a;", "f32", &[("b32", 0x3f80_0000)], 0x3f80_0000);
    check("mov.u32 d, WARP_SZ;", "b32", &[], 32);
    check("mov.b16 d, 0x3f80U;", "b16", &[], 0x3f80);
}

// ---- Whole kernels

/// Runs a kernel of one block over words; its parameters are `out` and `in`, its registers declared.
fn run(body: &str, threads: u32, input: &[u32], words: usize) -> Result<Vec<u32>, Error> {
    run_with(body, threads, 0, input, words)
}

fn run_with(body: &str, threads: u32, dynamic: usize, input: &[u32], words: usize) -> Result<Vec<u32>, Error> {
    let text = format!(
        "{HEAD}.extern .shared .align 16 .b8 dynamic[];\n.const .align 4 .u32 table[4] = {{10, 20, 30, 40}};\n\
         .global .align 4 .u32 counter = 5;\n\
         .func declared();\n.func (.param .b32 twice) triple(.param .b32 x)\n{{\n.reg .b32 %a<3>;\nld.param.u32 %a1, [x];\n\
         mul.lo.s32 %a2, %a1, 3;\nst.param.b32 [twice+0], %a2;\nret;\n}}\n\
         .visible .entry k(.param .u64 out, .param .u64 in)\n.maxntid 256, 1, 1\n{{\n.reg .pred %p<9>;\n\
         .reg .b16 %h<9>;\n.reg .b32 %r<40>;\n.reg .f32 %f<9>;\n.reg .b64 %rd<9>;\n.shared .align 16 .b8 tile[512];\n\
         ld.param.u64 %rd1, [out];\nld.param.u64 %rd2, [in];\nmov.u32 %r1, %tid.x;\nmul.wide.u32 %rd3, %r1, 4;\n\
         add.s64 %rd4, %rd1, %rd3;\nadd.s64 %rd5, %rd2, %rd3;\nshl.b32 %r2, %r1, 2;\n{body}\n}}\n"
    );
    let module = Module::parse(&text)?.limit(10_000);
    let mut memory = Memory::new();
    let bytes: Vec<u8> = input.iter().flat_map(|word| word.to_le_bytes()).collect();
    let (out, input) = (memory.add(&vec![0; 4 * words]), memory.add(&bytes));
    module.launch(&mut memory, "k", [1, 1, 1], [threads, 1, 1], dynamic, &[Arg::U64(out), Arg::U64(input)])?;
    Ok(memory.words(out))
}

#[track_caller]
fn fault_of(body: &str, threads: u32) -> Fault {
    let error = run(body, threads, &[1; 64], 64).expect_err("a fault");
    println!("{error}");
    error.fault().cloned().unwrap_or_else(|| panic!("{error}"))
}

#[test]
fn branches_calls_tables_and_constants() {
    let loop_ = "mov.u32 %r3, 0;\nmov.u32 %r4, 0;\n$L1:\nadd.u32 %r4, %r4, %r3;\nadd.u32 %r3, %r3, 1;\n\
                 setp.le.u32 %p1, %r3, %r1;\n@%p1 bra $L1;\nst.global.u32 [%rd4], %r4;\nret;";
    assert_eq!(run(loop_, 5, &[], 5).unwrap(), [0, 1, 3, 6, 10]);
    let call = "{\n.param .b32 p;\nst.param.b32 [p+0], %r1;\n.param .b32 r;\ncall.uni (r), triple, (p);\n\
                ld.param.b32 %r3, [r+0];\n}\nst.global.u32 [%rd4], %r3;\nret;";
    assert_eq!(run(call, 3, &[], 3).unwrap(), [0, 3, 6]);
    let table = "ld.const.u32 %r3, [table+4];\nmov.u64 %rd6, table;\nadd.s64 %rd6, %rd6, %rd3;\nld.const.u32 %r4, [%rd6];\n\
                 add.u32 %r3, %r3, %r4;\nst.global.u32 [%rd4], %r3;\nret;";
    assert_eq!(run(table, 4, &[], 4).unwrap(), [30, 40, 50, 60]);
    let indexed = "$T: .branchtargets $A, $B;\nbrx.idx %r1, $T;\n$A:\nmov.u32 %r3, 7;\nbra.uni $E;\n$B:\nmov.u32 %r3, 8;\n\
                   $E:\nst.global.u32 [%rd4], %r3;\nret;";
    assert_eq!(run(indexed, 2, &[], 2).unwrap(), [7, 8]);
    assert_eq!(fault_of(indexed, 3), Fault::BranchIndex { index: 2, targets: 2 });
}

#[test]
fn module_variables_last_between_launches() {
    let text = format!(
        "{HEAD}.global .align 4 .u32 counter = 5;\n.visible .entry k(.param .u64 out)\n{{\n.reg .b32 %r<3>;\n\
         .reg .b64 %rd<3>;\nld.param.u64 %rd1, [out];\natom.global.add.u32 %r1, [counter], 2;\n\
         st.global.u32 [%rd1], %r1;\nexit;\n}}\n"
    );
    let (module, mut memory) = (Module::parse(&text).unwrap(), Memory::new());
    let out = memory.add(&[0; 4]);
    for expected in [5, 7, 9] {
        module.launch(&mut memory, "k", [1, 1, 1], [1, 1, 1], 0, &[Arg::U64(out)]).unwrap();
        assert_eq!(memory.words(out), [expected]);
    }
}

#[test]
fn vectors_of_narrow_numbers() {
    let body = "ld.global.v4.u8 {%h0, %h1, %h2, %h3}, [%rd2];\nadd.s16 %h0, %h0, %h3;\ncvt.u32.u16 %r3, %h0;\n\
                ld.global.s8 %r4, [%rd2+3];\nld.global.s16 %r5, [%rd2+2];\nst.global.v2.u32 [%rd1], {%r3, %r4};\n\
                st.global.u32 [%rd1+8], %r5;\nst.global.u8 [%rd1+12], %r4;\nret;";
    assert_eq!(run(body, 1, &[0x8034_0012], 4).unwrap(), [0x92, 0xffff_ff80, 0xffff_8034, 0x80]);
}

#[test]
fn shared_and_local_memory_and_generic_addresses() {
    let reverse = "mov.u32 %r3, tile;\nadd.u32 %r4, %r3, %r2;\nst.shared.u32 [%r4], %r1;\nbar.sync 0;\n\
                   sub.u32 %r5, %r3, %r2;\nld.shared.u32 %r6, [%r5+28];\nst.global.u32 [%rd4], %r6;\nret;";
    assert_eq!(run(reverse, 8, &[], 8).unwrap(), [7, 6, 5, 4, 3, 2, 1, 0]);
    let generic = "mov.u64 %rd6, tile;\ncvta.shared.u64 %rd7, %rd6;\nadd.s64 %rd7, %rd7, %rd3;\nst.u32 [%rd7], %r1;\n\
                   isspacep.shared %p1, %rd7;\nselp.u32 %r3, 100, 0, %p1;\ncvta.to.shared.u64 %rd8, %rd7;\n\
                   ld.shared.u32 %r4, [%rd8];\nadd.u32 %r3, %r3, %r4;\nst.global.u32 [%rd4], %r3;\nret;";
    assert_eq!(run(generic, 2, &[], 2).unwrap(), [100, 101]);
    let dynamic = "mov.u32 %r3, dynamic;\nadd.u32 %r4, %r3, %r2;\nst.shared.u32 [%r4], %r1;\nld.shared.u32 %r5, [%r4];\n\
                   mov.u32 %r6, %dynamic_smem_size;\nadd.u32 %r5, %r5, %r6;\nst.global.u32 [%rd4], %r5;\nret;";
    assert_eq!(run_with(dynamic, 2, 8, &[], 2).unwrap(), [8, 9]);
    let local = ".local .align 8 .b8 depot[16];\nmov.u64 %rd6, depot;\nst.local.v2.u32 [%rd6+8], {%r1, %r2};\n\
                 cvta.local.u64 %rd7, %rd6;\nld.u32 %r3, [%rd7+12];\nst.global.u32 [%rd4], %r3;\nret;";
    assert_eq!(run(local, 2, &[], 2).unwrap(), [0, 4]);
}

#[test]
fn atomics() {
    let body = |op: &str| format!("atom.global.{op};\nst.global.u32 [%rd4+4], %r3;\nret;");
    let one = |op: &str| run(&body(op), 4, &[], 5).unwrap();
    assert_eq!(one("add.u32 %r3, [%rd1], 3"), [12, 0, 3, 6, 9]);
    assert_eq!(one("inc.u32 %r3, [%rd1], 2"), [1, 0, 1, 2, 0]);
    assert_eq!(one("exch.b32 %r3, [%rd1], %r1"), [3, 0, 0, 1, 2]);
    assert_eq!(one("cas.b32 %r3, [%rd1], 0, 9"), [9, 0, 9, 9, 9]);
    assert_eq!(one("max.s32 %r3, [%rd1], %r1"), [3, 0, 0, 1, 2]);
    let float = "red.global.add.f32 [%rd1], 0f3F000000;\nret;";
    assert_eq!(run(float, 4, &[], 1).unwrap(), [2f32.to_bits()]);
    let subnormal = "red.global.add.f32 [%rd1], 0f00000001;\nret;";
    assert_eq!(run(subnormal, 4, &[], 1).unwrap(), [0]);
    let pair = "mov.u32 %r3, 0x40003C00;\natom.global.add.noftz.f16x2 %r4, [%rd1], %r3;\nret;";
    assert_eq!(run(pair, 2, &[], 1).unwrap(), [0x4400_4000]);
    let shared = "mov.u32 %r3, tile;\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 st.shared.u32 [%r3], 1;\nbar.sync 0;\n\
                  atom.shared.add.u32 %r4, [%r3], %r1;\nbar.sync 0;\nld.shared.u32 %r5, [%r3];\n\
                  st.global.u32 [%rd4], %r5;\nret;";
    assert_eq!(run(shared, 4, &[], 4).unwrap(), [7; 4]);
}

// ---- Warps

#[test]
fn shuffles() {
    let shuffle = |mode: &str, by: &str, c: u32| {
        let body = format!(
            "shfl.sync.{mode}.b32 %r3|%p1, %r1, {by}, {c}, 0xffffffff;\nselp.u32 %r4, 100, 0, %p1;\n\
             add.u32 %r3, %r3, %r4;\nst.global.u32 [%rd4], %r3;\nret;"
        );
        run(&body, 32, &[], 32).unwrap()
    };
    let expect = |f: &dyn Fn(u32) -> u32| (0..32).map(f).collect::<Vec<u32>>();
    assert_eq!(shuffle("bfly", "5", 31), expect(&|lane| 100 + (lane ^ 5)));
    assert_eq!(shuffle("up", "3", 0), expect(&|lane| if lane >= 3 { 100 + lane - 3 } else { lane }));
    assert_eq!(shuffle("down", "3", 31), expect(&|lane| if lane < 29 { 103 + lane } else { lane }));
    assert_eq!(shuffle("idx", "9", 31), expect(&|_| 109));
    // In segments of eight lanes: the mask is 24.
    let segments = 24 << 8;
    assert_eq!(shuffle("idx", "2", segments | 31), expect(&|lane| 100 + lane / 8 * 8 + 2));
    assert_eq!(shuffle("up", "1", segments), expect(&|lane| if lane % 8 > 0 { 99 + lane } else { lane }));
    assert_eq!(shuffle("down", "1", segments | 31), expect(&|lane| if lane % 8 < 7 { 101 + lane } else { lane }));
    assert_eq!(shuffle("bfly", "1", segments | 31), expect(&|lane| 100 + (lane ^ 1)));
}

#[test]
fn votes_matches_and_reductions() {
    let head = "setp.gt.u32 %p1, %r1, 27;\nand.b32 %r3, %r1, 3;\n";
    let one = |op: &str| run(&format!("{head}{op}\nst.global.u32 [%rd4], %r4;\nret;"), 32, &[], 32).unwrap();
    assert_eq!(one("vote.sync.ballot.b32 %r4, %p1, 0xffffffff;"), [0xf000_0000; 32]);
    assert_eq!(one("vote.sync.ballot.b32 %r4, !%p1, -1;"), [0x0fff_ffff; 32]);
    assert_eq!(one("vote.sync.any.pred %p2, %p1, -1;\nselp.u32 %r4, 1, 0, %p2;"), [1; 32]);
    assert_eq!(one("vote.sync.all.pred %p2, %p1, -1;\nselp.u32 %r4, 1, 0, %p2;"), [0; 32]);
    assert_eq!(one("redux.sync.add.s32 %r4, %r1, -1;"), [496; 32]);
    assert_eq!(one("redux.sync.max.u32 %r4, %r1, -1;"), [31; 32]);
    assert_eq!(one("match.any.sync.b32 %r4, %r3, -1;")[1], 0x2222_2222);
    assert_eq!(one("match.all.sync.b32 %r4|%p2, %r3, -1;"), [0; 32]);
    assert_eq!(one("bar.red.popc.u32 %r4, 0, %p1;"), [4; 32]);
    assert_eq!(one("bar.red.or.pred %p2, 0, %p1;\nselp.u32 %r4, 1, 0, %p2;"), [1; 32]);
    assert_eq!(one("mov.u32 %r4, 0;\n@%p1 activemask.b32 %r4;")[28..], [0xf000_0000; 4]);
    // Half a warp among itself, while the other half does something else.
    let half = "setp.lt.u32 %p2, %r1, 16;\nmov.u32 %r4, 1;\n@!%p2 bra $E;\n\
                shfl.sync.bfly.b32 %r4, %r1, 1, 31, 0xffff;\n$E:\nbar.warp.sync -1;";
    assert_eq!(one(half)[..2], [1, 0]);
}

fn words_of(elements: &[u64], bits: u32) -> Vec<u32> {
    let per = (32 / bits) as usize;
    let pack = |word: &[u64]| word.iter().rev().fold(0, |all, element| all << bits | element);
    elements.chunks_exact(per).map(|word| pack(word) as u32).collect()
}

/// A fragment as the ISA writes it: element `i` of a lane lies at a row and a column.
type Place = fn(lane: usize, i: usize) -> (usize, usize);

/// Runs `mma` over matrices that are laid out by the ISA's own formulas, and returns D.
fn product(
    opcode: &str,
    k: usize,
    bits: u32,
    (a, a_at): (&dyn Fn(usize, usize) -> u64, Place),
    (b, b_at): (&dyn Fn(usize, usize) -> u64, Place),
    c: &dyn Fn(usize, usize) -> u32,
) -> Vec<u32> {
    let per = (32 / bits) as usize;
    let (of_a, of_b) = (16 * k / 32 / per, 8 * k / 32 / per);
    let mut input = Vec::new();
    for lane in 0..32 {
        let place = |at: Place, matrix: &dyn Fn(usize, usize) -> u64, i| {
            let (row, column) = at(lane, i);
            matrix(row, column)
        };
        let elements_a: Vec<u64> = (0..of_a * per).map(|i| place(a_at, a, i)).collect();
        let elements_b: Vec<u64> = (0..of_b * per).map(|i| place(b_at, b, i)).collect();
        input.extend(words_of(&elements_a, bits));
        input.extend(words_of(&elements_b, bits));
        for i in 0..4 {
            let (row, column) = accumulator(lane, i);
            input.push(c(row, column));
        }
    }
    let each = of_a + of_b + 4;
    let names = |from: usize, count: usize| {
        (from..from + count).map(|at| format!("%r{}", 10 + at)).collect::<Vec<_>>().join(", ")
    };
    let mut body = format!("mul.wide.u32 %rd6, %r1, {};\nadd.s64 %rd6, %rd2, %rd6;\n", 4 * each);
    for at in 0..each {
        body += &format!("ld.global.u32 %r{}, [%rd6+{}];\n", 10 + at, 4 * at);
    }
    let (names_a, names_b, names_c) = (names(0, of_a), names(of_a, of_b), names(of_a + of_b, 4));
    body += &format!("{opcode} {{%r30, %r31, %r32, %r33}}, {{{names_a}}}, {{{names_b}}}, {{{names_c}}};\n");
    body += "mul.wide.u32 %rd7, %r1, 16;\nadd.s64 %rd7, %rd1, %rd7;\n\
             st.global.v4.u32 [%rd7], {%r30, %r31, %r32, %r33};\nret;";
    let lanes = run(&body, 32, &input, 128).unwrap();
    let mut d = vec![0; 128];
    for (at, value) in lanes.into_iter().enumerate() {
        let (row, column) = accumulator(at / 4, at % 4);
        d[row * 8 + column] = value;
    }
    d
}

fn accumulator(lane: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane % 4);
    (if i < 2 { group } else { group + 8 }, thread * 2 + (i & 1))
}

#[test]
fn products_of_halves() {
    let value = |at: usize| (at * 37 % 101) as f32 - 50.0;
    let (a, b, c) =
        (|i: usize, j: usize| value(i * 16 + j), |i: usize, j: usize| value(i * 8 + j + 7), |i, j| (i * 8 + j) as f32);
    let a_at: Place = |lane, i| {
        let (group, thread) = (lane >> 2, lane % 4);
        let row = if i < 2 || (4..6).contains(&i) { group } else { group + 8 };
        (row, thread * 2 + (i & 1) + if i >= 4 { 8 } else { 0 })
    };
    let b_at: Place = |lane, i| ((lane % 4) * 2 + (i & 1) + if i >= 2 { 8 } else { 0 }, lane >> 2);
    for (ty, k) in [("f16", 16), ("bf16", 16), ("f16", 8)] {
        let of = |x: f32| if ty == "f16" { f16::from_f32(x).to_bits() } else { bf16::from_f32(x).to_bits() };
        let opcode = format!("mma.sync.aligned.m16n8k{k}.row.col.f32.{ty}.{ty}.f32");
        let (bits_a, bits_b) = (|i: usize, j: usize| of(a(i, j)).into(), |i: usize, j: usize| of(b(i, j)).into());
        let bits_c = |i: usize, j: usize| f32::to_bits(c(i, j));
        let d = product(&opcode, k, 16, (&bits_a, a_at), (&bits_b, b_at), &bits_c);
        for (at, value) in d.into_iter().enumerate() {
            let (row, column) = (at / 8, at % 8);
            let sum: f32 = (0..k).map(|k| a(row, k) * b(k, column)).sum();
            assert_eq!(f32::from_bits(value), c(row, column) + sum, "{opcode}, {row}, {column}");
        }
    }
}

#[test]
fn products_of_bytes() {
    let value = |at: usize| (at * 91 % 256) as u8;
    let (a, b) = (|i: usize, j: usize| value(i * 32 + j), |i: usize, j: usize| value(i * 8 + j + 3));
    let c = |i: usize, j: usize| (i * 1000 + j) as u32;
    let a_at: Place = |lane, i| {
        let (group, thread) = (lane >> 2, lane % 4);
        let row = if i < 4 || (8..12).contains(&i) { group } else { group + 8 };
        (row, thread * 4 + (i & 3) + if i >= 8 { 16 } else { 0 })
    };
    let b_at: Place = |lane, i| ((lane % 4) * 4 + (i & 3) + if i >= 4 { 16 } else { 0 }, lane >> 2);
    for (types, k) in [(["s8", "s8"], 32), (["u8", "s8"], 32), (["s8", "s8"], 16)] {
        let of = |x: u8, ty: &str| if ty == "s8" { i64::from(x as i8) } else { i64::from(x) };
        let opcode = format!("mma.sync.aligned.m16n8k{k}.row.col.s32.{}.{}.s32", types[0], types[1]);
        let (bits_a, bits_b) = (|i: usize, j: usize| a(i, j).into(), |i: usize, j: usize| b(i, j).into());
        let d = product(&opcode, k, 8, (&bits_a, a_at), (&bits_b, b_at), &c);
        for (at, value) in d.into_iter().enumerate() {
            let (row, column) = (at / 8, at % 8);
            let sum: i64 = (0..k).map(|k| of(a(row, k), types[0]) * of(b(k, column), types[1])).sum();
            assert_eq!(value as i32, (i64::from(c(row, column)) + sum) as i32, "{opcode}, {row}, {column}");
        }
    }
}

/// Fills shared memory with the numbers 0 to 255, 16 bits each, loads matrices of them and stores what lanes got.
#[test]
fn matrices_are_loaded_as_the_isa_says() {
    let load = |count: usize, transposed: bool| {
        let names: Vec<String> = (0..count).map(|at| format!("%r{}", 30 + at)).collect();
        let trans = if transposed { ".trans" } else { "" };
        let mut body =
            "mov.u32 %r3, tile;\nshl.b32 %r4, %r1, 4;\nadd.u32 %r5, %r3, %r4;\nmul.wide.u32 %rd6, %r1, 16;\n\
                        add.s64 %rd7, %rd2, %rd6;\nadd.s64 %rd8, %rd1, %rd6;\n\
                        ld.global.v4.u32 {%r6, %r7, %r8, %r9}, [%rd7];\nst.shared.v4.u32 [%r5], {%r6, %r7, %r8, %r9};\n\
                        bar.sync 0;\n"
                .to_owned();
        body += &format!("ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{}}}, [%r5];\n", names.join(", "));
        for (at, name) in names.iter().enumerate() {
            body += &format!("st.global.u32 [%rd8+{}], {name};\n", 4 * at);
        }
        let input: Vec<u32> = (0..128).map(|at| (2 * at) | ((2 * at + 1) << 16)).collect();
        run(&(body + "ret;"), 32, &input, 128).unwrap()
    };
    for count in [1, 2, 4] {
        for transposed in [false, true] {
            let words = load(count, transposed);
            for lane in 0..32 {
                for matrix in 0..count {
                    // Row r of matrix m is the row of lane 8 m + r.
                    let number = |row: usize, column: usize| (8 * (8 * matrix + row) + column) as u32;
                    let (g, t) = (lane / 4, 2 * (lane % 4));
                    let pair =
                        if transposed { [number(t, g), number(t + 1, g)] } else { [number(g, t), number(g, t + 1)] };
                    assert_eq!(words[4 * lane + matrix], pair[0] | pair[1] << 16, "x{count} lane {lane}");
                }
            }
        }
    }
}

// ---- Asynchronous copies

const COPY: &str = "mov.u32 %r3, tile;\nshl.b32 %r4, %r1, 4;\nadd.u32 %r5, %r3, %r4;\nmul.wide.u32 %rd6, %r1, 16;\n\
                    add.s64 %rd7, %rd2, %rd6;\ncp.async.cg.shared.global [%r5], [%rd7], 16;\ncp.async.commit_group;\n";

#[test]
fn copies_arrive_at_the_wait() {
    let input: Vec<u32> = (0..8).collect();
    let read = "ld.shared.u32 %r6, [%r5+4];\nst.global.u32 [%rd4], %r6;\nret;";
    let waited = format!("{COPY}cp.async.wait_group 0;\n{read}");
    assert_eq!(run(&waited, 2, &input, 2).unwrap(), [1, 5]);
    let all = format!("{}cp.async.wait_all;\n{read}", COPY.replace("cp.async.commit_group;\n", ""));
    assert_eq!(run(&all, 2, &input, 2).unwrap(), [1, 5]);
    for missing in [
        format!("{COPY}{read}"),
        format!("{COPY}cp.async.wait_group 1;\n{read}"),
        // Without an end, the group is none to wait for.
        format!("{}cp.async.wait_group 0;\n{read}", COPY.replace("cp.async.commit_group;\n", "")),
    ] {
        let error = run(&missing, 2, &input, 2).unwrap_err();
        assert!(matches!(error.fault(), Some(Fault::InFlight { write: false, .. })), "{error}");
    }
    let written = format!("{COPY}st.shared.u32 [%r5], 1;\nret;");
    let error = run(&written, 1, &input, 2).unwrap_err();
    assert!(matches!(error.fault(), Some(Fault::InFlight { write: true, .. })), "{error}");
}

#[test]
fn copies_fill_up_with_zeros() {
    let input = [1, 2, 3, 4];
    let copy = COPY.replace("16;\ncp.async.commit", "16, 8;\ncp.async.commit");
    let body = format!(
        "{copy}cp.async.wait_group 0;\nld.shared.v4.u32 {{%r6, %r7, %r8, %r9}}, [%r5];\n\
                        st.global.v4.u32 [%rd1], {{%r6, %r7, %r8, %r9}};\nret;"
    );
    assert_eq!(run(&body, 1, &input, 4).unwrap(), [1, 2, 0, 0]);
    // Nothing is read, not even from an address that does not exist.
    let none = body.replace("16, 8;", "16, 0;").replace("add.s64 %rd7, %rd2, %rd6;", "mov.u64 %rd7, 3;");
    assert_eq!(run(&none, 1, &input, 4).unwrap(), [0; 4]);
    // With two groups, the older one is there.
    let two = "mov.u32 %r3, tile;\ncp.async.ca.shared.global [%r3], [%rd2], 4;\ncp.async.commit_group;\n\
               cp.async.ca.shared.global [%r3+4], [%rd2+4], 4;\ncp.async.commit_group;\ncp.async.wait_group 1;\n\
               ld.shared.u32 %r4, [%r3];\nst.global.u32 [%rd1], %r4;\nld.shared.u32 %r4, [%r3+4];\nret;";
    let error = run(two, 1, &input, 4).unwrap_err();
    assert!(matches!(error.fault(), Some(Fault::InFlight { .. })) && error.to_string().contains("[%r3+4]"), "{error}");
}

// ---- Faults

#[test]
fn accesses_outside_memory_are_faults() {
    for (body, space) in [
        ("ld.global.u32 %r3, [%rd2+256];\nret;", Space::Global),
        ("ld.global.u32 %r3, [%rd2+-4];\nret;", Space::Global),
        ("st.global.u32 [%rd3], %r1;\nret;", Space::Global),
        ("mov.u32 %r3, tile;\nst.shared.u32 [%r3+512], %r1;\nret;", Space::Shared),
        ("mov.u32 %r3, dynamic;\nst.shared.u32 [%r3], %r1;\nret;", Space::Shared),
        (".local .b32 x;\nst.local.u32 [x], %r1;\nmov.u64 %rd6, x;\nld.local.u32 %r4, [%rd6+4];\nret;", Space::Local),
        ("ld.param.u32 %r3, [in+8];\nret;", Space::Param),
        // A generic address where one of shared memory belongs.
        (
            "mov.u64 %rd6, tile;\ncvta.shared.u64 %rd7, %rd6;\ncvt.u32.u64 %r3, %rd7;\nst.shared.u32 [%r3], 1;\nret;",
            Space::Shared,
        ),
    ] {
        let fault = fault_of(body, 1);
        assert!(matches!(&fault, Fault::OutOfBounds { space: found, .. } if *found == space), "{body}: {fault}");
    }
}

#[test]
fn misaligned_accesses_are_faults() {
    for body in [
        "ld.global.u32 %r3, [%rd2+2];\nret;",
        "ld.global.v2.u32 {%r3, %r4}, [%rd2+4];\nret;",
        "mov.u32 %r3, tile;\nst.shared.v4.u32 [%r3+8], {%r1, %r1, %r1, %r1};\nret;",
        ".local .align 4 .b8 x[16];\nmov.u64 %rd6, x;\nst.local.u16 [%rd6+1], %r1;\nret;",
    ] {
        let fault = fault_of(body, 1);
        assert!(matches!(fault, Fault::Misaligned { .. }), "{body}: {fault}");
    }
    let rows = "mov.u32 %r3, tile;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r3+8];\nret;";
    assert!(matches!(fault_of(rows, 32), Fault::Misaligned { bytes: 16, .. }));
}

#[test]
fn what_was_never_written_is_a_fault_to_read() {
    assert_eq!(fault_of("add.u32 %r3, %r4, 1;\nret;", 1), Fault::UnwrittenRegister("%r4".to_owned()));
    assert_eq!(fault_of("@%p3 bra $E;\n$E:\nret;", 1), Fault::UnwrittenRegister("%p3".to_owned()));
    // A copy is no use, what is copied is.
    run("mov.u32 %r3, %r4;\nmov.b64 %rd6, {%r3, %r1};\nret;", 1, &[1; 64], 64).unwrap();
    let copied = "mov.u32 %r3, %r4;\nst.global.u32 [%rd4], %r3;\nret;";
    assert_eq!(fault_of(copied, 1), Fault::UnwrittenRegister("%r3".to_owned()));
    let shared = "mov.u32 %r3, tile;\nst.shared.u16 [%r3], %r1;\nld.shared.u32 %r4, [%r3];\nret;";
    assert!(matches!(fault_of(shared, 1), Fault::UnwrittenMemory { space: Space::Shared, .. }));
    let mut memory = Memory::new();
    let out = memory.add_unwritten(8);
    let text = format!(
        "{HEAD}.visible .entry k(.param .u64 out)\n{{\n.reg .b32 %r<2>;\n.reg .b64 %rd<2>;\n\
                        ld.param.u64 %rd1, [out];\nst.global.u32 [%rd1], 1;\nld.global.u32 %r1, [%rd1+4];\nret;\n}}\n"
    );
    let module = Module::parse(&text).unwrap();
    let error = module.launch(&mut memory, "k", [1, 1, 1], [1, 1, 1], 0, &[Arg::U64(out)]).unwrap_err();
    assert!(matches!(error.fault(), Some(Fault::UnwrittenMemory { space: Space::Global, .. })), "{error}");
    assert_eq!(memory.first_unwritten(out), Some(4));
}

/// Every thread writes its word of shared memory; then, after a barrier, `between` and a read of another's word.
#[test]
fn accesses_that_no_barrier_orders_are_faults() {
    let body = |first: &str, between: &str, mask: u32, then: &str| {
        format!(
            "mov.u32 %r3, tile;\nadd.u32 %r4, %r3, %r2;\nst.shared.u32 [%r4], %r1;\nbar.sync 0;\n\
             xor.b32 %r5, %r2, {mask};\nadd.u32 %r6, %r3, %r5;\n{first}\n{between}\n{then}\nret;"
        )
    };
    let (write, read) = ("st.shared.u32 [%r4], 1;", "ld.shared.u32 %r7, [%r6];");
    let (write_other, add) = ("st.shared.u32 [%r6], 2;", "atom.shared.add.u32 %r7, [%r3], 1;");
    let race = |body: String| {
        let fault = fault_of(&body, 64);
        assert!(matches!(fault, Fault::Race { .. }), "{body}: {fault}");
    };
    let fine = |body: String| drop(run(&body, 64, &[], 1).unwrap());
    race(body(write, "", 4, read));
    race(body(read, "", 4, write));
    race(body(write, "", 4, write_other));
    race(body(add, "", 4, "ld.shared.u32 %r8, [%r3];"));
    fine(body(write, "bar.sync 0;", 4, read));
    fine(body(read, "bar.sync 0;", 4, write));
    fine(body(add, "", 4, add));
    fine(body(read, "", 4, read));
    // A barrier of the warp orders its own lanes, not those of others.
    fine(body(write, "bar.warp.sync -1;", 4, read));
    race(body(write, "bar.warp.sync -1;", 128, read));
    // What a copy brings is seen by other threads after a barrier.
    let copy = "cp.async.ca.shared.global [%r4], [%rd2], 4;\ncp.async.commit_group;\ncp.async.wait_group 0;";
    let copied = |between: &str| run(&body(copy, between, 4, read), 64, &[7], 1);
    copied("bar.sync 0;").unwrap();
    assert!(matches!(copied("").unwrap_err().fault(), Some(Fault::Race { .. })));
    assert!(Module::parse(HEAD).unwrap().allow_races().kernels().is_empty());
}

#[test]
fn threads_that_do_not_meet_are_faults() {
    let skipped = "setp.eq.u32 %p1, %r1, 0;\n@%p1 bra $E;\nbar.sync 0;\nret;\n$E:\nbar.warp.sync -1;\nret;";
    assert!(matches!(fault_of(skipped, 64), Fault::WarpDivergence(_)));
    let places = "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $E;\nbar.sync 0;\nret;\n$E:\nbar.sync 0;\nret;";
    assert!(matches!(fault_of(places, 64), Fault::BarrierDivergence(_)));
    let barriers = "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $E;\nbar.sync 1;\nret;\n$E:\nbar.sync 2;\nret;";
    assert!(matches!(fault_of(barriers, 64), Fault::BarrierDivergence(_)));
    let inactive = "setp.lt.u32 %p1, %r1, 16;\n@!%p1 bra $E;\nshfl.sync.idx.b32 %r3, %r1, 20, 31, 0xffff;\n$E:\nret;";
    assert_eq!(fault_of(inactive, 32), Fault::InactiveLane { lane: 20, mask: 0xffff });
    let absent = "shfl.sync.down.b32 %r3, %r1, 16, 31, -1;\nret;";
    assert_eq!(fault_of(absent, 24), Fault::InactiveLane { lane: 24, mask: 0xff_ffff });
    let outside = "shfl.sync.bfly.b32 %r3, %r1, 1, 31, 0xffff;\nret;";
    assert_eq!(fault_of(outside, 32), Fault::NotInMask { lane: 16, mask: 0xffff });
    let half = "mov.u32 %r3, 0;\nmma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r4, %r5, %r6, %r7}, \
                {%r3, %r3, %r3, %r3}, {%r3, %r3}, {%r3, %r3, %r3, %r3};\nret;";
    assert!(matches!(fault_of(half, 16), Fault::WarpDivergence(_)));
    // Threads that have exited are not waited for.
    run("setp.eq.u32 %p1, %r1, 0;\n@%p1 ret;\nbar.sync 0;\nret;", 64, &[], 1).unwrap();
    // Named barriers are for a part of the block.
    run("setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $E;\nbar.sync 1, 32;\n$E:\nbar.sync 0;\nret;", 64, &[], 1).unwrap();
}

#[test]
fn other_faults() {
    assert_eq!(fault_of("$L:\nbra.uni $L;", 1), Fault::EndlessLoop { limit: 10_000 });
    assert_eq!(fault_of("trap;", 1), Fault::Trap);
    assert!(matches!(fault_of("mov.u64 %rd6, table;\nst.global.u32 [%rd6], %r1;\nret;", 1), Fault::ReadOnly { .. }));
}

#[test]
fn a_fault_names_its_place() {
    let error = run("ld.global.u32 %r3, [%rd5];\nret;", 100, &[1; 64], 1).unwrap_err();
    let Error::Fault(at) = &error else { panic!("{error}") };
    assert_eq!((at.kernel.as_str(), at.block, at.thread), ("k", [0, 0, 0], [64, 0, 0]));
    assert_eq!(at.text, "ld.global.u32 %r3, [%rd5];");
    assert!(error.to_string().contains("byte 256 of a buffer of 256 bytes"), "{error}");
}

#[test]
fn what_is_not_understood_is_an_error_that_names_it() {
    for (body, named) in [
        ("frob.u32 %r3, %r1;", "frob.u32"),
        ("add.frob.u32 %r3, %r1, 1;", ".frob"),
        ("add.u32 %r3, %nothing, 1;", "%nothing"),
        ("add.u32 %r3, %r1;", "missing"),
        ("add.u32 %r3, %r1, 1, 2;", "too many"),
        ("add.u32 %r3, %rd1, 1;", "%rd1"),
        ("add.rz.f64 %rd1, %rd2, %rd3;", "nearest"),
        ("bra $nowhere;", "$nowhere"),
        ("call.uni unknown;", "unknown"),
        ("call.uni declared;", "`declared`"),
        ("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1}, {%r1}, {%r1}, {%r1};", "f16"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r3, %r4}, [%r1];", "2 registers"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 8;", "8 bytes"),
        ("mov.u32 %r3, #;", "#"),
        ("add.f32 %f1, %f2, 1;", "`1`"),
    ] {
        let error = run(body, 1, &[], 1).unwrap_err();
        assert!(matches!(error, Error::Parse { .. }) && error.to_string().contains(named), "{body}: {error}");
    }
}

#[test]
fn a_launch_must_fit_the_kernel() {
    let text = format!("{HEAD}.visible .entry k(.param .u32 n)\n.maxntid 64, 1, 1\n{{\nret;\n}}\n");
    let module = Module::parse(&text).unwrap();
    assert_eq!(module.kernels(), ["k"]);
    let launch = |name: &str, threads: u32, arguments: &[Arg]| {
        module.launch(&mut Memory::new(), name, [1, 1, 1], [threads, 1, 1], 0, arguments)
    };
    launch("k", 64, &[Arg::U32(1)]).unwrap();
    assert_eq!(launch("other", 64, &[]), Err(Error::NoKernel("other".to_owned())));
    for (threads, arguments) in [(65, vec![Arg::U32(1)]), (0, vec![Arg::U32(1)]), (1, vec![]), (1, vec![Arg::U64(1)])] {
        assert!(matches!(launch("k", threads, &arguments), Err(Error::Launch { .. })));
    }
}
