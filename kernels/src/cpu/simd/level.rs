//! Which instruction set kernels are run with.

use super::integer::{Integer, IntegerOperation};
#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
#[cfg(target_arch = "aarch64")]
use super::neon_integer::{NeonDot, NeonI8mm};
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};
#[cfg(target_arch = "x86_64")]
use super::x86_integer::{Avx512Vnni, AvxVnni};
use super::{Operation, Portable, Simd};
use std::sync::OnceLock;

/// The environment variable that names a level.
pub(crate) const LEVEL_VARIABLE: &str = "CANDOR_CPU";

/// The levels above the plain one, best last: where they exist, their name, what a set's value gives f32 kernels and
/// what it gives kernels that multiply bytes.
macro_rules! levels {
    ($(#[$here:meta] $level:ident($set:ident), $name:literal, $value:ident => $float:expr, $integer:expr;)+) => {
        /// The instruction set that kernels are run with.
        #[derive(Clone, Copy, Debug)]
        pub(crate) enum Level {
            Portable(Portable),
            $(#[$here] $level($set),)+
        }

        impl Level {
            /// The names of all levels of this kind of processor, best last.
            pub(crate) const NAMES: &'static [&'static str] = &["portable", $(#[$here] $name,)+];

            /// Its name, as `CANDOR_CPU` takes it.
            pub(crate) fn name(self) -> &'static str {
                match self {
                    Level::Portable(_) => "portable",
                    $(#[$here] Level::$level(_) => $name,)+
                }
            }

            /// The level of this name, if the processor has it.
            pub(crate) fn named(name: &str) -> Option<Self> {
                match name {
                    "portable" => Some(Level::Portable(Portable)),
                    $(#[$here] $name => $set::new().map(Level::$level),)+
                    _ => None,
                }
            }

            #[inline]
            pub(crate) fn run<O: Operation>(self, operation: O) -> O::Output {
                match self {
                    Level::Portable(simd) => Simd::enter(simd, operation),
                    $(#[$here] Level::$level($value) => Simd::enter($float, operation),)+
                }
            }

            #[inline]
            pub(crate) fn run_integer<O: IntegerOperation>(self, operation: O) -> O::Output {
                match self {
                    Level::Portable(set) => Integer::enter(set, operation),
                    $(#[$here] Level::$level($value) => Integer::enter($integer, operation),)+
                }
            }
        }
    };
}

levels! {
    #[cfg(target_arch = "x86_64")] Avx2(Avx2), "avx2", set => set, set;
    #[cfg(target_arch = "x86_64")] AvxVnni(AvxVnni), "avxvnni", set => set.base(), set;
    // Without VNNI, AVX-512 has no byte products with a sign.
    #[cfg(target_arch = "x86_64")] Avx512(Avx512), "avx512", set => set, set.base();
    #[cfg(target_arch = "x86_64")] Avx512Vnni(Avx512Vnni), "avx512vnni", set => set.base(), set;
    #[cfg(target_arch = "aarch64")] Neon(Neon), "neon", set => set, set;
    #[cfg(target_arch = "aarch64")] NeonDot(NeonDot), "dotprod", set => set.base(), set;
    #[cfg(target_arch = "aarch64")] NeonI8mm(NeonI8mm), "i8mm", set => set.base().base(), set;
}

impl Level {
    /// Every level that this processor has, best last.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        Self::NAMES.iter().filter_map(|name| Self::named(name))
    }

    /// The best level of this processor, or the one that the environment variable `CANDOR_CPU` names. Asked once.
    pub(crate) fn chosen() -> Self {
        static CHOSEN: OnceLock<Level> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            if let Ok(name) = std::env::var(LEVEL_VARIABLE) {
                match Level::named(&name) {
                    Some(level) => return level,
                    None => {
                        let known: Vec<&str> = Level::all().map(Level::name).collect();
                        log::warn!("{LEVEL_VARIABLE}={name} is ignored: this processor has {}", known.join(", "));
                    }
                }
            }
            let best = Level::all().last().unwrap_or(Level::Portable(Portable));
            if matches!(best, Level::Portable(_)) {
                log::warn!("this processor has no vectors that Candor knows: the slow portable kernels are used");
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

    /// The set's NEON, if it has it.
    #[cfg(target_arch = "aarch64")]
    pub(crate) fn neon(self) -> Option<Neon> {
        match self {
            Level::Portable(_) => None,
            Level::Neon(simd) => Some(simd),
            Level::NeonDot(set) => Some(set.base()),
            Level::NeonI8mm(set) => Some(set.base().base()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the tests of all levels run over. `CANDOR_EXPECT_LEVELS` (`portable,neon`) says what there must be, so that
    /// a run on an emulated processor cannot test less than it is meant to.
    #[test]
    fn levels_are_those_that_are_expected() {
        let levels: Vec<&str> = Level::all().map(Level::name).collect();
        println!("levels of this processor: {}", levels.join(","));
        assert_eq!(levels[0], "portable");
        if let Ok(expected) = std::env::var("CANDOR_EXPECT_LEVELS") {
            assert_eq!(levels.join(","), expected);
        }
        assert!(Level::named("no such level").is_none());
    }

    /// Every feature that the standard library finds gives its level.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn x86_levels_follow_the_processor() {
        let avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        assert_eq!(Level::named("avx2").is_some(), avx2);
        assert_eq!(Level::named("avxvnni").is_some(), avx2 && is_x86_feature_detected!("avxvnni"));
        let avx512 = Level::named("avx512").is_some();
        assert!(!avx512 || avx2 && is_x86_feature_detected!("avx512f"));
        assert_eq!(Level::named("avx512vnni").is_some(), avx512 && is_x86_feature_detected!("avx512vnni"));
    }
}
