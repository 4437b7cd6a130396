//! The model family on the CUDA device, on the stand-in driver, against PyTorch: the same goldens, and the same tokens.

use super::{check_classifier_on, check_every_variant_on, stand_in};

#[test]
fn small_projector_tied_and_untied_in_every_type() {
    check_every_variant_on(&stand_in::device().exact(), "even");
}

#[test]
fn equal_widths_last_state_one_key_head() {
    check_every_variant_on(&stand_in::device().exact(), "same");
}

#[test]
fn large_projector_on_an_odd_grid() {
    check_every_variant_on(&stand_in::device().exact(), "wide");
}

#[test]
fn classifiers() {
    check_classifier_on(&stand_in::device().exact(), "bert");
    check_classifier_on(&stand_in::device().exact(), "roberta");
}
