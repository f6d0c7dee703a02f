//! The object store: in memory, with faults before and after the deed, and with delays in virtual time.
//!
//! Invariant: an object that was created stays as it is; a request that was given up may still arrive.

use crate::numbers::Numbers;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How the store behaves now.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mood {
    /// Nothing gets through.
    pub down: bool,
    /// Of 1000 requests, how many are refused before anything is done.
    pub fail_before: u64,
    /// Of 1000 writes, how many are done although the answer is lost.
    pub fail_after: u64,
    /// The longest delay of a request, in ms.
    pub delay_ms: u64,
}

#[derive(Debug)]
struct State {
    mood: Mood,
    numbers: Numbers,
    counts: BTreeMap<&'static str, u64>,
}

/// The store.
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<InMemory>,
    state: Arc<Mutex<State>>,
}

impl std::fmt::Display for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("simulated")
    }
}

fn refused() -> object_store::Error {
    object_store::Error::Generic {
        store: "simulated",
        source: "503 busy".into(),
    }
}

/// A write under way: given up, it may still arrive.
struct UnderWay {
    inner: Arc<InMemory>,
    state: Arc<Mutex<State>>,
    what: Option<(Path, PutPayload, PutOptions)>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let Some((path, payload, options)) = self.what.take() else {
            return;
        };
        let mut state = self.state.lock();
        if state.numbers.chance(500) {
            *state.counts.entry("store: late arrival").or_default() += 1;
            // In memory nothing waits; whether it was there already does not matter.
            let _ = self.inner.put_opts(&path, payload, options).now_or_never();
        }
    }
}

impl Faulty {
    /// A store without faults, as yet.
    pub fn new(inner: Arc<InMemory>, seed: u64) -> Self {
        let state = State {
            mood: Mood::default(),
            numbers: Numbers::new(seed),
            counts: BTreeMap::new(),
        };
        Self {
            inner,
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// From now on it behaves so.
    pub fn set(&self, mood: Mood) {
        self.state.lock().mood = mood;
    }

    /// What happened.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.state.lock().counts.clone()
    }

    /// Whether a request fails before anything is done, and how long it takes.
    fn fate(&self) -> (bool, bool, Duration) {
        let mut state = self.state.lock();
        let mood = state.mood;
        let delay = state.numbers.below(mood.delay_ms + 1);
        let before = mood.down || state.numbers.chance(mood.fail_before);
        let after = state.numbers.chance(mood.fail_after);
        let mut count = |what, on| *state.counts.entry(what).or_default() += u64::from(on);
        count("store: request while down", mood.down);
        count("store: refused before", before && !mood.down);
        count("store: request delayed", delay > 0);
        (before, after, Duration::from_millis(delay))
    }

    async fn pass(&self) -> Result<()> {
        let (before, _, delay) = self.fate();
        wait(delay).await;
        if before { Err(refused()) } else { Ok(()) }
    }
}

async fn wait(delay: Duration) {
    if !delay.is_zero() {
        tokio::time::sleep(delay).await; // virtual: the clock is paused
    }
}

impl ObjectStore for Faulty {
    fn put_opts<'a, 'b, 'c>(
        &'a self,
        location: &'b Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> BoxFuture<'c, Result<PutResult>>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        Box::pin(async move {
            let (before, after, delay) = self.fate();
            if before {
                wait(delay).await;
                return Err(refused());
            }
            let mut under_way = UnderWay {
                inner: self.inner.clone(),
                state: self.state.clone(),
                what: Some((location.clone(), payload.clone(), opts.clone())),
            };
            wait(delay).await;
            under_way.what = None;
            let done = self.inner.put_opts(location, payload, opts).await?;
            if after {
                *self
                    .state
                    .lock()
                    .counts
                    .entry("store: answer lost")
                    .or_default() += 1;
                return Err(refused());
            }
            Ok(done)
        })
    }

    fn put_multipart_opts<'a, 'b, 'c>(
        &'a self,
        location: &'b Path,
        opts: PutMultipartOptions,
    ) -> BoxFuture<'c, Result<Box<dyn MultipartUpload>>>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        self.inner.put_multipart_opts(location, opts)
    }

    fn get_opts<'a, 'b, 'c>(
        &'a self,
        location: &'b Path,
        options: GetOptions,
    ) -> BoxFuture<'c, Result<GetResult>>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        Box::pin(async move {
            self.pass().await?;
            self.inner.get_opts(location, options).await
        })
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (before, _, _) = self.fate();
        if before {
            return Box::pin(futures::stream::iter([Err(refused())]));
        }
        self.inner.list(prefix)
    }

    fn list_with_delimiter<'a, 'b, 'c>(
        &'a self,
        prefix: Option<&'b Path>,
    ) -> BoxFuture<'c, Result<ListResult>>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        self.inner.list_with_delimiter(prefix)
    }

    fn copy_opts<'a, 'b, 'c, 'd>(
        &'a self,
        from: &'b Path,
        to: &'c Path,
        options: CopyOptions,
    ) -> BoxFuture<'d, Result<()>>
    where
        'a: 'd,
        'b: 'd,
        'c: 'd,
        Self: 'd,
    {
        self.inner.copy_opts(from, to, options)
    }
}
