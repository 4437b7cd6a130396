//! Runs of launches that are repeated, as CUDA graphs: the GPU gets a whole run at once. Between runs only the launches whose
//! arguments changed are told anew.

use cudarc::driver::{CudaFunction, DriverError, sys};
use std::cell::RefCell;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use super::arena::GivenBack;
use super::driver::{Gpu, failed};
use super::launch::{Argument, Grid};
use crate::device::{DeviceError, Result};

const OP: &str = "replay";

/// A launch, with its arguments one behind the other.
#[derive(Debug, PartialEq, Eq)]
struct Launch {
    function: sys::CUfunction,
    grid: Grid,
    arguments: Vec<u8>,
    /// Where each begins.
    offsets: Vec<usize>,
}

/// What is kept of a run of launches.
#[derive(Debug, Default)]
pub struct CudaReplay {
    launches: Vec<Launch>,
    graph: Option<Graph>,
}

/// The launches as a graph, each behind the one before it.
#[derive(Debug)]
struct Graph {
    context: Arc<cudarc::driver::CudaContext>,
    graph: sys::CUgraph,
    runnable: sys::CUgraphExec,
    nodes: Vec<sys::CUgraphNode>,
}

// SAFETY: handles of the driver, which may be used from any thread, by one at a time.
unsafe impl Send for CudaReplay {}

/// The run that this thread records.
struct Recording {
    /// The GPU whose launches it takes.
    gpu: *const Gpu,
    launches: Vec<Launch>,
    /// How many launches there are so far, and which of them are not as they were.
    count: usize,
    changed: Vec<usize>,
    /// Whether other kernels are launched than last time, or more of them.
    others: bool,
    /// The position that was set in this run ([`position`]).
    position: Option<usize>,
}

thread_local! {
    static RECORDING: RefCell<Option<Recording>> = const { RefCell::new(None) };
}

/// How many threads record, and memory that was let go of meanwhile: launches that are recorded may use it.
static KEPT: Mutex<(usize, Vec<GivenBack>)> = Mutex::new((0, Vec::new()));

/// While there is one of these, no memory goes.
struct Keeps;

impl Keeps {
    fn new() -> Self {
        KEPT.lock().unwrap_or_else(PoisonError::into_inner).0 += 1;
        Keeps
    }
}

impl Drop for Keeps {
    fn drop(&mut self) {
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        kept.0 -= 1;
        let gone = if kept.0 == 0 { std::mem::take(&mut kept.1) } else { Vec::new() };
        drop(kept);
        // This waits for what is under way.
        drop(gone);
    }
}

/// Has memory go when nothing is recorded any more, or at once.
pub(super) fn keep(memory: GivenBack) {
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if kept.0 > 0 {
        kept.1.push(memory);
    } else {
        drop(kept);
        drop(memory);
    }
}

/// Whether this thread records launches of the GPU.
pub(super) fn is_recording(gpu: &Gpu) -> bool {
    of_recording(gpu, |_| ()).is_some()
}

fn of_recording<T>(gpu: &Gpu, does: impl FnOnce(&mut Recording) -> T) -> Option<T> {
    RECORDING
        .with_borrow_mut(|recording| recording.as_mut().filter(|recording| std::ptr::eq(recording.gpu, gpu)).map(does))
}

/// The position that the run in the making has set, to be changed; none where nothing is recorded.
pub(super) fn position<T>(gpu: &Gpu, does: impl FnOnce(&mut Option<usize>) -> T) -> Option<T> {
    of_recording(gpu, |recording| does(&mut recording.position))
}

/// Keeps a launch for later; false if nothing is recorded.
///
/// # Safety
///
/// As [`super::launch::launch`].
pub(super) unsafe fn record(gpu: &Gpu, function: &CudaFunction, grid: Grid, arguments: &[Argument<'_>]) -> bool {
    of_recording(gpu, |recording| {
        let Recording { launches, count, changed, others, .. } = recording;
        let (index, function) = (*count, function.cu_function());
        *count += 1;
        // What a node of a graph can be told anew: all but these.
        let known = launches.get(index).filter(|known| {
            (known.function, known.grid.cooperative, known.offsets.len())
                == (function, grid.cooperative, arguments.len())
        });
        let bytes = |argument: &Argument<'_>| {
            // SAFETY: the value is there, with so many bytes, all of them written: what kernels take has none between fields.
            unsafe { std::slice::from_raw_parts(argument.value.cast::<u8>(), argument.bytes) }
        };
        if let Some(known) = known {
            let same = |(argument, &offset): (&Argument<'_>, &usize)| {
                known.arguments.get(offset..offset + argument.bytes) == Some(bytes(argument))
            };
            if known.grid == grid && arguments.iter().zip(&known.offsets).all(same) {
                return;
            }
        }
        let is_known = known.is_some();
        let mut launch = Launch { function, grid, arguments: Vec::new(), offsets: Vec::with_capacity(arguments.len()) };
        for argument in arguments {
            launch.arguments.resize(launch.arguments.len().next_multiple_of(16), 0);
            launch.offsets.push(launch.arguments.len());
            launch.arguments.extend_from_slice(bytes(argument));
        }
        if is_known {
            changed.push(index);
            launches[index] = launch;
        } else {
            *others = true;
            launches.truncate(index);
            launches.push(launch);
        }
    })
    .is_some()
}

/// Refuses what cannot be recorded.
pub(super) fn refuse(gpu: &Gpu, op: &'static str) -> Result<()> {
    match is_recording(gpu) {
        true => Err(DeviceError::Argument { op, reason: "it cannot be a part of what is replayed".to_owned() }),
        false => Ok(()),
    }
}

/// Ends the recording, whatever happens.
struct Ends;

impl Drop for Ends {
    fn drop(&mut self) {
        RECORDING.set(None);
    }
}

/// Records what `operations` launch, then runs it, for as long as there is what `begins` gives; it is told of the position that the
/// run sets.
pub(super) fn replay<S>(
    gpu: &Gpu,
    replay: &mut CudaReplay,
    operations: impl FnOnce() -> Result<()>,
    begins: impl FnOnce(Option<usize>) -> S,
) -> Result<()> {
    if RECORDING.with_borrow(Option::is_some) {
        // A run within a run is a part of it.
        return operations();
    }
    let _keeps = Keeps::new();
    let launches = std::mem::take(&mut replay.launches);
    let before = launches.len();
    RECORDING.set(Some(Recording { gpu, launches, count: 0, changed: Vec::new(), others: false, position: None }));
    let ends = Ends;
    let done = operations();
    let recording = RECORDING.take();
    drop(ends);
    let Some(mut recording) = recording.filter(|_| done.is_ok()) else {
        // Some launches were changed and not told.
        replay.graph = None;
        return done;
    };
    let same = recording.count == before && !recording.others;
    recording.launches.truncate(recording.count);
    replay.launches = recording.launches;
    if replay.launches.is_empty() {
        return Ok(());
    }
    gpu.context.bind_to_thread().map_err(failed(OP, 0))?;
    let _sequence = begins(recording.position);
    let run = match &mut replay.graph {
        Some(graph) if same => graph.update(&replay.launches, &recording.changed).and_then(|()| graph.run(gpu)),
        _ => Graph::new(gpu, &replay.launches).and_then(|graph| replay.graph.insert(graph).run(gpu)),
    };
    run.map_err(|error| {
        replay.graph = None;
        failed(OP, 0)(error)
    })
}

impl Launch {
    /// As the driver takes it; the addresses are those of the arguments.
    fn parameters(&self, pointers: &mut Vec<*mut c_void>) -> sys::CUDA_KERNEL_NODE_PARAMS {
        pointers.clear();
        pointers
            .extend(self.offsets.iter().map(|&offset| self.arguments[offset..].as_ptr().cast_mut().cast::<c_void>()));
        let [x, y, z] = self.grid.blocks.map(|blocks| blocks as u32);
        sys::CUDA_KERNEL_NODE_PARAMS {
            func: self.function,
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: self.grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.grid.shared as u32,
            kernelParams: pointers.as_mut_ptr(),
            extra: std::ptr::null_mut(),
            kern: std::ptr::null_mut(),
            ctx: std::ptr::null_mut(),
        }
    }
}

impl Graph {
    fn new(gpu: &Gpu, launches: &[Launch]) -> std::result::Result<Self, DriverError> {
        let mut graph = Graph {
            context: Arc::clone(&gpu.context),
            graph: std::ptr::null_mut(),
            runnable: std::ptr::null_mut(),
            nodes: Vec::with_capacity(launches.len()),
        };
        // SAFETY: the function is there (driver::FUNCTIONS), and writes the handle.
        unsafe { sys::cuGraphCreate(&raw mut graph.graph, 0) }.result()?;
        let mut pointers = Vec::new();
        for launch in launches {
            let parameters = launch.parameters(&mut pointers);
            let (before, count) =
                graph.nodes.last().map_or((std::ptr::null(), 0), |last| (std::ptr::from_ref(last), 1));
            let mut node = std::ptr::null_mut();
            // SAFETY: the graph is the one just made, the node before it one of its own, and the parameters are those of the
            // function, which the call copies.
            unsafe { sys::cuGraphAddKernelNode_v2(&raw mut node, graph.graph, before, count, &raw const parameters) }
                .result()?;
            if launch.grid.cooperative {
                let attribute = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
                let value = sys::CUlaunchAttributeValue { cooperative: 1 };
                // SAFETY: the node is a launch, and the value that of the attribute.
                unsafe { sys::cuGraphKernelNodeSetAttribute(node, attribute, &raw const value) }.result()?;
            }
            graph.nodes.push(node);
        }
        // SAFETY: the graph is whole.
        unsafe { sys::cuGraphInstantiateWithFlags(&raw mut graph.runnable, graph.graph, 0) }.result()?;
        log::debug!("a graph of {} launches", launches.len());
        Ok(graph)
    }

    /// Gives the launches of these numbers the arguments that they have now.
    fn update(&mut self, launches: &[Launch], changed: &[usize]) -> std::result::Result<(), DriverError> {
        let mut pointers = Vec::new();
        for &index in changed {
            let parameters = launches[index].parameters(&mut pointers);
            // SAFETY: node and graph are there as long as this, and the parameters are those of the function, which the call copies.
            unsafe { sys::cuGraphExecKernelNodeSetParams_v2(self.runnable, self.nodes[index], &raw const parameters) }
                .result()?;
        }
        Ok(())
    }

    fn run(&self, gpu: &Gpu) -> std::result::Result<(), DriverError> {
        // SAFETY: graph and stream are of the context that is current.
        unsafe { sys::cuGraphLaunch(self.runnable, gpu.stream.cu_stream()) }.result()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let bound = self.context.bind_to_thread();
        // SAFETY: nobody else has these handles; the driver waits for runs that are under way. An error can only be that of a
        // launch before, which was or will be told.
        unsafe {
            if bound.is_ok() && !self.runnable.is_null() {
                let _ = sys::cuGraphExecDestroy(self.runnable);
            }
            if bound.is_ok() && !self.graph.is_null() {
                let _ = sys::cuGraphDestroy(self.graph);
            }
        }
    }
}
