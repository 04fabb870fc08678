//! Threads in namespaces of their own: nothing that a test does outlives it or reaches the machine.

use std::{
    os::unix::fs::MetadataExt as _,
    panic,
    path::Path,
    process::Command,
    sync::mpsc,
    thread::{self, JoinHandle},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::gettid,
};

/// Runs a test on a thread with a network namespace, a mount namespace and a bpffs of its own.
pub(crate) fn isolated(test: impl FnOnce(&Path) + Send + 'static) {
    let body = move || {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).expect("makes namespaces; run as root");
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            None::<&str>,
        )
        .expect("makes mounts private");
        let directory = tempfile::tempdir().expect("makes a directory");
        mount(
            Some("bpf"),
            directory.path(),
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .expect("mounts a bpffs");
        ip("link set lo up");
        test(directory.path());
        // The mount goes with the namespace; the directory could not be removed under it.
        nix::mount::umount2(directory.path(), nix::mount::MntFlags::MNT_DETACH).expect("unmounts the bpffs");
    };
    if let Err(panic) = thread::spawn(body).join() {
        panic::resume_unwind(panic);
    }
}

/// Runs `ip` in the namespace of the calling thread.
pub(crate) fn ip(arguments: &str) {
    command("ip", arguments);
}

/// Runs a command in the namespace of the calling thread.
pub(crate) fn command(program: &str, arguments: &str) {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .expect("runs");
    assert!(
        output.status.success(),
        "{program} {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Index of a device of the calling thread's namespace.
pub(crate) fn ifindex(name: &str) -> u32 {
    nix::net::if_::if_nametoindex(name).expect("the device exists")
}

type Task = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace: a pod, or a peer.
pub(crate) struct Peer {
    pub(crate) thread: i32,
    tasks: Option<mpsc::Sender<Task>>,
    worker: Option<JoinHandle<()>>,
}

impl Peer {
    pub(crate) fn new() -> Self {
        let (tasks, queue) = mpsc::channel::<Task>();
        let (ready, started) = mpsc::channel();
        let worker = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("makes a namespace; run as root");
            ip("link set lo up");
            ready.send(gettid().as_raw()).expect("somebody waits");
            for task in queue {
                task();
            }
        });
        let thread = started.recv().expect("the thread starts");
        Self {
            thread,
            tasks: Some(tasks),
            worker: Some(worker),
        }
    }

    /// Runs something in the peer's namespace and waits for it.
    pub(crate) fn run<T: Send + 'static>(&self, task: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        let task: Task = Box::new(move || drop(done.send(task())));
        self.tasks
            .as_ref()
            .expect("is alive")
            .send(task)
            .expect("is alive");
        result.recv().expect("the task does not panic")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.tasks = None;
        if let Some(worker) = self.worker.take() {
            drop(worker.join());
        }
    }
}

#[test]
fn namespaces_are_private() {
    let outside = std::fs::metadata("/proc/thread-self/ns/net")
        .expect("is there")
        .ino();
    isolated(move |_| {
        let inside = std::fs::metadata("/proc/thread-self/ns/net")
            .expect("is there")
            .ino();
        assert_ne!(inside, outside);
        let peer = Peer::new().run(|| {
            std::fs::metadata("/proc/thread-self/ns/net")
                .expect("is there")
                .ino()
        });
        assert!(peer != inside && peer != outside);
    });
}
