//! The verifier as a model: a sequence classifier with GoEmotions' labels, and its tokenizer.

use std::collections::HashMap;
use std::path::Path;

use candor_kernels::Device;

use super::classifier::{SentenceClassifier, VerifierError};
use super::emotions::GO_EMOTIONS;
use crate::manifest::Manifest;
use crate::model::classifier::probability;
use crate::model::{Classifier, ModelError};
use crate::observation::Identity;
use crate::text::{Tokenizer, TokenizerError};

/// Sentences whose reading is remembered. A watched stream repeats itself, and a guided rationale is read twice.
const REMEMBERED: usize = 1024;

/// A verifier opened from its folder.
pub struct Verifier<D: Device> {
    tokenizer: Tokenizer,
    classifier: Classifier<D>,
    manifest: Manifest,
    /// Where each of GoEmotions' labels stands in the network's output.
    places: [usize; 28],
    remembered: HashMap<String, [f32; 28]>,
    most_remembered: usize,
}

impl<D: Device> Verifier<D> {
    /// Opens a folder with `config.json`, weights and tokenizer of a BERT or RoBERTa sequence classifier.
    pub fn open(folder: &Path, device: D) -> Result<Self, VerifierError> {
        let manifest = Manifest::open(folder)?;
        let classifier = Classifier::open(folder, device)?;
        let tokenizer = Tokenizer::open(folder)?;
        let mut places = [0; 28];
        for (place, label) in places.iter_mut().zip(GO_EMOTIONS) {
            let found = classifier.labels().iter().position(|known| known == label);
            *place = found.ok_or_else(|| VerifierError::Labels { folder: folder.to_path_buf(), label })?;
        }
        Ok(Verifier {
            tokenizer,
            classifier,
            manifest,
            places,
            remembered: HashMap::new(),
            most_remembered: REMEMBERED,
        })
    }

    /// The same, remembering the readings of up to `sentences` sentences, some 250 bytes each. Training and evaluation
    /// have the room, and much of what a model says there it has said before.
    pub fn remembering(self, sentences: usize) -> Self {
        Verifier { most_remembered: sentences, ..self }
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its name, version and sha256.
    pub fn identity(&self) -> Result<Identity, VerifierError> {
        Ok(self.manifest.identity_record()?)
    }

    /// The probabilities of one sentence; what is longer than the network can read loses its end.
    fn read(&mut self, sentence: &str) -> Result<[f32; 28], VerifierError> {
        if let Some(known) = self.remembered.get(sentence) {
            return Ok(*known);
        }
        let ids = self.tokenizer.encode_sequence(sentence, self.classifier.capacity())?;
        let logits = self.classifier.logits(&ids)?;
        let probabilities = self.places.map(|place| probability(logits[place]));
        if self.remembered.len() >= self.most_remembered {
            self.remembered.clear();
        }
        self.remembered.insert(sentence.to_string(), probabilities);
        Ok(probabilities)
    }
}

impl<D: Device> SentenceClassifier for Verifier<D> {
    fn classify(&mut self, sentences: &[&str]) -> Result<Vec<[f32; 28]>, VerifierError> {
        sentences.iter().map(|sentence| self.read(sentence)).collect()
    }
}

impl From<ModelError> for VerifierError {
    fn from(error: ModelError) -> Self {
        VerifierError::Model(Box::new(error))
    }
}

impl From<TokenizerError> for VerifierError {
    fn from(error: TokenizerError) -> Self {
        VerifierError::Tokenizer(Box::new(error))
    }
}
