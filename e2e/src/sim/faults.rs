//! What goes wrong, drawn from the seed.

use warren_keyd_core::rotation::{Concurrency, NodeKeys, Pace, RotationSpec, Selection, Stragglers};

use super::{
    MILLI, Micros, NodeId, SECOND, Sabotage,
    agent::Disk,
    kernel::Kernel,
    world::{Event, World},
};

/// A fault, or its end.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    /// The agent is killed after so many more steps.
    KillAgent(NodeId, u32),
    /// The agent is killed and finds an older disk.
    OldDisk(NodeId),
    /// The node reboots: devices and maps are empty.
    Reboot(NodeId, Damage),
    /// The node is off for minutes.
    Away(NodeId, Micros),
    PowerOn(NodeId),
    /// Two nodes cannot reach each other.
    Cut(NodeId, NodeId, Micros),
    Join(NodeId, NodeId),
    /// A node cannot reach keyd.
    CutControl(NodeId, Micros),
    JoinControl(NodeId),
    /// The leader is killed.
    KillLeader,
    StartKeyd(usize),
    /// Another replica begins a term; the leader does not notice for a while.
    SplitBrain(Micros),
    /// The API server answers nobody.
    StoreDown(Micros),
    Create(NodeId),
    Delete(NodeId),
    Rotate(u32),
    Abort(u32),
    Forget(u32),
    /// All nodes, at the usual pace.
    RotateAll,
    /// From now on nothing goes wrong.
    Calm,
}

/// What a reboot does to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Damage {
    None,
    /// An older copy comes back.
    Old,
    /// Everything on it is lost.
    Replaced,
}

/// A world with its faults, all from the seed.
pub(super) fn world(seed: u64, sabotage: Sabotage, trace: bool) -> World {
    let mut dice = crate::oracle::Dice::new(seed ^ 0x5eed);
    let count = 2 + dice.roll(4);
    let mut world = World::new(seed, count, sabotage, trace);
    world.longest_delay = [2, 20, 100, 400][dice.roll(4)] * MILLI;
    world.loss_per_mille = [0, 10, 50, 100][dice.roll(4)];
    // On, off, or turned on and off with new keys.
    world.percent_with_psks = [100, 100, 100, 50, 80, 0][dice.roll(6)];
    let first = 2 + dice.roll(count - 1);
    world.watch_lag = [50 * MILLI, 800 * MILLI, 10 * SECOND][dice.roll(3)];
    world.at(0, Event::Lead);
    for node in 0..count {
        let at = if node < first {
            0
        } else {
            world.between(10 * SECOND, 60 * SECOND)
        };
        world.at(at, Event::Fault(Fault::Create(node)));
        world.at(at + SECOND, Event::Traffic(node));
    }
    // Sometimes long enough for sessions to die of age.
    let long = dice.once_in(16);
    let calm = if long { 480 * SECOND } else { 90 * SECOND };
    if long {
        let (node, at) = (dice.roll(count), world.between(2 * SECOND, 30 * SECOND));
        let pause = world.between(200 * SECOND, 400 * SECOND);
        world.at(at, Event::Fault(Fault::Away(node, pause)));
        world.at(240 * SECOND, Event::Fault(Fault::Rotate(9)));
    }
    world.at(6 * SECOND, Event::Fault(Fault::Rotate(0)));
    for extra in 1..1 + dice.roll(3) as u32 {
        let at = world.between(8 * SECOND, calm);
        world.at(at, Event::Fault(Fault::Rotate(extra)));
    }
    for _ in 0..dice.roll(9) {
        let fault = draw(&mut dice, count);
        // Dense around the first rotation, where most is going on.
        let latest = if dice.once_in(2) { 25 * SECOND } else { calm };
        let at = world.between(5 * SECOND, latest);
        world.at(at, Event::Fault(fault));
    }
    world.calm = calm;
    world.end = calm + 900 * SECOND;
    world.at(calm, Event::Fault(Fault::Calm));
    world
}

fn draw(dice: &mut crate::oracle::Dice, count: usize) -> Fault {
    let node = dice.roll(count);
    let other = (node + 1 + dice.roll(count - 1)) % count;
    let pause = dice.bits() % (40 * SECOND);
    match dice.roll(20) {
        0..=4 => Fault::KillAgent(node, dice.roll(30) as u32),
        5 => Fault::OldDisk(node),
        6 => Fault::Reboot(node, Damage::None),
        7 => Fault::Reboot(node, [Damage::Old, Damage::Replaced][dice.roll(2)]),
        8..=9 => Fault::Cut(node, other, pause),
        10..=12 => Fault::CutControl(node, pause),
        13..=14 => Fault::KillLeader,
        15..=16 => Fault::SplitBrain(pause),
        17 => Fault::StoreDown(pause),
        18 => Fault::Delete(node),
        _ => match dice.roll(2) {
            0 => Fault::Abort(dice.roll(3) as u32),
            _ => Fault::Forget(dice.roll(3) as u32),
        },
    }
}

impl World {
    pub(super) fn fault(&mut self, fault: Fault) {
        if self.now >= self.calm && !matches!(fault, Fault::Calm | Fault::PowerOn(_) | Fault::StartKeyd(_)) {
            return self.late(fault);
        }
        self.note(|| format!("{fault:?}"));
        match fault {
            Fault::KillAgent(node, steps) => self.nodes[node].crash_in = Some(steps),
            Fault::OldDisk(node) => self.old_disk(node),
            Fault::Reboot(node, damage) => self.reboot(node, damage),
            Fault::Away(node, pause) => {
                self.power_off(node);
                self.at(pause, Event::Fault(Fault::PowerOn(node)));
            }
            Fault::PowerOn(node) => self.power_on(node),
            Fault::Cut(a, b, pause) => {
                self.cuts.push((a.min(b), a.max(b)));
                self.judge.disturb(a, b);
                self.at(pause, Event::Fault(Fault::Join(a, b)));
            }
            Fault::Join(a, b) => self.join(a, b),
            Fault::CutControl(node, pause) => {
                self.control_cuts[node] = true;
                self.at(pause, Event::Fault(Fault::JoinControl(node)));
            }
            Fault::JoinControl(node) => self.join_control(node),
            Fault::KillLeader => self.kill_leader(),
            Fault::StartKeyd(keyd) => self.keyds[keyd].down = false,
            Fault::SplitBrain(pause) => self.split_brain(pause),
            Fault::StoreDown(pause) => self.store.down_until = self.now + pause,
            Fault::Create(node) => self.create(node),
            Fault::Delete(node) => self.delete_node(node),
            Fault::Rotate(number) => {
                let spec = self.draw_spec();
                self.put_rotation(&format!("r{number}"), spec);
            }
            Fault::RotateAll => self.rotate_all(),
            Fault::Abort(number) => {
                let name = format!("r{number}");
                if let Some(stored) = self.store.rotations.get(&name) {
                    let spec = RotationSpec {
                        abort: true,
                        ..stored.spec.clone()
                    };
                    self.put_rotation(&name, spec);
                }
            }
            Fault::Forget(number) => self.drop_rotation(&format!("r{number}")),
            Fault::Calm => self.calm_down(),
        }
    }

    /// Ends of faults count also when it should be calm; beginnings do not.
    fn late(&mut self, fault: Fault) {
        match fault {
            Fault::Join(a, b) => self.join(a, b),
            Fault::JoinControl(node) => self.join_control(node),
            _ => {}
        }
    }

    fn join(&mut self, a: NodeId, b: NodeId) {
        let cut = (a.min(b), a.max(b));
        if let Some(index) = self.cuts.iter().position(|there| *there == cut) {
            self.cuts.swap_remove(index);
        }
    }

    fn join_control(&mut self, node: NodeId) {
        // What was sent meanwhile is lost, so the stream cannot go on.
        let stream = self.nodes[node].agent.as_ref().and_then(|agent| agent.connection);
        if let Some(connection) = stream.filter(|_| self.control_cuts[node]) {
            self.break_connection(connection, false);
        }
        self.control_cuts[node] = false;
    }

    fn calm_down(&mut self) {
        self.cuts.clear();
        (0..self.nodes.len()).for_each(|node| self.join_control(node));
        self.store.down_until = 0;
        for node in &mut self.nodes {
            node.crash_in = None;
        }
        for keyd in 0..self.keyds.len() {
            self.keyds[keyd].down = false;
            // Whoever is deposed learns it by now.
            let newest = self
                .keyds
                .iter()
                .filter_map(|k| k.term.as_ref())
                .map(|term| term.epoch)
                .max();
            if let Some(epoch) = self.keyds[keyd].term.as_ref().map(|term| term.epoch)
                && Some(epoch) != newest
            {
                self.resign(keyd, epoch);
            }
        }
        self.at(SECOND, Event::Lead);
        self.at(SECOND, Event::Check);
    }

    fn old_disk(&mut self, node: NodeId) {
        let here = &mut self.nodes[node];
        if let (Some(old), Some(_)) = (here.old_disk.clone(), &here.agent) {
            self.kill(node);
            self.nodes[node].disk = old;
        }
    }

    fn reboot(&mut self, node: NodeId, damage: Damage) {
        if !self.nodes[node].powered {
            return;
        }
        self.power_off(node);
        let here = &mut self.nodes[node];
        match (damage, here.old_disk.clone()) {
            (Damage::Old, Some(old)) => here.disk = old,
            (Damage::Replaced, _) => (here.disk, here.old_disk) = (Disk::default(), None),
            _ => {}
        }
        let pause = self.between(SECOND, 20 * SECOND);
        self.at(pause, Event::Fault(Fault::PowerOn(node)));
    }

    fn power_off(&mut self, node: NodeId) {
        self.judge.boots(node);
        if self.nodes[node].agent.is_some() {
            self.kill(node);
        }
        let count = self.nodes.len();
        let here = &mut self.nodes[node];
        here.powered = false;
        here.kernel = Kernel::new(count);
    }

    fn power_on(&mut self, node: NodeId) {
        if self.store.nodes[node].is_none() || self.nodes[node].powered {
            return;
        }
        let here = &mut self.nodes[node];
        here.powered = true;
        here.life += 1;
        let life = here.life;
        let pause = self.between(MILLI, 3 * SECOND);
        self.at(pause, Event::Start(node, life));
    }

    fn kill_leader(&mut self) {
        let terms = self
            .keyds
            .iter()
            .enumerate()
            .filter_map(|(i, keyd)| Some((keyd.term.as_ref()?.epoch, i)));
        let Some((epoch, keyd)) = terms.max() else { return };
        self.keyds[keyd].down = true;
        self.resign(keyd, epoch);
        let pause = self.between(SECOND, 30 * SECOND);
        self.at(pause, Event::Fault(Fault::StartKeyd(keyd)));
    }

    fn split_brain(&mut self, pause: Micros) {
        let terms = self
            .keyds
            .iter()
            .enumerate()
            .filter_map(|(i, keyd)| Some((keyd.term.as_ref()?.epoch, i)));
        let Some((epoch, old)) = terms.max() else { return };
        let new = 1 - old;
        if self.keyds[new].down || self.now < self.store.down_until {
            return;
        }
        self.begin_term(new);
        self.at(pause, Event::Resign(old, epoch));
    }

    pub(super) fn create(&mut self, node: NodeId) {
        let uid = self.nodes[node].uid.clone();
        self.store.nodes[node] = Some(NodeKeys::none(uid));
        self.watchers_see(node);
        self.power_on(node);
    }

    /// The Node object is deleted; the machine goes away; often it comes back as another incarnation.
    pub(super) fn delete_node(&mut self, node: NodeId) {
        if self.store.nodes.iter().flatten().count() <= 2 || self.store.nodes[node].take().is_none() {
            return;
        }
        self.judge.disturb_all(node);
        self.power_off(node);
        let again = self.between(0, 60 * SECOND);
        let here = &mut self.nodes[node];
        here.disk = Disk::default();
        here.old_disk = None;
        here.uid = format!("u{node}-{}", self.now).into();
        self.watchers_see(node);
        if again < 30 * SECOND {
            self.at(again, Event::Fault(Fault::Create(node)));
        }
    }

    fn draw_spec(&mut self) -> RotationSpec {
        let count = self.nodes.len();
        let mut selection = Selection::default();
        if self.dice.once_in(3) {
            for node in &self.nodes {
                if self.dice.once_in(2) {
                    selection.names.insert(node.name.clone());
                }
            }
        }
        let concurrency = match self.dice.roll(3) {
            0 => Concurrency::Percent(100),
            1 => Concurrency::Percent(10),
            _ => Concurrency::Nodes(1 + self.dice.roll(count) as u32),
        };
        let stragglers = [
            Stragglers::Wait,
            Stragglers::Wait,
            Stragglers::Leave,
            Stragglers::Revoke,
        ];
        let stragglers = self.dice.pick(&stragglers);
        RotationSpec {
            selection,
            pace: Pace {
                concurrency,
                jitter_ms: [0, 0, 1500][self.dice.roll(3)],
                drain_ms: [1000, 1000, 3000][self.dice.roll(3)],
                deadline_ms: [10_000, 30_000, 60_000][self.dice.roll(3)],
            },
            stragglers,
            abort: false,
            every_seconds: None,
        }
    }
}
