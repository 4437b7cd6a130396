//! Which instruction set kernels are run with.

use super::integer::{Integer, IntegerOperation};
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};
#[cfg(target_arch = "x86_64")]
use super::x86_integer::{Avx512Vnni, AvxVnni};
use super::{Operation, Portable, Simd};
use std::sync::OnceLock;

/// The instruction set that kernels are run with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Level {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    AvxVnni(AvxVnni),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Avx512Vnni),
}

/// The environment variable that names a level.
const VARIABLE: &str = "CANDOR_CPU";

impl Level {
    /// The names of all levels of this kind of processor, best last.
    #[cfg(target_arch = "x86_64")]
    pub(crate) const NAMES: &'static [&'static str] = &["portable", "avx2", "avxvnni", "avx512", "avx512vnni"];
    /// The names of all levels of this kind of processor, best last.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) const NAMES: &'static [&'static str] = &["portable"];

    /// Its name, as `CANDOR_CPU` takes it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Level::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni(_) => "avxvnni",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni(_) => "avx512vnni",
        }
    }

    /// The level of this name, if the processor has it.
    pub(crate) fn named(name: &str) -> Option<Self> {
        match name {
            "portable" => Some(Level::Portable(Portable)),
            #[cfg(target_arch = "x86_64")]
            "avx2" => Avx2::new().map(Level::Avx2),
            #[cfg(target_arch = "x86_64")]
            "avxvnni" => AvxVnni::new().map(Level::AvxVnni),
            #[cfg(target_arch = "x86_64")]
            "avx512" => Avx512::new().map(Level::Avx512),
            #[cfg(target_arch = "x86_64")]
            "avx512vnni" => Avx512Vnni::new().map(Level::Avx512Vnni),
            _ => None,
        }
    }

    /// Every level that this processor has, best last.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        Self::NAMES.iter().filter_map(|name| Self::named(name))
    }

    /// The best level of this processor, or the one that the environment variable `CANDOR_CPU` names. Asked once.
    pub(crate) fn chosen() -> Self {
        static CHOSEN: OnceLock<Level> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            if let Ok(name) = std::env::var(VARIABLE) {
                match Level::named(&name) {
                    Some(level) => return level,
                    None => {
                        let known: Vec<&str> = Level::all().map(Level::name).collect();
                        log::warn!("{VARIABLE}={name} is ignored: this processor has {}", known.join(", "));
                    }
                }
            }
            let best = Level::all().last().unwrap_or(Level::Portable(Portable));
            if matches!(best, Level::Portable(_)) && cfg!(not(target_arch = "aarch64")) {
                log::warn!("this processor has no AVX2: the slow portable kernels are used");
            }
            best
        })
    }

    /// The set's AVX-512, if it has it.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn avx512(self) -> Option<Avx512> {
        match self {
            Level::Avx512(simd) => Some(simd),
            Level::Avx512Vnni(set) => Some(set.base()),
            _ => None,
        }
    }

    /// The set's AVX2, if it has it.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn avx2(self) -> Option<Avx2> {
        match self {
            Level::Portable(_) => None,
            Level::Avx2(simd) => Some(simd),
            Level::AvxVnni(set) => Some(set.base()),
            Level::Avx512(simd) => Some(simd.base()),
            Level::Avx512Vnni(set) => Some(set.base().base()),
        }
    }

    #[inline]
    pub(crate) fn run<O: Operation>(self, operation: O) -> O::Output {
        match self {
            Level::Portable(simd) => Simd::enter(simd, operation),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(simd) => Simd::enter(simd, operation),
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni(set) => Simd::enter(set.base(), operation),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(simd) => Simd::enter(simd, operation),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni(set) => Simd::enter(set.base(), operation),
        }
    }

    #[inline]
    pub(crate) fn run_integer<O: IntegerOperation>(self, operation: O) -> O::Output {
        match self {
            Level::Portable(set) => Integer::enter(set, operation),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(set) => Integer::enter(set, operation),
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni(set) => Integer::enter(set, operation),
            // Without VNNI, AVX-512 has no byte products with a sign.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(simd) => Integer::enter(simd.base(), operation),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni(set) => Integer::enter(set, operation),
        }
    }
}
