//! The program at the cgroup of the host.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use nix::mount::{MsFlags, mount};

use super::{config, isolation::isolated};
use crate::{Datapath, Error};

/// A directory in the machine's hierarchy of cgroups, which no process is in; gone with the value.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(mounted: &Path) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = mounted.join(format!("warren-test-{}-{number}", std::process::id()));
        fs::create_dir(&directory).expect("makes a cgroup");
        Self(directory)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        drop(fs::remove_dir(&self.0));
    }
}

fn with_cgroups(test: fn(&Path, &Path, &Path)) {
    isolated(move |pins| {
        let mounted = tempfile::tempdir().expect("makes a directory");
        mount(
            Some("none"),
            mounted.path(),
            Some("cgroup2"),
            MsFlags::empty(),
            None::<&str>,
        )
        .expect("mounts the cgroups");
        let (first, second) = (Cgroup::new(mounted.path()), Cgroup::new(mounted.path()));
        test(pins, &first.0, &second.0);
        drop((first, second));
        nix::mount::umount2(mounted.path(), nix::mount::MntFlags::MNT_DETACH).expect("unmounts");
    });
}

#[test]
fn the_hosts_program_is_attached_and_adopted() {
    with_cgroups(|pins, first, second| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        assert!(!datapath.host_attached(first).unwrap());
        datapath.attach_host(first).unwrap();
        datapath.attach_host(first).unwrap();
        assert!(datapath.host_attached(first).unwrap());
        assert!(!datapath.host_attached(second).unwrap());
        drop(datapath);
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        assert!(datapath.host_attached(first).unwrap(), "adopted");
        datapath.attach_host(second).unwrap();
        assert!(datapath.host_attached(second).unwrap(), "moved");
        assert!(!datapath.host_attached(first).unwrap());
        datapath.detach_host().unwrap();
        datapath.detach_host().unwrap();
        assert!(!datapath.host_attached(second).unwrap());
    });
}

/// Another program than this version's: with maps of its own.
#[test]
fn an_older_program_is_replaced_in_place() {
    with_cgroups(|pins, first, _| {
        let mut old = Datapath::open(&config(pins)).unwrap();
        old.attach_host(first).unwrap();
        drop(old);
        let directory = pins.join("warren");
        fs::rename(
            directory.join(format!("v{}", warren_abi::VERSION)),
            directory.join("v0"),
        )
        .unwrap();
        let mut new = Datapath::open(&config(pins)).unwrap();
        assert!(!new.host_attached(first).unwrap(), "still the old program");
        assert!(directory.join("v0").exists(), "it uses its maps");
        let link = |datapath: &Datapath| {
            let link = crate::sys::open_pin(&datapath.links_dir.join("to_host"))
                .unwrap()
                .unwrap();
            crate::sys::link_info(link).unwrap().id
        };
        let before = link(&new);
        new.attach_host(first).unwrap();
        assert_eq!(link(&new), before, "the same link");
        assert!(new.host_attached(first).unwrap());
        assert!(!directory.join("v0").exists());
    });
}

#[test]
fn a_cgroup_that_was_removed() {
    with_cgroups(|pins, first, second| {
        let mut datapath = Datapath::open(&config(pins)).unwrap();
        datapath.attach_host(first).unwrap();
        fs::remove_dir(first).unwrap();
        assert!(matches!(datapath.host_attached(first), Err(Error::Io { .. })));
        datapath.attach_host(second).unwrap();
        assert!(datapath.host_attached(second).unwrap());
        let error = datapath.attach_host(pins).unwrap_err().to_string();
        assert!(error.contains("no directory of a cgroup2 file system"), "{error}");
    });
}
