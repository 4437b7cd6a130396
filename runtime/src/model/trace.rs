//! Runs the stages on given tensors and keeps what each of them gives: the tool for porting a checkpoint, for
//! comparing with another implementation, and for bug reports.

use candor_kernels::{Choice, Device};

use super::{Classifier, LanguageModel, Model, ModelError, Piece, Rows};
use crate::text::Mask;
use crate::weights::Checkpoint;

/// Ids that stand for the video and the audio tokens in a prompt.
pub const VIDEO_ID: i64 = -201;
/// See [`VIDEO_ID`].
pub const AUDIO_ID: i64 = -202;

/// A named result.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// Its name, `out.*`.
    pub name: &'static str,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements.
    pub values: Values,
}

/// Elements of an [`Output`].
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Real numbers.
    F32(Vec<f32>),
    /// Token ids.
    I64(Vec<i64>),
}

impl Output {
    /// The elements as little-endian bytes.
    pub fn bytes(&self) -> Vec<u8> {
        match &self.values {
            Values::F32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Values::I64(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }
}

/// Runs a model on `in.pixel_values` `[frames, 3, side, side]`, `in.samples` `[n]` (16 kHz) or `in.mel` `[mels, 2 · positions]`,
/// `in.bert_ids` `[n]` and `in.prompt_ids` `[n]` (−201 for the video, −202 for the audio tokens). A stage whose inputs are absent is left out;
/// a prompt that names tokens which could not be computed is an error. Then `new_tokens` tokens are generated greedily.
///
/// Gives `out.vision` `[frames, patches, vision width]`, `out.video`, `out.body`, `out.face`, `out.video_tokens` and
/// `out.audio_tokens` `[tokens, decoder width]`, `out.gate` `[3]`, `out.mel` `[mels, 2 · positions]` of samples, `out.audio_tower`
/// `[positions, audio width]`,
/// `out.inputs_embeds` `[positions, decoder width]`, `out.logits` `[positions, vocabulary]`, `out.generated` `[k]`.
pub fn trace_model<D: Device>(
    model: &mut Model<D>,
    inputs: &Checkpoint,
    new_tokens: usize,
) -> Result<Vec<Output>, ModelError> {
    let mut outputs = Vec::new();
    let device = model.device().clone();
    let width = model.config().decoder.width;

    let gate = match ids(inputs, "in.bert_ids")? {
        Some(instruction) => Some(model.gate(&unsigned("in.bert_ids", &instruction)?)?),
        None => None,
    };
    let mut video_tokens = None;
    if let Some((shape, pixels)) = floats(inputs, "in.pixel_values")? {
        let side = model.config().vision.image;
        if shape.len() != 4 || shape[1..] != [3, side, side] {
            let reason = format!("shape {shape:?}, [frames, 3, {side}, {side}] is needed");
            return Err(ModelError::input("in.pixel_values", reason));
        }
        let mut features = model.rows()?;
        model.vision_features(&pixels, &mut features)?;
        let vision = model.config().vision.clone();
        let states = features.to_host(&device)?;
        outputs.push(real("out.vision", &[shape[0], vision.patches(), vision.width], states));
        for (name, branch) in ["out.video", "out.body", "out.face"].into_iter().zip(model.branches(&features)?) {
            outputs.push(real(name, &[branch.len() / width, width], branch));
        }
        if let Some(gate) = gate {
            let mut tokens = model.rows()?;
            model.video_tokens(&features, gate, &mut tokens)?;
            outputs.push(rows("out.video_tokens", &device, &tokens)?);
            video_tokens = Some(tokens);
        }
    }
    if let Some(gate) = gate {
        outputs.push(real("out.gate", &[gate.len()], gate.to_vec()));
    }
    let mut audio_tokens = None;
    if let Some(states) = trace_sound(model, inputs, &mut outputs)? {
        let mut tokens = model.rows()?;
        outputs.push(rows("out.audio_tower", &device, &states)?);
        model.audio_tokens(&states, &mut tokens)?;
        outputs.push(rows("out.audio_tokens", &device, &tokens)?);
        audio_tokens = Some(tokens);
    }
    if let Some(prompt) = ids(inputs, "in.prompt_ids")? {
        let prompt = Prompt::split(&prompt)?;
        let pieces = prompt.pieces(video_tokens.as_ref(), audio_tokens.as_ref())?;
        trace_decoder(model, &pieces, new_tokens, &mut outputs)?;
    }
    Ok(outputs)
}

/// Runs a classifier on `in.ids` `[n]`; gives `out.logits` `[labels]`.
pub fn trace_classifier<D: Device>(
    classifier: &mut Classifier<D>,
    inputs: &Checkpoint,
) -> Result<Vec<Output>, ModelError> {
    let ids = ids(inputs, "in.ids")?.ok_or_else(|| ModelError::input("in.ids", "it is missing"))?;
    let logits = classifier.logits(&unsigned("in.ids", &ids)?)?.to_vec();
    Ok(vec![real("out.logits", &[logits.len()], logits)])
}

/// The states of the sound that is given as samples or as log-mel features, if it is.
fn trace_sound<D: Device>(
    model: &mut Model<D>,
    inputs: &Checkpoint,
    outputs: &mut Vec<Output>,
) -> Result<Option<Rows<D>>, ModelError> {
    let mut states = model.rows()?;
    let needed = model.config().audio.as_ref().map(|audio| [audio.mels, 2 * audio.positions]);
    match (floats(inputs, "in.samples")?, floats(inputs, "in.mel")?) {
        (None, None) => return Ok(None),
        (Some(_), Some(_)) => return Err(ModelError::input("in.samples", "in.mel is there too: give one of them")),
        (Some((shape, samples)), None) => {
            if shape.len() != 1 {
                return Err(ModelError::input("in.samples", format!("shape {shape:?}, [n] is needed")));
            }
            let mel = model.log_mel(&samples)?;
            outputs.push(real("out.mel", &needed.unwrap_or_default(), mel));
            model.audio_states_of(&samples, &mut states)?;
        }
        (None, Some((shape, mel))) => {
            if let Some(needed) = needed
                && shape != needed
            {
                return Err(ModelError::input("in.mel", format!("shape {shape:?}, {needed:?} is needed")));
            }
            model.audio_states(&mel, &mut states)?;
        }
    }
    Ok(Some(states))
}

fn trace_decoder<D: Device>(
    model: &Model<D>,
    pieces: &[Piece<'_, D>],
    new_tokens: usize,
    outputs: &mut Vec<Output>,
) -> Result<(), ModelError> {
    let positions: usize = pieces.iter().map(Piece::len).sum();
    let mut session = model.session(positions.saturating_add(new_tokens).max(1))?;
    let embeddings = session.embeddings(pieces)?;
    outputs.push(real("out.inputs_embeds", &[positions, model.config().decoder.width], embeddings));
    session.start(pieces)?;
    let logits = session.all_logits()?;
    outputs.push(real("out.logits", &[positions, session.vocabulary()], logits));
    let (mut generated, mask) = (Vec::new(), Mask::all(session.vocabulary()));
    for _ in 0..new_tokens {
        let best = session.choose(mask.allowed(), &[], Choice::Greedy)?;
        generated.push(i64::from(best));
        session.append(&[best])?;
    }
    outputs.push(Output { name: "out.generated", shape: vec![new_tokens], values: Values::I64(generated) });
    Ok(())
}

/// A prompt's ids, cut at the places of the media.
struct Prompt(Vec<Part>);

enum Part {
    Text(Vec<u32>),
    Video,
    Audio,
}

impl Prompt {
    fn split(ids: &[i64]) -> Result<Self, ModelError> {
        let mut parts = Vec::new();
        for &id in ids {
            match (id, parts.last_mut()) {
                (VIDEO_ID, _) => parts.push(Part::Video),
                (AUDIO_ID, _) => parts.push(Part::Audio),
                (_, last) => {
                    let id = unsigned("in.prompt_ids", &[id])?;
                    match last {
                        Some(Part::Text(text)) => text.extend(id),
                        _ => parts.push(Part::Text(id)),
                    }
                }
            }
        }
        Ok(Prompt(parts))
    }

    fn pieces<'a, D: Device>(
        &'a self,
        video: Option<&'a Rows<D>>,
        audio: Option<&'a Rows<D>>,
    ) -> Result<Vec<Piece<'a, D>>, ModelError> {
        let media = |rows: Option<&'a Rows<D>>, reason: &str| {
            rows.map(Piece::Rows).ok_or_else(|| ModelError::input("in.prompt_ids", reason))
        };
        self.0
            .iter()
            .map(|part| match part {
                Part::Text(ids) => Ok(Piece::Tokens(ids)),
                Part::Video => media(video, "it names the video; in.pixel_values and in.bert_ids are needed"),
                Part::Audio => media(audio, "it names the audio; in.samples or in.mel is needed"),
            })
            .collect()
    }
}

fn real(name: &'static str, shape: &[usize], values: Vec<f32>) -> Output {
    Output { name, shape: shape.to_vec(), values: Values::F32(values) }
}

fn rows<D: Device>(name: &'static str, device: &D, rows: &Rows<D>) -> Result<Output, ModelError> {
    Ok(real(name, &[rows.rows(), rows.width()], rows.to_host(device)?))
}

/// Shape and elements of an input.
type Floats = (Vec<usize>, Vec<f32>);

/// An F32 input, or none where it is absent.
fn floats(inputs: &Checkpoint, name: &'static str) -> Result<Option<Floats>, ModelError> {
    if !inputs.contains(name) {
        return Ok(None);
    }
    let raw = inputs.raw(name)?;
    if raw.dtype != "F32" {
        return Err(ModelError::input(name, format!("it is {}, F32 is needed", raw.dtype)));
    }
    let values = raw.bytes.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
    Ok(Some((raw.shape.to_vec(), values)))
}

/// Elements of an I64 input of one dimension, or none where it is absent.
fn ids(inputs: &Checkpoint, name: &'static str) -> Result<Option<Vec<i64>>, ModelError> {
    if !inputs.contains(name) {
        return Ok(None);
    }
    let raw = inputs.raw(name)?;
    if raw.dtype != "I64" || raw.shape.len() != 1 {
        return Err(ModelError::input(name, format!("it is {}{:?}, I64 [n] is needed", raw.dtype, raw.shape)));
    }
    let (ids, _) = raw.bytes.as_chunks::<8>();
    Ok(Some(ids.iter().map(|c| i64::from_le_bytes(*c)).collect()))
}

fn unsigned(name: &'static str, ids: &[i64]) -> Result<Vec<u32>, ModelError> {
    ids.iter()
        .map(|&id| u32::try_from(id).map_err(|_| ModelError::input(name, format!("{id} is no token id"))))
        .collect()
}
