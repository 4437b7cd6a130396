//! The vision projectors `all_in_one_small` and `all_in_one`: patch states of several frames to three branches of
//! video tokens, which the gate's weights mix.
//!
//! Two branches (video, body) look at space and time: RegNet stage (Radosavovic et al. 2020) → 2×2×2 convolution,
//! causal in time → RegNet stage → MLP. The third (face) is an MLP a patch, then a bilinear halving of the grid.

use candor_kernels::{Activation, Device, DeviceError, Unfold};

use super::config::{ProjectorKind, VisionConfig};
use super::gate::BRANCHES;
use super::kept::{Assigned, Places, copy_blocks};
use super::layers::{Bias, LayerNorm, Linear, Loader};
use super::rows::{allocate, grow};
use super::{ModelError, Rows};

/// timm's norm-and-activation layers use PyTorch's default.
const EPS: f32 = 1e-5;
/// Kernel of the convolution over time and space.
const KERNEL: usize = 2;
/// Products of no more rows than this may be summed in another order than those of more, as fewer rows are worth another
/// kernel. Where a whole window has more, so few of it are not computed alone: the result would differ in its last bits.
const FEW_ROWS: usize = 32;
/// Hidden width of squeeze-and-excite, as a share of the block's input channels.
const SQUEEZE: f64 = 0.25;

/// One RegNet block.
struct Block<D: Device> {
    conv1: Linear<D>,
    norm1: LayerNorm<D>,
    depthwise: D::Weight,
    norm2: LayerNorm<D>,
    squeeze: Linear<D>,
    excite: Linear<D>,
    conv3: Linear<D>,
    norm3: LayerNorm<D>,
    shortcut: Option<(Linear<D>, LayerNorm<D>)>,
    squeezed: usize,
}

/// A branch over space and time.
struct Branch<D: Device> {
    before: Vec<Block<D>>,
    sampler: Linear<D>,
    after: Vec<Block<D>>,
    readout: [Linear<D>; 2],
}

/// The projector with the buffers of its forward pass.
pub struct Projector<D: Device> {
    kind: ProjectorKind,
    side: usize,
    width: usize,
    branches: [Branch<D>; 2],
    face: [Linear<D>; 2],
    work: Work<D>,
    columns: D::Buffer,
    outputs: [D::Buffer; BRANCHES],
    kept: Kept<D>,
}

/// What is kept of the last window: a frame's share of the work up to the convolution over time depends on the frame
/// alone, what follows on the frame and the one before it.
struct Kept<D: Device> {
    frames: Places<u64>,
    /// The first stages of video and body, `[places, patches, width]`.
    staged: [D::Buffer; 2],
    /// The face branch, `[places, reduced side², width]`.
    face: D::Buffer,
    pairs: Places<(Option<u64>, u64)>,
    /// Video and body, `[places, reduced side², width]`.
    tokens: [D::Buffer; 2],
    /// Frames that went through the first stages, and through the rest.
    counts: [u64; 2],
    places: WindowPlaces,
}

/// Where the frames of a window lie.
#[derive(Default)]
struct WindowPlaces {
    pairs: Vec<(Option<u64>, u64)>,
    of_frames: Assigned,
    of_pairs: Assigned,
}

/// Buffers of a block: its input and output, and what passes between its layers.
struct Work<D: Device> {
    input: D::Buffer,
    output: D::Buffer,
    first: D::Buffer,
    second: D::Buffer,
    pooled: D::Buffer,
    squeezed: D::Buffer,
    factors: D::Buffer,
}

impl<D: Device> Projector<D> {
    pub(super) fn load(
        device: &D,
        loader: &Loader<'_, D>,
        kind: ProjectorKind,
        vision: &VisionConfig,
        width: usize,
    ) -> Result<Self, ModelError> {
        let branch = |name: &str| -> Result<Branch<D>, ModelError> {
            Ok(Branch {
                before: stage(&loader.under(&format!("s1_{name}")), kind.depth(), vision.width, width)?,
                sampler: loader.convolution(
                    &format!("sampler_{name}.0"),
                    &[width, width, KERNEL, KERNEL, KERNEL],
                    Bias::Each,
                )?,
                after: stage(&loader.under(&format!("s2_{name}")), kind.depth(), width, width)?,
                readout: mlp(&loader.under(&format!("readout_{name}")), width, width)?,
            })
        };
        let none = || allocate(device, &[0]);
        Ok(Projector {
            kind,
            side: vision.side(),
            width,
            branches: [branch("video")?, branch("body")?],
            face: mlp(&loader.under("mlp_2xgelu_face"), vision.width, width)?,
            work: Work {
                input: none()?,
                output: none()?,
                first: none()?,
                second: none()?,
                pooled: none()?,
                squeezed: none()?,
                factors: none()?,
            },
            columns: none()?,
            outputs: [none()?, none()?, none()?],
            kept: Kept {
                frames: Places::new(),
                staged: [none()?, none()?],
                face: none()?,
                pairs: Places::new(),
                tokens: [none()?, none()?],
                counts: [0; 2],
                places: WindowPlaces::default(),
            },
        })
    }

    /// Frames that went through the first stages, and through what follows.
    pub(super) fn counts(&self) -> [u64; 2] {
        self.kept.counts
    }

    /// Patch states `[frames · patches, vision width]` → the three branches, each `[frames · reduced side²,
    /// decoder width]`, kept for [`Self::mix`]. Returns their rows.
    pub(super) fn forward(&mut self, device: &D, states: &Rows<D>) -> Result<usize, ModelError> {
        let frames = self.prepare(device, states)?;
        let reduced = self.kind.reduced(self.side);
        let (unfold, tokens) = (self.sampler(frames, true), frames * reduced * reduced);
        self.kept.counts = self.kept.counts.map(|count| count + frames as u64);
        for (branch, out) in self.branches.iter().zip(&mut self.outputs) {
            let work = &mut self.work;
            device.copy(&states.buffer, 0, &mut work.input, 0, states.rows() * states.width())?;
            work.run(device, &branch.before, frames, self.side, self.width)?;
            device.unfold(&work.input, unfold, &mut self.columns)?;
            branch.sampler.forward(device, &self.columns, tokens, Activation::Silu, &mut work.input)?;
            work.run(device, &branch.after, frames, reduced, self.width)?;
            run_mlp(device, &branch.readout, &work.input, tokens, &mut work.first, out)?;
        }
        let Work { first, second, .. } = &mut self.work;
        run_mlp(device, &self.face, &states.buffer, states.rows(), first, second)?;
        let (from, to) = ((self.side, self.side), (reduced, reduced));
        device.bilinear(second, frames, from, to, self.width, &mut self.outputs[2])?;
        Ok(tokens)
    }

    /// As [`Self::forward`], computing only what the last call did not: `keys` name the frames, and equal keys in this call
    /// and the last one are equal states.
    pub(super) fn forward_again(&mut self, device: &D, states: &Rows<D>, keys: &[u64]) -> Result<usize, ModelError> {
        let frames = self.prepare(device, states)?;
        if keys.len() != frames {
            return Err(ModelError::input("vision features", format!("{} names for {frames} frames", keys.len())));
        }
        let (patches, width) = (self.side * self.side, self.width);
        let reduced = self.kind.reduced(self.side);
        let (staged_size, size) = (patches * width, reduced * reduced * width);
        let Kept { staged, face, tokens, .. } = &mut self.kept;
        staged.iter_mut().try_for_each(|buffer| grow(device, buffer, &[frames, staged_size]))?;
        tokens.iter_mut().chain([face]).try_for_each(|buffer| grow(device, buffer, &[frames, size]))?;

        let mut places = std::mem::take(&mut self.kept.places);
        let done = self.missing_rows(device, states, keys, &mut places);
        self.kept.places = places;
        done?;
        Ok(frames * reduced * reduced)
    }

    /// Computes the rows that are missing, and puts all of them in the order of the frames.
    fn missing_rows(
        &mut self,
        device: &D,
        states: &Rows<D>,
        keys: &[u64],
        places: &mut WindowPlaces,
    ) -> Result<(), ModelError> {
        let frames = keys.len();
        let reduced = self.kind.reduced(self.side);
        let (patches, size) = (self.side * self.side, reduced * reduced * self.width);
        let WindowPlaces { pairs, of_frames, of_pairs } = places;
        pairs.clear();
        pairs.extend((0..frames).map(|i| (i.checked_sub(1).map(|before| keys[before]), keys[i])));
        self.kept.frames.assign(keys, of_frames);
        self.kept.pairs.assign(pairs, of_pairs);
        if !of_frames.missing.is_empty() && of_frames.missing.len() * patches <= FEW_ROWS {
            of_frames.missing.clear();
            of_frames.missing.extend(0..frames);
        }
        self.first_stages(device, states, &of_frames.missing, &of_frames.place)?;
        let runs = || of_pairs.missing.chunk_by(|&before, &next| next == before + 1).map(|run| (run[0], run.len()));
        if runs().any(|(_, count)| count * reduced * reduced <= FEW_ROWS) {
            self.over_time(device, 0, frames, &of_frames.place, &of_pairs.place)?;
            self.kept.counts[1] += frames as u64;
        } else {
            for (first, count) in runs() {
                self.over_time(device, first, count, &of_frames.place, &of_pairs.place)?;
                self.kept.counts[1] += count as u64;
            }
        }
        self.kept.counts[0] += of_frames.missing.len() as u64;

        let Projector { kept, outputs: [video, body, face_out], .. } = self;
        for (from, to, places) in [
            (&kept.tokens[0], video, &*of_pairs),
            (&kept.tokens[1], body, &*of_pairs),
            (&kept.face, face_out, &*of_frames),
        ] {
            copy_blocks(device, from, to, size, places.place.iter().copied().zip(0..))?;
        }
        kept.frames.settle(keys, of_frames);
        kept.pairs.settle(pairs, of_pairs);
        Ok(())
    }

    /// What depends on a frame alone, of the frames `missing`: first stages and face branch, to their places.
    fn first_stages(
        &mut self,
        device: &D,
        states: &Rows<D>,
        missing: &[usize],
        place: &[usize],
    ) -> Result<(), ModelError> {
        if missing.is_empty() {
            return Ok(());
        }
        let (patches, width, reduced) = (self.side * self.side, self.width, self.kind.reduced(self.side));
        let (count, from_size) = (missing.len(), patches * states.width());
        let gather = |input: &mut D::Buffer| {
            copy_blocks(device, &states.buffer, input, from_size, missing.iter().copied().zip(0..))
        };
        let to_places = || missing.iter().enumerate().map(|(i, &frame)| (i, place[frame]));
        for (branch, staged) in self.branches.iter().zip(&mut self.kept.staged) {
            let work = &mut self.work;
            gather(&mut work.input)?;
            work.run(device, &branch.before, count, self.side, width)?;
            copy_blocks(device, &work.input, staged, patches * width, to_places())?;
        }
        let Work { input, output, first, second, .. } = &mut self.work;
        gather(input)?;
        run_mlp(device, &self.face, input, count * patches, first, second)?;
        device.bilinear(second, count, (self.side, self.side), (reduced, reduced), width, output)?;
        copy_blocks(device, output, &mut self.kept.face, reduced * reduced * width, to_places())?;
        Ok(())
    }

    /// The convolution over time and what follows, of frames `first .. first + count`: video and body, to their places.
    fn over_time(
        &mut self,
        device: &D,
        first: usize,
        count: usize,
        frame_place: &[usize],
        pair_place: &[usize],
    ) -> Result<(), ModelError> {
        let (patches, width, reduced) = (self.side * self.side, self.width, self.kind.reduced(self.side));
        // The frame before is part of the input, and zeros only where there is none.
        let start = first.saturating_sub(1);
        let places = &frame_place[start..first + count];
        let (unfold, tokens) = (self.sampler(places.len(), first == 0), count * reduced * reduced);
        for (i, branch) in self.branches.iter().enumerate() {
            let work = &mut self.work;
            copy_blocks(
                device,
                &self.kept.staged[i],
                &mut work.input,
                patches * width,
                places.iter().copied().zip(0..),
            )?;
            device.unfold(&work.input, unfold, &mut self.columns)?;
            branch.sampler.forward(device, &self.columns, tokens, Activation::Silu, &mut work.input)?;
            work.run(device, &branch.after, count, reduced, width)?;
            run_mlp(device, &branch.readout, &work.input, tokens, &mut work.first, &mut work.second)?;
            let to_places = pair_place[first..first + count].iter().copied().enumerate();
            copy_blocks(device, &work.second, &mut self.kept.tokens[i], reduced * reduced * width, to_places)?;
        }
        Ok(())
    }

    /// Takes memory for the frames of `states`; returns how many they are.
    fn prepare(&mut self, device: &D, states: &Rows<D>) -> Result<usize, ModelError> {
        let patches = self.side * self.side;
        let frames = states.rows() / patches;
        if frames == 0 || !states.rows().is_multiple_of(patches) {
            let reason = format!("{} states are no whole number of frames of {patches}", states.rows());
            return Err(ModelError::input("vision features", reason));
        }
        let reduced = self.kind.reduced(self.side);
        let tokens = frames * reduced * reduced;
        let column = self.sampler(frames, true).column();
        let Work { input, output, first, second, .. } = &mut self.work;
        for buffer in [input, output, first, second] {
            grow(device, buffer, &[frames, patches, self.width.max(states.width())])?;
        }
        grow(device, &mut self.columns, &[tokens, column])?;
        for output in &mut self.outputs {
            grow(device, output, &[tokens, self.width])?;
        }
        Ok(frames)
    }

    /// Σ gate · branch of the last [`Self::forward`], which returned `tokens` → `[tokens, decoder width]`.
    pub(super) fn mix(
        &self,
        device: &D,
        tokens: usize,
        gate: [f32; BRANCHES],
        out: &mut Rows<D>,
    ) -> Result<(), ModelError> {
        out.resize(device, tokens, self.width)?;
        let [video, body, face] = &self.outputs;
        device.weighted_sum(&[video, body, face], &gate, tokens * self.width, &mut out.buffer)?;
        Ok(())
    }

    /// Branch `index` (video, body, face) of the last [`Self::forward`] on the host.
    pub(super) fn branch(&self, device: &D, index: usize, tokens: usize) -> Result<Vec<f32>, ModelError> {
        let mut out = vec![0.0; tokens * self.width];
        device.read(&self.outputs[index], 0, &mut out)?;
        Ok(out)
    }

    /// The 2×2×2 convolution, in which no frame sees a later one. The clip's first frame sees zeros before it; elsewhere
    /// the first of `frames` is only seen by the second.
    fn sampler(&self, frames: usize, from_start: bool) -> Unfold {
        let pad = self.kind.padding();
        Unfold {
            size: [frames, self.side, self.side],
            channels: self.width,
            kernel: [KERNEL; 3],
            stride: [1, KERNEL, KERNEL],
            pad_before: [usize::from(from_start), pad, pad],
            pad_after: [0, pad, pad],
        }
    }
}

impl<D: Device> Work<D> {
    /// Runs blocks over `input` `[frames, side, side, channels]`; the result is in `input` again.
    fn run(
        &mut self,
        device: &D,
        blocks: &[Block<D>],
        frames: usize,
        side: usize,
        width: usize,
    ) -> Result<(), ModelError> {
        grow(device, &mut self.pooled, &[frames, width])?;
        grow(device, &mut self.factors, &[frames, width])?;
        for block in blocks {
            grow(device, &mut self.squeezed, &[frames, block.squeezed])?;
            self.block(device, block, frames, side, width)?;
            std::mem::swap(&mut self.input, &mut self.output);
        }
        Ok(())
    }

    fn block(
        &mut self,
        device: &D,
        block: &Block<D>,
        frames: usize,
        side: usize,
        width: usize,
    ) -> Result<(), DeviceError> {
        let (pixels, identity) = (side * side, Activation::Identity);
        let (rows, len) = (frames * pixels, frames * pixels * width);
        let Work { input, output, first, second, pooled, squeezed, factors } = self;
        block.conv1.forward(device, input, rows, identity, first)?;
        block.norm1.forward(device, first, rows, second)?;
        device.activate(Activation::Silu, second, len)?;
        device.depthwise3x3(second, [frames, side, side], &block.depthwise, None, first)?;
        block.norm2.forward(device, first, rows, second)?;
        device.activate(Activation::Silu, second, len)?;
        device.mean_rows(second, frames, pixels, width, pooled)?;
        block.squeeze.forward(device, pooled, frames, Activation::Silu, squeezed)?;
        block.excite.forward(device, squeezed, frames, Activation::Sigmoid, factors)?;
        device.scale_groups(second, frames, pixels, width, factors)?;
        block.conv3.forward(device, second, rows, identity, first)?;
        block.norm3.forward(device, first, rows, output)?;
        match &block.shortcut {
            None => device.add(output, input, len)?,
            Some((conv, norm)) => {
                conv.forward(device, input, rows, identity, first)?;
                norm.forward(device, first, rows, second)?;
                device.add(output, second, len)?;
            }
        }
        device.activate(Activation::Silu, output, len)
    }
}

fn stage<D: Device>(loader: &Loader<'_, D>, depth: usize, from: usize, to: usize) -> Result<Vec<Block<D>>, ModelError> {
    (1..=depth)
        .map(|i| {
            let from = if i == 1 { from } else { to };
            let l = loader.under(&format!("b{i}"));
            let pointwise =
                |name: &str, from: usize| l.convolution(&format!("{name}.conv"), &[to, from, 1, 1], Bias::None);
            let norm = |name: &str| l.layer_norm(&format!("{name}.bn"), to, EPS);
            let squeezed = squeezed(from);
            Ok(Block {
                conv1: pointwise("conv1", from)?,
                norm1: norm("conv1")?,
                depthwise: l.weight("conv2.conv.weight", &[to, 1, 3, 3])?,
                norm2: norm("conv2")?,
                squeeze: l.convolution("se.fc1", &[squeezed, to, 1, 1], Bias::Each)?,
                excite: l.convolution("se.fc2", &[to, squeezed, 1, 1], Bias::Each)?,
                conv3: pointwise("conv3", to)?,
                norm3: norm("conv3")?,
                shortcut: (from != to)
                    .then(|| Ok::<_, ModelError>((pointwise("downsample", from)?, norm("downsample")?)))
                    .transpose()?,
                squeezed,
            })
        })
        .collect()
}

/// Hidden width of squeeze-and-excite; Python's `round`, halves to even.
fn squeezed(from: usize) -> usize {
    (from as f64 * SQUEEZE).round_ties_even() as usize
}

fn mlp<D: Device>(loader: &Loader<'_, D>, from: usize, to: usize) -> Result<[Linear<D>; 2], ModelError> {
    Ok([loader.linear("0", from, to, Bias::Each)?, loader.linear("2", to, to, Bias::Each)?])
}

fn run_mlp<D: Device>(
    device: &D,
    [first, second]: &[Linear<D>; 2],
    x: &D::Buffer,
    rows: usize,
    inner: &mut D::Buffer,
    out: &mut D::Buffer,
) -> Result<(), DeviceError> {
    first.forward(device, x, rows, Activation::Gelu, inner)?;
    second.forward(device, inner, rows, Activation::Identity, out)
}
