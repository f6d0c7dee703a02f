//! The appliance's answers about what the replica holds of a disk's blocks, as one task.
//!
//! Invariant: as in `drva::hashes`, whose view of a cut this is: one question at a time, each answered
//! once and in order; in any doubt, or if it would take long, the answer is "not known".

use crate::numbers::Numbers;
use crate::upload::{Post, Shared};
use crate::world::World;
use drva::disk::Disk;
use drva::hashes::{
    AFTER_FAILURE, BlockHash, MAX_WAITING, OPEN_LIMIT, PATIENCE, READ_LIMIT, Unknown, View, hash_of,
};
use drva::outbox::Outbox;
use filter_core::disk::hashes::Hash;
use filter_core::lane::layout::DIRTY_BLOCK_BYTES;
use filter_core::wire::Message;
use object_store::ObjectStore;
use recovery_store::Container;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

/// The hashes of what a sync has read: of its whole blocks.
pub fn hashes_of(data: &[u8]) -> Vec<Hash> {
    let blocks = data.chunks_exact(DIRTY_BLOCK_BYTES as usize);
    blocks.map(hash_of).collect()
}

/// A question about a disk.
pub struct Ask {
    disk: Arc<Disk>,
    offset_bytes: u64,
    blocks: u32,
    outbox: Arc<Outbox>,
    channel: u32,
    came: Instant,
}

impl Ask {
    fn answer(&self, hashes: Vec<BlockHash>) {
        let offset_bytes = self.offset_bytes;
        let message = Message::Hashes {
            offset_bytes,
            hashes,
        };
        self.outbox.send(&message, self.channel);
    }
}

impl Shared {
    /// Whether a question waits for its answer.
    pub fn answers(&self) -> bool {
        self.answering || !self.asks.is_empty()
    }
}

impl World {
    /// A host asks about blocks of the disk of a channel.
    pub(crate) fn hash_request(
        &mut self,
        of: (u64, u32),
        outbox: Arc<Outbox>,
        offset_bytes: u64,
        blocks: u32,
    ) {
        self.count("hashes: asked for");
        let Some(server) = &self.server else { return };
        let mut shared = server.shared.borrow_mut();
        let channel = server.channels.get(&of);
        let disk = channel.and_then(|(id, generation)| {
            let disk = shared.domain.disks.get(id)?;
            (!disk.is_superseded(*generation)).then(|| disk.clone())
        });
        let Some(disk) = disk.filter(|_| shared.asks.len() < MAX_WAITING) else {
            let hashes = Vec::new();
            let message = Message::Hashes {
                offset_bytes,
                hashes,
            };
            return outbox.send(&message, of.1);
        };
        shared.asks.push_back(Ask {
            disk,
            offset_bytes,
            blocks,
            outbox,
            channel: of.1,
            came: Instant::now(),
        });
        server.questions.notify_one();
    }
}

/// Answers questions.
pub struct Hasher {
    /// What it shares with the upload and the sessions.
    pub shared: Rc<RefCell<Shared>>,
    /// The store.
    pub store: Arc<dyn ObjectStore>,
    /// Notified when there is a question.
    pub work: Rc<Notify>,
    /// Notified when something was answered.
    pub told: Rc<Notify>,
    /// How long it takes.
    pub numbers: RefCell<Numbers>,
}

impl Hasher {
    /// Runs until it is aborted.
    pub async fn run(self) {
        let mut view = None;
        let mut quiet_until = Instant::now();
        loop {
            let ask = {
                let mut shared = self.shared.borrow_mut();
                let ask = shared.asks.pop_front();
                shared.answering = ask.is_some();
                ask
            };
            let Some(ask) = ask else {
                self.told.notify_one();
                self.work.notified().await;
                continue;
            };
            if ask.came.elapsed() > PATIENCE || Instant::now() < quiet_until {
                self.answer(&ask, Vec::new(), "hashes: not known");
                continue;
            }
            match self.look(&mut view, &ask).await {
                Ok(hashes) => self.answer(&ask, hashes, "hashes: answered"),
                Err(Unknown::Disk) => self.answer(&ask, Vec::new(), "hashes: not known"),
                Err(_) => {
                    // What was opened may be what is wrong.
                    view = None;
                    quiet_until = Instant::now() + AFTER_FAILURE;
                    self.answer(&ask, Vec::new(), "hashes: the store failed");
                }
            }
        }
    }

    fn answer(&self, ask: &Ask, hashes: Vec<BlockHash>, how: &'static str) {
        ask.answer(hashes);
        self.shared.borrow_mut().posts.push(Post::Answered(how));
        self.told.notify_one();
    }

    async fn look(&self, view: &mut Option<View>, ask: &Ask) -> Result<Vec<BlockHash>, Unknown> {
        let commits = self.shared.borrow().domain.commits;
        if view.as_ref().is_none_or(|view| view.commits() != commits) {
            let store = self.store.clone();
            let open =
                async { View::of(Container::open_store(store, "memory").await?, commits).await };
            *view = None;
            *view = Some(within(OPEN_LIMIT, open).await?);
        }
        let view = view.as_ref().ok_or(Unknown::Disk)?;
        let before = view.untouched(&ask.disk, ask.offset_bytes, ask.blocks)?;
        let read = view.read(&ask.disk, ask.offset_bytes, &before);
        let mut hashes = within(READ_LIMIT, read).await?;
        // What comes meanwhile counts, too.
        let took_us = self.numbers.borrow_mut().spread(10, 20_000);
        tokio::time::sleep(Duration::from_micros(took_us)).await; // virtual: the clock is paused
        view.forget_touched(&ask.disk, ask.offset_bytes, &mut hashes)?;
        Ok(hashes)
    }
}

async fn within<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, Unknown>>,
) -> Result<T, Unknown> {
    let late = Unknown::GivenUp("the store is too slow");
    timeout(limit, work).await.unwrap_or(Err(late))
}
