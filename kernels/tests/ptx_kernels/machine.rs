//! What tests run kernels on: modules of the compiler, memory, arguments, and the comparison of results.

use crate::nvrtc::Nvrtc;
use crate::plan::{Sources, compilers};
use crate::ptx::{Arg, Error, Memory, Module, Statistics};
use half::f16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

/// One without and one with the matrix instructions.
pub(crate) const ARCHITECTURES: [u32; 2] = [72, 87];

/// Of random numbers; the same in every run.
const SEED: u64 = 20_240_607;

/// The files of cuda/.
pub(crate) fn sources() -> Sources {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    Sources::read(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
}

/// A file of cuda/, compiled once.
pub(crate) fn module(family: &str, architecture: u32) -> Arc<Module> {
    type Once = Arc<OnceLock<Arc<Module>>>;
    static MODULES: Mutex<BTreeMap<(String, u32), Once>> = Mutex::new(BTreeMap::new());
    let mut modules = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
    let module = modules.entry((family.to_owned(), architecture)).or_default().clone();
    // Others can be compiled meanwhile.
    drop(modules);
    let compiled = || compile(&sources(), family, architecture).unwrap_or_else(|error| panic!("{family}.cu: {error}"));
    module.get_or_init(|| Arc::new(compiled())).clone()
}

fn compile(sources: &Sources, family: &str, architecture: u32) -> Result<Module, String> {
    let (_, text) = sources.families.iter().find(|(name, _)| name == family).ok_or("no such file")?;
    let compiler = Nvrtc::open(&compilers(Path::new(env!("CARGO_MANIFEST_DIR"))).join("cuda126"))?;
    let option = format!("--gpu-architecture=compute_{architecture}");
    let compiled = compiler.compile(&format!("{family}.cu"), text, &sources.needed(text), &[&option])?;
    Module::parse(&compiled.ptx).map_err(|error| error.to_string())
}

/// Blocks, threads of a block, and bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid(pub(crate) [usize; 3], pub(crate) usize, pub(crate) usize);

impl Grid {
    /// A thread for each of `count` things.
    pub(crate) fn each(count: usize, threads: usize) -> Self {
        Grid([count.div_ceil(threads), 1, 1], threads, 0)
    }
}

/// [`Module::launch`] or [`Module::launch_cooperative`].
type Launch = fn(&Module, &mut Memory, &str, [u32; 3], [u32; 3], usize, &[Arg]) -> Result<Statistics, Error>;

/// Memory, random numbers, and what was launched.
pub(crate) struct Machine {
    pub(crate) architecture: u32,
    random: ChaCha8Rng,
    memory: Memory,
    launched: BTreeSet<String>,
    instructions: u64,
    start: Instant,
    /// A file with an error in it, in place of the one of that name.
    planted: Option<(String, Module)>,
}

impl Machine {
    pub(crate) fn new(architecture: u32) -> Self {
        Machine {
            architecture,
            random: ChaCha8Rng::seed_from_u64(SEED),
            memory: Memory::new(),
            launched: BTreeSet::new(),
            instructions: 0,
            start: Instant::now(),
            planted: None,
        }
    }

    /// Changes the source of a file and what it includes, at one place.
    pub(crate) fn planted(mut self, family: &str, from: &str, to: &str) -> Self {
        let mut sources = sources();
        let own = sources.families.iter().find(|(name, _)| name == family).map_or("", |(_, text)| text);
        let included: BTreeSet<String> = sources.needed(own).into_iter().map(|(name, _)| name).collect();
        let (families, headers) = (sources.families.iter_mut(), sources.headers.iter_mut());
        let headers = headers.filter(|(name, _)| included.contains(name));
        let mut places = 0;
        for (_, text) in families.filter(|(name, _)| name == family).chain(headers) {
            places += text.matches(from).count();
            *text = text.replace(from, to);
        }
        assert_eq!(places, 1, "{family}.cu and its headers: `{from}` is to be there once");
        let module = compile(&sources, family, self.architecture).unwrap_or_else(|error| panic!("`{to}`: {error}"));
        self.planted = Some((family.to_owned(), module));
        self
    }

    /// Numbers between -2 and 2.
    pub(crate) fn numbers(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.random.random_range(-2.0..2.0)).collect()
    }

    pub(crate) fn random_bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.random.random()).collect()
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> u64 {
        self.memory.add(bytes)
    }

    pub(crate) fn floats(&mut self, values: &[f32]) -> u64 {
        self.memory.add(&le_bytes(values))
    }

    /// A buffer of `bytes` bytes, all of which a kernel must write.
    pub(crate) fn output(&mut self, bytes: usize) -> u64 {
        self.memory.add_unwritten(bytes)
    }

    #[track_caller]
    pub(crate) fn run(&mut self, kernel: [&str; 2], grid: Grid, arguments: &[Arg]) {
        self.launch(kernel, grid, arguments, Module::launch);
    }

    /// As [`Machine::run`], with all blocks at once.
    #[track_caller]
    pub(crate) fn run_cooperative(&mut self, kernel: [&str; 2], grid: Grid, arguments: &[Arg]) {
        self.launch(kernel, grid, arguments, Module::launch_cooperative);
    }

    #[track_caller]
    fn launch(&mut self, [family, kernel]: [&str; 2], grid: Grid, arguments: &[Arg], launch: Launch) {
        let Grid(blocks, threads, shared) = grid;
        let original;
        let module = match &self.planted {
            Some((planted, module)) if planted == family => module,
            _ => {
                original = module(family, self.architecture);
                &original
            }
        };
        let launched = launch(
            module,
            &mut self.memory,
            kernel,
            blocks.map(|blocks| blocks as u32),
            [threads as u32, 1, 1],
            shared,
            arguments,
        );
        let statistics = launched.unwrap_or_else(|error| panic!("compute_{}: {error}", self.architecture));
        self.instructions += statistics.instructions;
        self.launched.insert(kernel.to_owned());
    }

    pub(crate) fn has_run(&self, kernel: &str) -> bool {
        self.launched.contains(kernel)
    }

    /// The content of a buffer, all of which must have been written.
    #[track_caller]
    pub(crate) fn read(&self, address: u64) -> &[u8] {
        assert_eq!(self.memory.first_unwritten(address), None, "the first byte of an output that was not written");
        self.memory.bytes(address)
    }

    #[track_caller]
    pub(crate) fn read_floats(&self, address: u64) -> Vec<f32> {
        self.read_words(address).into_iter().map(f32::from_bits).collect()
    }

    #[track_caller]
    pub(crate) fn read_words(&self, address: u64) -> Vec<u32> {
        self.read(address).as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
    }

    /// A buffer against what it should hold; errors are relative to the largest value.
    #[track_caller]
    pub(crate) fn check(&self, what: &str, address: u64, expected: &[f64], allowed: f64) {
        self.near(what, &self.read_floats(address), expected, allowed);
    }

    /// The same for what was made of sums of about `size`.
    #[track_caller]
    pub(crate) fn check_sums(&self, what: &str, address: u64, expected: &[f64], size: f64) {
        self.within(what, &self.read_floats(address), expected, 2e-6, size);
    }

    #[track_caller]
    pub(crate) fn near(&self, what: &str, found: &[f32], expected: &[f64], allowed: f64) {
        self.within(what, found, expected, allowed, 1e-3);
    }

    #[track_caller]
    fn within(&self, what: &str, found: &[f32], expected: &[f64], allowed: f64, size: f64) {
        assert_eq!(found.len(), expected.len(), "{what}");
        let size = expected.iter().fold(size, |size, value| size.max(value.abs()));
        for (at, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(found) - expected).abs() / size;
            assert!(
                error <= allowed,
                "compute_{}, {what}, seed {SEED}: element {at} is {found}, not {expected}",
                self.architecture
            );
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (millions, seconds) = (self.instructions as f64 / 1e6, self.start.elapsed().as_secs_f64());
        write!(f, "{millions:.1} million instructions, {seconds:.1} s")
    }
}

pub(crate) fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(crate) fn halves(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect()
}

pub(crate) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// A structure as it lies in memory, each field at a multiple of its size.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fields(Vec<u8>);

impl Fields {
    fn push<const N: usize>(mut self, bytes: [u8; N]) -> Self {
        self.0.resize(self.0.len().next_multiple_of(N), 0);
        self.0.extend(bytes);
        self
    }

    pub(crate) fn word(self, value: u64) -> Self {
        self.push(value.to_le_bytes())
    }

    pub(crate) fn ints(self, values: &[usize]) -> Self {
        values.iter().fold(self, |fields, &value| fields.push((value as i32).to_le_bytes()))
    }

    pub(crate) fn float(self, value: f32) -> Self {
        self.push(value.to_le_bytes())
    }

    /// A structure in the structure; both are multiples of eight bytes.
    pub(crate) fn then(mut self, other: &Fields) -> Self {
        self.0.extend(&other.0);
        self
    }

    /// With what is left out behind the last field.
    pub(crate) fn filled(mut self, align: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(align), 0);
        self
    }
}

impl From<Fields> for Arg {
    fn from(fields: Fields) -> Arg {
        Arg::Bytes(fields.0)
    }
}

impl From<u64> for Arg {
    fn from(address: u64) -> Arg {
        Arg::U64(address)
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Arg {
        Arg::F32(value)
    }
}

/// What a kernel takes as `int`.
pub(crate) struct Int(pub(crate) usize);

impl From<Int> for Arg {
    fn from(Int(value): Int) -> Arg {
        Arg::I32(value as i32)
    }
}

/// What a kernel takes as `size_t`.
pub(crate) struct Size(pub(crate) usize);

impl From<Size> for Arg {
    fn from(Size(value): Size) -> Arg {
        Arg::U64(value as u64)
    }
}

/// A kernel's arguments.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => { &[$($crate::ptx::Arg::from($argument)),*] };
}
pub(crate) use arguments;
