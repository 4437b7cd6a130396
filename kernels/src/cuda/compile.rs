//! Compiles the kernels where the program runs, for GPUs that it has no machine code for. That takes NVIDIA's compiler,
//! NVRTC, and CUDA's headers, which a CUDA toolkit has; results are kept in the user's cache folder.

#[path = "../../build/nvrtc.rs"]
mod nvrtc;

use std::ffi::OsString;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{env, fs, io};

use super::images::{self, ImageError, Sources};
use nvrtc::Nvrtc;

/// Names of the library where it is no toolkit's, newest first.
const LIBRARIES: [&str; 4] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so"];
/// A header that kernels need.
const HEADER: &str = "cuda_fp16.h";
/// More than any result has bytes.
const LARGEST: usize = 64 << 20;

/// Why kernels could not be compiled here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// There is no compiler.
    #[error(
        "no CUDA compiler was found to make them (libnvrtc; looked in {folders} and where the system has its libraries)"
    )]
    NoCompiler {
        /// Where a toolkit was looked for.
        folders: String,
    },
    /// There is a compiler, and CUDA's headers are missing.
    #[error(
        "the CUDA compiler is here and CUDA's headers are not ({header}; looked in {folders}). \
        They are in the toolkit's package cuda-cudart-dev"
    )]
    NoHeaders {
        /// The header that was looked for.
        header: &'static str,
        /// Where.
        folders: String,
    },
    /// The compiler does not know the GPU, neither by name nor as a successor of one that it knows.
    #[error("the CUDA compiler here ({}.{}) makes nothing for compute capability {}.{}",
        .version.0, .version.1, .capability.0, .capability.1)]
    Architecture {
        /// The compiler's version.
        version: (i32, i32),
        /// The GPU's compute capability.
        capability: (i32, i32),
    },
    /// The compiler refused the source.
    #[error("the CUDA compiler says: {0}")]
    Compile(String),
    /// The sources inside this program cannot be had.
    #[error(transparent)]
    Source(#[from] ImageError),
}

/// A compiler for one GPU.
pub(crate) struct Compiler {
    nvrtc: Nvrtc,
    sources: Sources,
    goal: Goal,
    /// As the driver counts: 12 060 for CUDA 12.6.
    driver: i32,
    cache: Option<PathBuf>,
}

/// What is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    /// Machine code, `sm_87`.
    Code(u32),
    /// PTX for an earlier architecture, which the driver compiles for the GPU.
    Ptx(u32),
}

impl Goal {
    /// The best that a compiler, which knows `architectures`, can do for a GPU.
    fn choose(architectures: &[u32], capability: (i32, i32)) -> Option<Goal> {
        let wanted = images::number(capability)?;
        match architectures.iter().copied().filter(|&known| known <= wanted).max()? {
            known if known == wanted => Some(Goal::Code(known)),
            earlier => Some(Goal::Ptx(earlier)),
        }
    }

    fn name(self) -> String {
        match self {
            Goal::Code(number) => format!("sm_{number}"),
            Goal::Ptx(number) => format!("compute_{number}"),
        }
    }
}

impl Compiler {
    /// Finds the machine's compiler, for a GPU of this compute capability under this driver.
    pub(crate) fn find(capability: (i32, i32), driver: i32) -> Result<Compiler, CompileError> {
        let nvrtc = find_nvrtc(&toolkits())?;
        Compiler::new(nvrtc, images::sources()?, capability, driver, cache_folder())
    }

    fn new(
        nvrtc: Nvrtc,
        sources: Sources,
        capability: (i32, i32),
        driver: i32,
        cache: Option<PathBuf>,
    ) -> Result<Compiler, CompileError> {
        let version = nvrtc.version();
        let goal = Goal::choose(nvrtc.architectures(), capability);
        let goal = goal.ok_or(CompileError::Architecture { version, capability })?;
        Ok(Compiler { nvrtc, sources, goal, driver, cache })
    }

    /// The kernels of a file of cuda/, by its name without `.cu`, as the driver loads them: machine code, or PTX with the zero
    /// that ends it.
    pub(crate) fn image(&self, family: &str) -> Result<Vec<u8>, CompileError> {
        let missing = || ImageError::Missing { architecture: self.goal.name(), family: family.to_owned() };
        let (_, text) = self.sources.families.iter().find(|(name, _)| name == family).ok_or_else(missing)?;
        let entry = self.cache.as_ref().map(|folder| folder.join(self.entry(family, text)));
        if let Some(image) = entry.as_deref().and_then(read) {
            log::debug!("CUDA kernels {family}: compiled by an earlier start");
            return Ok(image);
        }
        let start = Instant::now();
        let option = format!("--gpu-architecture={}", self.goal.name());
        let compiled = self.nvrtc.compile(&format!("{family}.cu"), text, &self.sources.headers, &[&option]);
        let compiled = compiled.map_err(CompileError::Compile)?;
        let image = match self.goal {
            Goal::Code(_) => compiled.cubin,
            Goal::Ptx(_) => [compiled.ptx.as_bytes(), &[0]].concat(),
        };
        let (seconds, (major, minor)) = (start.elapsed().as_secs_f32(), self.nvrtc.version());
        log::info!(
            "CUDA kernels {family}: compiled for {} by NVRTC {major}.{minor} in {seconds:.1} s",
            self.goal.name()
        );
        if let Some(entry) = entry
            && let Err(error) = write(&entry, &image)
        {
            log::warn!("{} could not be kept for the next start: {error}", entry.display());
        }
        Ok(image)
    }

    /// The name of a result: it tells everything that the result depends on.
    fn entry(&self, family: &str, text: &str) -> String {
        let mut hash = DefaultHasher::new();
        let (version, options) = (self.nvrtc.version(), nvrtc::OPTIONS);
        (text, &self.sources.headers, options, version, self.driver).hash(&mut hash);
        format!("{family}-{}-{:016x}.z", self.goal.name(), hash.finish())
    }
}

/// Where toolkits lie: what the variables name, and the usual place.
fn toolkits() -> Vec<PathBuf> {
    let named = ["CUDA_PATH", "CUDA_HOME"].into_iter().filter_map(env::var_os).filter(|folder| !folder.is_empty());
    named.chain([OsString::from("/usr/local/cuda")]).map(PathBuf::from).collect()
}

/// Opens the compiler of the first toolkit that has one with its headers, else the system's.
fn find_nvrtc(toolkits: &[PathBuf]) -> Result<Nvrtc, CompileError> {
    if let Some(nvrtc) = toolkits.iter().find_map(|folder| Nvrtc::open(folder).ok()) {
        return Ok(nvrtc);
    }
    // A distribution's package, or one on LD_LIBRARY_PATH; its headers may be a toolkit's.
    let includes: Vec<PathBuf> =
        toolkits.iter().map(|folder| folder.join("include")).chain([PathBuf::from("/usr/include")]).collect();
    let headers = includes.iter().find(|folder| folder.join(HEADER).exists());
    let nowhere = PathBuf::new();
    let opened = LIBRARIES.iter().find_map(|name| Nvrtc::open_named(name, headers.unwrap_or(&nowhere)).ok());
    match (opened, headers) {
        (Some(nvrtc), Some(_)) => Ok(nvrtc),
        (Some(_), None) => Err(CompileError::NoHeaders { header: HEADER, folders: list(&includes) }),
        (None, _) if toolkits.iter().any(|folder| nvrtc::has_library(folder)) => {
            Err(CompileError::NoHeaders { header: HEADER, folders: list(&includes) })
        }
        (None, _) => Err(CompileError::NoCompiler { folders: list(toolkits) }),
    }
}

fn list(folders: &[PathBuf]) -> String {
    folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// The user's cache folder; none where there is no home, as in some services.
fn cache_folder() -> Option<PathBuf> {
    // A relative path is to be ignored, as the XDG Base Directory Specification has it.
    let absolute = |variable| env::var_os(variable).map(PathBuf::from).filter(|folder| folder.is_absolute());
    let folder = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
    Some(folder.join("candor/cuda"))
}

/// A result that was kept; none where it is not there, or damaged (zlib's checksum tells).
fn read(entry: &Path) -> Option<Vec<u8>> {
    let packed = fs::read(entry).ok()?;
    let image = miniz_oxide::inflate::decompress_to_vec_zlib_with_limit(&packed, LARGEST);
    if image.is_err() {
        log::warn!("{} is damaged and made anew", entry.display());
    }
    image.ok().filter(|image| !image.is_empty())
}

/// Keeps a result: whole or not at all, also where two programs do so at once.
fn write(entry: &Path, image: &[u8]) -> io::Result<()> {
    if let Some(folder) = entry.parent() {
        fs::create_dir_all(folder)?;
    }
    let part = entry.with_extension(format!("{}.part", std::process::id()));
    let packed = miniz_oxide::deflate::compress_to_vec_zlib(image, 6);
    let written = fs::write(&part, packed).and_then(|()| fs::rename(&part, entry));
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that is removed when it is dropped.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let folder = env::temp_dir().join(format!("candor-cuda-{name}-{}", std::process::id()));
            fs::create_dir_all(&folder).expect("a folder for a test");
            Folder(folder)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_goal_is_code_else_ptx_of_an_earlier_architecture() {
        let twelve = [50, 72, 80, 87, 90];
        assert_eq!(Goal::choose(&twelve, (8, 7)), Some(Goal::Code(87)));
        assert_eq!(Goal::choose(&twelve, (8, 6)), Some(Goal::Ptx(80)));
        assert_eq!(Goal::choose(&twelve, (12, 0)), Some(Goal::Ptx(90)));
        assert_eq!(Goal::choose(&[75, 80], (7, 2)), None);
        assert_eq!(Goal::choose(&twelve, (-1, 0)), None);
    }

    #[test]
    fn results_are_kept_and_damage_is_seen() {
        let folder = Folder::new("cache");
        let entry = folder.0.join("deep/er/matvec-sm_86-0123.z");
        assert_eq!(read(&entry), None);
        let image = b"machine code ".repeat(1000);
        write(&entry, &image).expect("written");
        assert_eq!(read(&entry).as_deref(), Some(&image[..]));
        let names = fs::read_dir(entry.parent().expect("a parent")).expect("listed");
        assert_eq!(names.count(), 1, "no part is left");
        let whole = fs::read(&entry).expect("read");
        for damaged in [&whole[..whole.len() - 1], &whole[..2], &[], &[whole.clone(), vec![0]].concat()[3..]] {
            fs::write(&entry, damaged).expect("written");
            assert_eq!(read(&entry), None);
        }
        let mut flipped = whole;
        let last = flipped.len() - 1;
        flipped[last] ^= 1;
        fs::write(&entry, flipped).expect("written");
        assert_eq!(read(&entry), None);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_not_more() {
        let folder = Folder::new("file");
        let file = folder.0.join("file");
        fs::write(&file, "").expect("written");
        assert!(write(&file.join("entry.z"), b"code").is_err());
    }

    #[test]
    fn a_missing_compiler_or_header_is_named() {
        let folder = Folder::new("toolkit");
        // The machine that runs this may have a compiler of its own.
        match find_nvrtc(std::slice::from_ref(&folder.0)).map(|_| ()) {
            Ok(()) | Err(CompileError::NoHeaders { .. }) => return,
            Err(error) => {
                let said = error.to_string();
                assert!(said.contains("libnvrtc") && said.contains(&folder.0.display().to_string()), "{said}");
            }
        }
        fs::create_dir_all(folder.0.join("lib64")).expect("a folder");
        fs::write(folder.0.join("lib64/libnvrtc.so.12"), "no library").expect("written");
        let error = find_nvrtc(std::slice::from_ref(&folder.0)).map(|_| ()).expect_err("no headers");
        assert!(matches!(error, CompileError::NoHeaders { .. }), "{error}");
        assert!(error.to_string().contains(HEADER), "{error}");
    }

    #[cfg_attr(not(cuda_compilers), ignore = "needs the CUDA compilers: make cuda-proof")]
    #[test]
    fn kernels_are_compiled_once() {
        let folder = Folder::new("compile");
        let text = "#include \"factor.cuh\"\n#include <cuda_fp16.h>\n\
            extern \"C\" __global__ void scale(float* x) { x[threadIdx.x] *= FACTOR; }";
        let sources = |factor: &str| Sources {
            families: vec![("scale".to_owned(), text.to_owned()), ("wrong".to_owned(), "int x = y;".to_owned())],
            headers: vec![("factor.cuh".to_owned(), format!("#define FACTOR {factor}"))],
        };
        let compiler = |factor: &str, capability, driver| {
            let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools");
            let tools = env::var_os("CANDOR_CUDA_COMPILERS").map_or(tools, PathBuf::from);
            let nvrtc = Nvrtc::open(&tools.join("cuda126")).expect("a compiler");
            Compiler::new(nvrtc, sources(factor), capability, driver, Some(folder.0.clone()))
        };
        let entries = || fs::read_dir(&folder.0).expect("listed").count();

        let code = compiler("2.0f", (8, 6), 12_060).expect("known").image("scale").expect("compiled");
        assert!(code.starts_with(b"\x7fELF"));
        assert_eq!(entries(), 1);
        // From the cache: what lies there is what comes.
        let again = compiler("2.0f", (8, 6), 12_060).expect("known");
        write(&folder.0.join(again.entry("scale", text)), b"kept").expect("written");
        assert_eq!(again.image("scale").as_deref(), Ok(&b"kept"[..]));
        // A damaged result is made anew.
        fs::write(folder.0.join(again.entry("scale", text)), "rubbish").expect("written");
        assert_eq!(again.image("scale").as_deref(), Ok(&code[..]));
        assert_eq!(again.image("scale").as_deref(), Ok(&code[..]));
        assert_eq!(entries(), 1);
        // Another driver, another header and another GPU are other results.
        compiler("2.0f", (8, 6), 12_080).expect("known").image("scale").expect("compiled");
        compiler("3.0f", (8, 6), 12_060).expect("known").image("scale").expect("compiled");
        let ptx = compiler("2.0f", (12, 0), 12_060).expect("known").image("scale").expect("compiled");
        assert!(ptx.ends_with(b"\0") && ptx.windows(12).any(|words| words == b".entry scale"));
        assert_eq!(entries(), 4);

        let error = again.image("wrong").expect_err("no kernel");
        assert!(error.to_string().contains("identifier \"y\" is undefined"), "{error}");
        let error = again.image("absent").expect_err("no such file");
        assert_eq!(error.to_string(), "this program has no absent kernels for sm_86");
        let error = compiler("2.0f", (3, 0), 12_060).map(|_| ()).expect_err("too old");
        assert_eq!(error.to_string(), "the CUDA compiler here (12.6) makes nothing for compute capability 3.0");
    }
}
