//! The small byte-level BPE tokenizer of the default model, trained on its own rationales.

use anyhow::{Context, anyhow};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer, TokenizerImpl,
};

/// Marks the end of a text.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// Marks the start of a turn (ChatML).
pub const TURN_START: &str = "<|im_start|>";
/// Marks the end of a turn (ChatML); the model stops here.
pub const TURN_END: &str = "<|im_end|>";

/// ChatML, without a system turn of its own.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
    message['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Trains a byte-level BPE of at most `vocabulary` entries on `texts`. The same texts give the same tokenizer.
pub fn train<'a>(texts: impl Iterator<Item = &'a str> + Send, vocabulary: usize) -> anyhow::Result<Tokenizer> {
    let failed = |e: tokenizers::Error| anyhow!("training the tokenizer: {e}");
    let special = [END_OF_TEXT, TURN_START, TURN_END].map(|text| AddedToken::from(text, true));
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(vocabulary)
        .min_frequency(2)
        .special_tokens(special.to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer =
        TokenizerImpl::<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>::new(
            BPE::default(),
        );
    tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, true))));
    tokenizer.with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::new(false, false, true))));
    tokenizer.train(&mut trainer, texts).map_err(failed)?;
    let json = tokenizer.to_string(false).map_err(failed)?;
    json.parse::<Tokenizer>().map_err(failed).context("reading the trained tokenizer back")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn any_text_goes_in_and_comes_back() {
        let texts = ["The mouth is open.", "The mouth is closed.", "<answer>happy</answer>"];
        let tokenizer = train(texts.into_iter().cycle().take(30), 300).unwrap();
        assert!((270..=300).contains(&tokenizer.get_vocab_size(true)));
        for text in ["The mouth is open.", "ünknown: 顔 \n\t☃", "<think>\n"] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), text);
        }
        assert_eq!(tokenizer.encode(TURN_END, false).unwrap().len(), 1);
        assert!(tokenizer.encode("The mouth is open.", false).unwrap().len() <= 6);
    }

    #[test]
    fn the_same_texts_give_the_same_tokenizer() {
        let make = |texts: &[&'static str]| train(texts.iter().copied(), 280).unwrap().to_string(false).unwrap();
        let texts = ["one two one two", "three two three", "one three one"];
        assert_eq!(make(&texts), make(&texts));
    }
}
