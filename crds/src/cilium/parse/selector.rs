//! Label selectors.

use std::collections::BTreeMap;

use warren_model::policy::{LabelKey, LabelSource, Operator, Requirement};

use super::faults::{Faults, Path};
use crate::cilium::spec::LabelSelector;

/// A requirement as objects write it, whichever API it came from.
pub(super) struct Expression<'a> {
    pub(super) key: &'a str,
    pub(super) operator: &'a str,
    pub(super) values: &'a [String],
}

/// The requirements of a selector of Cilium's objects.
pub(super) fn requirements(path: &Path, selector: &LabelSelector, faults: &mut Faults) -> Vec<Requirement> {
    let expressions = selector.match_expressions.iter().flatten().map(|e| Expression {
        key: &e.key,
        operator: &e.operator,
        values: e.values.as_deref().unwrap_or_default(),
    });
    read(
        path,
        selector.match_labels.as_ref(),
        expressions,
        LabelKey::parse,
        faults,
    )
}

/// The requirements of `matchLabels` and `matchExpressions`; `key` says whose labels the keys mean.
pub(super) fn read<'a>(
    path: &Path,
    labels: Option<&BTreeMap<String, String>>,
    expressions: impl Iterator<Item = Expression<'a>>,
    key: impl Fn(&str) -> LabelKey,
    faults: &mut Faults,
) -> Vec<Requirement> {
    let mut out = Vec::new();
    for (text, value) in labels.into_iter().flatten() {
        let at = path.member("matchLabels");
        let key = key(text);
        check_key(&at, text, &key, faults);
        check_value(&at, text, value, faults);
        out.push(Requirement::is(key, value));
    }
    for (i, expression) in expressions.enumerate() {
        let at = path.member("matchExpressions").item(i);
        let key = key(expression.key);
        check_key(&at.member("key"), expression.key, &key, faults);
        for value in expression.values {
            check_value(&at.member("values"), expression.key, value, faults);
        }
        let values = expression.values.iter().cloned().collect();
        let (operator, wants_values) = match expression.operator {
            "In" => (Operator::In(values), true),
            "NotIn" => (Operator::NotIn(values), true),
            "Exists" => (Operator::Exists, false),
            "DoesNotExist" => (Operator::DoesNotExist, false),
            other => {
                let problem = format!("{other:?} is no operator: write In, NotIn, Exists or DoesNotExist");
                faults.add(&at.member("operator"), problem);
                continue;
            }
        };
        match (wants_values, expression.values.is_empty()) {
            (true, true) => {
                faults.add(
                    &at.member("values"),
                    format!("{} needs at least one value", expression.operator),
                );
            }
            (false, false) => {
                faults.add(
                    &at.member("values"),
                    format!("{} takes no values", expression.operator),
                );
            }
            _ => out.push(Requirement { key, operator }),
        }
    }
    out
}

/// Whether a text is made of letters, digits and some marks, and begins and ends with a letter or digit.
fn is_name(text: &str, longest: usize) -> bool {
    let edge = |c: char| c.is_ascii_alphanumeric();
    text.len() <= longest
        && text.starts_with(edge)
        && text.ends_with(edge)
        && text.chars().all(|c| edge(c) || matches!(c, '-' | '_' | '.'))
}

/// Keys of Kubernetes follow its rules; a key that no label can have would silently match nothing, or, negated,
/// everything.
fn check_key(path: &Path, text: &str, key: &LabelKey, faults: &mut Faults) {
    let problem = match key.source {
        LabelSource::Cidr | LabelSource::Fqdn => None,
        LabelSource::Reserved if is_name(&key.name, 63) => None,
        LabelSource::Other(ref source) => Some(format!(
            "{source:?} in {text:?} is no source of labels: write k8s:, reserved: or no source"
        )),
        // Keys of namespace labels carry a key of their own behind ours.
        _ => {
            let name = key
                .name
                .strip_prefix(warren_model::policy::keys::NAMESPACE_LABELS)
                .unwrap_or(&key.name);
            let valid = match name.split_once('/') {
                Some((prefix, name)) => is_name(prefix, 253) && is_name(name, 63),
                None => is_name(name, 63),
            };
            (!valid).then(|| format!("{text:?} is no label key"))
        }
    };
    if let Some(problem) = problem {
        faults.add(path, problem);
    }
}

fn check_value(path: &Path, key: &str, value: &str, faults: &mut Faults) {
    if !value.is_empty() && !is_name(value, 63) {
        faults.add(path, format!("{value:?} (of {key}) is no label value"));
    }
}
