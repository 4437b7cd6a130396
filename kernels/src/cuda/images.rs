//! The kernels inside this program: machine code for each architecture, packed by build.rs, and the sources.
//!
//! Which machine code runs where (CUDA C++ Programming Guide, "Binary Compatibility"): that for compute capability X.y runs
//! on X.z with z ≥ y, among cards for PCs and servers. Jetson boards run their own only, and cards run none of theirs.

use std::collections::BTreeSet;

include!(concat!(env!("OUT_DIR"), "/cuda_images.rs"));

/// More than any file of kernels has bytes, so that a damaged length takes no memory.
const LARGEST: usize = 64 << 20;

/// The architectures of Jetson boards and their like.
const BOARDS: [u32; 6] = [53, 62, 72, 87, 101, 110];

/// Why the program's own kernels cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// There is no such file of kernels, or not for this architecture.
    #[error("this program has no {family} kernels for {architecture}")]
    Missing {
        /// `sm_87`, or what else was asked for.
        architecture: String,
        /// The file of cuda/, without `.cu`.
        family: String,
    },
    /// What is there cannot be unpacked: the program's file is damaged.
    #[error("the {family} kernels inside this program are damaged; install it again")]
    Damaged {
        /// The file of cuda/, without `.cu`.
        family: String,
    },
}

/// An architecture that this program has kernels for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arch(u32);

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sm_{}", self.0)
    }
}

/// The architectures inside this program, ascending: 87 for sm_87.
pub fn architectures() -> Vec<u32> {
    IMAGES.iter().map(|(architecture, ..)| *architecture).collect::<BTreeSet<_>>().into_iter().collect()
}

/// What is not inside this program, and why.
pub fn left_out() -> &'static [(&'static str, &'static str)] {
    LEFT_OUT
}

/// The architecture whose machine code runs on a GPU of this compute capability.
pub(crate) fn find(capability: (i32, i32)) -> Option<Arch> {
    choose(&architectures(), capability).map(Arch)
}

/// Compute capability as one number: 87 for (8, 7).
pub(crate) fn number(capability: (i32, i32)) -> Option<u32> {
    let (major, minor) = (u32::try_from(capability.0).ok()?, u32::try_from(capability.1).ok()?);
    major.checked_mul(10)?.checked_add(minor).filter(|_| minor < 10)
}

fn choose(inside: &[u32], capability: (i32, i32)) -> Option<u32> {
    let wanted = number(capability)?;
    let runs = |image: u32| match BOARDS.contains(&image) || BOARDS.contains(&wanted) {
        true => image == wanted,
        false => image / 10 == wanted / 10 && image <= wanted,
    };
    inside.iter().copied().filter(|&image| runs(image)).max()
}

/// The machine code of a file of cuda/, by its name without `.cu`.
pub(crate) fn cubin(arch: Arch, family: &str) -> Result<Vec<u8>, ImageError> {
    let image = IMAGES.iter().find(|(architecture, name, _)| *architecture == arch.0 && *name == family);
    let missing = || ImageError::Missing { architecture: arch.to_string(), family: family.to_owned() };
    unpack(image.ok_or_else(missing)?.2, family)
}

/// The sources of the kernels, for compiling them where the program runs.
#[derive(Clone, Debug)]
pub(crate) struct Sources {
    /// Name without `.cu`, and text.
    pub(crate) families: Vec<(String, String)>,
    /// Name as it is included, and text.
    pub(crate) headers: Vec<(String, String)>,
}

/// Unpacks the sources.
pub(crate) fn sources() -> Result<Sources, ImageError> {
    let text = |&(name, packed): &(&str, &[u8])| {
        let text = String::from_utf8(unpack(packed, name)?).map_err(|_| damaged(name))?;
        Ok((name.to_owned(), text))
    };
    let list = |files: &[(&str, &[u8])]| files.iter().map(text).collect::<Result<Vec<_>, ImageError>>();
    Ok(Sources { families: list(FAMILIES)?, headers: list(HEADERS)? })
}

fn unpack(packed: &[u8], family: &str) -> Result<Vec<u8>, ImageError> {
    miniz_oxide::inflate::decompress_to_vec_zlib_with_limit(packed, LARGEST).map_err(|_| damaged(family))
}

fn damaged(family: &str) -> ImageError {
    ImageError::Damaged { family: family.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [u32; 5] = [72, 87, 89, 90, 110];

    #[test]
    fn each_target_has_its_own_code() {
        for (capability, image) in [((7, 2), 72), ((8, 7), 87), ((8, 9), 89), ((9, 0), 90), ((11, 0), 110)] {
            assert_eq!(choose(&ALL, capability), Some(image));
        }
    }

    #[test]
    fn cards_run_code_of_an_earlier_minor_version() {
        assert_eq!(choose(&[80, 86, 90], (8, 6)), Some(86));
        assert_eq!(choose(&[80, 90], (8, 6)), Some(80));
        assert_eq!(choose(&[80, 89], (8, 8)), Some(80));
        assert_eq!(choose(&[89, 90], (8, 6)), None);
        assert_eq!(choose(&[80, 90], (10, 0)), None);
    }

    #[test]
    fn boards_and_cards_do_not_share_code() {
        // An Ada card without its own code does not take Orin's, nor Turing Xavier's, nor Orin Ampere's.
        assert_eq!(choose(&[72, 87, 90], (8, 9)), None);
        assert_eq!(choose(&ALL, (7, 5)), None);
        assert_eq!(choose(&[80, 86], (8, 7)), None);
        assert_eq!(choose(&[110], (11, 1)), None);
    }

    #[test]
    fn impossible_capabilities_have_no_code() {
        for capability in [(0, 0), (-8, 7), (8, -7), (7, 17), (i32::MAX, 0), (i32::MAX, i32::MAX)] {
            assert_eq!(choose(&ALL, capability), None, "{capability:?}");
        }
    }

    #[test]
    fn everything_inside_unpacks() {
        for &(architecture, family, _) in IMAGES {
            let cubin = cubin(Arch(architecture), family).expect("whole");
            assert!(cubin.starts_with(b"\x7fELF"), "{family} for sm_{architecture}");
        }
        let sources = sources().expect("whole");
        assert_eq!(sources.families.len(), FAMILIES.len());
        for architecture in architectures() {
            let of_it = IMAGES.iter().filter(|(other, ..)| *other == architecture).count();
            assert_eq!(of_it, FAMILIES.len(), "every file of kernels for sm_{architecture}");
        }
    }

    #[test]
    fn what_is_not_inside_is_said() {
        let error = cubin(Arch(1), "matvec").expect_err("no such architecture");
        assert_eq!(error.to_string(), "this program has no matvec kernels for sm_1");
        assert_eq!(unpack(&[1, 2, 3], "matvec"), Err(damaged("matvec")));
        // Every target is inside or left out.
        assert!(FAMILIES.is_empty() || architectures().len() + left_out().len() == ALL.len());
    }
}
