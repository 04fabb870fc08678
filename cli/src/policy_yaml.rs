//! YAML with the line of every value, so that a fault can be shown where it is.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_json::{Number, Value};
use serde_saphyr::Spanned;

/// A document of a file.
#[derive(Debug)]
pub(crate) struct Document {
    /// Lines of the file before the document.
    pub(crate) offset: u64,
    /// Its text.
    pub(crate) text: String,
}

/// Cuts a file into documents, so that one that is no YAML does not hide the others. Empty ones are left out.
pub(crate) fn documents(text: &str) -> Vec<Document> {
    let mut out = vec![Document {
        offset: 0,
        text: String::new(),
    }];
    for (index, line) in text.lines().enumerate() {
        let separator = line == "---" || line.starts_with("--- ") || line.starts_with("---\t");
        if separator {
            out.push(Document {
                offset: index as u64 + 1,
                text: String::new(),
            });
        } else if let Some(document) = out.last_mut() {
            document.text += line;
            document.text.push('\n');
        }
    }
    let bare = |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#') || line == "...";
    out.retain(|document| !document.text.lines().all(bare));
    out
}

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct Located {
    line: u64,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Scalar(Value),
    List(Vec<Located>),
    Members(Vec<(String, Located)>),
}

impl Located {
    /// Reads one document. Lines count from 1 in the document.
    ///
    /// # Errors
    ///
    /// The line and what is wrong with the text as YAML.
    pub(crate) fn parse(text: &str) -> Result<Self, (u64, String)> {
        serde_saphyr::from_str::<Self>(text).map_err(|error| {
            let line = error.location().map_or(1, |location| location.line());
            let message = error.to_string();
            (line, message.lines().next().unwrap_or_default().to_owned())
        })
    }

    /// The value without its places.
    pub(crate) fn value(&self) -> Value {
        match &self.kind {
            Kind::Scalar(value) => value.clone(),
            Kind::List(items) => items.iter().map(Self::value).collect(),
            Kind::Members(members) => members
                .iter()
                .map(|(name, value)| (name.clone(), value.value()))
                .collect(),
        }
    }

    /// The line that it starts at.
    pub(crate) fn line(&self) -> u64 {
        self.line
    }

    /// A member by name.
    pub(crate) fn member(&self, name: &str) -> Option<&Self> {
        match &self.kind {
            Kind::Members(members) => members
                .iter()
                .find(|(known, _)| known == name)
                .map(|(_, value)| value),
            Kind::Scalar(_) | Kind::List(_) => None,
        }
    }

    /// The items of a list; none of anything else.
    pub(crate) fn items(&self) -> &[Self] {
        match &self.kind {
            Kind::List(items) => items,
            Kind::Scalar(_) | Kind::Members(_) => &[],
        }
    }

    /// The line of what a path such as `spec.ingress[0].toPorts` leads to, or of the last part of it that is there.
    pub(crate) fn line_of(&self, path: &str) -> u64 {
        let mut at = self;
        for part in path.split(['.', '[']) {
            let next = match part.strip_suffix(']') {
                Some(index) => index.parse().ok().and_then(|index: usize| at.items().get(index)),
                None => at.member(part),
            };
            match next {
                Some(next) => at = next,
                None => break,
            }
        }
        at.line
    }
}

impl<'de> Deserialize<'de> for Located {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Kind>::deserialize(deserializer)?;
        Ok(Self {
            line: spanned.referenced.line(),
            kind: spanned.value,
        })
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(KindVisitor)
    }
}

struct KindVisitor;

impl<'de> Visitor<'de> for KindVisitor {
    type Value = Kind;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Kind, E> {
        Ok(Kind::Scalar(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Kind, E> {
        Ok(Kind::Scalar(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Kind, E> {
        Ok(Kind::Scalar(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Kind, E> {
        Ok(Kind::Scalar(
            Number::from_f64(value).map_or(Value::Null, Value::Number),
        ))
    }

    fn visit_str<E>(self, value: &str) -> Result<Kind, E> {
        Ok(Kind::Scalar(value.into()))
    }

    fn visit_unit<E>(self) -> Result<Kind, E> {
        Ok(Kind::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Kind, E> {
        Ok(Kind::Scalar(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Kind, D::Error> {
        Kind::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Kind, A::Error> {
        let mut out = Vec::new();
        while let Some(item) = items.next_element()? {
            out.push(item);
        }
        Ok(Kind::List(out))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Kind, A::Error> {
        let mut out = Vec::new();
        while let Some(key) = members.next_key::<Spanned<String>>()? {
            let mut value: Located = members.next_value()?;
            // A member stands where its name does, also when its value starts on the next line.
            value.line = key.referenced.line();
            out.push((key.value, value));
        }
        Ok(Kind::Members(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_member_knows_its_line() {
        let text = "kind: A\nspec:\n  list:\n  - a: 1\n    b: two\n  - c: null\n  flag: true\n";
        let located = Located::parse(text).unwrap();
        for (path, line) in [
            ("kind", 1),
            ("spec", 2),
            ("spec.list", 3),
            ("spec.list[0]", 4),
            ("spec.list[0].b", 5),
            ("spec.list[1].c", 6),
            ("spec.flag", 7),
            ("spec.list[1].missing", 6),
            ("spec.missing[0].more", 2),
        ] {
            assert_eq!(located.line_of(path), line, "{path}");
        }
        assert_eq!(
            located.value(),
            serde_json::json!({"kind": "A", "spec": {"list": [{"a": 1, "b": "two"}, {"c": null}], "flag": true}})
        );
    }

    #[test]
    fn a_document_that_is_no_yaml_hides_no_other() {
        let documents = documents("# only a comment\n---\na: 1\n---\nb: [\n--- # three\n\nc: 3\n");
        let found: Vec<_> = documents
            .iter()
            .map(|d| (d.offset, Located::parse(&d.text).is_ok()))
            .collect();
        assert_eq!(found, [(2, true), (4, false), (6, true)]);
    }
}
