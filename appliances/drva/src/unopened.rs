//! Domains that this appliance has a log of and cannot open: what is wrong with each.
//!
//! Invariant: one domain's damaged log keeps no other from being served. It is said once when it is found, in
//! the answer to each host that asks for it, and in the status. The log is not read again before its folder has
//! changed, or some minutes have passed: a log has gigabytes, and hosts ask again every second.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// An error of reading may have gone by itself.
const AGAIN_AFTER: Duration = Duration::from_secs(300);

/// Which folder it is, and when something was last put into it or taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Folder {
    inode: u64,
    changed_s: i64,
    changed_ns: i64,
}

fn look(log_dir: &Path) -> Option<Folder> {
    let found = std::fs::metadata(log_dir).ok()?;
    Some(Folder {
        inode: found.ino(),
        changed_s: found.mtime(),
        changed_ns: found.mtime_nsec(),
    })
}

struct Failure {
    why: String,
    folder: Option<Folder>,
    since: Instant,
}

/// The domains that cannot be opened.
#[derive(Default)]
pub struct Unopened(Mutex<BTreeMap<String, Failure>>);

impl Unopened {
    /// Why it cannot be opened, if nothing has changed since that was found.
    pub fn still(&self, name: &str, log_dir: &Path) -> Option<String> {
        let failures = self.0.lock();
        let failure = failures.get(name)?;
        let same = failure.folder == look(log_dir) && failure.since.elapsed() < AGAIN_AFTER;
        same.then(|| failure.why.clone())
    }

    /// It was tried, and could not be opened.
    pub fn failed(&self, name: &str, log_dir: &Path, why: String) {
        tracing::error!("domain {name} is not served: {why}");
        let failure = Failure {
            why,
            folder: look(log_dir),
            since: Instant::now(),
        };
        self.0.lock().insert(name.into(), failure);
    }

    /// It is open.
    pub fn opened(&self, name: &str) {
        if self.0.lock().remove(name).is_some() {
            tracing::info!("domain {name} is served again");
        }
    }

    /// All of them: name, and what is wrong.
    pub fn all(&self) -> Vec<(String, String)> {
        let failures = self.0.lock();
        let each = failures.iter();
        each.map(|(name, failure)| (name.clone(), failure.why.clone()))
            .collect()
    }
}
