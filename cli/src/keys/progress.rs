//! How far a rotation is, as a bar and as lines.

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
};

use super::view::{Counts, Rotation};

/// Characters of the bar.
const WIDTH: usize = 30;
/// Steps of a node from `preparing` to `done`.
const STEPS: u32 = 6;

/// A bar and what stands beside it: `[######........] 1 of 3 done, 1 draining, 1 pending`.
pub(crate) fn bar(rotation: &Rotation) -> String {
    let counts = &rotation.counts;
    let (done, all) = (steps(counts), u64::from(counts.total * STEPS));
    let filled = match all {
        0 => 0,
        _ => usize::try_from(done * WIDTH as u64 / all)
            .unwrap_or(WIDTH)
            .min(WIDTH),
    };
    let mut parts = vec![format!("{} of {} done", counts.done, counts.total)];
    parts.extend(counts.moving().map(|(count, phase)| format!("{count} {phase}")));
    for (count, word) in [
        (counts.pending, "pending"),
        (counts.failed, "FAILED"),
        (counts.gone, "gone"),
    ] {
        if count > 0 {
            parts.push(format!("{count} {word}"));
        }
    }
    if !rotation.waiting_for.is_empty() && !rotation.is_over() {
        parts.push(format!("waits for {}", rotation.waiting_for));
    }
    format!(
        "[{}{}] {}",
        "#".repeat(filled),
        ".".repeat(WIDTH - filled),
        parts.join(", ")
    )
}

/// How many steps all nodes have behind them; one that is over, however, has them all.
fn steps(counts: &Counts) -> u64 {
    let over = counts.done + counts.failed + counts.gone;
    let behind = [
        (counts.preparing, 1),
        (counts.verifying, 2),
        (counts.switching, 3),
        (counts.draining, 4),
        (counts.retiring, 5),
        (over, STEPS),
    ];
    behind
        .into_iter()
        .map(|(count, steps)| u64::from(count) * u64::from(steps))
        .sum()
}

/// Follows a rotation on standard error: a line whenever a node changes its phase; on a terminal the bar below.
#[derive(Debug, Default)]
pub(crate) struct Follower {
    phases: BTreeMap<String, &'static str>,
    phase: String,
    /// The bar stands in the last line.
    drawn: bool,
}

impl Follower {
    /// Shows what is new. `seconds`: since the start.
    pub(crate) fn show(&mut self, rotation: &Rotation, seconds: f32) {
        let lines = self.news(rotation);
        let mut out = std::io::stderr().lock();
        let terminal = out.is_terminal();
        if terminal && self.drawn {
            let _ = write!(out, "\r\x1b[K");
        }
        for line in lines {
            let _ = writeln!(out, "{seconds:>7.1} s  {line}");
        }
        self.drawn = terminal && !rotation.is_over();
        if self.drawn {
            let _ = write!(out, "{}", bar(rotation));
        }
        let _ = out.flush();
    }

    fn news(&mut self, rotation: &Rotation) -> Vec<String> {
        let mut lines = Vec::new();
        if self.phase != rotation.phase {
            lines.push(format!("{}: {}", rotation.name, rotation.phase.to_lowercase()));
            self.phase.clone_from(&rotation.phase);
        }
        for node in &rotation.nodes {
            let before = self.phases.insert(node.node.clone(), node.phase);
            if before != Some(node.phase) && !(before.is_none() && node.phase == "pending") {
                let waits = match node.waiting_for.as_str() {
                    "" => String::new(),
                    other => format!(", waits for {other}"),
                };
                lines.push(format!("{}: {}{waits}", node.node, node.phase));
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::view::NodeProgress;

    fn rotation(counts: Counts) -> Rotation {
        Rotation {
            name: "r".into(),
            phase: "Running".into(),
            counts,
            ..Rotation::default()
        }
    }

    #[test]
    fn the_bar_fills_from_left_to_right() {
        let half = rotation(Counts {
            total: 2,
            done: 1,
            pending: 1,
            ..Counts::default()
        });
        assert_eq!(
            bar(&half),
            "[###############...............] 1 of 2 done, 1 pending"
        );
        let mut last = 0;
        for change in [
            |counts: &mut Counts| counts.preparing = 1,
            |counts: &mut Counts| counts.verifying = 1,
            |counts: &mut Counts| counts.switching = 1,
            |counts: &mut Counts| counts.draining = 1,
            |counts: &mut Counts| counts.retiring = 1,
            |counts: &mut Counts| counts.done = 1,
        ] {
            let mut counts = Counts {
                total: 1,
                ..Counts::default()
            };
            change(&mut counts);
            let filled = bar(&rotation(counts)).matches('#').count();
            assert!(filled > last);
            last = filled;
        }
        assert_eq!(last, WIDTH);
        assert!(bar(&rotation(Counts::default())).starts_with("[...."));
    }

    #[test]
    fn a_line_per_change_and_none_without() {
        let mut follower = Follower::default();
        let node = |phase, waiting_for: &str| NodeProgress {
            node: "node1".into(),
            phase,
            waiting_for: waiting_for.into(),
        };
        let mut now = rotation(Counts::default());
        now.nodes = vec![node("pending", "")];
        assert_eq!(follower.news(&now), ["r: running"]);
        now.nodes = vec![node("verifying", "node2")];
        assert_eq!(follower.news(&now), ["node1: verifying, waits for node2"]);
        assert_eq!(follower.news(&now), Vec::<String>::new());
        now.nodes = vec![node("done", "")];
        now.phase = "Succeeded".into();
        assert_eq!(follower.news(&now), ["r: succeeded", "node1: done"]);
    }
}
