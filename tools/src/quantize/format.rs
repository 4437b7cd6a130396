//! The formats that weights are stored in, and how config.json names them: `quantization_config` of compressed-tensors,
//! with one entry of `config_groups` for each format that a folder has.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

/// Whole numbers that stand for values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bits {
    /// -7 to 7, and -8.
    Four,
    /// -127 to 127.
    Eight,
}

impl Bits {
    /// What `quantization_config` calls the format.
    fn name(self) -> &'static str {
        match self {
            Bits::Four => "pack-quantized",
            Bits::Eight => "int-quantized",
        }
    }

    /// Bits of a number.
    pub fn count(self) -> u32 {
        match self {
            Bits::Four => 4,
            Bits::Eight => 8,
        }
    }

    /// The largest number; its opposite is one too.
    pub fn largest(self) -> i8 {
        match self {
            Bits::Four => 7,
            Bits::Eight => 127,
        }
    }

    /// The smallest number. That of a byte has no opposite and is not used.
    pub fn smallest(self) -> i8 {
        match self {
            Bits::Four => -8,
            Bits::Eight => -127,
        }
    }
}

/// How many values share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Those of a row.
    Row,
    /// So many that follow each other in a row.
    Of(usize),
}

impl Group {
    /// Reads `row` or a number that kernels know.
    pub fn parse(text: &str) -> Result<Group, String> {
        let known = |size: &usize| candor_kernels::scales::GROUPS.contains(size);
        match (text, text.parse::<usize>().ok().filter(known)) {
            ("row", _) => Ok(Group::Row),
            (_, Some(size)) if text == size.to_string() => Ok(Group::Of(size)),
            _ => Err("32, 64, 128 or row are possible".to_owned()),
        }
    }

    /// Values of a group; none where it is a row.
    pub fn size(self) -> Option<usize> {
        match self {
            Group::Row => None,
            Group::Of(size) => Some(size),
        }
    }

    /// Scales of a row of `columns` values.
    pub fn per_row(self, columns: usize) -> usize {
        self.size().map_or(1, |size| columns.div_ceil(size).max(1))
    }
}

/// A format of whole numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Scheme {
    /// The numbers.
    pub bits: Bits,
    /// How many share a scale.
    pub group: Group,
}

impl Scheme {
    /// A byte a value, a scale a row.
    pub const INT8_ROWS: Scheme = Scheme { bits: Bits::Eight, group: Group::Row };

    /// The same with a smaller group where that one is no part of a row of `columns` values and a smaller one is:
    /// compressed-tensors reads whole groups only. Rows that no group fits keep theirs, with a short one at the end.
    pub fn fitting(self, columns: usize) -> Scheme {
        let Group::Of(size) = self.group else { return self };
        let fits = |group: &usize| *group <= size && columns.is_multiple_of(*group);
        let group = candor_kernels::scales::GROUPS.into_iter().rev().find(fits).map_or(self.group, Group::Of);
        Scheme { group, ..self }
    }

    /// Whether compressed-tensors reads rows of `columns` values so.
    pub fn fits(self, columns: usize) -> bool {
        self.group.size().is_none_or(|size| columns.is_multiple_of(size))
    }

    /// An entry of `config_groups`: these modules are stored so.
    pub fn config(self, targets: &[String]) -> Value {
        let strategy = if self.group == Group::Row { "channel" } else { "group" };
        let weights = json!({"num_bits": self.bits.count(), "type": "int", "symmetric": true, "strategy": strategy,
            "group_size": self.group.size(), "dynamic": false});
        json!({"targets": targets, "format": self.bits.name(), "weights": weights, "input_activations": null})
    }
}

impl std::fmt::Display for Scheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "int{}", self.bits.count())?;
        self.group.size().map_or(Ok(()), |size| write!(f, " in groups of {size}"))
    }
}

/// `quantization_config` with these entries; none without any.
pub fn config(groups: Vec<Value>) -> Option<Value> {
    let format = match &groups[..] {
        [] => return None,
        [first, rest @ ..] if rest.iter().all(|other| other["format"] == first["format"]) => first["format"].clone(),
        _ => "mixed-precision".into(),
    };
    let groups: Map<String, Value> =
        groups.into_iter().enumerate().map(|(index, group)| (format!("group_{index}"), group)).collect();
    Some(json!({
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "config_groups": groups, "ignore": [],
    }))
}

/// `quantization_config` of a folder in which each of these modules, all that have a matrix, is stored so, or not in whole
/// numbers.
pub fn config_of<'a>(modules: impl IntoIterator<Item = (&'a str, Option<Scheme>)>) -> Option<Value> {
    let modules: Vec<(&str, Option<Scheme>)> = modules.into_iter().collect();
    // Modules that differ in their numbers only are one target, if all of them are stored in the same way.
    let mut alike: BTreeMap<String, BTreeSet<Option<Scheme>>> = BTreeMap::new();
    for &(module, scheme) in &modules {
        alike.entry(numberless(module)).or_default().insert(scheme);
    }
    let mut targets: BTreeMap<Scheme, BTreeSet<String>> = BTreeMap::new();
    for &(module, scheme) in &modules {
        let Some(scheme) = scheme else { continue };
        let pattern = numberless(module);
        let target = if alike[&pattern].len() == 1 { pattern } else { module.to_owned() };
        targets.entry(scheme).or_default().insert(target);
    }
    let groups = targets.into_iter().map(|(scheme, targets)| scheme.config(&Vec::from_iter(targets)));
    config(groups.collect())
}

/// A module's name as a regular expression of names that may differ in their numbers; the name itself without any.
fn numberless(module: &str) -> String {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !module.split('.').any(is_number) {
        return module.to_owned();
    }
    let parts: Vec<&str> = module.split('.').map(|part| if is_number(part) { r"\d+" } else { part }).collect();
    format!("re:^{}$", parts.join(r"\."))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const INT4: Scheme = Scheme { bits: Bits::Four, group: Group::Of(32) };

    #[test]
    fn groups_are_named_as_on_the_command_line() {
        assert_eq!(Group::parse("row"), Ok(Group::Row));
        assert_eq!(Group::parse("64"), Ok(Group::Of(64)));
        for wrong in ["", "0", "48", "+32", "032", "rows", "-32", "99999999999999999999"] {
            assert!(Group::parse(wrong).is_err(), "{wrong}");
        }
        assert_eq!((Group::Of(32).per_row(33), Group::Of(32).per_row(0), Group::Row.per_row(33)), (2, 1, 1));
    }

    #[test]
    fn groups_become_smaller_where_they_do_not_fit() {
        let of = |size, columns| Scheme { group: Group::Of(size), ..INT4 }.fitting(columns);
        for (size, columns, expected) in [(128, 192, 64), (128, 896, 128), (128, 96, 32), (64, 128, 64), (128, 77, 128)]
        {
            assert_eq!(of(size, columns).group, Group::Of(expected), "{size} {columns}");
        }
        assert!(of(128, 192).fits(192) && !of(128, 77).fits(77) && Scheme::INT8_ROWS.fits(77));
        assert_eq!(Scheme::INT8_ROWS.fitting(77), Scheme::INT8_ROWS);
    }

    #[test]
    fn one_format_is_named_by_it_and_several_are_mixed() {
        let one = config_of([("a.0.q", Some(INT4)), ("a.1.q", Some(INT4)), ("b", None)]).unwrap();
        assert_eq!(one["format"], "pack-quantized");
        assert_eq!(one["config_groups"]["group_0"]["targets"], json!([r"re:^a\.\d+\.q$"]));
        assert_eq!(one["config_groups"]["group_0"]["weights"]["group_size"], 32);
        let mixed = config_of([("a.0.q", Some(INT4)), ("a.1.q", Some(Scheme::INT8_ROWS)), ("b", None)]).unwrap();
        assert_eq!(mixed["format"], "mixed-precision");
        assert_eq!(mixed["config_groups"]["group_0"]["targets"], json!(["a.0.q"]));
        assert_eq!(mixed["config_groups"]["group_1"]["targets"], json!(["a.1.q"]));
        assert_eq!(mixed["config_groups"]["group_1"]["weights"]["strategy"], "channel");
        assert!(config_of([("b", None)]).is_none());
    }

    #[test]
    fn what_is_stored_in_another_way_is_no_target() {
        let config = config_of([("a.0.q", Some(INT4)), ("a.1.q", None)]).unwrap();
        assert_eq!(config["config_groups"]["group_0"]["targets"], json!(["a.0.q"]));
    }
}
