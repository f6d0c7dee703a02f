//! The control thread: finds lanes, speaks on the control port; [`crate::cut`] takes the cuts.
//!
//! Invariant: a lane is handed to a pump once its stream has begun, and is dropped there when its file
//! goes; the appliance can ask this host about cuts whether or not it has lanes, since only then it
//! knows that no disk was opened here.

use crate::connection::{Connection, LinkError};
use crate::dial::Dialer;
use crate::lane::{CutAsk, Lane};
use crate::raw::{self, Interest};
use crate::status::Shared;
use crossbeam::channel::Sender;
use filter_core::lane::layout::LaneState;
use filter_core::lane::sync::Ordering::{Acquire, Relaxed};
use filter_core::mapping::{MappedLane, RunFolder};
use filter_core::wire::{Message, PortRole};
use std::collections::{HashMap, VecDeque};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often the folder of the lanes is looked at.
const SCAN_EVERY: Duration = Duration::from_millis(100);
/// Orders that may wait: one for each domain of an appliance, and what ends it.
const MAX_ORDERS: usize = 256;
/// A lane that was found.
pub(crate) struct Known {
    pub(crate) inode: u64,
    pub(crate) mapped: Arc<MappedLane>,
    /// The lane lives in a pump as long as this end is held.
    pub(crate) asks: Sender<CutAsk>,
}

/// What the appliance wants of a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// The positions.
    Request,
    /// The same, with completions held meanwhile.
    Hold,
    /// They need not be held any more.
    Release,
}

/// An order of the appliance.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) what: What,
    pub(crate) epoch: u32,
    pub(crate) domain: String,
}

/// The control thread's state.
pub struct Control {
    pub(crate) run: RunFolder,
    pumps: Vec<Sender<Box<Lane>>>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) known: HashMap<PathBuf, Known>,
    pub(crate) unusable: HashMap<PathBuf, u64>,
    /// Orders that were not carried out yet.
    pub(crate) orders: VecDeque<Order>,
    /// How long completions are held at most.
    pub(crate) hold: Duration,
}

/// Whether a lane was made, and its producer has not yet begun.
pub(crate) fn is_fresh(lane: &MappedLane) -> bool {
    let state = lane.memory().producer().state.load(Acquire); // follows the base in the producer's order
    LaneState::from_word(state) == Some(LaneState::Fresh)
}

impl Control {
    /// A control thread.
    pub fn new(
        run: RunFolder,
        pumps: Vec<Sender<Box<Lane>>>,
        shared: Arc<Shared>,
        hold: Duration,
    ) -> Self {
        Self {
            run,
            pumps,
            shared,
            known: HashMap::new(),
            unusable: HashMap::new(),
            orders: VecDeque::new(),
            hold,
        }
    }

    /// Runs until the daemon stops.
    pub fn run(mut self, mut dialer: Dialer) {
        let mut connection: Option<Connection> = None;
        while !self.shared.stopping.load(Ordering::Acquire) {
            // pairs with the store at SIGTERM
            self.scan();
            let connected = connection.is_some();
            self.shared.tell(PortRole::Control, connected, Vec::new());
            let Some(open) = &mut connection else {
                match dialer.poll() {
                    Some(Ok(made)) => connection = Some(made),
                    Some(Err(error)) => dialer.failed(&error),
                    None => std::thread::sleep(SCAN_EVERY),
                }
                continue;
            };
            match self.converse(open) {
                Ok(asked) => dialer.useful(open, asked),
                Err(error) => {
                    dialer.failed(&error);
                    self.orders.clear();
                    connection = None;
                }
            }
        }
    }

    /// One round on the control connection. Returns whether a cut was asked for.
    fn converse(&mut self, connection: &mut Connection) -> Result<bool, LinkError> {
        self.hear(connection, SCAN_EVERY)?;
        let mut asked = false;
        while let Some(order) = self.orders.pop_front() {
            if self.shared.stopping.load(Ordering::Acquire) {
                break; // pairs with the store at SIGTERM
            }
            let Order {
                what,
                epoch,
                domain,
            } = order;
            if what == What::Release {
                continue; // of a cut that is over
            }
            asked = true;
            let answer = self.cut(epoch, &domain, what == What::Hold, connection)?;
            let counter = match &answer {
                Message::Error { .. } => &self.shared.cuts_void,
                _ => &self.shared.cuts_reported,
            };
            counter.fetch_add(1, Relaxed); // a counter
            connection.queue(&answer, 0);
        }
        connection.keep_alive()?;
        connection.flush()?;
        Ok(asked)
    }

    /// Waits for what the appliance says, and puts it into the list of orders.
    pub(crate) fn hear(
        &mut self,
        connection: &mut Connection,
        limit: Duration,
    ) -> Result<(), LinkError> {
        let interest = Interest {
            fd: connection.fd(),
            write: connection.wants_write(),
        };
        raw::poll(&[interest], limit)?;
        let orders = &mut self.orders;
        connection.receive(&mut |_, message| {
            let (what, epoch, domain) = match message {
                Message::CutRequest { epoch, domain } => (What::Request, epoch, domain),
                Message::CutHold { epoch, domain } => (What::Hold, epoch, domain),
                Message::CutRelease { epoch, domain } => (What::Release, epoch, domain),
                Message::Error { text, .. } => return Err(LinkError::Refused(text)),
                _ => {
                    return Err(LinkError::Protocol(
                        "a frame that does not belong on the control port",
                    ));
                }
            };
            if orders.len() >= MAX_ORDERS {
                return Err(LinkError::Protocol("too many cuts are asked for at once"));
            }
            orders.push_back(Order {
                what,
                epoch,
                domain,
            });
            Ok(())
        })?;
        Ok(())
    }

    /// Looks for lanes that have come, were replaced, or went.
    fn scan(&mut self) {
        let Ok(entries) = std::fs::read_dir(self.run.lanes_dir()) else {
            return;
        };
        let mut seen = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|e| e != "lane") {
                continue;
            }
            let Ok(meta) = entry.metadata() else { continue };
            let inode = meta.ino();
            seen.push(path.clone());
            let known = self.known.get(&path).map(|known| known.inode);
            if known == Some(inode) || self.unusable.get(&path) == Some(&inode) {
                continue;
            }
            if known.is_some() {
                self.forget(&path);
            }
            match MappedLane::open(&path) {
                // Its stream's base, which decides how it is opened, is not published yet.
                Ok(mapped) if is_fresh(&mapped) => {}
                Ok(mapped) => self.found(path, inode, mapped),
                Err(error) => {
                    tracing::error!("{error}; the filter makes it anew when the disk is opened");
                    self.unusable.insert(path, inode);
                }
            }
        }
        let gone: Vec<PathBuf> = self
            .known
            .keys()
            .filter(|path| !seen.contains(path))
            .cloned()
            .collect();
        gone.iter().for_each(|path| self.forget(path));
    }

    fn found(&mut self, path: PathBuf, inode: u64, mapped: MappedLane) {
        let id = mapped.identity();
        tracing::info!(
            "lane of {}/{} in domain {}",
            id.vm_name,
            id.disk_label,
            id.domain
        );
        let mapped = Arc::new(mapped);
        let role = Lane::home(&*mapped);
        let (lane, asks) = Lane::new(mapped.clone());
        let known = Known {
            inode,
            mapped,
            asks,
        };
        self.known.insert(path, known);
        if let Some(pump) = self.pumps.get(usize::from(role.offset())) {
            let _ = pump.send(Box::new(lane));
            self.shared.wake_pump(role);
        }
    }

    fn forget(&mut self, path: &PathBuf) {
        // Whichever pump has the lane, or will have it next, finds its questions cut off.
        if self.known.remove(path).is_some() {
            self.shared.wake_all();
        }
    }
}
