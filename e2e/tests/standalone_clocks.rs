//! Clocks that jump: an hour back, ten years ahead, a boot in 1970. Tunnels are back by themselves, and keys rotate.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use warren_e2e::{
    bench::rotation::load::pods,
    lab::{Lab, LabOptions, Node, Pod, PodSpec, QUICKLY, wait::wait_until},
    scenario::{answers, nothing_in_clear},
};

/// By then tunnels are back.
const BACK: Duration = Duration::from_secs(60);
/// The limit ends a broken run.
const LIMIT: Duration = Duration::from_secs(120);
const YEAR: i64 = 365 * 86_400;

/// How far a node's clock is from the machine's, seconds.
fn offset(node: &Node) -> Result<i64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    Ok(i64::try_from(node.clock()?)? - i64::try_from(now)?)
}

fn set(node: &Node, clock: &str, seconds: std::ops::Range<i64>) -> Result<()> {
    node.set_clock(clock)?;
    wait_until(LIMIT, &format!("{}'s clock is {clock}", node.name), || {
        let offset = offset(node)?;
        ensure!(seconds.contains(&offset), "it is {offset} s off");
        Ok(())
    })
}

/// All pods answer all others, soon.
fn back(what: &str, pods: &[Pod]) -> Result<()> {
    let start = Instant::now();
    wait_until(BACK, &format!("{what}: tunnels are back"), || {
        for from in pods {
            for to in pods.iter().filter(|to| to.name() != from.name()) {
                answers(from, to)?;
            }
        }
        Ok(())
    })?;
    println!("{what}: back after {:.1} s", start.elapsed().as_secs_f32());
    Ok(())
}

/// Everything works: pods answer, keys rotate, status is good.
fn works(lab: &Lab, what: &str, pods: &[Pod]) -> Result<()> {
    back(what, pods)?;
    let rotated = lab.rotate(&[&["--all"], &QUICKLY[..]].concat());
    rotated.with_context(|| format!("{what}: keys do not rotate"))?;
    wait_until(LIMIT, &format!("{what}: status is good"), || {
        let output = lab.warren(&["encrypt", "status"])?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        );
        Ok(())
    })
}

/// The node's processes die and come back, so that every handshake is new.
fn restart(node: &Node) -> Result<()> {
    if node.number == 1 {
        node.kill_keyd()?;
        node.start_keyd()?;
    }
    node.kill_agent()?;
    node.kill_tunnel()?;
    node.start_agent()
}

/// Power off and on with a clock of its own; its pod is another afterwards.
fn boot(lab: &Lab, node: &Node, pods: &mut Vec<Pod>, clock: &str) -> Result<()> {
    let index = usize::from(node.number - 1);
    drop(pods.remove(index));
    node.power_off()?;
    node.set_clock(clock)?;
    node.boot()?;
    lab.connect(node)?;
    if node.number == 1 {
        node.start_keyd()?;
    }
    node.start_agent()?;
    lab.wait_ready(BACK)?;
    let name = format!("pod{}-{}", node.number, pods.len() + 1);
    pods.insert(index, lab.add_pod(PodSpec::new(&name, node.number))?);
    Ok(())
}

/// node1 runs keyd; node3's clock is good all the time.
#[test]
fn clocks_jump_and_nobody_is_cut_off() -> Result<()> {
    let options = LabOptions {
        clocks: true,
        ..LabOptions::default()
    };
    Lab::run(options, |lab| {
        let capture = lab.capture()?;
        let mut pods = pods(lab)?;
        let nodes = [lab.node(1), lab.node(2)];
        for node in &nodes {
            ensure!(offset(node)?.abs() < 5, "the clock is wrong at the start");
        }
        let back_by_an_hour = ("-1h", -3605..-3595);
        let decade_ahead = ("+10y", 9 * YEAR..11 * YEAR);
        for clocks in [
            [&back_by_an_hour, &decade_ahead],
            [&decade_ahead, &back_by_an_hour],
        ] {
            let what = format!("keyd's node {}, another {}", clocks[0].0, clocks[1].0);
            for (node, (clock, seconds)) in nodes.iter().zip(clocks) {
                set(node, clock, seconds.clone())?;
            }
            back(&format!("{what}, at run time"), &pods)?;
            nodes.iter().try_for_each(|node| restart(node))?;
            works(lab, &format!("{what}, at a start"), &pods)?;
        }
        // Ten years back: no peer has forgotten the timestamps.
        for node in &nodes {
            set(node, "+0", -5..5)?;
            restart(node)?;
        }
        back("good clocks again", &pods)?;
        for node in nodes.iter().rev() {
            let what = format!("{} boots in 1970", node.name);
            boot(lab, node, &mut pods, "@1970-01-01 00:00:10")?;
            works(lab, &what, &pods)?;
            set(node, "+0", -5..5)?;
            back(&format!("{what}, and its clock is set"), &pods)?;
        }
        nothing_in_clear(&capture.finish()?)
    })
}
