//! NVIDIA's run-time compiler, NVRTC, opened from a folder: CUDA C++ in, PTX and machine code out, with no GPU and no
//! driver.
//!
//! build.rs compiles the kernels with it, src/cuda/compile.rs does where the program runs, and tests take this file in by
//! `#[path]`; so it needs only `libloading`.
#![allow(dead_code, unreachable_pub)] // Each of them uses a part of it.

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

use libloading::Library;

/// Options that every kernel is compiled with, whoever compiles it.
pub const OPTIONS: &[&str] = &["-std=c++17"];

/// Where the library lies below a folder: pip's packages of CUDA 12 and 13, and toolkits.
const LIBRARY_FOLDERS: &[&str] = &["nvidia/cuda_nvrtc/lib", "nvidia/cu13/lib", "lib64", "lib"];
/// Where the headers lie.
const HEADER_FOLDERS: &[&str] = &["nvidia/cuda_runtime/include", "nvidia/cu13/include", "include"];
/// How the library's name begins.
const LIBRARY: &str = "libnvrtc.so.";

type Program = *mut c_void;
type ProgramSize = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type ProgramBytes = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// An open compiler. It is never unloaded.
pub struct Nvrtc {
    version: (i32, i32),
    headers: PathBuf,
    architectures: Vec<u32>,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log: (ProgramSize, ProgramBytes),
    ptx: (ProgramSize, ProgramBytes),
    cubin: (ProgramSize, ProgramBytes),
}

/// What the compiler made of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// PTX, as text.
    pub ptx: String,
    /// Machine code (ELF); empty for `--gpu-architecture=compute_…`.
    pub cubin: Vec<u8>,
    /// What the compiler said: warnings, and figures with `--ptxas-options=-v`.
    pub log: String,
}

impl Nvrtc {
    /// Opens the compiler of a folder, as scripts/setup-cuda.sh or a CUDA toolkit lays it out.
    pub fn open(folder: &Path) -> Result<Nvrtc, String> {
        let library = file(folder, LIBRARY_FOLDERS, LIBRARY)?;
        let builtins = file(folder, LIBRARY_FOLDERS, "libnvrtc-builtins.so.")?;
        let header = file(folder, HEADER_FOLDERS, "cuda_fp16.h")?;
        let headers = header.parent().map(Path::to_path_buf).unwrap_or_default();
        // NVRTC 13 looks for its builtins by name alone: they must be there before they are asked for.
        load(builtins.as_os_str())?;
        Nvrtc::from_library(load(library.as_os_str())?, headers)
    }

    /// Opens the compiler that the system finds by the library's `name`; CUDA's headers are in the folder `headers`.
    pub fn open_named(name: &str, headers: &Path) -> Result<Nvrtc, String> {
        Nvrtc::from_library(load(OsStr::new(name))?, headers.to_path_buf())
    }

    fn from_library(library: &'static Library, headers: PathBuf) -> Result<Nvrtc, String> {
        // SAFETY: the names and types are those of nvrtc.h, the same since CUDA 11.2.
        unsafe {
            let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int = symbol(library, "nvrtcVersion")?;
            let count: unsafe extern "C" fn(*mut c_int) -> c_int = symbol(library, "nvrtcGetNumSupportedArchs")?;
            let list: unsafe extern "C" fn(*mut c_int) -> c_int = symbol(library, "nvrtcGetSupportedArchs")?;
            let (mut major, mut minor, mut len) = (0, 0, 0);
            version(&mut major, &mut minor);
            count(&mut len);
            let mut architectures = vec![0; len.max(0) as usize];
            list(architectures.as_mut_ptr());
            Ok(Nvrtc {
                version: (major, minor),
                headers,
                architectures: architectures.into_iter().filter_map(|number| u32::try_from(number).ok()).collect(),
                error_string: symbol(library, "nvrtcGetErrorString")?,
                create: symbol(library, "nvrtcCreateProgram")?,
                destroy: symbol(library, "nvrtcDestroyProgram")?,
                compile: symbol(library, "nvrtcCompileProgram")?,
                log: (symbol(library, "nvrtcGetProgramLogSize")?, symbol(library, "nvrtcGetProgramLog")?),
                ptx: (symbol(library, "nvrtcGetPTXSize")?, symbol(library, "nvrtcGetPTX")?),
                cubin: (symbol(library, "nvrtcGetCUBINSize")?, symbol(library, "nvrtcGetCUBIN")?),
            })
        }
    }

    /// Major and minor version.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// The architectures that it compiles for: 87 for sm_87.
    pub fn architectures(&self) -> &[u32] {
        &self.architectures
    }

    /// The folder of CUDA's own headers.
    pub fn headers(&self) -> &Path {
        &self.headers
    }

    /// Compiles `source`, which messages call `name`, for the architecture that is among `options`
    /// (`--gpu-architecture=sm_87`). It may include `headers`, by their names, and CUDA's own.
    pub fn compile(
        &self,
        name: &str,
        source: &str,
        headers: &[(String, String)],
        options: &[&str],
    ) -> Result<Compiled, String> {
        let program = Open::new(self, name, source, headers)?;
        let include = format!("-I{}", self.headers.display());
        let options = Strings::new(OPTIONS.iter().copied().chain(options.iter().copied()).chain([include.as_str()]))?;
        // SAFETY: the program is open, and the options live through the call.
        let code = unsafe { (self.compile)(program.handle, options.len(), options.pointers.as_ptr()) };
        let log = text(program.output(&self.log)?);
        if code != 0 {
            return Err(format!("{name}: {}\n{log}", self.error(code)));
        }
        Ok(Compiled { ptx: text(program.output(&self.ptx)?), cubin: program.output(&self.cubin)?, log })
    }

    fn error(&self, code: c_int) -> String {
        // SAFETY: the function takes any number and gives a constant, terminated string.
        unsafe { CStr::from_ptr((self.error_string)(code)) }.to_string_lossy().into_owned()
    }

    fn check(&self, code: c_int) -> Result<(), String> {
        if code == 0 { Ok(()) } else { Err(self.error(code)) }
    }
}

/// A program inside the compiler, given back when it is dropped.
struct Open<'a> {
    nvrtc: &'a Nvrtc,
    handle: Program,
}

impl<'a> Open<'a> {
    fn new(nvrtc: &'a Nvrtc, name: &str, source: &str, headers: &[(String, String)]) -> Result<Self, String> {
        let (name, source) = (c_string(name)?, c_string(source)?);
        let texts = Strings::new(headers.iter().map(|(_, text)| text.as_str()))?;
        let names = Strings::new(headers.iter().map(|(name, _)| name.as_str()))?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: every string is terminated and lives through the call, which copies them; both lists have `len` of them.
        let code = unsafe {
            (nvrtc.create)(
                &mut handle,
                source.as_ptr(),
                name.as_ptr(),
                texts.len(),
                texts.pointers.as_ptr(),
                names.pointers.as_ptr(),
            )
        };
        nvrtc.check(code)?;
        Ok(Open { nvrtc, handle })
    }

    /// One of the outputs.
    fn output(&self, (size, bytes): &(ProgramSize, ProgramBytes)) -> Result<Vec<u8>, String> {
        let mut len = 0;
        // SAFETY: the program is open and `len` is writable.
        self.nvrtc.check(unsafe { size(self.handle, &mut len) })?;
        let mut output = vec![0; len];
        if len > 0 {
            // SAFETY: as above, and the buffer has the size that the compiler told.
            self.nvrtc.check(unsafe { bytes(self.handle, output.as_mut_ptr().cast()) })?;
        }
        Ok(output)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        // SAFETY: the program is open, and nobody uses it after this.
        unsafe { (self.nvrtc.destroy)(&mut self.handle) };
    }
}

/// A list of C strings.
struct Strings {
    pointers: Vec<*const c_char>,
    _strings: Vec<CString>,
}

impl Strings {
    fn new<'a>(strings: impl Iterator<Item = &'a str>) -> Result<Self, String> {
        let strings = strings.map(c_string).collect::<Result<Vec<_>, _>>()?;
        Ok(Strings { pointers: strings.iter().map(|string| string.as_ptr()).collect(), _strings: strings })
    }

    fn len(&self) -> c_int {
        self.pointers.len() as c_int
    }
}

fn c_string(string: &str) -> Result<CString, String> {
    CString::new(string).map_err(|_| "a zero byte in a source, a name or an option".to_owned())
}

/// Bytes up to the zero that ends them, as text.
fn text(bytes: Vec<u8>) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).trim_end().to_owned()
}

/// The first file, by name, that begins with `prefix` in one of the `places` below `folder`.
fn file(folder: &Path, places: &[&str], prefix: &str) -> Result<PathBuf, String> {
    let files = |place: &&str| {
        let entries = std::fs::read_dir(folder.join(place)).into_iter().flatten().flatten();
        let fits = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
        entries.map(|entry| entry.path()).filter(fits).min()
    };
    places.iter().find_map(files).ok_or_else(|| format!("no {prefix} in {} ({})", folder.display(), places.join(", ")))
}

/// Whether a folder has the compiler's library, with or without what else it needs.
pub fn has_library(folder: &Path) -> bool {
    file(folder, LIBRARY_FOLDERS, LIBRARY).is_ok()
}

fn load(name: &OsStr) -> Result<&'static Library, String> {
    // SAFETY: NVIDIA's compiler; it does nothing when it is loaded, and it is never unloaded.
    let library = unsafe { Library::new(name) }.map_err(|error| error.to_string())?;
    Ok(Box::leak(Box::new(library)))
}

/// # Safety
/// `T` must be the type of the function `name`.
unsafe fn symbol<T: Copy>(library: &'static Library, name: &str) -> Result<T, String> {
    // SAFETY: the caller's promise.
    unsafe { library.get::<T>(name) }.map(|symbol| *symbol).map_err(|error| error.to_string())
}
