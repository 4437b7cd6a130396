//! Tokenizer, chat template, sampling, and the output grammar.
