//! The time of handshakes' timestamps. A peer refuses an initiation whose timestamp is not later than all that it has seen, so
//! that this time must not go back: not when the wall clock is set, which it is asked at the start alone, and not with a new
//! process or after a boot with a clock that is wrong. For the latter a file says what no timestamp has reached yet; it is
//! moved on before one comes near.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// How far ahead the file is moved: a new process is that far ahead of the time at most.
const AHEAD: Duration = Duration::from_secs(90);
/// When it is moved: long before timestamps reach it, also where a disk is slow.
const NEAR: Duration = Duration::from_secs(60);

static CLOCK: OnceLock<StampClock> = OnceLock::new();

/// The clock of this process.
#[derive(Debug)]
struct StampClock {
    /// The same moment on both clocks.
    epoch: (Instant, Duration),
    file: Option<PathBuf>,
    /// What the file says, or would.
    limit: Mutex<Duration>,
}

/// Begins: at the wall clock's time, or where the file says that timestamps have been. Once per process.
pub(super) fn start(file: Option<&Path>) {
    let _ = CLOCK.set(StampClock::new(file, wall(), Instant::now()));
    keep_ahead(Instant::now());
}

/// A moment on both clocks.
pub(super) fn epoch() -> (Instant, SystemTime) {
    match CLOCK.get() {
        Some(clock) => (clock.epoch.0, UNIX_EPOCH + clock.epoch.1),
        None => (Instant::now(), SystemTime::now()),
    }
}

/// To be called several times a minute.
pub(super) fn keep_ahead(now: Instant) {
    if let Some(clock) = CLOCK.get() {
        clock.keep_ahead(now);
    }
}

fn wall() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

impl StampClock {
    fn new(file: Option<&Path>, wall: Duration, now: Instant) -> Self {
        let said = file.map(read).unwrap_or_default();
        if said > wall + AHEAD {
            tracing::warn!(
                "the clock is {} s behind the timestamps of former handshakes: it was set back, or is not set yet; handshakes go on \
                 from there",
                (said - wall).as_secs()
            );
        }
        Self {
            epoch: (now, wall.max(said)),
            file: file.map(Path::to_owned),
            limit: Mutex::new(Duration::ZERO),
        }
    }

    fn keep_ahead(&self, now: Instant) {
        let Some(file) = &self.file else { return };
        let time = self.epoch.1 + now.saturating_duration_since(self.epoch.0);
        let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        if *limit > time + NEAR {
            return;
        }
        let next = time + AHEAD;
        // Whatever becomes of it: it is tried again when it is near, not at each tick.
        *limit = next;
        drop(limit);
        if let Err(error) = write(file, next) {
            tracing::warn!(file = %file.display(), %error, "the time of handshakes cannot be kept");
        }
    }
}

/// Seconds since 1970; nothing where there is no such file.
fn read(file: &Path) -> Duration {
    let text = fs::read_to_string(file).unwrap_or_default();
    // More than that is damage: it would leave no room for later ones.
    const MOST: u64 = 253_402_300_799;
    match text.trim().parse() {
        Ok(seconds) if seconds <= MOST => Duration::from_secs(seconds),
        _ => Duration::ZERO,
    }
}

fn write(file: &Path, time: Duration) -> io::Result<()> {
    let beside = file.with_extension("new");
    let mut out = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)?;
    // Rounded up: it is what no timestamp has reached.
    out.write_all(format!("{}\n", time.as_secs() + 1).as_bytes())?;
    out.sync_all()?;
    fs::rename(&beside, file)?;
    match file.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: Duration = Duration::from_secs(1_800_000_000);

    fn time(clock: &StampClock, now: Instant) -> Duration {
        clock.epoch.1 + now.saturating_duration_since(clock.epoch.0)
    }

    #[test]
    fn no_process_and_no_clock_goes_back() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("clock");
        let mut last = Duration::ZERO;
        let mut now = Instant::now();
        // Good, 1970, an hour back, ten years ahead, and good again.
        let decade = Duration::from_secs(3653 * 86_400);
        for wall in [
            T,
            Duration::from_secs(5),
            T - Duration::from_secs(3600),
            T + decade,
            T,
        ] {
            let clock = StampClock::new(Some(&file), wall, now);
            for _ in 0..200 {
                assert!(time(&clock, now) > last, "{wall:?}");
                last = time(&clock, now);
                clock.keep_ahead(now);
                now += Duration::from_secs(1);
            }
            // It dies without notice.
        }
        assert!(last < T + decade + 8 * AHEAD + Duration::from_secs(1000));
    }

    #[test]
    fn a_good_clock_is_followed_and_a_damaged_file_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("clock");
        let now = Instant::now();
        for text in ["", "nonsense", "-5", "99999999999999999", "1000\n"] {
            fs::write(&file, text).unwrap();
            assert_eq!(time(&StampClock::new(Some(&file), T, now), now), T, "{text}");
        }
        assert_eq!(time(&StampClock::new(None, T, now), now), T);
    }
}
