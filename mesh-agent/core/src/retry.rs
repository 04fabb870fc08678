//! Retries with exponential backoff, by the subject of the step that failed.

use std::{collections::BTreeMap, time::Duration};

/// The first pause after a failure.
const FIRST: Duration = Duration::from_millis(250);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(30);

/// A step that failed and is tried again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// How often it failed in a row.
    pub attempts: u32,
    /// When it may be tried again; same clock as `now`.
    pub not_before: Duration,
    /// The last error.
    pub reason: String,
}

/// All steps that failed since they last succeeded.
#[derive(Debug, Clone, Default)]
pub struct Retries(BTreeMap<String, Failure>);

impl Retries {
    /// A step succeeded.
    pub fn succeeded(&mut self, subject: &str) {
        self.0.remove(subject);
    }

    /// A step failed at `now`; it is due again after a pause that doubles each time.
    pub fn failed(&mut self, subject: &str, reason: String, now: Duration) {
        let attempts = self
            .0
            .get(subject)
            .map_or(0, |failure| failure.attempts)
            .saturating_add(1);
        let pause = FIRST.saturating_mul(1 << (attempts - 1).min(10)).min(LONGEST);
        self.0.insert(
            subject.to_owned(),
            Failure {
                attempts,
                not_before: now + pause,
                reason,
            },
        );
    }

    /// Whether a step failed since it last succeeded.
    pub fn contains(&self, subject: &str) -> bool {
        self.0.contains_key(subject)
    }

    /// Whether a step may be tried at `now`.
    pub fn due(&self, subject: &str, now: Duration) -> bool {
        self.0
            .get(subject)
            .is_none_or(|failure| failure.not_before <= now)
    }

    /// Forgets everything that is no longer wanted.
    pub fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        self.0.retain(|subject, _| wanted(subject));
    }

    /// Makes everything due at once.
    pub fn hurry(&mut self) {
        self.0
            .values_mut()
            .for_each(|failure| failure.not_before = Duration::ZERO);
    }

    /// When the next step is due.
    pub fn next(&self) -> Option<Duration> {
        self.0.values().map(|failure| failure.not_before).min()
    }

    /// What failed, a sentence each.
    pub fn sentences(&self) -> Vec<String> {
        let text = |(subject, failure): (&String, &Failure)| {
            format!(
                "cannot {subject}: {} (attempt {})",
                failure.reason, failure.attempts
            )
        };
        self.0.iter().map(text).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit_and_end_with_success() {
        let mut retries = Retries::default();
        let mut now = Duration::ZERO;
        let mut pauses = Vec::new();
        for _ in 0..20 {
            retries.failed("x", "broken".into(), now);
            let due = retries.next().unwrap();
            assert!(!retries.due("x", due - Duration::from_nanos(1)));
            assert!(retries.due("x", due));
            pauses.push(due - now);
            now = due;
        }
        assert_eq!(pauses[..3], [FIRST, FIRST * 2, FIRST * 4]);
        assert_eq!(pauses[19], LONGEST);
        retries.succeeded("x");
        assert_eq!(retries.next(), None);
        assert!(retries.due("x", now));
    }
}
