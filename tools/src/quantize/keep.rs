//! `--keep NAME=FORMAT`: which tensors are stored in another way than the rest.

use anyhow::{bail, ensure};

use super::format::{Bits, Group, Scheme};

/// Names of parts, and what the names of their tensors have.
const PARTS: [(&str, &[&str]); 5] = [
    ("vision", &["vision_tower"]),
    ("projector", &["mm_projector"]),
    ("bert", &["bert_model", "bert_gate", "bert"]),
    ("audio", &["audio_tower", "audio_projector"]),
    ("decoder", &["model.layers"]),
];
/// The decoder's embedding table, which is its output head too where they are tied.
pub(super) const TABLE: &str = "model.embed_tokens.weight";
/// The output head of a decoder that has one of its own.
const HEAD: &str = "lm_head";

/// `NAME=FORMAT` with FORMAT f16, int8 or int4, and a group size behind a colon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Keep {
    name: String,
    scheme: Option<Scheme>,
}

impl Keep {
    /// Reads a rule.
    pub(super) fn parse(text: &str) -> Result<Keep, String> {
        let (name, format) = text.split_once('=').ok_or("a rule is NAME=FORMAT, as lm_head=int8")?;
        if name.is_empty() || name.split('.').any(str::is_empty) {
            return Err(format!("{name:?} is no name of a tensor, of a layer or of a part"));
        }
        let (format, group) = match format.split_once(':') {
            Some((format, group)) => (format, Some(Group::parse(group)?)),
            None => (format, None),
        };
        let scheme = match (format, group) {
            ("f16", None) => None,
            ("int8", group) => Some(Scheme { bits: Bits::Eight, group: group.unwrap_or(Group::Row) }),
            ("int4", group) => Some(Scheme { bits: Bits::Four, group: group.unwrap_or(super::INT4_GROUP) }),
            _ => return Err(format!("{format:?} is none of f16, int8 and int4, or f16 with a group size")),
        };
        Ok(Keep { name: name.to_owned(), scheme })
    }

    /// Whether the rule is about a tensor: its name is one of a part, or follow in the tensor's, from dot to dot; a star
    /// stands for anything.
    fn is_about(&self, tensor: &str, tied: bool) -> bool {
        if self.name == HEAD && tied && tensor == TABLE {
            return true;
        }
        match PARTS.iter().find(|(part, _)| *part == self.name) {
            Some((_, names)) => names.iter().any(|name| follows(name, tensor)),
            None => follows(&self.name, tensor),
        }
    }

    /// Whether it is about the embedding table itself, and not about a part that it lies in.
    fn names_table(&self, tied: bool) -> bool {
        self.is_about(TABLE, tied) && (self.name == HEAD || self.name.split('.').any(|part| part == "embed_tokens"))
    }
}

/// Whether a dotted pattern matches parts of a dotted name that follow each other.
fn follows(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<&str>, Vec<&str>) = (pattern.split('.').collect(), name.split('.').collect());
    name.windows(pattern.len()).any(|parts| parts.iter().zip(&pattern).all(|(part, pattern)| glob(pattern, part)))
}

/// Whether a text is as a pattern says, in which a star stands for any text.
fn glob(pattern: &str, text: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut left) = text.strip_prefix(start) else { return false };
    let mut pieces: Vec<&str> = rest.split('*').collect();
    let end = pieces.pop().unwrap_or_default();
    for piece in pieces {
        match left.find(piece) {
            Some(at) => left = &left[at + piece.len()..],
            None => return false,
        }
    }
    left.ends_with(end)
}

/// What `--weights` and `--keep` say, the last rule about a tensor before the others.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) weights: Scheme,
    pub(super) keep: Vec<Keep>,
}

impl Rules {
    /// How a tensor is stored; f16 if none. `linear` says that it is a large matrix of a linear layer.
    pub(super) fn of(&self, tensor: &str, linear: bool, tied: bool) -> Option<Scheme> {
        if tensor == TABLE {
            return self.keep.iter().rev().find(|keep| keep.names_table(tied))?.scheme;
        }
        if !linear {
            return None;
        }
        let own = self.keep.iter().rev().find(|keep| keep.is_about(tensor, tied));
        match own {
            Some(keep) => keep.scheme,
            None if tensor.split('.').next() == Some(HEAD) => None,
            None => Some(self.weights),
        }
    }

    /// Refuses rules that are about none of a model's tensors.
    pub(super) fn check<'a>(&self, tensors: impl Iterator<Item = &'a str> + Clone, tied: bool) -> anyhow::Result<()> {
        ensure!(tensors.clone().next().is_some(), "the model has no tensors");
        for keep in &self.keep {
            if !tensors.clone().any(|tensor| keep.is_about(tensor, tied)) {
                let parts: Vec<&str> = PARTS.iter().map(|(part, _)| *part).collect();
                bail!(
                    "--keep {}: the model has no such tensor; names are parts ({}), tensors, or parts of tensors' names \
                     from dot to dot, as layers.0 or mlp.down_proj",
                    keep.name,
                    parts.join(", ")
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const DOWN: &str = "model.layers.1.mlp.down_proj.weight";
    const TOWER: &str = "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight";
    const INT4: Scheme = Scheme { bits: Bits::Four, group: Group::Of(32) };

    fn rules(keep: &str) -> Rules {
        let keep = keep.split(',').filter(|rule| !rule.is_empty());
        Rules { weights: INT4, keep: keep.map(|rule| Keep::parse(rule).unwrap()).collect() }
    }

    #[test]
    fn linear_layers_are_quantised_and_heads_and_tables_are_kept() {
        let rules = rules("");
        assert_eq!(rules.of(DOWN, true, true), Some(INT4));
        assert_eq!(rules.of(DOWN, false, true), None);
        assert_eq!((rules.of(TABLE, false, true), rules.of("lm_head.weight", true, false)), (None, None));
    }

    #[test]
    fn the_last_rule_about_a_tensor_holds() {
        let int8 = Some(Scheme::INT8_ROWS);
        for (keep, down, tower) in [
            ("layers.1=int8", int8, int8),
            ("model.layers.1=int8", int8, Some(INT4)),
            ("decoder=int8", int8, Some(INT4)),
            ("vision=f16", Some(INT4), None),
            ("vision=f16,mlp=int8", int8, int8),
            ("mlp=int8,vision=f16", int8, None),
            ("down_*=f16", None, Some(INT4)),
            ("*_proj=f16", None, Some(INT4)),
            ("layers.*.mlp.fc1=int8", Some(INT4), int8),
            ("model.layers.1.mlp.down_proj.weight=f16", None, Some(INT4)),
            (
                "mlp=int4:128",
                Some(Scheme { group: Group::Of(128), ..INT4 }),
                Some(Scheme { group: Group::Of(128), ..INT4 }),
            ),
        ] {
            let rules = rules(keep);
            assert_eq!((rules.of(DOWN, true, true), rules.of(TOWER, true, true)), (down, tower), "{keep}");
        }
    }

    #[test]
    fn a_tied_head_is_the_table() {
        let int8 = Some(Scheme::INT8_ROWS);
        for (keep, tied, table, head) in [
            ("lm_head=int8", true, int8, int8),
            ("lm_head=int8", false, None, int8),
            ("embed_tokens=int8", false, int8, None),
            ("model.embed_tokens=int8,lm_head=f16", true, None, None),
            ("model=int8", true, None, None),
        ] {
            let rules = rules(keep);
            let found = (rules.of(TABLE, false, tied), rules.of("lm_head.weight", true, tied));
            assert_eq!(found, (table, head), "{keep} {tied}");
        }
    }

    #[test]
    fn wrong_rules_say_what_is_wrong() {
        for (rule, said) in [
            ("", "NAME=FORMAT"),
            ("lm_head", "NAME=FORMAT"),
            ("=int8", "no name"),
            ("a..b=int8", "no name"),
            ("a=int3", "\"int3\""),
            ("a=int4:48", "32, 64, 128 or row"),
            ("a=f16:32", "f16"),
        ] {
            assert!(Keep::parse(rule).unwrap_err().contains(said), "{rule}");
        }
        let missing = rules("ears=int8").check([DOWN, TOWER].into_iter(), true).unwrap_err().to_string();
        assert!(missing.contains("--keep ears") && missing.contains("vision"), "{missing}");
        assert!(rules("lm_head=int8").check([TABLE].into_iter(), true).is_ok());
        assert!(rules("lm_head=int8").check([TABLE].into_iter(), false).is_err());
    }

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, text, fits) in [
            ("*", "", true),
            ("a*", "a", true),
            ("a*b", "ab", true),
            ("a*b*c", "axbxc", true),
            ("a*b*c", "axcxb", false),
            ("a*a", "a", false),
            ("**", "x", true),
        ] {
            assert_eq!(glob(pattern, text), fits, "{pattern} {text}");
        }
    }
}
