//! A store that fails on request.
#![allow(dead_code)]

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

/// What happens to the next write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is refused for now.
    Busy,
    /// It is refused for good.
    Denied,
    /// It is done, but the answer is lost.
    AnswerLost,
    /// It is done.
    None,
}

/// A store in memory whose next writes fail as told.
#[derive(Debug, Default)]
pub struct Flaky {
    /// The store behind.
    pub inner: Arc<InMemory>,
    /// What happens to the next writes; none left: they are done.
    pub faults: Mutex<VecDeque<Fault>>,
}

impl std::fmt::Display for Flaky {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("flaky")
    }
}

impl Flaky {
    /// These happen to the next writes.
    pub fn plan(&self, faults: impl IntoIterator<Item = Fault>) {
        self.faults.lock().expect("not poisoned").extend(faults);
    }
}

fn busy() -> object_store::Error {
    object_store::Error::Generic {
        store: "flaky",
        source: "503 busy".into(),
    }
}

impl ObjectStore for Flaky {
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
            let fault = self.faults.lock().expect("not poisoned").pop_front();
            match fault.unwrap_or(Fault::None) {
                Fault::Busy => Err(busy()),
                Fault::Denied => Err(object_store::Error::PermissionDenied {
                    path: location.to_string(),
                    source: "403".into(),
                }),
                Fault::AnswerLost => {
                    self.inner.put_opts(location, payload, opts).await?;
                    Err(busy())
                }
                Fault::None => self.inner.put_opts(location, payload, opts).await,
            }
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
        self.inner.get_opts(location, options)
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
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
