//! Every tensor of a model folder in the published layout, by the names and shapes that the runtime asks for.

use candor::model::config::{AudioConfig, BertConfig, ClassifierConfig, DecoderConfig, ModelConfig};

/// Inner width of the gate's head, which no key of config.json states.
const GATE_INNER: usize = 3584;
/// Branches that the gate weighs.
const BRANCHES: usize = 3;
/// Side of the projector's convolution over time and space.
const SAMPLER: usize = 2;
/// Width of the audio tower's convolutions.
const AUDIO_KERNEL: usize = 3;

/// A part of a model that can be stored in a way of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Part {
    /// The vision tower.
    Vision,
    /// The vision projector.
    Projector,
    /// The BERT that reads the instruction.
    Gate,
    /// The audio tower and its projector.
    Audio,
    /// The decoder.
    Decoder,
    /// The verifier.
    Verifier,
}

impl Part {
    /// What the names of its tensors start with.
    pub(super) fn prefixes(self) -> &'static [&'static str] {
        match self {
            Part::Vision => &["model.vision_tower."],
            Part::Projector => &["model.mm_projector."],
            Part::Gate => &["model.bert_model.", "model.bert_gate."],
            Part::Audio => &["model.audio_tower.", "model.audio_projector."],
            Part::Decoder => &["model.layers."],
            Part::Verifier => &["roberta.", "classifier."],
        }
    }
}

/// What a tensor is for, which decides how it is stored and how large its values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The matrix of a linear layer.
    Linear,
    /// A convolution's weight.
    Convolution,
    /// A table of words or positions.
    Table,
    /// The decoder's embedding table and its output head.
    Head,
    /// The factors of a normalisation.
    Norm,
    /// What is added behind a layer or a normalisation.
    Bias,
}

/// A tensor that the folder must hold.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) role: Role,
    pub(super) part: Part,
}

/// The tensors below a prefix.
struct Under<'a> {
    entries: &'a mut Vec<Entry>,
    prefix: String,
    part: Part,
}

impl Under<'_> {
    fn under(&mut self, name: impl std::fmt::Display) -> Under<'_> {
        Under { prefix: format!("{}{name}.", self.prefix), entries: &mut *self.entries, part: self.part }
    }

    fn add(&mut self, name: &str, shape: &[usize], role: Role) {
        let name = format!("{}{name}", self.prefix);
        self.entries.push(Entry { name, shape: shape.to_vec(), role, part: self.part });
    }

    fn matrix(&mut self, name: &str, from: usize, to: usize) {
        self.add(&format!("{name}.weight"), &[to, from], Role::Linear);
    }

    fn linear(&mut self, name: &str, from: usize, to: usize) {
        self.matrix(name, from, to);
        self.add(&format!("{name}.bias"), &[to], Role::Bias);
    }

    fn convolution(&mut self, name: &str, shape: &[usize]) {
        self.add(&format!("{name}.weight"), shape, Role::Convolution);
    }

    fn convolution_with_bias(&mut self, name: &str, shape: &[usize]) {
        self.convolution(name, shape);
        self.add(&format!("{name}.bias"), &shape[..1], Role::Bias);
    }

    fn layer_norm(&mut self, name: &str, width: usize) {
        self.add(&format!("{name}.weight"), &[width], Role::Norm);
        self.add(&format!("{name}.bias"), &[width], Role::Bias);
    }

    fn mlp(&mut self, name: &str, from: usize, to: usize) {
        let mut mlp = self.under(name);
        mlp.linear("0", from, to);
        mlp.linear("2", to, to);
    }
}

/// The tensors of a model.
pub(super) fn model(config: &ModelConfig) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut part = |part, prefix: &str, fill: &dyn Fn(&mut Under<'_>)| {
        fill(&mut Under { entries: &mut entries, prefix: prefix.to_owned(), part });
    };
    let width = config.decoder.width;
    part(Part::Vision, "model.vision_tower.vision_tower.vision_model.", &|tower| vision(tower, config));
    part(Part::Projector, "model.mm_projector.", &|projector| self::projector(projector, config));
    part(Part::Gate, "model.bert_model.", &|encoder| bert(encoder, &config.bert));
    part(Part::Gate, "model.bert_gate.", &|gate| {
        gate.linear("0", config.bert.width, GATE_INNER);
        gate.linear("2", GATE_INNER, BRANCHES);
    });
    if let Some(audio) = &config.audio {
        part(Part::Audio, "model.audio_tower.audio_tower.encoder.", &|tower| self::audio(tower, audio));
        part(Part::Audio, "model.", &|model| model.mlp("audio_projector", audio.width, width));
    }
    part(Part::Decoder, "", &|root| decoder(root, &config.decoder));
    entries
}

/// The tensors of a verifier in RoBERTa's layout.
pub(super) fn classifier(config: &ClassifierConfig) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut root = Under { entries: &mut entries, prefix: String::new(), part: Part::Verifier };
    bert(&mut root.under("roberta"), &config.encoder);
    let mut head = root.under("classifier");
    head.linear("dense", config.encoder.width, config.encoder.width);
    head.linear("out_proj", config.encoder.width, config.labels.len());
    entries
}

fn vision(tower: &mut Under<'_>, config: &ModelConfig) {
    let config = &config.vision;
    let width = config.width;
    let mut embeddings = tower.under("embeddings");
    embeddings.convolution_with_bias("patch_embedding", &[width, 3, config.patch, config.patch]);
    embeddings.add("position_embedding.weight", &[config.patches(), width], Role::Table);
    // Published checkpoints hold the layers behind the selected state too.
    for layer in 0..config.layers {
        let mut layer = tower.under(format_args!("encoder.layers.{layer}"));
        for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            layer.linear(&format!("self_attn.{name}"), width, width);
        }
        layer.layer_norm("layer_norm1", width);
        layer.linear("mlp.fc1", width, config.mlp);
        layer.linear("mlp.fc2", config.mlp, width);
        layer.layer_norm("layer_norm2", width);
    }
}

fn projector(projector: &mut Under<'_>, config: &ModelConfig) {
    let (from, width, depth) = (config.vision.width, config.decoder.width, config.projector.depth());
    for branch in ["video", "body"] {
        stage(&mut projector.under(format_args!("s1_{branch}")), depth, from, width);
        let kernel = [width, width, SAMPLER, SAMPLER, SAMPLER];
        projector.convolution_with_bias(&format!("sampler_{branch}.0"), &kernel);
        stage(&mut projector.under(format_args!("s2_{branch}")), depth, width, width);
        projector.mlp(&format!("readout_{branch}"), width, width);
    }
    projector.mlp("mlp_2xgelu_face", from, width);
}

fn stage(stage: &mut Under<'_>, depth: usize, from: usize, to: usize) {
    for block in 1..=depth {
        let from = if block == 1 { from } else { to };
        let squeezed = (from as f64 / 4.0).round_ties_even() as usize;
        let mut block = stage.under(format_args!("b{block}"));
        block.convolution("conv1.conv", &[to, from, 1, 1]);
        block.layer_norm("conv1.bn", to);
        block.convolution("conv2.conv", &[to, 1, 3, 3]);
        block.layer_norm("conv2.bn", to);
        block.convolution_with_bias("se.fc1", &[squeezed, to, 1, 1]);
        block.convolution_with_bias("se.fc2", &[to, squeezed, 1, 1]);
        block.convolution("conv3.conv", &[to, to, 1, 1]);
        block.layer_norm("conv3.bn", to);
        if from != to {
            block.convolution("downsample.conv", &[to, from, 1, 1]);
            block.layer_norm("downsample.bn", to);
        }
    }
}

fn bert(encoder: &mut Under<'_>, config: &BertConfig) {
    let width = config.width;
    let mut embeddings = encoder.under("embeddings");
    let tables = [("word", config.vocabulary), ("position", config.positions), ("token_type", config.types)];
    for (name, rows) in tables {
        embeddings.add(&format!("{name}_embeddings.weight"), &[rows, width], Role::Table);
    }
    embeddings.layer_norm("LayerNorm", width);
    for layer in 0..config.layers {
        let mut layer = encoder.under(format_args!("encoder.layer.{layer}"));
        for name in ["self.query", "self.key", "self.value", "output.dense"] {
            layer.linear(&format!("attention.{name}"), width, width);
        }
        layer.layer_norm("attention.output.LayerNorm", width);
        layer.linear("intermediate.dense", width, config.mlp);
        layer.linear("output.dense", config.mlp, width);
        layer.layer_norm("output.LayerNorm", width);
    }
}

fn audio(tower: &mut Under<'_>, config: &AudioConfig) {
    let width = config.width;
    tower.convolution_with_bias("conv1", &[width, config.mels, AUDIO_KERNEL]);
    tower.convolution_with_bias("conv2", &[width, width, AUDIO_KERNEL]);
    tower.add("embed_positions.weight", &[config.positions, width], Role::Table);
    for layer in 0..config.layers {
        let mut layer = tower.under(format_args!("layers.{layer}"));
        layer.matrix("self_attn.k_proj", width, width);
        for name in ["q_proj", "v_proj", "out_proj"] {
            layer.linear(&format!("self_attn.{name}"), width, width);
        }
        layer.layer_norm("self_attn_layer_norm", width);
        layer.linear("fc1", width, config.mlp);
        layer.linear("fc2", config.mlp, width);
        layer.layer_norm("final_layer_norm", width);
    }
    tower.layer_norm("layer_norm", width);
}

fn decoder(root: &mut Under<'_>, config: &DecoderConfig) {
    let (width, head) = (config.width, config.head_dim);
    let (queries, keys) = (config.heads * head, config.key_heads * head);
    root.add("model.embed_tokens.weight", &[config.vocabulary, width], Role::Head);
    for layer in 0..config.layers {
        let mut layer = root.under(format_args!("model.layers.{layer}"));
        layer.add("input_layernorm.weight", &[width], Role::Norm);
        layer.linear("self_attn.q_proj", width, queries);
        layer.linear("self_attn.k_proj", width, keys);
        layer.linear("self_attn.v_proj", width, keys);
        layer.matrix("self_attn.o_proj", queries, width);
        layer.add("post_attention_layernorm.weight", &[width], Role::Norm);
        layer.matrix("mlp.gate_proj", width, config.mlp);
        layer.matrix("mlp.up_proj", width, config.mlp);
        layer.matrix("mlp.down_proj", config.mlp, width);
    }
    root.add("model.norm.weight", &[width], Role::Norm);
    if !config.tied {
        root.add("lm_head.weight", &[config.vocabulary, width], Role::Head);
    }
}
