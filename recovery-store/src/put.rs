//! Writing one immutable object: create only, retried within bounds, harmless when repeated.
//!
//! Invariant: `put_immutable` returns Ok only if the store holds exactly these bytes under that
//! name, and it never replaces other bytes.

use crate::error::StoreError;
use crate::format::sha256;
use crate::layout::short;
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use std::sync::Arc;
use std::time::Duration;

/// How often and how fast a failed upload is tried again.
#[derive(Clone, Debug)]
pub struct RetryPolicy {
    /// Attempts in all; at least 1.
    pub max_attempts: u32,
    /// Wait after the first failure; doubled after each further one.
    pub first_wait: Duration,
    /// The longest wait.
    pub max_wait: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_attempts: 8,
            first_wait: Duration::from_millis(200),
            max_wait: Duration::from_secs(10),
        }
    }
}

/// An attempt to upload has failed.
#[derive(Clone, Debug)]
pub struct Alarm {
    /// The object.
    pub object: String,
    /// Which attempt it was, from 1.
    pub attempt: u32,
    /// What the store answered.
    pub error: String,
    /// How long until the next attempt; `None`: the writer has given up.
    pub next_try: Option<Duration>,
}

/// Called at each failed attempt, from the upload task: it must not block.
pub type AlarmFn = Arc<dyn Fn(&Alarm) + Send + Sync>;

/// A store, the place in it, and what to do when it fails.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) prefix: ObjectPath,
    pub(crate) location: String,
    pub(crate) retry: RetryPolicy,
    pub(crate) alarm: Option<AlarmFn>,
}

impl Target {
    /// The full path of an object of the container.
    pub(crate) fn path(&self, object: &str) -> ObjectPath {
        object
            .split('/')
            .fold(self.prefix.clone(), |path, part| path.join(part))
    }

    pub(crate) fn failed(
        &self,
        action: &'static str,
        object: &str,
        source: object_store::Error,
    ) -> StoreError {
        StoreError::Store {
            action,
            object: object.to_owned(),
            location: self.location.clone(),
            source: Box::new(source),
        }
    }

    /// Reads a whole object of at most `limit_bytes`; `None` if it is not there.
    pub(crate) async fn get_small(
        &self,
        object: &str,
        limit_bytes: u64,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let got = match self.store.get(&self.path(object)).await {
            Ok(got) => got,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(self.failed("read", object, error)),
        };
        if got.meta.size > limit_bytes {
            return Err(StoreError::format(
                object,
                crate::FormatError::Field {
                    what: "object length",
                    value: got.meta.size,
                },
            ));
        }
        let bytes = got
            .bytes()
            .await
            .map_err(|error| self.failed("read", object, error))?;
        Ok(Some(bytes.into()))
    }

    /// Creates `object` with exactly `bytes`.
    pub(crate) async fn put_immutable(
        &self,
        object: &str,
        bytes: PutPayload,
    ) -> Result<(), StoreError> {
        let path = self.path(object);
        let mut wait = self.retry.first_wait;
        let mut attempt = 1;
        loop {
            let options = PutOptions::from(PutMode::Create);
            let result = match fault::check("store.before-put") {
                Ok(()) => self.store.put_opts(&path, bytes.clone(), options).await,
                Err(error) => Err(object_store::Error::Generic {
                    store: "fault",
                    source: error.into(),
                }),
            };
            let error = match result {
                Ok(_) => {
                    fault::point("store.after-put");
                    return Ok(());
                }
                Err(error @ object_store::Error::AlreadyExists { .. })
                | Err(error @ object_store::Error::Precondition { .. }) => {
                    // Either an earlier attempt whose answer was lost, or someone else's object.
                    match self.compare(object, &bytes).await {
                        Ok(true) => return Ok(()),
                        // Gone again, as a concurrent clean-up of a torn upload would do.
                        Ok(false) => error,
                        Err(StoreError::Store { source, .. }) => *source,
                        Err(conflict) => return Err(conflict),
                    }
                }
                Err(error) => error,
            };
            let again = is_transient(&error) && attempt < self.retry.max_attempts;
            if let Some(alarm) = &self.alarm {
                alarm(&Alarm {
                    object: object.to_owned(),
                    attempt,
                    error: error.to_string(),
                    next_try: again.then_some(wait),
                });
            }
            if !again {
                return Err(StoreError::Upload {
                    object: object.to_owned(),
                    location: self.location.clone(),
                    attempts: attempt,
                    source: Box::new(error),
                });
            }
            tracing::warn!(object, attempt, %error, wait_ms = wait.as_millis() as u64, "upload failed, trying again");
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(self.retry.max_wait);
            attempt += 1;
        }
    }

    /// Whether the object holds exactly `ours`: true, or a conflict; false if it is not there.
    async fn compare(&self, object: &str, ours: &PutPayload) -> Result<bool, StoreError> {
        let ours: Vec<u8> = ours
            .iter()
            .flat_map(|chunk| chunk.iter().copied())
            .collect();
        let describe =
            |bytes: &[u8]| format!("{} bytes, SHA-256 {}…", bytes.len(), short(&sha256(bytes)));
        let meta = match self.store.head(&self.path(object)).await {
            Ok(meta) => meta,
            Err(object_store::Error::NotFound { .. }) => return Ok(false),
            Err(error) => return Err(self.failed("read", object, error)),
        };
        let mut theirs = format!("{} bytes", meta.size);
        if meta.size == ours.len() as u64 {
            match self.get_small(object, meta.size).await? {
                None => return Ok(false),
                Some(bytes) if bytes == ours => return Ok(true),
                Some(bytes) => theirs = describe(&bytes),
            }
        }
        Err(StoreError::Conflict {
            object: object.to_owned(),
            ours: describe(&ours),
            theirs,
        })
    }
}

/// Whether trying again can help: not when the store refuses us, or the place cannot be written.
fn is_transient(error: &object_store::Error) -> bool {
    use object_store::Error;
    match error {
        Error::NotFound { .. }
        | Error::InvalidPath { .. }
        | Error::NotSupported { .. }
        | Error::NotImplemented { .. }
        | Error::PermissionDenied { .. }
        | Error::Unauthenticated { .. }
        | Error::UnknownConfigurationKey { .. } => return false,
        _ => {}
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(io) = current.downcast_ref::<std::io::Error>() {
            use std::io::ErrorKind;
            let hopeless = [
                ErrorKind::PermissionDenied,
                ErrorKind::ReadOnlyFilesystem,
                ErrorKind::NotADirectory,
                ErrorKind::IsADirectory,
                ErrorKind::InvalidInput,
            ];
            if hopeless.contains(&io.kind()) {
                return false;
            }
        }
        cause = current.source();
    }
    true
}
