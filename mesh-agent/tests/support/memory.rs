//! Looking for a private key in the memory of processes.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::Node;

/// A private key of a node, as it was on disk.
pub(crate) struct Secret([u8; 32]);

impl Secret {
    /// Reads the key of a generation.
    pub(crate) fn of(node: &Node, generation: u64) -> Self {
        let text = fs::read_to_string(node.home.join(format!("state/keys/gen{generation}.key"))).unwrap();
        Self(STANDARD.decode(text.trim()).unwrap().try_into().unwrap())
    }

    /// The forms in which a key might be somewhere. An end is enough: the others may be overwritten in part.
    fn forms(&self) -> Vec<(&'static str, Vec<u8>)> {
        let hex = |bytes: &[u8]| {
            bytes
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
                .into_bytes()
        };
        // The first and the last byte may be clamped.
        let middle = &self.0[1..31];
        let text = STANDARD.encode(self.0);
        vec![
            ("bytes", middle[..16].to_vec()),
            ("bytes", middle[14..].to_vec()),
            ("hex", hex(&middle[..15])),
            ("hex", hex(&middle[15..])),
            ("base64", text.as_bytes()[2..22].to_vec()),
            ("base64", text.as_bytes()[20..40].to_vec()),
        ]
    }

    /// Asserts that neither the agent nor the tunnel process of a node has it anywhere in its memory.
    pub(crate) fn is_in_no_process(&self, node: &Node) {
        for word in ["run", "tunnel"] {
            for pid in node.processes(word) {
                let found = self.find(pid);
                assert!(
                    found.is_empty(),
                    "{}: {word} process {pid}: {found:?}",
                    node.netns
                );
            }
        }
    }

    /// Whether the agent of a node has it in its memory: that the search finds what is there.
    pub(crate) fn is_in_agent(&self, node: &Node) -> bool {
        node.processes("run")
            .into_iter()
            .any(|pid| !self.find(pid).is_empty())
    }

    fn find(&self, pid: u32) -> Vec<String> {
        let forms = self.forms();
        let mut first = [false; 256];
        forms
            .iter()
            .for_each(|(_, bytes)| first[usize::from(bytes[0])] = true);
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
        let mut found = Vec::new();
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let (Some(range), Some(rights)) = (words.next(), words.next()) else {
                continue;
            };
            if !rights.starts_with("rw") {
                continue;
            }
            let (start, end) = range.split_once('-').unwrap();
            let (start, end) = (
                u64::from_str_radix(start, 16).unwrap(),
                u64::from_str_radix(end, 16).unwrap(),
            );
            let mut content = vec![0; usize::try_from(end - start).unwrap()];
            // Some ranges (vvar and the like) cannot be read.
            if memory.read_exact_at(&mut content, start).is_err() {
                continue;
            }
            for (at, byte) in content.iter().enumerate() {
                if !first[usize::from(*byte)] {
                    continue;
                }
                let here = forms.iter().filter(|(_, bytes)| content[at..].starts_with(bytes));
                found.extend(here.map(|(form, _)| format!("{form} at {:x} in {line}", start + at as u64)));
            }
            content.fill(0);
        }
        found
    }
}
