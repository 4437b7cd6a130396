//! The Whisper encoder and its projector: sound or its log-mel features to audio tokens.

use candor_kernels::{Activation, Device, Unfold};

use super::config::AudioConfig;
use super::encoder::{Encoder, EncoderShape, Names, NormOrder};
use super::layers::{Bias, LayerNorm, Linear, Loader};
use super::mel::LogMel;
use super::rows::{allocate, grow};
use super::{ModelError, Rows};

const NAMES: Names = Names {
    query: "self_attn.q_proj",
    key: "self_attn.k_proj",
    value: "self_attn.v_proj",
    output: "self_attn.out_proj",
    attention_norm: "self_attn_layer_norm",
    up: "fc1",
    down: "fc2",
    mlp_norm: "final_layer_norm",
};

/// Width of both convolutions' kernels.
const KERNEL: usize = 3;
/// Step of the second convolution, and so mel columns a state.
const STRIDE: usize = 2;
/// States that are averaged into one audio token.
const STATES_A_TOKEN: usize = 3;
/// PyTorch's default, which Whisper keeps.
const EPS: f32 = 1e-5;

/// Tower and projector with the buffers of their forward pass.
pub struct AudioTower<D: Device> {
    config: AudioConfig,
    conv1: Linear<D>,
    conv2: Linear<D>,
    positions: D::Weight,
    encoder: Encoder<D>,
    norm: LayerNorm<D>,
    projector: [Linear<D>; 2],
    width_out: usize,
    host: Vec<f32>,
    /// There from the first samples on.
    log_mel: Option<LogMel<D>>,
    /// Log-mel features `[2 · positions, mels]`.
    mel: D::Buffer,
    columns: D::Buffer,
    convolved: D::Buffer,
    pooled: D::Buffer,
    inner: D::Buffer,
}

impl<D: Device> AudioTower<D> {
    pub(super) fn load(
        device: &D,
        tower: &Loader<'_, D>,
        projector: &Loader<'_, D>,
        config: &AudioConfig,
        width_out: usize,
    ) -> Result<Self, ModelError> {
        let AudioConfig { width, mels, positions, .. } = *config;
        let shape = EncoderShape {
            width,
            heads: config.heads,
            mlp: config.mlp,
            layers: config.layers,
            eps: EPS,
            activation: config.activation,
            order: NormOrder::Before,
            key_bias: Bias::None,
        };
        let none = || allocate(device, &[0]);
        Ok(AudioTower {
            config: config.clone(),
            conv1: tower.convolution("conv1", &[width, mels, KERNEL], Bias::Each)?,
            conv2: tower.convolution("conv2", &[width, width, KERNEL], Bias::Each)?,
            positions: tower.weight("embed_positions.weight", &[positions, width])?,
            encoder: Encoder::load(device, &tower.under("layers"), &NAMES, shape)?,
            norm: tower.layer_norm("layer_norm", width, EPS)?,
            projector: [
                projector.linear("0", width, width_out, Bias::Each)?,
                projector.linear("2", width_out, width_out, Bias::Each)?,
            ],
            width_out,
            host: Vec::new(),
            log_mel: None,
            mel: none()?,
            columns: none()?,
            convolved: none()?,
            pooled: none()?,
            inner: none()?,
        })
    }

    /// Log-mel features `[mels, 2 · positions]` → states `[positions, width]`.
    pub(super) fn states(&mut self, device: &D, mel: &[f32], out: &mut Rows<D>) -> Result<(), ModelError> {
        let AudioConfig { mels, positions, .. } = self.config;
        let columns = STRIDE * positions;
        if mel.len() != mels * columns {
            let reason = format!("{} values, [{mels}, {columns}] are needed", mel.len());
            return Err(ModelError::input("mel", reason));
        }
        self.host.clear();
        self.host.extend((0..columns).flat_map(|t| (0..mels).map(move |m| mel[m * columns + t])));
        grow(device, &mut self.mel, &[columns, mels])?;
        device.write(&self.host, &mut self.mel, 0)?;
        self.encode(device, out)
    }

    /// 16 kHz samples of any length → states `[positions, width]`.
    pub(super) fn states_of(&mut self, device: &D, samples: &[f32], out: &mut Rows<D>) -> Result<(), ModelError> {
        self.listen(device, samples)?;
        self.encode(device, out)
    }

    /// 16 kHz samples of any length → log-mel features `[mels, 2 · positions]`.
    pub(super) fn log_mel(&mut self, device: &D, samples: &[f32]) -> Result<Vec<f32>, ModelError> {
        let AudioConfig { mels, positions, .. } = self.config;
        self.listen(device, samples)?;
        let mut by_column = vec![0.0; STRIDE * positions * mels];
        device.read(&self.mel, 0, &mut by_column)?;
        Ok((0..mels).flat_map(|m| by_column.iter().skip(m).step_by(mels).copied()).collect())
    }

    /// Samples → log-mel features, which stay on the device.
    fn listen(&mut self, device: &D, samples: &[f32]) -> Result<(), ModelError> {
        let log_mel = match &mut self.log_mel {
            Some(log_mel) => log_mel,
            none => none.insert(LogMel::new(device, self.config.mels, STRIDE * self.config.positions)?),
        };
        log_mel.compute(device, samples, [&mut self.columns, &mut self.convolved], &mut self.mel)
    }

    /// Log-mel features on the device → states.
    fn encode(&mut self, device: &D, out: &mut Rows<D>) -> Result<(), ModelError> {
        let AudioConfig { width, mels, positions, activation, .. } = self.config;
        let columns = STRIDE * positions;
        let first = unfold(columns, mels, 1);
        let second = unfold(columns, width, STRIDE);
        grow(device, &mut self.columns, &[columns, first.column().max(second.column())])?;
        grow(device, &mut self.convolved, &[columns, width])?;
        out.resize(device, positions, width)?;
        device.unfold(&self.mel, first, &mut self.columns)?;
        self.conv1.forward(device, &self.columns, columns, activation, &mut self.convolved)?;
        device.unfold(&self.convolved, second, &mut self.columns)?;
        self.conv2.forward(device, &self.columns, positions, activation, &mut out.buffer)?;
        device.add_positions(&mut out.buffer, positions, &self.positions, 0)?;
        self.encoder.forward(device, &mut out.buffer, 1, positions)?;
        self.norm.forward(device, &out.buffer, positions, &mut self.convolved)?;
        device.copy(&self.convolved, 0, &mut out.buffer, 0, positions * width)?;
        Ok(())
    }

    /// States `[positions, width]` → audio tokens `[positions / 3, decoder width]`.
    pub(super) fn project(&mut self, device: &D, states: &Rows<D>, out: &mut Rows<D>) -> Result<(), ModelError> {
        let tokens = self.config.positions / STATES_A_TOKEN;
        grow(device, &mut self.pooled, &[tokens, self.config.width])?;
        grow(device, &mut self.inner, &[tokens, self.width_out])?;
        out.resize(device, tokens, self.width_out)?;
        device.mean_rows(&states.buffer, tokens, STATES_A_TOKEN, self.config.width, &mut self.pooled)?;
        let [first, second] = &self.projector;
        first.forward(device, &self.pooled, tokens, Activation::Gelu, &mut self.inner)?;
        second.forward(device, &self.inner, tokens, Activation::Identity, &mut out.buffer)?;
        Ok(())
    }
}

/// A convolution over time with one zero on each side.
fn unfold(columns: usize, channels: usize, stride: usize) -> Unfold {
    Unfold {
        size: [1, 1, columns],
        channels,
        kernel: [1, 1, KERNEL],
        stride: [1, 1, stride],
        pad_before: [0, 0, 1],
        pad_after: [0, 0, 1],
    }
}
