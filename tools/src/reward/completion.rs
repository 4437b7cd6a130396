//! Cuts the completion out of a query: trainers send prompt and completion as one text, decoded from tokens, with the
//! special tokens that end a turn still in it.

/// Special tokens that end a turn, a text or a padded row in the families of models that trainers are used with.
pub const END_TOKENS: [&str; 10] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|pad|>",
    "<end_of_turn>",
    "<eos>",
    "<pad>",
    "</s>",
];

/// The shortest end of a prompt, in bytes, that is trusted to mark where the completion begins.
const SHORTEST_END: usize = 16;

/// What follows the prompt in a query, without the special tokens behind it; `None` where the query does not hold the
/// prompt.
///
/// A query need not start with the prompt as it was sent: a trainer may have cut long prompts at their beginning, put
/// image tokens into it, or changed white space in decoding. The longest end of the prompt that stands in the query marks
/// the place then; where it stands twice, the first one, so that a completion that repeats the prompt does not hide what
/// it wrote before.
pub fn completion_of<'q>(query: &'q str, prompt: &str, end_tokens: &[String]) -> Option<&'q str> {
    let completion = query.strip_prefix(prompt).or_else(|| behind_the_end_of(query, prompt))?;
    Some(without_end_tokens(completion, end_tokens))
}

fn behind_the_end_of<'q>(query: &'q str, prompt: &str) -> Option<&'q str> {
    // If an end stands in the query, so does every shorter one: the longest is found by halving.
    let starts: Vec<usize> = prompt.char_indices().map(|(at, _)| at).collect();
    let longest = starts.partition_point(|&start| !query.contains(&prompt[start..]));
    let end = &prompt[*starts.get(longest)?..];
    if end.len() < SHORTEST_END {
        return None;
    }
    Some(query.split_once(end)?.1)
}

/// A completion without the special tokens at its end, and without the white space between and behind them. White space
/// before the first of them is the model's own and stays.
pub fn without_end_tokens<'c>(completion: &'c str, end_tokens: &[String]) -> &'c str {
    let mut rest = completion;
    loop {
        let trimmed = rest.trim_end();
        let shorter =
            end_tokens.iter().filter(|token| !token.is_empty()).find_map(|token| trimmed.strip_suffix(&**token));
        match shorter {
            Some(shorter) => rest = shorter,
            None => return rest,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TURN: &str = "<|im_start|>user\nWhich emotion?<|im_end|>\n<|im_start|>assistant\n";
    const ANSWER: &str = "<think>Her lips turn down.</think>\n<answer>sad</answer>";

    fn cut<'q>(query: &'q str, prompt: &str) -> Option<&'q str> {
        completion_of(query, prompt, &END_TOKENS.map(str::to_owned))
    }

    #[test]
    fn the_prompt_and_the_tokens_behind_go() {
        for end in ["", "<|im_end|>", "<|im_end|>\n", "<|im_end|>\n<|endoftext|><|endoftext|>", "</s>"] {
            assert_eq!(cut(&format!("{TURN}{ANSWER}{end}"), TURN), Some(ANSWER), "{end:?}");
        }
        assert_eq!(cut(ANSWER, ""), Some(ANSWER));
        assert_eq!(cut(TURN, TURN), Some(""));
    }

    #[test]
    fn what_the_model_wrote_itself_stays() {
        for own in ["</answer>\n", " \n", "<|im_end|> and more", "<think>", "x<|im_start|>"] {
            assert_eq!(cut(&format!("{TURN}{own}"), TURN), Some(own));
        }
        assert_eq!(cut(&format!("{TURN}</answer> \n<|im_end|>"), TURN), Some("</answer> \n"));
        // A token that is not listed is text, until it is listed.
        let query = format!("{TURN}{ANSWER}<stop>");
        assert_eq!(cut(&query, TURN), Some(&query[TURN.len()..]));
        assert_eq!(completion_of(&query, TURN, &["<stop>".to_owned(), String::new()]), Some(ANSWER));
    }

    #[test]
    fn prompts_that_were_cut_or_filled_in() {
        let cut_short = &TURN[TURN.len() - 40..];
        assert_eq!(cut(&format!("{cut_short}{ANSWER}"), TURN), Some(ANSWER));
        let filled = TURN.replace("Which", "<|image_pad|><|image_pad|>Which");
        assert_eq!(cut(&format!("{filled}{ANSWER}<|im_end|>"), TURN), Some(ANSWER));
        let repeated = format!("{cut_short}no tags {TURN}{ANSWER}");
        assert_eq!(cut(&repeated, TURN), Some(ANSWER), "the whole prompt is the longer end");
        let repeated = format!("{cut_short}no tags {cut_short}{ANSWER}");
        assert_eq!(cut(&repeated, TURN), Some(&repeated[cut_short.len()..]), "of two the first");
        assert_eq!(cut(&format!("é{ANSWER}"), "Was für ein Gefühl trägt é"), None, "too short an end to trust");
    }

    #[test]
    fn another_prompt_is_no_prompt() {
        assert_eq!(cut(&format!("Something else.\n{ANSWER}"), TURN), None);
        assert_eq!(cut("", TURN), None);
        assert_eq!(cut("ぁぁぁ", "ぁぁぁぁぁぁぁぁ"), None);
    }
}
